"""ONNX files that others made: what bnfold folds of them and proves, beside four tools that work on such files.

    python scripts/foreign_files.py net.onnx folder-of-files ... --json found.jsonl [--no-check] [--processes]
    python scripts/foreign_files.py --json found.jsonl --write docs/foreign-files.md

A row per file: BatchNormalizations and other per-channel multiplications and additions that are there, and that each
tool leaves; seconds of the processor that one run of it took, its import apart; what the gate says.
Of bnfold and onnxsim also those of a process of their own, imports included (``--processes``). What the JSON has is not
tried again, so that a long run can be made in parts (``--seconds``), and the table is made of all of it. A folder of a
file names the package it is from. onnxslim and onnxoptimizer have to be installed.

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
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from measured_page import Row, stored, write

import bnfold
from bnfold.graph.graph import Node
from bnfold.graph.onnx_graph import OnnxGraph
from bnfold.loading.onnx_file import read_onnx
from bnfold.passes.rewriter import Rewriter
from bnfold.semantics import Opaque, Scaling

#: Seconds after which a tool is stopped.
MOST = 300


def files(paths: list[Path]) -> dict[str, Path]:
    """The ONNX files among paths and in folders by what they are called, small ones first."""
    found = [(each, path) for path in paths for each in (path.rglob("*.onnx") if path.is_dir() else [path])]
    found.sort(key=lambda each: (each[0].stat().st_size, each[0]))
    return {str(each.relative_to(path)) if each != path else each.name: each for each, path in found}


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


#: Where a tool is not called as its package.
PACKAGES = {"ONNX Runtime": "onnxruntime-gpu"}
TOOLS: dict[str, Callable[[Path, Path], None]] = {
    "bnfold": ours, "ONNX Runtime": runtime, "onnxsim": onnxsim, "onnxslim": onnxslim, "onnxoptimizer": onnxoptimizer,
}  # fmt: skip


def spent() -> float:
    """Seconds of the processor so far, those of children included."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def tried(path: Path, folder: Path) -> Row:
    """What each tool leaves, and its seconds; the name of its failure otherwise."""
    found: Row = {}
    for name, tool in TOOLS.items():
        out = folder / f"{tool.__name__}.onnx"
        out.unlink(missing_ok=True)
        start = spent()
        signal.alarm(MOST)
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                tool(path, out)
            signal.alarm(0)
            found[name] = {"seconds": round(spent() - start, 3), "left": affines(out)}
        except bnfold.BnfoldError as error:
            found[name] = {"refused": error.what[:100]}
        except Exception as error:
            found[name] = {"fails": type(error).__name__}
        finally:
            signal.alarm(0)
    return found


def late(*_: Any) -> None:
    """Ends what takes too long."""
    raise TimeoutError


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


def checked(path: Path, folder: Path) -> Row:
    """What the gate says, and the seconds of an export with it."""
    start = time.process_time()
    try:
        report: Any = bnfold.export(path, folder / "checked.onnx", device="cpu")
        verdict, why = report.check.verdict, (report.check.problems or ("",))[0]
    except bnfold.BnfoldError as error:
        verdict, why = "refused", error.what
    return {"verdict": verdict, "why": why[:200], "seconds": round(time.process_time() - start, 1)}


def more(path: Path, folder: Path, known: Row, *, check: bool, alone: bool) -> Row:
    """What is not known yet of a file."""
    found: Row = {}
    try:
        if "before" not in known:
            found = {"bytes": path.stat().st_size, "before": affines(path)} | tried(path, folder)
        if alone and "processes" not in known:
            found["processes"] = processes(path, folder)
        if check and "check" not in known:
            found["check"] = checked(path, folder)
    except bnfold.BnfoldError as error:
        found["refused"] = error.what[:100]
    return found


def table(rows: dict[str, Row]) -> str:
    """All rows, and above them what they come to."""
    lines = [f"| file | before | {' | '.join(TOOLS)} | gate |", "|" + " --- |" * (len(TOOLS) + 3)]
    for name, each in sorted(rows.items(), key=lambda found: found[0].lower()):
        if "refused" in each:
            lines.append(f"| {name} | refused: {each['refused']} |{' |' * (len(TOOLS) + 1)}")
            continue
        least = min(sum(each[t]["left"]) for t in TOOLS if "left" in each[t])
        cells = [_cell(each[tool], least) for tool in TOOLS]
        gate = each.get("check", {})
        lines.append(f"| {name} | {_count(each['before'])} | {' | '.join(cells)} | {gate.get('verdict', '')} |")
    return "\n".join([*_summary({name: row for name, row in rows.items() if "bnfold" in row}), "", *lines])


def _summary(named: dict[str, Row]) -> list[str]:
    """On how many files more or fewer are left, how long it takes beside onnxsim, and what the gate says."""
    lines, rows = list[str](), [*named.values()]
    for tool in list(TOOLS)[1:]:
        both = [(sum(r["bnfold"]["left"]), sum(r[tool]["left"])) for r in rows if "left" in r[tool]]
        sums = [sum(each) for each in zip(*both)]
        lines.append(
            f"- {tool} {metadata.version(PACKAGES.get(tool, tool))} takes {len(both)} of {len(rows)} files. bnfold "
            f"leaves fewer on {sum(a < b for a, b in both)} of them and more on {sum(a > b for a, b in both)}: "
            f"{sums[0]} beside {sums[1]} in all."
        )
    times = [r["bnfold"]["seconds"] / r["onnxsim"]["seconds"] for r in rows if "seconds" in r["onnxsim"]]
    alone = [r["processes"]["bnfold"] / r["processes"]["onnxsim"] for r in rows if "processes" in r]
    alone = [ratio for ratio in alone if 0 < ratio < math.inf]
    for what, ratios in (("once everything is imported", times), ("as a process of its own", alone)):
        if ratios:
            lines.append(
                f"- Without the check bnfold takes {statistics.median(ratios):.2f} of onnxsim's time {what}, median of "
                f"{len(ratios)} files; at most {max(ratios):.2f}."
            )
    said = {name: row["check"] for name, row in named.items() if "check" in row}
    passed = sum(check["verdict"] == "pass" for check in said.values())
    lines.append(f"- Of {len(said)} files that were checked {passed} pass.")
    lines += [f"- {name}: {c['verdict']}, {c['why']}" for name, c in said.items() if c["verdict"] != "pass"]
    return lines


def _count(counts: list[int]) -> str:
    return " + ".join(map(str, counts))


def _cell(found: Row, least: int) -> str:
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
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--write", type=Path, help="a page that has a place for the table")
    given = parser.parse_args()
    rows: dict[str, Row] = {}
    for line in stored(given.json):
        rows.setdefault(line.pop("file"), {}).update(line)
    for tool in TOOLS.values() if given.paths else ():  # imports, apart
        if tool is not ours and tool is not runtime:
            importlib.import_module(tool.__name__)
    signal.signal(signal.SIGALRM, late)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for name, path in files(given.paths).items():
            known = rows.setdefault(name, {})
            found = more(path, Path(folder), known, check=not given.no_check, alone=given.processes)
            known.update(json.loads(json.dumps(found)))
            if found:
                with given.json.open("a") as out:
                    out.write(json.dumps({"file": name, **found}) + "\n")
            if time.monotonic() - start > given.seconds:
                break
    text = table({name: row for name, row in rows.items() if row})
    print(text)
    if given.write:
        write(given.write, "files", f"{len(rows)} files.\n\n{text}")


if __name__ == "__main__":
    main()
