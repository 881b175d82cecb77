"""onnx's own node tests, a file of one operator each: what bnfold makes of every one.

    python scripts/node_tests.py found.jsonl [--seconds 280] [--only PATTERN] [--again]

A row per file: pass, inconclusive, fail, refused, or a crash, and why. Files whose row is there are not tried again
(``--again`` drops the rows that are no pass first), so that a long run can be made in parts. Then a table of kinds.
"""

from __future__ import annotations

import argparse
import collections
import fnmatch
import json
import os
import re
import select
import signal
import tempfile
import time
import warnings
from collections.abc import Generator
from pathlib import Path
from typing import Any

import onnx
import onnx.backend.test.case.node as cases

import bnfold

#: What ONNX Runtime reads.
IR_VERSION = 13
#: Seconds for one file.
MOST = 60


def models() -> dict[str, onnx.ModelProto]:
    """The model of every test, and of the files in onnx's wheel, by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = {case.name: case.model for case in cases.collect_testcases(None) if case.model is not None}
    data = Path(onnx.__file__).parent / "backend" / "test" / "data"
    for path in sorted(data.rglob("*.onnx")):
        name = path.parent.name if path.stem == "model" else path.stem
        found.setdefault(f"{path.relative_to(data).parts[0]}-{name}", onnx.load(path))
    for model in found.values():  # onnx may be ahead of ONNX Runtime
        model.ir_version = min(model.ir_version, IR_VERSION)
    return found


def tried(everything: dict[str, onnx.ModelProto], folder: Path) -> Generator[dict[str, Any]]:
    """What becomes of every file that is exported and checked, in a process that is begun anew where one ends it."""
    waiting = list(everything)
    while waiting:
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                for name in waiting:
                    os.write(write, json.dumps(row(name, everything[name], folder)).encode() + b"\n")
            finally:
                os._exit(0)
        os.close(write)
        try:
            with os.fdopen(read, "rb", 0) as out:
                while waiting and (ready := select.select([out], [], [], MOST)[0]) and (said := out.readline()):
                    yield json.loads(said)
                    waiting.pop(0)
        finally:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
        if waiting:
            why = (signal.strsignal(os.WTERMSIG(status)) or "") if ready else f"more than {MOST} s"
            yield {"name": waiting.pop(0), "verdict": "died" if ready else "late", "why": why}


def row(name: str, model: onnx.ModelProto, folder: Path) -> dict[str, Any]:
    """What becomes of one file."""
    path, began = folder / "net.onnx", time.monotonic()
    path.write_bytes(model.SerializeToString())
    try:
        report: Any = bnfold.export(path, folder / "out.onnx", device="cpu")
        verdict, why = report.check.verdict, "; ".join(report.check.problems)
    except bnfold.BnfoldError as error:
        verdict, why = "refused" if error.exit_code in (2, 3) else "internal", error.what
    except Exception as error:
        verdict, why = "crash", f"{type(error).__name__}: {error}"
    return {"name": name, "verdict": verdict, "why": why[:2000], "seconds": round(time.monotonic() - began, 2)}


def kind(why: str) -> str:
    """A reason without names and numbers."""
    return re.sub(r"'[^']*'|\[[^\]]*\]|\([^)]*\)|\d[\d.e+-]*", "#", why)[:110]


def main() -> None:
    """Tries what was not tried yet, for so many seconds, and prints what there is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=280)
    parser.add_argument("--only", default="*")
    parser.add_argument("--again", action="store_true")
    given = parser.parse_args()
    rows = (
        {row["name"]: row for row in map(json.loads, given.out.read_text().splitlines())} if given.out.exists() else {}
    )
    rows = {
        n: r for n, r in rows.items() if not (given.again and fnmatch.fnmatch(n, given.only) and r["verdict"] != "pass")
    }
    given.out.write_text("".join(json.dumps(row) + "\n" for row in rows.values()))
    start = time.monotonic()
    waiting = {n: m for n, m in models().items() if n not in rows and fnmatch.fnmatch(n, given.only)}
    with tempfile.TemporaryDirectory() as folder, given.out.open("a") as out:
        results = tried(waiting, Path(folder))
        for found in results:
            rows[found["name"]] = found
            out.write(json.dumps(found) + "\n")
            if time.monotonic() - start > given.seconds:
                results.close()
                break
    left = sum(name not in rows for name in waiting)
    kinds = collections.Counter((row["verdict"], kind(row["why"])) for row in rows.values())
    for (verdict, why), count in sorted(kinds.items(), key=lambda each: (each[0][0], -each[1])):
        print(f"{count:5} {verdict:13} {why}")
    print(collections.Counter(row["verdict"] for row in rows.values()), "left:", left)


if __name__ == "__main__":
    main()
