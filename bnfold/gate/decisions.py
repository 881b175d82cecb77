"""Truth that follows a program's decisions, and whether these are near-ties.

A top-k, a comparison, a rounding turns an error of one ulp into another result altogether, and no ratio of errors can
judge that. So the decisions that a program took are forced into the float64 run: what is left of its error is smooth
again, and every decision that float64 would not have taken must be a *near-tie*, its gap within the noise of what was
compared. It does not matter where the decisions were read: if near-ties explain a program's outputs, it is right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from bnfold.aten.deciding import Deciding, deciding
from bnfold.evaluate.subject import Run, Turn
from bnfold.gate.evidence import TINY
from bnfold.gate.findings import Findings
from bnfold.gate.values import as_tensor

#: Largest gap of a near-tie, in multiples of the noise of what is compared. It is one element out of many, so a
#: maximum, and those of correct files reach 61 where their RMS is at 4. Of 715 that fell otherwise in 140 correct files
#: the median was at 1.1, the largest at 16.
NEAR = 64.0
#: How often constants are drawn for what a decision compares.
DRAWS = 4
#: Where rounding moves an output, or what is compared, by this part of itself, almost anything would pass.
WILD = 1e-2


@dataclass(frozen=True)
class Place:
    """An operator that decides on values that depend on the inputs.

    Attributes:
        node, target, module: its name in the graph, the operator itself, and the module that it belongs to.
        value: name of the value that holds what it decided; the operator itself, or one of its several results.
        rule: how it decides.
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
    influence, first = (_influence(program), _twins(program)) if found else ({}, {})
    return tuple(
        Place(node.name, holder.name, node.target, rule, module_of(node), influence.get(node, frozenset()),
              first[holder].name)
        for node, holder, rule in found
    )  # fmt: skip


def _twins(program: ExportedProgram) -> dict[fx.Node, fx.Node]:
    """For every node the first one that applies the same operator to the same values."""
    found: dict[fx.Node, fx.Node] = {}
    known: dict[str, fx.Node] = {}
    for node in program.graph.nodes:
        found[node] = node
        if node.op == "call_function" and torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
            args, kwargs = (fx.node.map_arg(given, found.__getitem__) for given in (node.args, node.kwargs))
            found[node] = known.setdefault(f"{node.target} {args} {kwargs}", node)
    return found


def _influence(program: ExportedProgram) -> dict[fx.Node, frozenset[int]]:
    """For every node the positions of the outputs that depend on it."""
    found: dict[fx.Node, frozenset[int]] = {}
    for node in reversed(program.graph.nodes):
        if node.op == "output":
            each = [(value, frozenset({i})) for i, value in enumerate(node.args[0]) if isinstance(value, fx.Node)]
        else:
            each = [(operand, found.get(node, frozenset())) for operand in node.all_input_nodes]
        for value, outputs in each:
            found[value] = found.get(value, frozenset()) | outputs
    return found


# ---- near-ties -------------------------------------------------------------------------------------------------------


def distance(turn: Turn, moved: Sequence[Sequence[Turn]], more: float = 0.0) -> float:
    """How far from a tie a decision is, in noises: up to ``NEAR`` it may fall either way.

    ``moved`` are the same decisions where constants were drawn, ``more`` is noise besides.
    """
    noise, gap = math.hypot(near_noise(turn, moved)[0], more), as_tensor(turn.gap)
    return float(gap.max()) / max(noise, TINY) if gap.numel() else 0.0


def near_noise(turn: Turn, moved: Sequence[Sequence[Turn]]) -> tuple[float, float]:
    """RMS of what rounding does to what is compared, a rounding of itself at least; and the RMS of that."""
    compared = as_tensor(turn.compared)
    others = [as_tensor(other.compared) for each in moved for other in each if other.value == turn.value]
    good = compared.isfinite()
    scale = float(compared[good].square().mean().sqrt()) if bool(good.any()) else 0.0
    parts = [(m - compared)[good & m.isfinite()].square().mean() for m in others if m.shape == compared.shape]
    found = [float(part) for part in parts if bool(part.isfinite())]
    return max((sum(found) / len(found)) ** 0.5 if found else 0.0, 2.0**-24 * scale), scale


def judge_turns(
    findings: Findings, witness: str, turns: Sequence[Turn], again: Callable[..., Run],
    theirs: Callable[[Turn], float] = lambda turn: 0.0,
) -> None:  # fmt: skip
    """Says what the decisions are that were followed although float64 would decide otherwise: near-ties or problems.

    ``again`` draws the reference's constants, by a ``seed``; ``theirs`` is what rounding a claim's does there.
    """
    turned = [turn for turn in turns if turn.different]
    moved = [again(seed=seed).turns for seed in range(DRAWS)] if turned else []
    near, most = 0, 0.0
    for turn in turned:
        noise, scale = near_noise(turn, moved)
        far = distance(turn, moved, theirs(turn))
        said = f"{witness}: {turn.operator} decides otherwise than the model in {turn.different} places"
        if noise > WILD * scale:
            findings.doubts.append(
                f"{said}, and rounding moves what it compares by {noise / max(scale, TINY):.2g} of it, so almost any "
                "decision would pass"
            )
        elif not far <= NEAR:
            findings.problems.append(
                f"{said}, although what it compares is up to {far:.3g} times the noise away from that (limit {NEAR:g})"
            )
        else:
            near, most = near + turn.different, max(most, far)
    if near:
        findings.notes.append(
            f"{witness}: {near} decisions (such as {turned[0].operator}) fell otherwise than in float64, all of "
            f"them near-ties, at most {most:.2g} times the noise: float64 was run again with them"
        )
