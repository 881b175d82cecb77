"""Affine: ``x -> scale * x + shift`` with a float64 constant for every element of a value that it varies along.

For inference BatchNorm is ``y = s*x + t`` per channel with ``s = gamma / sqrt(var + eps)`` and ``t = beta - mean*s``
(Ioffe and Szegedy 2015, eq. 1-4, with the running statistics in place of the batch's).

Both tensors have as many axes as the value and size 1 on every axis the affine does not vary along, so an operator
that moves elements acts on an Affine by acting on its two tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Affine:
    """``y = scale * x + shift``, both float64 and broadcastable to the value, with as many axes as the value."""

    scale: Tensor
    shift: Tensor

    @classmethod
    def per_channel(cls, scale: Tensor | float, shift: Tensor | float, ndim: int, axis: int = 1) -> Affine:
        """One scale and shift, shape (C,), per index of ``axis``."""

        def align(t: Tensor | float) -> Tensor:
            t = torch.as_tensor(t, dtype=torch.float64)
            return t.reshape([-1 if a == axis else 1 for a in range(ndim)]) if t.ndim else t.reshape((1,) * ndim)

        return cls(align(scale), align(shift))

    def __call__(self, x: Tensor) -> Tensor:
        """The value of the affine at ``x``."""
        return x * self.scale + self.shift

    def after(self, first: Affine) -> Affine:
        """``self(first(x))``: scale ``s2*s1``, shift ``s2*t1 + t2``."""
        return Affine(self.scale * first.scale, self.scale * first.shift + self.shift)

    def varies(self) -> tuple[int, ...]:
        """The axes along which scale or shift differ."""
        return tuple(a for a in range(self.scale.ndim) if max(self.scale.shape[a], self.shift.shape[a]) > 1)

    @property
    def has_shift(self) -> bool:
        """Whether some shift is not zero."""
        return bool((self.shift != 0).any())

    @property
    def has_scale(self) -> bool:
        """Whether some scale is not one."""
        return bool((self.scale != 1).any())

    @property
    def is_finite(self) -> bool:
        """Whether neither scale nor shift holds a NaN or an infinity."""
        return bool(self.scale.isfinite().all() and self.shift.isfinite().all())

    def compressed(self) -> Affine:
        """The same affine with size 1 on every axis along which all elements agree."""
        return Affine(_compressed(self.scale), _compressed(self.shift))


def _compressed(t: Tensor) -> Tensor:
    for axis in range(t.ndim):
        first = t.narrow(axis, 0, 1)
        if t.shape[axis] > 1 and bool((t == first).all()):
            t = first
    return t


@dataclass(frozen=True, eq=False)
class Meaning:
    """The captured value that an edited one stands for, and how: as ``after`` makes it of that one, or as it is."""

    value: str
    after: Affine | None = None

    def of(self, captured: Tensor) -> Tensor:
        """What the edited value must be, float64 where it is another, from the captured one."""
        return captured if self.after is None else self.after(captured.double())

    def moved(self, difference: Tensor) -> Tensor:
        """How far the edited value is off, from how far the captured one is."""
        return difference if self.after is None else difference * self.after.scale.abs()

    def then(self, after: Affine) -> Meaning:
        """The same of what ``after`` makes of the edited value."""
        return Meaning(self.value, after if self.after is None else after.after(self.after))
