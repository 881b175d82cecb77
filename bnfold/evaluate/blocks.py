"""Convolutions in float64, a part of the output at a time.

torch has no direct kernel for float64: it copies every window of the input into one matrix, of all samples at once (a
kernel of 3 by 39 over eight channels of 172 by 264 takes 340 MB), and the time goes into memory that is touched once.
In parts that a cache holds they are the same sums in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

#: Bytes of copied windows that are made at a time.
BLOCK = 2**20


def convolve(
    conv: Callable[..., Tensor], x: Tensor, w: Tensor, bias: Tensor | None = None, stride: Sequence[int] = (1,),
    padding: Sequence[int] = (0,), dilation: Sequence[int] = (1,), groups: int = 1,
) -> Tensor:  # fmt: skip
    """``conv(x, w, bias, stride, padding, dilation, groups)``, of one to three spatial axes.

    Args:
        conv: torch's convolution for as many axes.
        x: (batch, channels, ...); of whatever else, and of sizes that leave no place, ``conv`` is asked as it is.
        stride, padding, dilation: one for all axes, or one for each.
    """
    axes = w.ndim - 2
    whole = (x, w, bias, stride, padding, dilation, groups)
    if x.dtype != torch.float64 or x.ndim != w.ndim:
        return conv(*whole)
    steps, pads, gaps = (tuple(v) * (axes // len(v)) for v in (stride, padding, dilation))
    spans = [d * (k - 1) + 1 for d, k in zip(gaps, w.shape[2:])]
    places = [(n + 2 * p - span) // s + 1 for n, p, span, s in zip(x.shape[2:], pads, spans, steps)]
    line = math.prod(w.shape[1:]) * math.prod(places[1:]) * x.element_size()
    plain = max(spans) == 1 and max(steps) == 1 and not any(pads)  # its windows are the input: nothing is copied
    if plain or min(places) < 1 or x.shape[0] * places[0] * line <= BLOCK:
        return conv(*whole)
    x = F.pad(x, [p for pad in reversed(pads) for p in (pad, pad)]) if any(pads) else x
    lines = max(BLOCK // max(line, 1), 1)
    samples = max(lines // places[0], 1)
    y = x.new_empty(x.shape[0], w.shape[0], *places)
    for i in range(0, x.shape[0], samples):
        for j in range(0, places[0], lines):
            count = min(lines, places[0] - j)
            part = x[i : i + samples].narrow(2, j * steps[0], (count - 1) * steps[0] + spans[0])
            y[i : i + samples, :, j : j + count] = conv(part, w, bias, steps, (0,) * axes, gaps, groups)
    return y
