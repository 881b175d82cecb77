"""Small ONNX files made by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from bnfold.runtime.runtime import Array

FLOAT, INT64, BFLOAT16 = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BFLOAT16
Value = tuple[str, int, list[int | str] | None]


def build(
    nodes: list[onnx.NodeProto], inputs: list[Value], outputs: list[Value], constants: dict[str, Array] | None = None
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info(*value) for value in inputs],
        [helper.make_tensor_value_info(*value) for value in outputs],
        [numpy_helper.from_array(value, name) for name, value in (constants or {}).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def encode(model: onnx.ModelProto) -> bytes:
    content: bytes = model.SerializeToString()
    return content


def serialized(*args: Any, **kwargs: Any) -> bytes:
    return encode(build(*args, **kwargs))


def identity(dtype: int, shape: list[int | str] | None) -> bytes:
    return serialized([helper.make_node("Identity", ["x"], ["y"])], [("x", dtype, shape)], [("y", dtype, shape)])


def adder() -> onnx.ModelProto:
    return build(
        [helper.make_node("Add", ["x", "w"], ["sum"]), helper.make_node("Relu", ["sum"], ["relu"])],
        [("x", FLOAT, ["N", 3])],
        [("sum", FLOAT, ["N", 3]), ("relu", FLOAT, ["N", 3])],
        {"w": np.array([-1, 0, 1], np.float32)},
    )


X = np.array([[0, 0, 0], [1, -2, 3]], np.float32)
