"""Four small classifiers of scikit-learn's 8x8 handwritten digits, one per way that BatchNorm meets its neighbours.

Every factory returns a module in training mode with freshly initialised weights; ``digits_*.safetensors`` beside this
file hold the trained ones. Each takes ``x`` of shape (N, 1, 8, 8), float32 in [0, 1], and returns logits (N, 10).
``module.example_inputs`` is a tuple of tensors whose dimension 0 is the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

CLASSES = 10


class DigitsNet(nn.Module):
    """Base of the four nets: states an example input of two images."""

    def __init__(self) -> None:
        super().__init__()
        self.example_inputs = (torch.zeros(2, 1, 8, 8),)


class DigitsMLP(DigitsNet):
    """Linear, BatchNorm1d, ReLU, Linear on the 64 pixels; also takes (N, 64)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(64, width)
        self.norm = nn.BatchNorm1d(width)
        self.relu = nn.ReLU()
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, 10) of images (N, 1, 8, 8) or (N, 64)."""
        return self.head(self.relu(self.norm(self.hidden(x.flatten(1)))))


class ResidualBlock2d(nn.Module):
    """Two 3x3 convolutions and an in-place sum; ``affine=False`` leaves the second BatchNorm without weights."""

    def __init__(self, channels: int, *, affine: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels, affine=affine)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as ``x``: (N, channels, H, W)."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return self.relu(out)


class DigitsCNN(DigitsNet):
    """A small encoder and decoder with the idioms of larger nets: 11 BatchNorm2d, about 60 K parameters at width 24.

    Residual blocks, a depthwise-separable convolution, a concat of two branches, a transposed convolution, in-place
    ReLUs, ``affine=False``, ``momentum=None``; the last BatchNorm follows an activation, so only the linear head
    behind the average pool can absorb it.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        )
        self.block1 = ResidualBlock2d(width, affine=False)
        self.depthwise = nn.Sequential(
            nn.Conv2d(width, width, 3, stride=2, padding=1, groups=width, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        )
        self.pointwise = nn.Sequential(
            nn.Conv2d(width, 2 * width, 1, bias=False),
            nn.BatchNorm2d(2 * width, momentum=None),
            nn.ReLU(inplace=True),
        )
        self.branch1x1 = nn.Sequential(nn.Conv2d(2 * width, width, 1), nn.BatchNorm2d(width))
        self.branch3x3 = nn.Sequential(nn.Conv2d(2 * width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))
        self.relu = nn.ReLU(inplace=True)
        self.up = nn.Sequential(
            nn.ConvTranspose2d(2 * width, width, 2, stride=2), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        )
        self.block2 = ResidualBlock2d(width)
        self.tail = nn.Conv2d(width, 4 * width, 3, padding=1)
        self.tail_relu = nn.ReLU(inplace=True)
        self.tail_norm = nn.BatchNorm2d(4 * width)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(4 * width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, 10) of images (N, 1, 8, 8)."""
        skip = self.block1(self.stem(x))
        x = self.pointwise(self.depthwise(skip))
        x = self.relu(torch.cat([self.branch1x1(x), self.branch3x3(x)], dim=1))
        x = self.block2(self.up(x) + skip)
        x = self.tail_norm(self.tail_relu(self.tail(x)))
        return self.head(self.pool(x).flatten(1))


class ResidualBlock1d(nn.Module):
    """Two dilated convolutions over (N, C, L) and a sum."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(channels, channels, 3, padding="same", dilation=dilation, bias=False)
        self.bn1 = nn.BatchNorm1d(channels)
        self.conv2 = nn.Conv1d(channels, channels, 3, padding="same", dilation=dilation, bias=False)
        self.bn2 = nn.BatchNorm1d(channels)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as ``x``: (N, channels, L)."""
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)) + x)


class DigitsTCN(DigitsNet):
    """Dilated 1-d convolutions along the columns, the 8 rows being the channels; also takes (N, 8, 8)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv1d(8, width, 3, padding=1), nn.BatchNorm1d(width), nn.ReLU())
        self.blocks = nn.Sequential(*(ResidualBlock1d(width, dilation) for dilation in (1, 2, 4)))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, 10) of images (N, 1, 8, 8) or (N, 8, 8)."""
        return self.head(self.blocks(self.stem(x.squeeze(1))).mean(-1))


class DigitsBatchStats(DigitsNet):
    """A convolutional net whose second BatchNorm keeps no running statistics, so it uses the batch's in eval mode.

    Its answer to one image therefore depends on the other images of the batch, and that BatchNorm cannot be folded.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(2 * width, track_running_stats=False)
        self.conv3 = nn.Conv2d(2 * width, 2 * width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(2 * width)
        self.relu = nn.ReLU()
        self.head = nn.Linear(2 * width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, 10) of images (N, 1, 8, 8)."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        x = self.relu(self.bn3(self.conv3(x)))
        return self.head(x.mean((2, 3)))


def digits_mlp(width: int = 128) -> DigitsMLP:
    """Two linear layers, BatchNorm1d between them."""
    return DigitsMLP(width)


def digits_cnn(width: int = 24) -> DigitsCNN:
    """The convolutional net with the idioms of larger ones; ``width`` is the channel count of the stem."""
    return DigitsCNN(width)


def digits_tcn(width: int = 32) -> DigitsTCN:
    """The temporal convolutional net; ``width`` is its channel count."""
    return DigitsTCN(width)


def digits_batchstats(width: int = 16) -> DigitsBatchStats:
    """The net with one BatchNorm without running statistics; ``width`` is the channel count of the first layer."""
    return DigitsBatchStats(width)
