"""Batches that a module is called with, and batches of the rows of a data file."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bnfold.errors import BnfoldError, InputError, UsageError
from bnfold.gate.data import select
from bnfold.gate.stored import Rows, in_order, open_arrays
from bnfold.graph.scripted import signature

#: What a model is called with: one tensor, a tuple or list of positional inputs, or a mapping of keyword inputs.
Batch = Any
Batches = Iterable[Batch] | Callable[[], Iterable[Batch]]


def rereadable(batches: Batches, why: str) -> Callable[[], Iterator[Batch]]:
    """A function that begins ``batches`` anew at every call; UsageError where they can be read only once."""
    if callable(batches):
        return lambda: iter(batches())
    if isinstance(batches, (Tensor, Mapping)) or not isinstance(batches, Iterable):
        hint = f"For one batch write [batch]; this is a {type(batches).__name__}"
        raise UsageError("batches must be an iterable of batches", hint=hint)
    if isinstance(batches, Iterator):
        hint = "Give a list, a DataLoader, or a function that returns an iterator"
        raise UsageError(f"batches can be read only once, and {why}", hint=hint)
    return lambda: iter(batches)


def call(model: nn.Module, batch: Batch) -> Any:
    """Calls a model with one batch; InputError where it fails on it."""
    args: tuple[Any, ...] = (batch,) if isinstance(batch, Tensor) else ()
    kwargs = dict(batch) if isinstance(batch, Mapping) else {}
    if isinstance(batch, (tuple, list)):
        args = tuple(batch)
    elif not isinstance(batch, (Tensor, Mapping)):
        hint = "A batch is a tensor, a tuple of positional inputs or a dict of inputs by name"
        raise InputError(f"a batch is a {type(batch).__name__}", hint=hint)
    try:
        return model(*args, **kwargs)
    except BnfoldError:
        raise
    except Exception as error:
        shapes = ", ".join(
            f"{value.dtype}{list(value.shape)}".removeprefix("torch.")
            for value in (*args, *kwargs.values())
            if isinstance(value, Tensor)
        )
        takes = signature(model)
        raise InputError(
            f"the model fails on the data with {type(error).__name__}: {error}",
            hint=f"It was given {shapes or 'no tensor'}; forward is {takes}. "
            "Batches hold the inputs alone, without labels",
        ) from error


def data_batches(
    model: nn.Module, data: Path | str | Mapping[str, Any], size: int
) -> tuple[Callable[[], Iterator[Batch]], int]:
    """Batches of the rows of ``data``, by the names of ``forward``'s parameters, and how many rows there are.

    For a ``forward(*inputs)``, which names none, there may be one array; that and what has no keyword is positional.

    Args:
        model: says what its inputs are called and, by its own parameters, in which precision it takes them.
        data: an .npz, an .npy for a model of one input, or arrays by name; of an .npz a few rows are in memory.
        size: rows in a batch; the last has fewer, or one more where a single row would remain.

    Raises:
        InputError: see ``load_data``; no array is called like an input.
    """
    parameters = signature(model).parameters.values()
    many = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    named = [p for p in parameters if p.kind not in many]
    optional = [p.name for p in named if p.default is not p.empty]
    names = [*(p.name for p in named if p.default is p.empty), *optional]
    where = str(data) if isinstance(data, (str, Path)) else None
    known: Mapping[str, Rows]
    if isinstance(data, (str, Path)):
        known = open_arrays(Path(data))
    else:
        known = {name: np.asarray(value) for name, value in data.items()}
    kinds = {p.kind for p in parameters}
    positional = inspect.Parameter.POSITIONAL_ONLY in kinds
    if not names and inspect.Parameter.VAR_POSITIONAL in kinds:
        positional = True
        names = [name for name in known if name not in ("labels", "targets")]
        if len(names) != 1:
            raise InputError(
                f"forward names no inputs, and the data has {len(names)} arrays",
                where=where,
                hint="Give one array, or a model whose forward names its inputs",
            )
    arrays, _ = select(known, names, optional=optional, where=where)
    if not arrays:
        what = f"no array for {names[0] if names else 'an input'}"
        raise InputError(what, where=where, hint="Name it like the input")
    floats = (t.dtype for t in itertools.chain(model.parameters(), model.buffers()) if t.is_floating_point())
    dtype = next(floats, torch.float32)

    def read() -> Iterator[Batch]:
        for batch in _batches(arrays, size, dtype):
            yield tuple(batch.values()) if positional else batch

    return read, min(map(len, arrays.values()))


def _batches(arrays: Mapping[str, Rows], size: int, dtype: torch.dtype) -> Iterator[dict[str, Tensor]]:
    with ExitStack() as stack:
        streams = {name: in_order(rows, size) for name, rows in arrays.items()}
        for stream in streams.values():
            stack.callback(stream.close)
        waiting: dict[str, np.ndarray] | None = None
        for rows in zip(*streams.values(), strict=True):
            chunk = dict(zip(streams, rows))
            if waiting is not None and len(rows[0]) == 1:  # one row alone has no variance
                waiting = {name: np.concatenate([waiting[name], chunk[name]]) for name in chunk}
                continue
            if waiting is not None:
                yield {name: _tensor(values, dtype) for name, values in waiting.items()}
            waiting = chunk
        if waiting is not None:
            yield {name: _tensor(values, dtype) for name, values in waiting.items()}


def _tensor(rows: np.ndarray, dtype: torch.dtype) -> Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(rows))
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
