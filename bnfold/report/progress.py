"""What is told of a run while it lasts."""

from __future__ import annotations

from collections.abc import Callable

#: Called with a stage's name, how much of it is done, and how much there is.
Progress = Callable[[str, int, int], None]


def silent(stage: str, done: int, total: int) -> None:
    """Reports nothing."""
