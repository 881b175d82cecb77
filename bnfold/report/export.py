"""What a whole run found out and wrote."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from bnfold.report.ledger import Ledger
from bnfold.report.model import LayerRange, NormRange, Operator, Port
from bnfold.report.plain import Report
from bnfold.report.verdict import CheckReport


@dataclass(frozen=True)
class FileReport:
    """What was written; ``nodes`` counts the operators of a .pt2, which has no ``opset``.

    ``sha256`` is that of the file itself; the weights beside it, if there are any, carry theirs in their name.
    """

    path: str
    bytes: int
    nodes: int
    opset: int | None
    batch_norms: int
    data: str | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class ExportReport(Report):
    """Everything that a run found out; ``operators`` before and after folding, ``timings`` in seconds.

    ``layers`` and ``norms`` are the ranges of the contractions and of the BatchNorms, ``kind`` is the run's command, or
    ``plan`` for what was only planned. ``interface`` is what goes in and what comes out,
    ``graph`` the operators before and after.
    """

    derived: ClassVar[tuple[str, ...]] = ("passed",)
    source: dict[str, Any]
    ledger: Ledger
    check: CheckReport | None
    file: FileReport | None
    operators: tuple[int, int] = (0, 0)
    timings: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    layers: tuple[LayerRange, ...] = ()
    norms: tuple[NormRange, ...] = ()
    kind: Literal["export", "fold", "plan"] = "export"  # type: ignore[misc]
    interface: tuple[Port, ...] = ()
    graph: tuple[Operator, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether the file was judged and passed."""
        return self.check is not None and self.check.passed
