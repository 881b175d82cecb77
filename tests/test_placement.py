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
from bnfold.gate import candidates
from bnfold.gate.gate import Gate
from bnfold.graph.capture import capture
from bnfold.lowering.lower import lower, save
from bnfold.report import Ledger, Placement
from bnfold.runtime import placement as placements
from bnfold.runtime.placement import placement, placement_finding, read_profile
from bnfold.runtime.runtime import CPU, CUDA, FORMATS, Arithmetic, Device, Provider, cuda_problem, open_session
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


def test_compiled_nodes_are_counted_as_the_nodes_that_they_were() -> None:
    compiled = [event("OpenVINO-EP-subgraph_1_0", CUDA, "OpenVINO-EP-subgraph_1"), event("top", CPU, "TopK")]
    given = {CUDA: [("stem", "Conv"), ("body", "Conv"), ("end", "Relu")], CPU: [("top", "TopK")]}
    assert read_profile(compiled, CUDA, given) == Placement({CUDA: 3, CPU: 1}, ("top (TopK)",))
    assert read_profile(compiled, CUDA, {}) == Placement({CUDA: 1, CPU: 1}, ("top (TopK)",))


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


# -- the gate on a GPU, with the CPU in its place ----------------------------------------------------------------------

#: It says of itself to be another provider, and has an option that keeps it from TF32: the CPU, which ignores that.
PRETENDED = Device(Provider("pretended", CPU, {"use_tf32": "0"}))
TF32 = FORMATS["tf32"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)).relu()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What sessions are asked for, written down; as deployed they are taken to compute in TF32."""
    found: list[dict[str, Any]] = []
    real, measured = candidates.open_session, candidates.arithmetic

    def noted(model: Any, **more: Any) -> Session:
        found.append({"deployed": False} | more)
        return real(model, **more)

    def as_deployed(device: Device, *, deployed: bool = False, double: bool = False) -> Arithmetic:
        return TF32 if deployed else measured(device, double=double)

    for module in (candidates, placements):
        monkeypatch.setattr(module, "open_session", noted)
    monkeypatch.setattr(candidates, "arithmetic", as_deployed)
    return found


def judge(tmp_path: Path, device: Any = PRETENDED, **more: Any) -> bnfold.CheckReport:
    torch.manual_seed(0)
    captured = capture(Net(), (torch.randn(2, 3, 6, 6),))
    save(lower(captured.program, dims=captured.dims), tmp_path / "net.onnx")
    return Gate(captured, Ledger(), None, tmp_path / "net.onnx", device=device, **more).judge()


def rounding(factor: float, monkeypatch: pytest.MonkeyPatch, coarse: float = 2.0) -> None:
    """Outputs of engines that are ``coarse`` are off by a factor."""
    run = candidates.OnnxCandidate.run

    def rough(self: Any, flat: Any) -> Any:
        return [v * (factor if self.coarser >= coarse else 1) for v in run(self, flat)]

    monkeypatch.setattr(candidates.OnnxCandidate, "run", rough)


def test_the_file_is_judged_in_float32_and_the_engine_in_what_it_computes_in(
    asked: list[dict[str, Any]], tmp_path: Path
) -> None:
    report = judge(tmp_path)
    assert report.verdict == "pass", report.problems
    assert report.placement is not None and set(report.placement.nodes) == {CPU}
    assert {str(a["device"].provider.name) for a in asked} == {"pretended"}
    assert [a["deployed"] for a in asked if a["deployed"]] == [True], "one session as deployed"
    assert [o.candidate for o in report.outputs] == [
        "the file in float64", "ONNX Runtime, optimisations off", "ONNX Runtime", "ONNX Runtime, tf32"
    ]  # fmt: skip
    file, engine = report.engines
    assert (file.arithmetic, file.options, file.verdict) == ("float32", {"use_tf32": "0"}, "pass")
    assert (engine.arithmetic, engine.options, engine.unit_roundoff) == ("tf32", {}, 2.0**-11)
    on_cpu = judge(tmp_path, "cpu")
    assert on_cpu.placement is None and [e.name for e in on_cpu.engines] == [CPU]


@pytest.mark.parametrize(("factor", "verdict"), [(1 + 2.0**-11, "pass"), (1.1, "fail")])
def test_an_engine_may_err_as_its_arithmetic_does_and_no_more(
    factor: float, verdict: str, asked: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounding(factor, monkeypatch)
    report = judge(tmp_path)
    assert report.verdict == verdict and [e.verdict for e in report.engines] == ["pass", verdict]
    assert all(problem.startswith("ONNX Runtime, tf32, output") for problem in report.problems)
    assert [e.ratio > report.limit for e in report.engines] == [False, verdict == "fail"]


def test_a_device_that_is_coarse_itself_leaves_the_file_to_the_cpu(
    asked: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    coarse = Device(Provider("coarse", CPU), (("a", "1"),))
    monkeypatch.setattr(
        candidates, "arithmetic", lambda device, **_: TF32 if device == coarse else candidates.FLOAT32
    )  # fmt: skip
    report = judge(tmp_path, coarse)
    assert report.verdict == "pass" and [e.options for e in report.engines] == [{}, {"a": "1"}]
    rounding(1 + 2.0**-11, monkeypatch, coarse=1.0)  # what the engine may do, the file may not
    report = judge(tmp_path, coarse)
    assert report.verdict == "fail" and [e.verdict for e in report.engines] == ["fail", "pass"]


def test_a_node_elsewhere_is_a_note_or_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    partly = Placement({CUDA: 3, CPU: 1}, ("a (TopK)",))
    monkeypatch.setattr(candidates.OnnxCandidate, "placement", lambda *_: partly)
    monkeypatch.setattr(candidates, "placement_finding", lambda found, _: placement_finding(found, CUDA))
    said = f"1 of 4 nodes of the file ran on {CPU}: a (TopK)"
    report = judge(tmp_path)
    assert report.verdict == "pass" and said in report.notes and report.placement == partly
    report = judge(tmp_path, require_all_nodes=True)
    assert report.verdict == "fail" and report.problems == (f"ONNX Runtime: {said}",)


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
    monkeypatch.setattr(candidates, "placement_finding", lambda found, _: placement_finding(found, CUDA))
    report = judge(tmp_path)
    assert report.verdict == verdict and any(message in problem for problem in report.problems)


# -- CUDA --------------------------------------------------------------------------------------------------------------


@pytest.mark.cuda
def test_a_file_runs_on_cuda_and_what_does_not_is_listed(tmp_path: Path) -> None:
    if problem := cuda_problem():
        pytest.skip(problem)
    report = judge(tmp_path, "cuda")
    assert report.verdict == "pass" and report.provider == CUDA
    assert report.placement is not None and report.placement.nodes[CUDA] > 0 and report.engines
