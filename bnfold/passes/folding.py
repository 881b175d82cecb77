"""Folding: carry every per-channel affine to contractions that absorb it. Planning is pure, applying is dumb.

An affine goes *backward* by asking what produces its operand to emit the affine's result instead, or *forward* by
leaving it out and letting everything that reads its result make up for it. Both walk a region of the graph in
(reverse) topological order, visiting each node once, and put one question to each node's semantics. All readers of a
value must agree; readers of disjoint parts do not disagree. What a node does to an affine is ``semantics``; who else
reads a value, and whether a constant fits its dtype, is decided here.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import Tensor

from bnfold import aten
from bnfold.affine import Affine
from bnfold.graph.graph import Graph, Node
from bnfold.graph.sizes import WAYS, UnknownSizeError
from bnfold.graph.threads import torch_threads
from bnfold.passes.normalisations import recognise
from bnfold.passes.plan import Edit, Plan, Words, follow
from bnfold.report import Entry, Ledger, Outcome, Refusal
from bnfold.semantics import Answer, Contraction, Movement, No, Product, Refused, Scaling, Semantics, Sum

DIRECTIONS: tuple[Outcome, Outcome] = ("backward", "forward")


#: Affines that must not go a way, by the name of their value and the way, and why.
Excluded = Mapping[tuple[str, Outcome], Refusal]


def fold(graph: Graph) -> Ledger:
    """Folds every affine that algebra allows, editing ``graph``.

    A normalisation in arithmetic becomes one operator, what constants alone compute a constant. Then backward, then
    forward, until nothing changes. Deterministic; linear in the nodes that each affine's region touches.
    """
    recognise(graph)
    graph.materialise()
    with torch_threads(1):  # many small operators
        return Folder(graph).run()


class Folder:
    """The state of one pass: the semantics of the nodes, and where shifts and scales would find a home.

    Args:
        graph: edited by ``run``; ``journal`` then lists the edits.
        excluded: what must stay, beyond what algebra says.
    """

    def __init__(self, graph: Graph, excluded: Excluded | None = None) -> None:
        self.graph = graph
        self.journal: list[Edit] = []
        self._excluded = excluded or {}
        self._semantics: dict[Node, Semantics] = {}
        self._homes: dict[tuple[Node, bool], bool] = {}
        self._parts: dict[tuple[Node, Node], Affine] = {}

    def run(self) -> Ledger:
        """Folds until nothing changes; the ledger has an entry for every affine there was."""
        sites = [value for value in self.graph.values() if self._is_source(value)]
        entries: dict[Node, Entry] = {}
        where: dict[Node, list[Node]] = {}
        took: dict[Node, Words] = {}
        info = {site: self._describe(site) for site in sites}
        open_sites, progress = sites, True
        refusals: dict[tuple[Node, str], Refusal] = {}
        norms = {site for site in sites if info[site][-1] == "batch_norm"}
        while progress and open_sites:
            progress = False
            # BatchNorms first: where one and a bare multiply cannot both go, the multiply is the cheaper one to keep.
            for direction, first in ((d, first) for first in (True, False) for d in DIRECTIONS):
                # Against the direction of travel, so that a chain of affines is composed link by link: each then meets
                # the next one, and none walks the whole chain.
                ordered = [site for site in open_sites if (site in norms) is first]
                ordered = ordered[::-1] if direction == "backward" else ordered
                if not ordered:
                    continue
                self._find_homes()
                done: set[Node] = set()
                for site in (s for s in ordered if s not in done):
                    plan = self._plan(site, direction)
                    if isinstance(plan, Refusal):
                        refusals[site, direction] = plan
                        continue
                    words = self._words(plan)
                    sites_of_result = self._apply(plan)
                    # Affines that were composed on the way are gone with it.
                    for gone in (value for value, _ in plan.bypasses if value in info):
                        entries[gone] = Entry(*info[gone], plan.direction)
                        took[gone] = words
                        where[gone] = sites_of_result
                        done.add(gone)
                open_sites = [site for site in open_sites if site not in done]
                progress = progress or bool(done)
        for site in open_sites:
            found = tuple(refusals[site, d] for d in DIRECTIONS)
            entries[site] = Entry(*info[site], "left", refusals=found)
        follow(took)
        self.graph.refresh()
        return Ledger(
            tuple(self._with_sites(self._with_words(entries[s], took.get(s)), where.get(s, [])) for s in sites)
        )

    # -- sources ---------------------------------------------------------------------------------------------------

    def _is_source(self, value: Node) -> bool:
        semantics = self.semantics(value)
        if isinstance(semantics, Refused):
            return semantics.kind == "batch_norm"
        if not isinstance(semantics, Scaling) or not self.graph.is_float(value):
            return False
        # Along more than one axis it is a table (a position embedding, an attention bias), not a per-channel affine.
        return len(semantics.affine.varies()) <= 1

    def _describe(self, site: Node) -> tuple[str, str, str, str]:
        semantics = self.semantics(site)
        assert isinstance(semantics, (Scaling, Refused))
        return self.graph.name(site), self.graph.module(site), self.graph.module_class(site), semantics.kind

    # -- planning --------------------------------------------------------------------------------------------------

    def _plan(self, site: Node, direction: Outcome) -> Plan | Refusal:
        if (excluded := self._excluded.get((self.graph.name(site), direction))) is not None:
            return excluded
        semantics = self.semantics(site)
        if isinstance(semantics, Refused):
            return self._refuse(site, No(semantics.reason, semantics.detail))
        assert isinstance(semantics, Scaling)
        if semantics.stays is not None:
            return self._refuse(site, semantics.stays)
        plan = self._planned(site, semantics, direction)
        if isinstance(plan, Refusal) or not plan.mixed:
            return plan
        # A dynamic dimension was mixed into an axis that the affine varies along: the edits must not depend on it.
        kept = self._semantics, self._parts
        try:
            for way in range(1, WAYS):
                self.graph.resize(way)
                self._semantics, self._parts = {}, {}
                other = self._planned(site, semantics, direction)
                if isinstance(other, Refusal) or not plan.equals(other):
                    why = "its constants would depend on the size of a dynamic dimension"
                    return self._refuse(site, No("dynamic-size", why))
        finally:
            self.graph.resize(0)
            self._semantics, self._parts = kept
        return plan

    def _planned(self, site: Node, semantics: Scaling, direction: Outcome) -> Plan | Refusal:
        plan = Plan(site, direction)
        walk = self._pull if direction == "backward" else self._push
        refusal = walk(plan, semantics)
        if refusal is None:
            plan.bypasses.append((site, semantics.slot))
            refusal = self._check(plan, semantics)
        return plan if refusal is None else refusal

    def _pull(self, plan: Plan, source: Scaling) -> Refusal | None:
        graph, site = self.graph, plan.site
        wanted: dict[Node, dict[Node, Affine]] = {}
        queue: list[tuple[float, Node]] = []
        queued: set[Node] = set()

        def ask(reader: Node, slot: str, affine: Affine) -> Refusal | None:
            value = graph.call(reader).at(slot)
            if graph.is_constant(value):
                if not affine.settled().is_identity:
                    constant = graph.call(reader).constant(slot)
                    assert constant is not None
                    plan.constants.append((reader, slot, affine.settled()(constant)))
                return None
            asked = wanted.setdefault(value, {})
            both = asked[reader].agree(affine) if reader in asked else affine
            if both is None:
                return self._refuse(reader, No("several-readers", "it reads the value twice, differently"))
            asked[reader] = both
            if value not in queued and not affine.settled().is_identity:
                queued.add(value)
                heapq.heappush(queue, (-graph.order[value], value))
            return None

        refusal = ask(site, source.slot, source.affine)
        while queue and refusal is None:
            _, value = heapq.heappop(queue)
            agreed = self._agreed(value, wanted[value])
            if isinstance(agreed, Refusal):
                return agreed
            if value.op != "call_function":
                return Refusal("model-input", f"input '{graph.name(value)}'")
            if graph.is_frozen(value):
                return self._refuse(value, No("in-place"))
            plan.mixed = plan.mixed or bool(set(agreed.varies()) & set(graph.dynamic_axes(value)))
            answer = self._ask(value, lambda s, a=agreed: s.pull(a))
            if isinstance(answer, No):
                return self._refuse(value, answer)
            self._note(plan, value, answer.constants, answer.add, bool(answer.operands))
            if answer.bypass is not None:
                plan.bypasses.append((value, answer.bypass))
            for slot, affine in answer.operands.items():
                refusal = refusal or ask(value, slot, affine)
        return refusal

    def _agreed(self, value: Node, asked: Mapping[Node, Affine]) -> Affine | Refusal:
        """What all readers of ``value`` together want; a reader outside the region wants what it reads unchanged."""
        total: Affine | None = None
        for reader in sorted(asked, key=self.graph.order.__getitem__):
            total = asked[reader] if total is None else total.agree(asked[reader])
            if total is None:
                return self._refuse(reader, No("several-readers", "the readers of the value want different affines"))
        assert total is not None
        for reader in self.graph.readers(value):
            if reader in asked:
                continue
            unchanged = self._unchanged(reader, value)
            both = total if unchanged is None else total.agree(unchanged)
            if both is None:
                return self._refuse(reader, No("several-readers", f"'{self.graph.name(value)}' is also read here"))
            total = both
        return total.settled()

    def _unchanged(self, reader: Node, value: Node) -> Affine | None:
        """The identity on what ``reader`` reads of ``value``, the rest free; None where it reads only the shape."""
        identity = Affine.identity(self.graph.rank(value))
        if reader.op == "output" or self.graph.is_list(reader):
            return identity
        semantics = self.semantics(reader)
        slots = [slot for slot, node in self.graph.call(reader).slots() if node is value]
        if all(slot in semantics.shape_only for slot in slots):
            return None
        if isinstance(semantics, Movement) and len(slots) == 1:
            # Every affine on one of many slices asks this of all the others, so the answer is kept.
            if (reader, value) not in self._parts:
                answer = self._ask(reader, lambda s: s.pull(Affine.identity(self.graph.rank(reader))))
                self._parts[reader, value] = identity if isinstance(answer, No) else answer.operands[slots[0]]
            return self._parts[reader, value]
        return identity

    def carried(self, value: Node, affine: Affine) -> Plan | Refusal:
        """The edits that make up for ``affine`` on a value in everything that reads it."""
        plan = Plan(value, "forward")
        refusal = self._carry(plan, affine)
        return plan if refusal is None else refusal

    def _push(self, plan: Plan, source: Scaling) -> Refusal | None:
        return self._carry(plan, source.affine)

    def _carry(self, plan: Plan, affine: Affine) -> Refusal | None:
        graph, site = self.graph, plan.site
        carried: dict[Node, Affine] = {site: affine}
        queue: list[tuple[float, Node]] = []
        seen: set[Node] = set()

        def spread(value: Node) -> None:
            for reader in graph.readers(value):
                if reader not in seen:
                    seen.add(reader)
                    heapq.heappush(queue, (graph.order[reader], reader))

        spread(site)
        while queue:
            _, reader = heapq.heappop(queue)
            if reader.op == "output":
                return Refusal("model-output", "the model's output")
            if graph.is_list(reader) or graph.is_frozen(reader):
                return self._refuse(reader, No("in-place" if graph.is_frozen(reader) else "nonlinear"))
            call, semantics = graph.call(reader), self.semantics(reader)
            given = {
                slot: carried[value]
                for slot, value in call.slots()
                if value in carried and slot not in semantics.shape_only
            }
            if not given:
                continue
            answer = self._ask(reader, lambda s, g=given: s.push(g))
            if isinstance(answer, No):
                return self._refuse(reader, answer)
            passes = answer.out is not None and not answer.out.is_identity
            self._note(plan, reader, answer.constants, answer.add, passes)
            if answer.bypass is not None:
                plan.bypasses.append((reader, answer.bypass))
            if passes:
                assert answer.out is not None
                carried[reader] = answer.out
                dynamic = set(graph.dynamic_axes(reader))
                plan.mixed = plan.mixed or bool(set(answer.out.varies()) & dynamic)
                spread(reader)
        return None

    def _note(self, plan: Plan, value: Node, constants: Mapping[str, Tensor], add: Tensor | None, passes: bool) -> None:
        plan.constants += [(value, slot, tensor) for slot, tensor in constants.items()]
        if add is not None:
            plan.adds.append((value, add))
        (plan.carriers if passes else plan.absorbers).append(value)

    def _check(self, plan: Plan, source: Scaling) -> Refusal | None:
        """The legality that no semantics knows: dtypes that overflow, and operators that must not become more."""
        for value, slot, tensor in plan.constants:
            overflow = self.graph.overflow(value, slot, tensor)
            if overflow is not None:
                what = f"{slot}[{', '.join(map(str, overflow.index))}]"
                if not bool(tensor.isfinite().all()):
                    return self._refuse(value, No("nonfinite", f"{what} is NaN or infinite"))
                return self._refuse(value, No("overflow", f"{what} would be {overflow.largest:.3g}"))
        gone = len(plan.bypasses) if source.kind == "batch_norm" else len(plan.bypasses) - 1
        if len(plan.adds) > gone:
            return self._refuse(plan.adds[0][0], No("no-saving", "it has no operand for a bias"))
        return None

    def _ask(self, value: Node, question: object) -> Answer:
        try:
            answer: Answer = question(self.semantics(value))  # type: ignore[operator]
        except UnknownSizeError as error:
            return No("dynamic-size", str(error))
        except (RuntimeError, NotImplementedError) as error:  # an operator that cannot be run on indices
            return No("unknown-operator", f"{type(error).__name__}: {error}")
        return answer

    def semantics(self, value: Node) -> Semantics:
        """What the operator does to an affine."""
        if value not in self._semantics:
            semantics = aten.semantics(self.graph.call(value))
            if isinstance(semantics, (Sum, Product)):
                semantics = replace(semantics, home=self._home(value, semantics))
            self._semantics[value] = semantics
        return self._semantics[value]

    # -- where shifts of a sum and scales of a product should go ----------------------------------------------------

    def _home(self, value: Node, semantics: Sum | Product) -> str | None:
        call, shift = self.graph.call(value), isinstance(semantics, Sum)
        return next((slot for slot in semantics.slots if self._homes.get((call.at(slot), shift))), None)

    def _find_homes(self) -> None:
        """One sweep: which values would take a scale, and which a shift, if nothing else read them."""
        self.graph.refresh()
        self._homes = {}
        self._semantics = {v: s for v, s in self._semantics.items() if not isinstance(s, (Sum, Product))}
        for value in self.graph.values():
            slots = list(self.graph.call(value).slots())
            semantics = self.semantics(value)
            alone = len(value.users) == 1
            for shift in (False, True):
                operands = {s: self.graph.is_constant(n) or self._homes.get((n, shift), False) for s, n in slots}
                self._homes[value, shift] = alone and semantics.takes(shift, operands)

    # -- applying --------------------------------------------------------------------------------------------------

    def _apply(self, plan: Plan) -> list[Node]:
        """Makes the plan's edits; returns the values at which the result must equal a captured value."""
        graph, site = self.graph, plan.site
        self.journal.append(Edit.of(plan, graph))
        stale: set[Node] = {value for value, _, _ in plan.constants} | {value for value, _ in plan.adds}
        for value, slot, tensor in plan.constants:
            graph.set_constant(value, slot, tensor)
        for value, tensor in plan.adds:
            added = graph.add_after(value, tensor)
            self.graph.stands_for[added] = self.graph.meaning(value)
            self.graph.stands_for[value] = None
            stale |= set(added.users)
        meaning = self.graph.meaning(site)
        for carrier in plan.carriers:
            self.graph.stands_for[carrier] = None
        if plan.direction == "backward":
            for absorber in plan.absorbers:
                self.graph.stands_for[absorber] = None
        replaced: dict[Node, Node] = {}
        for value, slot in plan.bypasses:
            by = graph.call(value).at(slot)
            stale |= {by, *graph.readers(value), *value.users}
            graph.bypass(value, by)
            replaced[value] = by
        for value in stale | set(replaced):
            self._semantics.pop(value, None)
        if plan.direction == "forward":
            return [replaced.get(a, a) for a in plan.absorbers]
        by = replaced[site]
        while by in replaced:
            by = replaced[by]
        self.graph.stands_for[by] = meaning
        return [by]

    def write(self, constants: Iterable[tuple[Node, str, Tensor]], changed: Iterable[Node]) -> None:
        """Gives slots constants of their own; what is ``changed`` equals no captured value any more."""
        for value, slot, tensor in constants:
            self.graph.set_constant(value, slot, tensor)
            self._semantics.pop(value, None)
        for value in changed:
            self.graph.stands_for[value] = None

    def _with_sites(self, entry: Entry, values: Iterable[Node]) -> Entry:
        # What took it may itself be gone: an affine, composed into another on its way.
        still = [v for v in values if v in self.graph.order]
        sites = tuple((self.graph.name(v), m) for v in still if (m := self.graph.meaning(v)) is not None)
        return replace(entry, site=sites)

    # -- words -----------------------------------------------------------------------------------------------------

    def _words(self, plan: Plan) -> Words:
        into = {v: self.where(v) for v in sorted(plan.absorbers, key=self.graph.order.__getitem__)}
        return Words(into, dict.fromkeys(self.graph.call(v).operator.removeprefix("aten.") for v in plan.carriers))

    def _with_words(self, entry: Entry, words: Words | None) -> Entry:
        if words is None:
            return entry
        return replace(entry, into=tuple(dict.fromkeys(words.into.values())), through=tuple(words.through))

    def where(self, value: Node) -> str:
        """The module of a layer, or its operator."""
        operator = self.graph.call(value).operator if value.op == "call_function" else "output"
        own = isinstance(self.semantics(value), (Contraction, Scaling)) if value.op == "call_function" else False
        return (self.graph.module(value) if own or self.graph.module(value) else "") or operator

    def _refuse(self, value: Node, answer: No) -> Refusal:
        if value.op == "output":
            return Refusal(answer.reason, "the model's output", "output", answer.detail)
        if value.op != "call_function":
            return Refusal(answer.reason, f"input '{self.graph.name(value)}'", "input", answer.detail)
        return Refusal(answer.reason, self.where(value), self.graph.call(value).operator, answer.detail)
