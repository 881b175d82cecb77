"""Shapes of an ONNX file's values: inferred as far as that goes, read off a run where it does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx_nets import f, net

from bnfold.evaluate.weights import Weight
from bnfold.graph import onnx_shapes
from bnfold.graph.onnx_shapes import Shapes

node = helper.make_node
HALF = [
    node("Shape", ["x"], ["s"]),
    node("Slice", ["s", "two", "end"], ["hw"]),
    node("Div", ["hw", "two"], ["half"]),
    node("Concat", ["half", "minus"], ["target"], axis=0),
    node("Reshape", ["x", "target"], ["r"]),
    node("Mul", ["r", "r"], ["y"]),
]
WHOLE: dict[str, Any] = {"two": np.array([2]), "end": np.array([4]), "minus": np.array([-1])}


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every run that is made for shapes."""
    made, run = list[int](), onnx_shapes._run
    monkeypatch.setattr(onnx_shapes, "_run", lambda *args: made.append(1) or run(*args))
    return made


def shapes(nodes: list[onnx.NodeProto], weights: dict[str, Any], size: list[Any]) -> Shapes:
    model = net(nodes, size, weights, dtype=TensorProto.FLOAT)
    return Shapes(model, {tensor.name: Weight(tensor, Path()) for tensor in model.graph.initializer})


def test_a_target_that_is_computed_of_sizes_needs_no_run(runs: list[int]) -> None:
    known = shapes(HALF, WHOLE, ["N", 3, "H", "W"])
    for way in range(3):
        n, c, h, w = known.at(way).shapes["x"]
        assert known.at(way).shapes["y"] == (h // 2, w // 2, n * c * h * w // (h // 2) // (w // 2))
    assert len({known.at(way).shapes["x"] for way in range(3)}) == 3 and not runs


def test_a_target_that_is_computed_of_data_takes_one(runs: list[int]) -> None:
    nodes = [node("NonZero", ["x"], ["n"]), node("Cast", ["n"], ["y"], to=TensorProto.FLOAT)]
    known = shapes(nodes, {}, [2, 3])
    assert known.at(0).shapes["y"][0] == 2 and len(runs) == 1
    assert known.having("y", 1) is known.at(2) is known.at(0) and len(runs) == 1  # no size of it is dynamic


def test_other_sizes_take_a_run_only_for_what_no_inference_shows(runs: list[int]) -> None:
    nodes = [node("Relu", ["x"], ["r"]), node("NonZero", ["r"], ["n"]), node("Cast", ["n"], ["y"], to=1)]
    known = shapes(nodes, {}, ["N", 3])
    assert known.at(0).shapes["r"] == (2, 3) and len(runs) == 1
    assert known.having("r", 1).shapes["r"] == (3, 3) and len(runs) == 1
    assert known.having("y", 1).shapes["y"][0] == 2 and len(runs) == 2


def test_what_nobody_reads_needs_no_shape(runs: list[int]) -> None:
    """onnx infers no mask of a Dropout of opset 7; a run of the whole net would show it."""
    nodes = [node("Dropout", ["x"], ["d", "mask"]), node("Relu", ["d"], ["y"])]
    model = net(nodes, ["N", 3], {"w": f(1)}, dtype=TensorProto.FLOAT, opset=7)
    known = Shapes(model, {tensor.name: Weight(tensor, Path()) for tensor in model.graph.initializer})
    assert known.at(0).shapes["y"] == (2, 3) and "mask" not in known.at(0).shapes and not runs
