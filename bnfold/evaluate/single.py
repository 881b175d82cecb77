"""One node of an ONNX file in float64."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import torch

from bnfold.evaluate.reading import raised
from bnfold.evaluate.subject import Array
from bnfold.evaluate.weights import spread_out

if TYPE_CHECKING:
    from bnfold.evaluate.evaluator import Evaluator

#: Elements of a constant that is made without asking how many there may be.
_FEW = 1 << 24


def node_evaluator(node: onnx.NodeProto, opsets: Mapping[str, int]) -> Callable[[Mapping[str, Array]], list[Any]]:
    """One node in float64, from the values that it reads by name to one result per name of ``node.output``."""
    if node.op_type == "Constant" and not node.domain and node.attribute and node.attribute[0].HasField("t"):
        held = raised(onnx.numpy_helper.to_array(node.attribute[0].t))  # a file has hundreds
        return lambda given: [held]
    if node.op_type == "Identity" and not node.domain:
        return lambda given: [raised(given[node.input[0]])]
    if node.op_type == "ConstantOfShape" and not node.domain:
        with contextlib.suppress(Exception):  # which is told where it is evaluated
            return _filling(node, opsets)
    return _evaluating(node, opsets)


def _filling(node: onnx.NodeProto, opsets: Mapping[str, int]) -> Callable[[Mapping[str, Array]], list[Any]]:
    """A ConstantOfShape: files whose weights were left out have one for each."""
    fill = raised(onnx.numpy_helper.to_array(node.attribute[0].t)).reshape(()) if node.attribute else np.zeros(())

    def run(given: Mapping[str, Array]) -> list[Any]:
        sizes = [int(size) for size in np.ravel(given[node.input[0]])]
        if min(sizes, default=0) >= 0 and math.prod(sizes) <= _FEW:
            return [np.full(sizes, fill)]
        return _evaluating(node, opsets)(given)

    return run


def _evaluating(node: onnx.NodeProto, opsets: Mapping[str, int]) -> Callable[[Mapping[str, Array]], list[Any]]:
    evaluator = _one_node(node.SerializeToString(deterministic=True), tuple(opsets.items()))

    def run(given: Mapping[str, Array]) -> list[Any]:
        with np.errstate(all="ignore"), torch.no_grad():
            found = iter(evaluator.run(None, {name: raised(x) for name, x in given.items()}))
        return [raised(next(found)) if name else None for name in node.output]

    return run


@functools.lru_cache(maxsize=16)  # the same one is asked several times in a row
def _one_node(content: bytes, opsets: tuple[tuple[str, int], ...]) -> Evaluator:
    from bnfold.evaluate.evaluator import Evaluator  # onnx's reference takes long to import, and not all need it

    node = onnx.NodeProto.FromString(content)
    graph = onnx.GraphProto(node=[node])
    spread_out(graph)
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in node.output if name)
    return Evaluator(graph, opsets=dict(opsets))
