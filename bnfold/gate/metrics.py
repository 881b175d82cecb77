"""How a model does on data before and after: the arithmetic of errors, classes and targets, added up batch by batch.

Nothing here keeps more than a few numbers per sample. ``before`` is the unfolded model in its own dtype, ``after`` what
is judged; axis 0 of every tensor holds samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnfold.report import Agreement, Flip, TargetFit

#: Of the errors of all samples. The largest is told beside them.
PERCENTILES = (0.5, 0.9, 0.99)
#: Flips that are told one by one, those furthest from a tie first.
TOLD = 20
TOP = 5


def rms(value: Tensor, good: Tensor) -> Tensor:
    """Root mean square of every sample over its elements that are ``good``, in float64; 0 where it has none."""
    count = good.reshape(len(good), -1).sum(1).clamp(min=1)
    square = torch.where(good, value.double(), 0.0).square().reshape(len(good), -1).sum(1)
    return (square / count).sqrt()


@dataclass
class Errors:
    """Differences of one output, sample by sample; elements that are not finite before and after are left out."""

    output: str
    _off: list[Tensor] = field(default_factory=list)
    _scale: list[Tensor] = field(default_factory=list)
    _squares: list[float] = field(default_factory=lambda: [0.0, 0.0])
    _elements: int = 0
    _largest: float = 0.0

    def add(self, before: Tensor, after: Tensor) -> Tensor:
        """Adds samples and returns how far they are off, relative."""
        good = before.isfinite() & after.isfinite()
        off = torch.where(good, after.double() - before.double(), 0.0)
        self._off.append(rms(off, good))
        self._scale.append(rms(before, good))
        self._squares[0] += float(torch.where(good, before.double(), 0.0).square().sum())
        self._squares[1] += float(off.square().sum())
        self._elements += int(good.sum())
        self._largest = max(self._largest, float(self._scale[-1].max()))
        return self._relative(self._off[-1], self._scale[-1])

    def absorb(self, other: Errors) -> None:
        """Adds what other samples have shown, which come after these."""
        self._off += other._off
        self._scale += other._scale
        self._squares = [mine + more for mine, more in zip(self._squares, other._squares)]
        self._elements += other._elements
        self._largest = max(self._largest, other._largest)

    def _relative(self, off: Tensor, scale: Tensor) -> Tensor:
        # Samples next to zero are measured by the largest one, as in the gate.
        return off / scale.clamp(min=max(1e-3 * self._largest, torch.finfo(torch.float64).tiny))

    def result(self, noise: float, worst: int, worst_ratio: float) -> Agreement:
        """What was found.

        Args:
            noise: what it is to be compared with, relative.
            worst: index of the sample that differs most.
            worst_ratio: its error in multiples of the noise.
        """
        relative = self._relative(torch.cat(self._off), torch.cat(self._scale))
        of = [float(relative.quantile(q, interpolation="higher")) if len(relative) < 2**24 else _quantile(relative, q)
              for q in PERCENTILES]  # fmt: skip
        signal, off = self._squares
        sqnr = math.inf if not off else 10 * math.log10(signal / off) if signal else math.nan
        absolute = math.sqrt(off / max(self._elements, 1))
        return Agreement(
            self.output, len(relative), sqnr, absolute, of[0], of[1], of[2], float(relative.max()), worst,
            worst_ratio, noise,
        )  # fmt: skip


def _quantile(values: Tensor, q: float) -> float:
    """As torch's, which takes no more than 16 million values."""
    return float(np.quantile(values.numpy(), q, method="higher"))


@dataclass
class Classification:
    """Classes along one axis of an output: which are right, and which changed."""

    output: str
    axis: int = 1
    near: float = math.inf
    flipped: list[Flip] = field(default_factory=list)
    flips: int = 0
    far: int = 0
    _labelled: int = 0
    _right: list[int] = field(default_factory=lambda: [0, 0, 0, 0])
    _undecided: int = 0
    _smallest: float = math.inf
    _classes: int = 0

    def add(
        self, before: Tensor, after: Tensor, classes: Tensor | None, ignored: Sequence[int], noise: Tensor, start: int,
        errors: Callable[[], Tensor | None],
    ) -> None:  # fmt: skip
        """Adds samples.

        Args:
            before: logits.
            after: logits.
            classes: the right ones; those in ``ignored`` count for nothing.
            ignored: what is no class.
            noise: of every class's logit, the RMS error that it is expected to have in the unfolded model.
            start: index of the first sample.
            errors: of every logit the error that it has, found in float64, or None; called where a class changed.
        """
        old, new = (value.double().movedim(self.axis, -1) for value in (before, after))
        self._classes = old.shape[-1]
        top, two = old.topk(min(2, self._classes), dim=-1)
        guess, changed = old.argmax(-1), new.argmax(-1)
        # A class that is alone has none to be mistaken for.
        margin = (top[..., 0] - (top[..., 1] if self._classes > 1 else -math.inf)).nan_to_num(math.inf, math.inf)
        of_sample = torch.arange(len(old)).reshape(-1, *(1,) * (margin.ndim - 1)).expand(margin.shape)
        self._smallest = min(self._smallest, float(margin.min()))
        self._undecided += int((margin <= self.near * noise[two].square().sum(-1).sqrt()).sum())
        if classes is not None:
            self._score(old, new, classes, ignored)
        flips = guess != changed
        if bool(flips.any()):
            # How much less the unfolded model gave the class that it is now, in the noise of these two logits.
            pair = torch.stack([guess[flips], changed[flips]], -1)
            apart = top[..., 0][flips] - old[flips].gather(-1, pair[:, 1:])[:, 0]
            own, seen = noise[pair].square().sum(-1).sqrt(), errors()
            if seen is not None:
                two_seen = seen.double().movedim(self.axis, -1)[flips].gather(-1, pair).square().sum(-1).sqrt()
                own = torch.maximum(own, two_seen)
            units = apart / own.clamp(min=torch.finfo(torch.float64).tiny)
            self.flips += int(flips.sum())
            self.far += int((~(units <= self.near)).sum())
            found = zip(*(x.tolist() for x in (of_sample[flips] + start, guess[flips], changed[flips], apart, units)))
            told = [*self.flipped, *(Flip(*flip) for flip in found)]
            self.flipped = sorted(told, key=lambda flip: -flip.units)[:TOLD]

    def absorb(self, other: Classification, samples: int) -> None:
        """Adds what others have shown, which come after the ``samples`` of this one."""
        later = [replace(flip, sample=flip.sample + samples) for flip in other.flipped]
        self.flipped = sorted([*self.flipped, *later], key=lambda flip: -flip.units)[:TOLD]
        self.flips += other.flips
        self.far += other.far
        self._labelled += other._labelled
        self._right = [mine + more for mine, more in zip(self._right, other._right)]
        self._undecided += other._undecided
        self._smallest = min(self._smallest, other._smallest)
        self._classes = max(self._classes, other._classes)

    def _score(self, old: Tensor, new: Tensor, classes: Tensor, ignored: Sequence[int]) -> None:
        known = ~torch.isin(classes, torch.tensor(list(ignored), dtype=classes.dtype))
        right = classes[known].long()
        self._labelled += len(right)
        for i, logits in enumerate((old[known], new[known])):
            top = logits.topk(min(TOP, logits.shape[-1]), dim=-1).indices == right[:, None]
            # By argmax, as above: of equal logits topk may put another one first.
            self._right[i] += int((logits.argmax(-1) == right).sum())
            self._right[2 + i] += int(top.any(-1).sum())

    def result(self) -> dict[str, Any]:
        """What was found, by the fields of ``report.Accuracy``."""
        share = [n / self._labelled if self._labelled else None for n in self._right]
        top5 = share[2:] if self._classes > TOP else [None, None]
        return {
            "before": share[0], "after": share[1], "top5_before": top5[0], "top5_after": top5[1], "flips": self.flips,
            "smallest_margin": self._smallest, "output": self.output, "labelled": self._labelled,
            "classes": self._classes,
            "far_flips": self.far, "undecided": self._undecided, "flipped": tuple(self.flipped),
        }  # fmt: skip


@dataclass
class Regression:
    """Errors of one output against its targets, before and after."""

    output: str
    _squares: list[float] = field(default_factory=lambda: [0.0, 0.0])
    _absolute: list[float] = field(default_factory=lambda: [0.0, 0.0])
    _elements: int = 0

    def add(self, before: Tensor, after: Tensor, targets: Tensor) -> None:
        """Adds samples; targets of another shape with as many elements are taken in order."""
        targets = targets.double().reshape(before.shape)
        self._elements += targets.numel()
        for i, value in enumerate((before, after)):
            off = value.double() - targets
            self._squares[i] += float(off.square().sum())
            self._absolute[i] += float(off.abs().sum())

    def absorb(self, other: Regression) -> None:
        """Adds what other samples have shown."""
        self._squares = [mine + more for mine, more in zip(self._squares, other._squares)]
        self._absolute = [mine + more for mine, more in zip(self._absolute, other._absolute)]
        self._elements += other._elements

    def result(self) -> TargetFit:
        """Root mean square and mean absolute errors."""
        rmse = [math.sqrt(square / self._elements) for square in self._squares]
        mae = [absolute / self._elements for absolute in self._absolute]
        return TargetFit(self.output, rmse[0], rmse[1], mae[0], mae[1])
