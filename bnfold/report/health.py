"""What is known of every BatchNorm of a model, the closed list of what can be wrong with one, and new statistics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from bnfold.report.export import ExportReport
from bnfold.report.plain import Report, table

Severity = Literal["error", "warning", "note"]
NormKind = Literal["batch_norm", "instance_norm", "frozen", "custom"]

#: What can be wrong with a BatchNorm: how bad it is, what it means, what the user can do.
FINDINGS: dict[str, tuple[Severity, str, str]] = {
    code: (row["severity"], row["why"], row["way_out"]) for code, row in table("findings").items()
}


@dataclass(frozen=True)
class Spread:
    """How a number varies over the channels of a layer: extremes, quartiles and median of its finite values."""

    minimum: float
    lower: float
    median: float
    upper: float
    maximum: float


@dataclass(frozen=True)
class NormHealth:
    """One BatchNorm.

    Attributes:
        module: qualified name; of a functional one the module that calls it.
        layer: class name of the module.
        kind: ``"batch_norm"``, ``"instance_norm"`` with running statistics, ``"frozen"`` (a look-alike whose tensors
            are all buffers) or ``"custom"`` (another class with running statistics).
        functional: whether it is a call of ``torch.nn.functional`` that belongs to no such module.
        channels: None for a lazy layer that has seen no input.
        eps: None where only the layer's code knows it.
        momentum: weight of a new batch; None for a cumulative average, or where the layer has no such thing.
        affine: whether it has a gamma or a beta.
        track_running_stats: whether it has running statistics.
        training: its flag; None for a node of a captured program.
        batches_tracked: how many batches its statistics have seen, where it counts them.
        calls: in how many places the example run calls it; None where nothing ran.
        dtype: of the statistics, or of gamma where there are none.
        scale: of gamma/sqrt(var + eps), None where it has no running statistics.
        shift: of beta - mean*scale.
        variance: of the running variance.
        distance: where data was given, of the channels' distance from it, in standard deviations
            (``bnfold.statistics.distance``). None for an InstanceNorm: its statistics are those of single samples.
    """

    module: str
    layer: str
    kind: NormKind
    functional: bool
    channels: int | None
    eps: float | None
    momentum: float | None
    affine: bool
    track_running_stats: bool
    training: bool | None
    batches_tracked: int | None
    calls: int | None
    dtype: str
    scale: Spread | None = None
    shift: Spread | None = None
    variance: Spread | None = None
    distance: Spread | None = None


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with one BatchNorm, or with how several go together.

    Attributes:
        code: a key of ``FINDINGS``.
        modules: the BatchNorms that it is about.
        detail: the same in words for this case.
        channels: the first few channels that it is about; ``count`` says how many there are.
    """

    derived: ClassVar[tuple[str, ...]] = ("severity", "way_out")
    code: str
    modules: tuple[str, ...]
    detail: str = ""
    channels: tuple[int, ...] = ()
    count: int = 0

    @property
    def severity(self) -> Severity:
        """How bad it is."""
        return FINDINGS[self.code][0]

    @property
    def way_out(self) -> str:
        """What the user can do about it."""
        return FINDINGS[self.code][2]


@dataclass(frozen=True)
class Diagnosis(Report):
    """The health of every BatchNorm of a model, and what folding would do to them.

    Attributes:
        source: where the model comes from.
        norms: the BatchNorms in the model's own order.
        findings: the worst first.
        plan: the fold plan; None where there are no example inputs or torch.export fails.
        samples: of the data that the statistics were compared with.
        notes: what could not be looked at, and why.
    """

    kind: ClassVar[str] = "inspect"
    derived: ClassVar[tuple[str, ...]] = ("healthy",)
    source: dict[str, Any]
    norms: tuple[NormHealth, ...]
    findings: tuple[Finding, ...] = ()
    plan: ExportReport | None = None
    samples: int = 0
    notes: tuple[str, ...] = ()

    @property
    def healthy(self) -> bool:
        """Whether there is neither an error nor a warning."""
        return all(finding.severity == "note" for finding in self.findings)

    def of(self, code: str) -> tuple[Finding, ...]:
        """The findings of one code."""
        return tuple(finding for finding in self.findings if finding.code == code)


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
