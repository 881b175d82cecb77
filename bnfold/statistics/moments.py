"""Mean and variance of more values than fit into memory, exact to float64.

Batches are merged with the formula of Chan, Golub and LeVeque (1979): with counts a, b, means, and sums of squared
deviations M, and d the difference of the means, ``M = Ma + Mb + d^2 a b/(a + b)``. Unlike the difference of mean square
and squared mean, nothing large cancels.
"""

from __future__ import annotations

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
