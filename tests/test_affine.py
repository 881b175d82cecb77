"""Affine: arithmetic, axes, free elements, broadcasting."""

from __future__ import annotations

import pytest
import torch
from checker import noise

from bnfold.affine import Affine

NAN = torch.nan


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def channels(*scale: float, shift: tuple[float, ...] | float = 0.0, ndim: int = 4, axis: int = 1) -> Affine:
    return Affine.per_channel(tensor(*scale), torch.as_tensor(shift, dtype=torch.float64), ndim, axis)


def random(seed: int) -> Affine:
    return Affine.per_channel(noise(3, seed=seed), noise(3, seed=seed + 1), 4)


def test_identity_changes_nothing():
    x, identity = noise(2, 3, 4), Affine.identity(3)
    assert torch.equal(identity(x), x)
    assert identity.is_identity and identity.varies() == () and identity.ndim == 3


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


@pytest.mark.parametrize(("affine", "scale", "shift", "positive", "finite"), [
    (channels(1, 1), False, False, True, True),
    (channels(1, 2), True, False, True, True),
    (channels(1, 1, shift=(0, 3)), False, True, True, True),
    (channels(1, 0), True, False, False, True),
    (channels(1, -1), True, False, False, True),
    (channels(1, torch.inf), True, False, True, False),
    (channels(1, 1, shift=(0, NAN)), False, True, True, False),
])  # fmt: skip
def test_what_is_asked_of_an_affine(affine, scale, shift, positive, finite):
    assert (affine.has_scale, affine.has_shift, affine.is_positive, affine.is_finite) == (
        scale, shift, positive, finite)  # fmt: skip
    assert affine.is_identity == (not scale and not shift)
    assert not affine.only_scale().has_shift and torch.equal(affine.only_scale().scale, affine.scale)


#: scale as given, compressed, settled
FREE = [
    ((2, 2, 2), (2,), (2,)),
    ((2, 2, 3), (2, 2, 3), (2, 2, 3)),
    ((NAN, NAN, NAN), (NAN,), (1,)),
    ((NAN, 2, 2), (NAN, 2, 2), (2,)),
    ((NAN, 2, 3), (NAN, 2, 3), (1, 2, 3)),
    ((0, 0), (0,), (0,)),
]


@pytest.mark.parametrize(("given", "compressed", "settled"), FREE)
def test_free_elements(given, compressed, settled):
    def same(a: torch.Tensor, b: tuple[float, ...]) -> bool:
        return torch.equal(a.flatten().nan_to_num(nan=77.0), tensor(*b).nan_to_num(nan=77.0))

    affine = channels(*given)
    assert same(affine.compressed().scale, compressed)
    assert same(affine.settled().scale, settled)


def test_compressed_takes_every_axis_by_itself():
    scale = noise(1, 3, 1).expand(2, 3, 4)
    assert Affine(scale, torch.zeros(2, 3, 4)).compressed().scale.shape == (1, 3, 1)
    assert Affine(scale, torch.zeros(2, 3, 4)).compressed().shift.shape == (1, 1, 1)


def test_readers_agree_where_one_of_them_does_not_care():
    both = channels(NAN, 2, 3).agree(channels(1, NAN, 3))
    assert both is not None and torch.equal(both.scale.flatten(), tensor(1, 2, 3))
    wide = channels(2.0).agree(channels(2, NAN, 2))
    assert wide is not None and torch.equal(wide.scale.expand(1, 3, 1, 1).flatten(), tensor(2, 2, 2))


@pytest.mark.parametrize("other", [channels(1, 2, 4), channels(2.0), channels(1, 2, 3, shift=(0, 0, 1))])
def test_readers_that_want_different_things_do_not_agree(other):
    assert channels(1, 2, 3).agree(other) is None


def test_an_operand_that_was_broadcast():
    affine = channels(1, 2, 3)
    inner = affine.unbroadcast((3, 1, 1))
    assert inner is not None and inner.scale.shape == (3, 1, 1)
    assert affine.unbroadcast((2, 3, 4, 5)) is not None
    assert affine.unbroadcast((1, 1, 1)) is None  # one element for three channels
    assert affine.unbroadcast((5,)) is None  # the channels are not even an axis of it
    assert channels(2.0).unbroadcast((5,)) is not None


def test_broadcast_adds_leading_axes():
    wide = Affine.per_channel(noise(3), noise(3), 3, axis=0).broadcast(5)
    assert wide.ndim == 5 and wide.varies() == (2,)
