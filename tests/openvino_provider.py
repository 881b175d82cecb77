"""The OpenVINO provider, from export to verdict; ``test_openvino.py`` runs this with onnxruntime-openvino first on the
path."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from fault_kinds import KINDS
from test_faults import inject_faults, measured
from torch import Tensor, nn

import bnfold
from bnfold.cli import cli
from bnfold.errors import ProviderError, UsageError
from bnfold.runtime import doctor
from bnfold.runtime.runtime import (
    CPU,
    arithmetic,
    installed_runtimes,
    listed_providers,
    open_session,
    pip_problem,
    resolve_device,
)  # fmt: skip
from bnfold.timing.bench import bench

torch.set_num_threads(1)
OPENVINO = "OpenVINOExecutionProvider"
#: A device that no machine has.
ABSENT = {"device_type": "GPU.7"}
NETS = ("hidden_branch", "mobilenet_v2")


class Net(nn.Module):
    """Logits, and with ``det`` a determinant, which OpenVINO leaves to the CPU."""

    def __init__(self, *, det: bool = False) -> None:
        super().__init__()
        self.conv, self.norm, self.head, self.det = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(16, 5), det
        self.example_inputs = (X,)

    def forward(self, x: Tensor) -> Any:
        y = self.norm(self.conv(x)).relu()
        logits = self.head(nn.functional.adaptive_avg_pool2d(y, 2).flatten(1))
        return (logits, torch.linalg.det(y[:, 0, :2, :2])) if self.det else logits


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def net(*, det: bool = False) -> Net:
    torch.manual_seed(0)
    return Net(det=det).eval()


def export(path: Path, *, det: bool = False, **options: Any) -> bnfold.ExportReport:
    return bnfold.export(net(det=det), path, (X,), device="openvino", **options)


def test_this_is_openvinos_onnxruntime_alone() -> None:
    assert installed_runtimes() == ["onnxruntime-openvino"] and pip_problem() is None
    assert set(listed_providers()) == {OPENVINO, CPU}
    findings = [finding.what for finding in doctor.examine()]
    assert "ONNX Runtime runs on openvino" in findings
    assert not [f for f in doctor.examine() if f.level == "problem"]


@pytest.mark.parametrize("name", ["openvino", OPENVINO, "OpenVINO"])
def test_export_to_verdict(name: str, tmp_path: Path) -> None:
    report = bnfold.export(net(), tmp_path / "net.onnx", (X,), device=name)
    assert report.passed and report.check is not None and report.check.provider == OPENVINO
    assert report.check.placement is not None
    assert report.check.placement.nodes == {OPENVINO: len(onnx.load(tmp_path / "net.onnx").graph.node)}
    assert report.check.sites and {s.candidate for s in report.check.sites} == {"the file in float64"}


def test_options_are_passed_on_and_recorded(tmp_path: Path) -> None:
    report = export(tmp_path / "net.onnx", provider_options={"device_type": "CPU", "num_of_threads": "1"})
    assert report.check is not None and report.passed
    found = json.loads(report.to_json())
    assert found["check"]["engines"][0]["options"] == {"device_type": "CPU", "num_of_threads": "1"}
    assert found["versions"]["onnxruntime-openvino"] and "onnxruntime-gpu" not in found["versions"]


def test_a_wrong_file_fails(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    export(path)
    model = onnx.load(path)
    weight = next(t for t in model.graph.initializer if len(t.dims) == 4)
    array = onnx.numpy_helper.to_array(weight).copy()
    array[1] *= np.float32(1.001)
    weight.CopyFrom(onnx.numpy_helper.from_array(array, weight.name))
    onnx.save(model, path)
    report = bnfold.check(path, net(), (X,), device="openvino")
    assert report.verdict == "fail" and report.provider == OPENVINO


def test_partial_placement_is_counted_listed_and_refused(tmp_path: Path) -> None:
    report = export(tmp_path / "net.onnx", det=True)
    assert report.passed and report.check is not None, report
    placed = report.check.placement
    assert placed is not None and placed.nodes[CPU] == 1 and len(placed.elsewhere) == 1
    assert placed.elsewhere[0].endswith("(Det)")
    total = len(onnx.load(tmp_path / "net.onnx").graph.node)
    assert sum(placed.nodes.values()) == total
    note = f"1 of {total} nodes of the file ran on {CPU}: {placed.elsewhere[0]}"
    assert note in report.check.notes
    refused = bnfold.check(tmp_path / "net.onnx", net(det=True), (X,), device="openvino", require_all_nodes=True)
    assert refused.verdict == "fail" and refused.problems == (f"ONNX Runtime: {note}",)
    whole = export(tmp_path / "whole.onnx", require_all_nodes=True)
    assert whole.passed


def test_a_device_that_is_not_there_is_never_fallen_back_from() -> None:
    with pytest.raises(ProviderError, match=r"OpenVINO cannot be used: .*GPU.*not available"):
        resolve_device("openvino", ABSENT)
    with pytest.raises(UsageError, match=r"--provider-option: .*bogus"):
        resolve_device("openvino", {"bogus": "1"})
    with pytest.raises(ProviderError, match="CUDA cannot be used"):
        resolve_device("cuda")


@pytest.mark.parametrize("device_type", ["CPU", "HETERO:CPU"])
def test_what_it_computes_in_is_what_its_results_are_judged_as(device_type: str, tmp_path: Path) -> None:
    """HETERO leaves the choice to OpenVINO: bfloat16 on processors that have it."""
    device = resolve_device("openvino", {"device_type": device_type})
    found = arithmetic(device)
    report = export(tmp_path / "net.onnx", provider_options=dict(device.options))
    assert report.passed and report.check is not None, report.check
    assert [e.verdict for e in report.check.engines] == ["pass"] * len(report.check.engines)
    assert report.check.engines[-1].arithmetic == found.name
    if found.unit_roundoff > 2.0**-24:
        file, engine = report.check.engines
        assert (file.name, file.arithmetic, engine.name) == (CPU, "float32", OPENVINO)
        worst = {o.candidate: o.error for o in report.check.outputs}
        assert worst[f"ONNX Runtime, {found.name}"] > 30 * worst["ONNX Runtime"], "it was no better, so it is coarser"
    else:
        assert len(report.check.engines) == 1
    session = open_session(tmp_path / "net.onnx", device=device)
    assert session.provider == OPENVINO


def test_bench_runs_there(tmp_path: Path) -> None:
    export(tmp_path / "net.onnx")
    report = bench([tmp_path / "net.onnx"], device="openvino", rounds=6, memory=False)
    assert report.contestants[0].provider == OPENVINO and "onnxruntime-openvino" in report.machine


@pytest.mark.parametrize("name", NETS)
def test_right_files_pass(name: str, tmp_path: Path) -> None:
    measure = measured(name)
    assert (
        inject_faults.judge(measure.subject, measure.subject.copy(), tmp_path, device="openvino")["verdict"] == "pass"
    )


@pytest.mark.parametrize(("kind", "name"), [*zip(list(KINDS)[::3], itertools.cycle(NETS))])
def test_faults_are_caught(kind: str, name: str, tmp_path: Path) -> None:
    measure = measured(name)
    if (model := KINDS[kind](measure.subject)) is not None:
        found = measure.effect(model) | inject_faults.judge(measure.subject, model, tmp_path, device="openvino")
        found["kind"] = kind
        assert inject_faults.caught(found) or not inject_faults.has_effect(found), found


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    here = str(Path(__file__).parent)
    Path("make.py").write_text(f"import sys; sys.path.insert(0, {here!r})\nfrom openvino_provider import net as make\n")

    def run(*arguments: str) -> Any:
        return CliRunner().invoke(cli, [*arguments, "--device", "openvino"])

    result = run(
        "export", "make.py:make", "-o", "net.onnx", "--provider-option", "device_type=CPU", "--report", "r.html"
    )
    assert result.exit_code == 0 and OPENVINO in result.stdout and "device_type=CPU" in result.stdout, result.output
    assert "device_type" in Path("r.html").read_text()
    result = run("check", "net.onnx", "make.py:make")
    assert result.exit_code == 0 and OPENVINO in result.stdout
    result = run("check", "net.onnx", "make.py:make", "--provider-option", "device_type=GPU.7", "--quiet")
    (line,) = result.stderr.splitlines()
    assert result.exit_code == 5 and line.startswith("error: OpenVINO cannot be used:")
    result = run("check", "net.onnx", "make.py:make", "--provider-option", "bogus=1", "--quiet")
    assert result.exit_code == 2 and "bogus" in result.stderr
    result = run("bisect", "net.onnx", "make.py:make")
    assert result.exit_code == 0, result.output
