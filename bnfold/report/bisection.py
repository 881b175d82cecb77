"""Where a file begins to differ from the model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from bnfold.report.plain import Report


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
