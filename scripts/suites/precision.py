"""How far the files of each tool are from float64, in float32 and in float16."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import zoo
from one_tool import TOOLS

import bnfold
from suites.common import Outcome, Settings, Table, conditions, geometric_mean, quiet, sentence, tell

INTRO = """
Small nets of the test zoo with random weights and statistics, each with {seeds} sets of them: one set is one draw of
rounding errors, which moves a single net's figure by a third. `bnfold.check` judges every file, all of ONNX Runtime's
optimisations on, against float64; *error over noise* is the median over samples of the file's error over that of the
unfolded module in its own dtype, and a cell is the geometric mean over the sets.

In float16 peers are given the module in float16, as their users do; bnfold converts while it folds, so that a folded
constant is rounded once, and truth is the float32 model. ONNX Runtime's CPU provider computes most of float16 in
float32, so that part of the noise is in no file and ratios below 1 are the rule.

    python scripts/benchmark.py --suite precision --output docs/precision
""".strip()
NETS = ("mlp", "resnet_basic", "resnet_bottleneck", "mobilenet_v2", "shufflenet_v2", "densenet", "preact_resnet",
        "squeeze_excite", "repvgg", "levit", "convnext", "poolformer", "nextvit", "unet")  # fmt: skip
QUICK = ("mlp", "resnet_basic")
SEEDS = 2
DTYPES = {"float32": torch.float32, "float16": torch.float16}
#: "bnfold, checked" writes the file of "bnfold".
TOOL_NAMES = [name for name in TOOLS if name != "bnfold, checked"]

Ratios = dict[str, list[float]]


def run(settings: Settings) -> Outcome:
    """Every net by every tool, in both dtypes."""
    names = [name for name in (QUICK if settings.quick else NETS) if name in zoo.NETS and settings.wants(name)]
    seeds = 1 if settings.quick else SEEDS
    data: dict[str, Any] = {"conditions": conditions(settings)}
    tables = []
    with tempfile.TemporaryDirectory() as folder:
        for words in DTYPES:
            data[words] = {}
            for name in names:
                tell(f"{name} {words}")
                data[words][name] = _net(name, words, seeds, Path(folder) / "net.onnx")
            tables.append(_table(words, data[words]))
    return Outcome(
        "Precision, measured", f"{INTRO.format(seeds=seeds)}\n\n{sentence(data['conditions'])}", tables, data
    )


def _net(name: str, words: str, seeds: int, path: Path) -> dict[str, Any]:
    """By tool, the ratio of every set; ``wrong`` counts files that failed the check or that there are none of."""
    dtype = DTYPES[words]
    ratios: Ratios = {tool: [] for tool in TOOL_NAMES}
    wrong = dict.fromkeys(TOOL_NAMES, 0)
    for seed in range(seeds):
        module, args = zoo.NETS[name]()
        module = zoo.randomize(module, seed + 1)
        given = tuple(x.to(dtype) if x.is_floating_point() else x for x in args)
        for tool in TOOL_NAMES:
            try:
                with quiet():
                    if tool == "bnfold":
                        bnfold.export(deepcopy(module), path, args, dtype=dtype, device="cpu", check=False)
                    else:
                        TOOLS[tool](deepcopy(module).to(dtype).eval(), given, path)
                    report = bnfold.check(path, module, args, dtype=dtype, device="cpu")
            except Exception as error:
                tell(f"  {tool}: {type(error).__name__}: {str(error)[:100]}")
                wrong[tool] += 1
                continue
            wrong[tool] += not report.passed
            ratios[tool].append(max(o.ratio for o in report.outputs if o.candidate == "ONNX Runtime"))
    return {"ratios": ratios, "wrong": wrong}


def _table(words: str, nets: dict[str, Any]) -> Table:
    rows = [
        (name, *(_mean(found["ratios"][tool], found["wrong"][tool]) for tool in TOOL_NAMES))
        for name, found in nets.items()
    ]
    means = {tool: [(a, b) for found in nets.values() for a, b in zip(found["ratios"]["bnfold"], found["ratios"][tool])]
             for tool in TOOL_NAMES}  # fmt: skip
    rows.append(("geometric mean", *(_mean([theirs for _, theirs in pairs], 0) for pairs in means.values())))
    over = (f"{_positive(b for _, b in pairs) / _positive(a for a, _ in pairs):.2f}" for pairs in means.values())
    rows.append(("over bnfold's", *over))
    return Table(f"Error over noise in {words}", ("net", *TOOL_NAMES), rows)


def _mean(ratios: list[float], wrong: int) -> str:
    return (f"{_positive(ratios):.2f}" if ratios else "") + (f" **{wrong} wrong**" if wrong else "")


def _positive(ratios: Iterable[float]) -> float:
    return geometric_mean([max(ratio, 1e-3) for ratio in ratios])
