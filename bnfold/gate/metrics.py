"""How a model does on data before and after: the arithmetic of errors, classes and targets, added up batch by batch.

Nothing here keeps more than a few numbers per sample. ``before`` is the unfolded model in its own dtype, ``after`` what
is judged; axis 0 of every tensor holds samples.
"""

from __future__ import annotations

import hashlib
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from bnfold.gate.evidence import TINY
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


def _furthest(flips: Sequence[Flip], more: Sequence[Flip]) -> list[Flip]:
    return sorted([*flips, *more], key=lambda flip: -flip.units)[:TOLD]


#: How what is no sum adds up; names are the same.
_JOINS: dict[str, Callable[[Any, Any], Any]] = {
    "_largest": max, "_smallest": min, "_classes": max, "flipped": _furthest,
    **dict.fromkeys(("output", "axis", "near"), lambda mine, other: mine),
}  # fmt: skip


class _Sums:
    """What is summed up over the samples of an output."""

    def absorb(self, other: Self, samples: int = 0) -> None:
        """Adds what others have shown, which come after the ``samples`` of this one."""
        for name, mine in vars(self).items():
            setattr(self, name, _JOINS.get(name, operator.add)(mine, getattr(other, name)))


@dataclass
class Errors(_Sums):
    """Differences of one output, sample by sample; elements that are not finite before and after are left out."""

    output: str
    _off: list[Tensor] = field(default_factory=list)
    _scale: list[Tensor] = field(default_factory=list)
    _squares: Any = field(default_factory=lambda: np.zeros(2))
    _elements: int = 0
    _largest: float = 0.0

    def add(self, before: Tensor, after: Tensor) -> Tensor:
        """Adds samples and returns how far they are off, relative."""
        good = before.isfinite() & after.isfinite()
        off = torch.where(good, after.double() - before.double(), 0.0)
        self._off.append(rms(off, good))
        self._scale.append(rms(before, good))
        self._squares += [float(x.square().sum()) for x in (torch.where(good, before.double(), 0.0), off)]
        self._elements += int(good.sum())
        self._largest = max(self._largest, float(self._scale[-1].max()))
        return self._relative(self._off[-1], self._scale[-1])

    def _relative(self, off: Tensor, scale: Tensor) -> Tensor:
        # Samples next to zero are measured by the largest one, as in the gate.
        return off / scale.clamp(min=max(1e-3 * self._largest, TINY))

    def result(self, noise: float, worst: int, worst_ratio: float) -> Agreement:
        """What was found.

        Args:
            noise: what it is to be compared with, relative.
            worst: index of the sample that differs most.
            worst_ratio: its error in multiples of the noise.
        """
        relative = self._relative(torch.cat(self._off), torch.cat(self._scale))
        p50, p90, p99 = np.quantile(relative.numpy(), PERCENTILES, method="higher").tolist()
        signal, off = self._squares.tolist()
        sqnr = math.inf if not off else 10 * math.log10(signal / off) if signal else math.nan
        absolute = math.sqrt(off / max(self._elements, 1))
        return Agreement(
            self.output, len(relative), sqnr, absolute, p50, p90, p99, float(relative.max()), worst, worst_ratio, noise
        )


@dataclass
class Classification(_Sums):
    """Classes along one axis of an output: which are right, and which changed."""

    output: str
    axis: int = 1
    near: float = math.inf
    flipped: list[Flip] = field(default_factory=list)
    flips: int = 0
    far: int = 0
    _labelled: int = 0
    _right: Any = field(default_factory=lambda: np.zeros(4))
    _undecided: int = 0
    _smallest: float = math.inf
    _classes: int = 0

    def add(
        self, before: Tensor, after: Tensor, classes: Tensor | None, ignored: Sequence[int], noise: Tensor, start: int,
        errors: Callable[[], Tensor | None],
    ) -> None:  # fmt: skip
        """Adds samples.

        Args:
            before, after: logits.
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
        if not bool(flips.any()):
            return
        # How much less the unfolded model gave the class that it is now, in the noise of these two logits.
        pair = torch.stack([guess[flips], changed[flips]], -1)
        apart = top[..., 0][flips] - old[flips].gather(-1, pair[:, 1:])[:, 0]
        own, seen = noise[pair].square().sum(-1).sqrt(), errors()
        if seen is not None:
            two_seen = seen.double().movedim(self.axis, -1)[flips].gather(-1, pair).square().sum(-1).sqrt()
            own = torch.maximum(own, two_seen)
        units = apart / own.clamp(min=TINY)
        self.flips += int(flips.sum())
        self.far += int((~(units <= self.near)).sum())
        found = zip(*(x.tolist() for x in (of_sample[flips] + start, guess[flips], changed[flips], apart, units)))
        self.flipped = _furthest(self.flipped, [Flip(*flip) for flip in found])

    def absorb(self, other: Classification, samples: int = 0) -> None:
        """As ``_Sums.absorb``."""
        later = [replace(flip, sample=flip.sample + samples) for flip in other.flipped]
        super().absorb(replace(other, flipped=later))

    def _score(self, old: Tensor, new: Tensor, classes: Tensor, ignored: Sequence[int]) -> None:
        known = ~torch.isin(classes, torch.tensor(list(ignored), dtype=classes.dtype))
        right = classes[known].long()
        self._labelled += len(right)
        for i, logits in enumerate((old[known], new[known])):
            top = logits.topk(min(TOP, logits.shape[-1]), dim=-1).indices == right[:, None]
            # By argmax, as above: of equal logits topk may put another one first.
            self._right[[i, 2 + i]] += int((logits.argmax(-1) == right).sum()), int(top.any(-1).sum())

    def result(self) -> dict[str, Any]:
        """What was found, by the fields of ``report.Accuracy``."""
        share = [n / self._labelled if self._labelled else None for n in self._right.tolist()]
        top5 = share[2:] if self._classes > TOP else [None, None]
        return {
            "before": share[0], "after": share[1], "top5_before": top5[0], "top5_after": top5[1], "flips": self.flips,
            "smallest_margin": self._smallest, "output": self.output, "labelled": self._labelled,
            "classes": self._classes,
            "far_flips": self.far, "undecided": self._undecided, "flipped": tuple(self.flipped),
        }  # fmt: skip


@dataclass
class Regression(_Sums):
    """Errors of one output against its targets, before and after."""

    output: str
    _squares: Any = field(default_factory=lambda: np.zeros(2))
    _absolute: Any = field(default_factory=lambda: np.zeros(2))
    _elements: int = 0

    def add(self, before: Tensor, after: Tensor, targets: Tensor) -> None:
        """Adds samples; targets of another shape with as many elements are taken in order."""
        targets = targets.double().reshape(before.shape)
        self._elements += targets.numel()
        off = [value.double() - targets for value in (before, after)]
        self._squares += [float(x.square().sum()) for x in off]
        self._absolute += [float(x.abs().sum()) for x in off]

    def result(self) -> TargetFit:
        """Root mean square and mean absolute errors."""
        squares, absolute = (sums / self._elements for sums in (self._squares, self._absolute))
        return TargetFit(self.output, *np.sqrt(squares).tolist(), *absolute.tolist())


# ---- parts of the data -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Facts:
    """What must be known of a model to see how a file does on data.

    Attributes:
        noise: the unfolded model's relative error, of every output that has samples along its first axis, by index.
        classes, logits: of the output that has classes their axis, and the noise of each.
        targets: the outputs that have targets.
        labelled: whether the samples have labels.
        size: how many samples are run at once: always as many (``fixed``), and whether that is dynamic (``batched``).
        limit: as the gate's.
        coarser: how many times more coarsely than the model the candidate rounds.
    """

    noise: Mapping[int, float]
    classes: Mapping[int, int]
    targets: frozenset[int]
    labelled: bool
    size: int
    fixed: bool
    batched: bool
    limit: float
    logits: Mapping[int, tuple[float, ...]] = field(default_factory=dict)
    coarser: float = 1.0


@dataclass
class Part:
    """What some of the data has shown; ``ended`` where the candidate failed on it.

    Attributes:
        errors, targets, classes: by index of the output.
        worst: by output, how far the sample is off that is furthest off, its index, and its error in noises.
        digest: SHA-256 of the data.
        unused: arrays of the data that are nothing to the model.
    """

    samples: int
    errors: dict[int, Errors]
    targets: dict[int, Regression]
    classes: dict[int, Classification]
    worst: dict[int, tuple[float, int, float]] = field(default_factory=dict)
    digest: str = ""
    problems: list[str] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)
    unused: tuple[str, ...] = ()
    ended: bool = False

    def __add__(self, other: Part) -> Part:
        """Of both, this one first; ``self`` is not used any more."""
        for kind in ("errors", "targets", "classes"):
            for i, sums in getattr(self, kind).items():
                sums.absorb(getattr(other, kind)[i], self.samples)
        for i, (off, sample, ratio) in other.worst.items():
            if off > self.worst[i][0]:
                self.worst[i] = off, sample + self.samples, ratio
        return replace(
            self, samples=self.samples + other.samples, ended=self.ended or other.ended,
            digest=hashlib.sha256(f"{self.digest} {other.digest}".encode()).hexdigest(),
            problems=self.problems + other.problems, doubts=self.doubts + other.doubts,
        )  # fmt: skip


#: Sees how a file does on every part of data: what each shows, in their order.
Spread = Callable[[Facts], Iterable[Part]]
