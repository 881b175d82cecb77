"""What a node of an ONNX file reads: from bodies too, and in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.inliner

_KINDS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
_NARROW = {onnx.helper.tensor_dtype_to_np_dtype(kind) for kind in _KINDS}


def raised(value: Any) -> Any:
    """``value`` in float64 where it is an array, or a sequence of arrays, of a narrower float."""
    if isinstance(value, list):
        return [raised(each) for each in value]
    dtype = getattr(value, "dtype", None)
    return value.astype(np.float64) if dtype in _NARROW else value


def outer_names(node: onnx.NodeProto) -> set[str]:
    """What the bodies of a node may read from outside."""
    found: set[str] = set()
    stack = list(node.attribute)
    while stack:
        attribute = stack.pop()
        for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
            found.update(name for inner in graph.node for name in inner.input)
            found.update(value.name for value in graph.output)
            stack += [a for inner in graph.node for a in inner.attribute]
    return found


def qualified(node: onnx.NodeProto) -> str:
    """The name of a node's operator, with its domain where that is not ONNX's own."""
    return f"{node.domain}.{node.op_type}" if node.domain else str(node.op_type)


def inlined(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with the nodes of its functions in place of their calls; itself where it has none.

    What a call inside makes is called alike however often this is done.
    """
    if not model.functions:
        return model
    for part in (*model.opset_import, *model.graph.node):
        part.domain = "" if part.domain == "ai.onnx" else part.domain  # two names of one domain
    return onnx.inliner.inline_local_functions(model)
