"""How long models take, side by side."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from bnfold.report.plain import Report


@dataclass(frozen=True)
class Latency:
    """How long one contestant takes.

    Attributes:
        name: the file, or the source of a torch model.
        provider: what it really ran on: ONNX Runtime's provider, or torch and its device.
        median: seconds per call, as ``p95``, which 95 % of the turns stay below.
        calls: calls in a turn; a turn is timed as a whole, so that a fast model lasts longer than the clock's jitter.
        ratio: its time over the first contestant's, the median over rounds in which both had a turn.
        interval: 95 % confidence interval of ``ratio``, from the order statistics of the rounds.
        load: seconds to open the session, the median of several; None for torch.
        memory: bytes by which a process that only opens the session and runs it once grows at its peak; resident
            memory of the host, None where it was not measured.
    """

    name: str
    provider: str
    median: float
    p95: float
    calls: int
    ratio: float
    interval: tuple[float, float]
    load: float | None = None
    memory: int | None = None

    @property
    def speedup(self) -> float:
        """How many times as fast as the first contestant."""
        return 1 / self.ratio

    @property
    def told_apart(self) -> bool:
        """Whether the ratio means anything: with 1 inside its interval nobody knows which of the two is faster."""
        low, high = self.interval
        return not low <= 1 <= high


@dataclass(frozen=True)
class LatencyReport(Report):
    """A paired measurement: in every round each contestant has one turn, in random order.

    Attributes:
        contestants: the first is what ``ratio`` refers to.
        rounds: how many turns each had, after ``warmup`` calls that do not count.
        threads: for the operators of one call; None where ONNX Runtime and torch chose.
        inputs: the arrays that went in, as ``float32[1, 3, 224, 224]`` by the first contestant's names.
        machine: what it ran on, and the versions of what ran.
        notes: what the reader has to know to compare.
    """

    kind: ClassVar[str] = "bench"
    contestants: tuple[Latency, ...]
    rounds: int
    warmup: int
    threads: int | None
    inputs: dict[str, str]
    machine: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
