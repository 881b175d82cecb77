"""Gauges, and what an operator says about those around it.

A value v may be stored as v' with ``v = a*v' + b``, constants a and b per element: its gauge. An operator relates the
gauges of its operands and of its result, and says nothing else. Three linear systems hold all of it: the logarithms of
|a| over the reals, the signs of a over GF(2), and b over the reals. Two more over GF(2) hold what a scale of zero
makes of a channel: *dead*, so that readers leave it out (a is 0), and *empty*, so that its producer emits zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnfold.semantics.system import Batch, Floats, Ints, System

#: The order of variables: those that contractions and affines make are eliminated first, then the youngest.
_FIRST = 1 << 40
LOG, SIGN, SHIFT, DEAD, EMPTY = "log", "sign", "shift", "dead", "empty"
SYSTEMS = (LOG, SIGN, SHIFT, DEAD, EMPTY)


#: Equations of one length by system: variables, coefficients, right-hand sides, and where they come from.
Blocks = dict[str, list[tuple[Ints, Floats, Floats, int]]]


@dataclass(frozen=True, eq=False)
class Gauge:
    """Which variables the scale and the shift of a value are: indices that broadcast to it, 0 being pinned (1 or 0).

    Zeros that a movement made up among elements have no shift. They are kept apart, as ``made``: padding rows and
    columns of every channel is two small arrays, and one with a class for every element otherwise.
    """

    scale: Ints
    #: The shift of what was not made up. It varies along no axis that ``made`` varies along, so all of it occurs.
    base: Ints
    made: NDArray[np.bool_] | None = None

    @classmethod
    def holed(cls, scale: Ints, base: Ints, made: NDArray[np.bool_]) -> Gauge:
        """With zeros where ``made`` says so, kept apart if that can be."""
        scale, base, made = compressed(scale), compressed(base), compressed(made)
        if made.size == 1 or not base.any():
            return cls(scale, np.zeros_like(base) if made.all() else base)
        if any(min(sizes) > 1 for sizes in zip(made.shape, base.shape)):
            return cls(scale, compressed(np.where(made, 0, base)))
        return cls(scale, base, made)

    @cached_property
    def shift(self) -> Ints:
        """The shift of every element."""
        return self.base if self.made is None else np.where(self.made, 0, self.base)

    def varies(self, axis: int) -> bool:
        """Whether it is not one along an axis."""
        return any(each is not None and each.shape[axis] > 1 for each in (self.scale, self.base, self.made))

    def squeezed(self, axes: tuple[int, ...]) -> Gauge:
        """Without axes along which it does not vary."""
        made = None if self.made is None else self.made.squeeze(axes)
        return Gauge(self.scale.squeeze(axes), self.base.squeeze(axes), made)

    def aligned(self, ndim: int) -> Gauge:
        """With leading axes, as broadcasting adds them."""
        axes = tuple(range(ndim - self.scale.ndim))
        made = None if self.made is None else np.expand_dims(self.made, axes)
        return Gauge(np.expand_dims(self.scale, axes), np.expand_dims(self.base, axes), made)


def pinned(ndim: int) -> Gauge:
    """The gauge of a value that is stored as it is."""
    zeros = np.zeros((1,) * ndim, dtype=np.int64)
    return Gauge(zeros, zeros)


def compressed(indices: NDArray[Any]) -> NDArray[Any]:
    """The same with size 1 on every axis along which all are equal, as all are that lie in one place."""
    indices = indices[tuple(slice(1 if step == 0 else None) for step in indices.strides)]
    for axis in range(indices.ndim):
        if indices.shape[axis] > 1:
            first, second = (indices[(slice(None),) * axis + (slice(i, i + 1),)] for i in range(2))
            if (second == first).all() and (indices == first).all():
                indices = first.copy()
    return indices


def numbered(*arrays: Ints) -> tuple[Ints, list[Ints]]:
    """What occurs in arrays, in order, and the arrays as places in that."""
    flat = np.concatenate([each.ravel() for each in arrays])
    low, high = (int(flat.min()), int(flat.max())) if flat.size else (0, 0)
    if high - low < 4 * flat.size:  # a table of all that is possible is no larger
        occurs = np.zeros(high - low + 1, dtype=bool)
        occurs[flat - low] = True
        found, places = np.flatnonzero(occurs) + low, (np.cumsum(occurs) - 1)[flat - low]
    else:
        found, places = np.unique(flat, return_inverse=True)
    ends = np.cumsum([each.size for each in arrays])[:-1]
    return found, [part.reshape(each.shape) for part, each in zip(np.split(places, ends), arrays)]


def classes(*arrays: Any) -> tuple[Ints, Ints]:
    """For arrays that broadcast: the class of every place, equal where all of them are, and a place of every class."""
    wide = np.broadcast_arrays(*(a for a in arrays if a.size > 1)) if any(a.size > 1 for a in arrays) else []
    shape = wide[0].shape if wide else np.broadcast_shapes(*(a.shape for a in arrays))
    code = np.zeros(int(np.prod(shape)), dtype=np.int64)
    for each in wide:
        _, inverse = np.unique(each.ravel(), return_inverse=True)
        code = code * (int(inverse.max(initial=0)) + 1) + inverse
        if len(wide) > 1:
            _, code = np.unique(code, return_inverse=True)
    _, first, inverse = np.unique(code, return_index=True, return_inverse=True)
    return inverse.reshape(shape), first


@dataclass
class Equations:
    """The systems, and the equations that wait to be added to them."""

    systems: dict[str, System] = field(
        default_factory=lambda: {name: System(binary=name not in (LOG, SHIFT), logs=name == LOG) for name in SYSTEMS}
    )
    #: Where equations come from: what adds them, and why.
    origins: list[tuple[Any, str]] = field(default_factory=list)
    #: What adds equations now.
    node: Any = None
    #: Whether any scale is zero.
    zeros: bool = True
    #: Gauges of constants that a movement joins to values, by slot.
    constants: dict[tuple[Any, str], Gauge] = field(default_factory=dict)
    #: What a channel that an affine multiplies by zero is, by the variable of its shift.
    lone: dict[int, float] = field(default_factory=dict)
    #: Those of them that pass an activation, and which: what is left out may be any number.
    passed: dict[int, Any] = field(default_factory=dict)
    _blocks: Blocks = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.scale, self.shift = Variables(self, (LOG, SIGN, DEAD, EMPTY)), Variables(self, (SHIFT,))

    def require(self, system: str, variables: Ints, values: Any, rhs: Any, reason: str) -> None:
        """``sum values * variables = rhs`` for rows of variables (n, m); index 0 stands for zero.

        Of logarithms ``rhs`` is what it is the logarithm of, and 0 means 1.
        """
        if len(variables) and (self.zeros or system not in (DEAD, EMPTY)):
            values = np.where(variables == 0, 0.0, values)
            rhs = np.broadcast_to(np.asarray(rhs, dtype=float), len(variables))
            self.origins.append((self.node, reason))
            self._blocks.setdefault(system, []).append((variables, values, rhs, len(self.origins) - 1))

    def pin(self, gauge: Gauge, reason: str) -> None:
        """A value is stored as it is."""
        self.scale.pin(gauge.scale, reason)
        self.shift.pin(gauge.base, reason)

    def own(self, sizes: Sequence[int]) -> Gauge:
        """A gauge with variables of its own for every place of a shape, no scale being zero."""
        made = Gauge(self.scale.fresh(sizes), self.shift.fresh(sizes))
        self.scale.pin(made.scale, "nonlinear", (DEAD,))
        return made

    def uniform(self, gauge: Gauge, axes: Collection[int], reason: str) -> Gauge:
        """A gauge that is one along ``axes``, which are then of size 1."""
        scale = self.scale.uniform(gauge.scale, axes, reason)
        if gauge.made is not None and any(gauge.made.shape[axis] > 1 for axis in axes):
            self.shift.pin(gauge.base, reason)  # what was made up has no shift, so the rest has none
            return Gauge(scale, pinned(scale.ndim).base)
        return Gauge(scale, self.shift.uniform(gauge.base, axes, reason), gauge.made)

    def hold(self, shifts: Ints) -> None:
        """Channels that are not left out pass no activation with a shift."""
        node = self.node
        for variable in self.passed.keys() & numbered(shifts)[0].tolist() if self.passed else ():
            self.node = self.passed[variable]
            self.shift.pin(np.array([variable]), "shift-through-activation")
        self.node = node

    def commit(self) -> tuple[str, Ints] | None:
        """Adds what waits; answers a system and which of its new equations contradict: then it has to be undone."""
        blocks, self._blocks = self._blocks, {}
        for name in SYSTEMS:
            if name in blocks:
                wrong = self.systems[name].add(Batch.joined(blocks[name]))
                if len(wrong):
                    return name, wrong
        return None

    def recorded(self, add: Callable[[], None]) -> Blocks:
        """What ``add`` would add, by system, for ``again``."""
        held, self._blocks = self._blocks, {}
        add()
        found, self._blocks = self._blocks, held
        return found

    def again(self, blocks: Blocks) -> None:
        """Adds what was recorded."""
        for name, found in blocks.items():
            self._blocks.setdefault(name, []).extend(found)

    def mark(self) -> dict[str, Any]:
        """A state to come back to."""
        return {name: system.mark() for name, system in self.systems.items()}

    def undo(self, mark: dict[str, Any]) -> None:
        """Comes back."""
        for name, system in self.systems.items():
            system.undo(mark[name])


class Variables:
    """The scales, or the shifts: one index per class of elements."""

    def __init__(self, equations: Equations, systems: Sequence[str]) -> None:
        self._all, self._systems, self.count = equations, systems, 0
        self._grow(1, first=False)

    def _grow(self, count: int, *, first: bool) -> Ints:
        new = np.arange(self.count, self.count + count)
        for name in self._systems:
            self._all.systems[name].grow(new + _FIRST if first else new)
        self.count += count
        return new

    def fresh(self, shape: Sequence[int], *, first: bool = True) -> Ints:
        """A variable of its own for every place of a shape."""
        return self._grow(int(np.prod(shape)), first=first).reshape(shape)

    def per_class(self, *arrays: Any, first: bool = True) -> Ints:
        """A variable of its own for every class of places of arrays that broadcast."""
        wide = [a for a in arrays if a.size > 1]
        if len({a.shape for a in wide}) == 1 and any((np.diff(a.ravel()) > 0).all() for a in wide):  # all distinct
            return self.fresh(np.broadcast_shapes(*(a.shape for a in arrays)), first=first)
        found, places = classes(*arrays)
        return self._grow(len(places), first=first)[found]

    def equate(self, one: Ints, other: Ints, reason: str, only: Collection[str] = ()) -> Ints:
        """Both are the same wherever they meet; answers what they are."""
        if one.size > 1 < other.size and not any(min(sizes) > 1 for sizes in zip(one.shape, other.shape)):
            every, _ = numbered(one, other)  # all meet all: as many equations as there are variables say so
            return self.equate(every, every[:1], reason, only).reshape((1,) * one.ndim)
        (firsts, (first,)), (seconds, (second,)) = numbered(one), numbered(other)
        met, _ = numbered(first * len(seconds) + second)
        a, b = firsts[met // len(seconds)], seconds[met % len(seconds)]
        low, high = np.minimum(a, b), np.maximum(a, b)
        differ = low != high
        if differ.any():
            pairs = np.stack(np.divmod(np.unique(high[differ] * self.count + low[differ]), self.count), 1)[:, ::-1]
            for name in only or self._systems:
                self._all.require(name, pairs, [-1.0, 1.0], 0.0, reason)
        return compressed(np.minimum(one, other))

    def pin(self, indices: Ints, reason: str, only: Collection[str] = ()) -> None:
        """Stored as it is: all of them are zero."""
        flat = numbered(indices)[0]
        for name in only or self._systems:
            self._all.require(name, flat[flat > 0][:, None], 1.0, 0.0, reason)

    def uniform(self, indices: Ints, axes: Collection[int], reason: str) -> Ints:
        """One value along ``axes``, which are then of size 1."""
        axes = tuple(axis for axis in axes if indices.shape[axis] > 1)
        return self.equate(indices, indices.min(axes, keepdims=True), reason) if axes else indices

    def combined(self, terms: Sequence[tuple[Any, Ints]], reason: str, systems: Collection[str] = ()) -> Ints:
        """What is the sum of other variables, each times a coefficient that broadcasts to it."""
        ndim = max(v.ndim for _, v in terms)
        terms = [(np.asarray(c, dtype=float), v) for c, v in terms if np.any(v) and np.any(c)]
        if not terms:
            return np.zeros((1,) * ndim, dtype=np.int64)
        if len(terms) == 1 and (terms[0][0] == 1).all():
            return terms[0][1]
        arrays = [a for term in terms for a in term]
        found, places = classes(*arrays)
        new = self._grow(len(places), first=False)
        parts = [np.broadcast_to(a, found.shape).ravel()[places] for a in arrays]
        variables = np.stack([new, *parts[1::2]], 1)
        values = np.stack([np.ones(len(new)), *(-part for part in parts[::2])], 1)
        for name in systems or self._systems:
            self._all.require(name, variables, values, 0.0, reason)
        return new[found]
