"""What a fold would do, as data: a small list of edits, and the words for the ledger."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from bnfold.graph.graph import Graph, Node
from bnfold.report import Outcome


@dataclass
class Plan:
    """The edits by which one affine disappears; nothing is changed until ``apply``."""

    site: Node
    direction: Outcome
    constants: list[tuple[Node, str, Tensor]] = field(default_factory=list)
    adds: list[tuple[Node, Tensor]] = field(default_factory=list)
    bypasses: list[tuple[Node, str]] = field(default_factory=list)
    absorbers: list[Node] = field(default_factory=list)
    carriers: list[Node] = field(default_factory=list)
    mixed: bool = False

    def equals(self, other: Plan) -> bool:
        """Whether both would make the same edits."""
        mine, theirs = self.constants, other.constants
        return (
            [(n, s) for n, s, _ in mine] == [(n, s) for n, s, _ in theirs]
            and all(torch.equal(a, b) for (_, _, a), (_, _, b) in zip(mine, theirs))
            and [n for n, _ in self.adds] == [n for n, _ in other.adds]
            and all(torch.equal(a, b) for (_, a), (_, b) in zip(self.adds, other.adds))
        )


@dataclass(frozen=True)
class Edit:
    """A plan that was carried out, as the names of the values that it touched.

    Attributes:
        site: the affine.
        direction: the way it went.
        constants: values and the slots that got a constant of their own.
        adds: values that something was added to.
        bypasses: values that are gone, and the value that took the place of each.
    """

    site: str
    direction: Outcome
    constants: tuple[tuple[str, str], ...]
    adds: tuple[str, ...]
    bypasses: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, plan: Plan, graph: Graph) -> Edit:
        """Takes down the names while the values are still there."""
        return cls(
            plan.site.name, plan.direction, tuple((value.name, slot) for value, slot, _ in plan.constants),
            tuple(value.name for value, _ in plan.adds),
            tuple((value.name, graph.call(value).at(slot).name) for value, slot in plan.bypasses),
        )  # fmt: skip


@dataclass(frozen=True)
class Words:
    """What a fold did, for the ledger: the values that absorbed the affine with their names, and what it passed."""

    into: dict[Node, str]
    through: dict[str, None]


def follow(took: dict[Node, Words]) -> None:
    """Where an affine was composed into another that went on itself, names what took that one in the end."""
    for site in reversed(took):
        words = took[site]
        onward = [took[v] for v in words.into if v in took]
        if onward:
            into = {v: name for v, name in words.into.items() if v not in took}
            took[site] = Words(
                into | {v: name for w in onward for v, name in w.into.items()},
                words.through | {name: None for w in onward for name in w.through},
            )
