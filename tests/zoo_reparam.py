"""Nets with parallel linear branches in their training form, and those whose BatchNorm waits for a later layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from zoo_parts import Factory, Head, Residual, conv_bn, images


class RepVGGBlock(nn.Module):
    def __init__(self, channels: int, groups: int = 1) -> None:
        super().__init__()
        self.identity = nn.BatchNorm2d(channels)
        self.dense = conv_bn(channels, channels, 3, groups=groups)
        self.point = conv_bn(channels, channels, 1, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.dense(x) + self.point(x) + self.identity(x))


def repvgg() -> nn.Module:
    stem = conv_bn(3, 8, 3, 2, act=nn.ReLU())
    return nn.Sequential(stem, RepVGGBlock(8), RepVGGBlock(8, groups=2), Head(8))


class MobileOneBlock(nn.Module):
    """Several equal convolutions, a 1x1 one, and a BatchNorm alone, summed."""

    def __init__(self, channels: int, kernel: int, groups: int, branches: int = 2) -> None:
        super().__init__()
        self.skip = nn.BatchNorm2d(channels)
        self.scale = conv_bn(channels, channels, 1, groups=groups) if kernel > 1 else None
        self.convs = nn.ModuleList(conv_bn(channels, channels, kernel, groups=groups) for _ in range(branches))

    def forward(self, x: Tensor) -> Tensor:
        out = self.skip(x) if self.scale is None else self.scale(x) + self.skip(x)
        for conv in self.convs:
            out += conv(x)
        return F.relu(out)


def mobileone() -> nn.Module:
    stem = conv_bn(3, 8, 3, 2, act=nn.ReLU())
    return nn.Sequential(stem, MobileOneBlock(8, 3, groups=8), MobileOneBlock(8, 1, groups=1), Head(8))


class ACBlock(nn.Module):
    """ACNet: a square convolution and its two strips."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.square = conv_bn(channels, channels, 3)
        self.vertical = nn.Conv2d(channels, channels, (3, 1), padding=(1, 0), bias=False)
        self.horizontal = nn.Conv2d(channels, channels, (1, 3), padding=(0, 1), bias=False)
        self.vertical_norm, self.horizontal_norm = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        strips = self.vertical_norm(self.vertical(x)) + self.horizontal_norm(self.horizontal(x))
        return F.relu(self.square(x) + strips)


def acnet() -> nn.Module:
    return nn.Sequential(conv_bn(3, 8, act=nn.ReLU()), ACBlock(8), ACBlock(8), Head(8))


class NormAndPad(nn.Module):
    """DBB's BNAndPadLayer: BatchNorm, then a border that holds what BatchNorm makes of zero, written in place."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        bn = self.bn
        out = F.pad(bn(x), (1, 1, 1, 1))
        border = (bn.bias - bn.running_mean * bn.weight / torch.sqrt(bn.running_var + bn.eps)).view(1, -1, 1, 1)
        out[:, :, :1, :] = border
        out[:, :, -1:, :] = border
        out[:, :, :, :1] = border
        out[:, :, :, -1:] = border
        return out


class DiverseBranch(nn.Module):
    """DBB: 3x3, 1x1, 1x1 then 3x3, and 1x1 then average; a 1x1 with padding before its BatchNorm makes the border."""

    def __init__(self, channels: int, *, write_border: bool) -> None:
        super().__init__()
        self.dense = conv_bn(channels, channels, 3)
        self.point = conv_bn(channels, channels, 1)
        self.deep = nn.Sequential(
            *self.bordered(channels, write_border),
            nn.Conv2d(channels, channels, 3, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.mean = nn.Sequential(*self.bordered(channels, write_border), nn.AvgPool2d(3, 1), nn.BatchNorm2d(channels))

    @staticmethod
    def bordered(channels: int, write_border: bool) -> list[nn.Module]:
        if write_border:
            return [nn.Conv2d(channels, channels, 1, bias=False), NormAndPad(channels)]
        return [nn.Conv2d(channels, channels, 1, padding=1, bias=False), nn.BatchNorm2d(channels)]

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.dense(x) + self.point(x) + self.deep(x) + self.mean(x))


def dbb(*, write_border: bool) -> nn.Module:
    return nn.Sequential(conv_bn(3, 8, 3, 2, act=nn.ReLU()), DiverseBranch(8, write_border=write_border), Head(8))


class RepGhost(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.primary = conv_bn(channels, channels, 1, act=nn.ReLU())
        self.cheap, self.fuse = conv_bn(channels, channels, 3, groups=channels), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.primary(x)
        return F.relu(self.cheap(y) + self.fuse(y))


class RepMixer(nn.Module):
    """FastViT: ``x + gamma * (mixer(x) - norm(x))``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mixer = nn.ModuleList([conv_bn(channels, channels, 3, groups=channels), nn.BatchNorm2d(channels)])
        self.norm = nn.BatchNorm2d(channels)
        self.layer_scale = nn.Parameter(torch.full((channels, 1, 1), 1e-5))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer_scale * (self.mixer[0](x) + self.mixer[1](x) - self.norm(x))


class InceptionMixer(nn.Module):
    """InceptionNeXt's token mixer: a split into the identity and depthwise square, 1xk and kx1 convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        part = channels // 4
        self.sizes = (channels - 3 * part, part, part, part)
        self.square = nn.Conv2d(part, part, 3, padding=1, groups=part)
        self.wide = nn.Conv2d(part, part, (1, 5), padding=(0, 2), groups=part)
        self.tall = nn.Conv2d(part, part, (5, 1), padding=(2, 0), groups=part)

    def forward(self, x: Tensor) -> Tensor:
        identity, square, wide, tall = torch.split(x, self.sizes, dim=1)
        return torch.cat([identity, self.square(square), self.wide(wide), self.tall(tall)], dim=1)


class InceptionNeXtBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mixer, self.norm = InceptionMixer(channels), nn.BatchNorm2d(channels)
        self.mlp = nn.Sequential(nn.Conv2d(channels, 16, 1), nn.GELU(), nn.Conv2d(16, channels, 1))
        self.gamma = nn.Parameter(1e-6 * torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.mlp(self.norm(self.mixer(x)))
        return x + y.mul(self.gamma.reshape(1, -1, 1, 1))


def inceptionnext() -> nn.Module:
    return nn.Sequential(conv_bn(3, 12, 4, 4), InceptionNeXtBlock(12), InceptionNeXtBlock(12), Head(12))


def convmixer() -> nn.Module:
    def layer() -> list[nn.Module]:
        depthwise = Residual(nn.Conv2d(8, 8, 5, groups=8, padding="same"), nn.GELU(), nn.BatchNorm2d(8))
        return [depthwise, nn.Conv2d(8, 8, 1), nn.GELU(), nn.BatchNorm2d(8)]

    patches = [nn.Conv2d(3, 8, 2, 2), nn.GELU(), nn.BatchNorm2d(8)]
    return nn.Sequential(*patches, *layer(), *layer(), Head(8))


class RepViTHead(nn.Module):
    """RepViT's depthwise block and its classifier: two BatchNorm1d-linear heads, averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8, 3, 2, act=nn.GELU())
        self.conv, self.conv1 = conv_bn(8, 8, 3, groups=8), nn.Conv2d(8, 8, 1, groups=8)
        self.norm = nn.BatchNorm2d(8)
        self.mixer = Residual(conv_bn(8, 16, 1, act=nn.GELU()), conv_bn(16, 8, 1))
        self.head = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 5))
        self.head_dist = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.mixer(self.norm((self.conv(x) + self.conv1(x)) + x))
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        return (self.head(x) + self.head_dist(x)) / 2


NETS: dict[str, Factory] = {
    "repvgg": lambda: (repvgg(), images()),
    "mobileone": lambda: (mobileone(), images()),
    "acnet": lambda: (acnet(), images()),
    "dbb": lambda: (dbb(write_border=False), images()),
    "dbb_border": lambda: (dbb(write_border=True), images()),
    "repghost": lambda: (nn.Sequential(conv_bn(3, 8, 3, 2), RepGhost(8), RepGhost(8), Head(8)), images()),
    "repmixer": lambda: (nn.Sequential(conv_bn(3, 8, 3, 2), RepMixer(8), nn.GELU(), RepMixer(8), Head(8)), images()),
    "inceptionnext": lambda: (inceptionnext(), images()),
    "convmixer": lambda: (convmixer(), images()),
    "repvit": lambda: (RepViTHead(), images()),
}
