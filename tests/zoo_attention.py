"""Nets of the zoo that mix convolutions with attention, and the MetaFormers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from zoo_parts import Factory, Head, Residual, conv_bn, images


class Visformer(nn.Module):
    """BatchNorm before convolutions without padding: attention and MLP, and a padded grouped one in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8, 4, 4, act=nn.ReLU(inplace=True))
        self.position = nn.Parameter(torch.randn(1, 8, 5, 5))
        self.norm1, self.norm2 = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.qkv, self.project = nn.Conv2d(8, 24, 1, bias=False), nn.Conv2d(8, 8, 1, bias=False)
        self.mlp = nn.Sequential(
            nn.Conv2d(8, 16, 1), nn.GELU(), nn.Conv2d(16, 16, 3, padding=1, groups=4), nn.GELU(), nn.Conv2d(16, 8, 1)
        )
        self.norm, self.head = nn.BatchNorm2d(8), Head(8)

    def attention(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        q, k, v = self.qkv(x).reshape(n, 3, 2, c // 2, h * w).permute(1, 0, 2, 4, 3).unbind(0)
        weights = (q @ k.transpose(-2, -1) * 0.5).softmax(-1)
        return self.project((weights @ v).permute(0, 1, 3, 2).reshape(n, c, h, w))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x) + self.position
        x = x + self.attention(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return self.head(self.norm(x))


class PoolFormerBlock(nn.Module):
    """Average pool minus identity for mixing; BatchNorm before it and before the 1x1 convolutions; LayerScale."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.pool = nn.AvgPool2d(3, 1, 1, count_include_pad=False)
        self.mlp = nn.Sequential(nn.Conv2d(channels, 16, 1), nn.GELU(), nn.Conv2d(16, channels, 1))
        self.layer_scale_1 = nn.Parameter(1e-5 * torch.ones(channels))
        self.layer_scale_2 = nn.Parameter(1e-5 * torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.layer_scale_1[:, None, None] * (self.pool(y) - y)
        return x + self.layer_scale_2[:, None, None] * self.mlp(self.norm2(x))


class NextViTAttention(nn.Module):
    """NextViT's block: one BatchNorm feeds a linear layer and an average pool, the pool's feeds two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8, 3, 2, act=nn.ReLU())
        self.norm1, self.norm2 = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.q, self.k, self.v, self.project = (nn.Linear(8, 8) for _ in range(4))
        self.reduce, self.reduce_norm = nn.AvgPool1d(4, 4), nn.BatchNorm1d(8)
        self.mlp = nn.Sequential(nn.Conv2d(8, 16, 1), nn.ReLU(), nn.Conv2d(16, 8, 1))
        self.norm, self.head = nn.BatchNorm2d(8), Head(8)

    def attention(self, x: Tensor) -> Tensor:
        n, length, c = x.shape
        q = self.q(x).reshape(n, length, 2, c // 2).permute(0, 2, 1, 3)
        x = self.reduce_norm(self.reduce(x.transpose(1, 2))).transpose(1, 2)
        k = self.k(x).reshape(n, -1, 2, c // 2).transpose(1, 2)
        v = self.v(x).reshape(n, -1, 2, c // 2).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.project(out.transpose(1, 2).reshape(n, length, c))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        n, c, h, w = x.shape
        out = self.attention(self.norm1(x).flatten(2).transpose(1, 2))
        x = x + out.transpose(1, 2).reshape(n, c, h, w)
        x = x + self.mlp(self.norm2(x))
        return self.head(self.norm(x))


class LinearNorm(nn.Module):
    """LeViT: BatchNorm1d over the tokens of all images together."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, bias=False)
        self.bn = nn.BatchNorm1d(out_features)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return self.bn(x.flatten(0, 1)).reshape_as(x)


class LeViTAttention(nn.Module):
    """Narrow keys, wide values, learned biases by distance, hardswish before the projection."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.qkv = LinearNorm(12, 2 * (4 + 4 + 8))
        self.project = nn.Sequential(nn.Hardswish(), LinearNorm(16, 12))
        self.attention_biases = nn.Parameter(torch.randn(2, side * side))
        place = torch.cartesian_prod(torch.arange(side), torch.arange(side))
        offset = (place[:, None] - place[None]).abs()
        self.register_buffer("bias_index", offset[..., 0] * side + offset[..., 1], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        q, k, v = self.qkv(x).view(n, length, 2, 16).split([4, 4, 8], dim=3)
        weights = q.permute(0, 2, 1, 3) @ k.permute(0, 2, 3, 1) * 0.5 + self.attention_biases[:, self.bias_index]
        out = weights.softmax(-1) @ v.permute(0, 2, 1, 3)
        return self.project(out.transpose(1, 2).reshape(n, length, 16))


class LeViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_bn(3, 8, 3, 2, act=nn.Hardswish()), conv_bn(8, 12, 3, 2))
        self.attention = Residual(LeViTAttention(side=4))
        self.mlp = Residual(LinearNorm(12, 24), nn.Hardswish(), LinearNorm(24, 12))
        self.head = nn.Sequential(nn.BatchNorm1d(12), nn.Dropout(0.0), nn.Linear(12, 5))
        self.head_dist = nn.Sequential(nn.BatchNorm1d(12), nn.Dropout(0.0), nn.Linear(12, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = self.mlp(self.attention(x)).mean(1)
        return (self.head(x) + self.head_dist(x)) / 2


class SwiftFormer(nn.Module):
    """Depthwise-BatchNorm-1x1 encoders with LayerScale, and the last BatchNorm before a mean and two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8, 3, 2, act=nn.ReLU())
        self.depthwise, self.bn = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8)
        self.mlp = nn.Sequential(nn.Conv2d(8, 16, 1), nn.GELU(), nn.Conv2d(16, 8, 1))
        self.layer_scale = nn.Parameter(torch.ones(8)[:, None, None])
        self.norm = nn.BatchNorm2d(8)
        self.head, self.dist_head = nn.Linear(8, 5), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.layer_scale * self.mlp(self.bn(self.depthwise(x)))
        x = self.norm(x).flatten(2).mean(-1)
        return (self.head(x) + self.dist_head(x)) / 2


class EfficientFormer(nn.Module):
    """1x1 convolutions with BatchNorm around a GELU, pooling for mixing, LayerScale, and a pooled BatchNorm head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8, 3, 2, act=nn.ReLU())
        self.pool = nn.AvgPool2d(3, 1, 1, count_include_pad=False)
        self.mlp = nn.Sequential(conv_bn(8, 16, 1, act=nn.GELU()), conv_bn(16, 8, 1))
        self.layer_scale_1, self.layer_scale_2 = (nn.Parameter(1e-5 * torch.ones(8)) for _ in range(2))
        self.norm = nn.BatchNorm2d(8)
        self.heads = nn.ModuleList([nn.Linear(8, 5), nn.Linear(8, 5)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.layer_scale_1.view(-1, 1, 1) * (self.pool(x) - x)
        x = x + self.layer_scale_2.view(-1, 1, 1) * self.mlp(x)
        x = F.adaptive_avg_pool2d(self.norm(x), 1).flatten(1)
        return torch.stack([head(x) for head in self.heads]).mean(0)


class BotNet(nn.Module):
    """BatchNorm after attention over the values of one convolution, the heads folded into the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 12, 3, 2, act=nn.ReLU(inplace=True))
        self.qkv = nn.Conv2d(12, 36, 1, bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.last = conv_bn(12, 12, 1)
        self.head = Head(12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        n, c, h, w = x.shape
        q, k, v = self.qkv(x).split(c, dim=1)
        q, k, v = (t.reshape(n * 3, c // 3, h * w) for t in (q, k, v))
        weights = (torch.bmm(q.transpose(1, 2), k) * 0.5).softmax(-1)
        out = torch.bmm(weights, v.transpose(1, 2)).transpose(1, 2).reshape(n, c, h, w)
        return self.head(F.relu(x + self.last(F.relu(self.norm(out)))))


class CoAtNet(nn.Module):
    """MBConv with the BatchNorm before its 1x1 convolution and a pooled 1x1 shortcut past it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_bn(3, 8, 3, 2, act=nn.GELU()), nn.Conv2d(8, 8, 3, padding=1))
        self.shortcut = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(8, 12, 1))
        self.pre_norm = nn.BatchNorm2d(8)
        self.expand = conv_bn(8, 16, 1, act=nn.GELU())
        self.depthwise = conv_bn(16, 16, 3, 2, groups=16, act=nn.GELU())
        self.reduce = nn.Conv2d(16, 12, 1)
        self.head = Head(12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.reduce(self.depthwise(self.expand(self.pre_norm(x))))
        return self.head(y + self.shortcut(x))


class ConvNeXtBlock(nn.Module):
    """LayerNorm and linear layers with the channels last, LayerScale as a multiplication."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 5, padding=2, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.expand, self.reduce = nn.Linear(channels, 16), nn.Linear(16, channels)
        self.gamma = nn.Parameter(1e-6 * torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.gamma * self.reduce(F.gelu(self.expand(y)))
        return x + y.permute(0, 3, 1, 2)


def convnext() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 4, 4), ConvNeXtBlock(8), ConvNeXtBlock(8), nn.BatchNorm2d(8), Head(8))


class XCiT(nn.Module):
    """Local patch interaction: depthwise, GELU, BatchNorm, and a padded depthwise convolution that stops the shift."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8, 3, 2)
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.bn = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.gamma = nn.Parameter(torch.ones(8))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        n, c, h, w = x.shape
        tokens = x.reshape(n, c, h * w).permute(0, 2, 1)
        y = tokens.permute(0, 2, 1).reshape(n, c, h, w)
        y = self.conv2(self.bn(F.gelu(self.conv1(y))))
        tokens = tokens + self.gamma * y.reshape(n, c, h * w).permute(0, 2, 1)
        return self.head(tokens.mean(1))


def poolformer() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 4, 4), PoolFormerBlock(8), PoolFormerBlock(8), nn.BatchNorm2d(8), Head(8))


NETS: dict[str, Factory] = {
    "visformer": lambda: (Visformer(), images()),
    "poolformer": lambda: (poolformer(), images()),
    "nextvit": lambda: (NextViTAttention(), images()),
    "levit": lambda: (LeViT(), images()),
    "swiftformer": lambda: (SwiftFormer(), images()),
    "efficientformer": lambda: (EfficientFormer(), images()),
    "botnet": lambda: (BotNet(), images()),
    "coatnet": lambda: (CoAtNet(), images()),
    "convnext": lambda: (convnext(), images()),
    "xcit": lambda: (XCiT(), images()),
}
