"""THE table: what every ATen operator does to an Affine. Only this module knows ATen.

A row is the operator's name and a function from a call to its semantics. To add an operator, add a row (and a case to
``tests/test_aten.py``). An operator without a row is Unknown: nothing passes, and the ledger says which one it was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch._ops import OpOverload

from bnfold.aten import rows
from bnfold.semantics import Opaque, Semantics, ShapeOnly, build
from bnfold.semantics.build import OPAQUE
from bnfold.semantics.call import Call
from bnfold.semantics.moving import Average, Movement, Same
from bnfold.semantics.pointwise import Homogeneous, Product, Scaling, Sum
from bnfold.semantics.sizes import UnknownSizeError


def _first(call: Call) -> str:
    return next(slot for slot, _ in call.slots())


def _shape_only(call: Call) -> Semantics:
    return ShapeOnly((_first(call),))


def _added(call: Call, sign: float) -> Semantics:
    return build.added(call, "self", "other", sign * float(call.arguments.get("alpha", 1)))


def _div(call: Call) -> Semantics:
    rounds = call.arguments.get("rounding_mode") is not None  # and then it is no affine
    return OPAQUE if rounds else build.divided(call, "self", "other")


def _per_channel(call: Call) -> Semantics:
    return build.normalised(call, (1,), "weight", "bias")


def _upsample(call: Call) -> Semantics:
    ndim = len(call.out_shape)  # whatever the mode, its weights sum to one
    return Average("input" if "input" in call else "self", tuple(range(2, ndim)), ndim)


#: Names and what they do, by what holds of their gauges.
_ROWS: dict[str, Callable[[Call], Semantics]] = {
    # Scaling: multiplies and adds constants. With two values: Product, Sum.
    "batch_norm": rows.batch_norm,
    "_native_batch_norm_legit_no_training native_batch_norm": lambda c: rows.batch_norm(c) if c.item == 0 else OPAQUE,
    "instance_norm": lambda c: _per_channel(c) if c["use_input_stats"] else rows.batch_norm(c),
    "mul multiply": lambda c: build.multiplied(c, "self", "other"),
    "div divide true_divide": _div,
    "add": lambda c: _added(c, +1.0),
    "sub subtract": lambda c: _added(c, -1.0),
    "rsub": lambda c: build.added(c, "other", "self", -float(c["alpha"])),
    "neg negative": lambda c: build.negated(c, "self"),
    # Contraction: linear in its data, with a constant weight
    "conv1d conv2d conv3d convolution": rows.convolution,
    "conv_transpose1d conv_transpose2d conv_transpose3d": rows.conv_transpose,
    "linear": rows.linear,
    "addmm": rows.addmm,
    "matmul mm bmm": rows.matmul,
    "einsum": lambda c: build.einsum(c, c["equation"], [f"tensors.{i}" for i in range(len(c["tensors"]))]),
    "lstm gru rnn_tanh rnn_relu": rows.recurrent,
    "embedding": lambda c: build.lookup(c, "weight"),
    # Movement: moves elements and changes none
    "view reshape _unsafe_view flatten unflatten view_as reshape_as ravel": rows.move,
    "permute transpose t swapaxes swapdims movedim moveaxis numpy_T mT adjoint": rows.move,
    "squeeze unsqueeze expand expand_as repeat repeat_interleave tile broadcast_to": rows.move,
    "slice select narrow split split_with_sizes chunk unbind tensor_split unsafe_split unsafe_chunk": rows.move,
    "cat concat concatenate stack hstack vstack flip roll rot90 unfold im2col": rows.move,
    "pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle": rows.move,
    "index index_select gather take_along_dim": rows.move,
    "pad constant_pad_nd": rows.pad,
    "reflection_pad1d reflection_pad2d reflection_pad3d": rows.move,
    "replication_pad1d replication_pad2d replication_pad3d": rows.move,
    "clone contiguous detach alias lift_fresh_copy positive": lambda c: Same(_first(c)),
    "to _to_copy": lambda c: build.cast(c, "self", lambda: rows.usual_size(c)),
    "dropout feature_dropout alpha_dropout feature_alpha_dropout": lambda c: OPAQUE if c["train"] else Same("input"),
    # Average: a weighted mean
    "avg_pool1d avg_pool2d avg_pool3d": rows.pool,
    "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d": rows.pool,
    "mean": lambda c: rows.reduced(c, "mean"),
    "sum": lambda c: rows.reduced(c, "sum"),
    "upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d": _upsample,
    "upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d": _upsample,
    "_upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d": _upsample,
    "_upsample_bilinear2d_aa _upsample_bicubic2d_aa": _upsample,
    "scaled_dot_product_attention": rows.sdpa,
    # Homogeneous: a positive scale passes
    "relu": lambda c: Homogeneous(("self",), clips=True),
    "leaky_relu abs": lambda c: Homogeneous(("self",)),
    "prelu": lambda c: Homogeneous(("self",)) if c.is_constant("weight") else OPAQUE,
    "max_pool1d max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d": rows.max_pool,
    "max_pool2d_with_indices max_pool3d_with_indices": rows.max_pool,
    "amax amin": lambda c: rows.reduced(c, "extremum"),
    "where": lambda c: build.chosen(c, "self", "other") if "self" in c else OPAQUE,
    "masked_fill": rows.masked,
    "maximum minimum": lambda c: build.greatest(c, ("self", "other")),
    # Normalised: an affine after it goes into its own constants
    "layer_norm": rows.layer_norm,
    "group_norm": _per_channel,
    # Read for their shape alone
    "sym_size sym_numel sym_stride sym_is_contiguous _assert_tensor_metadata": _shape_only,
    "zeros_like ones_like full_like empty_like rand_like randn_like": _shape_only,
    "new_zeros new_ones new_full new_empty": _shape_only,
    # Known to let nothing pass
    "relu6 hardtanh clamp clamp_min clamp_max clip hardswish hardsigmoid hardshrink": lambda c: OPAQUE,
    "gelu silu mish elu selu celu sigmoid log_sigmoid tanh softplus": lambda c: OPAQUE,
    "exp log sqrt rsqrt pow square reciprocal erf sin cos var std": lambda c: OPAQUE,
    "softmax log_softmax rms_norm native_layer_norm native_group_norm": lambda c: OPAQUE,
}
TABLE = {f"aten.{name}": row for names, row in _ROWS.items() for name in names.split()}


def semantics(call: Call) -> Semantics:
    """What the operator of a call does to an Affine."""
    # A BatchNorm among what is refused is still one that stays, and the ledger says so.
    kind = "batch_norm" if call.operator.endswith(("batch_norm", "instance_norm")) else ""
    if call.graph.is_frozen(call.value):
        return Opaque("in-place", "an in-place operator shares its storage", kind)
    row = TABLE.get(call.operator)
    if row is None:
        return Opaque("unknown-operator")
    try:
        if isinstance(call.node.target, OpOverload) and (numbers := call.takes_number()):
            return _by_number(call, numbers)
        found = row(call)
    except UnknownSizeError as error:
        return Opaque("dynamic-size", str(error), kind)
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
            return replace(found, stays=Opaque("in-place", "what it reads is written to later"))
        if graph.dtype(data) != graph.dtype(call.value):
            why = f"{graph.dtype(data)} becomes {graph.dtype(call.value)}"
            return replace(found, stays=Opaque("dtype", why))
    elif isinstance(found, Movement | Average | Sum | Product | Homogeneous):
        slots = (found.slot,) if isinstance(found, Average) else found.slots
        if any(graph.dtype(call.at(slot)) != graph.dtype(call.value) for slot in slots):
            return Opaque("dtype", "its operands are of several dtypes")
    return found
