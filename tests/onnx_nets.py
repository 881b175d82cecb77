"""Small ONNX nets in float64, so that what folding does to their constants is exact but for 2**-52."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from bnfold.evaluate.evaluator import File64
from bnfold.graph.onnx_graph import OnnxGraph
from bnfold.passes.folding import fold
from bnfold.passes.merge import merge
from bnfold.report import Ledger

RNG = np.random.default_rng(0)


def f(*shape: int) -> np.ndarray[Any, Any]:
    """Numbers that no rounding makes equal."""
    return RNG.standard_normal(shape)


def norm(data: str, result: str, prefix: str = "n", **attributes: Any) -> onnx.NodeProto:
    """A BatchNormalization whose constants ``statistics`` gives."""
    names = [f"{prefix}.{part}" for part in ("scale", "bias", "mean", "var")]
    return helper.make_node("BatchNormalization", [data, *names], [result], name=f"{prefix}_node", **attributes)


def statistics(channels: int | tuple[int, ...], prefix: str = "n") -> dict[str, np.ndarray[Any, Any]]:
    """Positive scales: activations let them pass."""
    shape = (channels,) if isinstance(channels, int) else channels
    parts = (np.abs(f(*shape)) + 0.5, f(*shape), f(*shape), np.abs(f(*shape)) + 0.5)
    return {f"{prefix}.{name}": part for name, part in zip(("scale", "bias", "mean", "var"), parts)}


def net(
    nodes: list[onnx.NodeProto], x: list[Any], weights: dict[str, Any], *, opset: int = 17,
    outputs: list[str] | None = None, inputs: list[str] | None = None,
    ir_version: int = 8, dtype: int = TensorProto.DOUBLE,
) -> onnx.ModelProto:  # fmt: skip
    """``x`` -> ``y`` through nodes; ``inputs`` are initializers that are inputs too."""
    arrays = {name: np.asarray(value) for name, value in weights.items()}
    given = [helper.make_tensor_value_info("x", dtype, x)]
    given += [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(arrays[n].dtype), arrays[n].shape)
        for n in inputs or []
    ]
    graph = helper.make_graph(
        nodes, "net", given, [onnx.ValueInfoProto(name=name) for name in outputs or ["y"]],
        [numpy_helper.from_array(value, name) for name, value in arrays.items()],
    )  # fmt: skip
    for value in graph.output:
        value.type.tensor_type.elem_type = dtype
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)


def folded(
    model: onnx.ModelProto, beside: Path | None = None, *, merges: bool = False
) -> tuple[onnx.ModelProto, Ledger]:
    """A folded copy, with ``merges`` a merged one."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = OnnxGraph(copy, beside)
    ledger = graph.with_unseen(fold(graph))
    ledger = merge(graph, ledger) if merges else ledger
    return graph.finish(), ledger


def types(model: onnx.ModelProto) -> Counter[str]:
    """How many nodes of each type."""
    return Counter(node.op_type for node in model.graph.node)


def apart(one: onnx.ModelProto, other: onnx.ModelProto, sizes: tuple[int, ...] = (2, 5, 9)) -> float:
    """The largest relative difference of any output in float64, at several sizes of what is dynamic."""
    worst = 0.0
    for size in sizes:
        a, b = File64(one), File64(other)
        feeds = {v.name: f(*(n if isinstance(n, int) else size for n in v.shape)) for v in a.inputs}
        for mine, theirs in zip(a.run(feeds).outputs, b.run(feeds).outputs):
            worst = max(worst, float(np.abs(mine - theirs).max() / max(np.abs(mine).max(), 1e-300)))
    return worst


# -- damage: what a file with a first node, a first initializer and an operator set may have suffered


def cyclic(model: onnx.ModelProto) -> None:
    model.graph.node[0].input[0] = "y"


def missing(model: onnx.ModelProto) -> None:
    del model.graph.initializer[0]


def claimed(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].dims[0] = 25_000_000_000 // 27


def negative(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].dims[0] = -4


def outside(model: onnx.ModelProto) -> None:
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../etc/passwd")


def future(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 1000
