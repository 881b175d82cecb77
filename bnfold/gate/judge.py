"""How far two results are from the truth: the arithmetic of the gate, and nothing else.

``err = rms(a - truth)`` per sample; *noise* is that of the unfolded model in its own dtype, *ratio* is the candidate's
over it. A ratio needs no tolerance: a model that is ill-conditioned is so before folding as well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


def epsilon(dtype: torch.dtype) -> float:
    """Distance from 1 to the next number of a floating-point dtype, and for float64 a thousand times that.

    A float64 model is its own truth, so its noise is unknown and the floor stands in for it.
    """
    return float(torch.finfo(dtype).eps) * (1024 if dtype == torch.float64 else 1)


#: From this many elements on, every sample's error is an average.
FEW = 256


@dataclass
class Tally:
    """Errors of one output of one candidate, sample by sample.

    ``floor`` is the error of a few units in the last place: it keeps a noise of exactly zero (a saturated softmax, a
    constant) from failing an equal result.
    """

    eps: float
    #: How many times larger than the noise that of what the candidate computes in is.
    coarser: float = 1.0
    noise: list[float] = field(default_factory=list)
    error: list[float] = field(default_factory=list)
    scale: list[float] = field(default_factory=list)
    runs: list[int] = field(default_factory=list)
    elements: int = 0

    def add(
        self, candidate: Tensor, unfolded: Tensor, truth: Tensor, *, batched: bool, run: int,
        followed: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Adds one run; elements that are not finite everywhere are for ``finite_problem``.

        A sample without any finite element says nothing and is left out, or it would count as one without error.
        ``truth`` is the unfolded model's, and the candidate's where that has none of its own, which ``followed`` its
        decisions.
        """
        followed = truth if followed is None else followed
        known, given = truth.isfinite() & unfolded.isfinite(), followed.isfinite() & candidate.isfinite()
        if known.shape == given.shape:  # decisions can change how many elements there are
            known = given = known & given
        rows = truth.shape[0] if batched and truth.ndim and known.shape == given.shape else 1
        counts, theirs = (good.reshape(rows, -1).sum(1) for good in (known, given))
        said = (counts > 0) & (theirs > 0)

        def rms(value: Tensor, good: Tensor, count: Tensor) -> list[float]:
            square = torch.where(good, value, 0.0).double().square().reshape(rows, -1)
            found: list[float] = (square.sum(1)[said] / count[said]).sqrt().tolist()
            return found

        self.error += rms(candidate.double() - followed, given, theirs)
        self.noise += rms(unfolded.double() - truth, known, counts)
        self.scale += rms(truth, known, counts)
        self.runs += [run] * int(said.sum())
        self.elements += int(theirs.sum())

    def ratios(self, *, steady: bool = False) -> Tensor:
        """Per sample, error over noise.

        ``steady`` takes at least the typical noise for every sample: one that happens to have next to none is then no
        outlier, and one that is really wrong still is.
        """
        noise, error, scale = (torch.tensor(x, dtype=torch.float64) for x in (self.noise, self.error, self.scale))
        largest = float(scale.max()) if scale.numel() else 0.0
        scale = scale.clamp(min=1e-3 * largest).clamp(min=torch.finfo(torch.float64).tiny)
        floor = max(self.eps, self.relative(self.noise) if steady else 0.0) * scale
        return error / torch.maximum(noise, floor) / self.coarser

    def typical(self, *, steady: bool = False) -> float:
        """The median over samples; of few elements, no more than the ratio of RMS error to RMS noise.

        One number per sample is by chance next to exact in the unfolded model, and a median of ten such ratios is now
        and then above 4 for correct files.
        """
        middle = median(self.ratios(steady=steady))
        if not self.few:
            return middle
        noise, error, scale = (torch.tensor(x, dtype=torch.float64) for x in (self.noise, self.error, self.scale))
        scale = scale.clamp(min=1e-3 * float(scale.max())).clamp(min=torch.finfo(torch.float64).tiny)
        noise = torch.maximum(noise / scale, torch.tensor(2 * self.eps, dtype=torch.float64))
        return min(middle, float(((error / scale).square().mean() / noise.square().mean()).sqrt()) / self.coarser)

    @property
    def few(self) -> bool:
        """Whether there are fewer than ``FEW`` elements in all."""
        return 0 < self.elements < FEW

    def with_more_noise(self, noise: Sequence[float]) -> Tally:
        """The same with independent noise of so much per sample besides."""
        return replace(self, noise=[math.hypot(a, b) for a, b in zip(self.noise, noise, strict=True)])

    def relative(self, errors: Sequence[float]) -> float:
        """Median of errors relative to the truth's RMS."""
        scale = torch.tensor(self.scale, dtype=torch.float64)
        value = torch.tensor(errors, dtype=torch.float64) / scale.clamp(min=torch.finfo(torch.float64).tiny)
        return median(value) if value.numel() else 0.0

    def per_run(self) -> dict[int, float]:
        """Median ratio of every run."""
        ratios, runs = self.ratios(steady=True), torch.tensor(self.runs)
        return {run: median(ratios[runs == run]) for run in dict.fromkeys(self.runs)}


def median(values: Tensor) -> float:
    """The median, the larger of two middle ones: of two samples one bad one is seen."""
    return float(values.quantile(0.5, interpolation="higher"))


def site_ratios(
    candidate: Tensor,
    unfolded: Tensor,
    truth: Tensor,
    eps: float,
    rounding: Tensor | None = None,
    *,
    batched: bool = False,
) -> tuple[float, float]:
    """Error over noise at a fold site: over all elements, and for the worst channel.

    ``rounding`` is how far the truth moves where every constant is disturbed as one rounding does. A folded constant
    has to be rounded once, the unfolded one was stored exactly, and in a channel whose terms cancel that alone can be
    many times the unfolded model's own error; so noise is both, added as independent errors are. What rounding does
    also says how much a channel amplifies: behind a pool a channel is one number per sample, and of a thousand such one
    happens to be almost exact, so no channel's noise counts as less than what is typical of all for its amplification.

    A channel is an index of axis 1, and of the last axis too: convolutions have theirs here, linear layers there. With
    ``batched`` axis 0 holds samples, and errors are medians over them: deep in a network with attention one sample in
    seven can amplify what came before it ten times more in one program than in the other, but a wrong channel is wrong
    in all of them.
    """
    if same_specials(candidate, truth) is not None:
        return torch.inf, torch.inf
    good = truth.isfinite() & unfolded.isfinite()
    if not bool(good.any()):
        return (0.0, 0.0) if not bool(truth.isfinite().any()) else (torch.inf, torch.inf)
    finite = bool(good.all())
    split = batched and truth.ndim > 1

    def squared(value: Tensor) -> Tensor:
        square = (value if finite else torch.where(good, value, 0.0)).square()
        return square if split else square[None]

    true, off, noise = (squared(value) for value in (truth, candidate.double() - truth, unfolded.double() - truth))
    moved = None if rounding is None else squared(rounding)
    typical = 0.1 * float(true.mean().sqrt())

    def ratio(keep: int | None) -> Tensor:
        axes = [i for i in range(1, true.ndim) if keep is None or i != keep + true.ndim - truth.ndim]

        def mean(square: Tensor) -> Tensor:
            each = square.mean(axes) if axes else square
            each = each.reshape(len(each), -1)
            return each.sort(0).values[len(each) // 2]

        # Runtimes approximate activations to an absolute error, so a quiet channel's floor follows the loud ones'.
        floor = (eps * mean(true).sqrt().clamp(min=typical)).clamp(min=torch.finfo(torch.float64).tiny)
        known = mean(noise)
        if moved is not None:
            rounded = mean(moved)
            known = known + rounded * _typical(known, rounded).clamp(min=1.0)
        return mean(off).sqrt() / torch.maximum(known.sqrt(), floor)

    axes: set[int | None] = {1, truth.ndim - 1} if truth.ndim > 1 else {None}
    return float(ratio(None).max()), max(float(ratio(axis).max()) for axis in axes)


def _typical(noise: Tensor, rounded: Tensor) -> Tensor:
    """The median over channels of noise over what rounding does to them, both squared; 0 where it does nothing."""
    known = rounded > 0
    return (noise[known] / rounded[known]).median() if bool(known.any()) else torch.zeros((), dtype=noise.dtype)


def finite_problem(candidate: Tensor, truth: Tensor) -> str | None:
    """What is wrong with a candidate's NaNs and infinities, given where the truth has them."""
    return same_specials(candidate, truth) if candidate.is_floating_point() else None


def same_specials(candidate: Tensor, truth: Tensor) -> str | None:
    """How the places and kinds of NaN and the infinities differ, in words; None where they are the same."""
    bad = ~candidate.isfinite() & truth.isfinite()
    if bool(bad.any()):
        return f"{int(bad.sum())} of {bad.numel()} elements are NaN or infinite where the truth is finite"
    lost = candidate.isfinite() & ~truth.isfinite()
    if bool(lost.any()):
        return f"{int(lost.sum())} of {lost.numel()} elements are finite where the truth is NaN or infinite"
    other = (candidate.isnan() != truth.isnan()) | (candidate.isposinf() != truth.isposinf())
    if bool(other.any()):
        return f"{int(other.sum())} of {other.numel()} elements are another kind of NaN or infinity than the truth"
    return None
