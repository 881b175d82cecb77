"""Whole fleets, on real workers: what comes out, what is not done twice, and what becomes of it when things die."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import random
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import onnx
import psutil
import pytest
from click.testing import CliRunner
from fleet_cluster import ROOT, Cluster

from bnfold.cli import cli
from bnfold.report.schema import schema

TESTS = Path(__file__).resolve().parent
#: Of the nets that export in a moment.
SEEDS = range(10)


class Fleet:
    """A folder with a list of models, and what a run of it says."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.touched = folder, folder / "touched"
        self.touched.touch()
        (folder / "nets.py").write_text((TESTS / "fleet_nets.py").read_text())
        self.code, self.err, self.text = 0, "", ""

    def write(self, *models: str, defaults: str = "") -> None:
        """The list: a line of TOML for each model."""
        rows = "".join(f"[[model]]\n{model}\n" for model in models)
        (self.folder / "models.toml").write_text(f"[defaults]\n{defaults}\n{rows}")

    def start(self, *words: str, out: str = "out") -> subprocess.Popen[str]:
        """Begins a run."""
        paths = os.pathsep.join([str(ROOT), str(TESTS), os.environ.get("PYTHONPATH", "")])
        return subprocess.Popen(
            [sys.executable, "-m", "bnfold", "fleet", "models.toml", "-o", out, *words], cwd=self.folder, text=True,
            env={**os.environ, "PYTHONPATH": paths},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def run(self, *words: str, out: str = "out") -> dict[str, Any]:
        """A whole run; its rows by name. Where others have the workers it is made here, which saves starting it."""
        if "--scheduler" not in words:
            return self.end(self.start(*words, out=out), out)
        with contextlib.chdir(self.folder):
            result = CliRunner().invoke(cli, ["fleet", "models.toml", "-o", out, *words])
        self.text, self.err, self.code = result.stdout, result.stderr, result.exit_code
        return self.rows(out)

    def end(self, process: subprocess.Popen[str], out: str = "out") -> dict[str, Any]:
        """What a run has come to; its rows by name."""
        self.text, self.err = process.communicate(timeout=900)
        self.code = process.returncode
        return self.rows(out)

    def rows(self, out: str) -> dict[str, Any]:
        """What the run has written, by name."""
        index = self.folder / out / "index.json"
        assert index.exists(), self.err
        document = json.loads(index.read_text())
        jsonschema.validate(document, schema())
        assert document["exit_code"] == self.code
        return {row["name"]: row for row in document["rows"]}

    def built(self) -> list[int]:
        """The seeds of the nets that were built, in order."""
        return [int(line.split()[0]) for line in self.touched.read_text().splitlines()]


def until(process: subprocess.Popen[str], true: Callable[[], bool]) -> None:
    """Waits while a run goes on."""
    while not true():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return Fleet(tmp_path)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster() as cluster:
        cluster.workers(2)
        yield cluster


def touched(seed: int, seconds: float = 0.0) -> str:
    return (
        f'name = "t{seed}"\nsource = "nets.py:touched"\narg = {{seed = {seed}, seconds = {seconds}, log = "touched"}}'
    )


@pytest.mark.slow
def test_a_fleet_of_sixteen_on_this_machine(fleet: Fleet, cluster: Cluster) -> None:
    """One broken, one that hangs, one that eats memory: thirteen files, and three rows that say what happened."""
    digits = [
        f'source = "{ROOT}/models/digits.py:{net}"\nweights = "{ROOT}/models/{net}.safetensors"'
        for net in ("digits_cnn", "digits_mlp")
    ]
    small = [f'name = "s{seed}"\nsource = "nets.py:small"\narg = {{seed = {seed}}}' for seed in SEEDS]
    bad = ['source = "nets.py:broken"', 'source = "nets.py:hangs"\ntimeout = 1.0']
    bad += ['source = "nets.py:eats"\nmemory = "1 GB"']
    fleet.write(*digits, *bad, *small, 'source = "nets.py:small"\nbench = true')
    rows = fleet.run("--workers", "2")
    files = sorted(path.name for path in (fleet.folder / "out").glob("*.onnx"))
    assert files == sorted(f"{name}.onnx" for name in rows if name not in ("broken", "hangs", "eats"))
    assert len(files) == 13 and all(rows[name[:-5]]["outcome"] == "pass" for name in files), fleet.text
    for name in files:
        onnx.checker.check_model(fleet.folder / "out" / name)
    assert "the factory failed with ValueError: no such layer. It happened at nets.py:" in rows["broken"]["said"]
    assert rows["hangs"]["said"] == "it did not end within its time limit of 1 s. Give it more: timeout"
    assert rows["eats"]["said"].endswith("GB, beyond its memory limit. Give it more: memory")
    assert [rows[name]["exit_code"] for name in ("broken", "hangs", "eats")] == [3, 4, 6] and fleet.code == 3
    assert rows["small"]["latency"] > 0 and rows["digits_cnn"]["folded"] == rows["digits_cnn"]["batch_norms"] == 11
    suite = ET.parse(fleet.folder / "out" / "index.xml").getroot().find("testsuite")
    assert suite is not None and (suite.get("tests"), suite.get("failures")) == ("16", "3")
    page = (fleet.folder / "out" / "index.html").read_text()
    assert all(f'<a href="{name}.html">' in page for name in rows if name not in ("broken", "hangs", "eats"))
    assert "13 pass, 3 error" in fleet.text and fleet.err.count("16/16") == 1

    stamps = {path: path.stat().st_mtime_ns for path in (fleet.folder / "out").glob("*.onnx")}
    bad[1] = bad[1].replace("1.0", "2.0")  # a limit matters where it was reached
    digits[1] += "\nno-merge = true\ntimeout = 500"
    small[0] += "\ntimeout = 500"
    fleet.write(*digits, *bad, *small, 'source = "nets.py:small"\nbench = true')
    again = fleet.run("--scheduler", cluster.address)
    anew = {"digits_mlp", "hangs"}
    assert {name for name, row in again.items() if not row["earlier"]} == anew and fleet.code == 3
    assert not any(row["changed"] for name, row in again.items() if name not in anew)
    assert {path.stem for path, stamp in stamps.items() if path.stat().st_mtime_ns != stamp} == {"digits_mlp"}
    assert "14 from an earlier run" in fleet.text


@pytest.mark.slow
def test_what_a_result_depends_on(fleet: Fleet, cluster: Cluster) -> None:
    def run(*words: str) -> set[str]:
        rows = fleet.run("--scheduler", cluster.address, *words)
        return {name for name, row in rows.items() if not row["earlier"]}

    (fleet.folder / "width.json").write_text('{"width": 3}')
    wide, other = 'source = "nets.py:configured"', 'source = "nets.py:small"'
    broken = 'source = "nets.py:broken"'
    fleet.write(wide, other, broken)
    assert run() == {"configured", "small", "broken"}
    assert run("--retry") == {"broken"}
    fleet.write(other, broken, wide)
    assert run() == set(), "the order of the list is nothing"
    (fleet.folder / "width.json").write_text('{"width": 4}')
    assert run() == {"configured"}
    fleet.write(other + "\nopset = 20", broken, wide)
    assert run() == {"small"}
    fleet.write(other + "\nopset = 20", broken, wide, defaults="seed = 3")
    assert run() == {"configured", "small", "broken"}
    (fleet.folder / "out" / "small.onnx").write_bytes(b"damaged")
    assert run() == {"small"}
    (fleet.folder / "out" / ".fleet" / "small.json").write_text("{")
    assert run() == {"small"}
    with (fleet.folder / "nets.py").open("a") as code:
        code.write("\n# another word\n")
    assert run() == {"configured", "small", "broken"}
    rows = fleet.run("--scheduler", cluster.address)
    assert fleet.code == 3 and rows["small"]["file"] == "small.onnx" and rows["broken"]["file"] is None


@pytest.mark.slow
def test_half_of_the_workers_is_killed_and_the_files_are_the_same(fleet: Fleet, cluster: Cluster) -> None:
    fleet.write(*(touched(seed, 0.5) for seed in range(4)))
    cluster.workers(2)
    quiet = fleet.run("--scheduler", cluster.address, out="quiet")
    built = len(fleet.built())
    process = fleet.start("--scheduler", cluster.address, out="killed")
    until(process, lambda: len(fleet.built()) >= built + 1)
    victim = random.Random(0).choice(cluster.processes)
    family = psutil.Process(victim.pid).children(recursive=True)
    victim.kill()
    rows = fleet.end(process, "killed")
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive, "what a worker started ends with it"
    assert fleet.code == 0 and set(rows) == set(quiet)
    for name, row in rows.items():
        left = {key: row[key] for key in row if key not in ("seconds", "memory", "tries")}
        assert left == {key: quiet[name][key] for key in left}
        one, other = ((fleet.folder / out / f"{name}.onnx").read_bytes() for out in ("quiet", "killed"))
        assert one == other
    assert not list((fleet.folder / "killed").glob(".*.bnfold-tmp"))


@pytest.mark.slow
def test_two_runs_over_one_folder(fleet: Fleet, cluster: Cluster) -> None:
    cluster.workers(2)
    fleet.write(*(touched(seed) for seed in range(3)))
    processes = [fleet.start("--scheduler", cluster.address) for _ in range(2)]
    for process in processes:
        rows = fleet.end(process)
        assert fleet.code == 0 and all(row["outcome"] == "pass" for row in rows.values())
    again = fleet.run("--scheduler", cluster.address)
    assert all(row["earlier"] for row in again.values())


def test_no_scheduler_and_no_worker_with_what_a_model_needs(
    fleet: Fleet, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet.write('source = "nets.py:small"', 'name = "gpu"\nsource = "nets.py:small"\nresources = {GPU = 1}')
    rows = fleet.run("--scheduler", cluster.address)
    assert rows["gpu"]["said"].startswith("no worker has 1 GPU.") and rows["gpu"]["exit_code"] == fleet.code == 5
    assert rows["small"]["outcome"] == "pass"
    monkeypatch.setattr("bnfold.fleet.cluster._CONNECT", 1)
    with contextlib.chdir(fleet.folder):
        result = CliRunner().invoke(cli, ["fleet", "models.toml", "-o", "none", "--scheduler", "tcp://127.0.0.1:1"])
    assert result.exit_code == 5
    assert result.stderr.startswith("error: tcp://127.0.0.1:1: no scheduler with workers answers")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.slow
def test_what_is_no_pass(fleet: Fleet, cluster: Cluster) -> None:
    fleet.write(
        'source = "nets.py:leaves"', 'name = "help"\nsource = "--help"', 'source = "nets.py:crashes"',
        'name = "unjudged"\nsource = "nets.py:small"\nno-check = true',
    )  # fmt: skip
    rows = fleet.run("--scheduler", cluster.address)
    assert rows["leaves"]["said"].startswith("its process ended without a verdict") and rows["leaves"]["exit_code"] == 4
    assert rows["help"]["exit_code"] == 3 and rows["help"]["said"].startswith("--help: "), rows["help"]
    assert rows["crashes"]["tries"] == 3 and "killed 3 times, at last by SIGSEGV" in rows["crashes"]["said"]
    assert (rows["unjudged"]["outcome"], rows["unjudged"]["exit_code"]) == ("not judged", 0) and fleet.code == 3
    again = fleet.run("--scheduler", cluster.address)
    assert {name for name, row in again.items() if not row["earlier"]} == {"crashes"}, "which may do well another time"


# -- an HTTP server ----------------------------------------------------------------------------------------------------


class _Store(http.server.SimpleHTTPRequestHandler):
    """A folder that files can be read from and sent to."""

    def do_POST(self) -> None:
        target = Path(self.translate_path(self.path))
        target.parent.mkdir(exist_ok=True)
        assert self.headers["Transfer-Encoding"] == "chunked"
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        target.write_bytes(content)
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        """Nothing."""


@pytest.fixture
def store(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    folder = tmp_path / "store"
    folder.mkdir()

    def handler(*args: Any) -> _Store:
        return _Store(*args, directory=str(folder))

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", folder
        server.shutdown()
        thread.join()


@pytest.mark.slow
def test_weights_data_and_results_on_a_server(fleet: Fleet, cluster: Cluster, store: tuple[str, Path]) -> None:
    url, folder = store
    for name in ("digits_mlp.safetensors", "digits_heldout.npz"):
        (folder / name).write_bytes((ROOT / "models" / name).read_bytes())
    (folder / "out").mkdir()
    fleet.write(
        f'source = "{ROOT}/models/digits.py:digits_mlp"\nweights = "{url}/digits_mlp.safetensors"',
        f'name = "none"\nsource = "{ROOT}/models/digits.py:digits_mlp"\nweights = "{url}/none.safetensors"',
        defaults=f'data = "{url}/digits_heldout.npz"',
    )

    def run() -> dict[str, Any]:
        process = fleet.start("--scheduler", cluster.address, out=f"{url}/out")
        _, fleet.err = process.communicate(timeout=600)
        fleet.code = process.returncode
        return {row["name"]: row for row in json.loads((folder / "out" / "index.json").read_text())["rows"]}

    rows = run()
    assert rows["digits_mlp"]["outcome"] == "pass", rows
    assert (
        rows["none"]["exit_code"] == fleet.code == 3
        and f"{url}/none.safetensors: it cannot be read" in rows["none"]["said"]
    )
    onnx.checker.check_model(folder / "out" / "digits_mlp.onnx")
    report = json.loads((folder / "out" / "digits_mlp.json").read_text())
    assert report["source"]["weights"] == "digits_mlp.safetensors" and report["check"]["accuracy"]["samples"] == 360
    assert report["file"]["path"] == f"{url}/out/digits_mlp.onnx"
    assert run()["digits_mlp"]["earlier"]
    (folder / "digits_mlp.safetensors").write_bytes((ROOT / "models" / "digits_cnn.safetensors").read_bytes())
    rows = run()
    assert not rows["digits_mlp"]["earlier"] and rows["digits_mlp"]["exit_code"] == 3
    assert rows["digits_mlp"]["changed"][0] == "was pass"


# -- last, as every worker ends with its scheduler ---------------------------------------------------------------------


@pytest.mark.slow
def test_the_scheduler_goes_away_and_the_next_run_goes_on(fleet: Fleet, cluster: Cluster) -> None:
    cluster.workers(1)
    fleet.write(*(touched(seed, 0.3) for seed in range(4)))
    process = fleet.start("--scheduler", cluster.address)
    done = fleet.folder / "out" / ".fleet"
    until(process, lambda: len(list(done.glob("*.json"))) > 1)
    cluster.scheduler.kill()
    cluster.scheduler.wait()
    rows = fleet.end(process)
    assert fleet.code == 5
    lost = {name for name, row in rows.items() if row["outcome"] == "error"}
    assert lost and lost != set(rows)
    assert all("the scheduler went away. What is done is stored" in rows[name]["said"] for name in lost)
    cluster.workers_gone()
    cluster.scheduler = cluster.start_scheduler()
    cluster.workers(1)
    rows = fleet.run("--scheduler", cluster.address)
    assert fleet.code == 0 and all(row["outcome"] == "pass" for row in rows.values())
    assert {name for name, row in rows.items() if row["earlier"]} >= set(rows) - lost
