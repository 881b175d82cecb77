"""Affine: arithmetic and axes."""

from __future__ import annotations

import pytest
import torch
from checker import noise

from bnfold.affine import Affine


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def channels(*scale: float, shift: tuple[float, ...] | float = 0.0, ndim: int = 4, axis: int = 1) -> Affine:
    return Affine.per_channel(tensor(*scale), torch.as_tensor(shift, dtype=torch.float64), ndim, axis)


def random(seed: int) -> Affine:
    return Affine.per_channel(noise(3, seed=seed), noise(3, seed=seed + 1), 4)


def test_per_channel_lies_along_its_axis():
    affine = channels(1, 2, 3, shift=(4, 5, 6), ndim=3, axis=2)
    assert affine.scale.shape == (1, 1, 3) and affine.varies() == (2,)
    assert torch.equal(affine(torch.ones(2, 2, 3, dtype=torch.float64))[0, 0], tensor(5, 7, 9))
    assert Affine.per_channel(2.0, 1.0, 3).scale.shape == (1, 1, 1)


def test_after_is_composition():
    first, second, x = random(0), random(2), noise(2, 3, 4, 5, seed=9)
    assert torch.allclose(second.after(first)(x), second(first(x)), rtol=1e-14, atol=1e-14)
    assert not torch.allclose(first.after(second)(x), second(first(x)))


def test_after_keeps_axes_of_both():
    rows = Affine.per_channel(noise(4), noise(4), 4, axis=2)
    assert rows.after(random(0)).varies() == (1, 2)


@pytest.mark.parametrize(("affine", "scale", "shift", "finite"), [
    (channels(1, 1), False, False, True),
    (channels(1, 2), True, False, True),
    (channels(1, 1, shift=(0, 3)), False, True, True),
    (channels(1, 0), True, False, True),
    (channels(1, -1), True, False, True),
    (channels(1, torch.inf), True, False, False),
    (channels(1, 1, shift=(0, torch.nan)), False, True, False),
])  # fmt: skip
def test_what_is_asked_of_an_affine(affine, scale, shift, finite):
    assert (affine.has_scale, affine.has_shift, affine.is_finite) == (scale, shift, finite)


def test_compressed_takes_every_axis_by_itself():
    scale = noise(1, 3, 1).expand(2, 3, 4)
    assert Affine(scale, torch.zeros(2, 3, 4)).compressed().scale.shape == (1, 3, 1)
    assert Affine(scale, torch.zeros(2, 3, 4)).compressed().shift.shape == (1, 1, 1)
