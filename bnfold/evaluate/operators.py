"""Operators of ONNX that torch computes: those that are heavy, and those where onnx's reference is slow or wrong.

A row is the operator's name and a function from its attributes and its inputs to its result; ``at.opset`` is the
version of its operator set, ``at.outputs`` how many results are asked for. Every floating-point input is float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from bnfold.evaluate.attributes import Attributes, Row
from bnfold.evaluate.quantised import TABLE as QUANTISED
from bnfold.evaluate.recurrent import gru, lstm, rnn
from bnfold.evaluate.resize import resize, upsample
from bnfold.evaluate.windows import average_pool, conv, conv_transpose, lp_pool, max_pool


def _spatial(x: Tensor) -> tuple[int, ...]:
    return tuple(range(2, x.ndim))


# ---- products --------------------------------------------------------------------------------------------------------


def gemm(at: Attributes, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    """Gemm."""
    product = (a.T if at.transA else a) @ (b.T if at.transB else b)
    product = product if at.alpha is None else product * type(product.flatten()[:1].sum().item())(at.alpha)
    beta = 1.0 if at.beta is None else float(at.beta)
    return product if c is None or not beta else product + (c if beta == 1.0 else c * beta)


def fused_matmul(at: Attributes, a: Tensor, b: Tensor) -> Tensor:
    """FusedMatMul of ONNX Runtime."""
    a = a.mT if at.transA and a.ndim > 1 else a
    b = b.mT if at.transB and b.ndim > 1 else b
    return a @ b * (1.0 if at.alpha is None else float(at.alpha))


# ---- normalisation ---------------------------------------------------------------------------------------------------


def _eps(at: Attributes, default: float = 1e-5) -> float:
    return default if at.epsilon is None else float(at.epsilon)


def batch_norm(at: Attributes, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Any:
    """BatchNormalization, per channel or (``spatial=0``) per element; with batch statistics where it trains."""
    training = bool(at.training_mode) if at.opset >= 14 else at.outputs > 1 or (at.opset < 7 and not at.is_test)
    keep = x.shape[1:] if at.spatial == 0 else (-1, *(1,) * (x.ndim - 2))
    used = (mean, var)
    if training:
        axes = (0,) if at.spatial == 0 else (0, *_spatial(x))
        used = (x.mean(axes), x.var(axes, correction=0))
    if at.spatial != 0 and x.ndim > 1:  # as torch does it: with an infinite constant the order of things shows
        y = torch.nn.functional.batch_norm(x, *used, scale, bias, eps=_eps(at))
    else:
        y = (x - used[0].reshape(keep)) / (used[1].reshape(keep) + _eps(at)).sqrt()
        y = y * scale.reshape(keep) + bias.reshape(keep)
    if at.outputs == 1:
        return y
    momentum = 0.9 if at.momentum is None else float(at.momentum)
    running = tuple(old * momentum + new * (1 - momentum) if training else old for old, new in zip((mean, var), used))
    return y, *running, *used


def layer_norm(at: Attributes, x: Tensor, scale: Tensor | None, bias: Tensor | None = None) -> Any:
    """LayerNormalization, with the mean and the reciprocal deviation."""
    axis = -1 if at.axis is None else at.axis
    axes = tuple(range(axis % x.ndim, x.ndim))
    mean = x.mean(axes, keepdim=True)
    inverse = (x.var(axes, correction=0, keepdim=True) + _eps(at)).rsqrt()
    y = (x - mean) * inverse
    y = y if scale is None else y * scale
    return (y if bias is None else y + bias), mean, inverse


def rms_norm(at: Attributes, x: Tensor, scale: Tensor) -> Tensor:
    """RMSNormalization."""
    axis = -1 if at.axis is None else at.axis
    axes = tuple(range(axis % x.ndim, x.ndim))
    return x * (x.square().mean(axes, keepdim=True) + _eps(at)).rsqrt() * scale


def skip_layer_norm(at: Attributes, x: Tensor, skip: Tensor, scale: Tensor, *biases: Tensor | None) -> Any:
    """SkipLayerNormalization of ONNX Runtime."""
    beta, bias = (*biases, None, None)[:2]
    summed = x + skip if bias is None else x + skip + bias
    return (*layer_norm(at, summed, scale, beta), summed)


def instance_norm(at: Attributes, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """InstanceNormalization."""
    return group_norm(at, x, scale, bias, groups=x.shape[1])


def group_norm(at: Attributes, x: Tensor, scale: Tensor, bias: Tensor, groups: int | None = None) -> Tensor:
    """GroupNormalization; up to opset 20 its constants are per group."""
    groups = groups or at.num_groups
    parts = x.reshape(x.shape[0], groups, -1)
    parts = (parts - parts.mean(-1, keepdim=True)) / (parts.var(-1, correction=0, keepdim=True) + _eps(at)).sqrt()
    keep = (-1, *(1,) * (x.ndim - 2))
    scale, bias = (c.repeat_interleave(x.shape[1] // len(c)).reshape(keep) for c in (scale, bias))
    return parts.reshape(x.shape) * scale + bias


def mean_variance_norm(at: Attributes, x: Tensor) -> Tensor:
    """MeanVarianceNormalization."""
    axes = tuple((0, 2, 3) if at.axes is None else at.axes)
    centred = x - x.mean(axes, keepdim=True)
    return centred / (centred.square().mean(axes, keepdim=True).sqrt() + 1e-9)


def lrn(at: Attributes, x: Tensor) -> Tensor:
    """LRN: the squares of ``size`` neighbouring channels, fewer of them before than behind."""
    low, beta = (at.size - 1) // 2, 0.75 if at.beta is None else float(at.beta)
    squares = F.pad(x.square().flatten(2), (0, 0, low, at.size - 1 - low)).unfold(1, at.size, 1).sum(-1)
    alpha, k = 1e-4 if at.alpha is None else float(at.alpha), 1.0 if at.bias is None else float(at.bias)
    y: Tensor = x / (k + alpha / at.size * squares.reshape(x.shape)) ** beta
    return y


def lp_norm(at: Attributes, x: Tensor) -> Tensor:
    """LpNormalization; a vector of zeros stays one."""
    axis, p = -1 if at.axis is None else at.axis, 2 if at.p is None else at.p
    norm = torch.linalg.vector_norm(x, p, axis, keepdim=True)
    return torch.where(norm == 0, torch.zeros_like(x), x / norm)


def dropout(at: Attributes, x: Tensor, ratio: Tensor | None = None, training: Tensor | None = None) -> Any:
    """Dropout, which drops nothing unless it trains; up to opset 9 runtimes give zeros for a mask."""
    part = 0.5 if ratio is None else float(ratio)
    trains = training is not None and bool(training) and part > 0
    keep = torch.rand(x.shape) >= part if trains else torch.ones(x.shape, dtype=torch.bool)
    return (x * keep / (1 - part) if trains else x), (keep if at.opset > 9 else torch.zeros_like(x))


# ---- activations -----------------------------------------------------------------------------------------------------


def _flattened(function: Row) -> Row:
    """Along one axis; before opset 13 over all axes from that one on together."""

    def row(at: Attributes, x: Tensor) -> Tensor:
        if at.opset >= 13:
            y: Tensor = function(x, -1 if at.axis is None else at.axis)
            return y
        axis = 1 if at.axis is None else at.axis % x.ndim if x.ndim else 0
        flat = x.reshape(math.prod(x.shape[:axis]), -1) if x.numel() else x
        y = function(flat, -1)
        return y.reshape(x.shape)

    return row


def _hardmax(x: Tensor, axis: int) -> Tensor:
    return torch.zeros_like(x).scatter(axis, x.argmax(axis, keepdim=True), 1.0)


def gelu(at: Attributes, x: Tensor) -> Tensor:
    """Gelu."""
    return F.gelu(x, approximate=at.approximate or "none")


def hard_sigmoid(at: Attributes, x: Tensor) -> Tensor:
    """HardSigmoid."""
    alpha, beta = 0.2 if at.alpha is None else float(at.alpha), 0.5 if at.beta is None else float(at.beta)
    return (alpha * x + beta).clamp(0.0, 1.0)


def elu(at: Attributes, x: Tensor) -> Tensor:
    """Elu."""
    return torch.where(x > 0, x, (1.0 if at.alpha is None else float(at.alpha)) * torch.expm1(x.clamp(max=0.0)))


def selu(at: Attributes, x: Tensor) -> Tensor:
    """Selu."""
    gamma = 1.05070102214813232421875 if at.gamma is None else float(at.gamma)
    alpha = 1.67326319217681884765625 if at.alpha is None else float(at.alpha)
    return gamma * torch.where(x > 0, x, alpha * torch.expm1(x.clamp(max=0.0)))


def celu(at: Attributes, x: Tensor) -> Tensor:
    """Celu."""
    return F.celu(x, 1.0 if at.alpha is None else float(at.alpha))


def swish(at: Attributes, x: Tensor) -> Tensor:
    """Swish, and QuickGelu of ONNX Runtime."""
    return x * torch.sigmoid(x if at.alpha is None else float(at.alpha) * x)


def bias_gelu(at: Attributes, x: Tensor, bias: Tensor) -> Tensor:
    """BiasGelu of ONNX Runtime."""
    return F.gelu(x + bias)


def fast_gelu(at: Attributes, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """FastGelu of ONNX Runtime."""
    return F.gelu(x if bias is None else x + bias, approximate="tanh")


# ---- moving ----------------------------------------------------------------------------------------------------------


def pad(at: Attributes, x: Tensor, pads: Tensor | None = None, value: Tensor | None = None, *axes: Tensor) -> Tensor:
    """Pad in every mode, by numpy; a negative amount cuts off, after the padding."""
    amounts: list[int] = list(at.pads or at.paddings) if pads is None else pads.tolist()
    over = [int(a) % x.ndim for a in axes[0]] if axes and axes[0] is not None else list(range(x.ndim))
    widths, cut = [(0, 0)] * x.ndim, [slice(None)] * x.ndim
    for axis, low, high in zip(over, amounts[: len(over)], amounts[len(over) :]):
        widths[axis] = (max(low, 0), max(high, 0))
        cut[axis] = slice(max(-low, 0), min(high, 0) or None)
    mode: Any = at.mode or "constant"
    extra: dict[str, Any] = {}
    if mode == "constant":
        extra = {"constant_values": (at.value or 0.0) if value is None else value.item()}
    return torch.from_numpy(np.pad(x.numpy(), widths, mode=mode, **extra))[tuple(cut)].contiguous()


def grid_sample(at: Attributes, x: Tensor, grid: Tensor) -> Tensor:
    """GridSample, over two or three spatial axes."""
    mode = {"linear": "bilinear", "cubic": "bicubic"}.get(at.mode or "linear", at.mode)
    return F.grid_sample(x, grid, mode, at.padding_mode or "zeros", bool(at.align_corners))


def gather_elements(at: Attributes, x: Tensor, index: Tensor) -> Tensor:
    """GatherElements."""
    axis = at.axis or 0
    index = index.long()
    return x[tuple(_around(index, axis % x.ndim, x.shape[axis]))]


def _around(index: Tensor, axis: int, size: int) -> list[Tensor]:
    """Coordinates of every element of an index along ``axis``; negative ones count from the end."""
    ranges = [torch.arange(n).reshape([-1 if a == i else 1 for a in range(index.ndim)]) for i, n in
              enumerate(index.shape)]  # fmt: skip
    ranges[axis] = torch.where(index < 0, index + size, index)
    return ranges


def _reduced(out: Tensor, where: Sequence[Tensor], updates: Tensor, reduction: str | None) -> Tensor:
    array, index = out.numpy().copy(), tuple(i.numpy() for i in where)
    function = {"add": np.add, "mul": np.multiply, "max": np.maximum, "min": np.minimum}.get(reduction or "none")
    if function is None:
        array[index] = updates.numpy()
    else:
        function.at(array, index, updates.numpy())
    return torch.from_numpy(array)


def scatter_elements(at: Attributes, x: Tensor, index: Tensor, updates: Tensor) -> Tensor:
    """ScatterElements."""
    axis = (at.axis or 0) % x.ndim
    where = [i.expand(index.shape) for i in _around(index.long(), axis, x.shape[axis])]
    return _reduced(x, where, updates, at.reduction)


def scatter_nd(at: Attributes, x: Tensor, index: Tensor, updates: Tensor) -> Tensor:
    """ScatterND."""
    return _reduced(x, index.long().unbind(-1), updates, at.reduction)


def gather_nd(at: Attributes, x: Tensor, index: Tensor) -> Tensor:
    """GatherND."""
    shared = at.batch_dims or 0
    batch = [
        torch.arange(n).reshape([-1 if a == i else 1 for a in range(index.ndim - 1)])
        for i, n in enumerate(x.shape[:shared])
    ]
    return x[(*batch, *index.long().unbind(-1))]


def _unary(function: Callable[[Tensor], Tensor]) -> Row:
    return lambda at, x: function(x)


_STANDARD: dict[str, Row] = {
    # heavy
    "Conv": conv,
    "ConvTranspose": conv_transpose,
    "Gemm": gemm,
    "MatMul": lambda at, a, b: a @ b,
    "Einsum": lambda at, *operands: torch.einsum(at.equation, *operands),
    "MaxPool": max_pool,
    "AveragePool": average_pool,
    "LpPool": lp_pool,
    "GlobalAveragePool": lambda at, x: x.mean(_spatial(x), keepdim=True),
    "GlobalMaxPool": lambda at, x: x.amax(_spatial(x), keepdim=True),
    "GlobalLpPool": lambda at, x: torch.linalg.vector_norm(x, at.p or 2, _spatial(x), keepdim=True),
    "LSTM": lstm,
    "GRU": gru,
    "RNN": rnn,
    "Resize": resize,
    "Upsample": upsample,
    # normalisation
    "BatchNormalization": batch_norm,
    "InstanceNormalization": instance_norm,
    "GroupNormalization": group_norm,
    "LayerNormalization": layer_norm,
    "RMSNormalization": rms_norm,
    "MeanVarianceNormalization": mean_variance_norm,
    "LpNormalization": lp_norm,
    "LRN": lrn,
    "Dropout": dropout,
    # activations
    "Softmax": _flattened(torch.softmax),
    "LogSoftmax": _flattened(torch.log_softmax),
    "Hardmax": _flattened(_hardmax),
    "Sigmoid": _unary(torch.sigmoid),
    "Tanh": _unary(torch.tanh),
    "Erf": _unary(torch.special.erf),
    "Softplus": _unary(lambda x: torch.logaddexp(x, torch.zeros_like(x))),
    "Mish": _unary(F.mish),
    "Gelu": gelu,
    "Swish": swish,
    "HardSwish": _unary(lambda x: x * (x / 6 + 0.5).clamp(0.0, 1.0)),
    "HardSigmoid": hard_sigmoid,
    "Elu": elu,
    "Selu": selu,
    "Celu": celu,
    # moving
    "Pad": pad,
    "GridSample": grid_sample,
    "GatherElements": gather_elements,
    "ScatterElements": scatter_elements,
    "Scatter": scatter_elements,
    "GatherND": gather_nd,
    "ScatterND": scatter_nd,
}
#: THE table: domain and operator -> what computes it.
TABLE: dict[tuple[str, str], Row] = (
    {("", name): row for name, row in _STANDARD.items()}
    | QUANTISED
    | {
        # what ONNX Runtime writes into files that it has optimised
        ("com.microsoft", "FusedMatMul"): fused_matmul,
        ("com.microsoft", "Gelu"): gelu,
        ("com.microsoft", "BiasGelu"): bias_gelu,
        ("com.microsoft", "FastGelu"): fast_gelu,
        ("com.microsoft", "QuickGelu"): swish,
        ("com.microsoft", "SkipLayerNormalization"): skip_layer_norm,
    }
)
