"""The results of the other commands: inspect, calibrate, bisect, bench and fleet."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from bnfold.report.plain import Report, table
from bnfold.report.verdict import ExportReport

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
    """One BatchNorm."""

    module: str  #: qualified name; of a functional one the module that calls it.
    layer: str  #: class name of the module.
    #: ``"batch_norm"``, ``"instance_norm"`` with running statistics, ``"frozen"`` (a look-alike whose tensors are all
    #: buffers) or ``"custom"`` (another class with running statistics).
    kind: NormKind
    functional: bool  #: whether it is a call of ``torch.nn.functional`` that belongs to no such module.
    channels: int | None  #: None for a lazy layer that has seen no input.
    eps: float | None  #: None where only the layer's code knows it.
    #: weight of a new batch; None for a cumulative average, or where the layer has no such thing.
    momentum: float | None
    affine: bool  #: whether it has a gamma or a beta.
    track_running_stats: bool  #: whether it has running statistics.
    training: bool | None  #: its flag; None for a node of a captured program.
    batches_tracked: int | None  #: how many batches its statistics have seen, where it counts them.
    calls: int | None  #: in how many places the example run calls it; None where nothing ran.
    dtype: str  #: of the statistics, or of gamma where there are none.
    scale: Spread | None = None  #: of gamma/sqrt(var + eps), None where it has no running statistics.
    shift: Spread | None = None  #: of beta - mean*scale.
    variance: Spread | None = None  #: of the running variance.
    #: where data was given, of the channels' distance from it, in standard deviations (``bnfold.statistics.moments``).
    #: None for an InstanceNorm: its statistics are those of single samples.
    distance: Spread | None = None


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with one BatchNorm, or with how several go together."""

    derived: ClassVar[tuple[str, ...]] = ("severity", "way_out")
    code: str  #: a key of ``FINDINGS``.
    modules: tuple[str, ...]  #: the BatchNorms that it is about.
    detail: str = ""  #: the same in words for this case.
    channels: tuple[int, ...] = ()  #: the first few channels that it is about; ``count`` says how many there are.
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
    """The health of every BatchNorm of a model, and what folding would do to them."""

    kind: ClassVar[str] = "inspect"
    derived: ClassVar[tuple[str, ...]] = ("healthy",)
    source: dict[str, Any]  #: where the model comes from.
    norms: tuple[NormHealth, ...]  #: the BatchNorms in the model's own order.
    findings: tuple[Finding, ...] = ()  #: the worst first.
    plan: ExportReport | None = None  #: the fold plan; None where there are no example inputs or torch.export fails.
    samples: int = 0  #: of the data that the statistics were compared with.
    notes: tuple[str, ...] = ()  #: what could not be looked at, and why.

    @property
    def healthy(self) -> bool:
        """Whether there is neither an error nor a warning."""
        return all(finding.severity == "note" for finding in self.findings)

    def of(self, code: str) -> tuple[Finding, ...]:
        """The findings of one code."""
        return tuple(finding for finding in self.findings if finding.code == code)


@dataclass(frozen=True)
class CalibratedLayer:
    """One BatchNorm with new statistics."""

    module: str  #: qualified name.
    channels: int  #: how many there are.
    values: int  #: how many values of the data each channel's statistics rest on.
    calls: int  #: in how many places the model calls it; the statistics are pooled over them.
    turn: int  #: in which pass over the data it was measured, from 1.
    had_statistics: bool  #: whether it had any before.
    #: largest change of a mean, in new standard deviations (with eps); None where it had no statistics.
    moved: float | None = None
    stretched: float | None = None  #: largest factor between old and new variance (with eps), 1 or more; None likewise.


@dataclass(frozen=True)
class CalibrationReport(Report):
    """What ``calibrate`` did."""

    kind: ClassVar[str] = "calibrate"
    source: dict[str, Any]  #: where the model comes from.
    scheme: str  #: ``"sequential"`` or ``"one-pass"``.
    samples: int  #: how many rows the data has.
    passes: int  #: how often it was read.
    layers: tuple[CalibratedLayer, ...]  #: what was measured, in the order of the passes.
    unreached: tuple[str, ...] = ()  #: the BatchNorms that the data did not reach; they are as they were.
    circular: tuple[str, ...] = ()  #: those that feed themselves, for which no statistics are exact.
    path: str | None = None  #: the file, and ``bytes`` its size; None where none was written.
    bytes: int = 0


@dataclass(frozen=True)
class Culprit:
    """The first value of a file that is off by more than noise explains."""

    module: str  #: the module that computes it; empty where it belongs to none.
    value: str  #: its name in the file.
    operator: str  #: the ONNX operator that makes it.
    node: str  #: the name of that node.
    #: its error over its noise, over all or for its worst channel; for a decision, how far it is from a near-tie.
    #: Infinite where integers differ.
    ratio: float
    before: float  #: the largest such ratio among what it is computed from; 0 where that is the model's input.
    folds: tuple[str, ...] = ()  #: the BatchNorms, other affines and merges that touched it.
    #: whether the model has this very value. Where not, it is the first after the last ones that agree.
    sure: bool = True


@dataclass(frozen=True)
class Bisection(Report):
    """What ``bisect`` found."""

    kind: ClassVar[str] = "bisect"
    derived: ClassVar[tuple[str, ...]] = ("passed",)

    culprit: Culprit | None  #: the first value that is off, if any is.
    optimizers: tuple[str, ...]  #: ONNX Runtime's optimisations that make a right file wrong; disable them.
    agree: str  #: the last module before the culprit whose value agrees.
    compared: int  #: how many values of the file were compared, of ``values`` in all.
    values: int
    worst: float  #: largest ratio of any sample at any output, without optimisations.
    optimized: float  #: the same with all of them on.
    limit: float  #: the largest ratio that is no culprit.
    notes: tuple[str, ...] = ()  #: what a reader should know.
    source: dict[str, Any] = field(default_factory=dict)
    file: str = ""

    @property
    def passed(self) -> bool:
        """Whether nothing leaves the noise."""
        return self.culprit is None and not self.optimizers and max(self.worst, self.optimized) <= self.limit


@dataclass(frozen=True)
class Latency:
    """How long one contestant takes."""

    name: str  #: the file, or the source of a torch model.
    provider: str  #: what it really ran on: ONNX Runtime's provider, or torch and its device.
    median: float  #: seconds per call, as ``p95``, which 95 % of the turns stay below.
    p95: float
    #: calls in a turn; a turn is timed as a whole, so that a fast model lasts longer than the clock's jitter.
    calls: int
    ratio: float  #: its time over the first contestant's, the median over rounds in which both had a turn.
    interval: tuple[float, float]  #: 95 % confidence interval of ``ratio``, from the order statistics of the rounds.
    load: float | None = None  #: seconds to open the session, the median of several; None for torch.
    #: bytes by which a process that only opens the session and runs it once grows at its peak; resident memory of the
    #: host, None where it was not measured.
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
    """A paired measurement: in every round each contestant has one turn, in random order."""

    kind: ClassVar[str] = "bench"
    contestants: tuple[Latency, ...]  #: the first is what ``ratio`` refers to.
    rounds: int  #: how many turns each had, after ``warmup`` calls that do not count.
    warmup: int
    threads: int | None  #: for the operators of one call; None where ONNX Runtime and torch chose.
    inputs: dict[str, str]  #: the arrays that went in, as ``float32[1, 3, 224, 224]`` by the first contestant's names.
    machine: dict[str, str] = field(default_factory=dict)  #: what it ran on, and the versions of what ran.
    notes: tuple[str, ...] = ()  #: what the reader has to know to compare.


Outcome = Literal["pass", "fail", "inconclusive", "not judged", "error"]
#: Exit codes, the gravest first: a wrong file is worse than one that is not there.
GRAVEST = (130, 1, 7, 2, 3, 4, 5, 6)


@dataclass(frozen=True)
class ModelRow:
    """One model of a fleet."""

    name: str  #: of its files.
    source: str  #: as it is written in the list of models.
    outcome: Outcome  #: the verdict, or ``error`` where there is none.
    exit_code: int  #: as that of its export.
    said: str = ""  #: why it is no pass, in one line.
    folded: int = 0  #: how many of its ``batch_norms`` are folded.
    batch_norms: int = 0
    ratio: float | None = None  #: error over noise of the worst output.
    file: str | None = None  #: where the ONNX file is, None where this run and its ``key`` have none.
    report: str | None = None  #: where its pages are, without the suffix; None where there are none.
    bytes: int | None = None  #: size of the file with its weights.
    sha256: str | None = None  #: of the file.
    latency: float | None = None  #: seconds of one call, where that was asked for.
    seconds: float = 0.0  #: how long its process ran.
    memory: int = 0  #: the most that its process was seen to have, in bytes.
    tries: int = 0  #: how many processes it took.
    earlier: bool = False  #: whether the result is that of an earlier run.
    #: what differs from the run before, in words; empty where nothing does, or there was none.
    changed: tuple[str, ...] = ()
    key: str = ""  #: SHA-256 of the options and versions that the result depends on.


@dataclass(frozen=True)
class FleetReport(Report):
    """Every model of a fleet, in the order of the list."""

    kind: ClassVar[str] = "fleet"
    derived: ClassVar[tuple[str, ...]] = ("counts", "exit_code")
    source: str  #: the list of models.
    rows: tuple[ModelRow, ...]  #: one per model.
    seconds: float  #: how long it took, without the start of the workers.

    @property
    def counts(self) -> dict[str, int]:
        """How many models there are of each outcome."""
        return dict(Counter(row.outcome for row in self.rows))

    @property
    def exit_code(self) -> int:
        """0 where every model passed, else the gravest of the rows'."""
        codes = {row.exit_code for row in self.rows}
        return next((code for code in GRAVEST if code in codes), max(codes, default=0))
