"""What rounding constants once does: each element off by up to half of an epsilon, relative, one draw per seed."""

from __future__ import annotations

import functools
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt

#: Numbers of one draw, which every constant reads from a place of its own and around. A prime: no axis repeats in step
#: with it.
POOL = 65_537


@functools.lru_cache(maxsize=32)
def _pool(seed: int, epsilon: float, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    drawn: npt.NDArray[Any] = (1 + epsilon * (np.random.default_rng(seed).random(POOL) - 0.5)).astype(dtype)
    return drawn


def disturb(values: npt.NDArray[Any], epsilon: float, name: str, seed: int) -> None:
    """Disturbs a contiguous array of float64 in place, as its name and the seed decide.

    Of float32 as well where epsilon is well above that of float32 itself.
    """
    flat, pool = values.reshape(-1), _pool(seed, epsilon, values.dtype)
    at, start = zlib.crc32(name.encode()) % POOL, 0
    while start < len(flat):
        count = min(len(flat) - start, POOL - at)
        flat[start : start + count] *= pool[at : at + count]
        start, at = start + count, (at + count) % POOL
