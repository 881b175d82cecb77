"""The verdict of the gate, what it rests on, and the run that it belongs to."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from bnfold.report.model import LayerRange, Ledger, NormRange, Operator, Port
from bnfold.report.plain import Report

Unit = Literal["ratio", "share", "count", "dB", "error"]


@dataclass(frozen=True)
class Flip:
    """A sample whose class changed."""

    sample: int  #: its index.
    before: int  #: the class that the unfolded model gives the largest logit.
    after: int  #: the class that the file gives it.
    margin: float  #: how much less the unfolded model gives the class ``after``.
    units: float  #: that, in the noise of the sample's logits.


@dataclass(frozen=True)
class Agreement:
    """One output of the file against the unfolded model in its own dtype, over all samples."""

    output: str  #: its name.
    samples: int  #: how many.
    #: signal to quantisation noise, ``10 log10(sum before² / sum (after - before)²)``, in dB; infinite where they are
    #: bitwise equal, NaN where only ``before`` is all zero.
    sqnr: float
    difference: float  #: RMS of the difference, absolute.
    p50: float  #: percentiles over the samples of the difference, RMS over RMS.
    p90: float  #: percentiles over the samples of the difference, RMS over RMS.
    p99: float  #: percentiles over the samples of the difference, RMS over RMS.
    max: float  #: percentiles over the samples of the difference, RMS over RMS.
    worst: int  #: index of the sample that differs most.
    worst_ratio: float  #: the file's error in that sample, against float64, in multiples of the noise.
    noise: float  #: the unfolded model's own relative error against float64 (median over the samples of the gate).


@dataclass(frozen=True)
class TargetFit:
    """One output against its targets: root mean square and mean absolute errors before and after."""

    output: str
    rmse_before: float
    rmse_after: float
    mae_before: float
    mae_after: float


@dataclass(frozen=True)
class Accuracy:
    """What the user's data say: classes, targets and agreement, before (unfolded torch) and after (the file)."""

    samples: int  #: how many there are.
    before: float | None  #: top-1 accuracy; None without labels.
    after: float | None  #: top-1 accuracy; None without labels.
    flips: int  #: how many classes changed, labelled or not.
    smallest_margin: float | None  #: between the two largest logits of any sample; None where no output has classes.
    candidate: str = ""  #: what was judged.
    output: str = ""  #: the output with the classes; "" where none has.
    labelled: int = 0  #: how many labels there are: samples, or pixels of label maps.
    top5_before: float | None = None  #: None without labels, or with 5 classes or fewer.
    top5_after: float | None = None  #: None without labels, or with 5 classes or fewer.
    far_flips: int = 0  #: flips that noise does not explain; they fail.
    undecided: int = 0  #: samples (pixels) whose margin is within the noise, which could have gone either way.
    flipped: tuple[Flip, ...] = ()  #: the flips that are furthest from a tie, at most 20.
    agreement: tuple[Agreement, ...] = ()  #: one per output.
    targets: tuple[TargetFit, ...] = ()  #: one per output that has targets.
    classes: int = 0  #: how many classes there are; 0 where no output has any.
    data: str = field(default="", repr=False)  #: SHA-256 of the arrays, whatever file they came from.

    @property
    def at_chance(self) -> bool:
        """Whether the unfolded model itself is no better than guessing.

        Guessing among k classes gets 1/k of n labels right, give or take ``sqrt((1 - 1/k) / (k n))``; three of these
        above it is what one guesser in 700 reaches.
        """
        if self.before is None or self.classes < 2 or not self.labelled:
            return False
        chance = 1 / self.classes
        return self.before <= chance + 3 * math.sqrt(chance * (1 - chance) / self.labelled)


@dataclass(frozen=True)
class BaselineRow:
    """One figure then and now."""

    what: str  #: in words.
    unit: Unit  #: how it is written.
    then: float | None  #: the figures, None where there is none.
    now: float | None  #: the figures, None where there is none.
    allowed: float | None  #: how far it may go, None where nothing is judged.
    regressed: bool  #: whether it went further.

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
    """A run beside its baseline."""

    path: str  #: the file.
    #: ``held`` or ``regressed`` where it was compared; ``created``, ``updated`` or, because the verdict is no pass,
    #: ``not written`` where it was to be rewritten.
    outcome: Literal["held", "regressed", "created", "updated", "not written"]
    rows: tuple[BaselineRow, ...] = ()  #: every figure that was compared.
    notes: tuple[str, ...] = ()  #: what could not be compared, and why.
    #: package -> its version then and now, where they differ.
    versions: dict[str, tuple[str, str]] = field(default_factory=dict)

    @property
    def regressed(self) -> tuple[BaselineRow, ...]:
        """The figures that went too far."""
        return tuple(row for row in self.rows if row.regressed)


Verdict = Literal["pass", "fail", "inconclusive"]


@dataclass(frozen=True)
class SiteResult:
    """One fold site: the RMS of its error over the noise, and that of the worst element."""

    candidate: str
    value: str
    module: str
    ratio: float
    channel_ratio: float


@dataclass(frozen=True)
class OutputResult:
    """One output of one candidate against float64: ``noise`` and ``error``, relative, are medians over elements.

    ``ratio`` is the RMS of error over noise in the worst sample, ``worst`` that of the single element furthest off.
    ``doublings`` counts elements: off by at most their noise, by less than 2 times it, less than 4 times, and so on.
    """

    candidate: str
    output: str
    noise: float
    error: float
    ratio: float
    worst: float
    samples: int
    doublings: tuple[int, ...] = ()


@dataclass(frozen=True)
class Placement:
    """Where the file's nodes ran: how many on each provider, and those that did not run on the one asked for."""

    nodes: dict[str, int]
    elsewhere: tuple[str, ...] = ()


@dataclass(frozen=True)
class Engine:
    """What ran the file, or the model in a runner: its name, its options, and what it computes in, each as measured.

    ``unit_roundoff`` is that of ``arithmetic``: its errors are judged in multiples of the noise that the unfolded model
    would have with it. ``ratio`` is the largest of an output, and ``verdict`` of this engine alone.
    """

    name: str
    options: dict[str, str]
    arithmetic: str
    unit_roundoff: float
    ratio: float
    verdict: Verdict


@dataclass(frozen=True)
class Adversarial:
    """What gradients found: inputs that take the candidates further from the truth than random ones do.

    ``samples`` of them, after ``steps`` steps within the range of the other inputs; ``ratio`` is the worst of any one
    of them. ``peak`` is the largest value inside of the model as a fraction of its dtype's range, of ``peak_before``
    where the search began, and ``peak_module`` is where it arises.
    """

    samples: int
    steps: int
    ratio: float
    peak: float
    peak_before: float
    peak_module: str


@dataclass(frozen=True)
class CheckReport(Report):
    """The verdict of the gate and the numbers it rests on.

    ``ratio`` is the largest output ratio, ``site_ratio`` the largest at a fold site; ``problems`` says in words what
    failed or could not be judged. ``source`` and ``file`` are the model and the ONNX file of a check on its own.
    ``engines`` are the ways in which the file was run: first the one that its own verdict was reached in, then those
    that round more coarsely than the model's dtype (TF32, float16), and a runner; each is judged in its own arithmetic.
    """

    kind: ClassVar[str] = "check"
    derived: ClassVar[tuple[str, ...]] = ("passed", "ratio", "site_ratio")
    verdict: Verdict
    provider: str
    samples: int
    batches: tuple[int, ...]
    outputs: tuple[OutputResult, ...] = ()
    sites: tuple[SiteResult, ...] = ()
    capture_error: float = 0.0
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    accuracy: Accuracy | None = None
    limit: float = 4.0
    site_limit: float = 6.0
    source: dict[str, Any] = field(default_factory=dict)
    file: str | None = None
    placement: Placement | None = None
    engines: tuple[Engine, ...] = ()
    adversarial: Adversarial | None = None
    baseline: BaselineReport | None = None
    interface: tuple[Port, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether the verdict is a pass; inconclusive is not."""
        return self.verdict == "pass"

    @property
    def ratio(self) -> float:
        """The largest ratio of error to noise over all candidates and outputs."""
        return max((o.ratio for o in self.outputs), default=float("nan"))

    @property
    def site_ratio(self) -> float:
        """The largest ratio at any fold site, channels included."""
        return max((max(s.ratio, s.channel_ratio) for s in self.sites), default=0.0)


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
