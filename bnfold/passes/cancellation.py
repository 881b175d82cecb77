"""Cancellation: no value is stored as so much shift and so little of itself that readers who want it lose its digits.

A value ``x`` that is stored as ``y = s*x + t`` is rounded by ``u*|y|``, which is ``u*|y/s|`` to whoever makes ``x`` of
it again, where ``x`` itself was rounded by ``u*|x|``. How large ``x`` is, a BatchNorm that reads it knows from its mean
and deviation. One with a gamma next to zero makes a ``y`` that is nearly all beta, in which ``x`` has no digits left.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bnfold.affine import Affine
from bnfold.graph.graph import Node
from bnfold.passes.solution import Solution
from bnfold.semantics import Scaling

#: How much more than itself rounding what is stored may move a value: three bits.
MOST = 8.0


@dataclass(frozen=True)
class Cancellation:
    """A value that would lose digits: in which channel (index), and how much more rounding would move it."""

    value: Node
    index: tuple[int, ...]
    factor: float


def cancellations(solution: Solution) -> list[Cancellation]:
    """The values next to BatchNorms that some reader has to make of what is mostly a shift."""
    gauges, found = solution.gauges, list[Cancellation]()
    for norm in gauges.sites:
        semantics = gauges.at(norm)
        if not isinstance(semantics, Scaling) or semantics.usual is None:
            continue
        usual, own = semantics.usual, semantics.affine
        near = {gauges.operand(norm): (usual, _size(usual))}
        if (
            norm in solution.gone
        ):  # what it makes is stored as its operand is; where it multiplies by zero nobody reads it
            made = own.after(usual)
            rounded = torch.maximum(_size(made), (own.scale * _size(usual)).abs())
            near[norm] = made, torch.where(own.scale == 0, torch.inf, rounded)
        for value, (values, rounded) in near.items():
            if solution.is_kept(value):
                continue
            if not (solution.upstream[value].into and solution.downstream[value].into):
                continue  # what is stored is a value of the model, or nobody makes up for it
            after, smallest = solution.after(value), torch.finfo(gauges.graph.dtype(value)).tiny
            factor = _size(after.after(values)).clamp(min=smallest) / (after.scale.abs() * rounded)
            factor = torch.where(after.scale == 0, 0.0, factor)  # a channel that is not stored
            if float(factor.max()) > MOST:
                index = np.unravel_index(int(factor.argmax()), tuple(factor.shape))
                found.append(Cancellation(value, tuple(map(int, index)), float(factor.max())))
    return found


def _size(values: Affine) -> Tensor:
    """How large values are whose deviation is its scale and whose mean is its shift."""
    return torch.hypot(values.scale, values.shift)
