"""Normalisations that are written as arithmetic: ``(x - mean) * (gamma * rsqrt(var + eps)) + beta`` becomes batch_norm.

Keras on torch writes its BatchNormalization so, and code that was ported from elsewhere. Folding then knows what it
carries and the user reads what went where; and one that stays is one pass over its values in place of three.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bnfold import aten
from bnfold.affine import Affine
from bnfold.graph.graph import Graph, Node
from bnfold.semantics import Same, Scaling

#: What a standard deviation comes out of a variance by.
_ROOTS = {"aten.rsqrt", "aten.sqrt", "aten.pow"}
_ATEN = torch.ops.aten


@dataclass(frozen=True)
class _Written:
    """A chain of arithmetic, ``first`` to ``value``, that is ``affine`` of ``data``; it subtracts ``mean``, (C,)."""

    first: Node
    value: Node
    data: Node
    affine: Affine
    mean: Tensor
    axis: int


def recognise(graph: Graph) -> None:
    """Writes normalisations by what they are, before anything that constants alone compute is a constant.

    Along axis 1 that is batch_norm, also where the channels were moved from there right before. Elsewhere ONNX has no
    operator for it, and a multiply and an add are what is left of three.
    """
    constants = (node for node in graph.graph.nodes if node.op == "call_function" and graph.is_constant(node))
    if not any(graph.call(node).operator in _ROOTS for node in constants):
        return
    done: set[Node] = set()
    for value in reversed(list(graph.values())):
        if value in done or not graph.holds(value):
            continue
        links = _links(graph, value)
        done |= set(links)
        found = _written(graph, links)
        if found is None:
            continue
        source = _source(graph, found.data)
        order = _permutation(graph, source) if len(source.users) == 1 else None
        if found.axis == 1:
            _normalise(graph, found, found.data)
        elif order is not None and order[found.axis] == 1:
            _permute_after(graph, value, order)
            _normalise(graph, found, source.all_input_nodes[0])
        else:
            _scale(graph, found)


def _links(graph: Graph, value: Node) -> list[Node]:
    """The multiplies, adds and the like by constants that end in ``value``, of which nobody reads a part."""
    links: list[Node] = []
    while value.op == "call_function" and graph.is_float(value) and not graph.is_frozen(value):
        if links and len(value.users) > 1:
            break
        found = aten.semantics(graph.call(value))
        if not isinstance(found, Scaling) or found.kind == "batch_norm" or found.stays is not None:
            break
        links.insert(0, value)
        value = graph.call(value).at(found.slot)
        if graph.is_constant(value):
            break
    return links


def _written(graph: Graph, links: list[Node]) -> _Written | None:
    """What the links are together: at least three, with a root in what they multiply by, along one axis."""
    if len(links) < 3 or not any(_has_root(graph, node) for link in links for node in link.all_input_nodes):
        return None
    first, *more = (s for link in links if isinstance(s := aten.semantics(graph.call(link)), Scaling))
    data = graph.call(links[0]).at(first.slot)
    total = first.affine
    for link in more:
        total = link.affine.after(total)
    axes = {axis for link in links for node in link.all_input_nodes for axis in _axes(graph, node, link)}
    if data.op != "call_function" or len(axes) != 1 or axes & set(graph.dynamic_axes(links[-1])) or not total.is_finite:
        return None  # an input is exact, and a mean far from zero is best taken from it first
    (axis,) = axes
    mean = torch.zeros(()) if first.affine.has_scale else -first.affine.shift
    size = graph.size(links[-1], axis)
    return _Written(links[0], links[-1], data, total, mean.flatten().expand(size).double(), axis)


def _has_root(graph: Graph, value: Node) -> bool:
    """Whether a constant is computed by way of a root."""
    seen, stack = set[Node](), [value] if graph.is_constant(value) else []
    while stack:
        node = stack.pop()
        if node.op == "call_function" and graph.call(node).operator in _ROOTS:
            return True
        stack += [each for each in node.all_input_nodes if each not in seen]
        seen |= set(stack)
    return False


def _permutation(graph: Graph, value: Node) -> list[int] | None:
    """For every axis of a value that has its operand's axes in another order that of the operand; else None."""
    call, order = graph.call(value), list(range(graph.rank(value)))
    if value.target is _ATEN.permute.default:
        return [order[axis] for axis in call["dims"]]
    if value.target is _ATEN.transpose.int:
        a, b = call["dim0"], call["dim1"]
        order[a], order[b] = order[b], order[a]
        return order
    return None


def _permute_after(graph: Graph, value: Node, order: list[int]) -> None:
    """Lets the readers of a value read it with its axes in another order, of the shape that it has now."""
    with graph.graph.inserting_after(value):
        moved = graph.graph.call_function(_ATEN.permute.default, (value, order))
    moved.meta = {k: v for k, v in value.meta.items() if k != "from_node"}
    graph.order[moved] = graph.order[value] + 0.5
    graph.stands_for |= {moved: graph.meaning(value), value: None}
    value.replace_all_uses_with(moved, delete_user_cb=lambda user: user is not moved)


def _axes(graph: Graph, constant: Node, of: Node) -> list[int]:
    """The axes of ``of`` along which a constant can vary, whether or not it does."""
    if not graph.is_constant(constant):
        return []
    shape = graph.shape(constant)
    return [axis for axis, size in enumerate(shape, graph.rank(of) - len(shape)) if size != 1]


def _source(graph: Graph, value: Node) -> Node:
    """``value`` before casts to the dtype that it has, of which nobody else reads anything."""
    while isinstance(aten.semantics(graph.call(value)), Same) and len(value.users) == 1:
        before = value.all_input_nodes[0]
        if before.op != "call_function" or graph.dtype(before) != graph.dtype(value):
            break
        value = before
    return value


def _normalise(graph: Graph, found: _Written, data: Node) -> None:
    """``value`` is the BatchNorm of ``data``; what the variance has to say is in the weight."""
    size = len(found.mean)
    scale, shift = (part.flatten().expand(size) for part in (found.affine.scale, found.affine.shift))
    one = torch.ones(size, dtype=torch.float64)
    parts = {"weight": scale, "bias": shift + scale * found.mean, "running_mean": found.mean, "running_var": one}
    graph.become(found.value, _ATEN.batch_norm.default, data, *_constants(graph, found, parts), False, 0.0, 0.0, False)
    graph.take_shape(found.value, data)


def _constants(graph: Graph, found: _Written, parts: Mapping[str, Tensor]) -> list[Node]:
    module, dtype = graph.module(found.value), graph.dtype(found.value)
    return [graph.new_constant(part, dtype, f"{module}.{name}" if module else name) for name, part in parts.items()]


def _scale(graph: Graph, found: _Written) -> None:
    """``value`` is ``data`` times a constant plus a constant."""
    scale, shift = _constants(graph, found, {"weight": found.affine.scale, "bias": found.affine.shift})
    graph.become(found.first, _ATEN.mul.Tensor, found.data, scale)
    graph.stands_for[found.first] = None
    graph.become(found.value, _ATEN.add.Tensor, found.first, shift)
