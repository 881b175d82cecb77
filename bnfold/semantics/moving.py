"""Operators that move elements, or average them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor

from bnfold.affine import Affine
from bnfold.semantics.base import Semantics, Shape, pin
from bnfold.semantics.contraction import Geometry
from bnfold.semantics.equations import DEAD, Equations, Gauge, compressed, pinned
from bnfold.semantics.system import Ints

#: A constant of more elements than this, joined to values, stays as it is.
MOST = 1 << 14
#: Where zeros among more classes than this are made up, no shift passes: it would be another in every window.
LARGEST = 1 << 19
#: See ``Same``.
_LARGEST = 2.0


@dataclass(frozen=True)
class Movement(Semantics):
    """Moves elements and changes none: view, permute, slice, cat, pad, roll, pixel_shuffle, ...

    Elements keep their gauge. A movement is a gather, so it is described by running it on the classes of its operands'
    elements; 0 stands for an element that it made up as zero, whose scale is free and whose shift is none.
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
    #: Float64 constants among the slots.
    get: Callable[[str], Tensor | None] = lambda slot: None

    @property
    def shape_only(self) -> tuple[str, ...]:  # type: ignore[override]
        """The operands that only lend their shape."""
        return self.ignored

    def relate(self, given: Mapping[str, Gauge], equations: Equations, shape: Shape) -> Gauge:
        """Shares the variables; constants that it joins to values have their own."""
        parts = [given[s] if s in given else self._constant(s, n, equations) for s, n in zip(self.slots, self.shapes)]
        if self.may_pad:
            for part in parts:
                equations.shift.pin(part.shift, "zero-padding")
        if self.loose:
            parts = [Gauge(*(
                space.uniform(indices, self.loose, "dynamic-size")
                for space, indices in ((equations.scale, p.scale), (equations.shift, p.shift))
            )) for p in parts]  # fmt: skip
        first = {int(part.scale.flat[0]) for part in parts}
        if all(p.alike() and not p.shift.any() for p in parts) and len(first) == 1:
            return Gauge(np.full((1,) * len(shape), first.pop()), pinned(len(shape)).shift)
        scales, of_scale = _numbered([part.scale for part in parts], equations.scale.count)
        shifts, of_shift = _numbered([part.shift for part in parts], equations.shift.count)
        # Few classes: floats hold each exactly, and every movement is implemented for them.
        few = np.float32 if len(scales) * len(shifts) < 1 << 24 else np.float64
        codes = ((s * len(shifts) + t + 1).astype(few) for s, t in zip(of_scale, of_shift))
        wide = [torch.as_tensor(c).expand(n).contiguous() for c, n in zip(codes, self.shapes)]
        code = _narrowed(self.apply(wide)).to(torch.int64).numpy()
        zero = code == 0
        scale, shift = np.divmod(np.maximum(code - 1, 0), len(shifts))
        scale, shift = scales[scale], shifts[shift]
        if zero.any():
            if code.size > LARGEST:
                for part in parts:
                    equations.shift.pin(part.shift, "zero-padding")
                shift = pinned(code.ndim).shift
            else:
                shift[zero] = 0
            scale = _filled(np.where(zero, -1, scale))
            if (scale < 0).any():
                scale = np.where(scale < 0, equations.scale.fresh(()), scale)
        return Gauge(compressed(scale), compressed(shift))

    def _constant(self, slot: str, shape: Shape, equations: Equations) -> Gauge:
        gauge = pinned(len(shape))
        if prod(shape) <= MOST and self.get(slot) is not None:
            gauge = Gauge(equations.scale.fresh(shape), equations.shift.fresh(shape))
            equations.scale.pin(gauge.scale, "nonlinear", (DEAD,))
        equations.constants[equations.node, slot] = gauge
        return gauge


def _numbered(arrays: Sequence[Ints], count: int) -> tuple[Ints, list[Ints]]:
    """What occurs in arrays of indices below ``count``, and the arrays as places in that."""
    used = np.zeros(count, dtype=bool)
    for each in arrays:
        used[each] = True
    places = np.cumsum(used) - 1
    return np.flatnonzero(used), [places[each] for each in arrays]


def _narrowed(code: Tensor) -> Tensor:
    """With size 1 on every axis along which all are equal."""
    for axis in range(code.ndim):
        if code.shape[axis] > 1:
            first = code.narrow(axis, 0, 1)
            if torch.equal(first, code.narrow(axis, 1, 1)) and bool((code == first).all()):
                code = first
    return code


def _filled(indices: Ints) -> Ints:
    """Compressed, those below zero taking whatever the others along an axis are."""
    for axis in range(indices.ndim):
        high = indices.max(axis, keepdims=True)
        if ((indices == high) | (indices < 0)).all():
            indices = high
    return indices


@dataclass(frozen=True)
class Same(Semantics):
    """A movement that leaves every element where it is: dropout in eval mode, clone, contiguous, a widening cast.

    ``widens``: its operand is of a narrower dtype, to which a shift from behind would be rounded. That is noise as the
    operand has it where the shift is no larger than ``_LARGEST`` times its ``size`` (root mean square, if known).
    """

    slot: str
    widens: bool = False
    size: Tensor | None = None

    def relate(self, given: Mapping[str, Gauge], equations: Equations, shape: Shape) -> Gauge:
        """Its operand's."""
        return given[self.slot]

    def rounds(self, after: Affine) -> bool:
        """Whether storing ``after(x)`` in place of its operand x would round a shift that is too large."""
        usual = 0.0 if self.size is None else float((self.size * after.scale).square().mean().sqrt())
        return self.widens and float(after.shift.abs().max()) > _LARGEST * usual


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

    def relate(self, given: Mapping[str, Gauge], equations: Equations, shape: Shape) -> Gauge:
        """Commutes with what does not vary along the averaged axes; other operands decide its weights."""
        for slot, gauge in given.items():
            if slot != self.slot:
                pin(equations, gauge, self.reason)
        scale = equations.scale.uniform(given[self.slot].scale, self.axes, "other-axis")
        shift = equations.shift.uniform(given[self.slot].shift, self.axes, "other-axis")
        if self.no_shift is not None:
            equations.shift.pin(shift, self.no_shift)
            shift = pinned(shift.ndim).shift
        shift = equations.shift.combined([(self.total, shift)], "nonlinear")
        gone = self.axes if self.drops else ()
        return Gauge(scale.squeeze(gone), shift.squeeze(gone))
