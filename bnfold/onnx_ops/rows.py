"""Rows of the table that are longer than a line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from bnfold.affine import Affine
from bnfold.semantics import Opaque, Semantics, build
from bnfold.semantics.build import OPAQUE
from bnfold.semantics.contraction import Geometry, Recurrent
from bnfold.semantics.moving import Average, Movement, Same
from bnfold.semantics.pointwise import Homogeneous, Scaling

if TYPE_CHECKING:
    from bnfold.graph.onnx_call import OnnxCall


def same(call: OnnxCall) -> Semantics:
    """Every element where it is."""
    return Same(next(iter(call.arguments))) if call.item in (None, 0) else OPAQUE


def dropout(call: OnnxCall) -> Semantics:
    """Dropout, unless it trains."""
    if call.arguments.get("training_mode") is None:
        return same(call)
    mode = call.constant("training_mode")
    return OPAQUE if mode is None or bool(mode.any()) else same(call)


# -- contractions ------------------------------------------------------------------------------------------------------


def _geometry(call: OnnxCall, kernel: Sequence[int], *, transposed: bool = False) -> tuple[Geometry | None, bool]:
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


def conv(call: OnnxCall) -> Semantics:
    """Conv, or ConvTranspose."""
    if not call.is_constant("W"):
        return OPAQUE
    transposed, groups = call.operator == "ConvTranspose", call.attribute("group", 1)
    walk, padded = _geometry(call, call.shape("W")[2:], transposed=transposed)
    return build.convolution(call, "X", "W", "B", groups, walk, transposed=transposed, padded=padded or transposed)


def gemm(call: OnnxCall) -> Semantics:
    """``alpha*A'@B' + beta*C`` with a constant A or B, transposed or not."""
    alpha, beta = (float(call.attribute(name, 1.0)) for name in ("alpha", "beta"))
    if alpha == 0.0 or beta == 0.0:
        return OPAQUE
    left, right = bool(call.attribute("transA", 0)), bool(call.attribute("transB", 0))
    if call.is_constant("B"):
        data, weight, letters = "A", "B", "oi" if right else "io"
        out, inp = ("", "o"), ("i", "") if left else ("", "i")
    else:
        data, weight, letters = "B", "A", "io" if left else "oi"
        out, inp = ("o", ""), ("", "i") if right else ("i", "")
    return build.contraction(
        call, data, weight, view=call.shape(weight), letters=letters, out=out, inp=inp,
        bias="C", bias_scale=beta, weight_scale=alpha,
    )  # fmt: skip


def matmul(call: OnnxCall) -> Semantics:
    """``A @ B`` with a constant operand; a mean of values weighted by a softmax; else a product of two values.

    Of a matrix times a constant one it has place for a bias: with one it is a Gemm (``OnnxGraph`` makes it one).
    """
    if call.rank == len(call.shape("A")) == 2 and call.is_constant("B"):
        view = call.shape("B")
        return build.contraction(call, "A", "B", view=view, letters="io", out=("", "o"), inp=("", "i"), bias="C")
    made, last = call.graph.maker(call["A"]), len(call.shape("A")) - 1
    softmax = made is not None and made.operator == "Softmax"
    rows = made is not None and softmax and made.attribute("axis", -1 if made.opset >= 13 else 1) in (-1, last)
    return build.matmul(call, "A", "B", rows_sum_to_one=rows)


def recurrent(call: OnnxCall) -> Semantics:
    """LSTM, GRU, RNN: they read their input through W and the first half of B, in every direction."""
    if not call.is_constant("W") or not call.is_constant("B"):
        return OPAQUE
    return Recurrent("X", (("W", "B"),), call.constant, parts=2)


# -- normalisations ----------------------------------------------------------------------------------------------------


def trains(call: OnnxCall) -> bool:
    """Whether a BatchNormalization normalises with the statistics of its batch."""
    if call.opset < 7:
        return not call.attribute("is_test", 0)
    return bool(call.attribute("training_mode", 0)) if call.opset >= 14 else call.outputs > 1


def batch_norm(call: OnnxCall) -> Semantics:
    """BatchNormalization with stored statistics, per channel or (``spatial=0``) per element."""
    if call.item not in (None, 0):
        return OPAQUE
    slots = list(call.arguments)[1:5]
    channels = call.shape("X")[1:2] if call.attribute("spatial", 1) else call.shape("X")[1:]
    if others := [f"{list(call.shape(slot))} of {slot}" for slot in slots if call.shape(slot) != channels]:
        known = "a number that differs" if 1 in call.graph.dynamic_axes(call["X"]) else f"{list(channels)}"
        return Opaque("channels", f"its operand has {known}, and not the {', '.join(others)}", "batch_norm")
    eps = float(call.attribute("epsilon", 1e-5))
    return build.normalisation(call, "X", slots, eps, batch_statistics=trains(call))


def scaler(call: OnnxCall) -> Semantics:
    """Scaler of ai.onnx.ml, as scikit-learn's StandardScaler becomes: ``(x - offset)*scale`` along the last axis."""
    given = (call.attribute("offset", [0.0]), call.attribute("scale", [1.0]))
    offset, scale = (torch.tensor(each, dtype=torch.float64) for each in given)
    axis = call.rank - 1
    return Scaling("X", Affine.per_channel(scale, -offset * scale, call.rank, axis), "mul", lambda new: {})


def layer_norm(call: OnnxCall) -> Semantics:
    """A scale and a bias along the last axes; the mean and deviation that it may return are no affine's."""
    if call.item not in (None, 0):
        return OPAQUE
    return build.normalised(call, range(call.attribute("axis", -1) % call.rank, call.rank), "Scale", "B")


# -- movements ---------------------------------------------------------------------------------------------------------


def move(call: OnnxCall) -> Semantics:
    """Runs the operator itself on indices; what says where elements go must be known from constants and shapes."""
    return _moved(call, tuple(slot for slot, node in call.slots() if call.graph.is_float(node)))


def _moved(call: OnnxCall, slots: tuple[str, ...]) -> Semantics:
    """A movement of some operands, the others of which only say where to."""
    shapes = tuple(call.shape(slot) for slot in slots)
    unknown = any(call.graph.known(node) is None for slot, node in call.slots() if slot not in slots)
    if not slots or unknown or any(0 in shape for shape in shapes):
        return OPAQUE
    joins = call.attribute("axis", 1) % call.rank if call.operator == "Concat" else None
    return Movement(slots, shapes, lambda parts: call.run(dict(zip(slots, parts))), joins=joins, get=call.constant)


def pad(call: OnnxCall) -> Semantics:
    """Zero, reflect, edge and wrap padding; another constant is no movement."""
    if call.attribute("mode", "constant") == "constant":
        given = call.arguments.get("constant_value")
        value = call.attribute("value", 0.0) if given is None else call.constant("constant_value")
        if value is None or bool(torch.as_tensor(value).any()):
            return OPAQUE
    found = _moved(call, ("data",))
    constant = all(call.graph.is_constant(node) for slot, node in call.slots() if slot != "data")
    if isinstance(found, Movement) and not constant:
        return Movement(found.slots, found.shapes, found.apply, may_pad=True, loose=tuple(range(call.rank)))
    return found


def gather(call: OnnxCall) -> Semantics:
    """Rows of a constant table, or elements of a value at constant places."""
    if not call.is_constant("data"):
        return _moved(call, ("data",))
    table = len(call.shape("data")) == 2 and call.attribute("axis", 0) == 0
    return build.lookup(call, "data") if table else OPAQUE


# -- averages and maxima -----------------------------------------------------------------------------------------------


def reduced(call: OnnxCall, kind: build.Reduction) -> Semantics:
    """ReduceMean, ReduceSum, ReduceMax and ReduceMin, whose axes are an attribute or an operand."""
    ndim = len(call.shape("data"))
    given = call.attribute("axes", None)
    axes: tuple[int, ...] | None = () if call.attribute("noop_with_empty_axes", 0) else tuple(range(ndim))
    if call.arguments.get("axes") is not None:
        found = call.constant("axes")
        axes, given = (None, None) if found is None else (axes, found.long().tolist())
    axes = tuple(axis % ndim for axis in given) if given else axes
    return build.reduced(call, "data", axes, kind, keep=bool(call.attribute("keepdims", 1)))


def spatial_mean(call: OnnxCall) -> Semantics:
    """GlobalAveragePool."""
    return Average("X", tuple(range(2, call.rank)), call.rank)


def spatial_extremum(call: OnnxCall) -> Semantics:
    """MaxPool, whose padding is -inf, and which elements it chose; GlobalMaxPool."""
    return Homogeneous(("X",), tuple(range(2, call.rank)), shifts=True)


def average_pool(call: OnnxCall) -> Semantics:
    """AveragePool."""
    window = tuple(call.attribute("kernel_shape", ()))
    walk, padded = _geometry(call, window)
    counts, ceil = (bool(call.attribute(name, 0)) for name in ("count_include_pad", "ceil_mode"))
    return build.pool(call, "X", tuple(range(2, call.rank)), window, walk, padded=padded, counts=counts, ceil=ceil)


def resize(call: OnnxCall) -> Semantics:
    """Resize and Upsample: weights sum to one along the axes that change."""
    if call.attribute("coordinate_transformation_mode", "") == "tf_crop_and_resize":
        return OPAQUE
    axes = tuple(axis for axis, (a, b) in enumerate(zip(call.shape("X"), call.out_shape)) if a != b)
    return Average("X", axes, call.rank)
