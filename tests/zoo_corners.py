"""Corner cases of the zoo: sharing, parametrisations, precision, axes, padding, inputs and outputs of every shape."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from zoo_parts import Factory, Residual, conv_bn, images


def parametrised() -> nn.Module:
    return nn.Sequential(
        weight_norm(nn.Conv2d(3, 8, 3, padding=1)),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        spectral_norm(nn.Conv2d(8, 8, 3, padding=1)),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        weight_norm(nn.ConvTranspose2d(8, 6, 2, 2), dim=1),
        nn.BatchNorm2d(6),
    )


class StandardisedConv2d(nn.Conv2d):
    """Weight standardisation: zero mean and unit variance per output channel, computed at every call."""

    def forward(self, x: Tensor) -> Tensor:
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        std = self.weight.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, (self.weight - mean) / (std + 1e-5), self.bias, self.stride, self.padding)


class SharedConv(nn.Module):
    """One convolution called twice, a BatchNorm of its own after each call; and one BatchNorm called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.bn1, self.bn2 = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.left, self.right, self.both = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv(x)))
        x = F.relu(self.bn2(self.conv(x)))
        return self.both(self.left(x)) * self.both(self.right(x)).sigmoid()


class ConvBeforeTwoNorms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn1, self.bn2 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return F.relu(self.bn1(y)) + self.bn2(y)


class ResidualTap(nn.Module):
    """The convolution's output is read by the BatchNorm and by the residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), conv_bn(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.last(y + F.relu(self.bn(y)))


class SharedBias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.bn2.bias = self.bn1.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))


class TiedWeights(nn.Module):
    """Two convolutions over one weight tensor, with biases and BatchNorms of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2.weight = self.conv1.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(F.silu(self.bn1(self.conv1(x)))))


class MixedPrecision(nn.Module):
    """Convolutions in float16, BatchNorm in float32, as half-precision checkpoints keep it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1).half(), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 4, 1, bias=False).half(), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x.half()).float()))
        return self.bn2(self.conv2(y.half()).float())


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = conv_bn(3, 8), conv_bn(1, 8, 1)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        x, m = self.left(image), self.right(mask)
        return self.norm(x + m), m.sigmoid()


class KeywordInputs(nn.Module):
    """Keyword-only tensors, one of them optional and left out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.shift = conv_bn(3, 8), nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))

    def forward(self, x: Tensor, *, style: Tensor, gain: Tensor | None = None) -> Tensor:
        y = self.conv(x) + self.shift(style)[:, :, None, None]
        return y if gain is None else y * gain


class DictOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.last = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), conv_bn(8, 4, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor | list[Tensor]]:
        y = self.bn(self.conv(x))
        return {"features": y, "levels": [F.relu(y), self.last(F.relu(y))]}


class TiedEmbedding(nn.Module):
    """Token ids in; BatchNorm over the embedding's channels; the embedding's weight is the output layer's too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(20, 8), nn.BatchNorm1d(8)
        self.conv, self.conv_norm = nn.Conv1d(8, 8, 3, padding=1), nn.BatchNorm1d(8)
        self.last = nn.Linear(8, 20, bias=False)
        self.last.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.embed(ids).transpose(1, 2))
        x = F.relu(self.conv_norm(self.conv(x)))
        return self.last(x.transpose(1, 2))


class SquareNorm(nn.Module):
    """Linear, then BatchNorm1d on (N, C, L) with C = L = out_features: the norm's axis is not the linear's."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.last = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.linear(x)))


class TinyVariance(nn.Module):
    """Channels that hardly vary, as dead filters leave them: running_var 1e-12, so that eps is the whole scale."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), conv_bn(8, 4, 1)

    @torch.no_grad()
    def settle(self) -> None:
        self.conv.weight[:3] *= 1e-6
        self.bn.running_mean[:3] = self.conv.bias[:3]
        self.bn.running_var[:3] = 1e-12

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.bn(self.conv(x))))


def padding_modes() -> nn.Module:
    """Every padding: a norm before the padded convolution may pass reflect, circular and replicate, never zeros."""
    layers: list[nn.Module] = []
    for mode in ("zeros", "reflect", "circular", "replicate"):
        conv = nn.Conv2d(4, 4, 3, padding=1, padding_mode=mode)
        layers += [nn.BatchNorm2d(4), conv, nn.BatchNorm2d(4), nn.Tanh()]
    return nn.Sequential(nn.Conv2d(3, 4, 5, padding="same"), *layers, nn.Conv2d(4, 4, 3, padding="same", dilation=2))


class Interpolate(nn.Module):
    """A norm behind nearest and bilinear resizing, and a pixel shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.near, self.line = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.point, self.shuffle, self.norm = nn.Conv2d(8, 16, 1), nn.PixelShuffle(2), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        near = self.near(F.interpolate(y, scale_factor=2, mode="nearest"))
        y = self.line(F.interpolate(self.point(F.relu(near))[:, :8], scale_factor=0.5, mode="bilinear"))
        return self.norm(self.shuffle(self.point(F.relu(y))))


class InputNormalisation(nn.Module):
    """(x - mean) / std per colour, then an unpadded convolution that can take it and a padded one that cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))
        self.patches, self.bn = nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8)
        self.padded, self.padded_bn = nn.Conv2d(3, 8, 5, 4, 1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.bn(self.patches((x - self.mean) / self.std)), self.padded_bn(
            self.padded((x - self.mean) / self.std)
        )


class OtherAxes(nn.Module):
    """Constants along height, width and batch-free positions beside square shapes: none of them is a channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 8, 3, padding=1), conv_bn(8, 8)
        self.gamma_width, self.gamma_height = nn.Parameter(torch.ones(8)), nn.Parameter(torch.ones(8, 1))
        self.channel = nn.Parameter(torch.randn(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.last(self.conv(x) * self.gamma_width)
        return y * self.gamma_height + self.channel


class InplaceAliases(nn.Module):
    """In-place operators on what someone else still reads, and an eval-mode dropout that is its own input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.dropout = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5)
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        z = self.dropout(y)
        z += 1
        view = y[:, :4]
        view.mul_(2)
        return self.last(y) + F.relu_(z).mean()


class BatchStatistics(nn.Module):
    """Three that use the batch's own statistics in eval mode, beside one that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.ModuleList(nn.Conv2d(c, 8, 1) for c in (3, 8, 8, 8))
        self.own, self.running = nn.BatchNorm2d(8, track_running_stats=False), nn.BatchNorm2d(8)
        self.instance = nn.InstanceNorm2d(8, affine=True)
        self.gamma = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.running(self.conv[0](x)))
        x = F.relu(self.own(self.conv[1](x)))
        x = F.relu(self.instance(self.conv[2](x)))
        return F.batch_norm(self.conv[3](x), None, None, self.gamma, training=True)


class MatrixProducts(nn.Module):
    """Contractions that are no layer: matmul with a parameter, addmm with alpha and beta, einsum; and InstanceNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(8, 8)), nn.Linear(8, 8)
        self.offset = nn.Parameter(torch.randn(8))
        self.bn1, self.bn2, self.bn3 = (nn.BatchNorm1d(8) for _ in range(3))
        self.instance = nn.InstanceNorm1d(8, affine=True, track_running_stats=True)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(x @ self.a))
        x = F.relu(self.bn2(torch.addmm(self.offset, x, self.b, beta=0.5, alpha=2.0)))
        x = F.relu(self.bn3(torch.einsum("ni,oi->no", x, self.c.weight)))
        return self.instance(self.c(x)[:, :, None].expand(-1, -1, 3))


def standardised() -> nn.Module:
    first = StandardisedConv2d(3, 8, 3, padding=1)
    return nn.Sequential(first, nn.BatchNorm2d(8), nn.ReLU(), Residual(StandardisedConv2d(8, 8, 1), nn.BatchNorm2d(8)))


NETS: dict[str, Factory] = {
    "parametrised": lambda: (parametrised(), images(size=8)),
    "standardised": lambda: (standardised(), images(size=8)),
    "shared_conv": lambda: (SharedConv(), images(size=8)),
    "conv_before_two_norms": lambda: (ConvBeforeTwoNorms(), images(size=8)),
    "residual_tap": lambda: (ResidualTap(), images(size=8)),
    "shared_bias": lambda: (SharedBias(), images(size=8)),
    "tied_weights": lambda: (TiedWeights(), images(channels=6, size=8)),
    "mixed_precision": lambda: (MixedPrecision(), images(size=8)),
    "two_inputs": lambda: (TwoInputs(), (torch.randn(2, 3, 8, 8), torch.rand(2, 1, 8, 8))),
    "dict_outputs": lambda: (DictOutputs(), images(size=8)),
    "tied_embedding": lambda: (TiedEmbedding(), (torch.randint(0, 20, (2, 7)),)),
    "square_norm": lambda: (SquareNorm(), (torch.randn(2, 6, 6),)),
    "tiny_variance": lambda: (TinyVariance(), images(size=8)),
    "padding_modes": lambda: (padding_modes(), images(size=8)),
    "interpolate": lambda: (Interpolate(), images(size=8)),
    "input_normalisation": lambda: (InputNormalisation(), images()),
    "other_axes": lambda: (OtherAxes(), images(size=8)),
    "inplace_aliases": lambda: (InplaceAliases(), images(size=8)),
    "batch_statistics": lambda: (BatchStatistics(), images(size=8)),
    "matrix_products": lambda: (MatrixProducts(), (torch.randn(2, 6),)),
}
