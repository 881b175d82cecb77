"""The process that runs commands: what it says of each, its limits, and that nothing outlives it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest

from bnfold.errors import ProviderError
from bnfold.fleet.nursery import Command, Ended, Nursery, sha256_of

NETS = Path(__file__).with_name("fleet_nets.py")


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    made = Nursery()
    yield made
    made.close()


@pytest.fixture
def nets(tmp_path: Path) -> Path:
    (tmp_path / "nets.py").write_text(NETS.read_text())
    return tmp_path


def export(name: str, folder: Path, **extra: float | int) -> Command:
    words = ("export", f"nets.py:{name}", "-q", "-o", "out/net.onnx")
    (folder / "out").mkdir(exist_ok=True)
    return Command(words, str(folder), (str(folder / "out"),), **extra)  # type: ignore[arg-type]


def test_it_ends_as_the_command_line_would(nursery: Nursery, nets: Path) -> None:
    ended = nursery.run(export("small", nets))
    assert (ended.how, ended.code, ended.said) == ("exit", 0, "")
    assert ended.peak > 10**8 and ended.seconds > 0
    assert ended.reads == {str(nets / "nets.py"): sha256_of(nets / "nets.py")}
    ended = nursery.run(export("broken", nets))
    assert (ended.how, ended.code) == ("exit", 3)
    assert ended.said.startswith("error: nets.py:broken: the factory failed with ValueError: no such layer")


def test_files_that_only_the_code_knows_of_are_seen(nursery: Nursery, nets: Path) -> None:
    (nets / "width.json").write_text('{"width": 6}')
    (nets / "helper.py").write_text("from nets_of import small\n")
    (nets / "nets_of.py").write_text(NETS.read_text())
    (nets / "entry.py").write_text("import helper\nfrom nets import configured\n")
    for _ in range(2):  # the second time of compiled code
        ended = nursery.run(export("configured", nets))
        assert {Path(path).name for path in ended.reads} == {"nets.py", "width.json"}
        command = Command(
            ("export", "entry.py:configured", "-q", "-o", "out/net.onnx"), str(nets), (str(nets / "out"),)
        )
        ended = nursery.run(command)
        names = {"entry.py", "helper.py", "nets.py", "nets_of.py", "width.json"}
        assert (ended.code, {Path(path).name for path in ended.reads}) == (0, names)


def test_a_file_that_changes_meanwhile_has_no_digest(nursery: Nursery, nets: Path) -> None:
    later = time.time() + 3600
    os.utime(nets / "nets.py", (later, later))
    assert nursery.run(export("small", nets)).reads == {str(nets / "nets.py"): ""}


def test_limits(nursery: Nursery, nets: Path) -> None:
    ended = nursery.run(export("hangs", nets, timeout=0.5))
    assert ended.how == "time" and ended.seconds >= 0.5
    ended = nursery.run(export("eats", nets, memory=900 << 20))
    assert ended.how == "memory" and ended.peak > 900 << 20
    ended = nursery.run(export("crashes", nets))
    assert (ended.how, ended.code) == ("exit", -11)
    assert nursery.run(export("small", nets)).code == 0, "one command's failure is never another's"


@pytest.mark.skipif(sys.platform != "linux", reason="where the system limits the data of a process")
def test_more_than_the_machine_has_fails_at_once(nursery: Nursery, nets: Path) -> None:
    ended = nursery.run(export("gulps", nets, memory=2 << 30))
    assert ended.how == "exit" and ended.code in (3, 6) and "memory" in ended.said


def test_nothing_outlives_the_one_who_started_it(nets: Path) -> None:
    script = f"""
        from bnfold.fleet.nursery import *
        Nursery().run({export("hangs", nets)!r})
    """
    process = subprocess.Popen([sys.executable, "-c", "\n".join(line.strip() for line in script.splitlines())])
    family: list[psutil.Process] = []
    while len(family) < 2:  # the nursery and the command
        family = psutil.Process(process.pid).children(recursive=True)
        time.sleep(0.1)
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive


def test_one_that_dies_says_so(nets: Path) -> None:
    nursery = Nursery()
    psutil.Process(nursery.pid).kill()
    with pytest.raises(ProviderError, match="the process that runs models ended with code -9"):
        nursery.run(export("small", nets))


def test_without_fork_it_is_the_same(nets: Path) -> None:
    script = "import os; from bnfold.fleet import nursery; nursery.FORKS = False; nursery.main()"
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin and process.stdout
        for name, code in (("small", 0), ("broken", 3)):
            process.stdin.write(json.dumps(asdict(export(name, nets))).encode() + b"\n")
            process.stdin.flush()
            ended = Ended(**json.loads(process.stdout.readline()))
            assert (ended.how, ended.code) == ("exit", code)
            assert {Path(path).name for path in ended.reads} == {"nets.py"}
        process.stdin.close()
