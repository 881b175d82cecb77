"""Resize and Upsample of ONNX: along each axis every output element is a weighted sum of some input elements.

The formulas are those of the operator's page (opset 19); an axis is done at a time, since all modes are separable.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from bnfold.evaluate.attributes import Attributes


def upsample(at: Attributes, x: Tensor, scales: Tensor | None = None) -> Tensor:
    """Upsample, which Resize has replaced: asymmetric, nearest rounding down."""
    factors = list(map(float, at.scales)) if scales is None else scales.tolist()
    mode = at.mode or "nearest"
    sizes = [_scaled(n, factor) for n, factor in zip(x.shape, factors)]
    if sizes == list(x.shape):
        return x
    for axis, (size, factor) in enumerate(zip(sizes, factors)):
        # What ONNX Runtime calls simple; the page of opset 10 does not say how it rounds.
        x = _axis(x, axis, size, factor, "asymmetric", mode, "ceil" if factor < 1 else "floor", at)
    return x


def resize(at: Attributes, x: Tensor, *given: Tensor | None) -> Tensor:
    """Resize, in all its versions."""
    if at.opset < 11:
        return upsample(at, x, given[0])
    roi, scales, sizes = (*given, None, None, None)[:3]
    axes = [a % x.ndim for a in at.axes] if at.axes is not None else list(range(x.ndim))
    mode, transform = at.mode or "nearest", at.coordinate_transformation_mode or "half_pixel"
    nearest, original = at.nearest_mode or "round_prefer_floor", x.shape
    if sizes is not None and sizes.numel():
        wanted = sizes.tolist()
        factors = [n / original[a] for n, a in zip(wanted, axes)]
        policy = at.keep_aspect_ratio_policy or "stretch"
        if policy != "stretch":
            factor = (min if policy == "not_larger" else max)(factors)
            factors = [factor] * len(axes)
            wanted = [math.floor(factor * original[a] + 0.5) for a in axes]
    else:
        assert scales is not None
        factors = scales.tolist()
        wanted = [_scaled(original[a], f) for a, f in zip(axes, factors)]
    if transform != "tf_crop_and_resize" and wanted == [original[a] for a in axes]:
        return x  # whatever the scales: so every runtime has it
    for i, (axis, size, factor) in enumerate(zip(axes, wanted, factors)):
        bounds = None
        if transform == "tf_crop_and_resize" and roi is not None:
            bounds = float(roi[i]), float(roi[i + len(axes)])
        if size == original[axis] and factor == 1.0 and bounds is None:
            continue
        x = _axis(x, axis, size, factor, transform, mode, nearest, at, bounds)
    return x


def _scaled(n: int, factor: float) -> int:
    """A size times a scale, in the scale's own precision: 5 * 2.6 is 13."""
    return math.floor(np.float32(n) * np.float32(factor))


def _axis(
    x: Tensor, axis: int, size: int, factor: float, transform: str, mode: str, nearest: str, at: Attributes,
    bounds: tuple[float, float] | None = None,
) -> Tensor:  # fmt: skip
    n = x.shape[axis]
    # Which neighbour is nearest is decided in float32, as runtimes do: in float64 it would be another one at a border.
    dtype = torch.float32 if mode == "nearest" else torch.float64
    places = _coordinates(torch.arange(size, dtype=dtype), n, size, factor, transform, bounds)
    if mode == "nearest":
        floor = places.floor()
        index = {
            "floor": floor,
            "ceil": places.ceil(),
            "round_prefer_floor": (places - 0.5).ceil(),
            "round_prefer_ceil": (places + 0.5).floor(),
        }[nearest]
        y = x.index_select(axis, index.long().clamp(0, n - 1))
    else:
        weights = _weights(places, n, factor, mode, at)
        y = torch.tensordot(weights, x if x.is_floating_point() else x.double(), ([1], [axis])).movedim(0, axis)
        y = y if x.is_floating_point() else y.round().to(x.dtype)
    if transform == "tf_crop_and_resize":
        outside = ((places < 0) | (places > n - 1)).reshape([-1 if a == axis else 1 for a in range(x.ndim)])
        y = torch.where(outside, torch.tensor(float(at.extrapolation_value or 0.0), dtype=y.dtype), y)
    return y


def _coordinates(
    out: Tensor, n: int, size: int, factor: float, transform: str, bounds: tuple[float, float] | None
) -> Tensor:
    """Where output elements lie on the input's axis."""
    if transform == "asymmetric":
        return out / factor
    if transform == "align_corners":
        return torch.zeros_like(out) if size == 1 else out * (n - 1) / (size - 1)
    if transform == "pytorch_half_pixel" and size == 1:
        return torch.zeros_like(out)
    if transform == "tf_half_pixel_for_nn":
        return (out + 0.5) / factor
    if transform == "tf_crop_and_resize":
        start, end = bounds or (0.0, 1.0)
        if size == 1:
            return torch.full_like(out, 0.5 * (start + end) * (n - 1))
        return start * (n - 1) + out * (end - start) * (n - 1) / (size - 1)
    places = (out + 0.5) / factor - 0.5
    if transform == "half_pixel_symmetric":
        adjustment = size / (factor * n)
        return n / 2 * (1 - adjustment) + places
    return places


def _weights(places: Tensor, n: int, factor: float, mode: str, at: Attributes) -> Tensor:
    """How much every input element gives to every output element, (size, n)."""
    stretch = min(factor, 1.0) if at.antialias else 1.0
    reach = (1.0 if mode == "linear" else 2.0) / stretch
    offsets = torch.arange(-math.ceil(reach) + 1, math.ceil(reach) + 1, dtype=torch.float64)
    index = places.floor()[:, None] + offsets
    distance = (places[:, None] - index).abs() * stretch
    if mode == "linear":
        parts = (1 - distance).clamp(min=0.0)
    else:
        a = -0.75 if at.cubic_coeff_a is None else float(at.cubic_coeff_a)
        near = ((a + 2) * distance - (a + 3)) * distance.square() + 1
        far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
        parts = torch.where(distance <= 1, near, torch.where(distance < 2, far, 0.0))
    if at.exclude_outside:
        parts = torch.where((index >= 0) & (index < n), parts, 0.0)
    if at.exclude_outside or at.antialias:
        parts = parts / parts.sum(1, keepdim=True)
    found = torch.zeros(len(places), n, dtype=torch.float64)
    return found.scatter_add_(1, index.long().clamp(0, n - 1), parts)
