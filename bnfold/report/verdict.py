"""The verdict of the gate and the numbers it rests on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bnfold.report.plain import as_json

Verdict = Literal["pass", "fail", "inconclusive"]


@dataclass(frozen=True)
class SiteResult:
    """One fold site: the ratio of its error to the unfolded model's, over all and for the worst channel."""

    candidate: str
    value: str
    module: str
    ratio: float
    channel_ratio: float


@dataclass(frozen=True)
class OutputResult:
    """One output of one candidate: relative RMS errors against float64, medians over samples; ``worst`` informs."""

    candidate: str
    output: str
    noise: float
    error: float
    ratio: float
    worst: float
    samples: int


@dataclass(frozen=True)
class Accuracy:
    """Top-1 on labelled data before (unfolded torch) and after (the file), and the predictions that changed."""

    samples: int
    before: float
    after: float
    flips: int
    smallest_margin: float


@dataclass(frozen=True)
class CheckReport:
    """The verdict of the gate and the numbers it rests on.

    ``ratio`` is the largest output ratio, ``site_ratio`` the largest at a fold site; ``problems`` says in words what
    failed or could not be judged.
    """

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
    site_limit: float = 16.0

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

    def to_json(self, indent: int | None = 2) -> str:
        """The report as JSON; NaN and infinities become null."""
        return as_json(self, indent)
