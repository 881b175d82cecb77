"""Which affines go: as many as the equations allow.

An affine goes if the systems accept its equations as well, and otherwise the contradiction is why it stays. Equations
only accumulate, so one pass is as good as its order: forward and backward are tried, and then exchanges, each of which
puts the affine last that stands in most of the others' way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace

from bnfold.graph.graph import Node
from bnfold.passes.gauges import Contradiction, Gauges
from bnfold.semantics import Scaling
from bnfold.semantics.base import pin
from bnfold.semantics.equations import EMPTY

#: Exchanges tried without one that helps, in nets of up to so many affines, and in larger ones.
PATIENCE, MANY = 12, 300


@dataclass
class Choice:
    """Which affines go, those with ``dead`` channels, which contractions do without a new bias, and why others stay."""

    gone: list[Node] = field(default_factory=list)
    dead: set[Node] = field(default_factory=set)
    closed: list[Node] = field(default_factory=list)
    why: dict[Node, Contradiction] = field(default_factory=dict)


@dataclass(frozen=True)
class Terms:
    """What a run starts from: affines that stay or go first, contractions that get no bias, and that may have one.

    ``dead``: affines with zeros that their readers leave out where they can, in place of their operand being emptied.
    """

    dead: frozenset[Node] = frozenset()
    stay: tuple[Node, ...] = ()
    first: tuple[Node, ...] = ()
    closed: tuple[Node, ...] = ()
    open: tuple[Node, ...] = ()


class Choices:
    """The choices that the gauges of a graph leave.

    Args:
        gauges: their systems are added to, and taken back.
        excluded: the ways that an affine must not go, ``"backward"`` or ``"forward"``.
    """

    def __init__(self, gauges: Gauges, excluded: Callable[[Node], Collection[str]] = lambda site: ()) -> None:
        self._gauges, self._equations, self._excluded = gauges, gauges.equations, excluded
        self._spared: frozenset[Node] = frozenset()
        self._norms = {s for s in gauges.sites if isinstance(gauges.at(s), Scaling) and gauges.is_norm(s)}

    def choose(self) -> Choice:
        """The most affines that can go, BatchNorms first; the systems then hold their equations."""
        affines = [site for site in self._gauges.sites if isinstance(self._gauges.at(site), Scaling)]
        able = [s for s in affines if self._gauges.at(s).stays is None and len(self._excluded(s)) < 2]  # type: ignore
        self._hopeless = self._alone(able)
        asked = set(able)
        terms = Terms(stay=tuple(site for site in affines if site not in asked))
        best = self._run(able, terms)
        gone = set(best.gone) - best.dead
        if emptied := {n for why in best.why.values() if why.system == EMPTY for n in why.nodes & gone}:
            spared = replace(terms, dead=frozenset(emptied))
            other = self._run(able, spared)
            best, terms = (other, spared) if self._worth(other) > self._worth(best) else (best, terms)
        if len(best.why) > 1 + len(self._hopeless):
            best = self._exchanged(self._better(best, self._run(able[::-1], terms)), terms)
        assert self.holds(best), "a choice contradicts itself"
        return best

    def _alone(self, able: Sequence[Node]) -> dict[Node, Contradiction]:
        """Those that contradict what holds anyway, each alone, and how: no order lets them go."""
        found = dict[Node, Contradiction]()
        while True:
            self._equations.undo(self._gauges.start)
            for site in able:
                if site not in found and not self._zeros(site):
                    self._go(site)
            wrong = self._equations.commit()
            more = self._gauges.alone(*next(iter(wrong.items()))) if wrong else {}
            if not more:
                return found
            found |= more

    def holds(self, choice: Choice) -> bool:
        """Whether a choice that was made holds here; the systems then hold its equations."""
        self._equations.undo(self._gauges.start)
        for site in choice.gone:
            self._go(site, dead=site in choice.dead)
        for value in choice.closed:
            self._gauges.close(value)
        wrong = self._equations.commit()
        gone = set(choice.gone)
        for site in self._gauges.sites:
            if site not in gone and isinstance(self._gauges.at(site), Scaling):
                self._gauges.stay(site)
        return not wrong and not self._equations.commit()

    def _better(self, one: Choice, other: Choice) -> Choice:
        return other if self._worth(other) > self._worth(one) else one

    def _worth(self, choice: Choice) -> tuple[int, int]:
        return sum(map(self._is_norm, choice.gone)), len(choice.gone)

    def _exchanged(self, best: Choice, terms: Terms) -> Choice:
        patience, tried = PATIENCE if len(self._gauges.sites) <= MANY else 2, set[Node]()
        order = [*best.gone, *best.why]
        while patience and best.why:
            gone = set(best.gone)
            blamed = Counter(n for why in best.why.values() for n in why.nodes & gone)
            # Whoever makes room for one other alone gains nothing.
            blamed = Counter({site: n for site, n in blamed.items() if site not in tried and n > 1})
            if not blamed:
                break
            last = min(blamed, key=lambda site: (-blamed[site], self._gauges.graph.order[site]))
            tried.add(last)
            waiting = [s for s in order if s in best.why]
            order = [*(s for s in order if s is not last and s not in best.why), *waiting, last]
            found = self._run(order, terms)
            if self._worth(found) > self._worth(best):
                best, order = found, [*found.gone, *found.why]
            else:
                patience -= 1
                order = [*best.gone, *best.why]
        return best

    def _run(self, order: Sequence[Node], terms: Terms) -> Choice:
        """Lets affines go in an order, BatchNorms first, each that can. Between the two kinds come the contractions

        that have no place for a bias, and do without one where that is possible.
        """
        able = [s for s in order if s not in self._hopeless and s not in terms.stay]
        norms, rest = ([s for s in able if self._is_norm(s) is first] for first in (True, False))
        self._equations.undo(self._gauges.start)
        self._spared = terms.dead
        choice, stay = Choice(why=dict(self._hopeless)), set(terms.stay)
        for site in terms.stay:
            self._gauges.stay(site)
        for value in terms.closed:
            self._gauges.close(value)
        assert not self._equations.commit()
        choice.closed = list(terms.closed)
        self._take(terms.first, choice)
        self._take([s for s in norms if s not in terms.first], choice)
        self._take([v for v in self._gauges.unbiased if v not in terms.closed and v not in terms.open], choice)
        self._take([s for s in rest if s not in terms.first], choice)
        gone, failed = set(choice.gone), Choice()
        self._take([s for s in order if s not in gone and s not in stay], failed, self._gauges.stay)
        if failed.why:  # those that can neither go nor stay after the others: one or the other before them
            again = self._run(order, replace(terms, stay=(*terms.stay, *failed.why)))
            why = {site: choice.why.get(site, stays) for site, stays in failed.why.items()}
            again = replace(again, why={**why, **again.why})
            if terms.first:
                return again
            return self._better(again, self._run(order, replace(terms, first=tuple(failed.why))))
        added = [v for v in self._gauges.unbiased if v not in choice.closed and v not in terms.open]
        if len(added) > sum(map(self._is_norm, choice.gone)):  # more operators than before
            return self._run(
                order, replace(terms, closed=tuple(v for v in self._gauges.unbiased if v not in terms.open))
            )
        paid = self._paid(choice)
        return self._run(order, replace(terms, open=(*terms.open, *paid))) if paid else choice

    def _paid(self, choice: Choice) -> list[Node]:
        """Contractions for which an addition pays: with the affine that they hold up a multiply beside it goes."""
        gone, found = set(choice.gone), dict[Node, None]()
        for site, why in choice.why.items():
            beside = [*self._gauges.call(site).node.all_input_nodes, *self._gauges.graph.readers(site)]
            if not self._is_norm(site) and gone.intersection(beside):
                found |= dict.fromkeys(
                    e.node for e in why.equations if e.reason == "no-saving" and e.node in choice.closed
                )
        return list(found)

    def _take(self, items: Sequence[Node], choice: Choice, add: Callable[[Node], None] | None = None) -> None:
        """Accepts one after the other, as many at once as do not contradict."""
        waiting = [list(items)] if items else []
        while waiting:
            chunk = waiting.pop()
            mark = self._equations.mark()
            for item in chunk:
                (add or self._add)(item)
            wrong = self._equations.commit()
            if not wrong:
                self._accept(chunk, choice)
                continue
            (found,) = wrong.items()
            if len(chunk) > 1:
                blamed = self._gauges.latest(found[0], int(found[1][0]))
                self._equations.undo(mark)
                waiting += _parts(chunk, max(i for i, item in enumerate(chunk) if item in blamed))
                continue
            why = self._gauges.contradiction(*found)
            self._equations.undo(mark)
            (item,) = chunk
            semantics = self._gauges.at(item)
            if add is None and isinstance(semantics, Scaling) and self._zeros(item):
                dead = item not in self._spared
                self._go(item, dead=dead)
                wrong = self._equations.commit()
                if not wrong:
                    self._accept(chunk, choice, dead)
                    continue
                other = self._gauges.contradiction(*next(iter(wrong.items())))
                why = replace(why, dead=other) if dead else replace(other, dead=why)
                self._equations.undo(mark)
            if isinstance(semantics, Scaling):
                choice.why[item] = why

    def _accept(self, chunk: Sequence[Node], choice: Choice, dead: bool | None = None) -> None:
        for item in chunk:
            (choice.gone if isinstance(self._gauges.at(item), Scaling) else choice.closed).append(item)
            if item in self._spared if dead is None else dead:
                choice.dead.add(item)

    def _add(self, item: Node) -> None:
        if isinstance(self._gauges.at(item), Scaling):
            self._go(item, dead=item in self._spared)
        else:
            self._gauges.close(item)

    def _zeros(self, site: Node) -> bool:
        return bool((self._gauges.at(site).affine.scale == 0).any())  # type: ignore[attr-defined]

    def _is_norm(self, site: Node) -> bool:
        return site in self._norms

    def _go(self, site: Node, *, dead: bool = False) -> None:
        self._gauges.go(site, dead=dead)
        for way in self._excluded(site):
            held = self._gauges.operand(site) if way == "backward" else site
            pin(self._equations, self._gauges.of[held], "inexpressible")


def _parts(items: list[Node], last: int) -> list[list[Node]]:
    """In parts, the last one first, where the first up to ``last`` contradict one another: those before it, it alone,

    and of the rest ever more, so that what is tried in vain is no more than what is accepted.
    """
    found = [items[:last]] * (last > 0) + [items[last : last + 1]]
    at, size = last + 1, 2 * last + 2
    while at < len(items):
        found.append(items[at : at + size])
        at, size = at + size, 2 * size
    return found[::-1]
