"""Rows for operators with a constant weight."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bnfold.aten.common import OPAQUE, constant_operands, geometry, per_axis
from bnfold.aten.moving import attention
from bnfold.semantics import Bilinear, Geometry, Opaque, Recurrent, Semantics, build

if TYPE_CHECKING:
    from bnfold.semantics.call import Call


def convolution(call: Call) -> Semantics:
    """conv1d/2d/3d; core ATen's ``convolution`` may be transposed."""
    if call.arguments.get("transposed"):
        return conv_transpose(call)
    kernel = call.shape("weight")[2:]
    spatial, padding = len(kernel), call["padding"]
    stride, dilation = per_axis(call, "stride", spatial), per_axis(call, "dilation", spatial)
    if isinstance(padding, str):
        total = [0 if padding == "valid" else (d or 1) * (k - 1) for d, k in zip(dilation, kernel)]
        padded, even = any(total), all(n % 2 == 0 for n in total)
        walk = geometry(stride, tuple(n // 2 for n in total), dilation) if even else None
    else:
        amounts = per_axis(call, "padding", spatial)
        padded, walk = any(n != 0 for n in amounts), geometry(stride, amounts, dilation)
    return build.convolution(
        call, "input", "weight", "bias", call["groups"], walk, transposed=False, padded=padded
    )  # fmt: skip


def conv_transpose(call: Call) -> Semantics:
    """conv_transpose1d/2d/3d."""
    stride, padding, dilation, more = (
        per_axis(call, name, len(call.shape("weight")) - 2)
        for name in ("stride", "padding", "dilation", "output_padding")
    )
    walk = geometry(stride, padding, dilation, transposed=True, output_padding=more)
    return build.convolution(call, "input", "weight", "bias", call["groups"], walk, transposed=True)


def linear(call: Call) -> Semantics:
    """``x @ W.T + b``: weight (out_features, in_features), the last axis of x."""
    if len(call.shape("weight")) != 2:
        return OPAQUE
    lead = ("",) * (call.rank - 1)
    return build.contraction(
        call, "input", "weight", view=call.shape("weight"), letters="oi", out=(*lead, "o"), inp=(*lead, "i"),
        bias="bias", bias_axis=len(lead), geometry=Geometry(),
    )  # fmt: skip


def addmm(call: Call) -> Semantics:
    """``beta*C + alpha*(x @ W)``: C takes the shift; alpha stays, beta is divided out."""
    if call["beta"] == 0 or call["alpha"] == 0:
        return OPAQUE
    return build.contraction(
        call, "mat1", "mat2", view=call.shape("mat2"), letters="io", out=("", "o"), inp=("", "i"),
        bias="self", bias_scale=float(call["beta"]), weight_scale=float(call["alpha"]),
    )  # fmt: skip


def matmul(call: Call) -> Semantics:
    """``x @ W`` or ``W @ x`` with a constant W, its leading axes shared with x or not; else a product of two values."""
    left, right = "self", "mat2" if "mat2" in call else "other"
    if call.is_constant(left) or call.is_constant(right):
        return build.matmul(call, left, right)
    return attention(call, left, right) or bilinear(call, left, right)


def bilinear(call: Call, left: str, right: str) -> Semantics:
    """A matrix product of two values, which sums the last axis of the first; of two vectors, all."""
    matrices = min(len(call.shape(left)), len(call.shape(right))) >= 2 and len(call.shape(left)) == call.rank
    return Bilinear((left, right), summed=(-1, -2) if matrices and len(call.shape(right)) == call.rank else None)


def recurrent(call: Call) -> Semantics:
    """lstm, gru, rnn_tanh, rnn_relu: their first layer reads the input through weight_ih and bias_ih, per direction."""
    if "batch_sizes" in call:
        return Opaque("packed-sequence", "it reads a packed sequence, whose order depends on the lengths")
    directions, layers, biases = 1 + bool(call["bidirectional"]), call["num_layers"], bool(call["has_biases"])
    if call["train"] and call["dropout"]:
        return OPAQUE
    each = len(call["params"]) // (layers * directions)
    weights = tuple((f"params.{i * each}", f"params.{i * each + 2}" if biases else None) for i in range(directions))
    slots = [slot for pair in weights for slot in pair if slot is not None]
    return Recurrent("input", weights, call.constant) if constant_operands(call, *slots) else OPAQUE
