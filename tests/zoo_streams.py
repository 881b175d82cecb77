"""Nets in whose streams BatchNorms stand in front of activations, in the shapes of published ones, of any width.

``STREAMS[name]`` makes one, with an example batch, of a width and a depth; ``signed`` gives its BatchNorms scales of
both signs in place of positive ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Make = Callable[[int, int], tuple[nn.Module, tuple[Tensor, ...]]]


@torch.no_grad()
def signed(module: nn.Module, negative: float, seed: int = 0) -> nn.Module:
    """Statistics that no fold can ignore, in place and in eval mode; a share of the scales is negative."""
    generator = torch.Generator().manual_seed(seed)
    for child in module.modules():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            size = 0.5 + torch.rand(child.num_features, generator=generator)
            child.weight.copy_(torch.where(torch.rand(child.num_features, generator=generator) < negative, -size, size))
            child.bias.copy_(0.5 * torch.randn(child.num_features, generator=generator))
            child.running_mean.copy_(0.5 * torch.randn(child.num_features, generator=generator))
            child.running_var.copy_(0.5 + torch.rand(child.num_features, generator=generator))
    return module.eval()


def conv(i: int, o: int, k: int = 3, s: int = 1, groups: int = 1, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, s, k // 2, groups=groups, bias=bias)


def normed(i: int, o: int, k: int = 3, s: int = 1, groups: int = 1) -> nn.Sequential:
    """BatchNorm, ReLU, convolution."""
    return nn.Sequential(nn.BatchNorm2d(i), nn.ReLU(), conv(i, o, k, s, groups))


class Head(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(2).mean(-1))


class PreActivated(nn.Module):
    """ResNet v2's block: the first activation is read by the shortcut's convolution too, where there is one."""

    def __init__(self, i: int, o: int, stride: int, convs: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self.norms, self.convs = nn.ModuleList(), nn.ModuleList()
        width = i
        for kernel, out in convs:
            self.norms.append(nn.BatchNorm2d(width))
            self.convs.append(conv(width, out, kernel, stride if kernel == 3 and stride > 1 else 1))
            stride = 1 if kernel == 3 else stride
            width = out
        first = [c.stride for c in self.convs if c.stride != (1, 1)]
        self.shortcut = conv(i, o, 1, first[0][0] if first else 1) if i != o or first else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[0](x).relu()
        if self.shortcut is not None:
            x = self.shortcut(y)
        for at, layer in enumerate(self.convs):
            y = layer(y if at == 0 else self.norms[at](y).relu())
        return x + y


def resnet_v2(width: int, depth: int, bottleneck: bool = False) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """``depth`` blocks per stage."""
    layers: list[nn.Module] = [conv(3, width, 7, 2), nn.MaxPool2d(3, 2, 1)]
    last = width
    for stage in range(4):
        o = width * 2**stage
        for block in range(depth):
            stride = 2 if stage and not block else 1
            convs = [(1, o), (3, o), (1, 4 * o)] if bottleneck else [(3, o), (3, o)]
            layers.append(PreActivated(last, convs[-1][1], stride, convs))
            last = convs[-1][1]
    return nn.Sequential(*layers, nn.BatchNorm2d(last), nn.ReLU(), Head(last)), (torch.randn(2, 3, 64, 64),)


class Residual(nn.Module):
    """``shortcut(x) + body(x)``."""

    def __init__(self, body: nn.Module, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.body, self.shortcut = body, shortcut or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.shortcut(x) + self.body(x)
        return y


def separable(i: int, o: int, s: int = 1) -> nn.Sequential:
    """As in xception41p: BatchNorm, ReLU, then a depthwise and a 1x1 convolution."""
    return nn.Sequential(nn.BatchNorm2d(i), nn.ReLU(), conv(i, i, 3, s, groups=i), conv(i, o, 1))


def xception(width: int, depth: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A stem with BatchNorm, entry modules with a 1x1 shortcut, ``depth`` middle ones, an exit."""
    w = width
    layers: list[nn.Module] = [conv(3, w, 3, 2), nn.BatchNorm2d(w), nn.ReLU(), conv(w, 2 * w)]
    for i, o, s in ((2 * w, 4 * w, 2), (4 * w, 8 * w, 2)):
        body = nn.Sequential(separable(i, o), separable(o, o), separable(o, o, s))
        layers.append(Residual(body, conv(i, o, 1, s)))
    layers += [Residual(nn.Sequential(*(separable(8 * w, 8 * w) for _ in range(3)))) for _ in range(depth)]
    return nn.Sequential(*layers, nn.BatchNorm2d(8 * w), nn.ReLU(), Head(8 * w)), (torch.randn(2, 3, 64, 64),)


def face(width: int, depth: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """ArcFace's ResNet: BatchNorm before a zero-padded convolution, PReLU, and a shortcut with one of its own."""

    def block(i: int, o: int, s: int) -> nn.Module:
        body = nn.Sequential(
            nn.BatchNorm2d(i), conv(i, o), nn.BatchNorm2d(o), nn.PReLU(o), conv(o, o, 3, s), nn.BatchNorm2d(o)
        )
        return Residual(body, nn.Sequential(conv(i, o, 1, s), nn.BatchNorm2d(o)) if s > 1 else None)

    layers: list[nn.Module] = [conv(3, width), nn.BatchNorm2d(width), nn.PReLU(width)]
    last = width
    for stage in range(4):
        o = width * 2**stage
        layers += [block(last if not at else o, o, 2 if not at else 1) for at in range(depth)]
        last = o
    head = nn.Sequential(nn.BatchNorm2d(last), nn.Flatten(), nn.Linear(4 * last, 16), nn.BatchNorm1d(16))
    return nn.Sequential(*layers, head), (torch.randn(2, 3, 32, 32),)


class TDNN(nn.Module):
    """ECAPA's layer: convolution, ReLU, BatchNorm."""

    def __init__(self, i: int, o: int, k: int, dilation: int = 1) -> None:
        super().__init__()
        self.pad, self.conv = dilation * (k - 1) // 2, nn.Conv1d(i, o, k, dilation=dilation)
        self.norm = nn.BatchNorm1d(o)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (self.pad, self.pad), mode="reflect") if self.pad else x
        y: Tensor = self.norm(self.conv(x).relu())
        return y


class Res2Net(nn.Module):
    """Chunks, each convolved after the one before is added."""

    def __init__(self, width: int, dilation: int, scale: int = 8) -> None:
        super().__init__()
        self.scale = scale
        self.blocks = nn.ModuleList(TDNN(width // scale, width // scale, 3, dilation) for _ in range(scale - 1))

    def forward(self, x: Tensor) -> Tensor:
        found, y = [], torch.zeros(())
        for i, part in enumerate(x.chunk(self.scale, 1)):
            y = part if i == 0 else self.blocks[i - 1](part if i == 1 else part + y)
            found.append(y)
        return torch.cat(found, 1)


class SqueezeExcite1d(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv1d(width, width // 4, 1), nn.Conv1d(width // 4, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.up(self.down(x.mean(2, keepdim=True)).relu()).sigmoid()


class ECAPA(nn.Module):
    """ECAPA-TDNN: three blocks read by a concat, attentive statistics pooling, a BatchNorm before the last layer."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.first = TDNN(20, width, 5)
        self.blocks = nn.ModuleList(
            nn.Sequential(TDNN(width, width, 1), Res2Net(width, 2 + i), TDNN(width, width, 1), SqueezeExcite1d(width))
            for i in range(depth)
        )
        wide = depth * width
        self.join = TDNN(wide, wide, 1)
        self.attend, self.weigh = TDNN(3 * wide, 16, 1), nn.Conv1d(16, wide, 1)
        self.norm, self.fc = nn.BatchNorm1d(2 * wide), nn.Conv1d(2 * wide, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        found = []
        for block in self.blocks:
            x = block(x) + x
            found.append(x)
        x = self.join(torch.cat(found, 1))
        mean = x.mean(2, keepdim=True)
        std = (x - mean).square().mean(2, keepdim=True).clamp(1e-9).sqrt()
        wide = torch.cat([x, mean.expand_as(x), std.expand_as(x)], 1)
        weights = self.weigh(self.attend(wide).tanh()).softmax(2)
        mean = (weights * x).sum(2, keepdim=True)
        std = (weights * (x - mean).square()).sum(2, keepdim=True).clamp(1e-9).sqrt()
        return self.fc(self.norm(torch.cat([mean, std], 1))).squeeze(2)


class WaveNet(nn.Module):
    """BatchNorm at the end of every layer, on the residual stream (as Graph WaveNet has it), and summed skips."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.start = nn.Conv1d(2, width, 1)
        self.filters, self.gates, self.skips, self.rests, self.norms = (nn.ModuleList() for _ in range(5))
        for i in range(depth):
            self.filters.append(nn.Conv1d(width, width, 2, dilation=2 ** (i % 4)))
            self.gates.append(nn.Conv1d(width, width, 2, dilation=2 ** (i % 4)))
            self.skips.append(nn.Conv1d(width, width, 1))
            self.rests.append(nn.Conv1d(width, width, 1))
            self.norms.append(nn.BatchNorm1d(width))
        self.end = nn.Sequential(nn.ReLU(), nn.Conv1d(width, width, 1), nn.ReLU(), nn.Conv1d(width, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        x, skip = self.start(x), None
        for to_filter, to_gate, to_skip, rest, norm in zip(
            self.filters, self.gates, self.skips, self.rests, self.norms
        ):
            y = to_filter(x).tanh() * to_gate(x).sigmoid()
            own = to_skip(y)
            skip = own if skip is None else own + skip[..., -own.shape[-1] :]
            x = norm(rest(y) + x[..., -y.shape[-1] :])
        found: Tensor = self.end(skip)
        return found


class ECG(nn.Module):
    """Ribeiro's ResNet for ECGs: the sum is read by the next block's shortcut before it is normalised."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv1d(4, width, 9, padding=4, bias=False), nn.BatchNorm1d(width), nn.ReLU())
        self.convs, self.norms, self.shortcuts = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for i in range(depth):
            a, b = width * (i + 1), width * (i + 2)
            self.convs.append(nn.ModuleList([
                nn.Conv1d(a, b, 9, padding=4, bias=False), nn.Conv1d(b, b, 9, 4, padding=4, bias=False)]))  # fmt: skip
            self.norms.append(nn.ModuleList([nn.BatchNorm1d(b), nn.BatchNorm1d(b)]))
            self.shortcuts.append(nn.Sequential(nn.MaxPool1d(4, 4), nn.Conv1d(a, b, 1, bias=False)))
        self.fc = nn.Linear(width * (depth + 1), 5)

    def forward(self, x: Tensor) -> Tensor:
        x = y = self.stem(x)
        for convs, norms, shortcut in zip(self.convs, self.norms, self.shortcuts):  # type: ignore[arg-type]
            x = convs[1](norms[0](convs[0](x)).relu())
            y = x + shortcut(y)
            x = norms[1](y).relu()
        found: Tensor = self.fc(x.mean(2))
        return found


class DeepSpeech(nn.Module):
    """Convolutions with BatchNorm and Hardtanh, then recurrent layers, all but the first behind a BatchNorm."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            nn.Conv2d(1, 4, (11, 5), (2, 2), (5, 2)), nn.BatchNorm2d(4), nn.Hardtanh(0, 20),
            nn.Conv2d(4, 4, (11, 5), (2, 1), (5, 2)), nn.BatchNorm2d(4), nn.Hardtanh(0, 20),
        )  # fmt: skip
        sizes = [4 * 8] + [width] * (depth - 1)
        self.layers = nn.ModuleList(nn.GRU(n, width, bidirectional=True) for n in sizes)
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for _ in sizes[1:])
        self.head = nn.Sequential(nn.BatchNorm1d(width), nn.Linear(width, 12, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        x = self.convs(x).flatten(1, 2).permute(2, 0, 1)
        t, n = x.shape[:2]
        for i, layer in enumerate(self.layers):
            if i:
                x = self.norms[i - 1](x.reshape(t * n, -1)).reshape(t, n, -1)
            x, _ = layer(x)
            x = x.reshape(t, n, 2, -1).sum(2)
        y: Tensor = self.head(x.reshape(t * n, -1)).reshape(t, n, -1)
        return y


class HourglassBlock(nn.Module):
    """The pre-activated bottleneck of a stacked hourglass."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.body = nn.Sequential(normed(i, o // 2, 1), normed(o // 2, o // 2), normed(o // 2, o, 1))
        self.shortcut = None if i == o else conv(i, o, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x) + (x if self.shortcut is None else self.shortcut(x))
        return y


class Hourglass(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.up, self.low, self.back = (HourglassBlock(width, width) for _ in range(3))
        self.inner = Hourglass(width, depth - 1) if depth > 1 else HourglassBlock(width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.back(self.inner(self.low(F.max_pool2d(x, 2))))
        return self.up(x) + F.interpolate(y, scale_factor=2.0)


class Stacked(nn.Module):
    """Two hourglasses; heat maps of the first go back into the stream."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            conv(3, width // 2, 7, 2), nn.BatchNorm2d(width // 2), nn.ReLU(), HourglassBlock(width // 2, width)
        )
        self.glasses = nn.ModuleList(Hourglass(width, depth) for _ in range(2))
        self.after = nn.ModuleList(
            nn.Sequential(HourglassBlock(width, width), conv(width, width, 1), nn.BatchNorm2d(width), nn.ReLU())
            for _ in range(2)
        )
        self.maps = nn.ModuleList(conv(width, 5, 1, bias=True) for _ in range(2))
        self.back, self.merge = conv(width, width, 1, bias=True), conv(5, width, 1, bias=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x)
        y = self.after[0](self.glasses[0](x))
        first = self.maps[0](y)
        x = x + self.back(y) + self.merge(first)
        return first, self.maps[1](self.after[1](self.glasses[1](x)))


def segresnet_block(width: int) -> nn.Module:
    return Residual(nn.Sequential(normed(width, width), normed(width, width)))


class SegResNet(nn.Module):
    """Pre-activated blocks down and up; sums with the encoder's values at every level."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        w = width
        self.first = conv(1, w)
        sizes = [w * 2**i for i in range(4)]
        self.down = nn.ModuleList(
            nn.Sequential(*([conv(n // 2, n, 3, 2)] if i else []), *(segresnet_block(n) for _ in range(depth)))
            for i, n in enumerate(sizes)
        )
        self.shrink = nn.ModuleList(conv(n, n // 2, 1) for n in sizes[:0:-1])
        self.up = nn.ModuleList(segresnet_block(n // 2) for n in sizes[:0:-1])
        self.final = nn.Sequential(nn.BatchNorm2d(w), nn.ReLU(), conv(w, 2, 1, bias=True))

    def forward(self, x: Tensor) -> Tensor:
        x, found = self.first(x), []
        for down in self.down:
            x = down(x)
            found.append(x)
        for shrink, up, beside in zip(self.shrink, self.up, found[-2::-1]):
            y = F.interpolate(shrink(x), scale_factor=2.0, mode="bilinear")
            x = up(y + beside)
        found: Tensor = self.final(x)
        return found


class Widened(nn.Module):
    """HighResNet's block: the shortcut is padded with channels of zeros where the body has more."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.body, self.more = nn.Sequential(normed(i, o), normed(o, o)), o - i

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x) + F.pad(x, (0, 0, 0, 0, self.more // 2, self.more - self.more // 2))
        return y


def highresnet(width: int, depth: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    layers: list[nn.Module] = [conv(1, width), nn.BatchNorm2d(width), nn.ReLU()]
    last = width
    for stage in range(3):
        layers += [Widened(last if not at else width * 2**stage, width * 2**stage) for at in range(depth)]
        last = width * 2**stage
    tail = [conv(last, last, 1), nn.BatchNorm2d(last), nn.ReLU(), conv(last, 3, 1, bias=True)]
    return nn.Sequential(*layers, *tail), (torch.randn(2, 1, 16, 16),)


def convmixer(width: int, depth: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Convolution, activation, BatchNorm; a residual around the depthwise one."""

    def after(layer: nn.Module) -> nn.Sequential:
        return nn.Sequential(layer, nn.ReLU(), nn.BatchNorm2d(width))

    layers: list[nn.Module] = [after(nn.Conv2d(3, width, 7, 7))]
    for _ in range(depth):
        layers += [Residual(after(conv(width, width, 7, groups=width))), after(conv(width, width, 1))]
    return nn.Sequential(*layers, Head(width)), (torch.randn(2, 3, 56, 56),)


class DenseBlock(nn.Module):
    def __init__(self, i: int, growth: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(normed(i + at * growth, 4 * growth, 1), normed(4 * growth, growth)) for at in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        found = [x]
        for layer in self.layers:
            found.append(layer(torch.cat(found, 1)))
        return torch.cat(found, 1)


def densenet(width: int, depth: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Blocks of ``depth``, twice and four times ``depth`` layers; all concatenate what all before them gave."""
    layers: list[nn.Module] = [conv(3, 2 * width, 7, 2), nn.BatchNorm2d(2 * width), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    last, depths = 2 * width, (depth, 2 * depth, 4 * depth)
    for at, many in enumerate(depths):
        layers.append(DenseBlock(last, width, many))
        last += width * many
        if at < len(depths) - 1:
            layers += [normed(last, last // 2, 1), nn.AvgPool2d(2)]
            last //= 2
    return nn.Sequential(*layers, nn.BatchNorm2d(last), nn.ReLU(), Head(last)), (torch.randn(2, 3, 64, 64),)


def on(make: Callable[[int, int], nn.Module], *shape: int) -> Make:
    return lambda width, depth: (make(width, depth), (torch.randn(2, *shape),))


#: name -> how to make it, and the width and the depth of a small and of a large one
STREAMS: dict[str, tuple[Make, tuple[int, int], tuple[int, int]]] = {
    "resnet_v2": (resnet_v2, (4, 1), (16, 2)),
    "resnet_v2_bottleneck": (lambda w, d: resnet_v2(w, d, bottleneck=True), (4, 1), (16, 4)),
    "xception": (xception, (4, 1), (16, 8)),
    "face": (face, (4, 1), (16, 3)),
    "ecapa_tdnn": (on(ECAPA, 20, 30), (16, 1), (64, 3)),
    "wavenet": (on(WaveNet, 2, 40), (4, 3), (32, 8)),
    "ecg": (on(ECG, 4, 256), (4, 2), (16, 4)),
    "deepspeech": (on(DeepSpeech, 1, 32, 20), (6, 2), (32, 5)),
    "hourglass": (on(Stacked, 3, 32, 32), (8, 1), (32, 3)),
    "segresnet": (on(SegResNet, 1, 32, 32), (4, 1), (8, 2)),
    "highresnet": (highresnet, (4, 1), (16, 3)),
    "convmixer": (convmixer, (4, 2), (32, 32)),
    "densenet": (densenet, (4, 1), (16, 6)),
}
