"""Truth that follows a program's decisions.

A top-k, a comparison, a rounding turns an error of one ulp into another result altogether, and no ratio of errors can
judge that. So the decisions that a program took are forced into the float64 run: what is left of its error is smooth
again, and every decision that float64 would not have taken must be a *near-tie*, its gap within the noise of what was
compared. It does not matter where the decisions were read: if near-ties explain a program's outputs, it is right.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from bnfold.aten.deciding import Deciding, deciding

#: Largest gap of a near-tie, in multiples of the noise of what is compared. It is one element out of many, so a
#: maximum, and those of correct files reach 61 where their RMS is at 4. Of 715 that fell otherwise in 140 correct files
#: the median was at 1.1, the largest at 16.
NEAR = 64.0


@dataclass(frozen=True)
class Place:
    """An operator that decides on values that depend on the inputs.

    Attributes:
        node: name of the operator in the graph.
        value: name of the value that holds what it decided; the operator itself, or one of its several results.
        target: the operator.
        rule: how it decides.
        module: the module that it belongs to.
        outputs: positions of the model's outputs that depend on it.
        twin: the value of the first place that computes the very same; a file may hold one of them only.
    """

    node: str
    value: str
    target: Any
    rule: Deciding
    module: str
    outputs: frozenset[int]
    twin: str

    @property
    def words(self) -> str:
        """Operator and module, for a message."""
        name = str(self.target._opname)
        return f"{name} in '{self.module}'" if self.module else f"{name} '{self.node}'"


def places(program: ExportedProgram, module_of: Callable[[fx.Node], str] = lambda node: "") -> tuple[Place, ...]:
    """The operators of a program that decide on floating-point values which depend on its inputs."""
    user = {s.arg.name for s in program.graph_signature.input_specs if s.kind is InputKind.USER_INPUT}
    reached: set[fx.Node] = set()
    found: list[tuple[fx.Node, fx.Node, Deciding]] = []
    for node in program.graph.nodes:
        if node.name not in user and not any(n in reached for n in node.all_input_nodes):
            continue
        reached.add(node)
        rule = deciding(node) if node.op == "call_function" else None
        if rule is None:
            continue
        # Sorted values alone are continuous: what is chosen matters where the indices are read.
        holders = [node] if rule.item is None else [u for u in node.users if u.args[1:] == (rule.item,) and u.users]
        found += [(node, holder, rule) for holder in holders[:1]]
    influence = _influence(program) if found else {}
    first = _twins(program) if found else {}
    return tuple(
        Place(
            node.name, holder.name, node.target, rule, module_of(node), influence.get(node, frozenset()),
            first[holder].name,
        )
        for node, holder, rule in found
    )  # fmt: skip


def _twins(program: ExportedProgram) -> dict[fx.Node, fx.Node]:
    """For every node the first one that applies the same operator to the same values."""
    found: dict[fx.Node, fx.Node] = {}
    known: dict[str, fx.Node] = {}
    for node in program.graph.nodes:
        random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        if node.op != "call_function" or random:
            found[node] = node
            continue
        args, kwargs = (fx.node.map_arg(given, found.__getitem__) for given in (node.args, node.kwargs))
        found[node] = known.setdefault(f"{node.target} {args} {kwargs}", node)
    return found


def _influence(program: ExportedProgram) -> dict[fx.Node, frozenset[int]]:
    """For every node the positions of the outputs that depend on it."""
    found: dict[fx.Node, frozenset[int]] = {}
    for node in reversed(program.graph.nodes):
        if node.op == "output":
            for i, value in enumerate(node.args[0]):
                if isinstance(value, fx.Node):
                    found[value] = found.get(value, frozenset()) | {i}
            continue
        for operand in node.all_input_nodes:
            found[operand] = found.get(operand, frozenset()) | found.get(node, frozenset())
    return found
