"""Which of an ONNX file's inputs and outputs are the model's: any tool may have written the file.

Inputs go by name, then by what alone fits in dtype and shape, then by position. Outputs go by position, because that is
how a deployed file is read; only where the file returns more than the model they go by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from bnfold.errors import InputError
from bnfold.gate.values import to_numpy
from bnfold.graph.capture import Captured, input_shapes
from bnfold.graph.names import number_names
from bnfold.runtime.runtime import Session, ValueInfo

_ALIKE = "Name the file's inputs like the model's, or give the model that it was made from"


@dataclass(frozen=True)
class Match:
    """How the model's values get into the file, and its results out of it.

    Attributes:
        inputs: flat input index and the file's name for it.
        outputs: the file's outputs that are the model's, in the model's order; None for all of them as they are.
        pinned: size by symbol, where the file fixes a dimension that is dynamic in the model.
        wider: whether the file may return float32 where the model returns float16 or bfloat16, as one does whose inside
            alone was converted.
        notes: what a user should know.
    """

    inputs: tuple[tuple[int, str], ...]
    outputs: tuple[str, ...] | None = None
    pinned: Mapping[str, int] | None = None
    wider: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Input:
    """One of the model's inputs: its place, its dtype, and its shape with sizes or expressions of symbols."""

    index: int
    name: str
    dtype: np.dtype[Any]
    shape: tuple[Any, ...]

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}[{', '.join(str(n) if isinstance(n, int) else '?' for n in self.shape)}]"


def match(captured: Captured, session: Session, *, strict: bool = False, widened: bool = False) -> Match:
    """How ``session``'s inputs and outputs belong to those of the captured model.

    ``strict``: the file is the model's own export, in which other names, sizes or dtypes are faults for the gate;
    ``widened``: the session computes in float32 what the file holds as bfloat16.

    Raises:
        InputError: they do not fit; the message lists both sides.
    """
    ours = _inputs(captured)
    taken = {value.name for value in session.inputs}
    if strict and taken <= {mine.name for mine in ours}:
        return Match(tuple((mine.index, mine.name) for mine in ours if mine.name in taken))
    pairs = _pair(ours, list(session.inputs))
    pinned: dict[str, int] = {}
    for mine, theirs in pairs:
        for symbol, size in (_pins(mine, theirs) or {}).items():
            if pinned.setdefault(symbol, size) != size:
                listed = "; ".join(f"{_words(b)} for '{a.name}'" for a, b in pairs)
                raise InputError(f"the file fixes sizes that the model needs to be equal: {listed}", hint=_ALIKE)
    sizes = [f"{captured.dims.get(symbol, symbol)} {size}" for symbol, size in pinned.items()]
    notes = [f"the file is fixed at {', '.join(sizes)}, and judged at no other size"] if sizes else []
    if unused := [mine.name for mine in ours if mine not in [a for a, _ in pairs]]:
        notes.append(f"the file does not take the model's {', '.join(unused)}")
    if renamed := [f"{mine.name} as '{theirs.name}'" for mine, theirs in pairs if mine.name != theirs.name]:
        notes.append(f"the file takes {', '.join(renamed)}")
    cast = [f"{a.name} as {b.dtype}, the model as {a.dtype}" for a, b in pairs if a.dtype != b.dtype]
    if cast and not widened:
        notes.append(f"the file takes {', '.join(cast)}")
    outputs, more = _outputs(captured, session)
    return Match(tuple((a.index, b.name) for a, b in pairs), outputs, pinned, True, (*notes, *more))


def _inputs(captured: Captured) -> list[_Input]:
    found = []
    for name, shape in input_shapes(captured).items():
        index = captured.names.index(name)
        dtype = captured.flat[index].dtype
        if dtype.is_complex:  # ONNX has pairs of reals
            dtype, shape = dtype.to_real(), (*shape, 2)
        found.append(_Input(index, name, to_numpy(torch.empty(0, dtype=dtype)).dtype, shape))
    return found


def _pair(ours: list[_Input], theirs: list[ValueInfo]) -> list[tuple[_Input, ValueInfo]]:
    """The model's input for each of the file's, in the model's order."""
    by_name = {value.name: value for value in theirs}
    found = {mine.index: by_name[mine.name] for mine in ours if mine.name in by_name}
    for mine in ours:
        if mine.index in found:
            _check(mine, found[mine.index])
    left = [mine for mine in ours if mine.index not in found]
    free = [value for value in theirs if value.name not in {value.name for value in found.values()}]
    both = f"(the file: {_listed(map(_words, theirs))}; the model: {_listed(map(str, ours))})"
    if len(free) > len(left):
        what = f"the file's inputs do not match the model's: it takes {len(theirs)}, the model {len(ours)}"
        raise InputError(f"{what} {both}", hint=_ALIKE)
    while alone := _alone(left, free):
        mine, value = alone
        found[mine.index] = value
        left.remove(mine)
        free.remove(value)
    if len(free) == len(left) and all(map(_fits, left, free)):
        found |= {mine.index: value for mine, value in zip(left, free)}
    elif free:
        if len(left) == len(free) == 1:
            _check(left[0], free[0])
        many = "more than one" if any(_fits(mine, free[0]) for mine in left) else "none"
        what = f"the file's input '{free[0].name}' fits {many} of the model's inputs"
        raise InputError(f"{what} {both}", hint=_ALIKE)
    return [(mine, found[mine.index]) for mine in ours if mine.index in found]


def _alone(left: Sequence[_Input], free: Sequence[ValueInfo]) -> tuple[_Input, ValueInfo] | None:
    """A pair of which neither fits another."""
    for value in free:
        fitting = [mine for mine in left if _fits(mine, value)]
        if len(fitting) == 1 and sum(_fits(fitting[0], other) for other in free) == 1:
            return fitting[0], value
    return None


def _fits(mine: _Input, theirs: ValueInfo) -> bool:
    return _takes(mine.dtype, theirs.dtype) and _pins(mine, theirs) is not None


def _takes(mine: np.dtype[Any], theirs: np.dtype[Any]) -> bool:
    """Whether values of the model's dtype can be given as the file's: the same, integers, or float32 of half floats."""
    if mine == theirs or (mine.kind in "iu" and theirs.kind in "iu"):
        return True
    return mine.kind in "fV" and mine.itemsize == 2 and theirs == np.float32


def _check(mine: _Input, theirs: ValueInfo) -> None:
    """Raises InputError where an input of the file is not the model's of that name."""
    if not _takes(mine.dtype, theirs.dtype):
        hint = "Convert one of them: a comparison across kinds says nothing"
        if mine.dtype.kind in "fV" and theirs.dtype.kind in "fV":
            hint = f"Judge it against the model in that dtype: --dtype {theirs.dtype.name} (dtype=torch.{theirs.dtype})"
        raise InputError(
            f"the file takes '{theirs.name}' as {theirs.dtype.name}, the model as {mine.dtype.name}", hint=hint
        )
    if _pins(mine, theirs) is None:
        raise InputError(
            f"the file's input {_words(theirs)} does not fit the model's {mine}{_layouts(mine, theirs)}",
            hint="Give the model inputs of the file's shape (--input); a size that the model fixes is not judged at "
            "another: leave out --static",
        )


def _layouts(mine: _Input, theirs: ValueInfo) -> str:
    """What is said where one of them has its channels first and the other last."""
    first, last = ("NCHW", "NHWC") if len(mine.shape) == 4 else ("channels first", "channels last")
    channels, *others = mine.shape[1:] or (None,)
    for given, ours, its in (((*others, channels), first, last), ((mine.shape[-1:] + mine.shape[1:-1]), last, first)):
        moved = replace(mine, shape=(*mine.shape[:1], *given))
        if others and moved.shape != mine.shape and _pins(moved, theirs) is not None:
            return f": the model takes {ours} and the file {its}, so one of them needs a transposition in front"
    return ""


def _pins(mine: _Input, theirs: ValueInfo) -> dict[str, int] | None:
    """What the file's fixed sizes make of the model's symbols; None where the shapes do not fit."""
    if not theirs.shape:  # a scalar and an unknown rank look alike
        return {}
    if len(theirs.shape) != len(mine.shape):
        return None
    import sympy  # takes long, and between files there are no symbols of its

    pins: dict[str, int] = {}
    for size, wanted in zip(theirs.shape, mine.shape):
        if not isinstance(size, int) or size == wanted:
            continue
        if isinstance(wanted, int) or len(wanted.free_symbols) != 1:
            return None
        (symbol,) = wanted.free_symbols
        solved = sympy.solve(wanted - size, symbol)
        if len(solved) != 1 or not solved[0].is_Integer or solved[0] < 1:
            return None
        if pins.setdefault(str(symbol), int(solved[0])) != int(solved[0]):
            return None
    return pins


def _outputs(captured: Captured, session: Session) -> tuple[tuple[str, ...] | None, list[str]]:
    ours, theirs = number_names(captured.program), [value.name for value in session.outputs]
    if len(theirs) <= len(ours):
        swapped = theirs != ours and sorted(theirs) == sorted(ours)
        return None, ["the file returns the model's outputs in another order"] if swapped else []
    named = set(ours) <= set(theirs)
    taken = ours if named else theirs[: len(ours)]
    more = ", ".join(f"'{name}'" for name in theirs if name not in taken)
    how = "" if named else f", and the first {len(ours)} are taken for the model's"
    return tuple(taken), [
        f"the file returns more than the model: {more} {'is' if ',' not in more else 'are'} not judged{how}"
    ]


def _listed(words: Iterable[str]) -> str:
    return "; ".join(words) or "none"


def _words(value: ValueInfo) -> str:
    return f"{value.name} {value.dtype.name}[{', '.join('?' if n is None else str(n) for n in value.shape)}]"
