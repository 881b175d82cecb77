"""Operators that work element by element: scalings, sums, products, and the ReLU family with maxima."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bnfold.affine import Affine
from bnfold.semantics.base import Answer, No, Semantics, Shape, Yes


@dataclass(frozen=True)
class Scaling(Semantics):
    """Multiplies and adds constants: ``y = affine(x)``. A source of Affines, and a place where others end.

    ``write`` answers the constants that make the operator compute another Affine, or None where it cannot.
    """

    slot: str
    affine: Affine
    kind: str
    write: Callable[[Affine], Mapping[str, Tensor] | None]
    #: Why its operand cannot take its place, if it cannot: it is of another dtype, or is written to later.
    stays: No | None = None

    def pull(self, out: Affine) -> Answer:
        """``out(affine(x))``: into the own constants; else the scale travels on; else all of it, and the node goes."""
        total = out.after(self.affine)
        constants = self.write(total)
        if constants is not None:
            return Yes(constants=constants)
        if not self.affine.has_scale:  # s*(x + c) + t = (s*x) + (s*c + t)
            constants = self.write(Affine(self.affine.scale, total.shift))
            if constants is not None:
                return Yes(operands={self.slot: out.only_scale()}, constants=constants)
        return self.stays or Yes(operands={self.slot: total}, bypass=self.slot)

    def push(self, given: Mapping[str, Affine]) -> Answer:
        """``affine(given(u))``: into the own constants; else all of it travels on, and the node goes."""
        total = self.affine.after(given[self.slot])
        constants = self.write(total)
        if constants is not None:
            return Yes(constants=constants)
        return self.stays or Yes(out=total, bypass=self.slot)

    def takes(self, shift: bool, operands: Mapping[str, bool]) -> bool:
        """A scaling that is still there can take either."""
        return True


@dataclass(frozen=True)
class Sum(Semantics):
    """``y = a + alpha*b`` of two values: the scale goes into both, the shift into one."""

    slots: tuple[str, str]
    shapes: tuple[Shape, Shape]
    out_ndim: int
    alpha: float = 1.0
    #: Set by the engine: the slot that should take a shift.
    home: str | None = None

    def pull(self, out: Affine) -> Answer:
        """``s*(a + alpha*b) + t = (s*a + t) + alpha*(s*b)``."""
        operands = {}
        for slot, shape in zip(self.slots, self.shapes):
            part = out.only_scale().unbroadcast(shape)
            if part is None:
                return No("broadcast", "an operand is broadcast along the axis that the affine varies along")
            operands[slot] = part
        if not out.has_shift:
            return Yes(operands=operands)
        order = sorted(zip(self.slots, self.shapes), key=lambda pair: pair[0] != self.home)
        for slot, shape in order:
            factor = 1.0 if slot == self.slots[0] else self.alpha
            part = Affine(out.scale, out.shift / factor).unbroadcast(shape) if factor else None
            if part is not None:
                operands[slot] = part
                return Yes(operands=operands)
        return No("broadcast", "an operand is broadcast along the axis that the shift varies along")

    def push(self, given: Mapping[str, Affine]) -> Answer:
        """Both operands must carry the same scale; the shifts add."""
        parts = []
        for slot in self.slots:
            part = given.get(slot)
            parts.append(Affine.identity(self.out_ndim) if part is None else part.broadcast(self.out_ndim))
        first, second = parts
        if not bool((first.scale == second.scale).all()):
            return No("unequal-scales", "the two operands of the sum do not carry the same scale")
        return Yes(out=Affine(first.scale, first.shift + self.alpha * second.shift).settled())

    def takes(self, shift: bool, operands: Mapping[str, bool]) -> bool:
        """A shift needs one operand that takes it, a scale both."""
        return (any if shift else all)(operands[slot] for slot in self.slots)


@dataclass(frozen=True)
class Product(Semantics):
    """``y = a*b`` (or ``a/b``: only the first slot) of two values: a scale passes into one factor."""

    slots: tuple[str, ...]
    shapes: tuple[Shape, ...]
    out_ndim: int
    home: str | None = None
    #: Both operands are one value, so that no factor can be scaled alone.
    square: bool = False

    def pull(self, out: Affine) -> Answer:
        """``s*(a*b) = (s*a)*b``."""
        if out.has_shift:
            return No("shift-through-product", "a shift does not pass a product of two values")
        if self.square:
            return No("several-readers", "both factors are one value")
        for slot, shape in sorted(zip(self.slots, self.shapes), key=lambda pair: pair[0] != self.home):
            part = out.unbroadcast(shape)
            if part is not None:
                return Yes(operands={slot: part})
        return No("broadcast", "both factors are broadcast along the axes that the scale varies along")

    def push(self, given: Mapping[str, Affine]) -> Answer:
        """``(s1*a)*(s2*b) = (s1*s2)*(a*b)``."""
        if any(affine.has_shift for affine in given.values()):
            return No("shift-through-product", "a shift does not pass a product of two values")
        if not set(given) <= set(self.slots):
            return No("nonlinear", "it is the divisor")
        scale = torch.ones((1,) * self.out_ndim, dtype=torch.float64)
        for affine in given.values():
            scale = scale * affine.broadcast(self.out_ndim).scale
        return Yes(out=Affine(scale, torch.zeros((1,) * self.out_ndim, dtype=torch.float64)))

    def takes(self, shift: bool, operands: Mapping[str, bool]) -> bool:
        """A scale, where one factor does."""
        return not shift and not self.square and any(operands[slot] for slot in self.slots)


@dataclass(frozen=True)
class Bilinear(Product):
    """Linear in each of two values (a matrix product): a scale that is one number for all passes into one of them."""

    def pull(self, out: Affine) -> Answer:
        """``s*(A @ B) = (s*A) @ B``."""
        return No("other-axis", "it mixes the axes that the scale varies along") if out.varies() else super().pull(out)

    def push(self, given: Mapping[str, Affine]) -> Answer:
        """``(s1*A) @ (s2*B) = (s1*s2)*(A @ B)``."""
        if any(affine.varies() for affine in given.values()):
            return No("other-axis", "it mixes the axes that the scale varies along")
        return super().push(given)


@dataclass(frozen=True)
class Homogeneous(Semantics):
    """``f(s*x) = s*f(x)`` for s > 0: the ReLU family. With ``shifts`` also ``f(x + t) = f(x) + t``: max and its pools.

    ``axes``: the axes along which elements are compared; scale and shift must not vary there. ``drops``: they are gone
    from the output. ``any_sign``: scales of zero and below pass as well, as where a mask chooses.
    """

    slots: tuple[str, ...]
    axes: tuple[int, ...] = ()
    shifts: bool = False
    drops: bool = False
    any_sign: bool = False

    def _check(self, affine: Affine) -> No | None:
        if affine.has_shift and not self.shifts:
            return No("shift-through-activation", "a shift does not pass an activation")
        if not self.any_sign and not affine.is_positive:
            return No("sign", "a scale that is zero or negative does not pass an activation or a maximum")
        if set(self.axes) & set(affine.varies()):
            return No("other-axis", "the affine varies along the axis that is compared")
        return None

    def pull(self, out: Affine) -> Answer:
        """Asks the same of every operand."""
        out = out.with_axes(self.axes) if self.drops else out
        return self._check(out) or Yes(operands=dict.fromkeys(self.slots, out))

    def push(self, given: Mapping[str, Affine]) -> Answer:
        """All operands must carry the same affine."""
        first = next(iter(given.values()))
        for slot in self.slots:
            other = given.get(slot)
            if other is None or first.agree(other) is None:
                return No("unequal-scales", "the operands that are compared do not carry the same affine")
        return self._check(first) or Yes(out=first.without_axes(self.axes) if self.drops else first)

    def takes(self, shift: bool, operands: Mapping[str, bool]) -> bool:
        """Where all operands do."""
        return (self.shifts or not shift) and all(operands[slot] for slot in self.slots)


@dataclass(frozen=True)
class Normalised(Semantics):
    """Normalises, then multiplies and adds constants of its own: layer_norm, group_norm. An affine after it goes there.

    ``write`` answers the constants for an affine to be done after the own ones, or None where they cannot vary so.
    """

    write: Callable[[Affine], Mapping[str, Tensor] | None]

    def pull(self, out: Affine) -> Answer:
        """``s*(gamma*x + beta) + t = (s*gamma)*x + (s*beta + t)``."""
        constants = self.write(out)
        if constants is None:
            return No("other-axis", "the affine varies along axes that its own constants do not")
        return Yes(constants=constants)

    def takes(self, shift: bool, operands: Mapping[str, bool]) -> bool:
        """Takes both."""
        return True
