"""A file that another one is compared with: in float64, and as ONNX Runtime runs it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bnfold.errors import InputError, LowerError
from bnfold.evaluate.evaluator import File64
from bnfold.evaluate.subject import Run
from bnfold.gate.claims import run_file
from bnfold.gate.evidence import unit_roundoff
from bnfold.gate.samples import Batch
from bnfold.gate.values import as_tensor, to_numpy
from bnfold.runtime.runtime import Device, open_session


class Original:
    """A file that another one is compared with. Raises what ``File64`` raises."""

    louder = 1.0

    def __init__(self, path: Path, device: Device | str) -> None:
        self.file, self._path, self._device = File64(path), path, device
        self.outputs = [value.name for value in self.file.outputs]
        self.inputs = self.file.inputs
        kinds = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
        floats = {v.name: kinds.get(v.dtype.name, torch.float64) for v in self.file.outputs
                  if v.dtype.kind == "f" or v.dtype.name == "bfloat16"}  # fmt: skip
        self.units = {name: unit_roundoff(dtype) for name, dtype in floats.items()}
        self.epsilon, self.halves = self.file.epsilon(), self.file.halves()
        self.decisions: Sequence[str] = ()
        self._session: Any = None

    def run(
        self, batch: Batch, keep: Collection[str] = (), *, follow: Mapping[str, Any] | None = None,
        seed: int | None = None,
    ) -> Run:  # fmt: skip
        """As ``Reference.run``."""
        found = run_file(self.file, {v.name: x for v, x in zip(self.inputs, batch.flat)}, keep, follow=follow,
                         jitter=None if seed is None else (None, seed))  # fmt: skip
        self.decisions = list(found.decided)
        return found

    def open(self) -> None:
        """Opens it in ONNX Runtime, without optimisations.

        Raises:
            InputError: ONNX Runtime does not take it.
        """
        try:
            self._session = open_session(self._path, device=self._device, optimized=False)
        except LowerError as error:
            raise InputError(
                f"ONNX Runtime does not run the original: {error.what}", where=str(self._path),
                hint="--no-check folds it unproved",
            ) from error  # fmt: skip

    def own(self, batch: Batch) -> list[Tensor]:
        """As ``Reference.own``, by ONNX Runtime; it must be open."""
        feeds = {v.name: to_numpy(x) for v, x in zip(self.inputs, batch.flat)}
        found = self._session.run(feeds, list(self.outputs))
        return [as_tensor(x) for x in found]

    def loudly(self, batch: Batch, seed: int | None, keep: Collection[str] = ()) -> Run:
        """There is no such run."""
        raise NotImplementedError

    def influence(self, value: str) -> frozenset[int] | None:
        """Not known."""
        return None

    def complete(self, taken: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Each has its own."""
        return dict(taken)
