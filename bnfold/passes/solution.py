"""Numbers for the gauges, and the edits that follow: planned here as data, made by whoever asked for them.

What is free is chosen so that the most constants stay as they are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, MutableMapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from bnfold.affine import Affine
from bnfold.graph.graph import Node
from bnfold.passes.gauges import Gauges
from bnfold.passes.rewriter import Rewriter
from bnfold.report import Outcome
from bnfold.semantics import Gauge, Movement, Opaque
from bnfold.semantics.equations import DEAD, EMPTY, LOG, SHIFT, SIGN
from bnfold.semantics.system import ROUNDING, Choose, Floats, Ints, given, times


def solved(gauges: Gauges, gone: Collection[Node]) -> Solution:
    """What the systems hold, as numbers; ``gone`` are the affines that go."""
    gone = set(gone)
    scales, shifts = _weights(gauges, gone)
    systems = gauges.equations.systems
    size, shift = systems[LOG].solved(_nearest(scales)), systems[SHIFT].solved(_nearest(shifts))
    sign, dead, empty = (systems[name].solved() for name in (SIGN, DEAD, EMPTY))
    return Solution(gauges, gone, size, sign, dead, empty, shift)


def scaled(gauges: Gauges, choose: Choose) -> Solution:
    """Scales that are free as ``choose`` says, and no shifts."""
    none = np.zeros(gauges.equations.scale.count)
    size = gauges.equations.systems[LOG].solved(choose)
    return Solution(gauges, set(), size, none, none, none, np.zeros(gauges.equations.shift.count))


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


#: As many absorbers of one affine are listed; a stream may have thousands.
LISTED = 64


@dataclass(frozen=True)
class Path:
    """What takes up a gauge on one side of a value, and the operators on the way, the next one first."""

    into: tuple[Node, ...] = ()
    through: tuple[str, ...] = ()

    @classmethod
    def joined(cls, parts: Iterable[Path], through: tuple[str, ...] = ()) -> Path:
        """Several as one."""
        parts = list(parts)
        into = dict.fromkeys(node for part in parts for node in part.into[:LISTED])
        names = dict.fromkeys([*through, *(name for part in parts for name in part.through)])
        return cls(tuple(into)[:LISTED], tuple(names))


class Solution:
    """Numbers for the gauges; ``gone`` are the affines that go."""

    def __init__(
        self, gauges: Gauges, gone: set[Node], size: Floats, sign: Floats, dead: Floats, empty: Floats, shift: Floats
    ) -> None:
        self.gauges, self.gone = gauges, gone
        scale, self._inverse = size * np.where(sign == 1, -1.0, 1.0)
        self._scale = np.where(dead == 1, 0.0, scale)
        self._empty, self._shift = empty, shift
        self._moved = (self._scale != 1) | (empty == 1), shift != 0

    def is_kept(self, value: Node) -> bool:
        """Whether a value is stored as it is."""
        return value not in self.gauges.of or self._is_kept(self.gauges.of[value])

    def _is_kept(self, gauge: Gauge) -> bool:
        return not self._moved[0][gauge.scale].any() and not self._moved[1][gauge.base].any()

    def is_lost(self, value: Node) -> bool:
        """Whether some of a value is not stored: its producer emits zeros there, or its readers leave it out."""
        scale = self.gauges.of[value].scale
        return bool((self._empty[scale] == 1).any() or (self._scale[scale] == 0).any())

    def scale(self, value: Node) -> Floats:
        """The scale that a value is stored with."""
        return self._scale[self.gauges.of[value].scale]

    def before(self, value: Node) -> Affine:
        """What makes a value of what is stored."""
        return self._affine(self.gauges.of[value], after=False)

    def after(self, value: Node) -> Affine:
        """What makes what is stored of a value."""
        return self._affine(self.gauges.of[value], after=True)

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
        gauge = self.gauges.equations.constants.get((value, slot))
        return None if gauge is None or self._is_kept(gauge) else self._affine(gauge, after=True)

    # -- who takes up what -----------------------------------------------------------------------------------------

    @cached_property
    def upstream(self) -> dict[Node, Path]:
        """For every value that is stored otherwise, and every affine that goes, what makes it so."""
        found: dict[Node, Path] = {}
        for value in self.gauges.graph.values():
            call, semantics = self.gauges.call(value), self.gauges.at(value)
            operands = [found[n] for _, n in call.slots() if n in found and not self.is_kept(n)]
            if value in self.gone:
                found[value] = Path.joined(operands)
            elif not self.is_kept(value):
                own = semantics.absorbs
                found[value] = Path((value,)) if own else Path.joined(operands, (call.operator.removeprefix("aten."),))
        return found

    @cached_property
    def downstream(self) -> dict[Node, Path]:
        """For every value that is stored otherwise what makes up for it."""
        found: dict[Node, Path] = {}
        graph, gauges = self.gauges.graph, self.gauges
        for value in reversed([*graph.values()]):
            if self.is_kept(value):
                continue
            parts = []
            for reader in graph.readers(value):
                if reader.op != "call_function" or graph.is_list(reader):
                    continue
                call, semantics = gauges.call(reader), gauges.at(reader)
                unread = semantics.shape_only
                if unread and all(slot in unread for slot, node in call.slots() if node is value):
                    continue
                if reader not in self.gone and semantics.absorbs:
                    parts.append(Path((reader,)))
                elif reader in found:
                    names = () if reader in self.gone else (call.operator.removeprefix("aten."),)
                    parts.append(Path.joined([found[reader]], names))
            found[value] = Path.joined(parts)
        return found


def _settled(numbers: Floats) -> Floats:
    """With size 1 on every axis along which all are equal, up to rounding."""
    for axis in range(numbers.ndim):
        first = numbers.take([0], axis)
        if numbers.shape[axis] > 1 and np.abs(numbers - first).max() <= ROUNDING * np.abs(numbers).max():
            numbers = first
    return np.array(numbers)


@dataclass
class Plan:
    """Constants that change, by value and slot, and constants that are added to values.

    ``shared``: the slots that read what another one gets, for they read one constant and are to read equal ones.
    """

    constants: MutableMapping[tuple[Node, str], Tensor] = field(default_factory=dict)
    shared: dict[tuple[Node, str], tuple[Node, str]] = field(default_factory=dict)
    adds: dict[Node, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, solution: Solution) -> Plan:
        """Every constant once, from the gauges, and only where one of them is not the identity."""
        gauges, graph, written = solution.gauges, solution.gauges.graph, set[tuple[Node, str]]()
        plan = cls(graph.table())
        made: dict[tuple[Node | float, ...], tuple[Node, str]] = {}
        for value in graph.values():
            semantics = gauges.at(value)
            if value in solution.gone or not (semantics.absorbs or isinstance(semantics, Movement)):
                continue
            call = gauges.call(value)
            if isinstance(semantics, Movement):
                for slot in semantics.slots:
                    after = solution.after_constant(value, slot)
                    if after is not None and (constant := call.constant(slot)) is not None:
                        plan.constants[value, slot] = after(constant)
                continue
            moved = {s: solution.before(n) for s, n in call.slots() if not solution.is_kept(n)}
            if not moved and solution.is_kept(value):
                continue
            found = semantics.rewritten(moved, solution.after(value))
            for slot, tensor in found.constants.items():
                if (call.node, slot) not in written:  # one operator may have several results
                    written.add((call.node, slot))
                    old = call.at(slot)
                    stored = tuple(n for n in graph.cone(old) if n.op == "placeholder") if isinstance(old, Node) else ()
                    several = any(len(n.users) > 1 for n in stored)
                    alike = made.setdefault((*stored, float(tensor.sum())), (value, slot)) if several else None
                    plan._take((value, slot), tensor, alike)
            if found.add is not None:
                plan.adds[value] = found.add
        return plan

    def _take(self, at: tuple[Node, str], tensor: Tensor, alike: tuple[Node, str] | None) -> None:
        if alike not in (None, at) and torch.equal(self.constants[alike], tensor):
            self.shared[at] = alike
        else:
            self.constants[at] = tensor

    def _constant(self, at: tuple[Node, str]) -> Tensor:
        return self.constants[self.shared.get(at, at)]

    def apply(self, rewriter: Rewriter) -> None:
        """Gives every slot its constant."""
        for (value, slot), tensor in self.constants.items():
            rewriter.set_constant(value, slot, tensor)
        for (value, slot), (other, its) in self.shared.items():
            rewriter.share_constant(value, slot, rewriter.graph.call(other).at(its))

    def equals(self, other: Plan) -> bool:
        """Whether both would make the same edits, up to rounding."""

        def alike(a: Tensor, b: Tensor) -> bool:
            return a.shape == b.shape and (
                torch.equal(a, b) or bool(torch.isclose(a, b, rtol=1e-9, atol=0.0, equal_nan=True).all())
            )

        slots = {*self.constants, *self.shared}
        return (
            slots == {*other.constants, *other.shared}
            and self.adds.keys() == other.adds.keys()
            and all(alike(self._constant(at), other._constant(at)) for at in slots)
            and all(alike(tensor, other.adds[key]) for key, tensor in self.adds.items())
        )


@dataclass(frozen=True)
class Edit:
    """One affine that went, as the names of the values that were touched with it."""

    site: str  #: the affine.
    direction: Outcome  #: the way it went.
    constants: tuple[tuple[str, str], ...]  #: values and the slots that got a constant of their own.
    adds: tuple[str, ...]  #: values that something was added to.
    by: str  #: the value that took the affine's place.
