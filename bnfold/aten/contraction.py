"""Rows for operators with a constant weight."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bnfold.aten.common import OPAQUE, constant_operands, geometry, per_axis
from bnfold.aten.moving import attention
from bnfold.semantics import Bilinear, Geometry, Recurrent, Refused, Semantics, build

if TYPE_CHECKING:
    from bnfold.graph.call import Call


def convolution(call: Call) -> Semantics:
    """conv1d/2d/3d: weight (Cout, Cin/G, k...), batched or not; core ATen's ``convolution`` may be transposed."""
    if call.arguments.get("transposed"):
        return conv_transpose(call)
    if not constant_operands(call, "weight", "bias"):
        return OPAQUE
    out_channels, per_group, *kernel = call.shape("weight")
    groups, batched = call["groups"], len(call.out_shape) - len(kernel) - 1
    lead, tail = ("",) * batched, ("",) * len(kernel)
    spatial = len(kernel)
    stride, dilation = per_axis(call, "stride", spatial), per_axis(call, "dilation", spatial)
    padding = call["padding"]
    if isinstance(padding, str):
        total = [0 if padding == "valid" else (d or 1) * (k - 1) for d, k in zip(dilation, kernel)]
        padded, even = any(total), all(n % 2 == 0 for n in total)
        walk = geometry(stride, tuple(n // 2 for n in total), dilation) if even else None
    else:
        amounts = per_axis(call, "padding", spatial)
        padded, walk = any(n != 0 for n in amounts), geometry(stride, amounts, dilation)
    return build.contraction(
        call, "input", "weight",
        view=(groups, out_channels // groups, per_group, *kernel), letters="goi" + "xyz"[: len(kernel)],
        out=(*lead, "go", *tail), inp=(*lead, "gi", *tail),
        bias="bias", bias_axis=batched, no_shift="zero-padding" if padded else None, geometry=walk,
    )  # fmt: skip


def conv_transpose(call: Call) -> Semantics:
    """conv_transpose1d/2d/3d: weight (Cin, Cout/G, k...); its borders see fewer taps, so no shift comes in."""
    if not constant_operands(call, "weight", "bias"):
        return OPAQUE
    in_channels, per_group, *kernel = call.shape("weight")
    groups, batched = call["groups"], len(call.out_shape) - len(kernel) - 1
    lead, tail = ("",) * batched, ("",) * len(kernel)
    stride, padding, dilation, more = (
        per_axis(call, name, len(kernel)) for name in ("stride", "padding", "dilation", "output_padding")
    )
    walk = geometry(stride, padding, dilation, transposed=True, output_padding=more)
    return build.contraction(
        call, "input", "weight",
        view=(groups, in_channels // groups, per_group, *kernel), letters="gio" + "xyz"[: len(kernel)],
        out=(*lead, "go", *tail), inp=(*lead, "gi", *tail),
        bias="bias", bias_axis=batched, no_shift="zero-padding", geometry=walk,
    )  # fmt: skip


def linear(call: Call) -> Semantics:
    """``x @ W.T + b``: weight (out_features, in_features), the last axis of x."""
    if not constant_operands(call, "weight", "bias") or len(call.shape("weight")) != 2:
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
    if call.graph.is_constant(call[right]):
        data, weight, letters, rows = left, right, "io", (("", "o"), ("", "i"))
    elif call.graph.is_constant(call[left]):
        data, weight, letters, rows = right, left, "oi", (("o", ""), ("i", ""))
    else:
        return attention(call, left, right) or bilinear(call, left, right)
    stored, given, out = call.shape(weight), call.shape(data), call.out_shape
    leading = len(stored) - 2
    if leading < 0 or len(given) < 2 or len(given) != len(out) or leading > len(out) - 2:
        return OPAQUE
    # A leading axis of the weight is one that data and output have too, or of size 1 and then of no concern.
    names = ["" if n == 1 else letter for n, letter in zip(stored, "abcdef")][:leading]
    known = ("",) * (len(out) - len(stored)) + tuple(names)
    if any(
        name and not n == m == k for name, n, m, k in zip(names, stored, out[-2 - leading :], given[-2 - leading :])
    ):
        return OPAQUE
    view = [n for n, name in zip(stored, names) if name] + list(stored[-2:])
    return build.contraction(
        call, data, weight, view=view, letters="".join(names) + letters, out=(*known, *rows[0]), inp=(*known, *rows[1]),
    )  # fmt: skip


def bilinear(call: Call, left: str, right: str) -> Semantics:
    """A matrix product of two values, which sums the last axis of the first; of two vectors, all."""
    matrices = min(len(call.shape(left)), len(call.shape(right))) >= 2 and len(call.shape(left)) == call.rank
    return Bilinear((left, right), summed=(-1, -2) if matrices and len(call.shape(right)) == call.rank else None)


def einsum(call: Call) -> Semantics:
    """One constant operand, no ellipsis, no letter twice in an operand; else a product of two values."""
    equation = call["equation"].replace(" ", "")
    tensors = call["tensors"]
    if len(tensors) != 2 or "." in equation or "->" not in equation:
        return OPAQUE
    terms, output = equation.split("->")
    parts = terms.split(",")
    constants = [i for i, tensor in enumerate(tensors) if call.graph.is_constant(tensor)]
    if not constants:
        return Bilinear(("tensors.0", "tensors.1"))
    if len(constants) != 1 or any(len(set(p)) != len(p) for p in [*parts, output]):
        return OPAQUE
    w = constants[0]
    letters, inp = parts[w], parts[1 - w]
    if set(inp) - set(output) - set(letters):
        return OPAQUE  # the data is also summed on its own
    return build.contraction(
        call, f"tensors.{1 - w}", f"tensors.{w}", view=call.shape(f"tensors.{w}"), letters=letters,
        out=tuple(c if c in letters else "" for c in output), inp=tuple(c if c in letters else "" for c in inp),
    )  # fmt: skip


def recurrent(call: Call) -> Semantics:
    """lstm, gru, rnn_tanh, rnn_relu: their first layer reads the input through weight_ih and bias_ih, per direction."""
    if "batch_sizes" in call:
        return Refused("packed-sequence", "it reads a packed sequence, whose order depends on the lengths", "")
    directions, layers, biases = 1 + bool(call["bidirectional"]), call["num_layers"], bool(call["has_biases"])
    if call["train"] and call["dropout"]:
        return OPAQUE
    each = len(call["params"]) // (layers * directions)
    weights = tuple((f"params.{i * each}", f"params.{i * each + 2}" if biases else None) for i in range(directions))
    slots = [slot for pair in weights for slot in pair if slot is not None]
    return Recurrent("input", weights, call.constant) if constant_operands(call, *slots) else OPAQUE
