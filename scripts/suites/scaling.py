"""How folding and a whole export take longer as a model grows, in depth and in width."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import scaling
import torch
import zoo
from long_programs import PROGRAMS
from torch import nn

import bnfold
from suites.common import Outcome, Settings, Table, conditions, sentence, tell

INTRO = """
Seconds by number of layers or channels, and the exponent of the power law fitted to them: 1 is linear. The pass is
folding and merging alone, on programs written by hand (`tests/long_programs.py`); the whole is `bnfold.export` without
and with its check, of convolutions with BatchNorm and ReLU in a row.

    python scripts/benchmark.py --suite scaling --output docs/scaling
""".strip()


def run(settings: Settings) -> Outcome:
    """The pass by program, then the whole by depth and by width."""
    torch.set_num_threads(settings.threads)
    data: dict[str, Any] = {"conditions": conditions(settings)}
    sizes = [30, 100, 300] if settings.quick else [100, 1000, 3000, 10000]
    depths = [10, 30] if settings.quick else [10, 30, 100, 300, 1000]
    widths = [16, 32] if settings.quick else [32, 128, 512]
    tables = []
    if settings.wants("pass"):
        tables.append(_passes(sizes, data))
    if settings.wants("depth"):
        tables.append(_whole("depth", depths, lambda n: (n, 16), data))
    if settings.wants("width"):
        tables.append(_whole("width", widths, lambda n: (10, n), data))
    return Outcome("Scaling, measured", f"{INTRO}\n\n{sentence(data['conditions'])}", tables, data)


def _passes(sizes: list[int], data: dict[str, Any]) -> Table:
    scaling.seconds("conv_norm_relu", 10)  # loads what torch loads at first use
    rows = []
    for name in PROGRAMS:
        tell(name)
        times = [sum(scaling.seconds(name, n)) for n in sizes]
        data.setdefault("pass", {})[name] = dict(zip(map(str, sizes), times))
        per_layer = f"{times[-1] / sizes[-1] * 1e3:.2f} ms"
        rows.append((name, *(f"{t:.2f}" for t in times), per_layer, f"{scaling.exponent(sizes, times):.2f}"))
    columns = ("program", *(f"{n} layers" for n in sizes), f"a layer at {sizes[-1]}", "exponent")
    return Table("The pass", columns, rows)


def _whole(what: str, sizes: list[int], shape: Any, data: dict[str, Any]) -> Table:
    rows = []
    for check in (False, True):
        times = []
        for size in sizes:
            tell(f"{what} {size}")
            times.append(_export(*shape(size), check=check))
        words = "with the check" if check else "without the check"
        data.setdefault(what, {})[words] = dict(zip(map(str, sizes), times))
        rows.append((words, *(f"{t:.2f}" for t in times), f"{scaling.exponent(sizes, times):.2f}"))
    return Table(f"A whole export by {what}", ("bnfold.export", *map(str, sizes), "exponent"), rows)


def _export(depth: int, width: int, *, check: bool) -> float:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, width, 1)]
    for _ in range(depth):
        layers += [nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    module = zoo.randomize(zoo.he_init(nn.Sequential(*layers)))
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        bnfold.export(module, Path(folder) / "net.onnx", (torch.randn(2, 3, 16, 16),), device="cpu", check=check)
        return time.perf_counter() - start
