"""Folds, exports and judges nets of timm and torchvision: of each family the smallest, and those with other modules.

    python scripts/sweep_timm.py --write docs/timm.md
    python scripts/sweep_timm.py timm:levit_128s torchvision:resnet18

Random weights with randomised statistics and LayerScale (``tests/zoo.py``), at 128x128 where the net takes that;
nothing is downloaded. Needs timm and torchvision, ``pip install timm torchvision``, which bring a torch of their own
choice. Every net runs in a process of its own.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from outcomes import verdict, why_left

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 400  # seconds for one net
#: timm's families are looked through; of torchvision one of each, detectors and video left out.
TORCHVISION = """
alexnet vgg11_bn squeezenet1_1 googlenet inception_v3 densenet121 shufflenet_v2_x0_5 mobilenet_v2 mobilenet_v3_small
mnasnet0_5 efficientnet_b0 efficientnet_v2_s regnet_y_400mf resnext50_32x4d resnet18 convnext_tiny swin_t swin_v2_t
vit_b_16 maxvit_t fcn_resnet50 deeplabv3_mobilenet_v3_large lraspp_mobilenet_v3_large
"""
LARGE = re.compile(r"giant|huge|gigantic|enormous|xxl|_xl|large")
Row = dict[str, Any]


def choose(families: int = 2, parameters: float = 50e6) -> list[str]:
    """Of every family of timm its smallest net, and up to so many in all that have modules the others lack."""
    import timm
    from timm.models import _registry

    chosen = []
    for family in timm.list_modules():
        sizes = []
        for name in sorted(_registry._module_to_models[family]):
            if not LARGE.search(name):
                try:
                    with torch.device("meta"):
                        net = timm.create_model(name)
                except Exception:  # a name that is kept for old code alone
                    continue
                kinds = frozenset(type(module).__name__ for module in net.modules())
                sizes.append((sum(p.numel() for p in net.parameters()), name, kinds))
        seen: set[str] = set()
        taken = 0
        for size, name, kinds in sorted(sizes, key=lambda entry: entry[:2]):
            if taken < families and size < parameters and (not taken or kinds - seen):
                seen |= kinds
                taken += 1
                chosen.append(f"timm:{name}")
    return chosen


def build(source: str) -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    """A net with weights and statistics that a fold must get right, and an input for it."""
    import zoo

    torch.manual_seed(0)
    library, _, name = source.partition(":")
    if library == "timm":
        import timm

        net = timm.create_model(name).eval()
        size = net.pretrained_cfg["input_size"]
    else:
        import torchvision

        backbone = {"weights_backbone": None} if name.split("_")[0] in ("fcn", "deeplabv3", "lraspp") else {}
        net = torchvision.models.get_model(name, weights=None, **backbone).eval()
        size = (3, 224, 224)
    for shape in ((size[0], 128, 128), size):
        args = (torch.randn(2, *shape),)
        try:
            with torch.no_grad():
                net(*args)
            break
        except Exception:  # another size, then
            continue
    for parameter in net.parameters():
        if parameter.ndim > 1 and not bool(parameter.any()):  # a last layer of zeros would hide all before it
            torch.nn.init.normal_(parameter, std=0.02)
    return zoo.randomize(net), args


def measure(source: str) -> Row:
    """Exports one net, and says what became of its BatchNorms and how the file compares."""
    import bnfold

    net, args = build(source)
    row: Row = {"net": source}
    with tempfile.TemporaryDirectory() as folder:
        try:
            report = bnfold.export(net, Path(folder) / "net.onnx", args, device="cpu")
        except bnfold.BnfoldError as error:
            return row | {"verdict": f"{type(error).__name__}: {error}"[:160]}
    assert report.check is not None
    folded, total = report.ledger.count()
    entries = report.ledger.entries
    others_left = sum(not entry.is_batch_norm for entry in report.ledger.left)
    ratios = [o.ratio for o in report.check.outputs if o.candidate == "ONNX Runtime"]
    sites = [max(site.ratio, site.channel_ratio) for site in report.check.sites]
    return row | {
        "verdict": verdict(report.check), "before": total, "after": total - folded, "others": len(entries) - total,
        "others_left": others_left, "why": why_left(report.ledger),
        "operators": list(report.operators), "ratio": max(ratios), "site": max(sites, default=0.0),
    }  # fmt: skip


def in_a_process(source: str) -> Row:
    """``measure`` in a process of its own."""
    command = [sys.executable, __file__, "--one", source]
    threads = {"OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=LIMIT, env=os.environ | threads, check=False
        )
    except subprocess.TimeoutExpired:
        return {"net": source, "verdict": f"not done in {LIMIT} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"net"')]
    error = (done.stderr.strip().splitlines() or ["no output"])[-1]
    row: Row = json.loads(lines[-1]) if lines else {"net": source, "verdict": f"died: {error[:160]}"}
    return row


def table(rows: list[Row]) -> str:
    """The Markdown table with its summary."""
    packages = ("torch", "timm", "torchvision", "onnx", "onnxruntime-gpu")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in packages)
    done = [row for row in rows if "before" in row]
    passed = [row for row in done if row["verdict"] == "pass"]
    lines = [
        "# Nets of timm and torchvision",
        "",
        f"{datetime.date.today()}, {versions}, {platform.machine()} CPU;",
        "made by `scripts/sweep_timm.py`. Of every family the smallest net and those with modules of their own; random",
        "weights, randomised statistics and LayerScale. *Other* are the other multiplications and additions by",
        "constants, and how many of them are left. *Ratio* is the file's error over the noise in ONNX Runtime with all",
        "its optimisations (limit 4), *site* that of the worst element at a fold (limit 6).",
        "",
        f"{len(passed)} of {len(rows)} pass. BatchNorms: {sum(row['before'] for row in done)} before, "
        f"{sum(row['after'] for row in done)} left.",
        "",
        "| net | BatchNorms | left | why | other | left | operators | verdict | ratio | site |",
        "| --- | ---: | ---: | --- | ---: | ---: | --- | --- | ---: | ---: |",
    ]
    for row in rows:
        if "before" not in row:
            lines.append(f"| {row['net']} | | | | | | | {row['verdict']} | | |")
            continue
        before, after = row["operators"]
        cells = (
            row["net"], row["before"], row["after"], row["why"], row["others"], row["others_left"],
            f"{before} → {after}", row["verdict"], f"{row['ratio']:.2f}", f"{row['site']:.1f}",
        )  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs the sweep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nets", nargs="*", help="timm:NAME or torchvision:NAME; of every family some by default")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="nets at a time")
    parser.add_argument("--write", type=Path, help="Markdown file to write")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    warnings.simplefilter("ignore")
    if options.one:
        torch.set_num_threads(1)
        print(json.dumps(measure(options.one)))
        return
    nets = options.nets or [*choose(), *(f"torchvision:{name}" for name in TORCHVISION.split())]
    rows = []
    with ThreadPoolExecutor(options.workers) as pool:
        for row in pool.map(in_a_process, nets):
            rows.append(row)
            print(f"{row['net']:44} {row.get('before', 0):4} -> {row.get('after', 0):3}  {row['verdict']}", flush=True)
    if options.write:
        options.write.write_text(table(rows))


if __name__ == "__main__":
    main()
