"""What a dtype cannot hold."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Overflow:
    """A constant that does not fit its dtype, as the largest magnitude and where it stands."""

    largest: float
    index: tuple[int, ...]


def overflow(tensor: Tensor, dtype: torch.dtype) -> Overflow | None:
    """The first element that would not be finite, rounded to ``dtype``."""
    if tensor.numel() and dtype.is_floating_point:
        # One look at all of it: nearly every tensor fits, and a NaN fails every comparison.
        low, high = tensor.aminmax()
        if -torch.finfo(dtype).max <= float(low) and float(high) <= torch.finfo(dtype).max:
            return None
    rounded = tensor.to(dtype)
    bad = ~rounded.isfinite()
    if not bool(bad.any()):
        return None
    index = tuple(int(i) for i in bad.nonzero()[0])
    return Overflow(float(tensor[index].abs()), index)
