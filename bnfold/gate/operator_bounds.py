"""How far ONNX Runtime's CPU kernels may be off where they approximate: a measured table and what its numbers multiply.

For an operator of the table, of a dtype with the unit roundoff ``u``, on the operands that it was given,

    |computed - exact| <= safety * u * (absolute * magnitude + relative * |exact|) + smallest

elementwise. ``magnitude`` is what the operator's formula cancels from (1 for a sigmoid, the operand for a GELU, all
terms of a normalisation); ``smallest`` is the dtype's smallest normal number, which a kernel may flush to zero, and in
float16, computed in float32, its smallest subnormal one. ``scripts/operator_accuracy.py`` measures the table.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping
from importlib import resources
from typing import Any

import numpy as np

from bnfold.evaluate.attributes import Attributes
from bnfold.evaluate.subject import Array

#: u, half the distance from 1 to the next number; and what is lost below the normal numbers.
UNITS = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
SMALLEST = {"float32": 2.0**-126, "float16": 2.0**-24, "bfloat16": 2.0**-126}


@functools.cache
def table() -> Mapping[str, Any]:
    """What was measured: versions, processors, ``safety`` and ``entries``, a row per operator and dtype."""
    found: Mapping[str, Any] = json.loads((resources.files("bnfold.gate") / "operator_accuracy.json").read_text())
    return found


@functools.cache
def _numbers(op: str, dtype: str) -> tuple[float, float] | None:
    """Absolute and relative; those of float32 where they are larger, for a kernel that computes in the dtype itself."""
    found = [row for row in table()["entries"] if row["op"] == op and row["dtype"] in (dtype, "float32")]
    if dtype not in UNITS or not found:
        return None
    return max(row["absolute"] for row in found), max(row["relative"] for row in found)


def bound(op: str, dtype: str, at: Attributes, operands: tuple[Array | None, ...], exact: Array) -> Array | None:
    """The elementwise bound on what the first output of an operator may be off by; None for one outside of the table.

    Args:
        op, dtype, at: the operator, the dtype that it computes in, its attributes.
        operands: as the runtime gave them to it, in float64; None for one that is left out.
        exact: the result in float64 on these.
    """
    found = _numbers(op, dtype)
    if found is None:
        return None
    absolute, relative = found
    with np.errstate(over="ignore"):
        scaled = relative * np.abs(exact)
        if absolute:
            scaled = scaled + absolute * magnitude(op, at, operands, exact)
        result: Array = table()["safety"] * UNITS[dtype] * scaled + SMALLEST[dtype]
    return result


# ---- magnitudes ------------------------------------------------------------------------------------------------------

Magnitude = Callable[..., Any]


def magnitude(op: str, at: Attributes, operands: tuple[Array | None, ...], exact: Array) -> Array:
    """What ``absolute`` is a multiple of, for every element of the result."""
    with np.errstate(all="ignore"):
        found: Array = MAGNITUDES.get(op, _one)(at, exact, *operands)
    return found


def _one(at: Attributes, y: Array, *_: Array) -> Array:
    return np.ones_like(y)


def _operand(at: Attributes, y: Array, x: Array, *_: Array) -> Array:
    return np.abs(x)


def _argument(at: Attributes, y: Array, x: Array, *_: Array) -> Array:
    """A periodic function's argument is reduced with an error of its own size."""
    return 1 + np.abs(x)


def _steep(at: Attributes, y: Array, x: Array, *_: Array) -> Array:
    """The tangent: the argument's error times the slope."""
    return np.asarray((1 + np.abs(x)) * (1 + y * y))


def _axis(at: Attributes, x: Array) -> tuple[int, ...]:
    axis = (-1 if at.opset >= 13 else 1) if at.axis is None else at.axis
    return (axis,) if at.opset >= 13 else tuple(range(axis % max(x.ndim, 1), x.ndim))


#: How many terms of a sum next to one another in memory cost a unit of error where they are equal, and how many of
#: one along another axis, which is added up one by one.
CONTIGUOUS, STRIDED = 64, 16


def _summed(count: int, per: int = CONTIGUOUS) -> float:
    """The error of a sum of equal terms, which are all rounded the same way: linear in how many a lane adds up."""
    return 1 + count / per


def _below_maximum(at: Attributes, x: Array) -> Array:
    axes = _axis(at, x)
    count = math.prod(x.shape[axis] for axis in axes)
    return np.asarray(_summed(count) + np.abs(x - x.max(axes, keepdims=True, initial=-np.inf)))


def _softmax(at: Attributes, y: Array, x: Array) -> Array:
    """The exponent is rounded before the exponential is taken."""
    return y * _below_maximum(at, x)


def _log_softmax(at: Attributes, y: Array, x: Array) -> Array:
    return _below_maximum(at, x)


def _reduced(at: Attributes, x: Array, axes: Array | None, of: Callable[..., Any], like: Array) -> Array:
    """A reduction of ``x`` over the node's axes, in the shape of its result."""
    given = at.axes if axes is None else [int(a) for a in axes]
    everything = None if at.noop_with_empty_axes else tuple(range(x.ndim))
    over = tuple(given) if given is not None and len(given) else everything
    return x if over is None else np.asarray(of(x, axis=over)).reshape(like.shape)


def _log_sum_exp(at: Attributes, y: Array, x: Array, axes: Array | None = None) -> Array:
    return _summed(x.size // max(y.size, 1)) + np.abs(_reduced(at, x, axes, np.max, y)) + np.abs(y)


def _log_sum(at: Attributes, y: Array, x: Array, axes: Array | None = None) -> Array:
    return _summed(x.size // max(y.size, 1), STRIDED) + np.abs(y)


def _norm(at: Attributes, y: Array, x: Array, axes: Array | None = None) -> Array:
    return _summed(x.size // max(y.size, 1), STRIDED) * y


def _lp_normalised(at: Attributes, y: Array, x: Array) -> Array:
    return _summed(x.shape[-1 if at.axis is None else at.axis], STRIDED) * np.abs(y)


def _normalised(at: Attributes, y: Array, x: Array, axes: tuple[int, ...], scale: Array, bias: Array) -> Array:
    """Every term of (x - mean) / deviation * scale + bias, the variance taken as E[x²] - mean²."""
    mean, square = x.mean(axes, keepdims=True), np.square(x).mean(axes, keepdims=True)
    variance = x.var(axes, keepdims=True) + (1e-5 if at.epsilon is None else at.epsilon)
    terms = (np.abs(x) + np.abs(x).mean(axes, keepdims=True)) / np.sqrt(variance)  # of which the mean is a sum
    off = np.abs(x - mean) / np.sqrt(variance) * square / variance
    count = math.prod(x.shape[axis] for axis in axes)
    return np.asarray(_summed(count) * np.abs(scale) * (terms + off) + np.abs(bias))


def _layer_norm(at: Attributes, y: Array, x: Array, scale: Array, bias: Array | None = None) -> Array:
    axis = (-1 if at.axis is None else at.axis) % x.ndim
    return _normalised(at, y, x, tuple(range(axis, x.ndim)), scale, np.zeros(1) if bias is None else bias)


def _rms_norm(at: Attributes, y: Array, x: Array, *_: Array) -> Array:
    axis = (-1 if at.axis is None else at.axis) % x.ndim
    return _summed(math.prod(x.shape[axis:])) * np.abs(y)


def _per_channel(x: Array, constant: Array) -> Array:
    return np.repeat(constant, x.shape[1] // len(constant)).reshape(-1, *(1,) * (x.ndim - 2))


def _instance_norm(at: Attributes, y: Array, x: Array, scale: Array, bias: Array) -> Array:
    return _normalised(at, y, x, tuple(range(2, x.ndim)), _per_channel(x, scale), _per_channel(x, bias))


def _group_norm(at: Attributes, y: Array, x: Array, scale: Array, bias: Array) -> Array:
    parts = x.reshape(x.shape[0], at.num_groups, -1)
    scale, bias = (np.broadcast_to(_per_channel(x, c), x.shape).reshape(parts.shape) for c in (scale, bias))
    return _normalised(at, y, parts, (2,), scale, bias).reshape(x.shape)


def _batch_norm(at: Attributes, y: Array, x: Array, scale: Array, bias: Array, mean: Array, var: Array) -> Array:
    if at.training_mode:
        return _normalised(at, y, x, (0, *range(2, x.ndim)), _per_channel(x, scale), _per_channel(x, bias))
    factor = scale / np.sqrt(var + (1e-5 if at.epsilon is None else at.epsilon))
    factor, bias, mean = (c if at.spatial == 0 else _per_channel(x, c) for c in (factor, bias, mean))
    return np.asarray(np.abs(factor) * (np.abs(x) + np.abs(mean)) + np.abs(bias))


def _lrn(at: Attributes, y: Array, x: Array) -> Array:
    """The window slides: what has left it has left its rounding behind."""
    alpha, k = 1e-4 if at.alpha is None else at.alpha, 1.0 if at.bias is None else at.bias
    return np.asarray(np.abs(y) * (1 + alpha / at.size * np.square(x).sum(1, keepdims=True) / abs(k)))


def _resize(at: Attributes, y: Array, x: Array, *_: Array | None) -> Array:
    """Coordinates carry an error of their own size, and so a part of what lies beside them."""
    near = np.abs(x)
    for axis in (a for a in range(x.ndim) if x.shape[a] != y.shape[a]):
        n, size = x.shape[axis], y.shape[axis]
        reach = 3 + -(-n // size)  # a cubic takes two on either side, antialiasing all that it passes over
        at_ = (np.arange(size) * n) // max(size, 1)
        near = np.max([near.take(np.clip(at_ + k, 0, n - 1), axis) for k in range(-reach, reach + 1)], 0)
        near = near * (1 + n)
    return near


#: For every other operator of the table it is 1.
MAGNITUDES: dict[str, Magnitude] = {
    **dict.fromkeys(("Gelu", "HardSwish", "Mish", "Swish", "QuickGelu", "Asinh", "Sinh", "FastGelu"), _operand),
    **dict.fromkeys(("Sin", "Cos"), _argument),
    "Tan": _steep,
    "Softmax": _softmax,
    "LogSoftmax": _log_softmax,
    "ReduceLogSumExp": _log_sum_exp,
    "ReduceLogSum": _log_sum,
    "ReduceL2": _norm,
    "LpNormalization": _lp_normalised,
    "LayerNormalization": _layer_norm,
    "RMSNormalization": _rms_norm,
    "InstanceNormalization": _instance_norm,
    "GroupNormalization": _group_norm,
    "BatchNormalization": _batch_norm,
    "LRN": _lrn,
    "Resize": _resize,
}
