"""Operators that move elements, or average them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnfold.affine import Affine
from bnfold.semantics.base import Semantics, Shape
from bnfold.semantics.contraction import Geometry
from bnfold.semantics.equations import Equations, Gauge, compressed, pinned
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
    shape_only: tuple[str, ...] = ()
    #: For a concatenation, the axis it joins along.
    joins: int | None = None
    #: Axes along which it leaves all elements where they are, however many there are.
    kept: tuple[int, ...] = ()
    #: Axes of the operands along which a number that is not always the same says where elements come from.
    loose: tuple[int, ...] = ()
    #: How many zeros it makes up is such a number.
    may_pad: bool = False
    #: Float64 constants among the slots.
    get: Callable[[str], Tensor | None] = lambda slot: None

    def relate(self, given: Mapping[str, Gauge], equations: Equations, shape: Shape) -> Gauge:
        """Shares the variables; constants that it joins to values have their own."""
        parts = [given[s] if s in given else self._constant(s, n, equations) for s, n in zip(self.slots, self.shapes)]
        if self.may_pad:
            for part in parts:
                equations.shift.pin(part.base, "zero-padding")
        if self.loose:
            parts = [equations.uniform(part, self.loose, "dynamic-size") for part in parts]
        first = {int(part.scale.flat[0]) for part in parts}
        if all(p.scale.size == 1 and not p.base.any() for p in parts) and len(first) == 1:
            return Gauge(np.full((1,) * len(shape), first.pop()), pinned(len(shape)).base)
        if len(parts) == 1 and self._stays(parts[0]):
            scale, base = parts[0].scale, parts[0].base
            zero = made = self._moved([np.ones((1,) * len(shape))]) == 0
        else:
            # Where everything goes; 0, and here -1, is an element that it made up.
            scale = self._moved([part.scale + 1 for part in parts]) - 1
            base = pinned(len(shape)).base
            if any(part.base.any() for part in parts):
                base = self._moved([part.base + 1 for part in parts]) - 1
            zero = made = scale < 0
            if any(part.made is not None for part in parts):
                held = (np.zeros((1,) * len(n), bool) if p.made is None else p.made for p, n in zip(parts, self.shapes))
                made = self._moved([~each for each in held]) == 0
            if zero.any():
                scale, base = _filled(scale), np.maximum(_filled(base), 0)
                if (scale < 0).any():
                    scale = np.where(scale < 0, equations.scale.fresh(()), scale)
        if zero.any() and np.broadcast(scale, base, made).size > LARGEST:
            for part in parts:
                equations.shift.pin(part.base, "zero-padding")
            base = pinned(made.ndim).base
        return Gauge.holed(scale, base, made)

    def _stays(self, part: Gauge) -> bool:
        """Whether classes differ only along axes along which everything stays where it is."""
        moves = (axis for axis in range(part.base.ndim) if axis not in self.kept)
        return bool(self.kept) and part.made is None and not any(map(part.varies, moves))

    def _moved(self, codes: Sequence[Any]) -> Ints:
        # Every movement is implemented for floats, which hold whole numbers exactly up to here.
        dtype = torch.float32 if max(int(code.max()) for code in codes) < 1 << 24 else torch.float64
        alike = [axis for axis in self.kept if all(code.shape[axis] == 1 for code in codes)]
        shapes = (tuple(1 if axis in alike else n for axis, n in enumerate(shape)) for shape in self.shapes)
        wide = [torch.as_tensor(code, dtype=dtype).expand(shape) for code, shape in zip(codes, shapes)]
        return compressed(self.apply(wide).numpy()).astype(np.int64)

    def _constant(self, slot: str, shape: Shape, equations: Equations) -> Gauge:
        gauge = pinned(len(shape))
        if prod(shape) <= MOST and self.get(slot) is not None:
            gauge = equations.own(shape)
        equations.constants[equations.node, slot] = gauge
        return gauge


def reshaped(t: Tensor, shape: Shape) -> Tensor:
    """``t.reshape(shape)``, which leaves expanded what is expanded along all axes that become others together."""
    small, i, j = list[int](), 0, 0
    while i < t.ndim or j < len(shape):
        first, last, before, after = i, j, 1, 1
        while (i, j) == (first, last) or before != after:
            if before <= after and i < t.ndim:
                before, i = before * t.shape[i], i + 1
            else:
                after, j = after * shape[j], j + 1
        alike = all(t.stride(axis) == 0 or t.shape[axis] == 1 for axis in range(first, i))
        small += [1] * (j - last) if alike else shape[last:j]
        for axis in range(first, i if alike else first):
            t = t.narrow(axis, 0, 1)
    return t.reshape(small).expand(shape)


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
        """Its operand's; a constant is stored as it is."""
        return given.get(self.slot, pinned(len(shape)))

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
                equations.pin(gauge, self.reason)
        made = equations.uniform(given.get(self.slot, pinned(self.ndim)), self.axes, "other-axis")
        if self.no_shift is not None:
            equations.shift.pin(made.base, self.no_shift)
            made = Gauge(made.scale, pinned(made.scale.ndim).base)
        if self.total != 1:
            made = Gauge(made.scale, equations.shift.combined([(self.total, made.shift)], "nonlinear"))
        return made.squeezed(self.axes) if self.drops else made
