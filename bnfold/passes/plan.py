"""What a fold would do, as data: a small list of edits."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bnfold.graph.graph import Node
from bnfold.passes.gauges import Gauges
from bnfold.passes.rewriter import Rewriter
from bnfold.passes.solution import Solution
from bnfold.report import Outcome
from bnfold.semantics import Movement


@dataclass
class Plan:
    """Constants that change, by value and slot, and constants that are added to values.

    ``shared``: the slots that read what another one gets, for they read one constant and are to read equal ones.
    """

    constants: MutableMapping[tuple[Node, str], Tensor] = field(default_factory=dict)
    shared: dict[tuple[Node, str], tuple[Node, str]] = field(default_factory=dict)
    adds: dict[Node, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, gauges: Gauges, solution: Solution, gone: set[Node]) -> Plan:
        """Every constant once, from the gauges, and only where one of them is not the identity."""
        plan, written, graph = cls(gauges.graph.table()), set[tuple[Node, str]](), gauges.graph
        made: dict[tuple[Node | float, ...], tuple[Node, str]] = {}
        for value in graph.values():
            semantics = gauges.at(value)
            if value in gone or not (semantics.absorbs or isinstance(semantics, Movement)):
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
    """One affine that went, as the names of the values that were touched with it.

    Attributes:
        site: the affine.
        direction: the way it went.
        constants: values and the slots that got a constant of their own.
        adds: values that something was added to.
        by: the value that took the affine's place.
    """

    site: str
    direction: Outcome
    constants: tuple[tuple[str, str], ...]
    adds: tuple[str, ...]
    by: str


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


def upstream(gauges: Gauges, solution: Solution, gone: set[Node]) -> dict[Node, Path]:
    """For every value that is stored otherwise, and every affine that goes, what makes it so."""
    found: dict[Node, Path] = {}
    for value in gauges.graph.values():
        call, semantics = gauges.call(value), gauges.at(value)
        operands = [found[n] for _, n in call.slots() if n in found and not solution.is_kept(n)]
        if value in gone:
            found[value] = Path.joined(operands)
        elif not solution.is_kept(value):
            own = semantics.absorbs
            found[value] = Path((value,)) if own else Path.joined(operands, (call.operator.removeprefix("aten."),))
    return found


def downstream(gauges: Gauges, solution: Solution, gone: set[Node]) -> dict[Node, Path]:
    """For every value that is stored otherwise what makes up for it."""
    found: dict[Node, Path] = {}
    for value in reversed([*gauges.graph.values()]):
        if solution.is_kept(value):
            continue
        parts = []
        for reader in gauges.graph.readers(value):
            if reader.op != "call_function" or gauges.graph.is_list(reader):
                continue
            call, semantics = gauges.call(reader), gauges.at(reader)
            unread = semantics.shape_only
            if unread and all(slot in unread for slot, node in call.slots() if node is value):
                continue
            if reader not in gone and semantics.absorbs:
                parts.append(Path((reader,)))
            elif reader in found:
                names = () if reader in gone else (call.operator.removeprefix("aten."),)
                parts.append(Path.joined([found[reader]], names))
        found[value] = Path.joined(parts)
    return found
