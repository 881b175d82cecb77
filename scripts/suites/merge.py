"""Merging: latency of nets with parallel branches, as trained, reparametrised by hand, and merged by bnfold."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import zoo
from reparametrise import by_hand
from torch import Tensor, nn
from zoo_branchy import FULL, SMALL

import bnfold
from suites.common import (
    Outcome,
    Settings,
    Table,
    conditions,
    geometric_mean,
    operators,
    plain,
    race,
    sentence,
    spread,
    tell,
    torch_onnx,
)

INTRO = """
Nets whose blocks are trained as parallel linear branches, with the layouts of the published ones and random weights
(`tests/zoo_branchy.py`), on one image of 224x224. *Trained* and *by hand* are what `torch.onnx.export` writes by
default (it folds a BatchNorm behind a convolution itself) of the training form and of its authors' own
reparametrisation, written down independently in `tests/reparametrise.py`. bnfold gets the training form and knows none
of the classes. All three run in turn in ONNX Runtime with all of its optimisations on; a figure is the median over
rounds of the ratio of two times in one round, with its 95 % interval. Above 1 bnfold's file is the faster one.

    python scripts/benchmark.py --suite merge --output docs/merge
""".strip()
PAIRS_INTRO = """
Whether to join is not clear from counting: multiply-adds and weights stay the same. Convolutions of one input that are
concatenated lose the copy; siblings that go different ways, such as q, k and v, need a split, which is one. bnfold
joins the first kind, and leaves the others apart, whose gain is of either sign and mostly within the intervals.
""".strip()


def run(settings: Settings) -> Outcome:
    """Every net, then the pairs that the cost model cannot decide."""
    found = conditions(settings)
    data: dict[str, Any] = {"conditions": found, "nets": {}, "pairs": {}}
    tables: list[Table] = []
    with tempfile.TemporaryDirectory() as folder:
        nets = {name: make for name, make in (SMALL if settings.quick else FULL).items() if settings.wants(name)}
        pairs = {} if settings.only and "pairs" not in settings.only else PAIRS
        written = {name: write_net(name, make, Path(folder), settings) for name, make in nets.items()}
        for device in settings.devices():
            if written:
                tables.append(net_table(written, data["nets"], settings, device))
            if pairs:
                tables.append(pair_table(pairs, data["pairs"], Path(folder), settings, device))
    return Outcome("Merging, measured", f"{INTRO}\n\n{sentence(found)}", tables, data)


# -- nets --------------------------------------------------------------------------------------------------------------


def trained(make: Callable[[], nn.Module]) -> nn.Module:
    """A net in eval mode with statistics that a batch of noise has, so that no value overflows or vanishes."""
    torch.manual_seed(0)
    net = zoo.randomize(zoo.he_init(make()))
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
    with torch.no_grad():
        net.train()(torch.randn(8, 3, 64, 64))
    return net.eval()


def write_net(name: str, make: Callable[[], nn.Module], folder: Path, settings: Settings) -> tuple[list[Path], float]:
    """bnfold's file, the trained form and that by hand, and the ratio of bnfold's error to the noise."""
    tell(f"{name}: export")
    net, size = trained(make), 32 if settings.quick else 224
    args = (torch.randn(1, 3, size, size),)
    ours = folder / f"{name}.bnfold.onnx"
    report = bnfold.export(net, ours, args, device="cpu", static=True, samples=10)
    assert report.passed and report.check is not None, report.check
    return [
        ours, torch_onnx(net, args, folder / f"{name}.trained.onnx"),
        torch_onnx(by_hand(net), args, folder / f"{name}.hand.onnx"),
    ], report.check.ratio  # fmt: skip


def net_table(
    written: dict[str, tuple[list[Path], float]], data: dict[str, Any], settings: Settings, device: Any
) -> Table:
    """A row per net."""
    rows, trained_ratios, hand_ratios = [], [], []
    for name, (paths, error) in written.items():
        tell(f"{name}: measure on {device}")
        ours, before, hand = race(paths, settings, device)
        counts = [operators(path) for path in paths]
        data.setdefault(name, {"operators": counts, "error over noise": error})[device] = [
            plain(each) for each in (ours, before, hand)
        ]
        trained_ratios.append(before.ratio)
        hand_ratios.append(hand.ratio)
        rows.append(
            (name, " / ".join(map(str, (counts[1], counts[2], counts[0]))), f"{before.median * 1e3:.2f} ms",
             f"{ours.median * 1e3:.2f} ms", spread(before), spread(hand), f"{error:.2g}")
        )  # fmt: skip
    means = [f"{geometric_mean(ratios):.3f}x" for ratios in (trained_ratios, hand_ratios)]
    rows.append(("geometric mean", "", "", "", *means, ""))
    columns = ("net", "operators: trained / by hand / bnfold", "trained", "bnfold", "faster than trained",
               "faster than by hand", "error over noise")  # fmt: skip
    return Table(f"Nets, on {device}", columns, rows)


# -- pairs -------------------------------------------------------------------------------------------------------------


class Concatenated(nn.Module):
    """Convolutions of one input, concatenated, then ReLU."""

    def __init__(self, ins: int, outs: tuple[int, ...], kernel: int, *, joined: bool) -> None:
        super().__init__()
        outs = (sum(outs),) if joined else outs
        self.convs = nn.ModuleList(nn.Conv2d(ins, out, kernel, padding=kernel // 2) for out in outs)

    def forward(self, x: Tensor) -> Tensor:
        parts = [conv(x) for conv in self.convs]
        return torch.relu(torch.cat(parts, 1) if len(parts) > 1 else parts[0])


class Attention(nn.Module):
    """Self-attention with q, k and v of one linear layer or of three."""

    def __init__(self, width: int, *, joined: bool) -> None:
        super().__init__()
        self.width, self.heads = width, max(1, width // 64)
        self.linears = nn.ModuleList(nn.Linear(width, n) for n in ((3 * width,) if joined else (width,) * 3))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        parts = [linear(x) for linear in self.linears]
        parts = list(parts[0].split(self.width, -1)) if len(parts) == 1 else parts
        batch, tokens, width = x.shape
        q, k, v = (part.reshape(batch, tokens, self.heads, -1).transpose(1, 2) for part in parts)
        weights = (q @ k.transpose(-1, -2) * (width // self.heads) ** -0.5).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(batch, tokens, width))


class Siblings(nn.Module):
    """1x1 convolutions of one input that go different ways, as in an inception block."""

    def __init__(self, ins: int, outs: tuple[int, ...], *, joined: bool) -> None:
        super().__init__()
        self.outs = list(outs)
        self.first = nn.ModuleList(nn.Conv2d(ins, n, 1) for n in ((sum(outs),) if joined else outs))
        self.second = nn.ModuleList(nn.Conv2d(n, n, 3, padding=1) for n in outs)

    def forward(self, x: Tensor) -> Tensor:
        parts = [conv(x) for conv in self.first]
        parts = list(parts[0].split(self.outs, 1)) if len(parts) == 1 else parts
        return torch.cat([conv(torch.relu(part)) for conv, part in zip(self.second, parts)], 1)


Pair = tuple[Callable[[bool], nn.Module], tuple[int, ...]]


def _pairs() -> dict[str, dict[str, Pair]]:
    concatenated = {
        f"{ins} to {outs}, {k}x{k}, {hw}x{hw}": (
            lambda joined, ins=ins, outs=outs, k=k: Concatenated(ins, outs, k, joined=joined), (1, ins, hw, hw),
        )
        for ins, outs, k, hw in [
            (16, (8, 8), 3, 112), (32, (16,) * 4, 3, 56), (64, (32, 32), 1, 28), (64, (32, 32), 3, 28),
            (192, (64, 96, 16, 32), 1, 14), (256, (128, 128), 1, 7),
        ]
    }  # fmt: skip
    attention = {
        f"width {width}, {tokens} tokens": (
            lambda joined, width=width: Attention(width, joined=joined),
            (1, tokens, width),
        )
        for width, tokens in [(128, 8), (192, 197), (384, 197), (768, 16), (768, 197), (256, 1024)]
    }
    siblings = {
        f"{ins} to {outs}, {hw}x{hw}": (
            lambda joined, ins=ins, outs=outs: Siblings(ins, outs, joined=joined), (1, ins, hw, hw),
        )
        for ins, outs, hw in [(64, (32, 32), 28), (192, (64, 96, 16, 32), 28), (256, (128, 128), 14)]
    }  # fmt: skip
    return {
        "convolutions, concatenated": concatenated, "q, k, v and a split": attention,
        "1x1 convolutions and a split": siblings,
    }  # fmt: skip


#: By kind and name, what builds it joined or separate, and the shape of its input.
PAIRS = _pairs()


def pair_table(
    pairs: dict[str, dict[str, Pair]], data: dict[str, Any], folder: Path, settings: Settings, device: Any
) -> Table:
    """A row per case, and the mean of each kind."""
    rows = []
    for kind, cases in pairs.items():
        ratios = []
        for name, (make, shape) in itertools.islice(cases.items(), 1 if settings.quick else None):
            tell(f"{kind}, {name}: measure on {device}")
            torch.manual_seed(0)
            args = (torch.randn(shape),)
            paths = [torch_onnx(make(joined).eval(), args, folder / f"{joined}.onnx") for joined in (True, False)]
            joined, separate = race(paths, settings, device)
            data.setdefault(f"{kind}: {name}", {})[device] = [plain(joined), plain(separate)]
            ratios.append(separate.ratio)
            rows.append((f"{kind}: {name}", f"{separate.median * 1e6:.0f} µs", spread(separate)))
        rows.append((f"{kind}: geometric mean", "", f"{geometric_mean(ratios):.3f}x"))
    return Table(f"Joined or separate, on {device}", ("case", "separate", "joined is faster"), rows, PAIRS_INTRO)
