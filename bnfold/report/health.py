"""What is known of every BatchNorm of a model, and the closed list of what can be wrong with one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from bnfold.report.export import ExportReport
from bnfold.report.plain import Report

Severity = Literal["error", "warning", "note"]
NormKind = Literal["batch_norm", "instance_norm", "frozen", "custom"]

#: What can be wrong with a BatchNorm: how bad it is, what it means, what the user can do. The README's table is tested
#: against this. Error: the outputs are wrong. Warning: they probably are not what was trained. Note: good to know.
FINDINGS: dict[str, tuple[Severity, str, str]] = {
    "nonfinite": (
        "error",
        "a parameter or statistic is NaN or infinite, and so is every output of its channel",
        "repair the checkpoint, or measure the statistics again with bnfold calibrate",
    ),
    "negative-variance": (
        "error",
        "a variance is negative, or variance + eps is not positive, so the scale is NaN or infinite",
        "repair the checkpoint, or measure the statistics again with bnfold calibrate",
    ),
    "no-channels": (
        "error",
        "a lazy layer has seen no input, so it has neither channels nor statistics",
        "run the model once on an example, or load its weights",
    ),
    "batch-statistics": (
        "warning",
        "it keeps no running statistics, so what it answers to one sample depends on the others in the batch",
        "measure running statistics over data with bnfold calibrate",
    ),
    "never-trained": (
        "warning",
        "its statistics are still mean 0 and variance 1, as they were made",
        "load the buffers too (state_dict() has them, parameters() has not), or measure them with bnfold calibrate",
    ),
    "statistics-far": (
        "warning",
        "its running statistics are not those of the given data",
        "give data prepared as for training; if it is, measure the statistics again with bnfold calibrate",
    ),
    "vanishing-variance": (
        "warning",
        "a variance is below eps, so eps and not the data decides the scale of its channel",
        "look at what feeds the channel, which hardly varies; prune it, or train with a smaller eps",
    ),
    "exploding-scale": (
        "warning",
        "a scale or shift is beyond float16's range, or so far above the layer's median that the sums of the next "
        "layer lose half the digits of the other channels",
        "look at gamma and the variance of these channels; decay gamma too in training, and export in float32",
    ),
    "cancellation": (
        "warning",
        "a mean is so many standard deviations from zero that subtracting it leaves less than half the digits",
        "normalise or centre what comes before, or keep the layer in float32",
    ),
    "half-statistics": (
        "warning",
        "its statistics are stored in 16 bits, which rounds them, and training can no longer move them in small steps",
        "keep BatchNorms in float32 and give --dtype float16: bnfold folds first and rounds once",
    ),
    "partly-frozen": (
        "warning",
        "some BatchNorms are in train mode and some in eval mode",
        "call eval() on the whole model for inference; to train with frozen ones, call their eval() after each train()",
    ),
    "momentum-zero": (
        "warning",
        "momentum is 0, so training never moves its running statistics",
        "set momentum (0.1 is torch's default), or measure the statistics with bnfold calibrate",
    ),
    "momentum-high": (
        "warning",
        "momentum is above 2/3, so its running statistics average over fewer than two batches",
        "torch's momentum is the weight of the new batch, one minus that of TensorFlow and Keras; "
        "measure the statistics again with bnfold calibrate",
    ),
    "not-captured": (
        "warning",
        "torch.export cannot capture the model, so there is no fold plan",
        "see the message; everything else holds without it",
    ),
    "momentum-none": (
        "note",
        "momentum is None, so its statistics average over all batches ever seen, those of untrained weights too",
        "if that was not meant, measure them again with bnfold calibrate",
    ),
    "dead-channels": (
        "note",
        "what a channel varies by is lost in the rounding of the layer's largest, so it is a constant",
        "nothing to repair: such channels can be pruned, and a fold makes zeros of their weights",
    ),
    "shared-statistics": (
        "note",
        "it is called in several places, which share one set of statistics",
        "if the places see different values, give each a BatchNorm of its own; bnfold calibrate pools over all of them",
    ),
    "not-called": (
        "note",
        "the example does not reach it, so it takes no part in the outputs",
        "nothing, if it belongs to a part that only training uses",
    ),
    "train-mode": (
        "note",
        "the BatchNorms are in train mode; called like this, the model uses and moves statistics batch by batch",
        "bnfold works in eval mode whatever the flag says; call eval() before you use the model yourself",
    ),
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
