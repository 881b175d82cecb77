"""THE table: what every ATen operator does to an Affine. Only this module knows ATen.

A row is the operator's name and a function from a call to its semantics. To add an operator, add a row (and a case to
``tests/test_aten.py``). An operator without a row is Unknown: nothing passes, and the ledger says which one it was.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch._ops import OpOverload

from bnfold.aten.common import OPAQUE, Row
from bnfold.aten.contraction import addmm, conv_transpose, convolution, einsum, linear, matmul, recurrent
from bnfold.aten.moving import (
    cast,
    chosen,
    dropout,
    embedding,
    extremum,
    masked,
    max_pool,
    max_pool_with_indices,
    maximum,
    mean,
    move,
    pad,
    pool,
    prelu,
    relu,
    same,
    sdpa,
    total,
    upsample,
)
from bnfold.aten.scaling import (
    additive,
    batch_norm,
    div,
    instance_norm,
    layer_norm,
    mul,
    native_batch_norm,
    neg,
    per_channel,
    rsub,
)
from bnfold.semantics import (
    Average,
    Homogeneous,
    Movement,
    No,
    Product,
    Refused,
    Scaling,
    Semantics,
    ShapeOnly,
    Sum,
    Unknown,
)
from bnfold.semantics.call import Call
from bnfold.semantics.sizes import UnknownSizeError


def _row(semantics: Semantics) -> Row:
    return lambda call: semantics


def _rows(names: str, row: Row) -> Iterable[tuple[str, Row]]:
    return ((f"aten.{name}", row) for name in names.split())


def shape_only(call: Call) -> Semantics:
    """Reads the shape of its first operand."""
    return ShapeOnly(next(slot for slot, _ in call.slots()))


TABLE: dict[str, Row] = dict(
    [
        # Scaling: multiplies and adds constants
        *_rows("batch_norm", batch_norm),
        *_rows("_native_batch_norm_legit_no_training native_batch_norm", native_batch_norm),
        *_rows("instance_norm", instance_norm),
        *_rows("mul multiply", mul),
        *_rows("div divide true_divide", div),
        *_rows("add", additive(+1.0)),
        *_rows("sub subtract", additive(-1.0)),
        *_rows("rsub", rsub),
        *_rows("neg negative", neg),
        # Contraction: linear in its data, with a constant weight
        *_rows("conv1d conv2d conv3d convolution", convolution),
        *_rows("conv_transpose1d conv_transpose2d conv_transpose3d", conv_transpose),
        *_rows("linear", linear),
        *_rows("addmm", addmm),
        *_rows("matmul mm bmm", matmul),
        *_rows("einsum", einsum),
        *_rows("lstm gru rnn_tanh rnn_relu", recurrent),
        # Movement: moves elements and changes none
        *_rows("view reshape _unsafe_view flatten unflatten view_as reshape_as ravel", move),
        *_rows("permute transpose t swapaxes swapdims movedim moveaxis numpy_T mT adjoint", move),
        *_rows("squeeze unsqueeze expand expand_as repeat repeat_interleave tile broadcast_to", move),
        *_rows("slice select narrow split split_with_sizes chunk unbind tensor_split unsafe_split unsafe_chunk", move),
        *_rows("cat concat concatenate stack hstack vstack flip roll rot90 unfold im2col", move),
        *_rows("pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle", move),
        *_rows("index index_select gather take_along_dim", move),
        *_rows("pad constant_pad_nd", pad),
        *_rows("reflection_pad1d reflection_pad2d reflection_pad3d", move),
        *_rows("replication_pad1d replication_pad2d replication_pad3d", move),
        *_rows("clone contiguous detach alias lift_fresh_copy positive", same),
        *_rows("to _to_copy", cast),
        *_rows("dropout feature_dropout alpha_dropout feature_alpha_dropout", dropout),
        *_rows("embedding", embedding),
        # Average: a weighted mean
        *_rows("avg_pool1d avg_pool2d avg_pool3d", pool),
        *_rows("adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d", pool),
        *_rows("_adaptive_avg_pool2d _adaptive_avg_pool3d", pool),
        *_rows("mean", mean),
        *_rows("sum", total),
        *_rows("upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d", upsample),
        *_rows("upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d", upsample),
        *_rows("_upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d", upsample),
        *_rows("_upsample_bilinear2d_aa _upsample_bicubic2d_aa", upsample),
        *_rows("scaled_dot_product_attention", sdpa),
        # Homogeneous: a positive scale passes
        *_rows("relu leaky_relu abs", relu),
        *_rows("prelu", prelu),
        *_rows("max_pool1d max_pool2d max_pool3d", max_pool),
        *_rows("max_pool2d_with_indices max_pool3d_with_indices", max_pool_with_indices),
        *_rows("adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d", max_pool_with_indices),
        *_rows("amax amin", extremum),
        *_rows("where", chosen),
        *_rows("masked_fill", masked),
        *_rows("maximum minimum", maximum),
        # Normalised: an affine after it goes into its own constants
        *_rows("layer_norm", layer_norm),
        *_rows("group_norm", per_channel),
        # Read for their shape alone
        *_rows("sym_size sym_numel sym_stride sym_is_contiguous _assert_tensor_metadata", shape_only),
        *_rows("zeros_like ones_like full_like empty_like rand_like randn_like", shape_only),
        *_rows("new_zeros new_ones new_full new_empty", shape_only),
        # Known to let nothing pass
        *_rows("relu6 hardtanh clamp clamp_min clamp_max clip hardswish hardsigmoid hardshrink", _row(OPAQUE)),
        *_rows("gelu silu mish elu selu celu sigmoid log_sigmoid tanh softplus", _row(OPAQUE)),
        *_rows("exp log sqrt rsqrt pow square reciprocal erf sin cos var std", _row(OPAQUE)),
        *_rows("softmax log_softmax rms_norm native_layer_norm native_group_norm", _row(OPAQUE)),
    ]
)  # fmt: skip


def semantics(call: Call) -> Semantics:
    """What the operator of a call does to an Affine."""
    # A BatchNorm among what is refused is still one that stays, and the ledger says so.
    kind = "batch_norm" if call.operator.endswith(("batch_norm", "instance_norm")) else ""
    if call.graph.is_frozen(call.value):
        return Refused("in-place", "an in-place operator shares its storage", kind)
    row = TABLE.get(call.operator)
    if row is None:
        return Unknown()
    try:
        if isinstance(call.node.target, OpOverload) and (numbers := call.takes_number()):
            return _by_number(call, numbers)
        found = row(call)
    except UnknownSizeError as error:
        return Refused("dynamic-size", str(error), kind)
    if isinstance(found, ShapeOnly):
        return found
    if isinstance(found, Homogeneous) and call.item:
        return found  # which elements it chose
    return _of_one_dtype(call, found) if call.graph.is_float(call.value) else OPAQUE


def _by_number(call: Call, slots: list[str]) -> Semantics:
    """An operator with a symbolic number for a tensor or a factor: a scale passes multiples, nothing the rest."""
    name = call.operator.removeprefix("aten.")
    multiple = name in ("mul", "multiply") or (name in ("div", "divide", "true_divide") and slots == ["other"])
    data = next((slot for slot in ("self", "other") if slot not in slots), None)
    if not multiple or data is None or call.arguments.get("rounding_mode") is not None:
        return OPAQUE
    return _of_one_dtype(call, Homogeneous((data,), any_sign=True))


def _of_one_dtype(call: Call, found: Semantics) -> Semantics:
    """What holds of operands of the result's dtype; of another it can be rounded to, no rule does but a cast's."""
    graph = call.graph
    if isinstance(found, Scaling):
        data = call.at(found.slot)
        if graph.is_frozen(data):
            return replace(found, stays=No("in-place", "what it reads is written to later"))
        if graph.dtype(data) != graph.dtype(call.value):
            why = f"{graph.dtype(data)} becomes {graph.dtype(call.value)}"
            return replace(found, stays=No("dtype", why))
    elif isinstance(found, Movement | Average | Sum | Product | Homogeneous):
        slots = (found.slot,) if isinstance(found, Average) else found.slots
        if any(graph.dtype(call.at(slot)) != graph.dtype(call.value) for slot in slots):
            return Refused("dtype", "its operands are of several dtypes", "")
    return found
