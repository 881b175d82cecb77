"""What a fleet costs: over the same exports one after another, with one and two workers, per row, and when some die.

    python scripts/fleet.py                 # writes the table of docs/fleet.md anew
    python scripts/fleet.py --models 4 --rows 1000 --dry-run

Scheduler and workers are processes of their own on this machine, and have run an export before anything is measured:
their start is no part of the times. All that is compared computes with one thread. Times are of one run each, on
whatever else the machine does: their ratios say something, and the run in one process is made before and after the
others.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import re
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from bnfold.fleet.cluster import Where
from bnfold.fleet.rows import Row, read_rows
from bnfold.fleet.work import Order, run
from bnfold.report import ModelRow

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs" / "fleet.md"
BEGIN, END = "<!-- measured -->", "<!-- end -->"
KINDS = ("digits_cnn", "digits_tcn", "digits_mlp")


def write_list(folder: Path, count: int) -> list[Row]:
    """A list of ``count`` models, no two of them alike."""
    models = [
        f'[[model]]\nname = "m{i:02}"\nsource = "{ROOT}/models/digits.py:{KINDS[i % 3]}"\nseed = {i}\n'
        f'weights = "{ROOT}/models/{KINDS[i % 3]}.safetensors"\n'
        for i in range(count)
    ]
    (folder / "models.toml").write_text("".join(models))
    return read_rows(folder / "models.toml")


def one_after_another(folder: Path) -> float:
    """Seconds of the exports in one process, after what a worker's process has done before."""
    words = [sys.executable, __file__, "--in-one-process", str(folder)]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, env=environment())
    return float(done.stdout.split()[-1])


def in_one_process(folder: str) -> None:
    """Exports all models of a list here, and prints the seconds."""
    from bnfold.fleet.nursery import warm

    warm()
    out = Path(folder) / "one"
    out.mkdir(exist_ok=True)
    began = time.monotonic()
    for row in read_rows(Path(folder) / "models.toml"):
        reports = [word for suffix in ("json", "html") for word in ("--report", str(out / f"{row.name}.{suffix}"))]
        sys.argv = ["bnfold", "export", row.source, *row.words({}), "-q", "-o", str(out / f"{row.name}.onnx"), *reports]
        try:
            runpy.run_module("bnfold", run_name="__main__")
        except SystemExit as end:
            assert not end.code, row.name
    print(time.monotonic() - began)


def environment() -> dict[str, str]:
    """One thread, and this checkout."""
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}


class Workers:
    """A scheduler and ``count`` workers, which have all exported something."""

    def __init__(self, folder: Path, count: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.where = Where(f"tcp://127.0.0.1:{port}")
        words = [["scheduler", "--host", "127.0.0.1", "--port", str(port)]]
        words += [["worker", f"tcp://127.0.0.1:{port}", "--nthreads", "1", "--no-nanny"] for _ in range(count)]
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-m", "dask", *each, "--no-dashboard"], cwd=folder, env=environment(),
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )
            for each in words
        ]  # fmt: skip
        from distributed import Client

        with Client(self.where.scheduler, timeout=60, set_as_default=False) as client:
            client.wait_for_workers(count, timeout=120)
            client.run(warm_up)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


def warm_up() -> None:
    """Starts the process that forks for every model."""
    from bnfold.fleet.nursery import Command
    from bnfold.fleet.work import _obeyed

    _obeyed(Command(("--version",), "/"))


def nothing(order: Order) -> ModelRow:
    """A model that takes no time at all."""
    return ModelRow(order.row.name, order.row.source, "pass", 0)


def fleet(folder: Path, rows: list[Row], workers: Workers, out: str, **extra: Any) -> float:
    """Seconds of a fleet."""
    report = run(rows, "models.toml", folder, str(folder / out), workers.where, **extra)
    assert all(row.outcome == "pass" for row in report.rows), [row for row in report.rows if row.outcome != "pass"]
    return report.seconds


def killed(folder: Path, rows: list[Row], seed: int) -> tuple[int, bool]:
    """How many of three workers were killed at random while they worked, and whether the files are those of ``two``."""
    with Workers(folder, 3) as workers:
        ended = threading.Event()

        def kill(row: ModelRow, done: int, total: int) -> None:
            if done == total // 3 and not ended.is_set():
                ended.set()
                random.Random(seed).choice(workers.processes[1:]).send_signal(signal.SIGKILL)

        fleet(folder, rows, workers, "killed", tell=kill)
    files = [sorted((folder / out).glob("*.onnx")) for out in ("two", "killed")]
    same = [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]]
    return int(ended.is_set()), same and len(files[0]) == len(rows)


def measure(models: int, count: int) -> dict[str, Any]:
    """Everything."""
    found: dict[str, Any] = {"models": models, "rows": count, "cores": os.cpu_count(), "on": versions()}
    with tempfile.TemporaryDirectory(prefix="fleet-") as name:
        folder = Path(name)
        rows = write_list(folder, models)
        one = [one_after_another(folder)]
        with Workers(folder, 1) as workers:
            found["one_worker"] = fleet(folder, rows, workers, "single")
        one.append(one_after_another(folder))
        found["one_process"] = one
        with Workers(folder, 2) as workers:
            found["two_workers"] = fleet(folder, rows, workers, "two")
            found["again"] = fleet(folder, rows, workers, "two")
            idle = [Row(f"r{i}", "nothing", {}) for i in range(count)]
            found["nothing"] = fleet(folder, idle, workers, "idle", work=nothing)
        found["killed"], found["same"] = killed(folder, rows, 0)
        files = [[(folder / out / f"{row.name}.onnx").read_bytes() for row in rows] for out in ("one", "single", "two")]
        found["alike"] = files[0] == files[1] == files[2]
    return found


def versions() -> str:
    """The date, and what was measured on what."""
    parts = [f"{name} {metadata.version(name)}" for name in ("torch", "onnxruntime-gpu", "distributed")]
    return ", ".join([str(datetime.date.today()), *parts, f"{platform.system()} {platform.machine()}"])


def table(found: dict[str, Any]) -> str:
    """What was found, for people."""
    one, models = sum(found["one_process"]) / 2, found["models"]
    spread = abs(found["one_process"][0] - found["one_process"][1]) / one
    lines = [
        f"{models} models, {found['rows']} rows that do nothing, {found['cores']} cores; {found['on']}:",
        "",
        "| | seconds | over one process |",
        "| --- | ---: | ---: |",
        f"| {models} exports one after another in one process, before and after the rest | "
        f"{found['one_process'][0]:.1f}, {found['one_process'][1]:.1f} | 1 (the two differ by {spread:.0%}) |",
        f"| a fleet on one worker | {found['one_worker']:.1f} | {found['one_worker'] / one:.2f} |",
        f"| a fleet on two workers | {found['two_workers']:.1f} | {found['two_workers'] / one:.2f} |",
        f"| the same again, all of it from the run before | {found['again']:.2f} | {found['again'] / one:.3f} |",
        f"| {found['rows']} rows that do nothing, two workers | {found['nothing']:.1f} | "
        f"{found['nothing'] / found['rows'] * 1e3:.2f} ms a row |",
        "",
        f"Files of the three runs byte for byte alike: {'yes' if found['alike'] else 'no'}. With {found['killed']} of "
        f"three workers killed at random, byte for byte those of the quiet run: {'yes' if found['same'] else 'no'}.",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measures, and writes the table where it stands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=16)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--dry-run", action="store_true", help="Print, and write nothing.")
    parser.add_argument("--in-one-process", metavar="FOLDER", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.in_one_process:
        in_one_process(asked.in_one_process)
        return
    found = measure(asked.models, asked.rows)
    print(json.dumps(found), table(found), sep="\n")
    if not asked.dry_run:
        text = DOCS.read_text()
        DOCS.write_text(re.sub(f"(?s){BEGIN}.*{END}", lambda _: f"{BEGIN}\n{table(found)}\n{END}", text))


if __name__ == "__main__":
    main()
