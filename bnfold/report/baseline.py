"""A run beside an earlier one."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

Unit = Literal["ratio", "share", "count", "dB", "error"]


@dataclass(frozen=True)
class BaselineRow:
    """One figure then and now.

    Attributes:
        what: in words.
        unit: how it is written.
        then, now: the figures, None where there is none.
        allowed: how far it may go, None where nothing is judged.
        regressed: whether it went further.
    """

    what: str
    unit: Unit
    then: float | None
    now: float | None
    allowed: float | None
    regressed: bool

    def said(self, value: float | None) -> str:
        """A figure as people read it."""
        if value is None:
            return "none"
        if self.unit == "share":
            return f"{value:.2%}"
        if self.unit == "count":
            return f"{value:.0f}"
        if self.unit == "dB":
            return "identical" if math.isinf(value) else f"{value:.1f} dB"
        return f"{value:.2g}" if self.unit == "ratio" else f"{value:.4g}"


@dataclass(frozen=True)
class BaselineReport:
    """A run beside its baseline.

    Attributes:
        path: the file.
        outcome: ``held`` or ``regressed`` where it was compared; ``created``, ``updated`` or, because the verdict is no
            pass, ``not written`` where it was to be rewritten.
        rows: every figure that was compared.
        notes: what could not be compared, and why.
        versions: package -> its version then and now, where they differ.
    """

    path: str
    outcome: Literal["held", "regressed", "created", "updated", "not written"]
    rows: tuple[BaselineRow, ...] = ()
    notes: tuple[str, ...] = ()
    versions: dict[str, tuple[str, str]] = field(default_factory=dict)

    @property
    def regressed(self) -> tuple[BaselineRow, ...]:
        """The figures that went too far."""
        return tuple(row for row in self.rows if row.regressed)
