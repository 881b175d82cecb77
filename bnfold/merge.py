"""Merging: parallel and sequential linear maps become one, wherever they stand in the graph.

After folding, a branch of RepVGG, MobileOne, ACNet or a diverse-branch block is a chain of convolutions, per-channel
affines and average pools from one input to one sum. A merge is taken where a host convolution of the sum can hold the
branch's kernel, multiply-adds do not grow and an operator goes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

import torch

from bnfold import aten
from bnfold.graph import Graph, Node
from bnfold.kernels import Kernel, average, composed, depthwise, embedded
from bnfold.report import Entry, Ledger, Merge
from bnfold.semantics import Average, Contraction, Movement, Same, Scaling, Semantics, Sum

#: A branch longer than this is not looked through.
DEPTH = 6


@dataclass(frozen=True, eq=False)
class Path:
    """What lies between ``start`` and a value: one linear map, made by ``nodes``, the last one first."""

    start: Node
    kernel: Kernel
    nodes: tuple[Node, ...]
    multiply_adds: int


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
        return tuple((folded, captured) for folded, captured in site if now.get(folded) == captured)

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
        self._semantics: dict[Node, Semantics] = {}

    def run(self) -> Iterator[Merge]:
        """Serial pairs first, so that branches are as short as can be; then sums; then concatenations."""
        for attempt in (self._serial, self._parallel, self._joined, self._serial):
            for start in list(self.graph.values()):
                value = start
                while self.graph.holds(value) and value.users:
                    done = attempt(value)
                    if done is None:
                        break
                    merged, value = done
                    yield merged

    # -- linear maps -----------------------------------------------------------------------------------------------

    def _at(self, value: Node) -> Semantics:
        if value not in self._semantics:
            self._semantics[value] = aten.semantics(self.graph.call(value))
        return self._semantics[value]

    def _forget(self, *values: Node) -> None:
        for value in values:
            self._semantics.pop(value, None)

    def _kernel(self, value: Node) -> tuple[Kernel, str] | None:
        """The linear map of one operator, and the slot of its data."""
        if value.op != "call_function" or self.graph.is_frozen(value) or not self.graph.is_float(value):
            return None
        semantics = self._at(value)
        shape = self.graph.shape(value)
        if isinstance(semantics, Contraction) and semantics.geometry is not None:
            weight = semantics.get_weight()
            if semantics.letters.startswith("gio"):
                weight = weight.transpose(1, 2)
            elif semantics.letters == "oi":
                weight = weight[None]
            bias = semantics.get_bias()
            flat = torch.zeros(weight.shape[0] * weight.shape[1]) if bias is None else bias.flatten()
            return Kernel(weight, flat.double(), semantics.geometry), semantics.data
        if isinstance(semantics, Average) and semantics.geometry is not None and semantics.axes:
            channel = semantics.axes[0] - 1
            return average(shape[channel], semantics.window, semantics.geometry), semantics.slot
        return None

    def _scaling(self, value: Node, like: Kernel) -> tuple[Kernel, str] | None:
        """A per-channel affine as a kernel on the channels of ``like``."""
        semantics = self._at(value) if value.op == "call_function" else None
        if not isinstance(semantics, Scaling) or self.graph.is_frozen(value):
            return None
        spatial, shape = len(like.size), self.graph.shape(value)
        axis = len(shape) - 1 - spatial
        if axis < 0 or set(semantics.affine.varies()) - {axis}:
            return None
        channels = shape[axis]
        scale, shift = (t.flatten().expand(channels) for t in (semantics.affine.scale, semantics.affine.shift))
        return depthwise(scale, shift, spatial), semantics.slot

    def _paths(self, value: Node, host: Kernel) -> Iterator[Path]:
        """The linear maps that make ``value``, from ever further back; the shortest is the identity."""
        spatial, shape = len(host.size), self.graph.shape(value)
        axis = len(shape) - 1 - spatial
        if axis < 0:
            return
        one = torch.ones(shape[axis], dtype=torch.float64)
        path = Path(value, depthwise(one, one * 0, spatial), (), 0)
        yield path
        for _ in range(DEPTH):
            node = path.start
            if node.op != "call_function" or (path.nodes and len(list(self.graph.readers(node))) != 1):
                return
            semantics = self._at(node)
            if isinstance(semantics, Same) and self.graph.dtype(node) == self.graph.dtype(value):
                source = self.graph.call(node).at(semantics.slot)
                path = Path(source, path.kernel, (*path.nodes, node), path.multiply_adds)
                yield path
                continue
            found = self._kernel(node) or self._scaling(node, host)
            if found is None or self.graph.dtype(node) != self.graph.dtype(value):
                return
            first, slot = found
            if len(first.size) != spatial:
                return
            kernel = composed(path.kernel, first)
            if kernel is None:
                return
            source = self.graph.call(node).at(slot)
            if not isinstance(source, Node) or self.graph.is_constant(source):
                return
            path = Path(source, kernel, (*path.nodes, node), path.multiply_adds + self._cost(node, first))
            yield path

    def _cost(self, node: Node, kernel: Kernel) -> int:
        """Multiply-adds of one sample or position; the batch is common to all that are compared."""
        spatial = len(kernel.size)
        shape = self.graph.shape(node)
        positions = prod(shape[len(shape) - spatial :]) if spatial else 1
        if kernel.geometry.transposed:
            source = self.graph.shape(self.graph.call(node).at("input"))
            positions = prod(source[len(source) - spatial :])
        return positions * kernel.multiply_adds if isinstance(self._at(node), Contraction) else 0

    # -- sums ------------------------------------------------------------------------------------------------------

    def _terms(self, root: Node) -> list[Term]:
        found: list[Term] = []
        stack = [(root, 1.0)]
        while stack:
            node, factor = stack.pop()
            semantics = self._at(node)
            assert isinstance(semantics, Sum)
            for slot, own in zip(semantics.slots, (1.0, semantics.alpha)):
                value = self.graph.call(node).at(slot)
                term = Term(value, factor * own, node, slot)
                alone = value.op == "call_function" and len(list(self.graph.readers(value))) == 1
                same = self.graph.shape(value) == self.graph.shape(root)
                if alone and same and isinstance(self._at(value), Sum) and not self.graph.is_frozen(value):
                    stack.append((value, factor * own))
                elif same and self.graph.dtype(value) == self.graph.dtype(root):
                    found.append(term)
        return sorted(found, key=lambda term: self.graph.order[term.value])

    def _parallel(self, root: Node) -> Done | None:
        if not isinstance(self._at(root), Sum) or self.graph.is_frozen(root):
            return None
        readers = list(self.graph.readers(root))
        if len(readers) == 1 and readers[0].op != "output" and isinstance(self._at(readers[0]), Sum):
            return None  # part of a larger tree
        terms = self._terms(root)
        hosts = []
        for term in terms:
            found = self._kernel(term.value)
            alone = len(list(self.graph.readers(term.value))) == 1
            if found and alone and isinstance(self._at(term.value), Contraction) and term.factor:
                hosts.append((term, *found))
        hosts.sort(key=lambda host: -host[1].weight.numel())
        for host, kernel, slot in hosts:
            source = self.graph.call(host.value).at(slot)
            for term in terms:
                if term is not host:
                    done = self._absorb(root, host, kernel, source, term)
                    if done is not None:
                        return done
        return None

    def _absorb(self, root: Node, host: Term, kernel: Kernel, source: Node, term: Term) -> Done | None:
        graph = self.graph
        semantics = self._at(term.parent)
        assert isinstance(semantics, Sum)
        other = next(slot for slot in semantics.slots if slot != term.slot)
        if other == semantics.slots[1] and semantics.alpha != 1.0:
            return None  # what is left of the sum would need a factor
        if graph.call(term.parent).at(other) is term.value:
            return None
        for path in self._paths(term.value, kernel):
            if path.start is not self._through_same(source):
                continue
            if path.nodes and len(list(graph.readers(term.value))) != 1:
                return None
            part = embedded(path.kernel, kernel)
            if part is None or any(graph.dtype(n) != graph.dtype(host.value) for n in path.nodes):
                continue
            factor = term.factor / host.factor
            total = Kernel(kernel.weight + factor * part.weight, kernel.bias + factor * part.bias, kernel.geometry)
            if not self._fits(host.value, total):
                continue
            meaning, names = graph.meaning(root), self._names(host.value, *path.nodes)
            gone = tuple(graph.name(node) for node in (*path.nodes, term.parent))
            before = graph.count_operators()
            self._write(host.value, total)
            graph.stands_for[host.value] = None
            sibling = graph.call(term.parent).at(other)
            self._drop(term.parent, sibling)
            final = sibling if term.parent is root else root
            graph.stands_for[final] = meaning
            saved = (before - graph.count_operators(), path.multiply_adds)
            return self._done(final, "parallel", names, host.value, gone, saved)
        return None

    def _through_same(self, value: Node) -> Node:
        while value.op == "call_function" and isinstance(self._at(value), Same):
            value = self.graph.call(value).at(self._at(value).slot)  # type: ignore[attr-defined]
        return value

    # -- chains ----------------------------------------------------------------------------------------------------

    def _serial(self, second: Node) -> Done | None:
        """``second(first(x))``, one of them pointwise, where neither weights nor multiply-adds grow."""
        graph = self.graph
        outer_at = self._at(second)
        if not isinstance(outer_at, Contraction) or outer_at.geometry is None:
            return None
        first = graph.call(second).at(outer_at.data)
        if first.op != "call_function" or len(list(graph.readers(first))) != 1:
            return None
        inner_at = self._at(first)
        if (
            not isinstance(inner_at, Contraction)
            or inner_at.geometry is None
            or graph.dtype(first) != graph.dtype(second)
        ):
            return None
        if len(inner_at.geometry.stride) != len(outer_at.geometry.stride):
            return None
        inner, outer = self._kernel(first), self._kernel(second)
        if inner is None or outer is None:
            return None
        source, total = graph.call(first).at(inner[1]), composed(outer[0], inner[0])
        if total is None or graph.is_constant(source):
            return None
        # The one that is not pointwise stays: it has the geometry that the result needs.
        keeper, kept = (second, outer[0]) if inner[0].is_pointwise else (first, inner[0])
        old = self._cost(first, inner[0]) + self._cost(second, outer[0])
        new = self._cost(keeper, total)
        grows = new > old or total.weight.numel() > inner[0].weight.numel() + outer[0].weight.numel()
        if grows or total.groups != kept.groups or not self._fits(keeper, total):
            return None
        names, before, meaning = self._names(first, second), graph.count_operators(), graph.meaning(second)
        gone = graph.name(first if keeper is second else second)
        self._write(keeper, total)
        if keeper is second:
            graph.set_operand(second, outer[1], source)
        else:
            graph.take_shape(first, second)
            self._drop(second, first)
        graph.stands_for[keeper] = meaning
        self._forget(keeper)
        return self._done(keeper, "serial", names, keeper, (gone,), (before - graph.count_operators(), old - new))

    # -- concatenations --------------------------------------------------------------------------------------------

    def _joined(self, root: Node) -> Done | None:
        """Convolutions of one input and one geometry, joined along their channels, are one with stacked outputs."""
        graph, semantics = self.graph, self._at(root)
        if not isinstance(semantics, Movement) or semantics.joins is None or len(semantics.slots) < 2:
            return None
        values = [graph.call(root).at(slot) for slot in semantics.slots]
        if any(not isinstance(v, Node) or graph.is_constant(v) for v in values) or len(set(values)) != len(values):
            return None
        found = [self._kernel(value) for value in values]
        if any(f is None or not isinstance(self._at(v), Contraction) for f, v in zip(found, values)):
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
        if any(len(list(graph.readers(v))) != 1 or graph.dtype(v) != graph.dtype(root) for v in values):
            return None
        weight = torch.cat([k.weight for k in kernels], 1)
        total = Kernel(weight, torch.cat([k.bias for k in kernels]), host.geometry)
        if not self._fits(values[0], total):
            return None
        names, before, meaning = self._names(*values), graph.count_operators(), graph.meaning(root)
        keeper, gone = values[0], tuple(graph.name(value) for value in (*values[1:], root))
        graph.take_shape(keeper, root)
        self._write(keeper, total)
        self._drop(root, keeper)
        graph.stands_for[keeper] = meaning
        return self._done(keeper, "joined", names, keeper, gone, (before - graph.count_operators(), 0))

    def _done(
        self, value: Node, kind: str, names: tuple[str, ...], into: Node, gone: tuple[str, ...], saved: tuple[int, int]
    ) -> Done:
        meaning = self.graph.meaning(value)
        site = () if meaning is None else ((self.graph.name(value), meaning),)
        return Merge(self.graph.name(value), kind, names, self.graph.module(into), gone, *saved, site), value

    # -- edits -----------------------------------------------------------------------------------------------------

    def _stored(self, value: Node, kernel: Kernel) -> dict[str, torch.Tensor]:
        semantics = self._at(value)
        assert isinstance(semantics, Contraction)
        weight = kernel.weight.transpose(1, 2) if semantics.letters.startswith("gio") else kernel.weight
        groups, first, second = weight.shape[:3]
        shape = (first, second) if semantics.letters == "oi" else (groups * first, second, *weight.shape[3:])
        constants = {semantics.weight: weight.reshape(shape)}
        if semantics.get_bias() is not None or bool((kernel.bias != 0).any()):
            constants["bias"] = kernel.bias
        return constants

    def _fits(self, value: Node, kernel: Kernel) -> bool:
        """Whether the kernel's constants fit the dtype they are rounded to."""
        stored = self._stored(value, kernel)
        return all(self.graph.overflow(value, slot, tensor) is None for slot, tensor in stored.items())

    def _write(self, value: Node, kernel: Kernel) -> None:
        for slot, tensor in self._stored(value, kernel).items():
            self.graph.set_constant(value, slot, tensor)
        self._forget(value)

    def _drop(self, value: Node, by: Node) -> None:
        readers = list(self.graph.readers(value))
        self.graph.bypass(value, by)
        self._forget(value, *readers)

    def _names(self, *values: Node) -> tuple[str, ...]:
        names = Counter(self.graph.module(v) or self.graph.call(v).operator for v in values)
        return tuple(names)
