"""Rows for operators that multiply and add constants, and for sums and products of values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bnfold.affine import Affine
from bnfold.aten.common import OPAQUE, Row, constant_operands
from bnfold.semantics import (
    Normalised,
    Product,
    Refused,
    Scaling,
    Semantics,
    Sum,
)

if TYPE_CHECKING:
    from bnfold.graph.call import Call


STATISTICS = ("weight", "bias", "running_mean", "running_var")


def _normalisation(call: Call, axis_params: Sequence[str], batch_statistics: bool) -> Semantics:
    """``gamma*(x - mean)/sqrt(var + eps) + beta`` with stored statistics, along axis 1 of (N, C, ...)."""
    gamma, beta, mean, var = (call[name] for name in axis_params)
    if batch_statistics or mean is None or var is None:
        return Refused("batch-statistics", "it normalises with the statistics of the batch it sees", "batch_norm")
    if not all(call.graph.is_constant(value) for value in (gamma, beta, mean, var)):
        return Refused("not-constant", "its parameters are computed from the model's inputs", "batch_norm")
    ndim, eps = call.rank, float(call["eps"])
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
    return _normalisation(call, STATISTICS, bool(call["training"]))


def native_batch_norm(call: Call) -> Semantics:
    """BatchNorm as core ATen writes it: with two more results, which eval mode leaves empty."""
    return _normalisation(call, STATISTICS, bool(call.arguments.get("training"))) if call.item == 0 else OPAQUE


def instance_norm(call: Call) -> Semantics:
    """InstanceNorm with running statistics is a BatchNorm in eval mode; with those of each sample no affine."""
    return per_channel(call) if call["use_input_stats"] else _normalisation(call, STATISTICS, False)


def per_channel(call: Call) -> Semantics:
    """group_norm, and instance_norm with the statistics of its input: a weight and a bias along axis 1."""
    return _normalised(call, (1,))


def layer_norm(call: Call) -> Semantics:
    """A weight and a bias along the last axes."""
    ndim, normalised = len(call.out_shape), len(call["normalized_shape"])
    return _normalised(call, tuple(range(ndim - normalised, ndim)))


def _normalised(call: Call, axes: tuple[int, ...]) -> Semantics:
    if not constant_operands(call, "weight", "bias"):
        return OPAQUE
    sizes = [call.out_shape[axis] for axis in axes]
    shape = [size if axis in axes else 1 for axis, size in enumerate(call.out_shape)]

    def write(after: Affine) -> Mapping[str, Tensor] | None:
        if set(after.varies()) - set(axes):
            return None
        weight, bias = call.constant("weight"), call.constant("bias")
        scale = torch.ones(sizes, dtype=torch.float64) if weight is None else weight
        shift = torch.zeros(sizes, dtype=torch.float64) if bias is None else bias
        own = Affine(scale.reshape(shape), shift.reshape(shape))
        total = after.after(own)
        return {
            name: part.expand(shape).reshape(sizes) for name, part in (("weight", total.scale), ("bias", total.shift))
        }

    return Normalised(write)


def _constant_affine(
    call: Call, slot: str, affine: Callable[[Tensor], Affine], of: Callable[[Affine], Tensor | None], kind: str
) -> Semantics:
    other = "other" if slot == "self" else "self"
    constant = call.constant(other)
    assert constant is not None
    if constant.is_complex():
        return OPAQUE  # scales and shifts are real
    constant = constant.double()  # that of an integer buffer is one: torch divides it in float32
    ndim = len(call.out_shape)
    if len(call.shape(slot)) != ndim or call.shape(slot) != call.out_shape:
        return OPAQUE  # the constant broadcasts the value: its elements are copied
    found = affine(constant.reshape((1,) * (ndim - constant.ndim) + tuple(constant.shape)))
    if not found.is_finite:
        return OPAQUE  # a mask of -inf is no affine, nor is a division by zero

    def write(new: Affine) -> Mapping[str, Tensor] | None:
        value = of(new)
        return None if value is None or not bool(value.isfinite().all()) else {other: value}

    return Scaling(slot, found.compressed(), kind, write)


def mul(call: Call) -> Semantics:
    """By a constant: a Scaling. Of two values: a Product."""
    slot = _value_slot(call)
    if slot is None:
        return _pairwise(call, Product, ("self", "other"), square=call["self"] is call["other"])

    def affine(c: Tensor) -> Affine:
        return Affine(c, torch.zeros((1,) * c.ndim, dtype=torch.float64))

    return _constant_affine(call, slot, affine, lambda new: None if new.has_shift else new.scale, "mul")


def div(call: Call) -> Semantics:
    """By a constant: a Scaling by its reciprocal. By a value: only the dividend lets a scale pass."""
    if call.arguments.get("rounding_mode") is not None:
        return OPAQUE
    slot = _value_slot(call)
    if slot != "self":
        return _dividend(call) if slot is None else OPAQUE

    def affine(c: Tensor) -> Affine:
        return Affine(1 / c, torch.zeros((1,) * c.ndim, dtype=torch.float64))

    return _constant_affine(call, slot, affine, lambda new: None if new.has_shift else 1 / new.scale, "div")


def _dividend(call: Call) -> Semantics:
    return _pairwise(call, Product, ("self",), square=call["self"] is call["other"])


def additive(sign: float) -> Row:
    """``a + sign*alpha*b``: by a constant a Scaling, of two values a Sum."""

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


def rsub(call: Call) -> Semantics:
    """``b - alpha*a``: from a constant a Scaling, of two values a Sum."""
    slot, alpha = _value_slot(call), float(call["alpha"])
    if slot is None:
        return _pairwise(call, Sum, ("other", "self"), alpha=-alpha)
    scale, of_constant = (-alpha, 1.0) if slot == "self" else (1.0, -alpha)

    def affine(c: Tensor) -> Affine:
        return Affine(torch.full((1,) * c.ndim, scale, dtype=torch.float64), c * of_constant)

    return _constant_affine(call, slot, affine, lambda new: None, "add")


def neg(call: Call) -> Semantics:
    """``-x``: a Scaling without a constant of its own."""
    ndim = len(call.out_shape)
    return Scaling("self", Affine.per_channel(-1.0, 0.0, ndim), "mul", lambda new: None)


def _value_slot(call: Call) -> str | None:
    """The slot of the value that a constant is applied to; None where both are values."""
    for slot, other in (("self", "other"), ("other", "self")):
        if call.graph.is_constant(call[other]):
            return slot
    return None


def _pairwise(call: Call, kind: type[Sum] | type[Product], slots: tuple[str, ...], **options: Any) -> Semantics:
    shapes = tuple(call.shape(slot) for slot in slots)
    return kind(slots, shapes, len(call.out_shape), **options)  # type: ignore[arg-type]
