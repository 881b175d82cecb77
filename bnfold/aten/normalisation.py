"""Rows for normalisations, and those with statistics as a doctor sees them: whether or not they can be folded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from bnfold.semantics import Semantics, build

if TYPE_CHECKING:
    from bnfold.semantics.call import Call

STATISTICS = ("weight", "bias", "running_mean", "running_var")
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


def per_channel(call: Call) -> Semantics:
    """group_norm, and instance_norm with the statistics of each sample: a weight and a bias along axis 1."""
    return build.normalised(call, (1,), "weight", "bias")


def layer_norm(call: Call) -> Semantics:
    """A weight and a bias along the last axes."""
    axes = range(call.rank - len(call["normalized_shape"]), call.rank)
    return build.normalised(call, axes, "weight", "bias")


@dataclass(frozen=True)
class Normalisation:
    """One call of batch_norm or instance_norm.

    Attributes:
        kind: which of them.
        tensors: the nodes of weight, bias, running_mean and running_var, as far as there are any.
        data: the node that is normalised.
        eps: added to the variance.
        momentum: weight of a new batch in training.
        batch_statistics: whether it uses those of the batch it sees.
    """

    kind: Literal["batch_norm", "instance_norm"]
    tensors: Mapping[str, Any]
    data: Any
    eps: float
    momentum: float
    batch_statistics: bool


def normalisation(call: Call) -> Normalisation | None:
    """The normalisation that a call is; None for an instance_norm without running statistics, and all else."""
    flag = _FLAGS.get(call.operator)
    if flag is None or call.item not in (None, 0):
        return None
    kind: Literal["batch_norm", "instance_norm"] = "instance_norm" if "instance" in call.operator else "batch_norm"
    tensors = {name: call[name] for name in STATISTICS if call[name] is not None}
    has_statistics = {"running_mean", "running_var"} <= tensors.keys()
    if kind == "instance_norm" and not has_statistics:
        return None
    of_batch = bool(flag and call[flag]) or not has_statistics
    return Normalisation(kind, tensors, call["input"], float(call["eps"]), float(call["momentum"]), of_batch)
