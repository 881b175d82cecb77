"""ONNX files that others made: what bnfold folds of them and proves, beside four tools that work on such files.

    python scripts/foreign_files.py net.onnx folder-of-files ... --json found.jsonl [--no-check]

A row per file: BatchNormalizations and other per-channel multiplications and additions that are there, and that each
tool leaves; seconds of the processor that it took, its import apart, the least of three in turn; what the gate says.
Of bnfold and onnxsim also those of a process of their own, imports included (``--processes``). Files in the JSON are
not tried again, and the table is made of all of them. onnxslim and onnxoptimizer have to be installed.

A MatMul by a constant and the addition behind it, per feature, are a linear layer of more than two axes: ONNX has no
other way to write one, and ONNX Runtime makes a Gemm between two Reshapes of it itself where the sizes are fixed. Such
an addition is counted for no tool.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx

import bnfold
from bnfold.graph.graph import Node
from bnfold.graph.onnx_graph import OnnxGraph
from bnfold.loading.onnx_file import read_onnx
from bnfold.passes.rewriter import Rewriter
from bnfold.semantics import Opaque, Scaling


def files(paths: list[Path]) -> Iterator[Path]:
    """The ONNX files among paths and in folders, small ones first."""
    found = [each for path in paths for each in (path.rglob("*.onnx") if path.is_dir() else [path])]
    yield from sorted(found, key=lambda path: (path.stat().st_size, path))


def affines(path: Path) -> tuple[int, int]:
    """BatchNormalizations of a file, and its other per-channel affines."""
    source = read_onnx(path)
    graph = OnnxGraph(source.loaded(), path.parent)
    rewriter, others = Rewriter(graph), 0
    for value in graph.values():
        with contextlib.suppress(bnfold.BnfoldError):
            found = rewriter.at(value)
            norm = graph.call(value).operator == "BatchNormalization" or (
                isinstance(found, Opaque) and bool(found.kind)
            )
            affine = isinstance(found, Scaling) and not norm and len(found.affine.varies()) == 1
            others += affine and not is_bias(graph, value)
    return sum(node.op_type == "BatchNormalization" for node in source.model.graph.node), others


def is_bias(graph: OnnxGraph, value: Node) -> bool:
    """Whether it is the addition that makes a linear layer of a MatMul, which has no place for a bias."""
    call = graph.call(value)
    reads = [n for n in call.node.all_input_nodes if not graph.is_constant(n)]
    before = graph.maker(reads[0]) if call.operator == "Add" and len(reads) == 1 else None
    if before is None or before.operator != "MatMul" or len(reads[0].users) > 1 or graph.rank(value) < 3:
        return False
    sizes = [graph.shape(n) for n in call.node.all_input_nodes if graph.is_constant(n)]
    return before.is_constant("B") and all(np.prod(size) in (1, size[-1]) for size in sizes if size)


def ours(path: Path, out: Path) -> None:
    """Without the check."""
    bnfold.export(path, out, check=False)


def runtime(path: Path, out: Path) -> None:
    """ONNX Runtime's basic level."""
    import onnxruntime

    onnxruntime.set_default_logger_severity(4)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
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


def onnxoptimizer(path: Path, out: Path) -> None:
    """onnxoptimizer with its defaults, and its fusing of BatchNormalizations."""
    tool = importlib.import_module("onnxoptimizer")
    onnx.save(tool.optimize(onnx.load(path), tool.get_fuse_and_elimination_passes()), out)


TOOLS: dict[str, Callable[[Path, Path], None]] = {
    "bnfold": ours, "ONNX Runtime": runtime, "onnxsim": onnxsim, "onnxslim": onnxslim, "onnxoptimizer": onnxoptimizer,
}  # fmt: skip


def spent() -> float:
    """Seconds of the processor so far, those of children included."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def tried(path: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """What each tool leaves, and its seconds; the name of its failure otherwise."""
    found: dict[str, dict[str, Any]] = {name: {} for name in TOOLS}
    for name in [*TOOLS, *reversed(TOOLS), *TOOLS]:
        out = folder / f"{TOOLS[name].__name__}.onnx"
        out.unlink(missing_ok=True)
        start = spent()
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                TOOLS[name](path, out)
            seconds = min(round(spent() - start, 3), found[name].get("seconds", math.inf))
            found[name] |= {"seconds": seconds, "left": found[name].get("left") or affines(out)}
        except bnfold.BnfoldError as error:
            found[name] = {"refused": error.what[:100]}
        except Exception as error:
            found[name] = {"fails": type(error).__name__}
    return found


#: What a process of its own runs.
PROCESSES = {
    "bnfold": ["-m", "bnfold", "export", "{path}", "-o", "{out}", "--no-check", "-q"],
    "onnxsim": ["-c", "import onnx, onnxsim; onnx.save(onnxsim.simplify(onnx.load('{path}'))[0], '{out}')"],
}


def processes(path: Path, folder: Path) -> dict[str, float]:
    """Seconds of a process of its own, the least of three in turn."""
    found = dict.fromkeys(PROCESSES, math.inf)
    for name in [*PROCESSES, *reversed(PROCESSES), *PROCESSES]:
        command = [each.format(path=path, out=folder / "out.onnx") for each in PROCESSES[name]]
        start = spent()
        if subprocess.run([sys.executable, *command], capture_output=True).returncode == 0:
            found[name] = min(found[name], round(spent() - start, 2))
    return found


def row(path: Path, folder: Path, *, check: bool, alone: bool) -> dict[str, Any]:
    """What is found of one file."""
    found: dict[str, Any] = {"file": path.name, "bytes": path.stat().st_size}
    try:
        found["before"] = affines(path)
    except bnfold.BnfoldError as error:
        return {**found, "refused": error.what[:100]}
    found |= tried(path, folder)
    if alone:
        found["processes"] = processes(path, folder)
    if check:
        start = time.process_time()
        try:
            report: Any = bnfold.export(path, folder / "checked.onnx", device="cpu")
            verdict, why = report.check.verdict, (report.check.problems or ("",))[0]
        except bnfold.BnfoldError as error:
            verdict, why = "refused", error.what
        found["check"] = {"verdict": verdict, "why": why[:200], "seconds": round(time.process_time() - start, 1)}
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """All rows, and below them how many affines are left of all files that every tool takes."""
    lines = [f"| file | before | {' | '.join(TOOLS)} | gate |", "|" + " --- |" * (len(TOOLS) + 3)]
    for each in sorted(rows, key=lambda found: found["file"].lower()):
        if "refused" in each:
            lines.append(f"| {each['file']} | refused: {each['refused']} |{' |' * (len(TOOLS) + 1)}")
            continue
        least = min(sum(each[t]["left"]) for t in TOOLS if "left" in each[t])
        cells = [_cell(each[tool], least) for tool in TOOLS]
        gate = each.get("check", {})
        seconds = f" ({gate['seconds']} s)" if gate else ""
        seconds += "".join(f"; {name} alone {took} s" for name, took in each.get("processes", {}).items())
        lines.append(
            f"| {each['file']} | {_count(each['before'])} | {' | '.join(cells)} | {gate.get('verdict', '')}{seconds} |"
        )
    return "\n".join(lines)


def _count(counts: list[int]) -> str:
    return " + ".join(map(str, counts))


def _cell(found: dict[str, Any], least: int) -> str:
    if "left" not in found:
        return f"refused: {found['refused']}" if "refused" in found else f"fails ({found['fails']})"
    counts = _count(found["left"])
    return f"{f'**{counts}**' if sum(found['left']) == least else counts} ({found['seconds']} s)"


def main() -> None:
    """Tries what was not tried yet, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="*", type=Path)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--no-check", action="store_true")
    parser.add_argument("--processes", action="store_true")
    given = parser.parse_args()
    rows = [json.loads(line) for line in given.json.read_text().splitlines()] if given.json.exists() else []
    for tool in TOOLS.values():  # imports, apart
        if tool is not ours and tool is not runtime:
            importlib.import_module(tool.__name__)
    with tempfile.TemporaryDirectory() as folder:
        for path in files(given.paths):
            if path.name in {found["file"] for found in rows}:
                continue
            rows.append(row(path, Path(folder), check=not given.no_check, alone=given.processes))
            with given.json.open("a") as out:
                out.write(json.dumps(rows[-1]) + "\n")
    print(table(json.loads(json.dumps(rows))))


if __name__ == "__main__":
    main()
