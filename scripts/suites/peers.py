"""bnfold against what users would take in its place: what is left in the file, how right it is, how fast."""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import benchmark_nets
import onnx
import torch
from one_tool import TOOLS

import bnfold
from bnfold.errors import BnfoldError
from bnfold.report import Latency
from suites.common import Outcome, Settings, Table, conditions, geometric_mean, plain, race, sentence, tell

INTRO = """
Published nets with random weights and settled statistics (`scripts/benchmark_nets.py`), at 224x224 with a dynamic
batch, through bnfold and through what users take in its place. Every tool writes the same module in a process of its
own, one after the other in random order: *seconds* is the whole process, Python and torch included, *peak* its largest
resident memory (medians of {repeats} runs; of the peers other than torch.onnx, of one). Then `bnfold.check` judges
every file against the unfolded model in float64: *error over noise* is of the file as deployed, all of ONNX Runtime's
optimisations on, and a file that fails is marked. Latency is of one image, in turn in random order, the median over
rounds of the ratio of two times in one round, over bnfold's: above 1 bnfold's is the faster file. *Load* is how long a
session takes to open.

    python scripts/benchmark.py --suite peers --output docs/benchmarks
""".strip()
#: Tools whose time and memory have goals of their own; the others' are measured once.
TIMED = ("bnfold", "bnfold, checked", "torch.onnx")
REPEATS = 2
QUICK = ("ResNet-50",)


@dataclass
class Cell:
    """One net by one tool; ``problem`` where there is no file, or the file is wrong."""

    seconds: list[float] = field(default_factory=list)
    peak: list[int] = field(default_factory=list)
    path: Path | None = None
    problem: str = ""
    batch_norms: int = 0
    operators: int = 0
    size: int = 0
    ratio: float = float("nan")
    latency: Latency | None = None


def run(settings: Settings) -> Outcome:
    """Every net by every tool that can be imported."""
    repeats = 1 if settings.quick else REPEATS
    nets = [name for name in benchmark_nets.NETS if settings.wants(name) and (name in QUICK or not settings.quick)]
    found: dict[str, dict[str, Cell]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in nets:
            found[name] = _cells(name, Path(folder), repeats, settings)
    state = conditions(settings)
    tables = [_summary(found), *(_table(name, cells) for name, cells in found.items())]
    intro = f"{INTRO.format(repeats=repeats)}\n\n{sentence(state)}"
    return Outcome(
        "Benchmarks", intro, tables, {"conditions": state, "nets": _data(found)}, lambda path: _draw(found, path)
    )  # fmt: skip


def _cells(name: str, folder: Path, repeats: int, settings: Settings) -> dict[str, Cell]:
    tell(name)
    module, args = benchmark_nets.build(name)
    source = folder / "module.pt"
    torch.save((module, args), source)
    cells: dict[str, Cell] = {tool: Cell() for tool in TOOLS}
    turns = [tool for tool in TOOLS for _ in range(repeats if tool in TIMED else 1)]
    random.Random(0).shuffle(turns)
    for tool in turns:
        _write(source, tool, folder / f"{tool.replace(' ', '_')}.onnx", cells[tool])
    for tool, cell in cells.items():
        if cell.path is not None:
            _judge(cell, module, args)
            tell(
                f"  {tool}: {cell.seconds[-1]:.1f} s, {cell.batch_norms} BatchNorm, ratio {cell.ratio:.2g} "
                f"{cell.problem}"
            )
    _race(cells, settings)
    return cells


def _write(source: Path, tool: str, path: Path, cell: Cell) -> None:
    script = Path(__file__).resolve().parents[1] / "one_tool.py"
    start = time.perf_counter()
    done = subprocess.run([sys.executable, script, source, tool, path], capture_output=True, text=True, check=False)
    cell.seconds.append(time.perf_counter() - start)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it crashed"])[-1]
        cell.problem = "not installed" if "No module named" in last else last[:160]
        return
    cell.path = path
    cell.peak.append(json.loads(done.stdout.strip().splitlines()[-1])["peak"])


def _judge(cell: Cell, module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
    assert cell.path is not None
    model = onnx.load(cell.path, load_external_data=False)
    cell.batch_norms = sum(node.op_type == "BatchNormalization" for node in model.graph.node)
    cell.operators = len(model.graph.node)
    cell.size = cell.path.stat().st_size
    try:
        report = bnfold.check(cell.path, module, args, device="cpu", samples=10)
    except BnfoldError as error:
        cell.problem = f"invalid: {error.what[:120]}"
        return
    cell.ratio = max(output.ratio for output in report.outputs if output.candidate == "ONNX Runtime")
    if not report.passed:
        cell.problem = f"{report.verdict}: {report.problems[0][:120]}"


def _race(cells: dict[str, Cell], settings: Settings) -> None:
    """bnfold's file runs first; both of bnfold's are the same."""
    runners = [cell for tool, cell in cells.items() if cell.path and tool != "bnfold, checked"]
    runners = [cell for cell in runners if not cell.problem.startswith("invalid")]
    paths = [cell.path for cell in runners if cell.path is not None]
    for cell, latency in zip(runners, race(paths, settings, "cpu") if paths else []):
        cell.latency = latency


# -- tables ------------------------------------------------------------------------------------------------------------


def _median(values: list[Any]) -> float:
    return float(statistics.median(values)) if values else float("nan")


def _table(name: str, cells: dict[str, Cell]) -> Table:
    rows = []
    for tool, cell in cells.items():
        if cell.path is None:
            rows.append((tool, cell.problem, *[""] * 8))
            continue
        latency = cell.latency
        rows.append(
            (tool, str(cell.batch_norms), str(cell.operators),
             f"{cell.ratio:.2f}" + (" **wrong**" if cell.problem else ""),
             f"{latency.median * 1e3:.2f} ms" if latency else "",
             f"{latency.ratio:.2f} ({latency.interval[0]:.2f} to {latency.interval[1]:.2f})" if latency else "",
             f"{latency.load * 1e3:.0f} ms" if latency and latency.load else "",
             f"{cell.size / 1e6:.1f} MB", f"{_median(cell.seconds):.1f}", f"{_median(cell.peak) / 1e6:.0f} MB")
        )  # fmt: skip
    columns = ("tool", "BatchNorms left", "operators", "error over noise", "latency", "over bnfold's", "load", "size",
               "seconds", "peak")  # fmt: skip
    wrong = [f"{tool}: {cell.problem}" for tool, cell in cells.items() if cell.path and cell.problem]
    return Table(name, columns, rows, after="\n".join(f"- {line}" for line in wrong))


def _summary(found: dict[str, dict[str, Cell]]) -> Table:
    """Geometric means over the nets that both bnfold and the tool could write."""
    rows = []
    for tool in TOOLS:
        pairs = [
            (cells["bnfold"], cells[tool]) for cells in found.values() if cells["bnfold"].path and cells[tool].path
        ]
        if not pairs:
            continue
        plain_nets, branchy = (
            [cells[tool].latency for name, cells in found.items() if name in group and cells[tool].latency]
            for group in (benchmark_nets.PLAIN, benchmark_nets.BRANCHY | benchmark_nets.OPTIONAL)
        )
        torch_onnx = [cells["torch.onnx"] for cells in found.values() if cells["torch.onnx"].path and cells[tool].path]
        mine = [cells[tool] for cells in found.values() if cells["torch.onnx"].path and cells[tool].path]
        rows.append(
            (tool, str(sum(cell.batch_norms for _, cell in pairs)),
             f"{sum(bool(cell.problem) for _, cell in pairs)} of {len(pairs)}",
             f"{geometric_mean([max(cell.ratio, 1e-3) for _, cell in pairs if cell.ratio == cell.ratio]):.2f}",
             *(f"{geometric_mean([each.ratio for each in group if each]):.3f}" if group else ""
               for group in (plain_nets, branchy)),
             f"{geometric_mean([_median(a.seconds) / _median(b.seconds) for a, b in zip(mine, torch_onnx)]):.2f}",
             f"{geometric_mean([_median(a.peak) / _median(b.peak) for a, b in zip(mine, torch_onnx)]):.2f}")
        )  # fmt: skip
    columns = ("tool", "BatchNorms left", "wrong files", "error over noise", "latency over bnfold's: plain nets",
               "branchy nets", "seconds over torch.onnx's", "peak over torch.onnx's")  # fmt: skip
    return Table("All nets", columns, rows, before="Geometric means; BatchNorms are counted over all nets.")


def _draw(found: dict[str, dict[str, Cell]], path: Path) -> None:
    """Per net and tool, latency over bnfold's with its interval."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    plt.rcParams["svg.hashsalt"] = "bnfold"
    peers = [tool for tool in TOOLS if not tool.startswith("bnfold")]
    figure, axes = plt.subplots(figsize=(8, 1 + 0.45 * len(found)), layout="constrained")
    for i, tool in enumerate(peers):
        points = [(row, cells[tool].latency) for row, cells in enumerate(found.values()) if cells[tool].latency]
        rows = [row + 0.12 * (i - (len(peers) - 1) / 2) for row, _ in points]
        ratios = [latency.ratio for _, latency in points if latency]
        spread = [[abs(latency.ratio - end) for _, latency in points if latency for end in [latency.interval[side]]]
                  for side in (0, 1)]  # fmt: skip
        axes.errorbar(ratios, rows, xerr=spread, fmt="o", markersize=4, linewidth=1, label=tool)
    axes.axvline(1, color="gray", linewidth=1)
    axes.set_xscale("log")
    ticks = [0.8, 1, 1.25, 1.5, 2, 3, 4]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
    axes.set_xticks([], minor=True)
    axes.set_yticks(range(len(found)), list(found))
    axes.invert_yaxis()
    axes.set_xlabel("latency over that of bnfold's file (right of 1: bnfold's is faster)")
    axes.legend(loc="lower right", fontsize="small")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _data(found: dict[str, dict[str, Cell]]) -> dict[str, Any]:
    def cell(one: Cell) -> dict[str, Any]:
        known = {
            name: getattr(one, name) for name in ("seconds", "peak", "problem", "batch_norms", "operators", "size")
        }
        ratio = one.ratio if one.ratio == one.ratio else None
        return known | {"ratio": ratio, "latency": plain(one.latency) if one.latency else None}

    return {name: {tool: cell(one) for tool, one in cells.items()} for name, cells in found.items()}
