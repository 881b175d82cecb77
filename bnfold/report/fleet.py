"""What became of a fleet: many models, one row each."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar, Literal

from bnfold.report.plain import Report

Outcome = Literal["pass", "fail", "inconclusive", "not judged", "error"]
#: Exit codes, the gravest first: a wrong file is worse than one that is not there.
GRAVEST = (130, 1, 7, 2, 3, 4, 5, 6)


@dataclass(frozen=True)
class ModelRow:
    """One model of a fleet.

    Attributes:
        name: of its files.
        source: as it is written in the list of models.
        outcome: the verdict, or ``error`` where there is none.
        exit_code: as that of its export.
        said: why it is no pass, in one line.
        folded: how many of its ``batch_norms`` are folded.
        ratio: error over noise of the worst output.
        file: where the ONNX file is, None where this run and its ``key`` have none.
        report: where its pages are, without the suffix; None where there are none.
        bytes: size of the file with its weights.
        sha256: of the file.
        latency: seconds of one call, where that was asked for.
        seconds: how long its process ran.
        memory: the most that its process was seen to have, in bytes.
        tries: how many processes it took.
        earlier: whether the result is that of an earlier run.
        changed: what differs from the run before, in words; empty where nothing does, or there was none.
        key: SHA-256 of the options and versions that the result depends on.
    """

    name: str
    source: str
    outcome: Outcome
    exit_code: int
    said: str = ""
    folded: int = 0
    batch_norms: int = 0
    ratio: float | None = None
    file: str | None = None
    report: str | None = None
    bytes: int | None = None
    sha256: str | None = None
    latency: float | None = None
    seconds: float = 0.0
    memory: int = 0
    tries: int = 0
    earlier: bool = False
    changed: tuple[str, ...] = ()
    key: str = ""


@dataclass(frozen=True)
class FleetReport(Report):
    """Every model of a fleet, in the order of the list.

    Attributes:
        source: the list of models.
        rows: one per model.
        seconds: how long it took, without the start of the workers.
        counts: how many models there are of each outcome.
        exit_code: 0 where every model passed, else the gravest of the rows'.
    """

    kind: ClassVar[str] = "fleet"
    derived: ClassVar[tuple[str, ...]] = ("counts", "exit_code")
    source: str
    rows: tuple[ModelRow, ...]
    seconds: float

    @property
    def counts(self) -> dict[str, int]:
        """How many models there are of each outcome."""
        return dict(Counter(row.outcome for row in self.rows))

    @property
    def exit_code(self) -> int:
        """That of the command."""
        codes = {row.exit_code for row in self.rows}
        return next((code for code in GRAVEST if code in codes), max(codes, default=0))
