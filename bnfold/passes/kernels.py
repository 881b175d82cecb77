"""Kernel: a linear map with a bias, as a float64 convolution kernel, and how two of them become one.

``y[o, p] = b[o] + sum_{i,k} W[o,i,k] * x[i, stride*p - padding + dilation*k]``, x zero outside. A linear layer is a
kernel without spatial axes; an identity, a per-channel affine and an average pool are depthwise kernels. Embedding and
adding kernels is RepVGG's reparametrisation (Ding et al. 2021), multiplying them ExpandNet's (Guo et al. 2020).
"""

from __future__ import annotations

from collections.abc import Sequence
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
    def is_single(self) -> bool:
        """Whether it has one tap and stride 1. Its padding, if any, is a border that holds the bias."""
        return prod(self.size) == 1 and all(s == 1 for s in self.geometry.stride) and not self.geometry.transposed

    @property
    def is_pointwise(self) -> bool:
        """Whether each output position depends on the same position of the input alone."""
        return self.is_single and not any(self.geometry.padding)

    @property
    def is_per_channel(self) -> bool:
        """Whether it is ``scale[c] * x[c] + shift[c]``."""
        return self.is_pointwise and self.weight.shape[1:3] == (1, 1)

    def scaled(self, factor: float) -> Kernel:
        """``factor * y``."""
        return self if factor == 1 else replace(self, weight=self.weight * factor, bias=self.bias * factor)


def added(first: Kernel, second: Kernel, factor: float = 1.0) -> Kernel:
    """``first + factor*second`` of two kernels with the same geometry, groups and size."""
    weight, bias = first.weight + factor * second.weight, first.bias + factor * second.bias
    return Kernel(weight, bias, first.geometry)


def depthwise(scale: Tensor, shift: Tensor, spatial: int) -> Kernel:
    """``y[c] = scale[c] * x[c] + shift[c]`` for values with ``spatial`` spatial axes."""
    return Kernel(scale.reshape(-1, 1, 1, *(1,) * spatial), shift, Geometry.pointwise(spatial))


def average(channels: int, size: tuple[int, ...], geometry: Geometry) -> Kernel:
    """An average pool whose padding, if any, is counted."""
    weight = torch.full((channels, 1, 1, *size), 1 / prod(size), dtype=torch.float64)
    return Kernel(weight, torch.zeros(channels, dtype=torch.float64), geometry)


def places(size: Sequence[int], geometry: Geometry, host: Kernel) -> list[list[int]] | None:
    """For every axis the host's taps on which those of a kernel of that size and geometry fall; None if some do not.

    A tap stands at offset ``dilation*k - padding``, in a transposed convolution on the output's side. Both must make
    outputs of the same size for every input, which is ``2*padding - dilation*(size - 1) - output_padding`` being equal.
    """
    its, n = host.geometry, len(size)
    if its.transposed and geometry == Geometry.pointwise(n):
        geometry = replace(geometry, transposed=True)  # one tap at stride 1 is the same either way
    if geometry.stride != its.stride or geometry.transposed != its.transposed:
        return None
    mine = zip(size, geometry.padding, geometry.dilation, geometry.output_padding or (0,) * n)
    found = []
    for (k, p, d, more), (host_k, host_p, host_d, host_more) in zip(
        mine, zip(host.size, its.padding, its.dilation, its.output_padding or (0,) * n)
    ):
        if 2 * p - d * (k - 1) - more != 2 * host_p - host_d * (host_k - 1) - host_more:
            return None
        offsets = [d * i - p + host_p for i in range(k)]
        if any(o % host_d or not 0 <= o // host_d < host_k for o in offsets):
            return None
        found.append([o // host_d for o in offsets])
    return found


def may_fit(kernel: Kernel, host: Kernel) -> bool:
    """Whether the host is wide enough for the kernel, whatever padding comes to it from a neighbour of one tap."""
    same = kernel.geometry.stride == host.geometry.stride and kernel.geometry.transposed == host.geometry.transposed
    spans = zip(kernel.size, kernel.geometry.dilation, host.size, host.geometry.dilation)
    return same and all(d * (k - 1) <= host_d * (host_k - 1) for k, d, host_k, host_d in spans)


def embedded(kernel: Kernel, host: Kernel) -> Kernel | None:
    """``kernel`` with the host's geometry, groups and size, zero where it has no tap; None where it has no place."""
    where = places(kernel.size, kernel.geometry, host)
    if where is None or (kernel.in_channels, kernel.out_channels) != (host.in_channels, host.out_channels):
        return None
    regrouped = _regrouped(kernel.weight, host.groups)
    if regrouped is None:
        return None
    weight = torch.zeros(host.weight.shape, dtype=torch.float64)
    taps: list[Any] = [slice(None)] * 3
    taps += torch.meshgrid(*(torch.tensor(place) for place in where), indexing="ij") if where else ()
    weight[tuple(taps)] = regrouped
    return Kernel(weight, kernel.bias, host.geometry)


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


def chained(second: Kernel, first: Kernel) -> Geometry | None:
    """The geometry of ``second(first(x))``, where one of the two has one tap; None where no kernel computes it.

    - ``second`` pointwise: the first's.
    - ``first`` of one tap: the second's, with the padding of both. A padded first fills the border that it makes with
      its bias, which is what it makes of zeros: that is exact. The second's own zeros, though, hide that bias, and a
      transposed second's border sees fewer taps of it: then there must be none.
    """
    if second.in_channels != first.out_channels:
        return None
    if second.is_pointwise:
        return first.geometry
    its = second.geometry
    if not first.is_single or (its.transposed and any(first.geometry.padding)):
        return None
    if (any(its.padding) or its.transposed) and bool((first.bias != 0).any()):
        return None
    return replace(its, padding=tuple(p + q for p, q in zip(first.geometry.padding, its.padding)))


def composed(second: Kernel, first: Kernel) -> Kernel | None:
    """``second(first(x))`` as one kernel; None where there is none, see ``chained``."""
    geometry = chained(second, first)
    if geometry is None:
        return None
    if second.is_per_channel:
        scale = second.weight.flatten()
        weight = first.weight * _spread(scale.reshape(first.groups, -1, 1), first.weight)
        return Kernel(weight, first.bias * scale + second.bias, geometry)
    if first.is_per_channel:
        groups, b = second.groups, second.weight
        weight = b * _spread(first.weight.reshape(groups, 1, -1), b)
    else:
        groups = min(first.groups, second.groups)
        a, wide = _regrouped(first.weight, groups), _regrouped(second.weight, groups)
        if a is None or wide is None:
            return None
        b = wide
        if second.is_pointwise:
            weight = torch.einsum("gom,gmi...->goi...", b.flatten(2)[..., : b.shape[2]], a)
        else:
            weight = torch.einsum("gom...,gmi->goi...", b, a.flatten(2)[..., : a.shape[2]])
    moved = torch.einsum("gom,gm->go", b.flatten(3).sum(-1) if b.ndim > 3 else b, first.bias.reshape(groups, -1))
    return Kernel(weight, second.bias + moved.flatten(), geometry)


def _spread(tensor: Tensor, weight: Tensor) -> Tensor:
    """With as many axes as the weight."""
    return tensor.reshape(*tensor.shape, *(1,) * (weight.ndim - tensor.ndim))
