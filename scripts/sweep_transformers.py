"""Folds, exports and judges every transformers architecture with BatchNorm that the test zoo builds.

    python scripts/sweep_transformers.py --write docs/transformers.md
    python scripts/sweep_transformers.py levit rt_detr

Each net is built from a small configuration with random weights and randomised statistics (``tests/zoo_hf.py``);
nothing is downloaded. For each: BatchNorms before and after with the reasons for the rest, the verdict of the gate, and
errors over noise as the gate has them (docs/gate.md), the largest of any output and input, of ONNX Runtime with the
unfolded and with the folded file.
"""

from __future__ import annotations

import argparse
import datetime
import math
import platform
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
from outcomes import verdict, why_left

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Row:
    """One line of the table."""

    name: str
    verdict: str
    before: int = 0
    after: int = 0
    reasons: str = ""
    operators: tuple[int, int] = (0, 0)
    unfolded_onnx: float = math.nan
    folded_onnx: float = math.nan
    seconds: float = 0.0


def measure(name: str, samples: int) -> Row:
    """Exports one net twice, folded and not, and judges both files."""
    import zoo_hf

    import bnfold

    model, args = zoo_hf.HF_NETS[name]()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        try:
            report = bnfold.export(model, Path(folder) / "folded.onnx", args, device="cpu", samples=samples)
            plain = bnfold.export(model, Path(folder) / "plain.onnx", args, device="cpu", samples=samples, fold=False)
        except bnfold.BnfoldError as error:
            return Row(name, f"{type(error).__name__}: {error}"[:200])
    folded, total = report.ledger.count()
    assert report.check is not None and plain.check is not None

    def ratio(check: bnfold.CheckReport, candidate: str) -> float:
        return max((o.ratio for o in check.outputs if o.candidate == candidate), default=math.nan)

    return Row(
        name, verdict(report.check), total, total - folded, why_left(report.ledger),
        report.operators, ratio(plain.check, "ONNX Runtime, optimisations off"),
        ratio(report.check, "ONNX Runtime, optimisations off"), time.perf_counter() - start,
    )  # fmt: skip


def geometric_mean(values: list[float]) -> float:
    """Of the finite, positive ones."""
    kept = [math.log(v) for v in values if math.isfinite(v) and v > 0]
    return math.exp(sum(kept) / len(kept)) if kept else math.nan


def table(rows: list[Row]) -> str:
    """The Markdown table with its summary."""
    versions = ", ".join(f"{p} {metadata.version(p)}" for p in ("torch", "transformers", "onnx", "onnxruntime-gpu"))
    passed = [row for row in rows if row.verdict == "pass"]
    lines = [
        "# transformers architectures with BatchNorm",
        "",
        f"{datetime.date.today()}, {versions}, {platform.machine()} CPU; made by `scripts/sweep_transformers.py`.",
        "Small configurations, random weights, randomised statistics and LayerScale. The last two columns are errors",
        "over noise as [the gate](gate.md) has them, the largest of any output and input.",
        "*ONNX* is ONNX Runtime on the CPU with its optimisations off, with the file of the unfolded and of the folded",
        "model.",
        "",
        "| net | BatchNorms | left | why | operators | verdict | unfolded ONNX | folded ONNX |",
        "| --- | ---: | ---: | --- | --- | --- | ---: | ---: |",
    ]
    lines += [
        f"| {r.name} | {r.before} | {r.after} | {r.reasons} | {r.operators[0]} → {r.operators[1]} | {r.verdict} | "
        f"{r.unfolded_onnx:.2f} | {r.folded_onnx:.2f} |"
        for r in rows
    ]
    lines += [
        "",
        f"{len(passed)} of {len(rows)} pass the gate. BatchNorms: {sum(r.before for r in rows)} before, "
        f"{sum(r.after for r in rows)} left. Geometric means of error over noise over those that pass: unfolded ONNX "
        f"{geometric_mean([r.unfolded_onnx for r in passed]):.2f}, folded ONNX "
        f"{geometric_mean([r.folded_onnx for r in passed]):.2f}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs the sweep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nets", nargs="*", help="names from the zoo; all of them by default")
    parser.add_argument("--samples", type=int, default=16, help="samples per verdict (default 16)")
    parser.add_argument("--write", type=Path, help="Markdown file to write")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))
    import zoo_hf

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = []
    for name in options.nets or list(zoo_hf.HF_NETS):
        row = measure(name, options.samples)
        rows.append(row)
        print(
            f"{row.name:24} {row.before:4} -> {row.after:3}  {row.verdict[:90]:6}  "
            f"ONNX {row.unfolded_onnx:5.2f} -> {row.folded_onnx:5.2f}  {row.seconds:5.1f} s",
            flush=True,
        )
    text = table(rows)
    print("\n" + text.rsplit("\n\n", 1)[-1])
    if options.write:
        options.write.write_text(text)


if __name__ == "__main__":
    main()
