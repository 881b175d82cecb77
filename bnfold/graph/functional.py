"""Making a captured graph free of in-place operators, where that can be shown to be safe.

torch.export's training IR keeps ``relu_``, ``add_`` and the like. Bypassing a node in front of one can corrupt a value
that someone else reads, so they must be gone before any rewrite. Swapping ``op_`` for ``op`` and redirecting the later
readers of the written tensor is right when no *other* value that shares its storage is read afterwards. What it is a
slice of may be, as in ``y[:, :2] = z``: from there on y is z and the rest of y, concatenated. Where any other is, the
operator stays and everything that shares the storage is marked as frozen: no fold touches it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from bnfold.errors import CaptureError
from bnfold.graph.dimensions import number
from bnfold.semantics.call import bound

FROZEN = "bnfold_frozen"

_DROPOUTS = {"dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"}
#: Operators that may return their operand, or views of it, although their schema does not say so: torch's own sample
#: inputs show it of the 624 operators that they reach.
_SILENT_ALIASES = {
    *_DROPOUTS, "einsum", "pad", "conj_physical", "broadcast_tensors", "meshgrid", "cartesian_prod", "chain_matmul",
    "atleast_1d", "atleast_2d", "atleast_3d", "unsafe_chunk", "unsafe_split", "unsafe_split_with_sizes", "histogramdd",
    "_unsafe_view",
}  # fmt: skip
#: Where a slice ends that has no end.
_END = 2**63 - 1


def make_functional(graph: fx.Graph, *, inputs: set[str], constants: dict[str, str]) -> int:
    """Removes eval-mode dropout, slices that take everything and in-place operators from ``graph``, itself.

    ``inputs`` are names of the placeholders that are the caller's inputs; ``constants`` has for every other one the
    name of its parameter or buffer. Answers how many in-place operators are left.

    Raises:
        CaptureError: the model writes to one of its inputs or buffers.
    """
    _erase_identities(graph)
    _settle_epsilons(graph)
    order = {node: i for i, node in enumerate(graph.nodes)}
    classes = _Aliases()
    left = 0
    for node in list(graph.nodes):
        written = _written(node)
        for target in written:
            members = classes.members(target)
            _refuse_foreign(node, members, inputs, constants)
            later = {m for m in members if any(order[u] > order[node] for u in m.users)}
            sources = list(_sources(target, later))
            safe = later <= {target, *sources} and not any(m.meta.get(FROZEN) for m in members)
            functional = _functional(node) if safe else None
            if functional and sources and _split(node, functional, [target, *sources], order):
                continue
            if functional is None or sources:
                left += 1
                classes.join(node, target)
                for member in classes.members(target):
                    member.meta[FROZEN] = True
                continue
            node.target = functional
            target.replace_all_uses_with(node, delete_user_cb=partial(_reads_after, order, order[node]))
        if not written:
            for operand in _aliased(node):
                classes.join(node, operand)
                if operand.meta.get(FROZEN):
                    node.meta[FROZEN] = True
    return left


def _reads_after(order: dict[fx.Node, int], position: int, user: fx.Node) -> bool:
    return order[user] > position


class _Aliases:
    """Union-find over the values that share storage."""

    def __init__(self) -> None:
        self._class: dict[fx.Node, set[fx.Node]] = {}

    def members(self, node: fx.Node) -> set[fx.Node]:
        return self._class.setdefault(node, {node})

    def join(self, a: fx.Node, b: fx.Node) -> None:
        one, other = self.members(a), self.members(b)
        if one is not other:
            small, large = sorted((one, other), key=len)
            large |= small
            for node in small:
                self._class[node] = large


def _erase_identities(graph: fx.Graph) -> None:
    """Erases what returns its very operand: eval-mode dropout, and the ``[:]`` of every axis before a sliced one.

    Left in, ``y[:, :2]`` and ``y[:, 2:]`` would each read all of y first, and no longer be disjoint. And ``type_as``
    becomes the cast that it is, or nothing: of a parameter it is a constant, whatever it takes the dtype from.
    """
    for node in list(graph.nodes):
        if not isinstance(node.target, OpOverload):
            continue
        given = arguments(node)
        if node.target._opname in _DROPOUTS:
            identity, operand = given["train"] is False, given["input"]
        elif node.target is torch.ops.aten.slice.Tensor:
            start, end, step = (given[name] for name in ("start", "end", "step"))
            identity, operand = start in (None, 0) and end in (None, _END) and step in (None, 1), given["self"]
        elif node.target is torch.ops.aten.type_as.default:
            operand, dtype = given["self"], node.meta["val"].dtype
            identity = operand.meta["val"].dtype == dtype
            node.target, node.args = torch.ops.aten.to.dtype, (operand, dtype)
        else:
            continue
        if identity:
            node.replace_all_uses_with(operand)
            graph.erase_node(node)


def _settle_epsilons(graph: fx.Graph) -> None:
    """Writes down the epsilon of an RMSNorm that has none: of the dtype it is computed in, float32 for half floats.

    A run in float64 would take another one.
    """
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.rms_norm.default):
        given = arguments(node)
        if given["eps"] is None:
            computed = torch.float64 if node.meta["val"].dtype == torch.float64 else torch.float32
            node.args = (*[given[name] for name in ("input", "normalized_shape", "weight")], torch.finfo(computed).eps)
            node.kwargs = {}


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an operator by their names in its schema, defaults included."""
    assert isinstance(node.target, OpOverload)
    return bound(node.target, node.args, node.kwargs)


def _operands(node: fx.Node) -> Iterator[tuple[Any, fx.Node]]:
    """Every operand with what the schema says of whose storage it shares."""
    if isinstance(node.target, OpOverload):
        for argument, value in zip(node.target._schema.arguments, arguments(node).values()):
            yield from ((argument.alias_info, operand) for operand in _nodes_in(value))


def _nodes_in(value: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg(value, lambda n: found.append(n))
    return found


def _written(node: fx.Node) -> list[fx.Node]:
    return [operand for alias, operand in _operands(node) if alias is not None and alias.is_write]


def _aliased(node: fx.Node) -> Iterator[fx.Node]:
    if node.op == "call_function" and not isinstance(node.target, OpOverload):
        yield from node.all_input_nodes  # getitem, or a higher-order operator: assume the most
        return
    name = node.target._opname if isinstance(node.target, OpOverload) else ""
    silent = name in _SILENT_ALIASES
    if name == "pad" and any(isinstance(n, fx.Node) or n for n in node.args[1]):  # type: ignore
        return  # only a padding of nothing returns its operand
    if name == "einsum" and len(_nodes_in(node.args[1])) > 1:
        return  # a product is new; of one operand alone it is a view
    yield from (operand for alias, operand in _operands(node) if silent or alias is not None)


def _functional(node: fx.Node) -> OpOverload | None:
    """The functional twin of an in-place operator, where it gives the same shape and dtype."""
    assert isinstance(node.target, OpOverload)
    name = node.target._opname
    packet = getattr(torch.ops.aten, name.rstrip("_"), None)
    if not name.endswith("_") or packet is None or node.target._overloadname not in packet.overloads():
        return None
    twin: OpOverload = getattr(packet, node.target._overloadname)
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or [a.name for a in twin._schema.arguments] != [
        a.name for a in node.target._schema.arguments
    ]:
        return None
    try:
        with value.fake_mode:  # type: ignore[attr-defined]
            result = twin(
                *fx.node.map_arg(node.args, lambda n: n.meta["val"]),
                **fx.node.map_arg(node.kwargs, lambda n: n.meta["val"]),
            )
    except Exception:  # whatever a meta kernel may raise: then it is not shown to be safe
        return None
    # ``y += x`` keeps y's dtype where ``y + x`` would promote.
    same = isinstance(result, Tensor) and result.dtype == value.dtype and result.shape == value.shape
    return twin if same else None


def _sources(view: fx.Node, later: set[fx.Node]) -> Iterator[fx.Node]:
    """What ``view`` is a slice of, and what that is one of, up to the last that is read later."""
    pending: list[fx.Node] = []
    while _cut(view) is not None:
        pending.append(view := view.all_input_nodes[0])
        if view in later:
            yield from pending
            pending = []


def _cut(view: fx.Node) -> tuple[int, Any, Any] | None:
    """Axis, start and end of a slice that what is before and behind it fills up at every size; None for another."""
    given = arguments(view) if isinstance(view.target, OpOverload) else {}
    if view.target is torch.ops.aten.select.int and isinstance(index := given["index"], int):
        return given["dim"], index, index + 1 or _END
    if view.target is not torch.ops.aten.slice.Tensor or given.get("step") not in (None, 1):
        return None
    start, end = (given.get(name) for name in ("start", "end"))
    start, end = 0 if start is None else start, _END if end is None else end
    ordered = isinstance(start, int) and isinstance(end, int) and (start < 0) == (end < 0) and start <= end
    return (given.get("dim", 0), start, end) if start == 0 or end == _END or ordered else None


def _split(node: fx.Node, functional: OpOverload, written: list[fx.Node], order: dict[fx.Node, int]) -> bool:
    """Lets later readers of what ``node`` writes a slice of read that and the rest, concatenated.

    Args:
        node: the operator that writes, whose functional twin makes the slice.
        functional: that twin.
        written: the slice, what it is one of, and so on.
        order: the positions in the graph; it gets those of new nodes.

    Returns:
        whether it did; not where the last would have other sizes or strides, and then nothing has changed.
    """
    if functional._schema.returns[0].alias_info is not None:
        return False  # it moves a view, and writes nothing
    aten, graph, made = torch.ops.aten, node.graph, []

    def call(target: OpOverload, *args: Any, **kwargs: Any) -> fx.Node:
        made.append(new := graph.call_function(target, args, kwargs))
        new.meta = {key: value for key, value in node.meta.items() if key != "from_node"}
        with node.meta["val"].fake_mode:
            args, kwargs = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
            new.meta["val"] = target(*args, **kwargs)
        order[new] = order[node]
        return new

    try:
        with graph.inserting_before(node):
            if node.target is aten.copy_.default:  # its twin would be one more operator to know
                value = call(aten.to.dtype, node.args[1], node.meta["val"].dtype)
                value = call(aten.clone.default, call(aten.expand_as.default, value, node.args[0]))
            else:
                value = call(functional, *node.args, **node.kwargs)
            wholes = [value]
            for view, source in pairwise(written):
                axis, start, end = _cut(view) or (0, 0, _END)
                part = call(aten.unsqueeze.default, wholes[-1], axis) if view.target is aten.select.int else wholes[-1]
                around = [call(aten.slice.Tensor, source, axis, *ends) for ends in ((0, start), (end, _END))]
                parts = [each for each in (around[0], part, around[1]) if number(each.meta["val"].shape[axis]) != 0]
                wholes.append(call(aten.cat.default, parts, axis))
        same = _layout(wholes[-1]) == _layout(written[-1])
    except Exception:  # whatever a meta kernel may raise: then it is not shown to be safe
        same = False
    if same:
        for new, old in zip(wholes, written, strict=True):
            old.replace_all_uses_with(new, delete_user_cb=partial(_reads_after, order, order[node]))
        node.replace_all_uses_with(value)
        graph.erase_node(node)
    for new in reversed(made):
        if not new.users:
            graph.erase_node(new)
    return same


def _layout(node: fx.Node) -> tuple[str, str]:
    value = node.meta["val"]
    return str(value.shape), str(value.stride())


def _refuse_foreign(node: fx.Node, members: set[fx.Node], inputs: set[str], constants: dict[str, str]) -> None:
    places = defaultdict(list)
    for member in members:
        if member.op == "placeholder":
            places["input" if member.name in inputs else "buffer"].append(
                member.name if member.name in inputs else constants.get(member.name, member.name)
            )
        elif member.op == "get_attr":
            places["buffer"].append(str(member.target))
    for kind, names in places.items():
        way_out = "clone the input first" if kind == "input" else "keep state out of forward in eval mode"
        raise CaptureError(
            f"the model writes to its {kind} '{names[0]}' in eval mode ({node.target})",
            where=module_of(node) or None,
            hint=f"An exported model has no side effects: {way_out}.",
        )


def module_of(node: fx.Node) -> str:
    """The qualified name of the module whose forward made the node, ``""`` for the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(stack.values()))[0] if stack else ""
    path = str(path).removeprefix("L['self'].").removeprefix("L['self']").split("@")[0]
    return path.removeprefix("_export_root").removeprefix(".")  # in the graph of a region
