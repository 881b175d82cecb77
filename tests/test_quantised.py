"""Operators on quantised values: each as ONNX Runtime computes it, next to a tie either level, and no other."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import bnfold
from bnfold.gate.by_operator import ask

U8, I8 = np.uint8, np.int8
OPSETS = {"": 17, "com.microsoft": 1}
#: Scales whose products and quotients float32 has not: half of what is rounded lies within a rounding of a tie.
X, W, Y = np.float32(0.3), np.float32(0.05), np.float32(0.03)
#: Scales, then zero points, of an operand and of the result.
GIVEN, MADE = ("xs", "xz"), ("ys", "yz")
CASES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "QLinearConv": (["x", *GIVEN, "w", "ws", "wz", *MADE, "b"], {"pads": [1, 1, 1, 1]}),
    "QLinearMatMul": (["x", *GIVEN, "m", "ms", "mz", *MADE], {}),
    "com.microsoft.QGemm": (["flat", *GIVEN, "m", "ms", "mz", "c", *MADE], {"transB": 1, "alpha": 1.5}),
    "com.microsoft.QLinearAdd": (["x", *GIVEN, "x2", *MADE, *MADE], {}),
    "com.microsoft.QLinearMul": (["x", *GIVEN, "x2", "ws", "xz", *MADE], {}),
    "com.microsoft.QLinearSigmoid": (["x", *GIVEN, "ys", "xz"], {}),
    "com.microsoft.QLinearLeakyRelu": (["x", *GIVEN, *MADE], {"alpha": 0.1}),
    "com.microsoft.QLinearGlobalAveragePool": (["x", *GIVEN, *MADE], {"channels_last": 0}),
    "com.microsoft.QLinearAveragePool": (["x", *GIVEN, *MADE], {"kernel_shape": [3, 3], "pads": [1, 1, 0, 0]}),
    # ONNX Runtime takes the integer part of the reciprocal of its scale: right where that is one.
    "com.microsoft.QLinearSoftmax": (["x", *GIVEN, "ps", "xz"], {"axis": 1, "opset": 17}),
    "com.microsoft.QLinearConcat": ([*MADE, "x", *GIVEN, "x2", "ws", "xz"], {"axis": 1}),
    "com.microsoft.QLinearWhere": (["which", "x", *GIVEN, "x2", *MADE, *MADE], {}),
}


def held(kind: Any) -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    return {
        "xs": np.asarray(X), "ws": np.asarray(W), "ys": np.asarray(Y), "xz": np.asarray(kind(3)),
        "ps": np.asarray(np.float32(1 / 256)), "yz": np.asarray(kind(5)), "wz": np.asarray(I8(0)),
        "mz": np.asarray(kind(2)), "ms": np.asarray(W),
        "x2": rng.integers(0, 60, (1, 3, 8, 8)).astype(kind), "w": rng.integers(-9, 9, (4, 3, 3, 3)).astype(I8),
        "m": rng.integers(0, 20, (8, 8)).astype(kind), "b": rng.integers(-50, 50, 4).astype(np.int32),
        "c": rng.integers(-50, 50, 8).astype(np.int32), "which": rng.random((1, 3, 8, 8)) > 0.5,
    }  # fmt: skip


def file(name: str, kind: Any, **changed: Any) -> onnx.ModelProto:
    """One operator behind a QuantizeLinear, and a DequantizeLinear behind it."""
    reads, attributes = CASES[name]
    domain, _, operator = name.rpartition(".")
    values = {n: np.asarray(v) for n, v in (held(kind) | changed).items()}
    first = "flat" if "flat" in reads else "x"
    nodes = [
        helper.make_node("QuantizeLinear", ["in", "xs", "xz"], [first]),
        helper.make_node(operator, reads, ["q"], domain=domain, **attributes),
        helper.make_node("DequantizeLinear", ["q", "ys", "yz"], ["out"]),
    ]
    used = {n for node in nodes for n in node.input} & values.keys()
    graph = helper.make_graph(
        nodes, "one",
        [helper.make_tensor_value_info("in", TensorProto.FLOAT, ["N", 8] if first == "flat" else ["N", 3, 8, 8])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(values[n], n) for n in sorted(used)],
    )  # fmt: skip
    opsets = [helper.make_opsetid(d, v) for d, v in OPSETS.items()]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


@pytest.mark.parametrize("kind", [U8, I8])
@pytest.mark.parametrize("name", CASES)
def test_an_operator_on_levels_is_right_and_on_levels_of_another_scale_is_not(
    name: str, kind: Any, tmp_path: Path
) -> None:
    right, wrong = tmp_path / "right.onnx", tmp_path / "wrong.onnx"
    onnx.save(file(name, kind), right)
    verdict = bnfold.check(right, right, device="cpu")
    assert verdict.verdict == "pass", verdict.problems
    onnx.save(file(name, kind, xs=X * np.float32(1.1)), wrong)
    assert bnfold.check(wrong, right, device="cpu").verdict == "fail"


@pytest.mark.parametrize(
    ("steps", "beside", "right"), [(0, True, True), (1, True, True), (2, True, False), (1, False, False)]
)
def test_next_to_a_tie_either_level_is_right(steps: int, beside: bool, right: bool) -> None:
    """A sum of 10*k + 5 times a hundredth of the scale: a tie but for what float32 makes of the scales."""
    node = helper.make_node("QLinearMatMul", ["a", "as", "z", "b", "bs", "z", "ys", "z"], ["y"])
    sums = np.arange(5, 105, 10) if beside else np.arange(7, 107, 10)
    given = {
        "a": sums[:, None].astype(U8), "b": np.ones((1, 1), U8), "z": U8(0), "as": X, "bs": np.float32(0.01),
        "ys": X * np.float32(0.1),
    }  # fmt: skip
    quotient = sums * (math.prod(map(float, (given["as"], given["bs"]))) / float(given["ys"]))
    levels = np.round(quotient)
    assert (np.abs(np.abs(quotient - np.trunc(quotient)) - 0.5) < 1e-5).all() == beside
    away = np.where(levels > quotient, -1, 1)  # what rounds the other way
    given["y"] = (levels + steps * away)[:, None].astype(U8)
    assert (not ask([node], {"": 17}, {n: np.asarray(x) for n, x in given.items()}).faults) == right
