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
            (``bnfold.statistics.moments``). None for an InstanceNorm: its statistics are those of single samples.
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


@dataclass(frozen=True)
class Culprit:
    """The first value of a file that is off by more than noise explains.

    Attributes:
        module: the module that computes it; empty where it belongs to none.
        value: its name in the file.
        operator: the ONNX operator that makes it.
        node: the name of that node.
        ratio: its error over its noise, over all or for its worst channel; for a decision, how far it is from a
            near-tie. Infinite where integers differ.
        before: the largest such ratio among what it is computed from; 0 where that is the model's input.
        folds: the BatchNorms, other affines and merges that touched it.
        sure: whether the model has this very value. Where not, it is the first after the last ones that agree.
    """

    module: str
    value: str
    operator: str
    node: str
    ratio: float
    before: float
    folds: tuple[str, ...] = ()
    sure: bool = True


@dataclass(frozen=True)
class Bisection(Report):
    """What ``bisect`` found.

    Attributes:
        culprit: the first value that is off, if any is.
        optimizers: ONNX Runtime's optimisations that make a right file wrong; disable them.
        agree: the last module before the culprit whose value agrees.
        compared: how many values of the file were compared, of ``values`` in all.
        worst: largest ratio of any sample at any output, without optimisations.
        optimized: the same with all of them on.
        limit: the largest ratio that is no culprit.
        notes: what a reader should know.
    """

    kind: ClassVar[str] = "bisect"
    derived: ClassVar[tuple[str, ...]] = ("passed",)

    culprit: Culprit | None
    optimizers: tuple[str, ...]
    agree: str
    compared: int
    values: int
    worst: float
    optimized: float
    limit: float
    notes: tuple[str, ...] = ()
    source: dict[str, Any] = field(default_factory=dict)
    file: str = ""

    @property
    def passed(self) -> bool:
        """Whether nothing leaves the noise."""
        return self.culprit is None and not self.optimizers and max(self.worst, self.optimized) <= self.limit


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
