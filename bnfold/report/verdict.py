"""The verdict of the gate and the numbers it rests on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from bnfold.report.accuracy import Accuracy, BaselineReport
from bnfold.report.model import Port
from bnfold.report.plain import Report

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
