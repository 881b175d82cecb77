"""Merging: parallel and sequential linear maps become one, wherever they stand in the graph.

After folding, a branch of RepVGG, MobileOne, ACNet or a diverse-branch block is a chain of convolutions, per-channel
affines and average pools from one input to one sum. The cost model counts, and takes a merge where each holds:

- multiply-adds do not grow: a sum goes into a convolution that is there and holds the branch's kernel (none is made
  wider for it), a pair becomes one where the product of their weights costs no more than both;
- weights do not grow;
- at least one operator goes, and with it the value that it wrote and the next one read: so fewer bytes are moved.

Convolutions that are concatenated, where counting saves only the copy, are joined because that was measured to be
faster; siblings that go different ways (q, k and v) are not, because a split in their place was not (docs/merge.md).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from bnfold.graph.graph import Graph, Node
from bnfold.passes.kernels import Kernel, added, composed
from bnfold.passes.linear import LinearMaps
from bnfold.report import Entry, Ledger, Merge
from bnfold.semantics import Contraction, Movement, Sum


@dataclass(frozen=True, eq=False)
class Term:
    """A value that a tree of sums adds up, times ``factor``, standing in ``slot`` of the sum ``parent``."""

    value: Node
    factor: float
    parent: Node
    slot: str


#: A merge, and the value to look at next: the one that took the merged ones' place.
Done = tuple[Merge, Node]


def merge(graph: Graph, ledger: Ledger) -> Ledger:
    """Merges whatever can be, editing ``graph``; deterministic, in the graph's order.

    Returns the ledger with the merges. Values that a merge changed are no fold sites any more: the merge's own is.
    """
    graph.refresh()
    merges = tuple(Merger(graph).run())
    now = {graph.name(value): graph.meaning(value) for value in graph.values()}

    def still(site: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
        return tuple(pair for pair in site if (meaning := now.get(pair[0])) is not None and meaning.value == pair[1])

    def entry_now(entry: Entry) -> Entry:
        into = next((done.into for done in merges if entry.value in done.values), None)
        if entry.outcome == "left" and into is not None:
            return replace(entry, outcome="merged", into=(into,), refusals=())
        return replace(entry, site=still(entry.site))

    return Ledger(
        tuple(entry_now(entry) for entry in ledger.entries),
        tuple(replace(done, site=still(done.site)) for done in merges),
    )


class Merger:
    """The state of one pass."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.linear = LinearMaps(graph)

    def run(self) -> Iterator[Merge]:
        """Serial pairs first, so that branches are as short as can be; then sums; then concatenations.

        A sum that became one operator may be half of a pair, and the other way round: so again, while anything merges.
        """
        more = True
        while more:
            more = False
            for attempt in (self._serial, self._parallel, self._joined):
                for start in list(self.graph.values()):
                    value = start
                    while self.graph.holds(value) and value.users:
                        done = attempt(value)
                        if done is None:
                            break
                        merged, value = done
                        more = True
                        yield merged

    # -- sums ------------------------------------------------------------------------------------------------------

    def _terms(self, root: Node) -> list[Term]:
        found: list[Term] = []
        stack = [(root, 1.0)]
        while stack:
            node, factor = stack.pop()
            semantics = self.linear.at(node)
            assert isinstance(semantics, Sum)
            for slot, own in zip(semantics.slots, (1.0, semantics.alpha)):
                value = self.graph.call(node).at(slot)
                term = Term(value, factor * own, node, slot)
                alone = value.op == "call_function" and self._is_read_once(value)
                same = self.graph.shape(value) == self.graph.shape(root)
                adds = alone and same and isinstance(self.linear.at(value), Sum)
                if adds and len(set(self.linear.operands(value))) == 2:
                    stack.append((value, factor * own))
                elif same and self.graph.dtype(value) == self.graph.dtype(root):
                    found.append(term)
        return sorted(found, key=lambda term: self.graph.order[term.value])

    def _parallel(self, root: Node) -> Done | None:
        """A branch of a sum goes into a convolution that is another one, with its kernel's place in that one's."""
        if not isinstance(self.linear.at(root), Sum) or self.graph.is_frozen(root):
            return None
        readers = list(self.graph.readers(root))
        if len(readers) == 1 and readers[0].op != "output" and isinstance(self.linear.at(readers[0]), Sum):
            return None  # part of a larger tree
        terms = self._terms(root)
        pairs = ((host, kernel, term) for host, kernel in self._hosts(terms) for term in terms if term is not host)
        return next((done for pair in pairs if (done := self._absorb(root, *pair)) is not None), None)

    def _hosts(self, terms: list[Term]) -> list[tuple[Term, Kernel]]:
        """The convolutions among the terms that nobody else reads, the largest first."""
        found = []
        for term in terms:
            kernel = self.linear.kernel(term.value)
            contracts = kernel is not None and isinstance(self.linear.at(term.value), Contraction)
            if kernel is not None and contracts and self._is_read_once(term.value) and term.factor:
                found.append((term, kernel[0]))
        return sorted(found, key=lambda host: -host[1].weight.numel())

    def _absorb(self, root: Node, host: Term, kernel: Kernel, term: Term) -> Done | None:
        graph = self.graph
        semantics = self.linear.at(term.parent)
        assert isinstance(semantics, Sum)
        # What stands beside the term takes the place of the sum of both.
        slot = next(slot for slot in semantics.slots if slot != term.slot)
        sibling, left = graph.call(term.parent).at(slot), semantics.alpha if slot == semantics.slots[1] else 1.0
        if sibling is term.value or (left != 1.0 and sibling is not host.value):
            return None  # what is left of the sum would need a factor
        source = self.linear.operand(host.value)
        if source is None or graph.dtype(term.value) != graph.dtype(host.value):
            return None
        path = self.linear.path(term.value, self.linear.through_same(source), kernel)
        if path is None:
            return None
        total = added(kernel, path.kernel, term.factor / host.factor).scaled(left)

        def edit() -> Node:
            self.linear.stands_for(host.value, None)
            self.linear.drop({term.parent: sibling})
            return sibling if term.parent is root else root

        members, gone = (host.value, *path.nodes), (*path.nodes, term.parent)
        return self._merged("parallel", root, members, gone, (host.value, total), edit, path.multiply_adds)

    # -- chains ----------------------------------------------------------------------------------------------------

    def _serial(self, second: Node) -> Done | None:
        """``second(first(x))``, one of them pointwise, where neither weights nor multiply-adds grow."""
        graph = self.graph
        operand = self.linear.operand(second)
        first = None if operand is None else self.linear.through_same(operand, alone=True)
        if first is None or first.op != "call_function" or not self._is_read_once(first):
            return None
        inner = self.linear.kernel(first)
        contracts = isinstance(self.linear.at(first), Contraction)
        if inner is None or not contracts or graph.dtype(first) != graph.dtype(second):
            return None
        pair = isinstance(self.linear.at(second), Contraction)
        outer = self.linear.kernel(second) if pair else self.linear.scaling(second, inner[0])
        if outer is None or len(outer[0].size) != len(inner[0].size):
            return None
        source, total = graph.call(first).at(inner[1]), composed(outer[0], inner[0])
        if total is None or graph.is_constant(source):
            return None
        hosts = [(second, outer[0]), (first, inner[0])] if pair else [(first, inner[0])]
        walk = (total.geometry, total.size, total.groups)
        keeper = next((node for node, k in hosts if (k.geometry, k.size, k.groups) == walk), None)
        if keeper is None:
            return None
        old = self.linear.cost(first, inner[0]) + self.linear.cost(second, outer[0])
        new = self.linear.cost(keeper, total)
        if new > old or total.weight.numel() > inner[0].weight.numel() + outer[0].weight.numel():
            return None

        def edit() -> Node:
            if keeper is second:
                graph.set_operand(second, outer[1], source)
            else:
                graph.take_shape(first, second)
                self.linear.drop({second: first})
            self.linear.forget(keeper)
            return keeper

        gone = (first if keeper is second else second,)
        return self._merged("serial", second, (first, second), gone, (keeper, total), edit, old - new)

    # -- concatenations --------------------------------------------------------------------------------------------

    def _joined(self, root: Node) -> Done | None:
        """Convolutions of one input and one geometry, joined along their channels, are one with stacked outputs."""
        graph, semantics = self.graph, self.linear.at(root)
        if not isinstance(semantics, Movement) or semantics.joins is None or len(semantics.slots) < 2:
            return None
        values = [graph.call(root).at(slot) for slot in semantics.slots]
        if any(not isinstance(v, Node) or graph.is_constant(v) for v in values) or len(set(values)) != len(values):
            return None
        found = [self.linear.kernel(value) for value in values]
        if any(f is None or not isinstance(self.linear.at(v), Contraction) for f, v in zip(found, values)):
            return None
        kernels = [f[0] for f in found if f is not None]
        sources = [graph.call(v).at(f[1]) for v, f in zip(values, found) if f is not None]
        shape, host = graph.shape(root), kernels[0]
        alike = all(
            k.geometry == host.geometry and k.size == host.size and k.groups == 1 and s is sources[0]
            for k, s in zip(kernels, sources)
        )
        if not alike or host.geometry.transposed or semantics.joins != len(shape) - 1 - len(host.size):
            return None
        if any(not self._is_read_once(v) or graph.dtype(v) != graph.dtype(root) for v in values):
            return None
        weight = torch.cat([k.weight for k in kernels], 1)
        total = Kernel(weight, torch.cat([k.bias for k in kernels]), host.geometry)
        keeper: Node = values[0]

        def edit() -> Node:
            graph.take_shape(keeper, root)
            self.linear.forget(keeper)
            self.linear.drop({root: keeper})
            return keeper

        return self._merged("joined", root, values, (*values[1:], root), (keeper, total), edit)

    # -- edits -----------------------------------------------------------------------------------------------------

    def _merged(
        self, kind: str, whole: Node, members: Sequence[Node], gone: Sequence[Node], host: tuple[Node, Kernel],
        edit: Callable[[], Node], multiply_adds: int = 0,
    ) -> Done | None:  # fmt: skip
        """Gives the host its new kernel, and edits what is left to do: ``edit`` takes those out that are gone and

        answers what stands for ``whole`` then. None, and nothing is done, where a constant does not fit its dtype.
        """
        graph, (value, kernel) = self.graph, host
        stored = self._stored(value, kernel)
        if any(graph.overflow(value, slot, tensor) is not None for slot, tensor in stored.items()):
            return None
        names = tuple(Counter(graph.module(node) or graph.call(node).operator for node in members))
        meaning, before, dropped = graph.meaning(whole), graph.dropped, tuple(map(graph.name, gone))
        for slot, tensor in stored.items():
            self.linear.set_constant(value, slot, tensor)
        final = edit()
        self.linear.stands_for(final, meaning)
        site = () if meaning is None else ((graph.name(final), meaning.value),)
        saved = graph.dropped - before, multiply_adds
        return Merge(graph.name(final), kind, names, graph.module(value), dropped, *saved, site), final

    def _is_read_once(self, value: Node) -> bool:
        return len(list(self.graph.readers(value))) == 1

    def _stored(self, value: Node, kernel: Kernel) -> dict[str, torch.Tensor]:
        semantics = self.linear.at(value)
        assert isinstance(semantics, Contraction)
        weight = kernel.weight.transpose(1, 2) if semantics.letters.startswith("gio") else kernel.weight
        groups, first, second = weight.shape[:3]
        shape = (first, second) if semantics.letters == "oi" else (groups * first, second, *weight.shape[3:])
        constants = {semantics.weight: weight.reshape(shape)}
        if semantics.get_bias() is not None or bool((kernel.bias != 0).any()):
            assert semantics.bias is not None
            constants[semantics.bias] = kernel.bias
        return constants
