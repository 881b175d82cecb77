"""Which affines go: as many as the equations allow.

An affine goes if the systems accept its equations as well, and otherwise the contradiction is why it stays. Equations
only accumulate, so one pass is as good as its order: forward and backward are tried, and then exchanges, each of which
puts the affine last that stands in most of the others' way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from bnfold.graph.graph import Node
from bnfold.passes.gauges import Contradiction, Gauges, How
from bnfold.semantics import Contraction, Scaling
from bnfold.semantics.equations import EMPTY
from bnfold.semantics.system import Ints

#: Exchanges tried without one that helps, in nets of up to so many affines, and in larger ones.
PATIENCE, MANY = 12, 300


@dataclass
class Choice:
    """What is asked of every affine and of contractions with no place for a bias, and why affines stay."""

    asked: dict[Node, How] = field(default_factory=dict)
    why: dict[Node, Contradiction] = field(default_factory=dict)

    @property
    def gone(self) -> list[Node]:
        """The affines that go."""
        return [item for item, how in self.asked.items() if how in ("goes", "dead")]


@dataclass(frozen=True)
class Terms:
    """What a run starts from: what is asked before anything else and holds, and affines that are tried before others.

    ``open``: contractions that may get a bias. ``dead``: affines with zeros that their readers leave out where they
    can, in place of their operand being emptied.
    """

    held: Mapping[Node, How]
    first: tuple[Node, ...] = ()
    open: frozenset[Node] = frozenset()
    dead: frozenset[Node] = frozenset()


class Choices:
    """The choices that gauges leave, whose systems are added to, and taken back.

    ``excluded`` says which ways an affine must not go, ``"backward"`` or ``"forward"``.
    """

    def __init__(self, gauges: Gauges, excluded: Callable[[Node], Collection[str]] = lambda site: ()) -> None:
        self._gauges, self._equations, self._excluded = gauges, gauges.equations, excluded
        #: The choice whose equations the systems hold.
        self._held: Choice | None = None

    def choose(self) -> Choice:
        """The most affines that can go, BatchNorms first; the systems then hold their equations."""
        able = [s for s in self._gauges.affines if self._scaling(s).stays is None and len(self._excluded(s)) < 2]
        self._hopeless = self._alone(able)
        asked = set(able)
        terms = Terms({s: "stays" for s in self._gauges.affines if s not in asked})
        best = self._run(able, terms)
        emptied = {item for item, how in best.asked.items() if how == "goes"}
        emptied &= {node for why in best.why.values() if why.system == EMPTY for node in why.nodes}
        if emptied:
            spared = replace(terms, dead=frozenset(emptied))
            other = self._run(able, spared)
            if self._worth(other) > self._worth(best):
                best, terms = other, spared
        if len(best.why) > 1 + len(self._hopeless):
            best = self._exchanged(self._better(best, self._run(able[::-1], terms)), terms)
        if best is not self._held:
            held = self.holds(best)
            assert held, "a choice contradicts itself"
        return best

    def _alone(self, able: Sequence[Node]) -> dict[Node, Contradiction]:
        """Those that contradict what holds anyway, each alone, and how: no order lets them go."""
        found = dict[Node, Contradiction]()
        while True:
            self._equations.undo(self._gauges.start)
            wrong = self._add({site: "goes" for site in able if site not in found and not self._has_zeros(site)})
            more = self._gauges.alone(*wrong) if wrong else {}
            if not more:
                return found
            found |= more

    def holds(self, choice: Choice) -> bool:
        """Whether a choice that was made holds here; the systems then hold its equations."""
        self._equations.undo(self._gauges.start)
        return not self._add(choice.asked)

    def _better(self, one: Choice, other: Choice) -> Choice:
        return other if self._worth(other) > self._worth(one) else one

    def _worth(self, choice: Choice) -> tuple[int, int]:
        gone = choice.gone
        return len(self._gauges.norms.intersection(gone)), len(gone)

    def _exchanged(self, best: Choice, terms: Terms) -> Choice:
        patience, tried = PATIENCE if len(self._gauges.sites) <= MANY else 2, set[Node]()
        while patience and best.why:
            gone = best.gone
            blamed = Counter(n for why in best.why.values() for n in why.nodes.intersection(gone))
            # Whoever makes room for one other alone gains nothing.
            worst = [site for site, count in blamed.items() if site not in tried and count > 1]
            if not worst:
                break
            last = min(worst, key=lambda site: (-blamed[site], self._gauges.graph.order[site]))
            tried.add(last)
            found = self._run([*(s for s in gone if s is not last), *best.why, last], terms)
            if self._worth(found) > self._worth(best):
                best = found
            else:
                patience -= 1
        return best

    def _run(self, order: Sequence[Node], terms: Terms) -> Choice:
        """Lets affines go in an order, BatchNorms first, each that can.

        Between the two kinds come the contractions that have no place for a bias, and do without where they can.
        """
        self._equations.undo(self._gauges.start)
        wrong = self._add(terms.held)
        assert not wrong, "what must hold contradicts itself"
        choice, norms = Choice(dict(terms.held), dict(self._hopeless)), self._gauges.norms
        able = [s for s in order if not (s in terms.held or s in terms.first or s in self._hopeless)]
        bare = [v for v in self._gauges.unbiased if v not in terms.held and v not in terms.open]
        for items in (terms.first, [s for s in able if s in norms], bare, [s for s in able if s not in norms]):
            self._take({item: self._way(item, terms) for item in items}, choice)
        staying = Choice()
        self._take({s: "stays" for s in order if s not in choice.asked}, staying)
        if staying.why:  # those that can neither go nor stay after the others: one or the other before them
            held: dict[Node, How] = {**terms.held, **dict.fromkeys(staying.why, "stays")}
            again = self._run(order, replace(terms, held=held))
            again.why = {**staying.why, **{s: why for s, why in choice.why.items() if s in staying.why}, **again.why}
            if terms.first:
                return again
            return self._better(again, self._run(order, replace(terms, first=tuple(staying.why))))
        choice.asked |= staying.asked
        added = [v for v in bare if v not in choice.asked]
        if len(added) > len(norms.intersection(choice.gone)):  # more operators than before
            held = {**terms.held, **dict.fromkeys(bare, "closed")}
            return self._run(order, replace(terms, held=held))
        paid = self._paid(choice)
        if paid:
            return self._run(order, replace(terms, open=terms.open | paid))
        self._held = choice
        return choice

    def _way(self, item: Node, terms: Terms) -> How:
        if isinstance(self._gauges.at(item), Contraction):
            return "closed"
        return "dead" if item in terms.dead else "goes"

    def _paid(self, choice: Choice) -> frozenset[Node]:
        """Contractions for which an addition pays: with the affine that they hold up a multiply beside it goes."""
        gone, found = set(choice.gone), set[Node]()
        for site, why in choice.why.items():
            beside = [*self._gauges.call(site).node.all_input_nodes, *self._gauges.graph.readers(site)]
            if site not in self._gauges.norms and gone.intersection(beside):
                found |= {e.node for e in why.equations if e.reason == "no-saving"}
        return frozenset(node for node in found if choice.asked.get(node) == "closed")

    def _take(self, items: Mapping[Node, How], choice: Choice) -> None:
        """Accepts one after the other, as many at once as do not contradict."""
        waiting = [list(items)] if items else []
        while waiting:
            chunk = waiting.pop()
            mark = self._equations.mark()
            wrong = self._add({item: items[item] for item in chunk})
            if not wrong:
                choice.asked |= {item: items[item] for item in chunk}
            elif len(chunk) > 1:
                blamed = self._gauges.latest(wrong[0], int(wrong[1][0]))
                self._equations.undo(mark)
                waiting += _parts(chunk, max(i for i, item in enumerate(chunk) if item in blamed))
            else:
                why = self._gauges.contradiction(*wrong)
                self._equations.undo(mark)
                self._refused(chunk[0], items[chunk[0]], why, choice)

    def _refused(self, item: Node, how: How, why: Contradiction, choice: Choice) -> None:
        """One that contradicts what is accepted may do so no more where zeros are left to the other side."""
        if how == "closed":
            return
        if how != "stays" and self._has_zeros(item):
            other: How = "dead" if how == "goes" else "goes"
            mark = self._equations.mark()
            wrong = self._add({item: other})
            if not wrong:
                choice.asked[item] = other
                return
            also = self._gauges.contradiction(*wrong)
            self._equations.undo(mark)
            why = replace(why, dead=also) if other == "dead" else replace(also, dead=why)
        choice.why[item] = why

    def _add(self, asked: Mapping[Node, How]) -> tuple[str, Ints] | None:
        """Adds what holds then; answers what contradicts, which then has to be undone."""
        for item, how in asked.items():
            self._gauges.ask(item, how)
            for way in self._excluded(item) if how in ("goes", "dead") else ():
                held = self._gauges.operand(item) if way == "backward" else item
                self._equations.pin(self._gauges.of[held], "inexpressible")
        return self._equations.commit()

    def _has_zeros(self, site: Node) -> bool:
        return bool((self._scaling(site).affine.scale == 0).any())

    def _scaling(self, site: Node) -> Scaling:
        found = self._gauges.at(site)
        assert isinstance(found, Scaling)
        return found


def _parts(items: list[Node], last: int) -> list[list[Node]]:
    """In parts, the last one first, where the first up to ``last`` contradict one another.

    Those before it, it alone, and ever more of the rest: what is tried in vain is no more than what is accepted.
    """
    found = [items[:last]] * (last > 0) + [items[last : last + 1]]
    at, size = last + 1, 2 * last + 2
    while at < len(items):
        found.append(items[at : at + size])
        at, size = at + size, 2 * size
    return found[::-1]
