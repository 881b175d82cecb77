"""``scripts/cuda.sh`` with the CPU in the GPU's place: it survives what fails, and says and writes what it found."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from wheels import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
import on_device

from bnfold.report import Latency
from bnfold.runtime.runtime import CPU, Device, Provider, problem, resolve_device

torch.set_num_threads(1)
#: The CPU under another name, as which it is measured, and where its nodes ran is looked at.
GPU = Device(Provider("cpu under another name", CPU))

SHIM = """#!/usr/bin/env bash
case "$*" in
*"on_device.py gate"*) echo "a traceback's"; echo "last line" ; exit 1 ;;
*"on_device.py binding"*) kill -9 $$ ;;
*"on_device.py"*) echo "noise"; echo "found on $4 with ${@: -1}" ;;
*) echo "SKIPPED [1] a test"; echo "3 passed, 1 skipped in 1.0s" ;;
esac
"""


def test_a_step_that_fails_does_not_end_the_others(tmp_path: Path) -> None:
    shim, page = tmp_path / "python", tmp_path / "page.md"
    shim.write_text(SHIM)
    shim.chmod(0o755)
    done = subprocess.run(
        [ROOT / "scripts" / "cuda.sh", page, "cpu", "key=value"], text=True, check=False, capture_output=True,
        env=os.environ | {"PYTHON": str(shim)},
    )  # fmt: skip
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if " " in line.strip())
    assert done.returncode == 1 and lines["wrote"] == f"{page}, 2 of 6 steps failed"
    assert lines["tests"] == "3 passed, 1 skipped in 1.0s" and lines["gate"] == "last line"
    assert lines["latency"] == lines["machine"] == "found on cpu with --provider-option=key=value"
    assert [line.split()[0] for line in done.stdout.splitlines()] == [
        "machine", "tests", "gate", "binding", "tensorrt", "latency", "wrote"
    ]  # fmt: skip
    text = page.read_text()
    assert "cpu stands in for the GPU" in text and "**gate**: failed, last line" in text
    assert "**binding**: failed, " in text and "SKIPPED [1] a test" in text


def step(tmp_path: Path) -> on_device.Step:
    return on_device.Step(GPU, time.monotonic() + 600, True, tmp_path, tmp_path / "page.md")


def test_the_gate_goes_over_nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_device.Step, "options", property(lambda self: {"device": "cpu"}))
    said = on_device.gate(step(tmp_path))
    assert said.startswith("2 of 2 nets pass, worst ratio ") and said.endswith("0 nodes elsewhere")
    assert (tmp_path / "page.md").read_text().count(" | pass | ") == 2


def test_bound_inputs_are_compared_with_plain_ones(tmp_path: Path) -> None:
    assert on_device.binding(step(tmp_path)).startswith("2 of 2 nets agree; with copies a run takes ")


@pytest.mark.filterwarnings("ignore")  # of torch.onnx
def test_files_of_one_net_are_raced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        on_device, "zoo_net", lambda name: (torch.nn.Sequential(torch.nn.Linear(4, 3)), (torch.ones(2, 4),))
    )
    said = on_device.latency(step(tmp_path))
    assert "unfolded float32 " in said and "torch.onnx + onnxsim float16 " in said
    assert "| bnfold | " in (tmp_path / "page.md").read_text()


def test_tensorrt_is_skipped_with_its_reason(tmp_path: Path) -> None:
    if problem(on_device.device_of("tensorrt")) is None:
        pytest.skip("TensorRT works here")
    assert on_device.tensorrt(step(tmp_path)).startswith("skipped: Tensorrt cannot be used: ")


def test_the_machine_is_told_in_one_line() -> None:
    said = on_device.about(resolve_device("cpu"))
    assert "\n" not in said and f"{CPU} computes in float32, as deployed in float32" in said


def test_late_steps_begin_nothing(tmp_path: Path) -> None:
    late = on_device.Step(GPU, time.monotonic() - 1, True, tmp_path, tmp_path / "page.md")
    for run in (on_device.gate, on_device.latency):
        with pytest.raises(RuntimeError, match="no time for a single net"):
            run(late)


def test_what_takes_too_long_is_a_row_and_the_rest_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = on_device.Step(GPU, time.monotonic() + 0.5, True, tmp_path, tmp_path / "page.md")
    answers = iter([(None, *[Latency("x", CPU, 1.0, 1.0, 1, 2.0, (1.0, 3.0))] * 2)])

    def slow(step: on_device.Step, name: str) -> object:
        return next(answers, None) or time.sleep(60)

    monkeypatch.setattr(on_device, "_bound", slow)
    with on_device.time_limit(1.0):
        said = on_device.binding(made)
    assert said == "1 of 2 nets agree; with copies a run takes 2.00 times as long"
    assert "TimeUp: not done in time" in made.page.read_text()
