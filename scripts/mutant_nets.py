"""Right files for mutants and for false alarms: twenty small nets in the shapes of published ones, and their inputs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import numpy as np
import torch
import zoo
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn import functional as F

import bnfold
from bnfold.evaluate.evaluator import File64
from bnfold.evaluate.subject import ValueInfo
from bnfold.graph.capture import Captured, capture
from bnfold.stages import fold_captured

Array = np.ndarray[Any, Any]


class Detector(nn.Module):
    """Boxes in pixels beside class scores, sizes free, feature maps resized and joined."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.SiLU())
        self.down = nn.Sequential(nn.Conv2d(8, 12, 3, 2, 1, bias=False), nn.BatchNorm2d(12), nn.SiLU())
        self.pool, self.neck = nn.MaxPool2d(5, 1, 2), nn.Conv2d(32, 8, 1)
        self.norm, self.box, self.score = nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.stem(x)
        deep = self.down(fine)
        deep = torch.cat([deep, self.pool(deep)], 1)
        deep = F.interpolate(deep, size=fine.shape[2:], mode="nearest")
        y = F.silu(self.norm(self.neck(torch.cat([fine, deep], 1))))
        return torch.cat([self.box(y) * 32 + 320, torch.sigmoid(self.score(y) - 5)], 1).flatten(2)


class Masked(nn.Module):
    """A classifier, one of whose classes is switched off, with probabilities as a second output."""

    def __init__(self, away: float = -1e9) -> None:
        super().__init__()
        self.away = away
        self.body = nn.Sequential(nn.Conv2d(3, 12, 3, bias=False), nn.BatchNorm2d(12), nn.ReLU6())
        self.head = nn.Linear(12, 10)
        self.register_buffer("off", torch.arange(10) == 7)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.head(self.body(x).mean((2, 3)))
        return y.masked_fill(self.off, self.away), y.log_softmax(-1)


class Tokens(nn.Module):
    """A text classifier: embedding, positions, attention with a mask of the padding, length free."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(50, 16), nn.Embedding(64, 16)
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))
        self.norm, self.mlp = nn.LayerNorm(16), nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.last, self.head = nn.BatchNorm1d(16), nn.Linear(16, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.place(torch.arange(ids.shape[1]))
        mask = torch.where(ids[:, None] == 0, -1e4, 0.0)
        weights = (self.q(x) @ self.k(x).transpose(1, 2) / 4 + mask).softmax(-1)
        x = self.norm(x + self.out(weights @ self.v(x)))
        return self.head(self.last((x + self.mlp(x)).mean(1)))


class Recurrent(nn.Module):
    """Convolution, BatchNorm, a recurrent layer, a head for every step."""

    def __init__(self, layer: type[nn.Module]) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(4, 8, 3, padding=1, bias=False), nn.BatchNorm1d(8)
        self.layer, self.head = layer(8, 6, batch_first=True, bidirectional=True), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.layer(torch.relu(self.norm(self.conv(x))).transpose(1, 2))
        return self.head(y)


class Padded(nn.Module):
    """Padding to a multiple of the window, by sizes that are free; reflected borders; saturating activations."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.ReflectionPad2d(1), nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Hardswish()
        )
        self.patch, self.norm, self.up = nn.Conv2d(8, 12, 4, 4), nn.BatchNorm2d(12), nn.ConvTranspose2d(12, 4, 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y = F.pad(y, (0, -x.shape[3] % 4, 0, -x.shape[2] % 4))
        y = self.up(F.hardtanh(self.norm(self.patch(y)), -2.0, 3.0))
        return torch.tanh(y)[:, :, : x.shape[2], : x.shape[3]]


class Normalised(nn.Module):
    """The other normalisations, gates and reductions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.group, self.instance, self.batch = nn.GroupNorm(2, 8), nn.InstanceNorm2d(8, affine=True), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = F.elu(self.group(self.a(x)))
        z = F.softplus(self.batch(self.b(y))) * torch.sigmoid(self.instance(y))
        return F.adaptive_avg_pool2d(z, 2).flatten(1), z.amax((2, 3)) - z.norm(dim=(2, 3))


H, W, T = ({2: "height"}, {3: "width"}, {1: "length"})


@dataclass(frozen=True)
class Net:
    """A factory of (module, example), which axes are free beside the batch, and the dtype of the file."""

    make: Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]
    free: Mapping[int, str] | None = None
    dtype: torch.dtype | None = None


def own(
    make: Callable[[], nn.Module], *shape: int, ids: bool = False
) -> Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]:
    def build() -> tuple[nn.Module, tuple[Tensor, ...]]:
        example = torch.randint(0, 50, shape) if ids else torch.randn(shape)
        return make(), (example,)

    return zoo.prepared(make.__name__ + str(shape), build)


def lstm() -> nn.Module:
    return Recurrent(nn.LSTM)


def half_masked() -> nn.Module:
    return Masked(-6e4)


def gru() -> nn.Module:
    return Recurrent(nn.GRU)


NETS: dict[str, Net] = {
    **{
        name: Net(zoo.NETS[name])
        for name in (
            "resnet_basic", "mobilenet_v2", "densenet", "shufflenet_v2", "squeeze_excite", "unet", "levit", "convnext",
            "repvgg", "conv1d", "mlp",
        )
    },
    "detector": Net(own(Detector, 2, 3, 32, 32), H | W),
    "masked": Net(own(Masked, 2, 3, 16, 16)),
    "tokens": Net(own(Tokens, 2, 9, ids=True), T),
    "lstm": Net(own(lstm, 2, 4, 11)),
    "gru": Net(own(gru, 2, 4, 11), {2: "length"}),
    "padded": Net(own(Padded, 2, 3, 16, 16), H | W),
    "normalised": Net(own(Normalised, 2, 3, 12, 12)),
    "half": Net(zoo.NETS["resnet_basic"], None, torch.float16),
    "half_masked": Net(own(half_masked, 2, 3, 16, 16), None, torch.float16),
}  # fmt: skip


@dataclass
class Right:
    """A right file with what it was made from."""

    captured: Captured
    path: Path
    inputs: tuple[ValueInfo, ...]
    #: An example, and one more than the largest id, of every input.
    example: Mapping[str, Array]
    highs: Mapping[str, int]
    #: What the file was written from.
    written: ExportedProgram


def right(name: str, folder: Path) -> Right:
    """Exports a net of the table, unchecked.

    Raises:
        BnfoldError: it cannot be exported.
    """
    net = NETS[name]
    module, args = net.make()
    shapes = None if net.free is None else ({0: "batch", **net.free},)
    path = folder / f"{name}.onnx"
    bnfold.export(module, path, args, dynamic_shapes=shapes, dtype=net.dtype, check=False)
    captured = capture(module, args, dynamic_shapes=shapes, dtype=net.dtype)
    inputs = File64(path).inputs
    example = {v.name: a.numpy() for v, a in zip(inputs, args)}
    highs = {n: int(a.max()) + 1 for n, a in example.items() if a.dtype.kind == "i"}
    return Right(captured, path, inputs, example, highs, fold_captured(captured, merge=True).program)


Family = Callable[[np.random.Generator, tuple[int, ...]], Array]


def per_channel(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    sizes = [n if axis < 2 else 1 for axis, n in enumerate(shape)]
    return np.broadcast_to(rng.standard_normal(sizes), shape)


def outlier(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    value = rng.standard_normal(shape)
    value.flat[rng.integers(value.size)] *= 30.0
    return value


#: The families that the gate's design names.
FAMILIES: dict[str, Family] = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "normal times 4": lambda rng, shape: 4 * rng.standard_normal(shape),
    "normal over 10": lambda rng, shape: 0.1 * rng.standard_normal(shape),
    "zero to one": lambda rng, shape: rng.random(shape),
    "half zeros": lambda rng, shape: np.maximum(rng.standard_normal(shape), 0),
    "constant per channel": per_channel,
    "one far out": outlier,
    "zeros": lambda rng, shape: np.zeros(shape),
    "ones": lambda rng, shape: np.ones(shape),
    "pixels": lambda rng, shape: rng.integers(0, 256, shape).astype(np.float64),
}
BATCHES = (2, 1, 3, 5, 7, 8, 16, 33)


def feeds(found: Right, rounds: int, seed: int = 7) -> Iterator[tuple[str, dict[str, Array]]]:
    """Inputs of every family, at changing batches and sizes; the first round is at small ones."""
    rng = np.random.default_rng(seed)
    turn = 0
    for round_ in range(rounds):
        for name, family in FAMILIES.items():
            sizes: dict[Any, int] = {}
            batch = BATCHES[turn % len(BATCHES)]
            turn += 1
            fed: dict[str, Array] = {}
            for value in found.inputs:
                example = found.example[value.name]
                shape = []
                for axis, size in enumerate(value.shape):
                    if not isinstance(size, int):
                        known = example.shape[axis]
                        others = (known, known + 1, known - 1, 17 if known > 8 else 5, known + 7, known * 2)
                        made = batch if axis == 0 else others[(round_ + turn + axis) % len(others)]
                        size = sizes.setdefault(size or (value.name, axis), made)
                    shape.append(size)
                if value.name in found.highs:
                    high = found.highs[value.name]
                    ids = rng.integers(0, high, shape)
                    fed[value.name] = np.where(rng.random(shape) < 0.3, 0, ids) if "zero" in name else ids
                elif name == "pixels" and not (len(shape) == 4 and shape[1] in (1, 3)):
                    fed[value.name] = rng.standard_normal(shape).astype(value.dtype)
                else:
                    fed[value.name] = family(rng, tuple(shape)).astype(value.dtype)
            yield f"{name}, {tuple(next(iter(fed.values())).shape)}", fed
