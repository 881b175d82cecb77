"""Whole nets whose blocks are trained as parallel linear branches: RepVGG, MobileOne, RepGhost, FastViT, RepViT, ACNet
and a diverse-branch net, with the layouts of the published ones.

``FULL[name]()`` has the published depth and width, for images of 224x224; ``SMALL[name]()`` one or two blocks of each
kind. Every block has a ``deployed()`` form (``reparametrise.by_hand``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from reparametrise import Kernel, added, conv_of, fused, identity, normed_identity, widened
from torch import Tensor, nn
from torch.nn import functional as F
from zoo_parts import Head, Residual, conv_bn


class Branches(nn.Module):
    """Equal convolutions, a 1x1 one and a BatchNorm alone, summed, then an activation.

    RepVGG's block is one convolution with both of the others; MobileOne's has several; FastViT's stem and RepGhost's
    cheap operation (no 1x1) are of the same kind.
    """

    def __init__(
        self, ins: int, outs: int, kernel: int = 3, stride: int = 1, groups: int = 1, *, convs: int = 1,
        scale: bool = True, act: nn.Module | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.stride, self.groups = stride, groups
        self.convs = nn.ModuleList(conv_bn(ins, outs, kernel, stride, groups) for _ in range(convs))
        self.scale = conv_bn(ins, outs, 1, stride, groups) if scale and kernel > 1 else None
        self.skip = nn.BatchNorm2d(ins) if ins == outs and stride == 1 else None
        self.act = act or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = self.convs[0](x)
        for conv in self.convs[1:]:
            out = out + conv(x)
        if self.scale is not None:
            out = out + self.scale(x)
        if self.skip is not None:
            out = out + self.skip(x)
        return self.act(out)

    def kernel(self) -> Kernel:
        parts = [fused(*conv) for conv in self.convs]
        parts += [fused(*self.scale)] if self.scale is not None else []
        parts += [normed_identity(self.skip, self.groups)] if self.skip is not None else []
        return added(*parts)

    def deployed(self) -> nn.Module:
        conv = conv_of(self.kernel(), self.stride, self.groups)
        return conv if isinstance(self.act, nn.Identity) else nn.Sequential(conv, self.act)


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.adaptive_avg_pool2d(x, 1)
        return x * torch.sigmoid(self.expand(F.relu(self.reduce(y))))


def repvgg(widths: Sequence[int], blocks: Sequence[int], classes: int) -> nn.Module:
    ins, layers = 3, [Branches(3, widths[0], 3, 2, act=nn.ReLU())]
    ins = widths[0]
    for width, count in zip(widths[1:], blocks):
        for i in range(count):
            layers.append(Branches(ins, width, 3, 2 if i == 0 else 1, act=nn.ReLU()))
            ins = width
    return nn.Sequential(*layers, Head(ins, classes))


def mobileone(widths: Sequence[int], blocks: Sequence[int], convs: int, classes: int) -> nn.Module:
    layers: list[nn.Module] = [Branches(3, widths[0], 3, 2, act=nn.ReLU())]
    ins = widths[0]
    for width, count in zip(widths[1:], blocks):
        for i in range(count):
            layers.append(Branches(ins, ins, 3, 2 if i == 0 else 1, ins, convs=convs, act=nn.ReLU()))
            layers.append(Branches(ins, width, 1, convs=convs, act=nn.ReLU()))
            ins = width
    return nn.Sequential(*layers, Head(ins, classes))


class RepGhostModule(nn.Module):
    def __init__(self, ins: int, outs: int, *, relu: bool) -> None:
        super().__init__()
        act = nn.ReLU() if relu else None
        self.primary = conv_bn(ins, outs, 1, act=act)
        self.cheap = Branches(outs, outs, 3, groups=outs, scale=False, act=act)

    def forward(self, x: Tensor) -> Tensor:
        return self.cheap(self.primary(x))


class RepGhostBottleneck(nn.Module):
    def __init__(self, ins: int, mid: int, outs: int, kernel: int, stride: int, excite: float) -> None:
        super().__init__()
        self.first = RepGhostModule(ins, mid, relu=True)
        self.down = conv_bn(mid, mid, kernel, stride, mid) if stride > 1 else None
        self.excite = SqueezeExcite(mid, max(1, int(mid * excite))) if excite else None
        self.second = RepGhostModule(mid, outs, relu=False)
        same = ins == outs and stride == 1
        depthwise = conv_bn(ins, ins, kernel, stride, ins)
        self.shortcut = nn.Identity() if same else nn.Sequential(depthwise, conv_bn(ins, outs, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        for part in (self.down, self.excite):
            y = y if part is None else part(y)
        return self.second(y) + self.shortcut(x)


#: kernel, hidden width, width, squeeze, stride: RepGhostNet 1.0x.
REPGHOST = [
    (3, 8, 16, 0, 1), (3, 24, 24, 0, 2), (3, 36, 24, 0, 1), (5, 36, 40, 0.25, 2), (5, 60, 40, 0.25, 1),
    (3, 120, 80, 0, 2), (3, 100, 80, 0, 1), (3, 92, 80, 0, 1), (3, 92, 80, 0, 1), (3, 240, 112, 0.25, 1),
    (3, 336, 112, 0.25, 1), (5, 336, 160, 0.25, 2), (5, 480, 160, 0, 1), (5, 480, 160, 0.25, 1), (5, 480, 160, 0, 1),
    (5, 480, 160, 0.25, 1),
]  # fmt: skip


def repghost(rows: Sequence[tuple[int, int, int, float, int]], last: int, classes: int) -> nn.Module:
    layers, ins = [conv_bn(3, rows[0][2], 3, 2, act=nn.ReLU())], rows[0][2]
    for kernel, mid, outs, excite, stride in rows:
        layers.append(RepGhostBottleneck(ins, mid, outs, kernel, stride, excite))
        ins = outs
    return nn.Sequential(*layers, conv_bn(ins, last, 1, act=nn.ReLU()), Head(last, classes))


class RepMixer(nn.Module):
    """``x + gamma * (mixer(x) - norm(x))``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mixer, self.norm = Branches(channels, channels, 3, groups=channels), nn.BatchNorm2d(channels)
        self.layer_scale = nn.Parameter(torch.full((channels, 1, 1), 1e-5))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer_scale * (self.mixer(x) - self.norm(x))

    def deployed(self) -> nn.Module:
        (weight, bias), (norm_weight, norm_bias) = (
            self.mixer.kernel(),
            normed_identity(self.norm, len(self.layer_scale)),
        )
        scale = self.layer_scale.unsqueeze(-1)
        one = identity(len(weight), len(weight), weight)
        weight = widened(one, (3, 3)) + scale * (weight - widened(norm_weight, (3, 3)))
        return conv_of((weight, scale.flatten() * (bias - norm_bias)), groups=len(weight))


class FastViTBlock(nn.Module):
    def __init__(self, channels: int, ratio: int = 3) -> None:
        super().__init__()
        self.mixer = RepMixer(channels)
        self.conv = conv_bn(channels, channels, 7, groups=channels)
        self.mlp = nn.Sequential(
            nn.Conv2d(channels, ratio * channels, 1), nn.GELU(), nn.Conv2d(ratio * channels, channels, 1)
        )
        self.layer_scale = nn.Parameter(torch.full((channels, 1, 1), 1e-5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.mixer(x)
        return x + self.layer_scale * self.mlp(self.conv(x))


class LargeKernel(nn.Module):
    """FastViT's patch embedding: a large depthwise convolution and a small one."""

    def __init__(self, ins: int, outs: int, kernel: int = 7, stride: int = 2) -> None:
        super().__init__()
        self.large, self.small = conv_bn(ins, outs, kernel, stride, ins), conv_bn(ins, outs, 3, stride, ins)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.large(x) + self.small(x))

    def deployed(self) -> nn.Module:
        conv = self.large[0]
        return nn.Sequential(conv_of(added(fused(*self.large), fused(*self.small)), 2, conv.groups), nn.GELU())


def fastvit(widths: Sequence[int], blocks: Sequence[int], classes: int) -> nn.Module:
    width, gelu = widths[0], nn.GELU()
    layers: list[nn.Module] = [
        Branches(3, width, 3, 2, act=gelu), Branches(width, width, 3, 2, width, act=gelu),
        Branches(width, width, 1, act=gelu),
    ]  # fmt: skip
    for i, (outs, count) in enumerate(zip(widths, blocks)):
        if i:
            layers += [LargeKernel(width, outs), Branches(outs, outs, 1, act=gelu)]
        layers += [FastViTBlock(outs) for _ in range(count)]
        width = outs
    layers += [Branches(width, 2 * width, 3, groups=width), SqueezeExcite(2 * width, width // 8 or 1), gelu]
    return nn.Sequential(*layers, Head(2 * width, classes))


class RepViTMixer(nn.Module):
    """``norm(conv(x) + point(x) + x)``, depthwise; the 1x1 has a bias and no BatchNorm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.norm = conv_bn(channels, channels, 3, groups=channels), nn.BatchNorm2d(channels)
        self.point = nn.Conv2d(channels, channels, 1, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm((self.conv(x) + self.point(x)) + x)

    def deployed(self) -> nn.Module:
        channels = self.point.out_channels
        one = identity(channels, channels, self.point.weight)
        conv = conv_of(added(fused(*self.conv), (self.point.weight, self.point.bias), (one, 0)), groups=channels)
        return conv_of(fused(conv, self.norm), groups=channels)


def repvit_block(ins: int, outs: int, stride: int, excite: bool) -> nn.Module:
    mlp = Residual(conv_bn(outs, 2 * outs, 1, act=nn.GELU()), conv_bn(2 * outs, outs, 1))
    se = [SqueezeExcite(ins, max(1, ins // 4))] if excite else []
    if stride == 1:
        return nn.Sequential(RepViTMixer(ins), *se, mlp)
    return nn.Sequential(conv_bn(ins, ins, 3, stride, ins), *se, conv_bn(ins, outs, 1), mlp)


class DistilledHead(nn.Module):
    """RepViT's classifier: two BatchNorm-linear heads, averaged."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            nn.ModuleList([nn.BatchNorm1d(channels), nn.Linear(channels, classes)]) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        (norm, linear), (other_norm, other_linear) = self.heads
        return (linear(norm(x)) + other_linear(other_norm(x))) / 2

    def deployed(self) -> nn.Module:
        weight, bias = 0, 0
        for norm, linear in self.heads:
            scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
            weight = weight + linear.weight * scale / 2
            bias = bias + (linear.bias + linear.weight @ (norm.bias - norm.running_mean * scale)) / 2
        linear = nn.Linear(weight.shape[1], len(weight)).to(weight.dtype)
        linear.weight, linear.bias = nn.Parameter(weight.detach()), nn.Parameter(bias.detach())
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(1), linear)


def repvit(widths: Sequence[int], blocks: Sequence[int], classes: int) -> nn.Module:
    ins = widths[0]
    stem = [conv_bn(3, ins // 2, 3, 2, act=nn.GELU()), conv_bn(ins // 2, ins, 3, 2)]
    layers: list[nn.Module] = [*stem]
    for stage, (outs, count) in enumerate(zip(widths, blocks)):
        for i in range(count):
            layers.append(repvit_block(ins, outs, 2 if stage and i == 0 else 1, excite=i % 2 == (stage > 0)))
            ins = outs
    return nn.Sequential(*layers, DistilledHead(ins, classes))


class AsymmetricBlock(nn.Module):
    """ACNet: a square convolution and its two strips."""

    def __init__(self, ins: int, outs: int, stride: int = 1) -> None:
        super().__init__()
        self.stride, self.square = stride, conv_bn(ins, outs, 3, stride)
        self.tall = nn.ModuleList([nn.Conv2d(ins, outs, (3, 1), stride, (1, 0), bias=False), nn.BatchNorm2d(outs)])
        self.wide = nn.ModuleList([nn.Conv2d(ins, outs, (1, 3), stride, (0, 1), bias=False), nn.BatchNorm2d(outs)])

    def forward(self, x: Tensor) -> Tensor:
        return self.square(x) + self.tall[1](self.tall[0](x)) + self.wide[1](self.wide[0](x))

    def deployed(self) -> nn.Module:
        return conv_of(added(fused(*self.square), fused(*self.tall), fused(*self.wide)), self.stride)


class DiverseBlock(nn.Module):
    """Diverse-branch block: 3x3, 1x1, 1x1 then 3x3, and 1x1 then average.

    The 1x1 in front pads, so that its border holds what its BatchNorm makes of zero, as the authors' code writes there.
    """

    def __init__(self, ins: int, outs: int, stride: int = 1) -> None:
        super().__init__()
        self.stride = stride
        self.dense, self.point = conv_bn(ins, outs, 3, stride), conv_bn(ins, outs, 1, stride)
        self.before = nn.ModuleList([nn.Conv2d(ins, ins, 1, padding=1, bias=False), nn.BatchNorm2d(ins)])
        self.deep = nn.ModuleList([nn.Conv2d(ins, outs, 3, stride, bias=False), nn.BatchNorm2d(outs)])
        self.mixed = nn.ModuleList([nn.Conv2d(ins, outs, 1, padding=1, bias=False), nn.BatchNorm2d(outs)])
        self.pool, self.pooled = nn.AvgPool2d(3, stride), nn.BatchNorm2d(outs)

    def forward(self, x: Tensor) -> Tensor:
        deep = self.deep[1](self.deep[0](self.before[1](self.before[0](x))))
        mean = self.pooled(self.pool(self.mixed[1](self.mixed[0](x))))
        return self.dense(x) + self.point(x) + deep + mean

    def deployed(self) -> nn.Module:
        return conv_of(
            added(fused(*self.dense), fused(*self.point), self.after(self.before, self.deep), self.averaged()),
            self.stride,
        )

    @staticmethod
    def after(first: nn.ModuleList, second: nn.ModuleList) -> Kernel:
        """DBB's transform III: a 1x1, then a 3x3."""
        (point, shift), (weight, bias) = fused(*first), fused(*second)
        return F.conv2d(weight, point.permute(1, 0, 2, 3)), bias + (weight * shift.reshape(1, -1, 1, 1)).sum((1, 2, 3))

    def averaged(self) -> Kernel:
        """Transforms III and V: a 1x1, then an average as a 3x3 kernel with its BatchNorm."""
        outs = self.pooled.num_features
        mean = torch.zeros(outs, outs, 3, 3, dtype=self.pooled.weight.dtype)
        for c in range(outs):
            mean[c, c] = 1 / 9
        return self.after(self.mixed, nn.ModuleList([conv_of((mean, torch.zeros(outs))), self.pooled]))


class BasicBlock(nn.Module):
    """ResNet's, with a block of choice for its 3x3 convolutions."""

    def __init__(self, ins: int, outs: int, stride: int, block: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.one, self.two = block(ins, outs, stride), block(outs, outs)
        self.shortcut = nn.Identity() if stride == 1 and ins == outs else conv_bn(ins, outs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.two(F.relu(self.one(x))) + self.shortcut(x))


def resnet(widths: Sequence[int], blocks: Sequence[int], block: Callable[..., nn.Module], classes: int) -> nn.Module:
    ins = widths[0]
    layers: list[nn.Module] = [conv_bn(3, ins, 7, 2, act=nn.ReLU()), nn.MaxPool2d(3, 2, 1)]
    for stage, (outs, count) in enumerate(zip(widths, blocks)):
        for i in range(count):
            layers.append(BasicBlock(ins, outs, 2 if stage and i == 0 else 1, block))
            ins = outs
    return nn.Sequential(*layers, Head(ins, classes))


FULL: dict[str, Callable[[], nn.Module]] = {
    "RepVGG-A0": lambda: repvgg((48, 48, 96, 192, 1280), (2, 4, 14, 1), 1000),
    "RepVGG-B0": lambda: repvgg((64, 64, 128, 256, 1280), (4, 6, 16, 1), 1000),
    "MobileOne-S0": lambda: mobileone((48, 48, 128, 256, 1024), (2, 8, 10, 1), 4, 1000),
    "MobileOne-S1": lambda: mobileone((64, 96, 192, 512, 1280), (2, 8, 10, 1), 1, 1000),
    "RepGhostNet": lambda: repghost(REPGHOST, 960, 1000),
    "FastViT-T8": lambda: fastvit((48, 96, 192, 384), (2, 2, 4, 2), 1000),
    "RepViT-M0.9": lambda: repvit((48, 96, 192, 384), (3, 4, 16, 3), 1000),
    "ACNet-18": lambda: resnet((64, 128, 256, 512), (2, 2, 2, 2), AsymmetricBlock, 1000),
    "DBB-18": lambda: resnet((64, 128, 256, 512), (2, 2, 2, 2), DiverseBlock, 1000),
}

SMALL: dict[str, Callable[[], nn.Module]] = {
    "RepVGG-A0": lambda: repvgg((8, 8, 12), (2, 1), 5),
    "RepVGG-B0": lambda: repvgg((8, 16, 12), (1, 3), 5),
    "MobileOne-S0": lambda: mobileone((8, 8, 12), (1, 2), 4, 5),
    "MobileOne-S1": lambda: mobileone((8, 12, 16), (2, 1), 1, 5),
    "RepGhostNet": lambda: repghost([(3, 8, 8, 0, 1), (5, 12, 12, 0.25, 2), (3, 10, 12, 0, 1)], 16, 5),
    "FastViT-T8": lambda: fastvit((8, 16), (1, 2), 5),
    "RepViT-M0.9": lambda: repvit((8, 16), (2, 2), 5),
    "ACNet-18": lambda: resnet((8, 16), (1, 1), AsymmetricBlock, 5),
    "DBB-18": lambda: resnet((8, 12), (1, 1), DiverseBlock, 5),
}
