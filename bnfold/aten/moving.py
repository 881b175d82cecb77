"""Rows for operators that move, average or compare elements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from bnfold.aten.common import OPAQUE, geometry, per_axis
from bnfold.semantics import Average, Homogeneous, Movement, Same, Semantics, build
from bnfold.semantics.moving import reshaped

if TYPE_CHECKING:
    from bnfold.semantics.call import Call


def attention(call: Call, weights: str, values: str) -> Semantics | None:
    """``softmax(...) @ V``: every output row is a weighted mean of V's rows, with weights that sum to one.

    None for another product.
    """
    ndim = len(call.out_shape)
    if len(call.shape(values)) != ndim or not _row_stochastic(call, call[weights]):
        return None
    if call.shape(values)[:-2] != call.out_shape[:-2]:
        return None
    return Average(values, (ndim - 2,), ndim)


#: Operators that keep rows together where they keep the length of the last axis.
_ROW_KEEPING = {
    *("aten.view", "aten.reshape", "aten._unsafe_view", "aten.expand", "aten.flatten", "aten.unflatten"),
    *("aten.squeeze", "aten.unsqueeze", "aten.clone", "aten.contiguous", "aten.to", "aten.detach", "aten.alias"),
}


def _row_stochastic(call: Call, value: Any) -> bool:
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
    ndim = len(call.out_shape)
    dims = int(call.operator[-2])
    axes = tuple(range(ndim - dims, ndim))
    given, padding = per_axis(call, "kernel_size", dims), per_axis(call, "padding", dims)
    if not given:  # adaptive
        return Average("self", axes, ndim)
    window = tuple(n for n in given if n is not None)
    if len(window) < len(given):
        return OPAQUE
    padded, divisor = any(n != 0 for n in padding), call.arguments.get("divisor_override")
    counts, ceil = bool(call.arguments.get("count_include_pad")), bool(call.arguments.get("ceil_mode"))
    one = not (padded and counts) if divisor is None else (divisor == prod(window) and not padded and not ceil)
    equal = (counts or not padded) and not ceil and divisor in (None, prod(window))
    stride = per_axis(call, "stride", dims) or window
    walk = geometry(stride, padding, (1,) * dims) if equal else None
    no_shift = None if one else "zero-padding"
    return Average("self", axes, ndim, no_shift=no_shift, window=window, geometry=walk)


def mean(call: Call) -> Semantics:
    """mean over some axes, or over all."""
    axes, ndim, keep = _reduced(call)
    return Average("self", axes, ndim, drops=not keep)


def total(call: Call) -> Semantics:
    """sum over some axes, or over all: so many times the mean."""
    axes, ndim, keep = _reduced(call)
    value = call.at("self")
    dynamic = isinstance(value, fx.Node) and set(axes) & set(call.graph.dynamic_axes(value))
    count = prod(call.shape("self")[axis] for axis in axes)
    no_shift = "dynamic-size" if dynamic else None
    return Average("self", axes, ndim, drops=not keep, total=float(count), no_shift=no_shift) if count else OPAQUE


def _reduced(call: Call) -> tuple[tuple[int, ...], int, bool]:
    ndim = len(call.shape("self"))
    dims = call.arguments.get("dim")
    dims = [dims] if isinstance(dims, int) else dims
    axes = tuple(d % ndim for d in dims) if dims and ndim else tuple(range(ndim))  # a number has dims 0 and -1 too
    return axes, ndim, bool(call.arguments.get("keepdim", False))


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


#: Operators that keep elements in their order.
_RESHAPES = {"view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_as", "reshape_as", "ravel"}
#: Operators whose numbers are sizes of the result: where elements go then follows from the shapes.
_SIZES = {"view", "reshape", "_unsafe_view", "unflatten", "flatten", "expand", "broadcast_to"}
#: Those whose numbers are positions along the axes named by one of these arguments.
_POSITIONS = {
    "dim": {"slice", "select", "narrow", "split", "split_with_sizes", "unsafe_split", "tensor_split"},
    "dims": {"roll"}, "dimension": {"unfold"},
}  # fmt: skip


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


def cast(call: Call) -> Semantics:
    """A cast that loses nothing leaves every element where it is; a narrowing one rounds."""
    slot = "self"
    if not (call.graph.is_float(call[slot]) and call.graph.is_float(call.value)):
        return OPAQUE
    wide, narrow = call.graph.dtype(call.value), call.graph.dtype(call[slot])
    exact = torch.promote_types(wide, narrow) == wide
    return Same(slot, wide != narrow, _size(call) if wide != narrow else None) if exact else OPAQUE


def _size(call: Call) -> Tensor | None:
    """The root mean square of a value per channel, where a BatchNorm reads it and knows: ``sqrt(mean**2 + var)``."""
    readers = (call.graph.call(reader) for reader in call.graph.readers(call.value) if reader.op == "call_function")
    norm = next((reader for reader in readers if reader.operator == "aten.batch_norm"), None)
    if norm is None or norm["input"] is not call.value:
        return None
    mean, variance = (
        norm.constant(name) if norm[name] is not None else None for name in ("running_mean", "running_var")
    )
    if mean is None or variance is None:
        return None
    return (mean.square() + variance).sqrt().reshape([-1 if axis == 1 else 1 for axis in range(len(call.out_shape))])


def max_pool(call: Call) -> Semantics:
    """Max pools, adaptive or not: padding is -inf, so shifts pass. Which elements they chose an affine leaves as is."""
    ndim, dims = len(call.shape("self")), next(n for n in (1, 2, 3) if f"{n}d" in call.operator)
    return Homogeneous(("self",), tuple(range(ndim - dims, ndim)), shifts=True)


def extremum(call: Call) -> Semantics:
    """amax and amin along some axes, or all."""
    axes, _, keep = _reduced(call)
    return Homogeneous(("self",), axes, shifts=True, drops=not keep)


def masked(call: Call) -> Semantics:
    """masked_fill with zeros."""
    zero = build.is_zero(call, "value") and call.shape("self") == call.out_shape
    return Homogeneous(("self",), any_sign=True) if zero else OPAQUE
