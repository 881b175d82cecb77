"""Truth that follows a program's decisions.

A top-k, a comparison, a rounding turns an error of one ulp into another result altogether, and no ratio of errors can
judge that. So the decisions that a program took are forced into the float64 run: what is left of its error is smooth
again, and every decision that float64 would not have taken must be a *near-tie*, its gap within the noise of what was
compared. It does not matter where the decisions were read: if near-ties explain a program's outputs, it is right.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from bnfold.aten.deciding import Arguments, Deciding, bound, deciding
from bnfold.gate.judge import median
from bnfold.gate.samples import Batch
from bnfold.graph.interpret import Runner, Steering, coarsest_epsilon

#: Where the error of what is compared is above this, relative to it, any choice would be a near-tie.
NOISE_LIMIT = 1e-2
#: Largest gap of a near-tie, in multiples of the noise of what is compared. It is one element out of many, so a
#: maximum, and those of correct files reach 61 where their RMS is at 4. Of 715 that fell otherwise in 140 correct files
#: the median was at 1.1, the largest at 16.
NEAR = 64.0
TINY = float(torch.finfo(torch.float64).tiny)


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


@dataclass(frozen=True)
class Turn:
    """A place where a program decided otherwise than float64 does on the same values.

    Attributes:
        different, total: how many of its decisions.
        multiple: the largest gap, in multiples of the noise of what is compared; at most a few for a near-tie.
        noise: that noise, relative to what is compared.
    """

    place: Place
    different: int
    total: int
    multiple: float
    noise: float


@dataclass(frozen=True)
class Following:
    """A float64 run that followed decisions: its outputs, the values it was asked to keep, where it had to turn."""

    outputs: list[Any]
    kept: Mapping[str, Tensor]
    turns: tuple[Turn, ...] = ()

    @property
    def multiple(self) -> float:
        """The largest gap of all, in multiples of the noise."""
        return max((turn.multiple for turn in self.turns), default=0.0)


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


class Decisions:
    """The places of a captured program, and its float64 runs that follow decisions.

    Args:
        program: the captured program.
        masters: constants of higher precision, as for ``Runner``.
        module_of: the module that a node belongs to, for messages.
    """

    def __init__(
        self,
        program: ExportedProgram,
        masters: Mapping[str, Tensor] | None = None,
        module_of: Callable[[fx.Node], str] = lambda node: "",
    ) -> None:
        self.places = places(program, module_of)
        #: What the unfolded model decided in its own dtype.
        self.own: dict[Batch, dict[str, Tensor]] = {}
        self._program, self._masters = program, masters
        self._noise: dict[tuple[Batch, str], tuple[Tensor, Tensor]] = {}

    @property
    def names(self) -> list[str]:
        """The values that hold decisions."""
        return [place.value for place in self.places]

    def complete(self, chosen: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``chosen`` with the decisions of twins of those that it holds."""
        twins = {place.twin: chosen[place.value] for place in self.places if place.value in chosen}
        more = {p.value: twins[p.twin] for p in self.places if p.twin in twins and p.value not in chosen}
        return {**chosen, **more}

    def note(self, batch: Batch, kept: Mapping[str, Tensor]) -> None:
        """Keeps what the unfolded model decided on a batch."""
        self.own[batch] = {name: kept[name] for name in self.names}

    def same(self, batch: Batch, chosen: Mapping[str, Tensor]) -> bool:
        """Whether these are the decisions of the unfolded model; those that are missing count as its own."""
        own = self.own[batch]
        return not any(
            place.value in chosen and _differ(place.rule, own[place.value], chosen[place.value])
            for place in self.places
        )

    def follow(
        self, runner: Runner, batch: Batch, chosen: Mapping[str, Tensor] | None = None, *, keep: Collection[str] = ()
    ) -> Following:
        """Runs ``runner``, which is in float64, with the decisions in ``chosen``, by the names of their values.

        Where one is missing or of another shape, the unfolded model's own is taken.
        """
        own = self.own[batch]
        gaps: list[tuple[Place, Tensor, int]] = []

        def note(place: Place, at: Arguments, mine: Tensor, theirs: Tensor) -> None:
            if chosen is not None:
                gaps.append((place, place.rule.gap(at, mine, theirs), int(place.rule.differs(mine, theirs).sum())))

        steering = {p.node: _steer(p, {**own, **(chosen or {})}, own, note) for p in self.places}
        outputs = runner(batch.flat, keep=keep, steering=steering)
        kept = runner.kept
        self._measure(batch, [place for place, _, _ in gaps])
        return Following(outputs, kept, tuple(self._turn(batch, *gap) for gap in gaps))

    def _turn(self, batch: Batch, place: Place, gap: Tensor, different: int) -> Turn:
        noise, scale = self._noise[batch, place.node]
        rows = _rows(gap, batch)
        worst = gap.reshape(rows, -1).amax(1)
        bar = noise if len(noise) == rows else noise.max()[None]
        multiple = float(torch.where(worst == torch.inf, torch.inf, worst / bar.clamp(min=TINY)).max())
        return Turn(place, different, gap.numel(), multiple, median(noise / scale.clamp(min=TINY)))

    def _measure(self, batch: Batch, wanted: Sequence[Place]) -> None:
        """The noise at places: per sample the RMS error of what the unfolded model compares there.

        What rounding its constants once does is part of it, as at a fold site. A sample that happens to have next to
        none has the typical noise.
        """
        new = [place for place in wanted if (batch, place.node) not in self._noise]
        if not new:
            return
        own = self.own[batch]

        def run(runner: Runner, *, follow: bool) -> dict[str, Tensor]:
            seen: dict[str, Tensor] = {}
            steering = {p.node: _steer(p, own, own, None) for p in self.places} if follow else {}
            for place in new:
                steering[place.node] = _watch(place, seen, steering.get(place.node))
            runner(batch.flat, steering=steering)
            return seen

        program, masters, floor = self._program, self._masters, coarsest_epsilon(self._program)
        mine = run(Runner(program), follow=False)
        true = run(Runner(program, precise=True, masters=masters), follow=True)
        moved = run(Runner(program, precise=True, masters=masters, jitter=True), follow=True)
        for place in new:
            values = [found[place.node] for found in (true, mine, moved)]
            good = torch.stack([value.isfinite() for value in values]).all(0)
            truth, own_value, jittered = (torch.where(good, value, 0.0) for value in values)
            rows = _rows(truth, batch)
            count = good.reshape(rows, -1).sum(1).clamp(min=1)

            def rms(value: Tensor, rows: int = rows, count: Tensor = count) -> Tensor:
                return (value.square().reshape(rows, -1).sum(1) / count).sqrt()

            scale = rms(truth)
            noise = torch.hypot(rms(own_value - truth), rms(jittered - truth))
            # Where the unfolded model itself has no number, it has no idea either.
            lost = (values[0].isfinite() & ~good).reshape(rows, -1).any(1)
            noise = torch.where(lost, torch.inf, noise)
            typical = median(noise / scale.clamp(min=TINY)) if rows else 0.0
            self._noise[batch, place.node] = torch.maximum(noise, max(typical, floor) * scale), scale


def _differ(rule: Deciding, own: Tensor, chosen: Tensor) -> bool:
    return own.shape == chosen.shape and bool(rule.differs(own, chosen).any())


def _steer(
    place: Place,
    chosen: Mapping[str, Tensor],
    fallback: Mapping[str, Tensor],
    note: Callable[[Place, Arguments, Tensor, Tensor], None] | None,
) -> Steering:
    """Gives the operator's result where its choice is that in ``chosen``."""

    def decide(args: tuple[Any, ...], kwargs: dict[str, Any], own: Any) -> Any:
        mine = own if place.rule.item is None else own[place.rule.item]
        theirs = next((c for c in (chosen[place.value], fallback[place.value]) if c.shape == mine.shape), None)
        if theirs is None or not bool(place.rule.differs(mine, theirs).any()):
            return own
        at = bound(place.target, args, kwargs)
        if note is not None:
            note(place, at, mine, theirs)
        return place.rule.result(at, own, theirs)

    return decide


def _watch(place: Place, seen: dict[str, Tensor], then: Steering | None) -> Steering:
    def look(args: tuple[Any, ...], kwargs: dict[str, Any], own: Any) -> Any:
        seen[place.node] = place.rule.compared(bound(place.target, args, kwargs))
        return own if then is None else then(args, kwargs, own)

    return look


def _rows(value: Tensor, batch: Batch) -> int:
    """How many samples a tensor holds, one where axis 0 is not the batch."""
    return batch.size if batch.size and value.ndim and value.shape[0] == batch.size else 1
