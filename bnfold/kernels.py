"""Kernel: a linear map with a bias, as a float64 convolution kernel, and how two of them become one.

``y[o, p] = b[o] + sum_{i,k} W[o,i,k] * x[i, stride*p - padding + dilation*k]``, x zero outside. A linear layer is a
kernel without spatial axes; an identity, a per-channel affine and an average pool are depthwise kernels. Embedding and
adding kernels is RepVGG's reparametrisation (Ding et al. 2021), multiplying them ExpandNet's (Guo et al. 2020).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from bnfold.semantics import Geometry


@dataclass(frozen=True, eq=False)
class Kernel:
    """``weight`` (G, Cout/G, Cin/G, *k) and ``bias`` (Cout,), both float64."""

    weight: Tensor
    bias: Tensor
    geometry: Geometry

    @property
    def groups(self) -> int:
        """Number of groups."""
        return self.weight.shape[0]

    @property
    def size(self) -> tuple[int, ...]:
        """Spatial size."""
        return tuple(self.weight.shape[3:])

    @property
    def in_channels(self) -> int:
        """Number of channels it reads."""
        return self.weight.shape[0] * self.weight.shape[2]

    @property
    def out_channels(self) -> int:
        """Number of channels it makes."""
        return self.weight.shape[0] * self.weight.shape[1]

    @property
    def is_pointwise(self) -> bool:
        """Whether each output position depends on the same position of the input alone."""
        g = self.geometry
        return prod(self.size) == 1 and not any(g.padding) and all(s == 1 for s in g.stride) and not g.transposed

    @property
    def multiply_adds(self) -> int:
        """Per output position."""
        return self.weight.numel()

    def scaled(self, factor: float) -> Kernel:
        """``factor * y``."""
        return replace(self, weight=self.weight * factor, bias=self.bias * factor)


def depthwise(scale: Tensor, shift: Tensor, spatial: int) -> Kernel:
    """``y[c] = scale[c] * x[c] + shift[c]`` for values with ``spatial`` spatial axes."""
    return Kernel(scale.reshape(-1, 1, 1, *(1,) * spatial), shift, Geometry.pointwise(spatial))


def average(channels: int, size: tuple[int, ...], geometry: Geometry) -> Kernel:
    """An average pool whose padding, if any, is counted."""
    weight = torch.full((channels, 1, 1, *size), 1 / prod(size), dtype=torch.float64)
    return Kernel(weight, torch.zeros(channels, dtype=torch.float64), geometry)


def embedded(kernel: Kernel, host: Kernel) -> Kernel | None:
    """``kernel`` with the host's geometry, groups and size, zero where it has no tap; None where it has no place there.

    A tap stands at offset ``dilation*k - padding``. Both must map inputs to outputs of the same size, which is
    ``2*padding - dilation*(size - 1)`` being equal, and every tap must fall on one of the host's.
    """
    mine, its = kernel.geometry, host.geometry
    if mine.transposed or its.transposed:
        same = mine == its and kernel.size == host.size and kernel.groups == host.groups
        return kernel if same and kernel.weight.shape == host.weight.shape else None
    if mine.stride != its.stride or (kernel.in_channels, kernel.out_channels) != (host.in_channels, host.out_channels):
        return None
    places = []
    for k, p, d, host_k, host_p, host_d in zip(
        kernel.size, mine.padding, mine.dilation, host.size, its.padding, its.dilation
    ):
        if 2 * p - d * (k - 1) != 2 * host_p - host_d * (host_k - 1):
            return None
        offsets = [d * i - p + host_p for i in range(k)]
        if any(o % host_d or not 0 <= o // host_d < host_k for o in offsets):
            return None
        places.append([o // host_d for o in offsets])
    regrouped = _regrouped(kernel.weight, host.groups)
    if regrouped is None:
        return None
    weight = torch.zeros(host.weight.shape, dtype=torch.float64)
    where: list[Any] = [slice(None)] * 3
    where += torch.meshgrid(*(torch.tensor(place) for place in places), indexing="ij") if places else ()
    weight[tuple(where)] = regrouped
    return Kernel(weight, kernel.bias, its)


def _regrouped(weight: Tensor, groups: int) -> Tensor | None:
    """The same map with fewer groups: blocks of zeros around what was a group of its own."""
    mine, out, inp = weight.shape[:3]
    if mine == groups:
        return weight
    if mine % groups:
        return None
    factor = mine // groups
    spatial = weight.shape[3:]
    wide = torch.zeros(groups, factor, out, factor, inp, *spatial, dtype=torch.float64)
    blocks = weight.reshape(groups, factor, out, inp, *spatial)
    for i in range(factor):
        wide[:, i, :, i] = blocks[:, i]
    return wide.reshape(groups, factor * out, factor * inp, *spatial)


def composed(second: Kernel, first: Kernel) -> Kernel | None:
    """``second(first(x))`` as one kernel, where one of the two is pointwise; None where there is none.

    A bias of the first would have to reach into the second's zero padding, so then there must be none.
    """
    if second.geometry.transposed or second.in_channels != first.out_channels:
        return None
    groups = min(first.groups, second.groups)
    a, b = _regrouped(first.weight, groups), _regrouped(second.weight, groups)
    if a is None or b is None:
        return None
    if second.is_pointwise:
        weight = torch.einsum("gom,gmi...->goi...", b.flatten(2)[..., : b.shape[2]], a)
        geometry = first.geometry
    elif first.is_pointwise:
        if any(second.geometry.padding) and bool((first.bias != 0).any()):
            return None
        weight = torch.einsum("gom...,gmi->goi...", b, a.flatten(2)[..., : a.shape[2]])
        geometry = second.geometry
    else:
        return None
    moved = torch.einsum("gom,gm->go", b.flatten(3).sum(-1) if b.ndim > 3 else b, first.bias.reshape(groups, -1))
    return Kernel(weight, second.bias + moved.flatten(), geometry)
