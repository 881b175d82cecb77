"""How far two results are from the truth: the arithmetic of the gate, and nothing else.

``err = rms(a - truth)`` per sample; *noise* is that of the unfolded model in its own dtype, *ratio* is the candidate's
over it. A ratio needs no tolerance: a model that is ill-conditioned is so before folding as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


def epsilon(dtype: torch.dtype) -> float:
    """Distance from 1 to the next number of a floating-point dtype."""
    return float(torch.finfo(dtype).eps)


@dataclass
class Tally:
    """Errors of one output of one candidate, sample by sample.

    ``floor`` is the error of a few units in the last place: it keeps a noise of exactly zero (a saturated softmax, a
    constant) from failing an equal result.
    """

    eps: float
    noise: list[float] = field(default_factory=list)
    error: list[float] = field(default_factory=list)
    scale: list[float] = field(default_factory=list)
    runs: list[int] = field(default_factory=list)
    elements: int = 0

    def add(self, candidate: Tensor, unfolded: Tensor, truth: Tensor, *, batched: bool, run: int) -> None:
        """Adds one run; elements that are not finite in the truth are compared elsewhere."""
        good = truth.isfinite() & unfolded.isfinite() & candidate.isfinite()
        rows = truth.shape[0] if batched and truth.ndim else 1

        def rms(value: Tensor) -> Tensor:
            square = torch.where(good, value, 0.0).double().square().reshape(rows, -1)
            return (square.sum(1) / good.reshape(rows, -1).sum(1).clamp(min=1)).sqrt()

        self.error += rms(candidate.double() - truth).tolist()
        self.noise += rms(unfolded.double() - truth).tolist()
        self.scale += rms(truth).tolist()
        self.runs += [run] * rows
        self.elements += truth.numel()

    def ratios(self) -> Tensor:
        """Per sample, error over noise."""
        noise, error, scale = (torch.tensor(x, dtype=torch.float64) for x in (self.noise, self.error, self.scale))
        largest = float(scale.max()) if scale.numel() else 0.0
        floor = self.eps * scale.clamp(min=1e-3 * largest).clamp(min=torch.finfo(torch.float64).tiny)
        return error / torch.maximum(noise, floor)

    def relative(self, errors: Sequence[float]) -> float:
        """Median of errors relative to the truth's RMS."""
        scale = torch.tensor(self.scale, dtype=torch.float64)
        value = torch.tensor(errors, dtype=torch.float64) / scale.clamp(min=torch.finfo(torch.float64).tiny)
        return float(value.median()) if value.numel() else 0.0

    def per_run(self) -> dict[int, float]:
        """Median ratio of every run."""
        ratios, runs = self.ratios(), torch.tensor(self.runs)
        return {run: float(ratios[runs == run].median()) for run in dict.fromkeys(self.runs)}


def site_ratios(candidate: Tensor, unfolded: Tensor, truth: Tensor, eps: float) -> tuple[float, float]:
    """Error over noise at a fold site: over all elements, and for the worst channel.

    A channel is an index of axis 1, and for sequences (three axes) of the last axis too, whichever the layer's are.
    """
    off, noise = candidate.double() - truth, unfolded.double() - truth
    if not bool(off.isfinite().all()):
        same = torch.equal(candidate.isfinite(), truth.isfinite())
        return (0.0, 0.0) if same and not bool(truth.isfinite().any()) else (torch.inf, torch.inf)

    def ratio(keep: int | None) -> Tensor:
        def rms(x: Tensor) -> Tensor:
            if keep is None or x.ndim <= keep:
                return x.square().mean().sqrt().reshape(1)
            return x.square().transpose(0, keep).reshape(x.shape[keep], -1).mean(1).sqrt()

        scale = rms(truth)
        floor = eps * scale.clamp(min=1e-3 * float(scale.max()) if scale.numel() else 0.0)
        return rms(off) / torch.maximum(rms(noise), floor.clamp(min=torch.finfo(torch.float64).tiny))

    axes = [1] if truth.ndim != 3 else [1, 2]
    return float(ratio(None).max()), max(float(ratio(axis).max()) for axis in axes)


def finite_problem(candidate: Tensor, truth: Tensor) -> str | None:
    """What is wrong with a candidate's NaNs and infinities, given where the truth has them."""
    if not candidate.is_floating_point():
        return None
    bad = ~candidate.isfinite() & truth.isfinite()
    if bool(bad.any()):
        return f"{int(bad.sum())} of {bad.numel()} elements are NaN or infinite where the truth is finite"
    lost = candidate.isfinite() & ~truth.isfinite()
    if bool(lost.any()):
        return f"{int(lost.sum())} of {lost.numel()} elements are finite where the truth is NaN or infinite"
    return None
