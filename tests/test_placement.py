"""Where a file's nodes really ran: read off profiles, and said where it is not where they were asked to run."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import helper
from onnx_parts import FLOAT, X, adder, encode, serialized
from torch import Tensor, nn

import bnfold
from bnfold.errors import LowerError
from bnfold.gate import candidates, devices
from bnfold.gate.gate import Gate
from bnfold.graph.capture import capture
from bnfold.lowering.lower import lower, save
from bnfold.report import Ledger, Placement
from bnfold.runtime import placement as placements
from bnfold.runtime.placement import placement, placement_finding, read_profile
from bnfold.runtime.runtime import CPU, CUDA, cuda_problem, open_session
from bnfold.runtime.session import Session

torch.set_num_threads(1)


def event(name: str, provider: str, operator: str = "Conv", **more: Any) -> dict[str, Any]:
    return {"cat": "Node", "name": f"{name}_kernel_time", "args": {"provider": provider, "op_name": operator}} | more


PROFILE = [
    {"cat": "Session", "name": "model_run"},
    event("stem", CUDA), event("body", CUDA), event("shape", CPU, "Shape"), event("top", CPU, "TopK"),
    event("stem", CUDA),  # a second run, or a loop's second turn
    {"cat": "Node", "name": "stem_fence_before", "args": {"op_name": "Conv"}},
]  # fmt: skip


# -- profiles ----------------------------------------------------------------------------------------------------------


def test_a_real_profile_counts_every_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert placement(encode(adder()), {"x": X}, optimized=False) == Placement({CPU: 2})
    assert list(tmp_path.iterdir()) == [], "the profile must not stay behind"


def test_a_profile_is_gone_after_a_failure_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    nodes = [helper.make_node("Reshape", ["x", "shape"], ["y"])]
    model = serialized(nodes, [("x", FLOAT, ["N"])], [("y", FLOAT, None)], {"shape": np.array([2, 2])})
    with pytest.raises(LowerError):
        placement(model, {"x": np.ones(3, np.float32)})
    assert list(tmp_path.iterdir()) == []


def test_a_profile_is_read_by_node_and_provider() -> None:
    found = read_profile(PROFILE, CUDA)
    assert found.nodes == {CUDA: 2, CPU: 2} and found.elsewhere == ("shape (Shape)", "top (TopK)")
    assert read_profile([], CUDA) == Placement({})


FINDINGS: list[tuple[Placement, str, str | None, str | None]] = [
    (Placement({CUDA: 3}), CUDA, None, None),
    (Placement({CUDA: 3, CPU: 1}, ("a (TopK)",)), CUDA, None, f"1 of 4 nodes of the file ran on {CPU}: a (TopK)"),
    (Placement({CPU: 2}, ("a (Conv)", "b (Relu)")), CUDA, f"none of the 2 nodes ran on {CUDA}: all ran on {CPU}", None),
    (Placement({CPU: 2}), CPU, None, None),
    (Placement({}), CUDA, None, None),  # a file without nodes
]


@pytest.mark.parametrize(("found", "wanted", "problem", "note"), FINDINGS)
def test_nodes_elsewhere_are_said(found: Placement, wanted: str, problem: str | None, note: str | None) -> None:
    assert placement_finding(found, wanted) == (problem, note)


def test_long_lists_are_cut() -> None:
    names = tuple(f"n{i} (Shape)" for i in range(9))
    _, note = placement_finding(Placement({CUDA: 1, CPU: 9}, names), CUDA)
    assert note is not None and note.endswith("n4 (Shape), ...")


# -- bound inputs ------------------------------------------------------------------------------------------------------


def test_bound_and_plain_runs_agree() -> None:
    session = open_session(encode(adder()))
    assert session.binding_problem({"x": X}) is None
    for plain, bound in zip(session._run_plainly({"x": X}, ["relu"]), session._run_bound({"x": X}, ["relu"])):
        assert plain.tobytes() == bound.tobytes()


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        (lambda v: v + 1e-3, "another with bound inputs"),
        (lambda v: v * np.float32("nan"), "another with bound inputs"),
        (lambda v: v[:1], r"is \[1, 3\] with bound inputs and \[2, 3\] without"),
        (lambda v: v * np.float32(1 + 1e-6), None),
    ],
    ids=["stale", "nan", "shape", "last digits"],
)
def test_a_run_that_differs_when_bound_is_told(
    wrong: Any, problem: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = open_session(encode(adder()))
    right = session._run_plainly
    monkeypatch.setattr(Session, "_run_bound", lambda self, feeds, names: [wrong(v) for v in right(feeds, names)])
    found = session.binding_problem({"x": X})
    assert found is None if problem is None else found is not None and re.search(problem, found)


# -- the gate on CUDA, with everything but CUDA ------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)).relu()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Sessions asked for on CUDA are opened on the CPU, and what they were asked with is written down."""
    found: list[dict[str, Any]] = []
    real = candidates.open_session

    def on_cpu(model: Any, *, device: str = "cpu", tf32: bool = False, **more: Any) -> Session:
        found.append({"device": device, "tf32": tf32} | more)
        return real(model, device="cpu", **more)

    for module in (candidates, placements):
        monkeypatch.setattr(module, "open_session", on_cpu)
    return found


def judge(tmp_path: Path, device: Any = "cuda") -> bnfold.CheckReport:
    torch.manual_seed(0)
    captured = capture(Net(), (torch.randn(2, 3, 6, 6),))
    save(lower(captured.program, dims=captured.dims), tmp_path / "net.onnx")
    return Gate(captured, Ledger(), None, tmp_path / "net.onnx", device=device).judge()


def test_cuda_is_judged_without_tf32_and_reported_with_it(asked: list[dict[str, Any]], tmp_path: Path) -> None:
    report = judge(tmp_path)
    assert report.verdict == "pass", report.problems
    assert report.placement is not None and set(report.placement.nodes) == {CPU}
    assert {a["device"] for a in asked} == {"cuda"}
    assert [a["tf32"] for a in asked if a["tf32"]] == [True], "one session as deployed, the last one"
    assert asked[-1]["tf32"] and {o.candidate for o in report.deployed} == {"ONNX Runtime, TF32"}
    assert {o.candidate for o in report.outputs} == {"ONNX Runtime, optimisations off", "ONNX Runtime"}
    on_cpu = judge(tmp_path, "cpu")
    assert on_cpu.placement is None and on_cpu.deployed == ()


def test_what_is_wrong_with_tf32_alone_is_no_verdict(
    asked: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = candidates.OnnxCandidate.run

    def rough(self: Any, flat: Any) -> Any:
        return [v * (1.01 if "TF32" in self.name else 1) for v in run(self, flat)]

    monkeypatch.setattr(candidates.OnnxCandidate, "run", rough)
    report = judge(tmp_path)
    assert report.verdict == "pass" and report.deployed[0].ratio > 100
    assert any(note.startswith("as deployed, not judged: ONNX Runtime, TF32") for note in report.notes)


BAD: dict[str, tuple[str, Any, str, str]] = {
    "all elsewhere": ("placement", lambda *_: Placement({CPU: 2}, ("a (Conv)",)), "fail", "none of the 2 nodes ran on"),
    "binding": ("binding_problem", lambda *_: "output 'y' is another", "fail", "output 'y' is another"),
    "no profile": ("placement", lambda *_: 1 / 0, "inconclusive", "where its nodes run cannot be seen"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_device_that_cannot_be_trusted_is_never_green(
    name: str, asked: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, replacement, verdict, message = BAD[name]
    monkeypatch.setattr(candidates.OnnxCandidate, method, replacement)
    monkeypatch.setattr(devices, "placement_finding", lambda found, _: placement_finding(found, CUDA))
    report = judge(tmp_path)
    assert report.verdict == verdict and any(message in problem for problem in report.problems)


# -- CUDA --------------------------------------------------------------------------------------------------------------


@pytest.mark.cuda
def test_a_file_runs_on_cuda_and_what_does_not_is_listed(tmp_path: Path) -> None:
    if problem := cuda_problem():
        pytest.skip(problem)
    report = judge(tmp_path)
    assert report.verdict == "pass" and report.provider == CUDA
    assert report.placement is not None and report.placement.nodes[CUDA] > 0 and report.deployed
