"""OpenVINO, which runs on any CPU of Intel's kind: as a provider of ONNX Runtime, and its own runtime in a runner."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_kinds import KINDS
from test_faults import inject_faults, measured
from wheels import ROOT, path_with

import bnfold
from bnfold.runtime.runner import UserRunner
from bnfold.runtime.runtime import FORMATS

torch.set_num_threads(1)
RUNNER = ROOT / "examples" / "runners" / "openvino_runtime.py"
NET = "hidden_branch"
#: Those that the outputs do not show are found at the fold sites, and a runner shows no more than its outputs.
SHARE = list(KINDS)[::4]


def test_openvinos_provider() -> None:
    """In a process of its own: of two onnxruntimes a process sees the one that comes first on its path."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "-rA", "--no-header", "tests/openvino_provider.py"], cwd=ROOT, text=True, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=os.environ | {"PYTHONPATH": path_with("onnxruntime-openvino")},
    )  # fmt: skip
    print(done.stdout)
    assert done.returncode == 0, done.stdout
    assert re.search(r"\b\d+ passed\b", done.stdout) and "skipped" not in done.stdout


@pytest.fixture
def openvino(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", path_with("openvino"))


@cache
def runner(name: str) -> UserRunner:
    return UserRunner(f"{RUNNER}:{name}")


def judge(kind: str | None, folder: Path, name: str = "infer", **options: Any) -> dict[str, Any] | None:
    subject = measured(NET).subject
    model = subject.copy() if kind is None else KINDS[kind](subject)
    if model is None:
        return None
    effect = measured(NET).effect(model) | {"kind": kind}
    # The file's path is in the cache of what the runner compiled.
    folder = folder / (kind or "right").replace("/", " ")
    folder.mkdir()
    return effect | inject_faults.judge(subject, model, folder, runner=runner(name), **options)


def test_a_right_file_passes_in_openvinos_own_runtime(openvino: None, tmp_path: Path) -> None:
    found = judge(None, tmp_path)
    assert found is not None and found["verdict"] == "pass", found


@pytest.mark.parametrize("kind", SHARE)
def test_a_faulty_file_fails_in_openvinos_own_runtime(kind: str, openvino: None, tmp_path: Path) -> None:
    if (found := judge(kind, tmp_path)) is not None:
        assert inject_faults.caught(found) or not inject_faults.has_effect(found), found


def test_what_openvino_computes_in_by_itself_is_judged_as_that(openvino: None, tmp_path: Path) -> None:
    """bfloat16 on processors that have it, and then right files pass as that alone; else float32."""
    as_float32, as_bfloat16 = (
        judge(None, tmp_path / str(i), "infer_as_deployed", arithmetic=FORMATS[name])
        for i, name in enumerate(("float32", "bfloat16"))
        if (tmp_path / str(i)).mkdir() is None
    )
    assert as_bfloat16 is not None and as_float32 is not None
    coarse = as_float32["ratio"] > 64
    assert as_float32["verdict"] == ("fail" if coarse else "pass")
    assert as_bfloat16["verdict"] == "pass" and (as_bfloat16["ratio"] > 1e-3) is coarse


def test_a_runner_can_hold_an_export_back(openvino: None, tmp_path: Path) -> None:
    subject = measured(NET).subject
    for name, code in {"right": "infer(inputs, path)", "wrong": "[1.001 * x for x in infer(inputs, path)]"}.items():
        (tmp_path / f"{name}.py").write_text(
            f"import sys; sys.path.insert(0, {str(RUNNER.parent)!r})\nfrom openvino_runtime import infer\n"
            f"def run(inputs, path):\n    return {code}\n"
        )
        report = bnfold.export(
            subject.module, tmp_path / f"{name}.onnx", subject.args, device="cpu", runner=f"{tmp_path / name}.py:run"
        )
        assert report.passed is (tmp_path / f"{name}.onnx").exists() is (name == "right"), report.check
