"""Known faults of ONNX Runtime, each in a file of a few nodes: is it there, and is it told as the runtime's?

    python scripts/runtime_faults.py

A fault is *there* where the runtime's result is not the file's in float64 (an operator) or not what it is without
optimisations (an optimisation). Which of them a version has mended, the script finds out. The gate is given the file
beside itself: nothing can be wrong with it, so whatever it refuses is the runtime's.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper

import bnfold
from bnfold.evaluate.evaluator import File64

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Fault:
    """Nodes from ``x`` to ``y``, the constants that they read, and what is to be named."""

    nodes: tuple[onnx.NodeProto, ...]
    shape: tuple[int, ...]
    constants: dict[str, Any]
    guilty: str
    opset: int = 18


def node(op: str, inputs: str, output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs.split(), [output], **attributes)


def channels(count: int) -> dict[str, Array]:
    rng = np.random.default_rng(1)
    named = {"scale": rng.uniform(0.5, 1.5, count), "shift": rng.normal(size=count), "mean": rng.normal(size=count),
             "var": rng.uniform(0.5, 2, count)}  # fmt: skip
    return {name: value.astype(np.float32) for name, value in named.items()}


FAULTS: dict[str, Fault] = {
    "a BatchNormalization behind a reshape goes into the matrix product": Fault(
        (
            node("MatMul", "x w", "a"),
            node("Reshape", "a s", "b"),
            node("BatchNormalization", "b scale shift mean var", "y"),
        ),
        (4, 6),
        {"w": np.random.default_rng(0).normal(size=(6, 6)).astype(np.float32), "s": np.array([2, 2, 6]), **channels(2)},
        "atch",
    ),
    "zero padding goes into an average pool that does not count it": Fault(
        (
            node("Pad", "x p", "a"),
            node("AveragePool", "a", "y", kernel_shape=[3, 3]),
        ),
        (1, 2, 6, 6),
        {"p": np.array([0, 0, 1, 1, 0, 0, 1, 1])},
        "Pad",
    ),
    "zero padding goes into a max pool": Fault(
        (node("Pad", "x p", "a"), node("MaxPool", "a", "y", kernel_shape=[3, 3])),
        (1, 2, 6, 6),
        {"p": np.array([0, 0, 2, 2, 0, 0, 2, 2])},
        "Pad",
    ),
    "an average pool counts what lies behind the padding": Fault(
        (
            node("AveragePool", "x", "y", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1], ceil_mode=1,
                 count_include_pad=1),
        ),
        (1, 2, 6, 6),
        {},
        "AveragePool",
        opset=11,
    ),
    "nearest of two that are equally near": Fault(
        (
            node("Resize", "x r t z", "y", mode="nearest", coordinate_transformation_mode="half_pixel",
                 nearest_mode="round_prefer_ceil"),
        ),
        (1, 1, 1, 20),
        {"r": np.zeros(0, np.float32), "t": np.zeros(0, np.float32), "z": np.array([1, 1, 1, 6])},
        "Resize",
    ),
}  # fmt: skip


def file(fault: Fault) -> onnx.ModelProto:
    x, y = (helper.make_tensor_value_info(name, 1, shape) for name, shape in (("x", fault.shape), ("y", None)))
    held = [numpy_helper.from_array(np.asarray(value), name) for name, value in fault.constants.items()]
    graph = helper.make_graph(list(fault.nodes), "fault", [x], [y], held)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", fault.opset)], ir_version=8)


def runs(model: onnx.ModelProto, x: Array) -> tuple[Array, Array, Array]:
    """The result in float64, without optimisations, and with them."""
    found = []
    for level in ("ORT_DISABLE_ALL", "ORT_ENABLE_ALL"):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
        found.append(session.run(None, {"x": x})[0])
    return File64(model).run({"x": x}).outputs[0], found[0], found[1]


def there(fault: Fault) -> bool:
    x = np.random.default_rng(0).normal(size=fault.shape).astype(np.float32)
    exact, plain, optimised = runs(file(fault), x)
    return not all(
        a.shape == b.shape and np.allclose(a, b, 1e-4, 1e-4) for a, b in ((plain, exact), (optimised, plain))
    )


def told(fault: Fault, folder: Path) -> tuple[str, str]:
    """The verdict on the file beside itself, and the first problem."""
    path = folder / "fault.onnx"
    onnx.save(file(fault), path)
    report = bnfold.check(path, path)
    return report.verdict, (report.problems or ("",))[0]


def main() -> int:
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        for name, fault in FAULTS.items():
            verdict, problem = told(fault, Path(folder))
            present = there(fault)
            named = verdict == "fail" and "ONNX Runtime" in problem and fault.guilty in problem
            good = named if present else verdict == "pass"
            missed += not good
            state = "there" if present else f"mended in {onnxruntime.__version__}"
            print(f"{'ok' if good else 'MISSED':8}{name}: {state}; {verdict} {problem}")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
