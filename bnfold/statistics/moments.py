"""Mean and variance of more values than fit into memory, exact to float64, and how far they are from a layer's own.

Batches are merged with the formula of Chan, Golub and LeVeque (1979): with counts a, b, means, and sums of squared
deviations M, and d the difference of the means, ``M = Ma + Mb + d^2 a b/(a + b)``. Unlike the difference of mean square
and squared mean, nothing large cancels.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

#: Elements that are raised to float64 at a time.
CHUNK = 1 << 22


def parts(values: Tensor) -> Sequence[Tensor]:
    """``values`` in parts of whole samples, small enough to make float64 copies of."""
    step = max(CHUNK // max(values[:1].numel(), 1), 1)
    return torch.split(values, step)


@dataclass(frozen=True, eq=False)
class Moments:
    """How many values a channel has, their mean, and the sum of their squared deviations; float64, (channels,)."""

    count: int
    mean: Tensor
    squares: Tensor

    @classmethod
    def of(cls, values: Tensor) -> Moments:
        """Of ``values``, (N, channels, ...), over every axis but the channels'."""
        return reduce(operator.add, map(cls._of_part, parts(values.detach())))

    @classmethod
    def _of_part(cls, values: Tensor) -> Moments:
        rows = values.double().transpose(0, 1).flatten(1)
        if not rows.shape[1]:
            return cls(0, rows.new_zeros(len(rows)), rows.new_zeros(len(rows)))
        mean = rows.mean(1)
        return cls(rows.shape[1], mean, (rows - mean[:, None]).square().sum(1))

    def __add__(self, other: Moments) -> Moments:
        if not (self.count and other.count):
            return self if self.count else other
        count = self.count + other.count
        apart = other.mean - self.mean
        mean = self.mean + apart * (other.count / count)
        return Moments(count, mean, self.squares + other.squares + apart.square() * (self.count * other.count / count))

    @property
    def variance(self) -> Tensor:
        """Of the values as the whole population, so divided by their count and not by one less."""
        return self.squares / self.count

    @property
    def standard_error(self) -> Tensor:
        """Of the mean, as an estimate from independent values; infinite where there is one."""
        if self.count < 2:
            return torch.full_like(self.mean, float("inf"))
        return (self.squares / (self.count - 1) / self.count).sqrt()


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
    """How far running statistics are from those of data, (channels,), with standard errors from so many samples.

    Both are compared in the layer's own unit, with ``sigma = sqrt(var + eps)`` of the running statistics:

    - *shift*: ``|mean of the data - running mean| / sigma``;
    - *stretch*: ``|log2(sqrt((variance of the data + eps) / (var + eps)))|``.

    The *distance* of a channel is the larger of the two. It is 1 where the data's average value is one deviation off
    what the layer was trained with, or its spread is twice or half of it: in a normal channel a shift of one deviation
    takes a third of the values (34 %) to the other side of the mean. A channel is *far* when its distance is above 1 by
    more than chance, which is where the lower end of its confidence interval (Student's t) is above 1. The standard
    error is estimated from the samples' own means and mean squared deviations, so values of one sample need not be
    independent; the level is 1 % for all channels of the model together (Bonferroni). With few samples the interval is
    wide, and little is called far.
    """

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
