"""Convolutional nets of the zoo: the published shapes, a few channels wide."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from zoo_parts import Factory, Head, Residual, conv_bn, images


def vgg() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 3, padding=1),
        nn.BatchNorm2d(12),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(48, 16),
        nn.BatchNorm1d(16),
        nn.ReLU(inplace=True),
        nn.Dropout(),
        nn.Linear(16, 5),
    )


class ResNetBlock(nn.Module):
    """torchvision's basic (``squeeze=None``) or bottleneck block, with its in-place sum and its downsample path."""

    def __init__(self, in_channels: int, channels: int, stride: int = 1, squeeze: int | None = None) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        if squeeze is None:
            shapes = [(in_channels, channels, 3, stride), (channels, channels, 3, 1)]
        else:
            shapes = [(in_channels, squeeze, 1, 1), (squeeze, squeeze, 3, stride), (squeeze, channels, 1, 1)]
        self.convs = nn.ModuleList(conv_bn(*shape) for shape in shapes)
        same = stride == 1 and in_channels == channels
        self.downsample = None if same else conv_bn(in_channels, channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = x
        for conv in self.convs[:-1]:
            out = self.relu(conv(out))
        out = self.convs[-1](out)
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


def resnet_basic() -> nn.Module:
    stem = conv_bn(3, 8, 7, 2, act=nn.ReLU(inplace=True))
    return nn.Sequential(
        stem, nn.MaxPool2d(3, 2, 1), ResNetBlock(8, 8), ResNetBlock(8, 16, 2), ResNetBlock(16, 16), Head(16)
    )


def resnet_bottleneck() -> nn.Module:
    stem = conv_bn(3, 8, act=nn.ReLU(inplace=True))
    return nn.Sequential(stem, ResNetBlock(8, 16, 1, 4), ResNetBlock(16, 16, 1, 4), ResNetBlock(16, 24, 2, 8), Head(24))


def mobilenet_v2() -> nn.Module:
    def inverted(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
        hidden = 2 * in_channels
        return nn.Sequential(
            conv_bn(in_channels, hidden, 1, act=nn.ReLU6(inplace=True)),
            conv_bn(hidden, hidden, 3, stride, groups=hidden, act=nn.ReLU6(inplace=True)),
            conv_bn(hidden, out_channels, 1),
        )

    stem = conv_bn(3, 8, 3, 2, act=nn.ReLU6(inplace=True))
    return nn.Sequential(stem, Residual(inverted(8, 8, 1)), inverted(8, 12, 2), Residual(inverted(12, 12, 1)), Head(12))


class ShuffleUnit(nn.Module):
    """Half of the channels pass, half are transformed; then concat and channel shuffle."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.branch = nn.Sequential(
            conv_bn(half, half, 1, act=nn.ReLU(inplace=True)),
            conv_bn(half, half, 3, groups=half),
            conv_bn(half, half, 1, act=nn.ReLU(inplace=True)),
        )

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=1)
        out = torch.cat([left, self.branch(right)], dim=1)
        n, c, h, w = out.shape
        return out.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


def shufflenet_v2() -> nn.Module:
    stem = conv_bn(3, 8, 3, 2, act=nn.ReLU(inplace=True))
    return nn.Sequential(stem, ShuffleUnit(8), ShuffleUnit(8), conv_bn(8, 16, 1), nn.BatchNorm2d(16), Head(16))


class DenseLayer(nn.Module):
    def __init__(self, in_channels: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(in_channels), nn.Conv2d(in_channels, 2 * growth, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(2 * growth), nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.norm1(x), inplace=True))
        return torch.cat([x, self.conv2(F.relu(self.norm2(out), inplace=True))], 1)


def densenet() -> nn.Module:
    transition = nn.Sequential(nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.Conv2d(16, 8, 1), nn.AvgPool2d(2))
    stem = conv_bn(3, 8, act=nn.ReLU(inplace=True))
    return nn.Sequential(stem, DenseLayer(8, 4), DenseLayer(12, 4), transition, nn.BatchNorm2d(8), nn.ReLU(), Head(8))


def preact_resnet() -> nn.Module:
    def block() -> nn.Module:
        first = [nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, bias=False)]
        return Residual(*first, nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, bias=False))

    stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
    return nn.Sequential(stem, block(), block(), nn.BatchNorm2d(8), nn.ReLU(), Head(8))


class DualPath(nn.Module):
    """DPN: one output is added to the first channels, the other appended to them."""

    def __init__(self, in_channels: int, added: int, appended: int) -> None:
        super().__init__()
        self.added = added
        self.pre = nn.Sequential(nn.BatchNorm2d(in_channels), nn.ReLU(inplace=True))
        self.conv1 = nn.Conv2d(in_channels, 8, 1, bias=False)
        self.mid = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, padding=1, groups=2))
        self.post = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, added + appended, 1))

    def forward(self, x: Tensor) -> Tensor:
        out = self.post(self.mid(self.conv1(self.pre(x))))
        residual = x[:, : self.added] + out[:, : self.added]
        return torch.cat([residual, x[:, self.added :], out[:, self.added :]], dim=1)


def dpn() -> nn.Module:
    stem = conv_bn(3, 12, act=nn.ReLU(inplace=True))
    return nn.Sequential(stem, DualPath(12, 8, 4), DualPath(16, 8, 4), nn.BatchNorm2d(20), nn.ELU(), Head(20))


class UNet(nn.Module):
    """Transposed convolutions of one group, two groups and depthwise, each before a BatchNorm, and skips."""

    def __init__(self) -> None:
        super().__init__()
        self.down1 = conv_bn(3, 8, act=nn.ReLU(inplace=True))
        self.down2 = conv_bn(8, 8, 3, 2, act=nn.LeakyReLU(0.1, inplace=True))
        self.down3 = conv_bn(8, 8, 3, 2, act=nn.ReLU(inplace=True))
        self.up1 = nn.ConvTranspose2d(8, 8, 2, 2, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.up2 = nn.ConvTranspose2d(16, 8, 3, 2, 1, output_padding=1, groups=2)
        self.bn2 = nn.BatchNorm2d(8)
        self.smooth = nn.ConvTranspose2d(8, 8, 3, padding=1, groups=8)
        self.bn3 = nn.BatchNorm2d(8)
        self.wide = nn.ConvTranspose2d(8, 12, 3, padding=2, dilation=2, groups=4)
        self.bn4 = nn.BatchNorm2d(12)
        self.head = nn.Conv2d(12, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        b = self.down2(a)
        y = F.relu(self.bn1(self.up1(self.down3(b))))
        y = F.relu(self.bn2(self.up2(torch.cat([y, b], 1)))) + a
        y = self.bn3(self.smooth(y))
        return self.head(F.relu(self.bn4(self.wide(y))))


def conv3d() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(1, 8, 3, padding=1),
        nn.BatchNorm3d(8),
        nn.ReLU(),
        nn.ConvTranspose3d(8, 4, 2, 2, groups=2),
        nn.BatchNorm3d(4),
        nn.AvgPool3d(2),
        nn.Conv3d(4, 4, (1, 3, 3), groups=4),
        nn.BatchNorm3d(4),
    )


def conv1d() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(4, 8, 5, 2, 2, bias=False),
        nn.BatchNorm1d(8),
        nn.PReLU(8),
        Residual(nn.Conv1d(8, 8, 3, padding=2, dilation=2), nn.BatchNorm1d(8)),
        nn.ConvTranspose1d(8, 8, 4, 2, 1, bias=False),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.ConvTranspose1d(8, 6, 3, groups=2),
        nn.BatchNorm1d(6),
    )


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 16), nn.BatchNorm1d(16, affine=False), nn.ReLU(), nn.Linear(16, 8, bias=False), nn.BatchNorm1d(8)
    )


class SqueezeExcite(nn.Module):
    """MobileNetV3's block: the gate multiplies what a BatchNorm and an activation made; hardswish and hardsigmoid."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = conv_bn(8, 16, 1, act=nn.Hardswish(inplace=True))
        self.depthwise = conv_bn(16, 16, 3, groups=16)
        self.reduce, self.gate = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.norm = nn.BatchNorm2d(16)
        self.project = conv_bn(16, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(self.expand(x))
        gate = F.hardsigmoid(self.gate(F.relu(self.reduce(y.mean((2, 3), keepdim=True)))))
        return x + self.project(self.norm(y * gate))


def squeeze_excite() -> nn.Module:
    return nn.Sequential(conv_bn(3, 8, act=nn.Hardswish(inplace=True)), SqueezeExcite(), Head(8))


class NASNetCell(nn.Module):
    """Sums of separable convolutions, a factorised reduction (concat, then BatchNorm), and a sum of sums normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(8)
        self.path1, self.path2 = nn.Conv2d(8, 4, 1, bias=False), nn.Conv2d(8, 4, 1, bias=False)
        self.path_norm = nn.BatchNorm2d(8)
        self.separable = nn.ModuleList(self.separable_conv() for _ in range(4))
        self.a, self.b, self.c = (nn.Conv2d(8, 8, 1) for _ in range(3))
        self.sum_norm = nn.BatchNorm2d(8)
        self.last_norm = nn.BatchNorm2d(24)
        self.last = nn.Conv2d(24, 8, 1)

    @staticmethod
    def separable_conv() -> nn.Module:
        depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        return nn.Sequential(nn.ReLU(), depthwise, nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem_norm(self.stem(x)))
        shifted = F.pad(x, (0, 1, 0, 1))[:, :, 1:, 1:]
        halves = [self.path1(F.avg_pool2d(x, 1, 2)), self.path2(F.avg_pool2d(shifted, 1, 2))]
        x = self.path_norm(torch.cat(halves, 1))
        left = self.separable[0](x) + self.separable[1](x)
        right = self.separable[2](left) + F.avg_pool2d(self.separable[3](x), 3, 1, 1, count_include_pad=False)
        y = F.relu(left)
        total = self.sum_norm((self.a(y) + self.b(F.relu(right))) + self.c(y))
        return self.last(self.last_norm(torch.cat([left, right, total], 1)))


class FrozenBatchNorm2d(nn.Module):
    """As torchvision and transformers write it: four buffers and arithmetic."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        w, b = self.weight.reshape(1, -1, 1, 1), self.bias.reshape(1, -1, 1, 1)
        rv, rm = self.running_var.reshape(1, -1, 1, 1), self.running_mean.reshape(1, -1, 1, 1)
        scale = w * (rv + self.eps).rsqrt()
        return x * scale + (b - rm * scale)


def frozen_resnet() -> nn.Module:
    stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), FrozenBatchNorm2d(8), nn.ReLU(inplace=True))
    body = [nn.Conv2d(8, 8, 3, padding=1, bias=False), FrozenBatchNorm2d(8), nn.ReLU(inplace=True)]
    body += [nn.Conv2d(8, 8, 1, bias=False), FrozenBatchNorm2d(8)]
    return nn.Sequential(stem, Residual(*body), nn.ReLU(inplace=True), Head(8))


NETS: dict[str, Factory] = {
    "vgg": lambda: (vgg(), images()),
    "resnet_basic": lambda: (resnet_basic(), images()),
    "resnet_bottleneck": lambda: (resnet_bottleneck(), images()),
    "mobilenet_v2": lambda: (mobilenet_v2(), images()),
    "shufflenet_v2": lambda: (shufflenet_v2(), images()),
    "densenet": lambda: (densenet(), images()),
    "preact_resnet": lambda: (preact_resnet(), images()),
    "dpn": lambda: (dpn(), images()),
    "unet": lambda: (UNet(), images()),
    "conv3d": lambda: (conv3d(), (torch.randn(2, 1, 6, 6, 6),)),
    "conv1d": lambda: (conv1d(), (torch.randn(2, 4, 16),)),
    "mlp": lambda: (mlp(), (torch.randn(2, 6),)),
    "squeeze_excite": lambda: (squeeze_excite(), images()),
    "nasnet": lambda: (NASNetCell(), images()),
    "frozen_resnet": lambda: (frozen_resnet(), images()),
}
