"""float16: how far the files of each tool are from the float32 model's float64 truth."""

from __future__ import annotations

import tempfile
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import zoo
from one_tool import TOOLS

import bnfold
from bnfold.errors import BnfoldError
from suites.common import Outcome, Settings, Table, conditions, geometric_mean, quiet, sentence, tell

INTRO = """
Small nets of the test zoo in float16, with random weights and statistics. Peers are given the module in float16, as
their users do; bnfold converts while it folds, so that a folded constant is rounded once. `bnfold.check` judges
every file, all of ONNX Runtime's optimisations on, against the float32 model in float64; *error over noise* is the
median over samples of the file's error over that of the unfolded module in float16. ONNX Runtime's CPU provider
computes most of float16 in float32, so that part of the noise is in no file and ratios below 1 are the rule.

    python scripts/benchmark.py --suite half --output docs/half
""".strip()
NETS = ("mlp", "resnet_basic", "resnet_bottleneck", "mobilenet_v2", "shufflenet_v2", "densenet", "preact_resnet",
        "squeeze_excite", "repvgg", "levit", "convnext", "poolformer", "nextvit", "unet")  # fmt: skip
QUICK = ("mlp", "resnet_basic")
#: "bnfold, checked" writes the file of "bnfold".
PEERS = {name: tool for name, tool in TOOLS.items() if not name.startswith("bnfold")}


def run(settings: Settings) -> Outcome:
    """Every net by every tool."""
    names = [name for name in (QUICK if settings.quick else NETS) if name in zoo.NETS and settings.wants(name)]
    data: dict[str, Any] = {"conditions": conditions(settings), "nets": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            tell(name)
            data["nets"][name] = _net(name, Path(folder))
    rows = [(name, *(_words(found.get(tool)) for tool in ("bnfold", *PEERS))) for name, found in data["nets"].items()]
    rows.append(("geometric mean, all that are right", *(_mean(data["nets"], tool) for tool in ("bnfold", *PEERS))))
    table = Table("Error over noise in float16", ("net", "bnfold", *PEERS), rows)
    return Outcome("float16, measured", f"{INTRO}\n\n{sentence(data['conditions'])}", [table], data)


def _net(name: str, folder: Path) -> dict[str, float | str]:
    module, args = zoo.NETS[name]()
    found: dict[str, float | str] = {}
    for tool in ("bnfold", *PEERS):
        path = folder / "net.onnx"
        try:
            with quiet():
                if tool == "bnfold":
                    bnfold.export(deepcopy(module), path, args, dtype=torch.float16, device="cpu", check=False)
                else:
                    half = tuple(x.half() if x.is_floating_point() else x for x in args)
                    PEERS[tool](deepcopy(module).half().eval(), half, path)
                report = bnfold.check(path, module, args, dtype=torch.float16, device="cpu")
        except (BnfoldError, Exception) as error:
            found[tool] = f"{type(error).__name__}"
            continue
        ratio = max(output.ratio for output in report.outputs if output.candidate == "ONNX Runtime")
        found[tool] = ratio if report.passed else f"{ratio:.2f} ({report.verdict})"
    return found


def _words(found: float | str | None) -> str:
    return f"{found:.2f}" if isinstance(found, float) else f"**{found}**"


def _mean(nets: dict[str, dict[str, float | str]], tool: str) -> str:
    """Over the nets that this tool and bnfold both get right, with bnfold's over the same."""
    both = [
        (mine, theirs) for found in nets.values()
        if isinstance(mine := found["bnfold"], float) and isinstance(theirs := found[tool], float)
    ]  # fmt: skip
    if not both:
        return ""
    mine, theirs = (geometric_mean([max(pair[i], 1e-3) for pair in both]) for i in (0, 1))
    return f"{theirs:.2f}" if tool == "bnfold" else f"{theirs:.2f} ({theirs / mine:.2f} times bnfold's)"
