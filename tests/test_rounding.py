"""Rounding constants once, as it is drawn: small enough, the same for one name and seed, and another for others."""

from __future__ import annotations

import numpy as np
import pytest

from bnfold.rounding import POOL, disturb

EPSILON = 2.0**-23


def moved(shape: tuple[int, ...], name: str = "weight", seed: int = 0) -> np.ndarray:
    values = np.ones(shape)
    disturb(values, EPSILON, name, seed)
    return values - 1


@pytest.mark.parametrize("shape", [(), (1,), (7, 5, 3), (0, 4), (65_537,), (2 * POOL + 11,)])
def test_every_element_moves_by_up_to_half_an_epsilon(shape: tuple[int, ...]) -> None:
    off = moved(shape)
    assert off.shape == shape and bool((np.abs(off) <= EPSILON / 2).all())
    if off.size > 1000:  # uniform: the standard error of the mean square of n is its own over the square root of n
        square = np.mean(np.square(off / EPSILON))
        assert abs(square - 1 / 12) < 6 * (1 / 80 - 1 / 144) ** 0.5 / min(off.size, POOL) ** 0.5


def test_it_is_relative_and_zeros_stay() -> None:
    values = np.array([0.0, 1e-30, -1e30, 4.0])
    disturb(values, EPSILON, "weight", 3)
    assert values[0] == 0 and bool((np.abs(values / [1, 1e-30, -1e30, 4.0] - [0, 1, 1, 1]) <= EPSILON).all())


def test_a_name_and_a_seed_decide() -> None:
    assert np.array_equal(moved((33,)), moved((33,)))
    assert not np.array_equal(moved((33,)), moved((33,), name="bias"))
    assert not np.array_equal(moved((33,)), moved((33,), seed=1))


def test_rows_of_a_large_constant_are_not_alike() -> None:
    rows = moved((POOL // 64 + 1, 128))
    assert len(np.unique(rows[:, 0])) > POOL // 128
    whole = moved((2 * POOL,))
    assert np.array_equal(whole[:POOL], whole[POOL:])  # one draw, over again
