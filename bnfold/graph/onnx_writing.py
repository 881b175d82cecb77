"""The way from an ONNX file under edit back into the file: only what was changed is written."""

from __future__ import annotations

from functools import partial
from itertools import chain
from operator import getitem
from typing import TYPE_CHECKING

import onnx
import torch
from torch import Tensor, fx

from bnfold.graph.names import free_name
from bnfold.graph.onnx_call import Operator
from bnfold.graph.spill import Spill

if TYPE_CHECKING:
    from bnfold.graph.onnx_graph import OnnxGraph

Node = fx.Node
#: The dtypes of elements by ONNX's number for them.
DTYPES: dict[int, torch.dtype] = {
    onnx.TensorProto.FLOAT: torch.float32, onnx.TensorProto.FLOAT16: torch.float16,
    onnx.TensorProto.BFLOAT16: torch.bfloat16, onnx.TensorProto.DOUBLE: torch.float64,
    onnx.TensorProto.BOOL: torch.bool, onnx.TensorProto.INT64: torch.int64, onnx.TensorProto.INT32: torch.int32,
    onnx.TensorProto.INT8: torch.int8, onnx.TensorProto.UINT8: torch.uint8, onnx.TensorProto.INT16: torch.int16,
}  # fmt: skip


def written(graph: OnnxGraph) -> onnx.ModelProto:
    """The file with the edits in it; large constants are ``beside`` it, and say so without a location."""
    for node in reversed(list(graph.graph.nodes)):
        if node.op == "call_function" and not node.users and node not in graph._unread:
            graph.graph.erase_node(node)  # what an edit has left without a reader
    alive = [n for n in graph.graph.nodes if n.op == "call_function" and isinstance(n.target, Operator)]
    more = _keep_names(graph)
    _write_constants(graph)
    protos: list[onnx.NodeProto] = []
    for node in alive:
        operator = node.target
        assert isinstance(operator, Operator)
        own = len(node.args) - len(operator.outer)
        proto = onnx.NodeProto()
        proto.CopyFrom(operator.node)
        reads = ["" if n is None else graph._names[n] for n in node.args[:own]]
        if list(proto.input) != reads:
            proto.input[:] = reads
        items = [user for user in node.users if user.target is getitem]
        makes = [node] if operator.outputs == 1 else sorted(items, key=lambda item: int(item.args[1]))
        for made in makes:
            proto.output[0 if made is node else made.args[1]] = graph._names[made]
        protos += [proto, *(copy for made in makes for copy in more.pop(made, ()))]
    file = graph.model.graph
    del file.node[:]
    file.node.extend([*chain(*more.values()), *protos])
    there = {name for proto in protos for name in proto.output} | {v.name for v in file.input}
    kept = [value for value in file.value_info if value.name in there]
    if len(kept) < len(file.value_info):
        del file.value_info[:]
        file.value_info.extend(kept)
    return graph.model


def _keep_names(graph: OnnxGraph) -> dict[Node, list[onnx.NodeProto]]:
    """Gives values the names that outputs and bodies read; where one is not enough Identities have the others."""
    wanted: dict[Node, dict[str, None]] = {}
    for node in graph.graph.nodes:
        if node.op == "output":
            for value, output in zip(node.args[0], graph.model.graph.output):
                wanted.setdefault(value, {})[output.name] = None
        elif isinstance(node.target, Operator):
            for value, name in zip(node.args[len(node.args) - len(node.target.outer) :], node.target.outer):
                wanted.setdefault(value, {})[name] = None
    more: dict[Node, list[onnx.NodeProto]] = {}
    own = {value for value, names in wanted.items() if names.pop(graph._names.get(value, ""), 0) is None}
    for value, names in wanted.items():
        if names and value.op == "call_function" and value not in own:
            taken = next(iter(names))
            for other in [node for node, name in graph._names.items() if name == taken]:  # an addition is behind it
                graph._names[other] = free_name(f"{taken}_before", set(graph._names.values()), {})
            graph._names[value] = taken
            del names[taken]
        for name in names:
            more.setdefault(value, []).append(onnx.helper.make_node("Identity", [graph._names[value]], [name]))
    return more


def _write_constants(graph: OnnxGraph) -> None:
    """New constants into initializers, under the name of the one that nobody reads any more; those go otherwise."""
    file, pending = graph.model.graph, graph._pending
    assert isinstance(pending, Spill)
    at = {tensor.name: i for i, tensor in enumerate(file.initializer)}
    unread = {name for node, name in graph._targets.items() if not node.users and name in graph._read_before}
    taken, numbers = {*at, *graph._names.values()}, dict[str, int]()
    for node in [n for n in graph.graph.nodes if n in pending and n.users]:
        origin = graph._origin[node]
        fresh = origin not in unread
        name = free_name(origin, taken, numbers) if fresh else origin
        taken.add(name)
        unread.discard(name)
        graph._names[node] = name
        if fresh:  # of which the first versions know none that is no input
            graph.model.ir_version = max(graph.model.ir_version, 4)
        tensor = file.initializer.add() if fresh else file.initializer[at[name]]
        if pending.is_apart(node):
            value, graph.beside[name] = node.meta["val"], partial(_bytes, graph, node)
            kind = next(kind for kind, dtype in DTYPES.items() if dtype == value.dtype)
            empty = onnx.TensorProto(name=name, data_type=kind, dims=value.shape)
            empty.data_location = onnx.TensorProto.EXTERNAL
            tensor.CopyFrom(empty)
        else:
            tensor.CopyFrom(_rounded(graph, node, name))
    fed = {value.name for value in file.input}
    for i in reversed(range(len(file.initializer))):  # in place: no weight is copied
        if file.initializer[i].name in unread - fed:
            del file.initializer[i]


def _rounded(graph: OnnxGraph, node: Node, name: str) -> onnx.TensorProto:
    return _tensor(graph._pending[node].to(node.meta["val"].dtype).contiguous(), name)


def _bytes(graph: OnnxGraph, node: Node) -> bytes:
    return _rounded(graph, node, "").raw_data


def _tensor(value: Tensor, name: str) -> onnx.TensorProto:
    if value.dtype == torch.bfloat16:
        raw = value.view(torch.int16).numpy().tobytes()
        return onnx.TensorProto(data_type=onnx.TensorProto.BFLOAT16, dims=value.shape, raw_data=raw, name=name)
    return onnx.numpy_helper.from_array(value.numpy(), name)
