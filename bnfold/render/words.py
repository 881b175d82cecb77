"""Numbers as people read them."""

from __future__ import annotations

import math


def count(number: int) -> str:
    """A count with its unit, as 61 K."""
    for unit, size in (("G", 10**9), ("M", 10**6), ("K", 10**3)):
        if number >= size:
            return f"{number / size:.3g} {unit}" if number < 999.5 * size else f"{number / size:.0f} {unit}"
    return str(number)


def size(count: int) -> str:
    """Bytes with their unit."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}" if count < 999.5 * size else f"{count / size:.0f} {unit}"
    return f"{count} bytes"


def number(value: float) -> str:
    """A ratio in two digits, three where it is large."""
    return f"{value:.2g}" if math.isfinite(value) and value < 100 else f"{value:.3g}"


def error(value: float) -> str:
    """A relative error."""
    return f"{value:.1e}" if value else "0"


def plural(count: int, word: str) -> str:
    """``3 folds``, ``1 fold``."""
    return f"{count} {word}{'s' * (count != 1)}"
