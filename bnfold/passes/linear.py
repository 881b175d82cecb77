"""Linear maps found in a graph: an operator as a kernel, and what a chain or a tree of them makes of its source.

This is the half of merging that reads; ``merge`` decides and edits.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch

from bnfold.graph.graph import Node
from bnfold.passes.kernels import Kernel, added, average, composed, depthwise, embedded, may_fit
from bnfold.passes.rewriter import Rewriter
from bnfold.semantics import Average, Contraction, Opaque, Same, Scaling, Semantics, Sum

#: A branch of more operators than this is not looked through.
LONGEST = 16


@dataclass(frozen=True, eq=False)
class Path:
    """What lies between two values: one linear map, made by ``nodes``, the last one first."""

    kernel: Kernel
    nodes: tuple[Node, ...]
    multiply_adds: int


class LinearMaps(Rewriter):
    """The operators of one graph as kernels."""

    def at(self, value: Node) -> Semantics:
        """What the operator that makes a value does; one whose size depends on data is no kernel."""
        return super().at(value) if self.graph.is_sized(value) else Opaque()

    def kernel(self, value: Node) -> tuple[Kernel, str] | None:
        """The linear map of one operator, and the slot of its data; None where that is written to later."""
        if value.op != "call_function" or self.graph.is_frozen(value) or not self.graph.is_float(value):
            return None
        semantics = self.at(value)
        shape = self.graph.shape(value)
        if isinstance(semantics, Contraction | Average) and self.graph.is_frozen(self._data(value, semantics)):
            return None
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

    def scaling(self, value: Node, like: Kernel) -> tuple[Kernel, str] | None:
        """A per-channel affine as a kernel on the channels of ``like``."""
        semantics = self.at(value) if value.op == "call_function" else None
        if not isinstance(semantics, Scaling) or self.graph.is_frozen(value):
            return None
        spatial, shape = len(like.size), self.graph.shape(value)
        axis = len(shape) - 1 - spatial
        if axis < 0 or set(semantics.affine.varies()) - {axis}:
            return None
        channels = shape[axis]
        scale, shift = (t.flatten().expand(channels) for t in (semantics.affine.scale, semantics.affine.shift))
        return depthwise(scale, shift, spatial), semantics.slot

    def operand(self, value: Node) -> Node | None:
        """What a linear operator with one operand that is no constant reads."""
        if value.op != "call_function" or self.graph.is_frozen(value) or not self.graph.is_float(value):
            return None
        semantics = self.at(value)
        if not isinstance(semantics, Contraction | Average | Scaling | Same):
            return None
        operand = self._data(value, semantics)
        return operand if isinstance(operand, Node) and not self.graph.is_constant(operand) else None

    def _data(self, value: Node, semantics: Contraction | Average | Scaling | Same) -> Node:
        slot = semantics.data if isinstance(semantics, Contraction) else semantics.slot
        operand: Node = self.graph.call(value).at(slot)
        return operand

    def operands(self, value: Node) -> list[Node]:
        """What a linear operator reads: two values of its shape if it is a sum, else one; none if it is not linear."""
        semantics = self.at(value) if value.op == "call_function" else None
        if not isinstance(semantics, Sum):
            operand = self.operand(value)
            return [] if operand is None else [operand]
        pair = [self.graph.call(value).at(slot) for slot in semantics.slots]
        equal = all(self.graph.shape(each) == self.graph.shape(value) for each in pair)
        return pair if equal and not self.graph.is_frozen(value) else []

    def _nodes(self, value: Node, source: Node) -> list[Node] | None:
        """The linear operators that make ``value`` of ``source``, the last one first, read by nobody else."""
        nodes: dict[Node, None] = {}
        waiting = [value]
        while waiting:
            node = waiting.pop()
            if self.through_same(node) is source or node in nodes:
                continue
            operands, alike = self.operands(node), self.graph.dtype(node) == self.graph.dtype(value)
            if not operands or not alike or len(list(self.graph.readers(node))) != 1 or len(nodes) == LONGEST:
                return None
            nodes[node] = None
            waiting += operands
        return sorted(nodes, key=lambda node: -self.graph.order[node])

    def path(self, value: Node, source: Node, host: Kernel) -> Path | None:
        """The linear map that makes ``value`` of ``source``, in the host's geometry."""
        nodes = self._nodes(value, source)
        channel = len(self.graph.shape(value)) - 1 - len(host.size)
        if nodes is None or channel < 0:
            return None
        own = {node: self._own(node, host) for node in nodes if not isinstance(self.at(node), Same | Sum)}
        one = torch.ones(self.graph.shape(source)[channel], dtype=torch.float64)
        identity = depthwise(one, one * 0, len(host.size))
        made: dict[Node, Kernel] = {}
        for node in reversed(nodes):
            before = [made.get(operand, identity) for operand in self.operands(node)]
            kernel = self._step(node, own, before, host)
            if kernel is None:
                return None
            made[node] = kernel
        total = embedded(made.get(value, identity), host)
        spent = sum(self.cost(node, kernel) for node, kernel in own.items() if kernel is not None)
        return None if total is None else Path(total, tuple(nodes), spent)

    def _own(self, node: Node, host: Kernel) -> Kernel | None:
        """An operator as a kernel that may have a place in the host's."""
        found = self.kernel(node) or self.scaling(node, host)
        if found is None or len(found[0].size) != len(host.size):
            return None
        # What neighbours of one tap make of it is no smaller: where it has no place, nothing has.
        return found[0] if prod(found[0].size) == 1 or may_fit(found[0], host) else None

    def _step(self, node: Node, own: dict[Node, Kernel | None], before: list[Kernel], host: Kernel) -> Kernel | None:
        """What an operator makes of the source, ``before`` being what its operands are of it."""
        semantics = self.at(node)
        if isinstance(semantics, Sum):
            first, second = (embedded(part, host) for part in before)
            return None if first is None or second is None else added(first, second, semantics.alpha)
        if node not in own:
            return before[0]  # a copy
        kernel = own[node]
        return None if kernel is None else composed(kernel, before[0])

    def cost(self, node: Node, kernel: Kernel) -> int:
        """Multiply-adds of one sample or position; the batch is common to all that are compared."""
        spatial = len(kernel.size)
        shape = self.graph.example_shape(node)
        positions = prod(shape[len(shape) - spatial :]) if spatial else 1
        semantics = self.at(node)
        if kernel.geometry.transposed and isinstance(semantics, Contraction):
            source = self.graph.example_shape(self.graph.call(node).at(semantics.data))
            positions = prod(source[len(source) - spatial :])
        return positions * kernel.weight.numel() if isinstance(semantics, Contraction) else 0

    def through_same(self, value: Node, *, alone: bool = False) -> Node:
        """What a value is a copy of; with ``alone``, only as far as nobody else reads the copies."""
        while value.op == "call_function" and isinstance(self.at(value), Same):
            operand = self.graph.call(value).at(self.at(value).slot)  # type: ignore[attr-defined]
            if self.graph.is_frozen(operand) or (alone and len(list(self.graph.readers(value))) != 1):
                break
            value = operand
        return value
