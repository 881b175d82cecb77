"""Rows of the table that are longer than a line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, fx

from bnfold.semantics import Average, Geometry, Homogeneous, Movement, Opaque, Recurrent, Semantics, build
from bnfold.semantics.build import OPAQUE
from bnfold.semantics.moving import reshaped

if TYPE_CHECKING:
    from bnfold.semantics.call import Call

STATISTICS = ("weight", "bias", "running_mean", "running_var")
#: A number per spatial axis, None for one that differs with the size of the input.
PerAxis = tuple[int | None, ...]


# -- contractions ------------------------------------------------------------------------------------------------------


def _per_axis(call: Call, name: str, axes: int) -> PerAxis:
    """An argument that gives one number per spatial axis, or one for all; None for one that no size settles."""
    given = call.arguments.get(name)
    values = [] if given is None else list(given) if isinstance(given, (list, tuple)) else [given]
    settled = [call.graph.settled(value) if isinstance(value, fx.Node) else value for value in values]
    return tuple(settled * axes if len(settled) == 1 else settled)


def _geometry(
    stride: PerAxis, padding: PerAxis, dilation: PerAxis, *, transposed: bool = False, output_padding: PerAxis = ()
) -> Geometry | None:
    """How a convolution walks; None where one of the numbers is not the same at every size."""
    given = [stride, padding, dilation, output_padding]
    known = [tuple(n for n in each if n is not None) for each in given]
    walk, padding_of, spread, more = known
    return Geometry(walk, padding_of, spread, transposed, more) if known == given else None


def convolution(call: Call) -> Semantics:
    """conv1d/2d/3d; core ATen's ``convolution`` may be transposed."""
    if call.arguments.get("transposed"):
        return conv_transpose(call)
    kernel = call.shape("weight")[2:]
    spatial, padding = len(kernel), call["padding"]
    stride, dilation = _per_axis(call, "stride", spatial), _per_axis(call, "dilation", spatial)
    if isinstance(padding, str):
        total = [0 if padding == "valid" else (d or 1) * (k - 1) for d, k in zip(dilation, kernel)]
        padded, even = any(total), all(n % 2 == 0 for n in total)
        walk = _geometry(stride, tuple(n // 2 for n in total), dilation) if even else None
    else:
        amounts = _per_axis(call, "padding", spatial)
        padded, walk = any(n != 0 for n in amounts), _geometry(stride, amounts, dilation)
    return build.convolution(call, "input", "weight", "bias", call["groups"], walk, transposed=False, padded=padded)


def conv_transpose(call: Call) -> Semantics:
    """conv_transpose1d/2d/3d."""
    names, spatial = ("stride", "padding", "dilation", "output_padding"), len(call.shape("weight")) - 2
    stride, padding, dilation, more = (_per_axis(call, name, spatial) for name in names)
    walk = _geometry(stride, padding, dilation, transposed=True, output_padding=more)
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
    """``x @ W`` or ``W @ x`` with a constant W, a mean of values weighted by a softmax, or a product of two values."""
    right = "mat2" if "mat2" in call else "other"
    return build.matmul(call, "self", right, rows_sum_to_one=_rows_sum_to_one(call, call["self"]))


#: Operators that keep rows together where they keep the length of the last axis.
_ROW_KEEPING = {
    *("aten.view", "aten.reshape", "aten._unsafe_view", "aten.expand", "aten.flatten", "aten.unflatten"),
    *("aten.squeeze", "aten.unsqueeze", "aten.clone", "aten.contiguous", "aten.to", "aten.detach", "aten.alias"),
}


def _rows_sum_to_one(call: Call, value: Any) -> bool:
    while True:
        made = call.graph.call(value)
        name = made.operator
        if call.graph.is_frozen(value):
            return False  # a row that was written to sums to anything
        if name in ("aten.softmax", "aten._softmax"):
            return bool(made["dim"] % len(made.out_shape) == len(made.out_shape) - 1)
        if name not in _ROW_KEEPING or not made.shape("self") or made.shape("self")[-1] != made.out_shape[-1]:
            return False
        value = made["self"]


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
    return Recurrent("input", weights, call.constant) if all(map(call.is_constant, slots)) else OPAQUE


# -- averages and maxima -----------------------------------------------------------------------------------------------


def sdpa(call: Call) -> Semantics:
    """scaled_dot_product_attention commutes with an affine on its values."""
    ndim = len(call.out_shape)
    same = call.shape("value")[:-2] == call.out_shape[:-2]
    weights = (call["query"], call["key"], call["attn_mask"])
    if call["enable_gqa"] or float(call["dropout_p"]) != 0.0 or not same or call["value"] in weights:
        return OPAQUE
    return Average("value", (ndim - 2,), ndim, no_shift=None if _every_query_sees_a_key(call) else "zero-padding")


def _every_query_sees_a_key(call: Call) -> bool:
    # Where a mask hides every key the output is zero: there the weights do not sum to one.
    if call["attn_mask"] is None:
        return True
    mask = call.constant("attn_mask")
    if mask is None:
        return False
    seen = mask if mask.dtype == torch.bool else mask != -torch.inf
    return bool(seen.any(-1).all())


def pool(call: Call) -> Semantics:
    """avg_pool1d/2d/3d and adaptive_avg_pool1d/2d/3d."""
    dims = int(call.operator[-2])
    axes = tuple(range(call.rank - dims, call.rank))
    given, padding = _per_axis(call, "kernel_size", dims), _per_axis(call, "padding", dims)
    if not given:  # adaptive
        return Average("self", axes, call.rank)
    window = tuple(n for n in given if n is not None)
    if len(window) < len(given):
        return OPAQUE
    return build.pool(
        call, "self", axes, window, _geometry(_per_axis(call, "stride", dims) or window, padding, (1,) * dims),
        padded=any(n != 0 for n in padding), counts=bool(call.arguments.get("count_include_pad")),
        ceil=bool(call.arguments.get("ceil_mode")), divisor=call.arguments.get("divisor_override"),
    )  # fmt: skip


def reduced(call: Call, kind: build.Reduction) -> Semantics:
    """mean, sum, amax and amin over some axes, or over all."""
    ndim, dims = len(call.shape("self")), call.arguments.get("dim")
    dims = [dims] if isinstance(dims, int) else dims
    axes = tuple(d % ndim for d in dims) if dims and ndim else tuple(range(ndim))  # a number has dims 0 and -1 too
    return build.reduced(call, "self", axes, kind, keep=bool(call.arguments.get("keepdim", False)))


def max_pool(call: Call) -> Semantics:
    """Max pools, adaptive or not: padding is -inf, so shifts pass. Which elements they chose an affine leaves as is."""
    ndim, dims = len(call.shape("self")), next(n for n in (1, 2, 3) if f"{n}d" in call.operator)
    return Homogeneous(("self",), tuple(range(ndim - dims, ndim)), shifts=True)


def masked(call: Call) -> Semantics:
    """masked_fill with zeros."""
    zero = build.is_zero(call, "value") and call.shape("self") == call.out_shape
    return Homogeneous(("self",), any_sign=True) if zero else OPAQUE


# -- movements ---------------------------------------------------------------------------------------------------------

#: Operators that keep elements in their order.
_RESHAPES = {"view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_as", "reshape_as", "ravel"}
#: Operators whose numbers are sizes of the result: where elements go then follows from the shapes.
_SIZES = {"view", "reshape", "_unsafe_view", "unflatten", "flatten", "expand", "broadcast_to"}
#: Those whose numbers are positions along the axes named by one of these arguments.
_POSITIONS = {
    "dim": {"slice", "select", "narrow", "split", "split_with_sizes", "unsafe_split", "tensor_split"},
    "dims": {"roll"}, "dimension": {"unfold"},
}  # fmt: skip


def move(call: Call) -> Semantics:
    """Runs the operator itself on indices; operands that it reads only for their shape do not move."""
    if call.arguments.get("dtype") is not None:
        return OPAQUE  # view(dtype) reads the bits as other numbers
    shape_only = ("other",) if "other" in call else ()
    slots = tuple(slot for slot, _ in call.slots() if slot not in shape_only and call.graph.is_float(call.at(slot)))
    others = [value for slot, value in call.slots() if slot not in (*slots, *shape_only)]
    if any(call.graph.number(value) is None and not call.graph.is_constant(value) for value in others):
        return OPAQUE  # where elements go depends on the inputs
    shapes = tuple(call.shape(slot) for slot in slots)
    if not slots or any(size == 0 for shape in shapes for size in shape):
        return OPAQUE
    if "tensors" in call and not all(call.graph.is_float(value) for value in call["tensors"]):
        return OPAQUE  # an integer that is joined to the rest is no position
    joins = call.arguments.get("dim", 0) % len(call.out_shape) if call.operator == "aten.cat" else None
    loose = _loose(call, len(shapes[0]), shapes[0])
    if call.operator.removeprefix("aten.") in _RESHAPES:
        apply = lambda parts: reshaped(parts[0], call.out_shape)  # noqa: E731
    else:
        apply = lambda parts: call.run(dict(zip(slots, parts)))  # noqa: E731
    kept = () if joins is None else tuple(axis for axis in range(len(call.out_shape)) if axis != joins)
    return Movement(slots, shapes, apply, shape_only, joins, kept, loose, get=call.constant)


def _loose(call: Call, ndim: int, shape: Sequence[int]) -> tuple[int, ...]:
    """The axes along which a number that is not the same at every size says where elements come from."""
    name = call.operator.removeprefix("aten.")
    everywhere = tuple(range(ndim))
    if name in _SIZES or not any(call.is_open(value) for _, value in call.slots()):
        return ()
    for argument, names in _POSITIONS.items():
        if name in names:
            axes = call[argument] if isinstance(call[argument], (list, tuple)) else [call[argument]]
            return tuple({axis % ndim for axis in axes}) or everywhere  # roll without dims
    if name in ("pad", "constant_pad_nd"):
        return tuple({ndim - 1 - i // 2 for i, amount in enumerate(call["pad"]) if call.is_open(amount)})
    if name in ("repeat", "tile"):
        times = call["repeats" if name == "repeat" else "dims"]
        last = dict(zip(reversed(everywhere), reversed(times)))
        return tuple(axis for axis, number in last.items() if call.is_open(number) and shape[axis] > 1)
    return everywhere


def pad(call: Call) -> Semantics:
    """Constant zero, reflect, replicate and circular padding; another constant is no movement."""
    constant = call.operator == "aten.constant_pad_nd" or call.arguments.get("mode", "constant") == "constant"
    if constant and call.arguments.get("value") not in (None, 0, 0.0):
        return OPAQUE
    found = move(call)
    if not constant or not isinstance(found, Movement):
        return found
    kept = tuple(range(len(call.out_shape) - len(call["pad"]) // 2))
    return replace(found, kept=kept, may_pad=any(call.is_open(amount) for amount in call["pad"]))


def usual_size(call: Call) -> Tensor | None:
    """The root mean square of a value per channel, where a BatchNorm reads it and knows: ``sqrt(mean**2 + var)``."""
    readers = (call.graph.call(reader) for reader in call.graph.readers(call.value) if reader.op == "call_function")
    norm = next((reader for reader in readers if reader.operator == "aten.batch_norm"), None)
    if norm is None or norm["input"] is not call.value:
        return None
    mean, variance = (norm.constant(name) for name in STATISTICS[2:])
    if mean is None or variance is None:
        return None
    return (mean.square() + variance).sqrt().reshape([-1 if axis == 1 else 1 for axis in range(len(call.out_shape))])


# -- normalisations ----------------------------------------------------------------------------------------------------

_FLAGS = {
    "aten.batch_norm": "training",
    "aten.native_batch_norm": "training",
    "aten._native_batch_norm_legit_no_training": "",
    "aten.instance_norm": "use_input_stats",
}


def batch_norm(call: Call) -> Semantics:
    """Eval-mode BatchNorm, and InstanceNorm with running statistics."""
    training = bool(call.arguments.get("training"))
    return build.normalisation(call, "input", STATISTICS, float(call["eps"]), batch_statistics=training)


def layer_norm(call: Call) -> Semantics:
    """A weight and a bias along the last axes."""
    axes = range(call.rank - len(call["normalized_shape"]), call.rank)
    return build.normalised(call, axes, "weight", "bias")


def normalisation_kind(call: Call) -> Literal["batch_norm", "instance_norm"] | None:
    """Which normalisation a call is, foldable or not; None for an instance_norm without running statistics."""
    if call.operator not in _FLAGS or call.item not in (None, 0):
        return None
    if "instance" not in call.operator:
        return "batch_norm"
    return "instance_norm" if _keeps_statistics(call) else None


def takes_batch_statistics(call: Call) -> bool:
    """Whether such a normalisation uses the statistics of the batch that it sees."""
    flag = _FLAGS[call.operator]
    return bool(flag and call[flag]) or not _keeps_statistics(call)


def _keeps_statistics(call: Call) -> bool:
    return all(call[name] is not None for name in STATISTICS[2:])
