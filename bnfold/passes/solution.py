"""Numbers for the gauges: what is free is chosen so that the most constants stay as they are."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import torch

from bnfold.affine import Affine
from bnfold.graph.graph import Node
from bnfold.passes.gauges import Gauges
from bnfold.semantics import Gauge, Opaque
from bnfold.semantics.equations import DEAD, EMPTY, LOG, SHIFT, SIGN
from bnfold.semantics.system import ROUNDING, Choose, Floats, Ints, given, times


def solved(gauges: Gauges, gone: Collection[Node]) -> Solution:
    """What the systems hold, as numbers; ``gone`` are the affines that go."""
    scales, shifts = _weights(gauges, set(gone))
    systems = gauges.equations.systems
    size, shift = systems[LOG].solved(_nearest(scales)), systems[SHIFT].solved(_nearest(shifts))
    sign, dead, empty = (systems[name].solved() for name in (SIGN, DEAD, EMPTY))
    return Solution(gauges, size, sign, dead, empty, shift)


def scaled(gauges: Gauges, choose: Choose) -> Solution:
    """Scales that are free as ``choose`` says, and no shifts."""
    none = np.zeros(gauges.equations.scale.count)
    size = gauges.equations.systems[LOG].solved(choose)
    return Solution(gauges, size, none, none, none, np.zeros(gauges.equations.shift.count))


def _weights(gauges: Gauges, gone: set[Node]) -> tuple[Floats, Floats]:
    """For every variable how many constants would change with it; what an affine made likes to be what it was."""
    found = [np.zeros(gauges.equations.scale.count), np.zeros(gauges.equations.shift.count)]
    for value, gauge in gauges.of.items():
        semantics = gauges.at(value) if value.op == "call_function" else Opaque()
        sides = [(gauge, 0.75)] if value in gone else []
        if semantics.absorbs and value not in gone:
            sides = [(gauge, 1.0), *((gauges.of[n], 1.5) for _, n in gauges.call(value).slots() if n in gauges.of)]
        for side, weight in sides:
            for total, indices in zip(found, (side.scale, side.base)):
                np.add.at(total, indices.ravel() if indices.size < 4096 else np.unique(indices), weight)
    return found[0], found[1]


def _nearest(weights: Floats) -> Choose:
    """Every free variable so that as much as can be, by weight, of what follows from it alone is zero."""

    def choose(var: Ints, root: Ints, val: Floats, right: Floats) -> Floats:
        chosen = given(np.zeros(len(right)), right.shape[1] > 2)
        alone = (np.bincount(var, minlength=len(right))[var] == 1) & (weights[var] > 0)
        var, root, val = var[alone], root[alone], val[alone]
        if not len(root):
            return chosen
        points = -right[var, 0] / val
        order = np.lexsort((points, root))
        root, points, var, val = root[order], points[order], var[order], val[order]
        at = np.flatnonzero(np.append(True, (root[1:] != root[:-1]) | (np.diff(points) > 1e-9 * np.abs(points[1:]))))
        worth = np.add.reduceat(weights[var], at)
        # Of equally good ones the smallest change.
        order = np.lexsort((-np.abs(points[at]), worth, root[at]))
        roots = root[at][order]
        last = at[order[np.append(roots[1:] != roots[:-1], True)]]
        chosen[root[last]] = times(right[var[last]], -1 / val[last])
        return chosen

    return choose


class Solution:
    """Numbers for the gauges."""

    def __init__(self, gauges: Gauges, size: Floats, sign: Floats, dead: Floats, empty: Floats, shift: Floats) -> None:
        self._gauges = gauges
        scale, self._inverse = size * np.where(sign == 1, -1.0, 1.0)
        self._scale = np.where(dead == 1, 0.0, scale)
        self._empty, self._shift = empty, shift
        self._moved = (self._scale != 1) | (empty == 1), shift != 0

    def is_kept(self, value: Node) -> bool:
        """Whether a value is stored as it is."""
        return value not in self._gauges.of or self._is_kept(self._gauges.of[value])

    def _is_kept(self, gauge: Gauge) -> bool:
        return not self._moved[0][gauge.scale].any() and not self._moved[1][gauge.base].any()

    def is_lost(self, value: Node) -> bool:
        """Whether some of a value is not stored: its producer emits zeros there, or its readers leave it out."""
        scale = self._gauges.of[value].scale
        return bool((self._empty[scale] == 1).any() or (self._scale[scale] == 0).any())

    def scale(self, value: Node) -> Floats:
        """The scale that a value is stored with."""
        return self._scale[self._gauges.of[value].scale]

    def before(self, value: Node) -> Affine:
        """What makes a value of what is stored."""
        return self._affine(self._gauges.of[value], after=False)

    def after(self, value: Node) -> Affine:
        """What makes what is stored of a value."""
        return self._affine(self._gauges.of[value], after=True)

    def _affine(self, gauge: Gauge, *, after: bool) -> Affine:
        moves = self._moved[1][gauge.base].any()
        scale, shift = self._scale[gauge.scale], self._shift[gauge.shift if moves else gauge.base]
        if after:
            inverse, empty = self._inverse[gauge.scale], self._empty[gauge.scale]
            with np.errstate(over="ignore", invalid="ignore"):  # what does not fit is refused where it is to be stored
                scale, shift = np.where(empty == 1, 0.0, inverse), -shift * inverse + 0.0
        return Affine(torch.from_numpy(_settled(scale)), torch.from_numpy(_settled(shift)))

    def after_constant(self, value: Node, slot: str) -> Affine | None:
        """The same of a constant that a movement joins to values; None where it stays."""
        gauge = self._gauges.equations.constants.get((value, slot))
        return None if gauge is None or self._is_kept(gauge) else self._affine(gauge, after=True)


def _settled(numbers: Floats) -> Floats:
    """With size 1 on every axis along which all are equal, up to rounding."""
    for axis in range(numbers.ndim):
        first = numbers.take([0], axis)
        if numbers.shape[axis] > 1 and np.abs(numbers - first).max() <= ROUNDING * np.abs(numbers).max():
            numbers = first
    return np.array(numbers)
