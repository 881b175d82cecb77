"""Folding: as many per-channel affines go as the gauges around them allow. Planning is pure, applying is dumb.

``gauges`` says which affines can go together, and what every value is then stored as; ``solution`` computes every
constant once from that; here it is found legal (a constant must fit its dtype, and hold at every size), carried out and
told.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

from bnfold.affine import Meaning
from bnfold.graph.graph import Graph, Node
from bnfold.graph.threads import torch_threads
from bnfold.passes.bodies import fold_regions
from bnfold.passes.cancellation import cancellations
from bnfold.passes.choices import Choices
from bnfold.passes.gauges import Gauges
from bnfold.passes.normalisations import recognise
from bnfold.passes.reasons import reasons
from bnfold.passes.rewriter import Rewriter
from bnfold.passes.solution import Edit, Path, Plan, solved
from bnfold.report import Entry, Ledger, Outcome, Refusal
from bnfold.semantics import Opaque, Same, Scaling
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
    """One pass: ``run`` edits the graph, ``journal`` then tells the edits; ``excluded`` is what must stay as well."""

    def __init__(self, graph: Graph, excluded: Excluded | None = None) -> None:
        self.graph = graph
        self.rewriter = Rewriter(graph)
        self._excluded = excluded or {}
        self._banned: dict[Node, Refusal] = {}

    def run(self) -> Ledger:
        """Folds; the ledger has an entry for every affine there was."""
        self._settle()
        self._went = {site: self._told(site) for site in self._choice.gone}
        entries = {site: self._entry(site) for site in self._gauges.sites}
        self._by = self._apply()
        self.graph.refresh()
        return Ledger(tuple(self._with_sites(entry, site) for site, entry in entries.items()))

    # -- planning --------------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Chooses and plans until every constant fits its dtype, and holds at every size."""
        self._fixed: dict[Node, str] = {}
        self._gauges = Gauges(self.rewriter)
        while True:
            self._choice = Choices(self._gauges, self._ways).choose()
            self._solution = solved(self._gauges, self._choice.gone)
            self._gone = self._solution.gone
            self._plan = Plan.of(self._solution)
            if self._overflows() or self._cancels():
                continue
            kept = self._must_be_kept()
            if not kept:
                return
            self._fixed |= kept
            self._gauges = Gauges(self.rewriter, self._fixed)

    def _must_be_kept(self) -> dict[Node, str]:
        """Values that have to be stored as they are although the gauges leave them free, and why."""
        moved = [value for value in self._gauges.of if not self._solution.is_kept(value)]
        if rounded := [value for value in moved if self._rounds(value)]:
            made = self._solution.upstream
            if rounded := [value for value in rounded if value in made and made[value].into]:
                return dict.fromkeys(rounded, "dtype")
        mixed = [value for value in moved if self._gauges.mixes(value)]
        return dict.fromkeys(mixed, "dynamic-size") if mixed and not self._holds() else {}

    def _ways(self, site: Node) -> tuple[Outcome, ...]:
        if site in self._banned:
            return DIRECTIONS
        return tuple(d for d in DIRECTIONS if (self.graph.name(site), d) in self._excluded)

    def _rounds(self, value: Node) -> bool:
        """Whether a value is stored with a shift that a cast to a wider dtype would have to undo."""
        readers = [r for r in self.graph.readers(value) if r.op == "call_function" and not self.graph.is_list(r)]
        casts = [s for s in map(self._gauges.at, readers) if isinstance(s, Same) and s.widens]
        return any(cast.rounds(self._solution.after(value)) for cast in casts)

    def _holds(self) -> bool:
        """Whether the edits are the same at other sizes."""
        try:
            for way in range(1, WAYS):
                self.graph.resize(way)
                again = Gauges(Rewriter(self.graph), self._fixed)
                if not Choices(again, self._ways).holds(self._choice):
                    return False
                if not self._plan.equals(Plan.of(solved(again, self._gone))):
                    return False
            return True
        finally:
            self.graph.resize(0)

    def _overflows(self) -> bool:
        """Keeps an affine from going because of which a constant does not fit its dtype."""
        for (value, slot), tensor in self._plan.constants.items():
            overflow = self.graph.overflow(value, slot, tensor)
            if overflow is None:
                continue
            what = f"{slot}[{', '.join(map(str, overflow.index))}]"
            finite = bool(tensor.isfinite().all())
            reason = "overflow" if finite else "nonfinite"
            small = overflow.largest < 1
            size = f"{overflow.largest:.3g}{', the largest of all' if small else ''}"
            detail = f"{what} would be {size}" if finite else f"{what} is NaN or infinite"
            refusal = Refusal(reason, self.rewriter.where(value), self.graph.call(value).operator, detail)
            near = self._near(value)
            self._banned[min(near, key=self._scale) if small else next(near)] = refusal
            return True
        return False

    def _cancels(self) -> bool:
        """Keeps affines from going because of which what is stored next to them would be mostly a shift."""
        found = cancellations(self._solution)
        for each in found:
            reads = [r for r in self.graph.readers(each.value) if r in self._gone and self._solution.is_kept(r)]
            detail = f"rounding would move [{', '.join(map(str, each.index))}] {each.factor:.2g} times as much"
            refusal = Refusal(
                "cancellation", self.rewriter.where(each.value), self.graph.call(each.value).operator, detail
            )
            self._banned[reads[0] if reads else next(self._near(each.value))] = refusal
        return bool(found)

    def _near(self, value: Node) -> Iterator[Node]:
        """The affines that go next to a value, past what is stored otherwise, the nearest first; else any."""
        seen, waiting, found = {value}, [value], False
        for node in waiting:
            for other in (*node.all_input_nodes, *self.graph.readers(node)):
                if other not in seen and (other in self._gone or not self._solution.is_kept(other)):
                    seen.add(other)
                    waiting.append(other)
                    if other in self._gone:
                        found = True
                        yield other
        if not found:
            yield self._choice.gone[0]

    def _scale(self, site: Node) -> float:
        """The largest factor of an affine."""
        semantics = self._gauges.at(site)
        return float(semantics.affine.scale.abs().max()) if isinstance(semantics, Scaling) else math.inf

    # -- applying --------------------------------------------------------------------------------------------------

    def _apply(self) -> dict[Node, Node]:
        """Makes the edits; answers what takes the place of every affine that goes."""
        moved = [v for v in self._gauges.of if v in self._gone or not self._solution.is_kept(v)]
        meanings = {value: self._meaning(value) for value in moved}  # all of them before any is edited
        self._plan.apply(self.rewriter)
        by, told = dict[Node, Node](), set[Node]()
        for value, meaning in meanings.items():
            stored = value
            if value in self._gone:  # its operand stands in its place, or what stands in that one's
                operand = self._gauges.operand(value)
                stored = by[value] = by.get(operand, operand)
            # The next affine says the same of it, but behind a scale of zero, where whatever it multiplies by is free.
            if stored not in told:
                self.rewriter.stands_for(stored, meaning)
            told |= {stored} if value in self._gone and meaning is not None else set()
        self.rewriter.drop(by)
        added = {value: self.rewriter.add_after(value, tensor) for value, tensor in self._plan.adds.items()}
        return {site: added.get(node, node) for site, node in by.items()}

    def _meaning(self, value: Node) -> Meaning | None:
        """What a value stands for, and how it is stored; None where some of it is not."""
        name = self.graph.name(value)
        if self._solution.is_kept(value):
            return Meaning(name)
        return None if self._solution.is_lost(value) else Meaning(name, self._solution.after(value))

    def journal(self) -> list[Edit]:
        """Which constants were touched for which affine, for who writes the fold into a class."""
        edits, at = list[Edit](), dict[Node, list[str]]()
        slots = [*self._plan.constants, *self._plan.shared]
        for value, slot in slots:
            at.setdefault(value, []).append(slot)
        named = {node for _, path in self._went.values() for node in path.into}
        rest = tuple((value.name, slot) for value, slot in slots if value not in named)
        for site, (direction, path) in self._went.items():
            constants = (*((node.name, slot) for node in path.into for slot in at.get(node, ())), *rest)
            adds = tuple(node.name for node in path.into if node in self._plan.adds)
            edits.append(Edit(site.name, direction, constants, adds, self._by[site].name))
        return edits

    # -- telling ---------------------------------------------------------------------------------------------------

    def _entry(self, site: Node) -> Entry:
        semantics = self._gauges.at(site)
        assert isinstance(semantics, (Scaling, Opaque))
        graph = self.graph
        what = graph.name(site), graph.module(site), graph.module_class(site), semantics.kind
        if site not in self._gone:
            # Why it can go neither backward nor forward, which may be one and the same.
            return Entry(*what, "left", refusals=(self._refusals(site, semantics) * 2)[:2])
        direction, path = self._went[site]
        into = sorted(path.into, key=graph.order.__getitem__)
        return Entry(*what, direction, tuple(dict.fromkeys(map(self.rewriter.where, into))), path.through)

    def _told(self, site: Node) -> tuple[Outcome, Path]:
        """Which way an affine went, and what took it up."""
        operand, up = self._gauges.operand(site), self._solution.upstream
        back = up[site] if operand in up or not self._solution.is_kept(operand) else Path()
        if self._solution.is_kept(site):
            return "backward", back
        onward = self._solution.downstream[site]
        if not onward.into and not self._solution.is_kept(operand):  # composed with another one
            return "backward", back
        return "forward", Path.joined([back, onward]) if back.into else onward

    def _refusals(self, site: Node, semantics: Scaling | Opaque) -> tuple[Refusal, ...]:
        held = semantics if isinstance(semantics, Opaque) else semantics.stays
        if held is not None:
            operator = self.graph.call(site).operator
            return (Refusal(held.reason, self.rewriter.where(site), operator, held.detail),)
        if site in self._banned:
            return (self._banned[site],)
        given = tuple(self._excluded[self.graph.name(site), way] for way in self._ways(site))
        why = self._choice.why.get(site)
        found = reasons(self._gauges, site, why) if why is not None else ()
        return (*given, *(refusal for refusal in found if not given or refusal.reason != "inexpressible"))

    def _with_sites(self, entry: Entry, site: Node) -> Entry:
        """With the values that can be compared with what they were, as they are after the edits."""
        if site not in self._gone:
            return entry
        direction, path = self._went[site]
        values = (self._by[site],) if direction == "backward" else path.into
        still = [v for v in values if v in self.graph.order]
        sites = tuple((self.graph.name(v), m.value) for v in still if (m := self.graph.meaning(v)) is not None)
        return replace(entry, site=sites)
