"""Affine: ``x -> scale * x + shift`` with a float64 constant for every element of a value that it varies along.

For inference BatchNorm is ``y = s*x + t`` per channel with ``s = gamma / sqrt(var + eps)`` and ``t = beta - mean*s``
(Ioffe and Szegedy 2015, eq. 1-4, with the running statistics in place of the batch's).

Both tensors have as many axes as the value and size 1 on every axis the affine does not vary along, so an operator
that moves elements acts on an Affine by acting on its two tensors. While an Affine is being collected from several
readers, an element that none of them reads is *free*: NaN in the tensors. ``settled`` picks a value for those.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Affine:
    """``y = scale * x + shift``, both float64 and broadcastable to the value, with as many axes as the value."""

    scale: Tensor
    shift: Tensor

    @classmethod
    def identity(cls, ndim: int) -> Affine:
        """``y = x`` for a value with ``ndim`` axes."""
        one = torch.ones((1,) * ndim, dtype=torch.float64)
        return cls(one, torch.zeros_like(one))

    @classmethod
    def per_channel(cls, scale: Tensor | float, shift: Tensor | float, ndim: int, axis: int = 1) -> Affine:
        """One scale and shift, shape (C,), per index of ``axis``."""

        def align(t: Tensor | float) -> Tensor:
            t = torch.as_tensor(t, dtype=torch.float64)
            return t.reshape([-1 if a == axis else 1 for a in range(ndim)]) if t.ndim else t.reshape((1,) * ndim)

        return cls(align(scale), align(shift))

    @property
    def ndim(self) -> int:
        """Number of axes of the value it applies to."""
        return self.scale.ndim

    def __call__(self, x: Tensor) -> Tensor:
        """The value of the affine at ``x``."""
        return x * self.scale + self.shift

    def after(self, first: Affine) -> Affine:
        """``self(first(x))``: scale ``s2*s1``, shift ``s2*t1 + t2``."""
        return Affine(self.scale * first.scale, self.scale * first.shift + self.shift)

    def only_scale(self) -> Affine:
        """The same scale, no shift."""
        return Affine(self.scale, torch.zeros((1,) * self.ndim, dtype=torch.float64))

    def varies(self) -> tuple[int, ...]:
        """The axes along which scale or shift differ."""
        return tuple(a for a in range(self.ndim) if max(self.scale.shape[a], self.shift.shape[a]) > 1)

    @property
    def has_shift(self) -> bool:
        """Whether some shift is not zero."""
        return bool((self.shift != 0).any())

    @property
    def has_scale(self) -> bool:
        """Whether some scale is not one."""
        return bool((self.scale != 1).any())

    @property
    def is_identity(self) -> bool:
        """Whether it changes nothing."""
        return not self.has_shift and not self.has_scale

    @property
    def is_positive(self) -> bool:
        """Whether every scale is above zero."""
        return bool((self.scale > 0).all())

    @property
    def is_finite(self) -> bool:
        """Whether neither scale nor shift holds a NaN or an infinity."""
        return bool(self.scale.isfinite().all() and self.shift.isfinite().all())

    def compressed(self) -> Affine:
        """The same affine with size 1 on every axis along which all elements agree; free ones stay free."""
        return Affine(_compressed(self.scale), _compressed(self.shift))

    def settled(self) -> Affine:
        """Free elements take the value that lets the most axes be of size 1; the identity where none is asked for."""
        scale, shift = _compressed(self.scale, fill=True), _compressed(self.shift, fill=True)
        return Affine(torch.nan_to_num(scale, nan=1.0), torch.nan_to_num(shift, nan=0.0))

    def uniform(self, axes: Collection[int]) -> Affine | None:
        """The same affine with size 1 along ``axes``, free elements as the others; None where it varies there."""
        parts = [self.scale, self.shift]
        for i, axis in ((i, axis) for axis in axes for i in (0, 1)):
            free = parts[i].isnan()
            low = parts[i].masked_fill(free, torch.inf).amin(axis, keepdim=True)
            if bool((low < parts[i].masked_fill(free, -torch.inf).amax(axis, keepdim=True)).any()):
                return None
            parts[i] = torch.where(free.all(axis, keepdim=True), torch.nan, low)
        return Affine(*parts)

    def agree(self, other: Affine) -> Affine | None:
        """The affine that serves both readers of a value, or None where they ask for different things."""
        scale, shift = _agree(self.scale, other.scale), _agree(self.shift, other.shift)
        return None if scale is None or shift is None else Affine(scale, shift)

    def unbroadcast(self, shape: Sequence[int]) -> Affine | None:
        """The affine for an operand of ``shape`` that was broadcast to this value; None where it would need two."""
        pad = self.ndim - len(shape)
        for axis in self.varies():
            if axis < pad or shape[axis - pad] == 1:
                return None
        return Affine(self.scale.reshape(self.scale.shape[pad:]), self.shift.reshape(self.shift.shape[pad:]))

    def broadcast(self, ndim: int) -> Affine:
        """The same affine with leading axes of size 1, for a value with ``ndim`` axes."""
        lead = (1,) * (ndim - self.ndim)
        return Affine(self.scale.reshape(lead + self.scale.shape), self.shift.reshape(lead + self.shift.shape))

    def without_axes(self, axes: Collection[int]) -> Affine:
        """The same affine for a value that has lost ``axes``, along which it does not vary."""
        kept = [axis for axis in range(self.ndim) if axis not in axes]
        return Affine(*(t.reshape([t.shape[axis] for axis in kept]) for t in (self.scale, self.shift)))

    def with_axes(self, axes: Collection[int]) -> Affine:
        """The same affine for a value that has ``axes`` too, along which it does not vary."""
        found = self
        for axis in sorted(axes):
            found = Affine(found.scale.unsqueeze(axis), found.shift.unsqueeze(axis))
        return found


def _compressed(t: Tensor, *, fill: bool = False) -> Tensor:
    for axis in range(t.ndim):
        first = t.narrow(axis, 0, 1)
        if t.shape[axis] <= 1:
            continue
        if bool((t == first).all()):
            t = first
            continue
        free = t.isnan()
        if not bool(free.any()):
            continue
        low = t.masked_fill(free, torch.inf).amin(axis, keepdim=True)
        high = t.masked_fill(free, -torch.inf).amax(axis, keepdim=True)
        all_free = low > high
        if bool(((low >= high) & (all_free | ~free.any(axis, keepdim=True) | fill)).all()):
            t = torch.where(all_free, torch.nan, low)
    return t


def _agree(a: Tensor, b: Tensor) -> Tensor | None:
    if bool(((a == b) | a.isnan() | b.isnan()).all()):
        return torch.where(a.isnan(), b, a)
    return None


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
