"""Rows for operators that move, average or compare elements."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING

import torch

from bnfold.semantics import Average, Geometry, Homogeneous, Lookup, Movement, Same, Semantics, build

if TYPE_CHECKING:
    from bnfold.graph.onnx_call import OnnxCall


def move(call: OnnxCall) -> Semantics:
    """Runs the operator itself on indices; what says where elements go must be known from constants and shapes."""
    slots = tuple(slot for slot, node in call.slots() if call.graph.is_float(node))
    others = [node for slot, node in call.slots() if slot not in slots]
    if not slots or any(call.graph.known(node) is None for node in others):
        return build.OPAQUE
    shapes = tuple(call.shape(slot) for slot in slots)
    if any(size == 0 for shape in shapes for size in shape):
        return build.OPAQUE
    joins = call.attribute("axis", 1) % call.rank if call.operator == "Concat" else None
    return Movement(slots, shapes, lambda parts: call.run(dict(zip(slots, parts))), joins=joins, get=call.constant)


def pad(call: OnnxCall) -> Semantics:
    """Zero, reflect, edge and wrap padding; another constant is no movement."""
    if call.attribute("mode", "constant") == "constant":
        given = call.arguments.get("constant_value")
        value = call.attribute("value", 0.0) if given is None else call.constant("constant_value")
        if value is None or bool(torch.as_tensor(value).any()):
            return build.OPAQUE
    found = move_data(call, "data")
    if isinstance(found, Movement) and any(
        not call.graph.is_constant(n) for _, n in call.slots() if n is not call["data"]
    ):
        return Movement(found.slots, found.shapes, found.apply, may_pad=True, loose=tuple(range(call.rank)))
    return found


def move_data(call: OnnxCall, data: str) -> Semantics:
    """A movement of one operand, the others of which only say where to."""
    others = [node for slot, node in call.slots() if slot != data]
    shape = call.shape(data)
    if any(call.graph.known(node) is None for node in others) or 0 in shape:
        return build.OPAQUE
    return Movement((data,), (shape,), lambda parts: call.run({data: parts[0]}))


def gather(call: OnnxCall) -> Semantics:
    """Rows of a constant table, or elements of a value at constant places."""
    if not call.is_constant("data"):
        return move_data(call, "data")
    table = len(call.shape("data")) == 2 and call.attribute("axis", 0) == 0
    return Lookup("data", call.constant) if table else build.OPAQUE


def cast(call: OnnxCall) -> Semantics:
    """A cast that loses nothing leaves every element where it is; a narrowing one rounds."""
    slot = "input"
    if not (call.graph.is_float(call[slot]) and call.graph.is_float(call.value)):
        return build.OPAQUE
    wide, narrow = call.graph.dtype(call.value), call.graph.dtype(call[slot])
    return Same(slot, wide != narrow) if torch.promote_types(wide, narrow) == wide else build.OPAQUE


def attention(call: OnnxCall, weights: str, values: str) -> Semantics | None:
    """``softmax(...) @ V``: every row of the result is a mean of V's rows, with weights that sum to one."""
    made, ndim = call.graph.maker(call[weights]), call.rank
    if made is None or made.operator != "Softmax" or len(call.shape(values)) != ndim:
        return None
    rank = len(call.shape(weights))
    last = made.attribute("axis", -1 if made.opset >= 13 else 1) % rank == rank - 1
    if not last or call.shape(values)[:-2] != call.out_shape[:-2]:
        return None
    return Average(values, (ndim - 2,), ndim)


def _axes(call: OnnxCall) -> tuple[int, ...] | None:
    """The axes of a reduction, in an attribute or an operand; None where they are not known."""
    ndim = len(call.shape("data"))
    given = call.attribute("axes", None)
    if call.arguments.get("axes") is not None:
        found = call.constant("axes")
        given = None if found is None else found.long().tolist()
        if found is None:
            return None
    if not given:
        return () if call.attribute("noop_with_empty_axes", 0) else tuple(range(ndim))
    return tuple(axis % ndim for axis in given)


def mean(call: OnnxCall) -> Semantics:
    """ReduceMean."""
    axes, keep = _axes(call), call.attribute("keepdims", 1)
    return build.OPAQUE if axes is None else Average("data", axes, len(call.shape("data")), drops=not keep)


def total(call: OnnxCall) -> Semantics:
    """ReduceSum: so many times the mean."""
    axes, keep, shape = _axes(call), call.attribute("keepdims", 1), call.shape("data")
    if axes is None or 0 in shape:
        return build.OPAQUE
    dynamic = set(axes) & set(call.graph.dynamic_axes(call["data"]))
    count = float(prod(shape[axis] for axis in axes))
    return Average("data", axes, len(shape), drops=not keep, total=count, no_shift="dynamic-size" if dynamic else None)


def extremum(call: OnnxCall) -> Semantics:
    """ReduceMax and ReduceMin."""
    axes, keep = _axes(call), call.attribute("keepdims", 1)
    return build.OPAQUE if axes is None else Homogeneous(("data",), axes, shifts=True, drops=not keep)


def spatial_mean(call: OnnxCall) -> Semantics:
    """GlobalAveragePool."""
    return Average("X", tuple(range(2, call.rank)), call.rank)


def spatial_extremum(call: OnnxCall) -> Semantics:
    """MaxPool, whose padding is -inf, and which elements it chose; GlobalMaxPool."""
    return Homogeneous(("X",), tuple(range(2, call.rank)), shifts=True)


def average_pool(call: OnnxCall) -> Semantics:
    """AveragePool: where padding counts as zeros no shift passes; one that leaves nothing out is a convolution."""
    window, axes = tuple(call.attribute("kernel_shape", ())), tuple(range(2, call.rank))
    walk, padded = geometry(call, window)
    counted = padded and bool(call.attribute("count_include_pad", 0))
    whole = (counted or not padded) and not call.attribute("ceil_mode", 0)
    why = "zero-padding" if counted else None
    return Average("X", axes, call.rank, no_shift=why, window=window, geometry=walk if whole else None)


def geometry(call: OnnxCall, kernel: Sequence[int], *, transposed: bool = False) -> tuple[Geometry | None, bool]:
    """How a convolution or a pool walks, None where it pads unevenly, and whether it pads."""
    axes = len(kernel)
    ones, zeros = (1,) * axes, (0,) * axes
    stride, dilation = (tuple(call.attribute(name, ones)) for name in ("strides", "dilations"))
    pads = tuple(call.attribute("pads", zeros * 2))
    auto = call.attribute("auto_pad", "NOTSET")
    if auto.startswith("SAME"):
        return None, any(d * (k - 1) > 0 for d, k in zip(dilation, kernel))
    pads = zeros * 2 if auto == "VALID" else pads
    if pads[:axes] != pads[axes:] or call.attribute("output_shape", None):
        return None, True
    more = tuple(call.attribute("output_padding", zeros)) if transposed else ()
    return Geometry(stride, pads[:axes], dilation, transposed, more), any(pads)


def resize(call: OnnxCall) -> Semantics:
    """Resize and Upsample: weights sum to one along the axes that change."""
    if call.attribute("coordinate_transformation_mode", "") == "tf_crop_and_resize":
        return build.OPAQUE
    axes = tuple(axis for axis, (a, b) in enumerate(zip(call.shape("X"), call.out_shape)) if a != b)
    return Average("X", axes, call.rank)
