"""No value is stored so that a reader loses its digits, and no file passes that loses them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn

import bnfold
from bnfold.gate import deployed
from bnfold.gate.evidence import EXCUSE, Draws, Source
from bnfold.passes import cancellation
from bnfold.report import CheckReport, Ledger

IMAGE = torch.randn(2, 3, 9, 11, generator=torch.Generator().manual_seed(0))


class TwoNorms(nn.Module):
    """Two BatchNorms read one convolution; in one channel of the first ``gamma`` is next to nothing."""

    def __init__(self, gamma: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.first, self.second = nn.Conv2d(3, 7, 3), nn.BatchNorm2d(7), nn.BatchNorm2d(7)
        with torch.no_grad():
            self.first.weight[2], self.first.bias[2] = gamma, 0.75
            self.first.running_mean.normal_(), self.second.running_mean.normal_()
        self.eval()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.conv(x)
        return self.first(x), self.second(x).relu()


def left(ledger: Ledger) -> dict[str, set[str]]:
    return {entry.module: {refusal.reason for refusal in entry.refusals} for entry in ledger.left}


def error(outputs: tuple[Tensor, Tensor], truth: tuple[Tensor, Tensor]) -> float:
    """RMS, of the second output in the channel with the small gamma."""
    return float((outputs[1] - truth[1]).detach()[:, 2].double().square().mean().sqrt())


GAMMAS = [1e-2, 1e-3, 1e-6, 1e-10]


@pytest.mark.parametrize("gamma", [1.0, *GAMMAS])
def test_the_other_norm_folds_where_the_first_would_cost_digits(gamma: float) -> None:
    net = TwoNorms(gamma)
    folded = bnfold.fold(net, (IMAGE,))
    assert folded.ledger.count() == (1, 2)
    if gamma < 1:
        assert left(folded.ledger) == {"first": {"cancellation"}}
    else:
        assert left(folded.ledger).keys() == {"second"}
    given, plain = folded.module(IMAGE), net(IMAGE)
    truth = net.double()(IMAGE.double())
    assert error(given, truth) <= (1 + cancellation.MOST) * error(plain, truth)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_without_that_rule_the_gate_refuses(gamma: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What rounding the file's own constants does is no excuse for a file that makes more of it than the model."""
    monkeypatch.setattr(cancellation, "MOST", float("inf"))
    report = bnfold.export(TwoNorms(gamma), tmp_path / "net.onnx", (IMAGE,), device="cpu")
    assert left(report.ledger).keys() == {"second"}
    assert report.check is not None and report.check.verdict == "fail" and not list(tmp_path.iterdir())
    assert "the file in float64, output 'output_1'" in report.check.problems[0]


def test_a_file_folds_as_the_model_does(tmp_path: Path) -> None:
    net, path = TwoNorms(1e-6), tmp_path / "net.onnx"
    constants = {name: value.numpy() for name, value in net.state_dict().items() if value.ndim}
    norms = ("weight", "bias", "running_mean", "running_var")
    nodes = [helper.make_node("Conv", ["x", "conv.weight", "conv.bias"], ["c"])]
    nodes += [
        helper.make_node("BatchNormalization", ["c", *(f"{name}.{part}" for part in norms)], [name], name)
        for name in ("first", "second")
    ]
    shapes = {"x": ["N", 3, 9, 11], "first": ["N", 7, 7, 9], "second": ["N", 7, 7, 9]}
    values = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "net", values[:1], values[1:], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    report = bnfold.export(path, tmp_path / "folded.onnx", device="cpu")
    assert report.passed and left(report.ledger) == {"first": {"cancellation"}}


@pytest.mark.parametrize(("dtype", "goes"), [(torch.float16, False), (torch.float32, True)])
def test_what_is_stored_may_not_be_subnormal(dtype: torch.dtype, goes: bool) -> None:
    """Without a shift nothing cancels, but float16 has no digits left at 1e-7."""
    net = TwoNorms(1.0).to(dtype)
    with torch.no_grad():
        net.first.weight[2], net.first.bias[2], net.first.running_mean[2] = 1e-6, 0.0, 0.0
    folded = bnfold.fold(net, (IMAGE.to(dtype),))
    assert ("first" not in left(folded.ledger)) is goes


# -- the gate ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("times", "counted"), [(EXCUSE / 2, EXCUSE / 2), (64 * EXCUSE, EXCUSE)])
def test_a_claims_own_rounding_excuses_so_much_and_no_more(times: float, counted: float) -> None:
    value = torch.randn(4, 5, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def moved(by: float) -> Source:
        def draw(seed: int) -> list[Tensor]:
            noise = torch.randn(value.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
            return [value + by * 1e-6 * noise]

        return Source([value], draw)

    draws = Draws([moved(1.0), moved(times)])
    draws.more(4)
    found = float(draws.noise(0).square().mean().sqrt()) / 1e-6
    assert found == pytest.approx((1 + counted**2) ** 0.5, rel=0.1)


@pytest.mark.parametrize(("bits", "verdict"), [(1, "pass"), (12, "fail"), (20, "fail"), (30, "fail")])
def test_digits_that_are_lost_between_right_operators_are_a_fault_of_the_file(
    bits: int, verdict: str, tmp_path: Path
) -> None:
    """``(x * 2^-bits + 1 - 1) * 2^bits`` is x, but for all the digits below the one that is added."""
    net = nn.Sequential(nn.Conv2d(3, 7, 3), nn.ReLU()).eval()
    path = tmp_path / "net.onnx"
    bnfold.export(net, path, (IMAGE,), device="cpu")
    model = onnx.load(path)
    graph = model.graph
    conv, *rest = graph.node
    result, conv.output[0] = conv.output[0], "v0"
    steps = [("Mul", 2.0**-bits), ("Add", 1.0), ("Sub", 1.0), ("Mul", 2.0**bits)]
    for i, (operator, number) in enumerate(steps):
        graph.initializer.append(numpy_helper.from_array(np.float32(number), f"n{i}"))
        steps[i] = helper.make_node(operator, [f"v{i}", f"n{i}"], [f"v{i + 1}" if i < 3 else result])
    del graph.node[:]
    graph.node.extend([conv, *steps, *rest])
    onnx.save(model, path)
    report: CheckReport = bnfold.check(path, net, (IMAGE,), device="cpu")
    assert report.verdict == verdict, report.problems
    if bits in (12, 20):
        (problem,) = report.problems
        assert "though every operator is right" in problem


class Faint(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2.0**-30


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_small_numbers_are_no_digits_that_are_lost(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """They are rounded in the model's dtype: where bfloat16 has all of its digits, float16 has none left."""
    own, asked = deployed.Sessions.run_plain, list[str]()

    def run_plain(sessions: deployed.Sessions) -> None:
        own(sessions)
        for case in sessions.judge.cases:
            sessions._lose(case)
            asked.append(case.words)

    monkeypatch.setattr(deployed.Sessions, "run_plain", run_plain)
    net = Faint(nn.Conv2d(3, 7, 3), nn.ReLU()).eval()
    report = bnfold.export(net, tmp_path / "net.onnx", (IMAGE,), device="cpu", dtype=dtype)
    assert asked and report.passed, report.check.problems
