"""Tensors by key, those beyond a budget in a temporary file: constants in float64 are a model twice over."""

from __future__ import annotations

import contextlib
import tempfile
import weakref
from collections.abc import Hashable, Iterator, MutableMapping
from typing import IO, TypeVar

import numpy as np
import torch
from torch import Tensor

#: Bytes that are held in memory.
BUDGET = 512 << 20

Key = TypeVar("Key", bound=Hashable)


class Spill(MutableMapping[Key, Tensor]):
    """A dict of float64 tensors. What is read of one in the file is a copy of its own."""

    def __init__(self) -> None:
        self._held: dict[Key, Tensor | tuple[int, tuple[int, ...]]] = {}
        self._size = self._end = 0
        self._file: IO[bytes] | None = None

    def __setitem__(self, key: Key, tensor: Tensor) -> None:
        if key in self._held:
            del self[key]
        size = tensor.numel() * tensor.element_size()
        if self._size + size > BUDGET and tensor.dtype == torch.float64:
            with contextlib.suppress(OSError):  # no room: it stays in memory
                if self._file is None:
                    self._file = tempfile.TemporaryFile()  # noqa: SIM115
                    weakref.finalize(self, self._file.close)
                self._file.seek(self._end)
                self._file.write(tensor.detach().contiguous().numpy().reshape(-1).data.cast("B"))
                self._held[key] = self._end, tuple(tensor.shape)
                self._end += size
                return
        self._held[key] = tensor
        self._size += size

    def __getitem__(self, key: Key) -> Tensor:
        held = self._held[key]
        if isinstance(held, Tensor):
            return held
        start, shape = held
        assert self._file is not None
        self._file.seek(start)
        array = np.fromfile(self._file, np.float64, int(np.prod(shape, dtype=np.int64)))
        return torch.from_numpy(array.reshape(shape))

    def is_apart(self, key: Key) -> bool:
        """Whether a tensor is in the file."""
        return not isinstance(self._held[key], Tensor)

    def __delitem__(self, key: Key) -> None:
        held = self._held.pop(key)
        if isinstance(held, Tensor):
            self._size -= held.numel() * held.element_size()

    def __iter__(self) -> Iterator[Key]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)
