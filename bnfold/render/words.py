"""Numbers and outcomes as people read them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

#: Where an affine went, by its outcome.
OUTCOMES = {
    "backward": "into the layer before", "forward": "into the layer after", "merged": "with a parallel branch",
    "left": "still there",
}  # fmt: skip
#: Of verdicts: colour is not all that tells.
SIGNS = {"pass": "✓", "fail": "✗", "inconclusive": "?", "not judged": "–", "error": "✗"}


def _scaled(value: float, units: dict[str, float], small: str) -> str:
    """Three digits in the first unit that the value reaches; ``small`` where it reaches none."""
    for unit, size in units.items():
        if value >= size:
            return f"{value / size:{'.3g' if value < 999.5 * size else '.0f'}} {unit}"
    return small


def count(number: int) -> str:
    """A count with its unit, as 61 K."""
    return _scaled(number, {"G": 1e9, "M": 1e6, "K": 1e3}, str(number))


def size(count: int) -> str:
    """Bytes with their unit."""
    return _scaled(count, {"GB": 1e9, "MB": 1e6, "KB": 1e3}, f"{count} bytes")


def seconds(value: float) -> str:
    """A time in the unit that suits it."""
    return _scaled(value, {"s": 1.0, "ms": 1e-3}, f"{value * 1e6:.3g} µs")


def number(value: float) -> str:
    """A ratio in two digits, three where it is large."""
    return f"{value:.2g}" if math.isfinite(value) and value < 100 else f"{value:.3g}"


def error(value: float) -> str:
    """A relative error."""
    return f"{value:.1e}" if value else "0"


def plural(count: int, word: str) -> str:
    """``3 folds``, ``1 fold``."""
    return f"{count} {word}{'s' * (count != 1)}"


def milliseconds(seconds: float) -> str:
    """A time that is compared with others."""
    return f"{seconds * 1e3:.3g} ms"


def known(value: Any, said: Callable[[Any], str], unknown: str = "–") -> str:
    """What ``said`` makes of a value; ``unknown`` where there is none."""
    return unknown if value is None else said(value)


def verdict(outcome: str) -> str:
    """A verdict with its sign."""
    return f"{SIGNS[outcome]} {outcome}"
