"""Folding: as many per-channel affines go as the gauges around them allow. Planning is pure, applying is dumb.

``gauges`` says which affines can go together, and what every value is then stored as; ``plan`` computes every constant
once from that; here it is found legal (a constant must fit its dtype, and hold at every size), carried out and told.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from bnfold.affine import Meaning
from bnfold.graph.graph import Graph, Node
from bnfold.graph.threads import torch_threads
from bnfold.passes.bodies import fold_regions
from bnfold.passes.choices import Choice, Choices
from bnfold.passes.gauges import Gauges
from bnfold.passes.normalisations import recognise
from bnfold.passes.plan import Edit, Path, Plan, downstream, upstream
from bnfold.passes.reasons import reasons
from bnfold.passes.rewriter import Rewriter
from bnfold.passes.solution import Solution, solved
from bnfold.report import Entry, Ledger, Outcome, Refusal
from bnfold.semantics import Refused, Same, Scaling
from bnfold.semantics.sizes import WAYS

#: Affines that must not go a way, by the name of their value and the way, and why.
Excluded = Mapping[tuple[str, Outcome], Refusal]
DIRECTIONS: tuple[Outcome, Outcome] = ("backward", "forward")


def fold(graph: Graph) -> Ledger:
    """Folds every affine that algebra allows, editing ``graph``.

    A normalisation in arithmetic becomes one operator, and what constants alone compute a constant, first.
    Deterministic; near linear in the graph.
    """
    with torch_threads(1):  # many small operators
        inside = fold_regions(graph, fold)
        recognise(graph)
        graph.materialise()
        ledger = Folder(graph).run()
    return replace(ledger, entries=(*ledger.entries, *inside))


class Folder:
    """The state of one pass.

    Args:
        graph: edited by ``run``; ``journal`` then tells the edits.
        excluded: what must stay, beyond what algebra says.
    """

    def __init__(self, graph: Graph, excluded: Excluded | None = None) -> None:
        self.graph = graph
        self.rewriter = Rewriter(graph)
        self._excluded = excluded or {}
        self._banned: dict[Node, Refusal] = {}

    def run(self) -> Ledger:
        """Folds; the ledger has an entry for every affine there was."""
        gauges, choice, solution, plan = self._planned()
        gone = set(choice.gone)
        info = {site: self._describe(gauges, site) for site in gauges.sites}
        left = {site: _two(self._refusals(gauges, choice, site)) for site in gauges.sites if site not in gone}
        up, down = upstream(gauges, solution, gone), downstream(gauges, solution, gone)
        told = {site: self._told(gauges, solution, site, up, down) for site in choice.gone}
        entries = {site: Entry(*info[site], "left", refusals=left[site]) for site in left}
        for site, (direction, path) in told.items():
            into = sorted(path.into, key=self.graph.order.__getitem__)
            names = tuple(dict.fromkeys(map(self.rewriter.where, into)))
            entries[site] = Entry(*info[site], direction, names, path.through)
        by = self._apply(gauges, plan, solution, gone)
        self._noted = told, plan, by
        self.graph.refresh()
        where = {s: (by[s],) if direction == "backward" else path.into for s, (direction, path) in told.items()}
        return Ledger(tuple(self._with_sites(entries[site], where.get(site, ())) for site in gauges.sites))

    # -- planning --------------------------------------------------------------------------------------------------

    def _planned(self) -> tuple[Gauges, Choice, Solution, Plan]:
        fixed: dict[Node, str] = {}
        gauges = Gauges(self.rewriter)
        while True:
            choice = Choices(gauges, self._ways).choose()
            solution = solved(gauges, choice.gone)
            plan = Plan.of(gauges, solution, set(choice.gone))
            if self._overflows(gauges, choice, solution, plan):
                continue
            moved = [value for value in gauges.of if not solution.is_kept(value)]
            rounded = [v for v in moved if self._rounds(gauges, solution, v)]
            made = upstream(gauges, solution, set(choice.gone)) if rounded else {}
            more = dict.fromkeys((v for v in rounded if v in made and made[v].into), "dtype")
            if not more:
                more = dict.fromkeys((v for v in moved if self._mixes(gauges, v)), "dynamic-size")
                if not more or self._holds(choice, plan):
                    return gauges, choice, solution, plan
            fixed |= more
            gauges = Gauges(self.rewriter, fixed)

    def _ways(self, site: Node) -> tuple[Outcome, ...]:
        if site in self._banned:
            return DIRECTIONS
        return tuple(d for d in DIRECTIONS if (self.graph.name(site), d) in self._excluded)

    def _rounds(self, gauges: Gauges, solution: Solution, value: Node) -> bool:
        """Whether a value is stored with a shift that a cast to a wider dtype would have to undo."""
        readers = [r for r in self.graph.readers(value) if r.op == "call_function" and not self.graph.is_list(r)]
        casts = [s for s in map(gauges.at, readers) if isinstance(s, Same) and s.widens]
        return any(cast.rounds(solution.after(value)) for cast in casts)

    def _mixes(self, gauges: Gauges, value: Node) -> bool:
        """Whether a value's gauge varies along an axis into which a dynamic dimension was mixed."""
        return any(map(gauges.of[value].varies, self.graph.dynamic_axes(value)))

    def _holds(self, choice: Choice, plan: Plan) -> bool:
        """Whether the edits are the same at other sizes."""
        try:
            for way in range(1, WAYS):
                self.graph.resize(way)
                again = Gauges(Rewriter(self.graph))
                if not Choices(again).holds(choice):
                    return False
                if not plan.equals(Plan.of(again, solved(again, choice.gone), set(choice.gone))):
                    return False
            return True
        finally:
            self.graph.resize(0)

    def _overflows(self, gauges: Gauges, choice: Choice, solution: Solution, plan: Plan) -> bool:
        """Keeps an affine from going because of which a constant does not fit its dtype."""
        for (value, slot), tensor in plan.constants.items():
            overflow = self.graph.overflow(value, slot, tensor)
            if overflow is None:
                continue
            what = f"{slot}[{', '.join(map(str, overflow.index))}]"
            finite = bool(tensor.isfinite().all())
            reason = "overflow" if finite else "nonfinite"
            detail = f"{what} would be {overflow.largest:.3g}" if finite else f"{what} is NaN or infinite"
            refusal = Refusal(reason, self.rewriter.where(value), self.graph.call(value).operator, detail)
            self._banned[self._nearest(choice, solution, value)] = refusal
            return True
        return False

    def _nearest(self, choice: Choice, solution: Solution, value: Node) -> Node:
        """The affine that goes next to a value, past others that are stored otherwise."""
        gone, seen, waiting = set(choice.gone), {value}, [value]
        for node in waiting:
            around = [n for n in (*node.all_input_nodes, *self.graph.readers(node)) if n not in seen]
            for other in around:
                if other in gone:
                    return other
                if not solution.is_kept(other):
                    seen.add(other)
                    waiting.append(other)
        return choice.gone[0]

    # -- applying --------------------------------------------------------------------------------------------------

    def _apply(self, gauges: Gauges, plan: Plan, solution: Solution, gone: set[Node]) -> dict[Node, Node]:
        """Makes the edits; answers what takes the place of every affine that goes."""
        kept = {value: solution.is_kept(value) for value in gauges.of}
        rewriter, by = self.rewriter, dict[Node, Node]()
        for (value, slot), tensor in plan.constants.items():
            rewriter.set_constant(value, slot, tensor)
        meanings = {value: self._meaning(value, solution) for value in gauges.of if not kept[value] or value in gone}
        for value in meanings.keys() - gone:
            rewriter.stands_for(value, meanings[value])
        for value in [value for value in gauges.of if value in gone]:
            operand = gauges.operand(value)
            by[value] = by.get(operand, operand)
            rewriter.stands_for(by[value], meanings[value])
        rewriter.drop(by)
        added = dict[Node, Node]()
        for value, tensor in plan.adds.items():
            meaning = self.graph.meaning(value)
            added[value] = rewriter.add_after(value, tensor)
            rewriter.stands_for(added[value], meaning)
        return {site: added.get(node, node) for site, node in by.items()}

    def _meaning(self, value: Node, solution: Solution) -> Meaning | None:
        """What a value stands for, and how it is stored; None where some of it is not."""
        name = self.graph.name(value)
        if solution.is_kept(value):
            return Meaning(name)
        return None if solution.is_lost(value) else Meaning(name, solution.after(value))

    def journal(self) -> list[Edit]:
        """Which constants were touched for which affine, for who writes the fold into a class."""
        told, plan, by = self._noted
        edits, at = list[Edit](), dict[Node, list[str]]()
        for value, slot in plan.constants:
            at.setdefault(value, []).append(slot)
        named = {node for _, path in told.values() for node in path.into}
        rest = tuple((value.name, slot) for value, slot in plan.constants if value not in named)
        for site, (direction, path) in told.items():
            constants = (*((node.name, slot) for node in path.into for slot in at.get(node, ())), *rest)
            adds = tuple(node.name for node in path.into if node in plan.adds)
            edits.append(Edit(site.name, direction, constants, adds, ((site.name, by[site].name),)))
        return edits

    # -- telling ---------------------------------------------------------------------------------------------------

    def _describe(self, gauges: Gauges, site: Node) -> tuple[str, str, str, str]:
        semantics = gauges.at(site)
        assert isinstance(semantics, (Scaling, Refused))
        return self.graph.name(site), self.graph.module(site), self.graph.module_class(site), semantics.kind

    def _told(
        self, gauges: Gauges, solution: Solution, site: Node, up: dict[Node, Path], down: dict[Node, Path]
    ) -> tuple[Outcome, Path]:
        operand = gauges.operand(site)
        back = up[site] if operand in up or not solution.is_kept(operand) else Path()
        if solution.is_kept(site):
            return "backward", back
        onward = down[site]
        if not onward.into and not solution.is_kept(operand):  # composed with another one
            return "backward", back
        return "forward", Path.joined([back, onward]) if back.into else onward

    def _refusals(self, gauges: Gauges, choice: Choice, site: Node) -> tuple[Refusal, ...]:
        semantics, operator = gauges.at(site), self.graph.call(site).operator
        if isinstance(semantics, Refused):
            return (Refusal(semantics.reason, self.rewriter.where(site), operator, semantics.detail),)
        assert isinstance(semantics, Scaling)
        if semantics.stays is not None:
            return (Refusal(semantics.stays.reason, self.rewriter.where(site), operator, semantics.stays.detail),)
        if site in self._banned:
            return (self._banned[site],)
        given = tuple(self._excluded[key] for d in DIRECTIONS if (key := (self.graph.name(site), d)) in self._excluded)
        why = choice.why.get(site)
        found = reasons(gauges, self.rewriter, site, why) if why is not None else ()
        return (*given, *(refusal for refusal in found if not given or refusal.reason != "inexpressible"))

    def _with_sites(self, entry: Entry, values: tuple[Node, ...]) -> Entry:
        still = [v for v in values if v in self.graph.order]
        sites = tuple((self.graph.name(v), m.value) for v in still if (m := self.graph.meaning(v)) is not None)
        return replace(entry, site=sites)


def _two(refusals: tuple[Refusal, ...]) -> tuple[Refusal, ...]:
    """Why it can go neither backward nor forward, which may be one and the same."""
    return (refusals * 2)[:2]
