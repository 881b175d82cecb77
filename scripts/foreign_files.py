"""ONNX files that others made: what bnfold folds of them and proves, beside ONNX Runtime's basic level and onnxsim.

    python scripts/foreign_files.py net.onnx folder-of-files ... [--no-check]

A row per file: BatchNormalizations and per-channel multiplications and additions before, after bnfold, after ONNX
Runtime's basic level, after onnxsim and onnxoptimizer or onnxslim where they are installed; the verdict; seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx

import bnfold
from bnfold.graph.onnx_graph import OnnxGraph
from bnfold.loading.onnx_file import read_onnx
from bnfold.passes.rewriter import Rewriter
from bnfold.semantics import Refused, Scaling


def files(paths: list[Path]) -> Iterator[Path]:
    """The ONNX files among paths and in folders."""
    for path in paths:
        yield from sorted(path.rglob("*.onnx")) if path.is_dir() else [path]


def affines(path: Path) -> str:
    """BatchNormalizations of a file, and its other per-channel affines."""
    source = read_onnx(path)
    graph = OnnxGraph(source.loaded(), path.parent)
    rewriter, norms, others = Rewriter(graph), 0, 0
    for value in graph.values():
        with contextlib.suppress(Exception):
            found = rewriter.at(value)
            norm = graph.call(value).operator == "BatchNormalization" and not isinstance(found, Refused)
            norms += norm
            others += isinstance(found, Scaling) and not norm and len(found.affine.varies()) == 1
    return f"{norms} + {others}"


def ours(path: Path, out: Path) -> None:
    """Without the check."""
    bnfold.export(path, out, check=False)


def runtime(path: Path, out: Path) -> None:
    """ONNX Runtime's basic level."""
    import onnxruntime

    onnxruntime.set_default_logger_severity(4)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(out)
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def onnxsim(path: Path, out: Path) -> None:
    """onnxsim with its defaults."""
    simplified, _ = importlib.import_module("onnxsim").simplify(onnx.load(path))
    onnx.save(simplified, out)


def onnxslim(path: Path, out: Path) -> None:
    """onnxslim with its defaults."""
    onnx.save(importlib.import_module("onnxslim").slim(onnx.load(path)), out)


TOOLS: dict[str, Callable[[Path, Path], None]] = {"bnfold": ours, "ONNX Runtime": runtime, "onnxsim": onnxsim}
if importlib.util.find_spec("onnxslim"):
    TOOLS["onnxslim"] = onnxslim


def tried(tool: Callable[[Path, Path], None], path: Path, folder: Path) -> str:
    """What a tool leaves, and its seconds; the name of its failure otherwise."""
    out, start = folder / "out.onnx", time.perf_counter()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            tool(path, out)
        spent = time.perf_counter() - start
        return f"{affines(out)} ({spent:.1f} s)"
    except bnfold.BnfoldError as error:
        return f"refused: {error.what[:60]}"
    except Exception as error:
        return f"fails: {type(error).__name__}"


def row(path: Path, folder: Path, *, check: bool) -> list[str]:
    """One line of the table."""
    try:
        before = affines(path)
    except bnfold.BnfoldError as error:
        return [path.name, f"refused: {error.what[:80]}", *[""] * len(TOOLS), ""]
    cells = [path.name, before, *(tried(tool, path, folder) for tool in TOOLS.values())]
    verdict, start = "not checked", time.perf_counter()
    if check:
        try:
            report: Any = bnfold.export(path, folder / "checked.onnx", device="cpu")
            ratio = report.check.ratio
            verdict = f"{report.check.verdict}, {ratio:.2g} ({time.perf_counter() - start:.1f} s)"
            if not report.passed:
                verdict += f": {report.check.problems[0][:160]}"
        except bnfold.BnfoldError as error:
            verdict = f"refused: {error}"[:200]
    return [*cells, verdict]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="+", type=Path)
    parser.add_argument("--no-check", action="store_true")
    given = parser.parse_args()
    heads = ["file", "before", *TOOLS, "check"]
    print(f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")
    with tempfile.TemporaryDirectory() as folder:
        for path in files(given.paths):
            print(f"| {' | '.join(row(path, Path(folder), check=not given.no_check))} |", flush=True)
            sys.stdout.flush()


if __name__ == "__main__":
    main()
