"""Folded against unfolded in torch itself: eager, and compiled."""

from __future__ import annotations

from typing import Any

import benchmark_nets
import torch

import bnfold
from bnfold.timing.bench import measure
from bnfold.timing.contestants import Contestant, torch_contestant
from suites.common import Outcome, Settings, Table, conditions, geometric_mean, plain, sentence, spread, tell

INTRO = """
The nets of `scripts/benchmark_nets.py` in torch, one image: the module as it is, and what `bnfold.fold` makes of it,
each as it runs by itself and under `torch.compile`. Both of a pair run in turn in random order; a speed is the median
over rounds of the ratio of two times in one round, with its 95 % interval. Above 1 the folded one is the faster.

    python scripts/benchmark.py --suite eager --output docs/eager
""".strip()
QUICK = ("MobileNetV2",)


def run(settings: Settings) -> Outcome:
    """Every net, on the CPU and on CUDA where there is one."""
    torch.set_num_threads(settings.threads)
    names = [name for name in benchmark_nets.NETS if settings.wants(name) and (name in QUICK or not settings.quick)]
    data: dict[str, Any] = {"conditions": conditions(settings), "nets": {}}
    rows, gains = [], ([], [])
    for name in names:
        tell(name)
        module, args = benchmark_nets.build(name)
        folded = bnfold.fold(module, args).module
        for part in folded.modules():
            part.training = False  # it is in eval mode, whatever torch.export has its flags say
        image = tuple(value[:1] for value in args)
        eager = [torch_contestant(words, net, image) for words, net in (("folded", folded), ("module", module))]
        compiled = [_compiled(words, net, image) for words, net in (("folded", folded), ("module", module))]
        pairs = [measure(pair, rounds=settings.rounds) for pair in (eager, compiled)]
        data["nets"][name] = [[plain(latency) for latency in pair] for pair in pairs]
        for gain, (_, unfolded) in zip(gains, pairs):
            gain.append(unfolded.ratio)
        (mine, own), (quick, fast) = pairs
        rows.append(
            (name, f"{own.median * 1e3:.2f} ms", f"{mine.median * 1e3:.2f} ms", spread(own),
             f"{fast.median * 1e3:.2f} ms", f"{quick.median * 1e3:.2f} ms", spread(fast))
        )  # fmt: skip
    rows.append(
        ("geometric mean", "", "", f"{geometric_mean(gains[0]):.3f}x", "", "", f"{geometric_mean(gains[1]):.3f}x")
    )
    columns = ("net", "eager", "eager, folded", "faster", "compiled", "compiled, folded", "faster")
    intro = f"{INTRO}\n\n{sentence(data['conditions'])}"
    return Outcome("Folding in torch, measured", intro, [Table("Nets, on cpu", columns, rows)], data)


def _compiled(name: str, module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> Contestant:
    return torch_contestant(f"{name}, compiled", torch.compile(module), args)  # type: ignore[arg-type]
