"""Pieces that several nets of the zoo share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

#: What builds a net: the module, and an example batch of two.
Factory = Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]


def conv_bn(
    in_channels: int, out_channels: int, kernel: int = 3, stride: int = 1, groups: int = 1, act: nn.Module | None = None
) -> nn.Sequential:
    """Bias-free convolution that keeps the size at stride 1, BatchNorm2d, and ``act`` if given."""
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), *([act] if act is not None else []))


def images(channels: int = 3, size: int = 16) -> tuple[Tensor, ...]:
    """Two images of noise, each with colours of its own, so that they still differ behind a global pool."""
    return (torch.randn(2, channels, size, size) + torch.randn(2, channels, 1, 1),)


class Residual(nn.Module):
    """``x + body(x)``."""

    def __init__(self, *body: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Head(nn.Sequential):
    """Global average pool and a linear classifier."""

    def __init__(self, channels: int, classes: int = 5) -> None:
        super().__init__(nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(channels, classes))
