"""What calibration measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from bnfold.report.plain import Report


@dataclass(frozen=True)
class CalibratedLayer:
    """One BatchNorm with new statistics.

    Attributes:
        module: qualified name.
        channels: how many there are.
        values: how many values of the data each channel's statistics rest on.
        calls: in how many places the model calls it; the statistics are pooled over them.
        turn: in which pass over the data it was measured, from 1.
        had_statistics: whether it had any before.
        moved: largest change of a mean, in new standard deviations (with eps); None where it had no statistics.
        stretched: largest factor between old and new variance (with eps), 1 or more; None likewise.
    """

    module: str
    channels: int
    values: int
    calls: int
    turn: int
    had_statistics: bool
    moved: float | None = None
    stretched: float | None = None


@dataclass(frozen=True)
class CalibrationReport(Report):
    """What ``calibrate`` did.

    Attributes:
        source: where the model comes from.
        scheme: ``"sequential"`` or ``"one-pass"``.
        samples: how many rows the data has.
        passes: how often it was read.
        layers: what was measured, in the order of the passes.
        unreached: the BatchNorms that the data did not reach; they are as they were.
        circular: those that feed themselves, for which no statistics are exact.
        path: the file, and ``bytes`` its size; None where none was written.
    """

    kind: ClassVar[str] = "calibrate"
    source: dict[str, Any]
    scheme: str
    samples: int
    passes: int
    layers: tuple[CalibratedLayer, ...]
    unreached: tuple[str, ...] = ()
    circular: tuple[str, ...] = ()
    path: str | None = None
    bytes: int = 0
