"""THE table: what every ATen operator does to an Affine. Only this module knows ATen.

A row is the operator's name and a function from a call to its semantics. To add an operator, add a row (and a case to
``tests/test_aten.py``). An operator without a row is Unknown: nothing passes, and the ledger says which one it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bnfold.affine import Affine
from bnfold.semantics import (
    Average,
    Contraction,
    Homogeneous,
    Lookup,
    Movement,
    Opaque,
    Product,
    Refused,
    Same,
    Scaling,
    Semantics,
    ShapeOnly,
    Sum,
    Unknown,
)

if TYPE_CHECKING:
    from bnfold.graph import Call

Row = Callable[["Call"], Semantics]
OPAQUE = Opaque()


# -- Scaling -----------------------------------------------------------------------------------------------------------


def _normalisation(call: Call, axis_params: Sequence[str], batch_statistics: bool) -> Semantics:
    """``gamma*(x - mean)/sqrt(var + eps) + beta`` with stored statistics, along axis 1 of (N, C, ...)."""
    gamma, beta, mean, var = (call[name] for name in axis_params)
    if batch_statistics or mean is None or var is None:
        return Refused("batch-statistics", "it normalises with the statistics of the batch it sees", "batch_norm")
    if not all(call.graph.is_constant(value) for value in (gamma, beta, mean, var)):
        return Refused("not-constant", "its parameters are computed from the model's inputs", "batch_norm")
    ndim, eps = len(call.out_shape), float(call["eps"])
    params = {n: call.constant(n) if call[n] is not None else None for n in axis_params}
    weight, bias, running_mean, running_var = params.values()
    assert running_mean is not None
    assert running_var is not None
    bad = [name for name, value in params.items() if value is not None and not bool(value.isfinite().all())]
    if bad:
        channels = params[bad[0]].isfinite().logical_not().nonzero().flatten().tolist()  # type: ignore[union-attr]
        return Refused("nonfinite", f"{bad[0]} is NaN or infinite in channels {channels[:5]}", "batch_norm")
    if not bool((running_var + eps > 0).all()):
        channels = (running_var + eps <= 0).nonzero().flatten().tolist()
        return Refused("nonfinite", f"variance + eps is not positive in channels {channels[:5]}", "batch_norm")
    sigma = (running_var + eps).sqrt()
    scale = (torch.ones_like(sigma) if weight is None else weight) / sigma
    shift = (torch.zeros_like(sigma) if bias is None else bias) - running_mean * scale

    def write(new: Affine) -> Mapping[str, Tensor] | None:
        if set(new.varies()) - {1}:
            return None
        s, t = (part.flatten().expand(sigma.shape) for part in (new.scale, new.shift))
        return {axis_params[0]: s * sigma, axis_params[1]: t + s * running_mean}

    return Scaling("input", Affine.per_channel(scale, shift, ndim), "batch_norm", write)


def batch_norm(call: Call) -> Semantics:
    """Eval-mode BatchNorm."""
    return _normalisation(call, ("weight", "bias", "running_mean", "running_var"), bool(call["training"]))


def instance_norm(call: Call) -> Semantics:
    """InstanceNorm with running statistics is a BatchNorm in eval mode."""
    return _normalisation(call, ("weight", "bias", "running_mean", "running_var"), bool(call["use_input_stats"]))


def _constant_affine(
    call: Call, slot: str, affine: Callable[[Tensor], Affine], of: Callable[[Affine], Tensor | None], kind: str
) -> Semantics:
    other = "other" if slot == "self" else "self"
    constant = call.constant(other)
    assert constant is not None
    ndim = len(call.out_shape)
    if len(call.shape(slot)) != ndim or call.shape(slot) != call.out_shape:
        return OPAQUE  # the constant broadcasts the value: its elements are copied
    constant = constant.reshape((1,) * (ndim - constant.ndim) + tuple(constant.shape))
    if not bool(constant.isfinite().all()):
        return OPAQUE  # a mask of -inf is no affine

    def write(new: Affine) -> Mapping[str, Tensor] | None:
        value = of(new)
        return None if value is None or not bool(value.isfinite().all()) else {other: value}

    return Scaling(slot, affine(constant).compressed(), kind, write)


def mul(call: Call) -> Semantics:
    """By a constant: a Scaling. Of two values: a Product."""
    slot = _value_slot(call)
    if slot is None:
        return _pairwise(call, Product, ("self", "other"))

    def affine(c: Tensor) -> Affine:
        return Affine(c, torch.zeros((1,) * c.ndim, dtype=torch.float64))

    return _constant_affine(call, slot, affine, lambda new: None if new.has_shift else new.scale, "mul")


def div(call: Call) -> Semantics:
    """By a constant: a Scaling by its reciprocal. By a value: only the dividend lets a scale pass."""
    if call.arguments.get("rounding_mode") is not None:
        return OPAQUE
    slot = _value_slot(call)
    if slot != "self":
        return _pairwise(call, Product, ("self",)) if slot is None else OPAQUE

    def affine(c: Tensor) -> Affine:
        return Affine(1 / c, torch.zeros((1,) * c.ndim, dtype=torch.float64))

    return _constant_affine(call, slot, affine, lambda new: None if new.has_shift else 1 / new.scale, "div")


def _additive(sign: float) -> Row:
    def row(call: Call) -> Semantics:
        alpha = sign * float(call["alpha"]) if "alpha" in call else sign
        slot = _value_slot(call)
        if slot is None:
            return _pairwise(call, Sum, ("self", "other"), alpha=alpha)
        if slot == "other" and alpha != 1.0:
            # c - x: a scale of -1 and a shift; nothing can be written back into c alone.
            def flipped(c: Tensor) -> Affine:
                return Affine(torch.full((1,) * c.ndim, alpha, dtype=torch.float64), c)

            return _constant_affine(call, slot, flipped, lambda new: None, "add")
        factor = alpha if slot == "self" else 1.0

        def affine(c: Tensor) -> Affine:
            return Affine(torch.ones((1,) * c.ndim, dtype=torch.float64), c * factor)

        return _constant_affine(call, slot, affine, lambda new: None if new.has_scale else new.shift / factor, "add")

    return row


def _value_slot(call: Call) -> str | None:
    """The slot of the value that a constant is applied to; None where both are values."""
    for slot, other in (("self", "other"), ("other", "self")):
        if call.graph.is_constant(call[other]):
            return slot
    return None


def _pairwise(call: Call, kind: type[Sum] | type[Product], slots: tuple[str, ...], **options: Any) -> Semantics:
    shapes = tuple(call.shape(slot) for slot in slots)
    return kind(slots, shapes, len(call.out_shape), **options)  # type: ignore[arg-type]


# -- Contraction -------------------------------------------------------------------------------------------------------


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
    transposed: bool = False,
    no_shift: str | None = None,
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
        channels = call.out_shape[bias_axis]
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
    )


def _constant_operands(call: Call, *slots: str) -> bool:
    return all(call[slot] is None or call.graph.is_constant(call[slot]) for slot in slots)


def convolution(call: Call) -> Semantics:
    """conv1d/2d/3d: weight (Cout, Cin/G, k...), batched or not."""
    if not _constant_operands(call, "weight", "bias"):
        return OPAQUE
    out_channels, per_group, *kernel = call.shape("weight")
    groups, batched = call["groups"], len(call.out_shape) - len(kernel) - 1
    lead, tail = ("",) * batched, ("",) * len(kernel)
    padding = call["padding"]
    if isinstance(padding, str):
        padded = padding != "valid" and prod(kernel) > 1
    else:
        padded = any(p != 0 for p in call.concrete("padding"))
    return _contraction(
        call, "input", "weight",
        view=(groups, out_channels // groups, per_group, *kernel), letters="goi" + "xyz"[: len(kernel)],
        out=(*lead, "go", *tail), inp=(*lead, "gi", *tail),
        bias="bias", bias_axis=batched, no_shift="zero-padding" if padded else None,
    )  # fmt: skip


def conv_transpose(call: Call) -> Semantics:
    """conv_transpose1d/2d/3d: weight (Cin, Cout/G, k...); its borders see fewer taps, so no shift comes in."""
    if not _constant_operands(call, "weight", "bias"):
        return OPAQUE
    in_channels, per_group, *kernel = call.shape("weight")
    groups, batched = call["groups"], len(call.out_shape) - len(kernel) - 1
    lead, tail = ("",) * batched, ("",) * len(kernel)
    return _contraction(
        call, "input", "weight",
        view=(groups, in_channels // groups, per_group, *kernel), letters="gio" + "xyz"[: len(kernel)],
        out=(*lead, "go", *tail), inp=(*lead, "gi", *tail),
        bias="bias", bias_axis=batched, no_shift="zero-padding",
    )  # fmt: skip


def linear(call: Call) -> Semantics:
    """``x @ W.T + b``: weight (out_features, in_features), the last axis of x."""
    if not _constant_operands(call, "weight", "bias") or len(call.shape("weight")) != 2:
        return OPAQUE
    lead = ("",) * (len(call.out_shape) - 1)
    return _contraction(
        call, "input", "weight", view=call.shape("weight"), letters="oi", out=(*lead, "o"), inp=(*lead, "i"),
        bias="bias", bias_axis=len(lead),
    )  # fmt: skip


def addmm(call: Call) -> Semantics:
    """``beta*C + alpha*(x @ W)``: C takes the shift; alpha stays, beta is divided out."""
    if not _constant_operands(call, "self", "mat2") or call["beta"] == 0 or call["alpha"] == 0:
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
    from dataclasses import replace

    return replace(semantics, get_weight=lambda: get() * alpha, set_weight=lambda w: put(w / alpha))


def matmul(call: Call) -> Semantics:
    """``x @ W`` or ``W @ x`` with a constant W; an average over values where the left side is a softmax."""
    left, right = (call.operator in ("aten.mm", "aten.bmm") and "mat2") or "other", "self"
    right, left = left, right
    a, b, out = call.shape(left), call.shape(right), call.out_shape
    if call.graph.is_constant(call[right]):
        data, weight, side, other = left, right, "io", a
    elif call.graph.is_constant(call[left]):
        data, weight, side, other = right, left, "oi", b
    else:
        return _attention(call, left, right)
    shape = call.shape(weight)
    if len(shape) < 2 or len(other) < 2 or len(other) != len(out):
        return OPAQUE
    batch = "abcdef"[: len(shape) - 2]
    if len(shape) - 2 > len(out) - 2 or len(shape) > 8:
        return OPAQUE
    lead = [""] * (len(out) - len(shape)) + [
        letter if size == out[len(out) - len(shape) + i] and size == other[len(out) - len(shape) + i] else "?"
        for i, (letter, size) in enumerate(zip(batch, shape))
    ]
    if any(letter == "?" and size != 1 for letter, size in zip(lead[len(out) - len(shape) :], shape)):
        return OPAQUE
    known = tuple("" if letter == "?" else letter for letter in lead)
    mine = "".join(letter for letter in known if letter)
    view = [n for n, letter in zip(shape, lead[len(out) - len(shape) :]) if letter != "?"] + list(shape[-2:])
    rows_out, rows_in = (("", "o"), ("", "i")) if side == "io" else (("o", ""), ("i", ""))
    return _contraction(
        call, data, weight, view=view, letters=mine + side, out=(*known, *rows_out), inp=(*known, *rows_in),
    )  # fmt: skip


def einsum(call: Call) -> Semantics:
    """One constant operand, no ellipsis, no letter twice in an operand."""
    equation = call["equation"].replace(" ", "")
    tensors = call["tensors"]
    if len(tensors) != 2 or "." in equation or "->" not in equation:
        return OPAQUE
    terms, output = equation.split("->")
    parts = terms.split(",")
    constants = [i for i, tensor in enumerate(tensors) if call.graph.is_constant(tensor)]
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


# -- Average -----------------------------------------------------------------------------------------------------------


def _attention(call: Call, weights: str, values: str) -> Semantics:
    """``softmax(...) @ V``: every output row is a weighted mean of V's rows, with weights that sum to one."""
    ndim = len(call.out_shape)
    if len(call.shape(values)) != ndim or not _row_stochastic(call, call[weights]):
        return OPAQUE
    if call.shape(values)[:-2] != call.out_shape[:-2]:
        return OPAQUE
    return Average(values, (ndim - 2,), ndim)


def _row_stochastic(call: Call, value: Any) -> bool:
    while True:
        made = call.graph.call(value)
        name = made.operator
        if name in ("aten.softmax", "aten._softmax"):
            return bool(made["dim"] % len(made.out_shape) == len(made.out_shape) - 1)
        shapes = ("aten.view", "aten.reshape", "aten._unsafe_view", "aten.expand", "aten.flatten", "aten.unflatten")
        same = ("aten.clone", "aten.contiguous", "aten.to", "aten.detach", "aten.alias", "aten.type_as")
        if name not in shapes + same or not made.shape("self") or made.shape("self")[-1] != made.out_shape[-1]:
            return False
        value = made["self"]


def sdpa(call: Call) -> Semantics:
    """scaled_dot_product_attention commutes with an affine on its values."""
    ndim = len(call.out_shape)
    same = call.shape("value")[:-2] == call.out_shape[:-2]
    if call["enable_gqa"] or float(call["dropout_p"]) != 0.0 or not same:
        return OPAQUE
    return Average("value", (ndim - 2,), ndim)


def pool(call: Call) -> Semantics:
    """avg_pool1d/2d/3d and adaptive_avg_pool1d/2d/3d."""
    ndim = len(call.out_shape)
    dims = int(call.operator[-2])
    counted = any(p != 0 for p in _listed(call, "padding")) and bool(call.arguments.get("count_include_pad", False))
    divisor = call.arguments.get("divisor_override")
    kernel = _listed(call, "kernel_size")
    window = prod(kernel) if len(kernel) == dims else prod(kernel) ** dims
    padded = any(p != 0 for p in _listed(call, "padding"))
    partial = padded or bool(call.arguments.get("ceil_mode", False))
    one = not counted if divisor is None else (divisor == window and not partial)
    return Average("self", tuple(range(ndim - dims, ndim)), ndim, sums_to_one=one)


def _listed(call: Call, name: str) -> list[int]:
    value = call.concrete(name) if name in call else []
    return [value] if isinstance(value, int) else list(value or [])


def _mean(sums_to_one: bool) -> Row:
    def row(call: Call) -> Semantics:
        ndim = len(call.shape("self"))
        dims = call.arguments.get("dim")
        dims = [dims] if isinstance(dims, int) else dims
        axes = tuple(d % ndim for d in dims) if dims else tuple(range(ndim))
        keep = bool(call.arguments.get("keepdim", False))
        return Average("self", axes, ndim, drops=not keep, sums_to_one=sums_to_one)

    return row


def upsample(call: Call) -> Semantics:
    """nearest, linear, bilinear, bicubic, trilinear, with or without antialiasing: weights sum to one."""
    ndim = len(call.out_shape)
    slot = "input" if "input" in call else "self"
    return Average(slot, tuple(range(2, ndim)), ndim)


# -- Movement ----------------------------------------------------------------------------------------------------------


def move(call: Call) -> Semantics:
    """Runs the operator itself on indices; operands that it reads only for their shape do not move."""
    ignored = tuple(slot for slot in ("other", "tensors") if slot == "other" and "other" in call)
    slots = tuple(slot for slot, _ in call.slots() if slot not in ignored and call.graph.is_float(call.at(slot)))
    shapes = tuple(call.shape(slot) for slot in slots)
    if not slots or any(size == 0 for shape in shapes for size in shape):
        return OPAQUE
    return Movement(slots, shapes, lambda parts: call.run(dict(zip(slots, parts))), ignored)


def pad(call: Call) -> Semantics:
    """Constant zero, reflect, replicate and circular padding; another constant is no movement."""
    constant = call.operator == "aten.constant_pad_nd" or call.arguments.get("mode", "constant") == "constant"
    value = call.arguments.get("value")
    return OPAQUE if constant and value not in (None, 0, 0.0) else move(call)


def cast(call: Call) -> Semantics:
    """A cast that loses nothing leaves every element where it is; a narrowing one rounds."""
    slot = "self"
    if not (call.graph.is_float(call[slot]) and call.graph.is_float(call.value)):
        return OPAQUE
    wide, narrow = call.graph.dtype(call.value), call.graph.dtype(call[slot])
    exact = torch.promote_types(wide, narrow) == wide
    return Same(slot) if exact else OPAQUE


def same(call: Call) -> Semantics:
    """Every element stays where it is."""
    return Same("self" if "self" in call else "input")


def dropout(call: Call) -> Semantics:
    """Dropout in eval mode."""
    return OPAQUE if call["train"] else Same("input")


def embedding(call: Call) -> Semantics:
    """Rows of a constant table."""
    return Lookup("weight") if _constant_operands(call, "weight") else OPAQUE


# -- Homogeneous -------------------------------------------------------------------------------------------------------


def relu(call: Call) -> Semantics:
    """relu and leaky_relu: ``f(s*x) = s*f(x)`` for s > 0."""
    return Homogeneous(("self",))


def prelu(call: Call) -> Semantics:
    """PReLU with a constant slope."""
    return Homogeneous(("self",)) if _constant_operands(call, "weight") else OPAQUE


def max_pool(call: Call) -> Semantics:
    """max_pool1d/2d/3d and adaptive_max_pool: padding is -inf, so shifts pass."""
    ndim, dims = len(call.out_shape), int(call.operator[-2])
    return Homogeneous(("self",), tuple(range(ndim - dims, ndim)), shifts=True)


def maximum(call: Call) -> Semantics:
    """Elementwise maximum or minimum of two values of one shape."""
    if call.graph.is_constant(call["self"]) or call.graph.is_constant(call["other"]):
        return OPAQUE
    return Homogeneous(("self", "other"), shifts=True) if call.shape("self") == call.shape("other") else OPAQUE


def _row(semantics: Semantics) -> Row:
    return lambda call: semantics


def _rows(names: str, row: Row) -> Iterable[tuple[str, Row]]:
    return ((f"aten.{name}", row) for name in names.split())


TABLE: dict[str, Row] = dict(
    [
        # Scaling: multiplies and adds constants
        *_rows("batch_norm", batch_norm),
        *_rows("instance_norm", instance_norm),
        *_rows("mul multiply", mul),
        *_rows("div divide true_divide", div),
        *_rows("add", _additive(+1.0)),
        *_rows("sub subtract", _additive(-1.0)),
        # Contraction: linear in its data, with a constant weight
        *_rows("conv1d conv2d conv3d", convolution),
        *_rows("conv_transpose1d conv_transpose2d conv_transpose3d", conv_transpose),
        *_rows("linear", linear),
        *_rows("addmm", addmm),
        *_rows("matmul mm bmm", matmul),
        *_rows("einsum", einsum),
        # Movement: moves elements and changes none
        *_rows("view reshape _unsafe_view flatten unflatten view_as reshape_as ravel", move),
        *_rows("permute transpose t swapaxes swapdims movedim moveaxis numpy_T mT adjoint", move),
        *_rows("squeeze unsqueeze expand expand_as repeat repeat_interleave tile broadcast_to", move),
        *_rows("slice select narrow split split_with_sizes chunk unbind tensor_split unsafe_split unsafe_chunk", move),
        *_rows("cat concat concatenate stack hstack vstack flip roll rot90 unfold im2col", move),
        *_rows("pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle", move),
        *_rows("pad constant_pad_nd", pad),
        *_rows("reflection_pad1d reflection_pad2d reflection_pad3d", move),
        *_rows("replication_pad1d replication_pad2d replication_pad3d", move),
        *_rows("clone contiguous detach alias lift_fresh_copy positive", same),
        *_rows("to _to_copy type_as", cast),
        *_rows("dropout feature_dropout alpha_dropout feature_alpha_dropout", dropout),
        *_rows("embedding", embedding),
        # Average: a weighted mean
        *_rows("avg_pool1d avg_pool2d avg_pool3d", pool),
        *_rows("adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d", pool),
        *_rows("mean", _mean(sums_to_one=True)),
        *_rows("sum", _mean(sums_to_one=False)),
        *_rows("upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d", upsample),
        *_rows("upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d", upsample),
        *_rows("_upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d", upsample),
        *_rows("_upsample_bilinear2d_aa _upsample_bicubic2d_aa", upsample),
        *_rows("scaled_dot_product_attention", sdpa),
        # Homogeneous: a positive scale passes
        *_rows("relu leaky_relu", relu),
        *_rows("prelu", prelu),
        *_rows("max_pool1d max_pool2d max_pool3d", max_pool),
        *_rows("maximum minimum", maximum),
        # Read for their shape alone
        *_rows("sym_size sym_numel sym_stride sym_is_contiguous _assert_tensor_metadata", lambda c: ShapeOnly(_first(c))),
        *_rows("zeros_like ones_like full_like empty_like rand_like randn_like new_zeros new_ones new_full new_empty",
               lambda c: ShapeOnly(_first(c))),
        # Known to let nothing pass
        *_rows("relu6 hardtanh clamp clamp_min clamp_max clip hardswish hardsigmoid hardshrink", _row(OPAQUE)),
        *_rows("gelu silu mish elu selu celu sigmoid logsigmoid tanh softplus exp log sqrt rsqrt pow erf abs", _row(OPAQUE)),
        *_rows("softmax log_softmax layer_norm group_norm rms_norm native_layer_norm native_group_norm", _row(OPAQUE)),
    ]
)  # fmt: skip


def _first(call: Call) -> str:
    return next(slot for slot, _ in call.slots())


def semantics(call: Call) -> Semantics:
    """What the operator of a call does to an Affine."""
    row = TABLE.get(call.operator)
    if row is None or call.graph.is_frozen(call.value):
        return (
            Refused("in-place", "an in-place operator shares its storage", "")
            if call.graph.is_frozen(call.value)
            else Unknown()
        )
    return row(call)
