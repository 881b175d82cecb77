"""Rows for operators with a constant weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from bnfold.aten.common import OPAQUE, constant_operands, geometry, per_axis
from bnfold.semantics import Bilinear, Contraction, Geometry, Semantics

if TYPE_CHECKING:
    from bnfold.graph.call import Call

from bnfold.aten.moving import attention


def _contraction(
    call: Call,
    data: str,
    weight: str,
    *,
    view: Sequence[int],
    letters: str,
    out: tuple[str, ...],
    inp: tuple[str, ...],
    bias: str | None = None,
    bias_axis: int | None = None,
    bias_scale: float = 1.0,
    no_shift: str | None = None,
    geometry: Geometry | None = None,
) -> Semantics:
    stored = call.shape(weight)
    ndim = len(out)

    def get_weight() -> Tensor:
        tensor = call.constant(weight)
        assert tensor is not None
        return tensor.reshape(tuple(view))

    def get_bias() -> Tensor | None:
        if bias is None or call[bias] is None:
            return None
        tensor = call.constant(bias)
        assert tensor is not None
        lead = (1,) * (ndim - tensor.ndim) if bias_axis is None else (1,) * bias_axis
        tail = () if bias_axis is None else (1,) * (ndim - bias_axis - 1)
        return tensor.reshape(lead + tuple(tensor.shape) + tail) * bias_scale

    def set_bias(value: Tensor) -> Mapping[str, Tensor] | None:
        if bias is None:
            return None
        if bias_axis is None:
            return {bias: value / bias_scale}
        channels = call.size(bias_axis)
        if any(n > 1 for axis, n in enumerate(value.shape) if axis != bias_axis):
            return None
        return {bias: value.flatten().expand(channels).clone()}

    return Contraction(
        data,
        weight,
        tuple(view),
        letters,
        out,
        inp,
        get_weight,
        lambda w: w.reshape(stored),
        get_bias,
        set_bias,
        no_shift,
        geometry,
    )


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
    return _contraction(
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
    return _contraction(
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
    return _contraction(
        call, "input", "weight", view=call.shape("weight"), letters="oi", out=(*lead, "o"), inp=(*lead, "i"),
        bias="bias", bias_axis=len(lead), geometry=Geometry(),
    )  # fmt: skip


def addmm(call: Call) -> Semantics:
    """``beta*C + alpha*(x @ W)``: C takes the shift; alpha stays, beta is divided out."""
    if not constant_operands(call, "self", "mat2") or call["beta"] == 0 or call["alpha"] == 0:
        return OPAQUE
    semantics = _contraction(
        call, "mat1", "mat2", view=call.shape("mat2"), letters="io", out=("", "o"), inp=("", "i"),
        bias="self", bias_scale=float(call["beta"]),
    )  # fmt: skip
    # W is used as alpha*W, and a shift that comes in from before passes through that product.
    return _scaled_weight(semantics, float(call["alpha"]))


def _scaled_weight(semantics: Semantics, alpha: float) -> Semantics:
    assert isinstance(semantics, Contraction)
    if alpha == 1.0:
        return semantics
    get, put = semantics.get_weight, semantics.set_weight
    return replace(semantics, get_weight=lambda: get() * alpha, set_weight=lambda w: put(w / alpha))


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
    return _contraction(
        call, data, weight, view=view, letters="".join(names) + letters, out=(*known, *rows[0]), inp=(*known, *rows[1]),
    )  # fmt: skip


def bilinear(call: Call, left: str, right: str) -> Semantics:
    """A product of two values that mixes their axes."""
    same = call.at(left) is call.at(right)
    return Bilinear((left, right), (call.shape(left), call.shape(right)), len(call.out_shape), square=same)


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
        return bilinear(call, "tensors.0", "tensors.1")
    if len(constants) != 1 or any(len(set(p)) != len(p) for p in [*parts, output]):
        return OPAQUE
    w = constants[0]
    letters, inp = parts[w], parts[1 - w]
    if set(inp) - set(output) - set(letters):
        return OPAQUE  # the data is also summed on its own
    return _contraction(
        call, f"tensors.{1 - w}", f"tensors.{w}", view=call.shape(f"tensors.{w}"), letters=letters,
        out=tuple(c if c in letters else "" for c in output), inp=tuple(c if c in letters else "" for c in inp),
    )  # fmt: skip
