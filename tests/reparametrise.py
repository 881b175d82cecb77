"""The textbook reparametrisations, block by block, as the authors' own deployment code has them; nothing of bnfold.

``by_hand(net)`` is a copy of a net with every block that knows its ``deployed()`` form replaced by it, and every
convolution followed by its BatchNorm by one convolution.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

#: A kernel (Cout, Cin/G, k, k) and a bias (Cout,).
Kernel = tuple[Tensor, Tensor]


def fused(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Kernel:
    """Convolution and BatchNorm: ``W * gamma / std``, ``beta + (bias - mean) * gamma / std``."""
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    bias = torch.zeros_like(norm.running_mean) if conv.bias is None else conv.bias
    return conv.weight * scale.reshape(-1, 1, 1, 1), norm.bias + (bias - norm.running_mean) * scale


def identity(channels: int, groups: int, like: Tensor) -> Tensor:
    """The 1x1 kernel that copies its input."""
    kernel = torch.zeros(channels, channels // groups, 1, 1, dtype=like.dtype)
    for c in range(channels):
        kernel[c, c % (channels // groups), 0, 0] = 1
    return kernel


def normed_identity(norm: nn.BatchNorm2d, groups: int) -> Kernel:
    """A BatchNorm alone, as a 1x1 kernel."""
    conv = nn.Conv2d(norm.num_features, norm.num_features, 1, groups=groups, bias=False)
    conv.weight = nn.Parameter(identity(norm.num_features, groups, norm.weight))
    return fused(conv, norm)


def widened(kernel: Tensor, size: tuple[int, int]) -> Tensor:
    """Zeros around a kernel of odd size until it is as large as ``size``."""
    height, width = (n - k for n, k in zip(size, kernel.shape[2:]))
    return F.pad(kernel, (width // 2, width // 2, height // 2, height // 2))


def added(*kernels: Kernel) -> Kernel:
    """The kernel of a sum of branches."""
    size = tuple(max(k.shape[axis] for k, _ in kernels) for axis in (2, 3))
    return sum(widened(k, size) for k, _ in kernels), sum(b for _, b in kernels)


def conv_of(kernel: Kernel, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A convolution that keeps the size at stride 1."""
    weight, bias = kernel
    size = tuple(weight.shape[2:])
    conv = nn.Conv2d(
        weight.shape[1] * groups, len(weight), size, stride, (size[0] // 2, size[1] // 2), groups=groups
    ).to(weight.dtype)
    conv.weight, conv.bias = nn.Parameter(weight.detach()), nn.Parameter(bias.detach())
    return conv


@torch.no_grad()
def by_hand(net: nn.Module) -> nn.Module:
    """The net in its deployment form; ``net`` stays as it is."""
    if hasattr(net, "deployed"):
        return copy.deepcopy(net.deployed()).eval()
    net = copy.copy(net)
    net._modules = {name: by_hand(child) for name, child in net._modules.items() if child is not None}
    if isinstance(net, nn.Sequential):
        kinds = [type(child) for child in net]
        if kinds[:2] == [nn.Conv2d, nn.BatchNorm2d]:
            conv = copy.deepcopy(net[0])
            weight, bias = fused(net[0], net[1])
            conv.weight, conv.bias = nn.Parameter(weight.detach()), nn.Parameter(bias.detach())
            return nn.Sequential(conv, *list(net)[2:]).eval()
    return net
