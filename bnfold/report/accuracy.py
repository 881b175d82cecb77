"""What the user's data say: accuracy before (unfolded torch) and after (the file); and a run beside an earlier one."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

Unit = Literal["ratio", "share", "count", "dB", "error"]


@dataclass(frozen=True)
class Flip:
    """A sample whose class changed.

    Attributes:
        sample: its index.
        before: the class that the unfolded model gives the largest logit.
        after: the class that the file gives it.
        margin: how much less the unfolded model gives the class ``after``.
        units: that, in the noise of the sample's logits.
    """

    sample: int
    before: int
    after: int
    margin: float
    units: float


@dataclass(frozen=True)
class Agreement:
    """One output of the file against the unfolded model in its own dtype, over all samples.

    Attributes:
        output: its name.
        samples: how many.
        sqnr: signal to quantisation noise, ``10 log10(sum before² / sum (after - before)²)``, in dB; infinite where
            they are bitwise equal, NaN where only ``before`` is all zero.
        difference: RMS of the difference, absolute.
        p50, p90, p99, max: percentiles over the samples of the difference, RMS over RMS.
        worst: index of the sample that differs most.
        worst_ratio: the file's error in that sample, against float64, in multiples of the noise.
        noise: the unfolded model's own relative error against float64 (median over the samples of the gate).
    """

    output: str
    samples: int
    sqnr: float
    difference: float
    p50: float
    p90: float
    p99: float
    max: float
    worst: int
    worst_ratio: float
    noise: float


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
    """What the user's data say: classes, targets and agreement, before (unfolded torch) and after (the file).

    Attributes:
        samples: how many there are.
        before, after: top-1 accuracy; None without labels.
        flips: how many classes changed, labelled or not.
        smallest_margin: between the two largest logits of any sample; None where no output has classes.
        candidate: what was judged.
        output: the output with the classes; "" where none has.
        labelled: how many labels there are: samples, or pixels of label maps.
        top5_before, top5_after: None without labels, or with 5 classes or fewer.
        far_flips: flips that noise does not explain; they fail.
        undecided: samples (pixels) whose margin is within the noise, which could have gone either way.
        flipped: the flips that are furthest from a tie, at most 20.
        agreement: one per output.
        targets: one per output that has targets.
        classes: how many classes there are; 0 where no output has any.
        data: SHA-256 of the arrays, whatever file they came from.
    """

    samples: int
    before: float | None
    after: float | None
    flips: int
    smallest_margin: float | None
    candidate: str = ""
    output: str = ""
    labelled: int = 0
    top5_before: float | None = None
    top5_after: float | None = None
    far_flips: int = 0
    undecided: int = 0
    flipped: tuple[Flip, ...] = ()
    agreement: tuple[Agreement, ...] = ()
    targets: tuple[TargetFit, ...] = ()
    classes: int = 0
    data: str = field(default="", repr=False)

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
    """One figure then and now.

    Attributes:
        what: in words.
        unit: how it is written.
        then, now: the figures, None where there is none.
        allowed: how far it may go, None where nothing is judged.
        regressed: whether it went further.
    """

    what: str
    unit: Unit
    then: float | None
    now: float | None
    allowed: float | None
    regressed: bool

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
    """A run beside its baseline.

    Attributes:
        path: the file.
        outcome: ``held`` or ``regressed`` where it was compared; ``created``, ``updated`` or, because the verdict is no
            pass, ``not written`` where it was to be rewritten.
        rows: every figure that was compared.
        notes: what could not be compared, and why.
        versions: package -> its version then and now, where they differ.
    """

    path: str
    outcome: Literal["held", "regressed", "created", "updated", "not written"]
    rows: tuple[BaselineRow, ...] = ()
    notes: tuple[str, ...] = ()
    versions: dict[str, tuple[str, str]] = field(default_factory=dict)

    @property
    def regressed(self) -> tuple[BaselineRow, ...]:
        """The figures that went too far."""
        return tuple(row for row in self.rows if row.regressed)
