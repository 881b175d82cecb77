"""Rows for operators that multiply and add constants, and for sums and products of values."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bnfold.aten.common import OPAQUE, Row
from bnfold.semantics import Semantics, build

if TYPE_CHECKING:
    from bnfold.semantics.call import Call


STATISTICS = ("weight", "bias", "running_mean", "running_var")


def batch_norm(call: Call) -> Semantics:
    """Eval-mode BatchNorm."""
    training = bool(call.arguments.get("training"))
    return build.normalisation(call, "input", STATISTICS, float(call["eps"]), batch_statistics=training)


def native_batch_norm(call: Call) -> Semantics:
    """BatchNorm as core ATen writes it: with two more results, which eval mode leaves empty."""
    return batch_norm(call) if call.item == 0 else OPAQUE


def instance_norm(call: Call) -> Semantics:
    """InstanceNorm with running statistics is a BatchNorm in eval mode; with those of each sample no affine."""
    return per_channel(call) if call["use_input_stats"] else batch_norm(call)


def per_channel(call: Call) -> Semantics:
    """group_norm, and instance_norm with the statistics of its input: a weight and a bias along axis 1."""
    return build.normalised(call, (1,), "weight", "bias")


def layer_norm(call: Call) -> Semantics:
    """A weight and a bias along the last axes."""
    axes = range(call.rank - len(call["normalized_shape"]), call.rank)
    return build.normalised(call, axes, "weight", "bias")


def mul(call: Call) -> Semantics:
    """By a constant, or of two values."""
    return build.multiplied(call, "self", "other")


def div(call: Call) -> Semantics:
    """By a constant, or by a value; rounded, it is no affine."""
    return OPAQUE if call.arguments.get("rounding_mode") is not None else build.divided(call, "self", "other")


def additive(sign: float) -> Row:
    """``a + sign*alpha*b``."""

    def row(call: Call) -> Semantics:
        return build.added(call, "self", "other", sign * float(call.arguments.get("alpha", 1)))

    return row


def rsub(call: Call) -> Semantics:
    """``b - alpha*a``."""
    return build.added(call, "other", "self", -float(call["alpha"]))


def neg(call: Call) -> Semantics:
    """``-x``."""
    return build.negated(call, "self")
