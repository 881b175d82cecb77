"""Values between torch and NumPy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def to_numpy(value: Any) -> Any:
    """The tensor as an array; bfloat16 as ``ml_dtypes.bfloat16``, complex numbers as pairs of reals like in ONNX."""
    if not isinstance(value, Tensor):
        return value
    value = value.detach()
    value = torch.view_as_real(value.resolve_conj()).contiguous() if value.is_complex() else value.contiguous()
    if value.dtype == torch.bfloat16:
        import ml_dtypes

        return value.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return value.numpy()


def as_tensor(value: Any) -> Any:
    """The array as a tensor; ``ml_dtypes.bfloat16`` as bfloat16. Anything that torch has no type for stays."""
    if not isinstance(value, np.ndarray):
        return value
    if value.dtype.name == "bfloat16":
        return torch.from_numpy(value.view(np.uint16).copy()).view(torch.bfloat16)
    if value.dtype.kind not in "fiubc":
        return value
    value = value.view(value.dtype.name)  # numpy has two types of 64 bits without a sign, torch one
    shared = value.flags.writeable and value.ndim and all(step >= 0 for step in value.strides)
    return torch.from_numpy(value if shared else np.array(value))


def numbers(values: Sequence[Any]) -> list[Tensor]:
    """The outputs that hold numbers: tensors, complex ones as pairs of reals, as ONNX has them, and bare numbers."""
    tensors = [torch.tensor(v) if isinstance(v, (int, float)) else v for v in values]
    return [torch.view_as_real(v) if v.is_complex() else v for v in tensors if isinstance(v, Tensor)]


def identical(one: Tensor, other: Tensor) -> bool:
    """Bit for bit, NaNs included."""
    return one.shape == other.shape and bool(((one == other) | ((one != one) & (other != other))).all())
