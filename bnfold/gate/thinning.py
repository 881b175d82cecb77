"""A part of the output channels of a product with constant weights: float64 of all of them says no more."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import onnx

#: Output channels for which float64 is computed: at either end, as kernels take them in blocks and what is left, and
#: as many in between.
EDGE = 8


def thinned(
    node: onnx.NodeProto, given: Mapping[str, Any], constants: Collection[str]
) -> tuple[onnx.NodeProto, Mapping[str, Any]]:
    """A node with all that it reads and makes, by name: a Conv, Gemm or MatMul that has many with some of its channels.

    Args:
        node: any node.
        given: the arrays of ``node.input`` and ``node.output``.
        constants: which of them are constants.
    """
    if node.op_type not in ("Conv", "Gemm", "MatMul") or len(node.output) != 1 or given.get(node.output[0]) is None:
        return node, given
    x, y, (weight, *bias) = node.input[0], node.output[0], [n for n in node.input[1:] if n]
    if x in constants or not {weight, *bias} <= set(constants) or given[weight].ndim < 2:
        return node, given
    if node.op_type == "Conv":
        return _convolution(node, given, x, y, [weight, *bias])
    attributes = {a.name: a.i for a in node.attribute}
    if given[weight].ndim > 2 or any(given[n].shape[-1:] != given[y].shape[-1:] for n in bias):
        return node, given
    some = _some(given[y].shape[-1])
    if some is None:
        return node, given
    columns = given[weight][some] if attributes.get("transB") else given[weight][:, some]
    return node, {**given, weight: columns, **{n: given[n][..., some] for n in (*bias, y)}}


def _convolution(
    node: onnx.NodeProto, given: Mapping[str, Any], x: str, y: str, weights: list[str]
) -> tuple[onnx.NodeProto, Mapping[str, Any]]:
    weight = given[weights[0]]
    groups = next((a.i for a in node.attribute if a.name == "group"), 1)
    if groups == 1:
        some = _some(len(weight))
        return node, given if some is None else _part(given, {**dict.fromkeys(weights, (0, some)), y: (1, some)})
    each, taken = len(weight) // groups, weight.shape[1]
    whole = _some(groups, -(-EDGE // each))
    if whole is None:
        return node, given
    some, read = ((whole[:, None] * n + np.arange(n)).reshape(-1) for n in (each, taken))
    thin = onnx.NodeProto()
    thin.CopyFrom(node)
    next(a for a in thin.attribute if a.name == "group").i = len(whole)
    return thin, _part(given, {**dict.fromkeys(weights, (0, some)), y: (1, some), x: (1, read)})


def _part(given: Mapping[str, Any], taken: Mapping[str, tuple[int, Any]]) -> Mapping[str, Any]:
    return {**given, **{name: given[name].take(some, axis) for name, (axis, some) in taken.items()}}


def _some(count: int, edge: int = EDGE) -> Any:
    """Places among so many: at both ends and in between; None where that is no part."""
    if count <= 4 * edge:
        return None
    between = np.linspace(edge, count - edge - 1, 2 * edge).round().astype(int)
    return np.r_[:edge, between, count - edge : count]
