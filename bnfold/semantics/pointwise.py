"""Operators that work element by element: affines, sums, products, and the ReLU family with maxima."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from bnfold.affine import Affine
from bnfold.semantics.base import Opaque, Rewritten, Semantics, Shape
from bnfold.semantics.equations import DEAD, EMPTY, LOG, SHIFT, SIGN, Equations, Gauge, compressed, numbered, pinned
from bnfold.semantics.system import Ints


@dataclass(frozen=True)
class Scaling(Semantics):
    """Multiplies and adds constants: ``y = s*x + t``. It goes (then y' is x'), or it stays and takes up differences.

    - one that goes: ``a_y = s*a_x``, ``b_y = s*b_x + t``
    - one that stays: ``s' = s*a_x/a_y``, ``t' = (s*b_x + t - b_y)/a_y``; a multiply has no t, an addition no s

    ``write`` answers the constants that make the operator compute another Affine. ``free``: which of ``"scale"`` and
    ``"shift"`` those can be. ``axes``: those that its constants may vary along, None for any.
    """

    slot: str
    affine: Affine
    kind: str
    write: Callable[[Affine], Mapping[str, Tensor]]
    free: tuple[str, ...] = ()
    axes: tuple[int, ...] | None = None
    #: Why its operand cannot take its place, if it cannot: it is of another dtype, or is written to later.
    stays: Opaque | None = None
    #: The deviation and the mean of its operand in training, as scale and shift, if it knows them.
    usual: Affine | None = None
    absorbs: ClassVar[bool] = True

    def relate(self, given: Mapping[str, Gauge], equations: Equations, shape: Shape) -> Gauge:
        """What holds whether it goes or stays. A table makes nothing vary along more axes."""
        x, (scale, shift), index = given[self.slot], self._parts(), self._index(shape)
        made = [index] if index is not None else []
        if self.stays is not None:
            equations.shift.pin(x.shift, self.stays.reason)  # it would be rounded to another dtype
        fresh = "scale" in self.free or bool((scale != 1).any())
        a = equations.scale.per_class(x.scale, *made) if fresh else x.scale
        # Whoever multiplies by zero may read anything, and who adds nothing passes a zero on.
        equations.scale.pin(np.where((scale != 0) & (shift != 0), x.scale, 0), "several-readers", (EMPTY,))
        if "shift" in self.free:
            b = equations.shift.per_class(x.shift, *(made or [x.scale]))
            pairs, s, t = _pairs(b, b, scale, shift)
            equations.lone |= zip(pairs[s == 0, 0].tolist(), t[s == 0].tolist())
        else:
            if index is None and scale.size > 1:
                equations.shift.pin(x.shift, "other-axis")
            b = equations.shift.combined([(scale, x.shift)], "shift-through-product")
        return Gauge(a, b)

    def goes(self, x: Gauge, y: Gauge, equations: Equations, *, dead: bool = False) -> None:
        """See the class. Where s is 0, its operand is emptied and s taken for 1; with ``dead`` readers leave y out."""
        scale, shift = self._parts()
        if y.scale is not x.scale:
            pairs, s, t = _pairs(y.scale, x.scale, scale, shift)
            none = s == 0
            tied = ~none if dead else np.ones_like(none)
            size = np.where(none, 1.0, s)[tied]
            equations.require(LOG, pairs[tied], [1.0, -1.0], np.abs(size), "goes")
            equations.require(SIGN, pairs[tied], 1.0, size < 0, "goes")
            equations.require(DEAD, pairs[~none], 1.0, 0.0, "goes")
            equations.require(DEAD, pairs[none][:, :1], 1.0, float(dead), "goes")
            equations.require(EMPTY, pairs[~none & (t == 0)], 1.0, 0.0, "goes")
            equations.require(EMPTY, pairs[none | (t != 0)][:, :1], 1.0, 0.0, "goes")
            if not dead:
                equations.require(DEAD, pairs[none][:, 1:], 1.0, 0.0, "goes")
                equations.require(EMPTY, pairs[none][:, 1:], 1.0, 1.0, "goes")
        if "shift" in self.free:
            pairs, s, t = _pairs(y.shift, x.shift, scale, shift)
            s = s if dead else np.where(s == 0, 1.0, s)
            equations.require(SHIFT, pairs, np.stack([np.ones_like(s), -s], 1), t, "goes")
            if not dead:
                equations.hold(y.shift)

    def remains(self, x: Gauge, y: Gauge, equations: Equations) -> None:
        """What holds beyond ``relate``."""
        equations.hold(y.shift)
        if "scale" in self.free:
            equations.scale.pin(np.where(self._parts()[0] != 0, x.scale, 0), "several-readers", (EMPTY,))
            if "shift" not in self.free:  # a multiply emits zeros, and not the zero of another shift
                equations.scale.pin(np.where(y.shift != 0, y.scale, 0), "several-readers", (EMPTY,))
        else:
            equations.scale.equate(y.scale, x.scale, "nonlinear")
        equations.scale.pin(y.scale, "nonlinear", (DEAD,))  # what it adds there nobody would know
        if self.axes is not None:
            rest = [axis for axis in range(y.scale.ndim) if axis not in self.axes]
            for side in (x, y):
                equations.uniform(side, rest, "other-axis")

    def rewritten(self, given: Mapping[str, Affine], after: Affine) -> Rewritten:
        """See the class."""
        total = after.after(self.affine.after(given[self.slot]) if self.slot in given else self.affine)
        return Rewritten(self.write(total))

    def _parts(self) -> tuple[Any, Any]:
        return self.affine.scale.numpy(), self.affine.shift.numpy()

    def _index(self, shape: Shape) -> Ints | None:
        """The places along the one axis it varies along; None where there are more."""
        axes = self.affine.varies()
        if len(axes) > 1:
            return None
        sizes = [shape[axis] if axis in axes else 1 for axis in range(len(shape))]
        return np.arange(int(np.prod(sizes))).reshape(sizes)


def _pairs(y: Ints, x: Ints, *constants: Any) -> tuple[Any, ...]:
    """Every variable of y once with that of x, and with the constants there."""
    y, x, *rest = np.broadcast_arrays(y, x, *constants)
    variables, at = np.unique(y.ravel(), return_index=True)
    return np.stack([variables, x.ravel()[at]], 1), *(each.ravel()[at] for each in rest)


@dataclass(frozen=True)
class Sum(Semantics):
    """``z = x + alpha*y`` of two values: ``a_z = a_x = a_y``, ``b_z = b_x + alpha*b_y``."""

    slots: tuple[str, str]
    alpha: float = 1.0

    def relate(self, given: Mapping[str, Gauge], equations: Equations, shape: Shape) -> Gauge:
        """See the class."""
        x, y = (given[slot].aligned(len(shape)) for slot in self.slots)
        scale = equations.scale.equate(x.scale, y.scale, "unequal-scales") if self.alpha else x.scale
        return Gauge(scale, equations.shift.combined([(1.0, x.shift), (self.alpha, y.shift)], "nonlinear"))


@dataclass(frozen=True)
class Product(Semantics):
    """``z = x*y`` of two values, or ``x/y``, or a matrix product: ``a_z = a_x*a_y`` and no shifts.

    ``uniform``: the axes of either along which its scale must not vary, as one that is summed.
    """

    slots: tuple[str, str]
    divides: bool = False
    uniform: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())

    def relate(self, given: Mapping[str, Gauge], equations: Equations, shape: Shape) -> Gauge:
        """See the class."""
        factors = [given[slot].aligned(len(shape)) for slot in self.slots]
        for factor in factors:
            equations.shift.pin(factor.base, "shift-through-product")
            equations.scale.pin(factor.scale, "nonlinear", (DEAD, EMPTY))
        x, y = (equations.scale.uniform(f.scale, axes, "other-axis") for f, axes in zip(factors, self.uniform))
        scale = equations.scale.combined([(1.0, x), (-1.0 if self.divides else 1.0, y)], "nonlinear", (LOG, SIGN))
        if scale is not x and scale is not y:
            equations.scale.pin(scale, "nonlinear", (DEAD, EMPTY))
        return Gauge(scale, pinned(len(shape)).base)


@dataclass(frozen=True)
class Homogeneous(Semantics):
    """``f(s*x) = s*f(x)`` for s > 0: the ReLU family. With ``shifts`` also ``f(x + t) = f(x) + t``: max and its pools.

    ``axes``: the axes along which elements are compared; scale and shift must not vary there. ``drops``: they are gone
    from the output. ``any_sign``: scales below zero pass as well, as where a mask chooses. ``clips``: what is below
    zero becomes zero.
    """

    slots: tuple[str, ...]
    axes: tuple[int, ...] = ()
    shifts: bool = False
    drops: bool = False
    any_sign: bool = False
    clips: bool = False

    def relate(self, given: Mapping[str, Gauge], equations: Equations, shape: Shape) -> Gauge:
        """``a_y = a_x >= 0``, and ``b_y = b_x`` or none."""
        parts = [given[slot] for slot in self.slots]
        for slot in set(given) - set(self.slots):
            equations.pin(given[slot], self.reason)
        made = parts[0]
        for part in parts[1:]:
            scale = equations.scale.equate(made.scale, part.scale, "unequal-scales")
            made = Gauge(scale, equations.shift.equate(made.shift, part.shift, "unequal-scales"))
        made = equations.uniform(made, self.axes, "other-axis")
        if not self.any_sign:
            equations.scale.pin(made.scale, "sign", (SIGN,))
        if not self.shifts:
            base = self._passed(made.base, equations)
            made = Gauge(made.scale, base, made.made if base.any() else None)
        return made.squeezed(self.axes) if self.drops else made

    def _passed(self, base: Ints, equations: Equations) -> Ints:
        """The shifts of the result: none but numbers that channels are which are left out, ``f(0*x + t) = f(t)``."""
        if self.any_sign or not equations.lone:  # none has a number of its own
            equations.shift.pin(base, "shift-through-activation")
            return np.zeros((1,) * base.ndim, dtype=np.int64)
        found, (places,) = numbered(base)
        number = np.array([equations.lone.get(v, 0.0) for v in found.tolist()])
        through = (number > 0) | ((number < 0) & self.clips)
        equations.passed |= dict.fromkeys(found[through].tolist(), equations.node)
        equations.shift.pin(found[~through], "shift-through-activation")
        return compressed(np.where(number > 0, found, 0)[places])


@dataclass(frozen=True)
class Normalised(Semantics):
    """Normalises, then multiplies and adds constants of its own: along ``axes`` its result is free. So are table rows.

    ``write`` answers the constants for an affine to be done after the own ones.
    """

    axes: tuple[int, ...]
    write: Callable[[Affine], Mapping[str, Tensor]]
    absorbs: ClassVar[bool] = True

    def relate(self, given: Mapping[str, Gauge], equations: Equations, shape: Shape) -> Gauge:
        """Its operand is pinned."""
        super().relate(given, equations, shape)
        return equations.own([n if axis in self.axes else 1 for axis, n in enumerate(shape)])

    def rewritten(self, given: Mapping[str, Affine], after: Affine) -> Rewritten:
        """``s*(gamma*x + beta) + t = (s*gamma)*x + (s*beta + t)``."""
        return Rewritten(self.write(after))
