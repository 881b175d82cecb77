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


@functools.lru_cache(maxsize=4)
def _pool(seed: int) -> npt.NDArray[np.float64]:
    return np.random.default_rng(seed).random(POOL) - 0.5


def disturb(values: npt.NDArray[Any], epsilon: float, name: str, seed: int) -> None:
    """Disturbs a contiguous float64 array in place, as its name and the seed decide."""
    flat, pool, at, start = values.reshape(-1), _pool(seed), zlib.crc32(name.encode()) % POOL, 0
    while start < len(flat):
        count = min(len(flat) - start, POOL - at)
        part = flat[start : start + count]
        part += part * (epsilon * pool[at : at + count])
        start, at = start + count, (at + count) % POOL
