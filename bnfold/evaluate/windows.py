"""Convolutions and pools of ONNX: a window that walks over one to three spatial axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bnfold.evaluate.attributes import Attributes, Row
from bnfold.evaluate.blocks import convolve


@dataclass(frozen=True)
class Window:
    """A window over the spatial axes: its size, how it walks, and the padding before and behind."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    before: tuple[int, ...]
    behind: tuple[int, ...]

    @classmethod
    def of(cls, at: Attributes, spatial: Sequence[int], size: Sequence[int], *, least: int | None = None) -> Window:
        """From ``strides``, ``dilations``, ``pads`` and ``auto_pad`` of a node whose data has these spatial sizes.

        ``least``: of the padding that ``auto_pad`` gives; that of a pool may be negative.
        """
        ones = (1,) * len(size)
        stride, dilation = tuple(at.strides or ones), tuple(at.dilations or ones)
        pads = list(at.pads or (0,) * 2 * len(size))
        if at.auto_pad == "VALID":
            pads = [0] * 2 * len(size)
        elif at.auto_pad in ("SAME_UPPER", "SAME_LOWER"):
            extent = [d * (k - 1) + 1 for d, k in zip(dilation, size)]
            total = [(-(-n // s) - 1) * s + e - n for n, s, e in zip(spatial, stride, extent)]
            total = total if least is None else [max(t, least) for t in total]
            first = [int((t + (at.auto_pad == "SAME_LOWER")) / 2) for t in total]
            pads = first + [t - f for t, f in zip(total, first)]
        before, behind = tuple(pads[: len(size)]), tuple(pads[len(size) :])
        if at.ceil_mode:  # one place that is larger than all there is: some pool over everything so
            room = [n + low + high for n, low, high in zip(spatial, before, behind)]
            size = [min(k, r) if d == 1 else k for k, d, r in zip(size, dilation, room)]
        return cls(tuple(size), stride, dilation, before, behind)

    def places(self, spatial: Sequence[int], *, ceil: bool = False) -> list[int]:
        """How many places the window takes along each axis; none begins in the padding behind."""
        found = []
        for n, k, s, d, low, high in zip(spatial, self.size, self.stride, self.dilation, self.before, self.behind):
            span = n + low + high - d * (k - 1) - 1
            count = (-(-span // s) if ceil else span // s) + 1
            found.append(max(count - 1 if ceil and (count - 1) * s >= n + low else count, 0))
        return found

    def padded(self, x: Tensor, value: float, *, ceil: bool = False) -> Tensor:
        """``x`` with its padding, and behind it what the last place reaches beyond that, cut to what is read."""
        spatial = x.shape[2:]
        pads: list[int] = []
        places = self.places(spatial, ceil=ceil)
        for n, k, s, d, low, count in zip(spatial, self.size, self.stride, self.dilation, self.before, places):
            pads = [low, (count - 1) * s + d * (k - 1) + 1 - n - low, *pads]
        return F.pad(x, pads, value=value)


def _sums(x: Tensor, window: Window) -> Tensor:
    """The sum over every place of the window, of data that is padded already."""
    batch, channels, *spatial = x.shape
    if 0 in (
        places := Window(window.size, window.stride, window.dilation, *((0,) * len(spatial),) * 2).places(spatial)
    ):
        return x.new_zeros(batch, channels, *places)
    lines = x.reshape(batch * channels, 1, *spatial)
    summed: Tensor
    if max(window.dilation) == 1:
        flat = len(spatial) == 1
        size, stride = ((1, *window.size), (1, *window.stride)) if flat else (window.size, window.stride)
        pool: Row = F.avg_pool3d if len(spatial) == 3 else F.avg_pool2d
        summed = pool(lines.unsqueeze(2) if flat else lines, size, stride, divisor_override=1)
    else:
        kernel = torch.ones((1, 1, *window.size), dtype=x.dtype)
        summed = _CONV[len(spatial)](lines, kernel, stride=window.stride, dilation=window.dilation)
    return summed.reshape(batch, channels, *places)


_CONV: dict[int, Row] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED: dict[int, Row] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_MAX: dict[int, Row] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


def conv(at: Attributes, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """Conv, over one to three spatial axes."""
    window = Window.of(at, x.shape[2:], w.shape[2:], least=0)
    even = window.before == window.behind
    return convolve(
        _CONV[w.ndim - 2], x if even else window.padded(x, 0.0), w, b, window.stride, window.before if even else (0,),
        window.dilation, at.group or 1,
    )  # fmt: skip


def conv_transpose(at: Attributes, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """ConvTranspose: everything is computed, and the padding cut off; ``output_padding`` adds zeros and bias."""
    axes = w.ndim - 2
    ones, spatial = (1,) * axes, x.shape[2:]
    stride, dilation = tuple(at.strides or ones), tuple(at.dilations or ones)
    more = tuple(at.output_padding or (0,) * axes)
    pads = list(at.pads or (0,) * 2 * axes)
    full = [(n - 1) * s + d * (k - 1) + 1 for n, s, d, k in zip(spatial, stride, dilation, w.shape[2:])]
    wanted = at.output_shape and tuple(at.output_shape)[-axes:]
    if at.auto_pad in ("SAME_UPPER", "SAME_LOWER") and not wanted:
        wanted = tuple(n * s for n, s in zip(spatial, stride))
    if wanted:
        total = [f + m - n for f, m, n in zip(full, more, wanted)]
        total = total if at.output_shape else [max(t, 0) for t in total]
        less, rest = [t // 2 for t in total], [t - t // 2 for t in total]
        pads = less + rest if at.auto_pad == "SAME_UPPER" else rest + less
    y: Tensor = _TRANSPOSED[axes](x, w, None, stride, 0, 0, at.group or 1, dilation)
    cut: list[int] = []
    for low, high, extra in zip(pads[:axes], pads[axes:], more):
        cut = [-low, extra - high, *cut]
    y = F.pad(y, cut)
    return y if b is None else y + b.reshape(-1, *ones)


def max_pool(at: Attributes, x: Tensor) -> Any:
    """MaxPool; its indices are those of the flattened input."""
    window, ceil = Window.of(at, x.shape[2:], at.kernel_shape), bool(at.ceil_mode)
    wide = x if x.is_floating_point() else x.double()
    if 0 in (places := window.places(x.shape[2:], ceil=ceil)):
        return x.new_zeros(*x.shape[:2], *places), torch.zeros(*x.shape[:2], *places, dtype=torch.int64)
    padded = window.padded(wide, -torch.inf, ceil=ceil)
    found = _MAX[len(window.size)](
        padded, window.size, window.stride, 0, window.dilation, return_indices=at.outputs > 1
    )
    if at.outputs == 1:
        return found.to(x.dtype)
    values, index = found
    place, strides = torch.zeros_like(index), [math.prod(x.shape[2 + i + 1 :]) for i in range(x.ndim - 2)]
    if at.storage_order:
        strides = [math.prod(x.shape[2 : 2 + i]) for i in range(x.ndim - 2)]
    for axis in reversed(range(x.ndim - 2)):
        size = padded.shape[2 + axis]
        place += (index % size - window.before[axis]) * strides[axis]
        index = index // size
    rows = torch.arange(x.shape[0] * x.shape[1]).reshape(*x.shape[:2], *(1,) * (x.ndim - 2))
    return values.to(x.dtype), place + rows * math.prod(x.shape[2:])


def average_pool(at: Attributes, x: Tensor) -> Tensor:
    """AveragePool: a sum over the number of elements that count, padding only where that is asked for."""
    window, ceil = Window.of(at, x.shape[2:], at.kernel_shape), bool(at.ceil_mode)
    ones = torch.ones((1, 1, *x.shape[2:]), dtype=x.dtype)
    if at.count_include_pad:
        pads = [n for low, high in zip(reversed(window.before), reversed(window.behind)) for n in (low, high)]
        ones = F.pad(ones, pads, value=1.0)
        inside = Window(window.size, window.stride, window.dilation, *((0,) * len(window.size),) * 2)
        need = window.padded(x[:1, :1], 0.0, ceil=ceil).shape
        missing = [n for a, b in zip(reversed(need[2:]), reversed(ones.shape[2:])) for n in (0, a - b)]
        count = _sums(F.pad(ones, missing), inside)
    else:
        count = _sums(window.padded(ones, 0.0, ceil=ceil), window)
    return _sums(window.padded(x, 0.0, ceil=ceil), window) / count


def lp_pool(at: Attributes, x: Tensor) -> Tensor:
    """LpPool."""
    window, p = Window.of(at, x.shape[2:], at.kernel_shape), 2 if at.p is None else at.p
    return _sums(window.padded(x.abs() ** p, 0.0, ceil=bool(at.ceil_mode)), window) ** (1 / p)
