"""How far running statistics are from those of data, per channel.

Both are compared in the layer's own unit, with ``sigma = sqrt(var + eps)`` of the running statistics:

- *shift*: ``|mean of the data - running mean| / sigma``;
- *stretch*: ``|log2(sqrt((variance of the data + eps) / (var + eps)))|``.

The *distance* of a channel is the larger of the two. It is 1 where the data's average value is one deviation off what
the layer was trained with, or its spread is twice or half of it: in a normal channel a shift of one deviation takes a
third of the values (34 %) to the other side of the mean. A channel is *far* when its distance is above 1 by more than
chance, which is where the lower end of its confidence interval (Student's t) is above 1. The standard error is
estimated from the samples' own means and mean squared deviations, so values of one sample need not be independent; the
level is 1 % for all channels of the model together (Bonferroni). With few samples the interval is wide, and little is
called far.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from bnfold.statistics.moments import Moments, parts

FAR = 1.0
LEVEL = 0.01
#: Below this many degrees of freedom an interval says nothing.
FREEDOM = 3


@dataclass(frozen=True, eq=False)
class Sampled:
    """What a layer was fed: the moments of its values, of its samples' means, and of their mean squared deviations
    from the running mean."""

    values: Moments
    means: Moments
    deviations: Moments

    @classmethod
    def of(cls, x: Tensor, running_mean: Tensor) -> Sampled:
        """Of an input (N, channels, ...)."""

        def of_part(part: Tensor) -> Sampled:
            wide = part.double().reshape(*part.shape[:2], -1)
            off = wide - running_mean.double().reshape(1, -1, 1)
            return cls(Moments.of(wide), Moments.of(wide.mean(2)), Moments.of(off.square().mean(2)))

        return reduce(operator.add, map(of_part, parts(x.detach())))

    def __add__(self, other: Sampled) -> Sampled:
        return Sampled(self.values + other.values, self.means + other.means, self.deviations + other.deviations)


@dataclass(frozen=True, eq=False)
class Distance:
    """Shift and stretch of every channel, (channels,), and their standard errors from so many samples."""

    shift: Tensor
    stretch: Tensor
    shift_error: Tensor
    stretch_error: Tensor
    samples: int

    @classmethod
    def between(cls, sampled: Sampled, mean: Tensor, variance: Tensor, eps: float) -> Distance:
        """Between data and the running statistics of the layer that it was fed to."""
        wide = (variance.double() + eps).abs()
        off = sampled.values.mean - mean.double()
        measured = sampled.values.variance + eps
        # Of the variance about the data's own mean: at most that about the running mean, and what the mean may be off.
        error = sampled.deviations.standard_error + 2 * off.abs() * sampled.means.standard_error
        return cls(
            off.abs() / wide.sqrt(),
            0.5 * torch.log2(measured / wide).abs(),
            sampled.means.standard_error / wide.sqrt(),
            error / (2 * math.log(2) * measured),
            sampled.means.count,
        )

    @property
    def largest(self) -> Tensor:
        """The distance of every channel."""
        return torch.maximum(self.shift, self.stretch)

    def far(self, channels: int) -> Tensor:
        """Which channels are far, where ``channels`` are looked at in all."""
        t = _critical(LEVEL / (4 * max(channels, 1)), self.samples - 1)  # two sides of two numbers each
        known = self.shift.isfinite() & self.stretch.isfinite()
        return known & ((self.shift - t * self.shift_error > FAR) | (self.stretch - t * self.stretch_error > FAR))


def _critical(tail: float, freedom: int) -> float:
    """Student's t beyond which ``tail`` lies, after Gaver and Kafadar (1984), "A retrievable recipe for inverse t"."""
    if freedom < FREEDOM:
        return math.inf
    z = float(torch.special.ndtri(torch.tensor(tail, dtype=torch.float64)))
    return math.sqrt(freedom * math.expm1(z * z * (freedom - 1.5) / (freedom - 1) ** 2))
