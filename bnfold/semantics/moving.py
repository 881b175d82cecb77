"""Operators that move elements, or average them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bnfold.affine import Affine
from bnfold.semantics.base import Answer, No, Semantics, Shape, Yes
from bnfold.semantics.contraction import Geometry


@dataclass(frozen=True)
class Movement(Semantics):
    """Moves elements and changes none: view, permute, slice, cat, pad, roll, pixel_shuffle, ...

    A movement is a gather, so it is described by running it on the indices of its operands' elements: output element
    ``j`` is operand element ``index[j]``, and 0 stands for an element that it made up as zero.
    """

    slots: tuple[str, ...]
    shapes: tuple[Shape, ...]
    apply: Callable[[Sequence[Tensor]], Tensor]
    ignored: tuple[str, ...] = ()
    #: For a concatenation, the axis it joins along.
    joins: int | None = None
    #: Axes of the operands along which a number that is not always the same says where elements come from.
    loose: tuple[int, ...] = ()
    #: How many zeros it makes up is such a number.
    may_pad: bool = False

    @property
    def shape_only(self) -> tuple[str, ...]:  # type: ignore[override]
        """The operands that only lend their shape."""
        return self.ignored

    def _index(self) -> tuple[Tensor, list[int]]:
        start, parts, bounds = 1, [], [1]
        for shape in self.shapes:
            count = int(torch.Size(shape).numel())
            # float64 holds every index exactly, and every movement is implemented for it.
            parts.append(torch.arange(start, start + count, dtype=torch.float64).reshape(shape))
            start += count
            bounds.append(start)
        return self.apply(parts).to(torch.int64), bounds

    def pull(self, out: Affine) -> Answer:
        """Scatters what is asked of the outputs to the elements they came from; copies must agree."""
        index, bounds = self._index()
        zeros = index == 0
        if self.may_pad or bool(zeros.any()):
            reached = out.shift if self.may_pad else out.shift.expand(index.shape)[zeros]
            if bool((reached.nan_to_num() != 0).any()):
                return No("zero-padding", "a shift would have to reach into padded zeros")
        found = []
        for wanted in (out.scale, out.shift):
            buffer = _scattered(index, wanted, bounds[-1])
            if buffer is None:
                return No("copies-differ", "one element is copied to places with different affines")
            found.append(buffer)
        operands = {}
        for slot, shape, low, high in zip(self.slots, self.shapes, bounds, bounds[1:]):
            scale, shift = (buffer[low:high].reshape(shape) for buffer in found)
            operands[slot] = Affine(scale, shift).compressed()
            if (part := operands[slot].uniform(self.loose)) is None:
                return _LOOSE
            operands[slot] = part
        return Yes(operands=operands)

    def push(self, given: Mapping[str, Affine]) -> Answer:
        """Gathers the operands' affines; an operand without one contributes the identity, padding anything."""
        for affine in given.values():
            if affine.uniform(self.loose) is None:
                return _LOOSE
            if self.may_pad and affine.has_shift:
                return No("zero-padding", "a shift would have to reach into padded zeros")
        index, bounds = self._index()
        scale = torch.ones(bounds[-1], dtype=torch.float64)
        shift = torch.zeros(bounds[-1], dtype=torch.float64)
        scale[0] = torch.nan
        for slot, shape, low, high in zip(self.slots, self.shapes, bounds, bounds[1:]):
            if slot in given:
                scale[low:high] = given[slot].scale.expand(shape).flatten()
                shift[low:high] = given[slot].shift.expand(shape).flatten()
        return Yes(out=Affine(scale[index], shift[index]).settled())

    def takes(self, shift: bool, operands: Mapping[str, bool]) -> bool:
        """Where all its operands do."""
        return all(operands[slot] for slot in self.slots)


#: With twice the size the error is at most sqrt(2**2 + 3**2) = 3.6 times the one that rounding the operand makes.
_LARGEST = 2.0
_LOOSE = No("dynamic-size", "which elements it moves depends on a size, along an axis that the affine varies along")


def _scattered(index: Tensor, wanted: Tensor, size: int) -> Tensor | None:
    """A vector of ``size`` with ``wanted``, broadcast, at ``index``; None where two wishes for one element differ.

    What is not wished for is free. Index 0 stands for no element, and what is free is no wish.
    """
    free = wanted.isnan()
    if bool(free.any()):
        index = index.masked_fill(free, 0)
    index, wanted = index.flatten(), wanted.expand(index.shape).flatten()
    buffer = torch.full((size,), torch.nan, dtype=torch.float64).scatter_(0, index, wanted)
    distinct = size - int(buffer.isnan().count_nonzero())
    if distinct < len(index) and not bool(((buffer.gather(0, index) == wanted) | (index == 0)).all()):
        return None
    return buffer


@dataclass(frozen=True)
class Same(Semantics):
    """A movement that leaves every element where it is: dropout in eval mode, clone, contiguous, a widening cast.

    ``widens``: its operand is of a narrower dtype, to which a shift from behind would be rounded. That is noise as the
    operand has it where the shift is no larger than ``_LARGEST`` times its ``size`` (root mean square, if known).
    """

    slot: str
    widens: bool = False
    size: Tensor | None = None

    def pull(self, out: Affine) -> Answer:
        """Asks the same of its operand."""
        if self.widens:
            usual = 0.0 if self.size is None else float((self.size * out.scale).nan_to_num().square().mean().sqrt())
            if float(out.shift.nan_to_num().abs().max()) > _LARGEST * usual:
                return No("dtype", "a shift would be rounded to the dtype that it is cast from")
        return Yes(operands={self.slot: out})

    def push(self, given: Mapping[str, Affine]) -> Answer:
        """Passes it on."""
        return Yes(out=given[self.slot])

    def takes(self, shift: bool, operands: Mapping[str, bool]) -> bool:
        """Where its operand does."""
        return operands[self.slot] and not (shift and self.widens and self.size is None)


@dataclass(frozen=True)
class Average(Semantics):
    """A weighted mean along ``axes`` of its operand: ``mean(s*x + t) = s*mean(x) + t`` where s, t are constant there.

    ``drops``: the axes are gone from the output. ``total`` is what the weights sum to, one but for a sum of so many
    elements: ``sum(s*x + t) = s*sum(x) + total*t``. ``no_shift`` is why only a scale passes, where the weights do not
    sum to one number everywhere: padded zeros are counted, or the number of elements is dynamic.
    """

    slot: str
    axes: tuple[int, ...]
    ndim: int
    drops: bool = False
    total: float = 1.0
    no_shift: str | None = None
    #: For a pool that is a convolution with equal weights: its window and how it walks.
    window: tuple[int, ...] = ()
    geometry: Geometry | None = None

    def _check(self, affine: Affine) -> No | None:
        if self.no_shift is not None and affine.has_shift:
            return No(self.no_shift, "its weights do not sum to one number everywhere, so a shift would change")
        if set(self.axes) & set(affine.varies()):
            return No("other-axis", "the affine varies along the axis that is averaged")
        return None

    def pull(self, out: Affine) -> Answer:
        """Commutes."""
        out = out.with_axes(self.axes) if self.drops else out
        return self._check(out) or Yes(operands={self.slot: Affine(out.scale, out.shift / self.total)})

    def push(self, given: Mapping[str, Affine]) -> Answer:
        """Commutes."""
        if set(given) != {self.slot}:
            return No("nonlinear", "the weights of the average depend on it")
        refused = self._check(given[self.slot])
        affine = Affine(given[self.slot].scale, given[self.slot].shift * self.total)
        return refused or Yes(out=affine.without_axes(self.axes) if self.drops else affine)

    def takes(self, shift: bool, operands: Mapping[str, bool]) -> bool:
        """Where its operand does, a shift only if the weights sum to one number."""
        return operands[self.slot] and (self.no_shift is None or not shift)
