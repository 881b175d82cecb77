"""Gauges, and what an operator says about those around it.

A value v may be stored as v' with ``v = a*v' + b``, constants a and b per element: its gauge. An operator relates the
gauges of its operands and of its result, and says nothing else. Three linear systems hold all of it: the logarithms of
|a| over the reals, the signs of a over GF(2), and b over the reals. Two more over GF(2) hold what a scale of zero
makes of a channel: *dead*, so that readers leave it out (a is 0), and *empty*, so that its producer emits zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bnfold.semantics.system import Batch, Floats, Ints, System

#: The order of variables: those that contractions and affines make are eliminated first, then the youngest.
_FIRST = 1 << 40
LOG, SIGN, SHIFT, DEAD, EMPTY = "log", "sign", "shift", "dead", "empty"
SYSTEMS = (LOG, SIGN, SHIFT, DEAD, EMPTY)


#: Equations of one length by system: variables, coefficients, right-hand sides, and where they come from.
Blocks = dict[str, list[tuple[Ints, Floats, Floats, int]]]


@dataclass(frozen=True, eq=False)
class Gauge:
    """Which variables the scale and the shift of a value are: indices that broadcast to it, 0 being pinned (1 or 0)."""

    scale: Ints
    shift: Ints

    def alike(self) -> bool:
        """Whether all elements have one scale and one shift."""
        return self.scale.size == self.shift.size == 1


def pinned(ndim: int) -> Gauge:
    """The gauge of a value that is stored as it is."""
    zeros = np.zeros((1,) * ndim, dtype=np.int64)
    return Gauge(zeros, zeros)


def compressed(indices: Ints) -> Ints:
    """The same with size 1 on every axis along which all are equal."""
    for axis in range(indices.ndim):
        if indices.shape[axis] > 1:
            first = indices.take([0], axis)
            if (indices == first).all():
                indices = first
    return indices


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

    def commit(self) -> dict[str, Ints]:
        """Adds what waits; answers which equations contradict, by system, and then it has to be undone."""
        blocks, self._blocks = self._blocks, {}
        for name in SYSTEMS:
            if name in blocks:
                wrong = self.systems[name].add(Batch.joined(blocks[name]))
                if len(wrong):
                    return {name: wrong}
        return {}

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
        one, other = np.broadcast_arrays(one, other)
        low, high = np.minimum(one, other), np.maximum(one, other)
        differ = low != high
        if differ.any():
            pairs = np.stack(np.divmod(np.unique(high[differ] * self.count + low[differ]), self.count), 1)
            for name in only or self._systems:
                self._all.require(name, pairs, [1.0, -1.0], 0.0, reason)
        return compressed(low)

    def pin(self, indices: Ints, reason: str, only: Collection[str] = ()) -> None:
        """Stored as it is: all of them are zero."""
        flat = np.unique(indices)
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
