"""Regions of a captured graph: those that change no value are looked into, autocast that rounds is not."""

from __future__ import annotations

import copy

import pytest
import torch
import zoo
from torch import Tensor, nn

import bnfold
from bnfold.graph.capture import capture

torch.set_num_threads(1)
IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        )
        self.tail = nn.Sequential(nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2))


class OtherDevice(Net):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cuda", enabled=True):
            x = self.body(x)
        return self.tail(x)


class Off(Net):
    @torch.autocast("cpu", enabled=False)
    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.body(x))


class Gradients(Net):
    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            first, second = self.body(x), x.mean()
        return self.tail(first) + second


class Nested(Net):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            with torch.enable_grad():
                x = self.body(x)
            x = x * 2
        return self.tail(x)


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
@pytest.mark.parametrize("kind", [OtherDevice, Off, Gradients, Nested])
def test_what_changes_no_value_is_looked_into(kind, tmp_path):
    module = zoo.randomize(kind()).eval()
    report = bnfold.export(module, tmp_path / "net.onnx", (IMAGE,), device="cpu")
    assert report.passed and report.ledger.count() == (3, 3) and report.file.batch_norms == 0
    assert not any("wrap_with" in str(node.target) for node in capture(module, (IMAGE,)).program.graph.nodes)
    assert {entry.module for entry in report.ledger.batch_norms} == {"body.1", "body.4", "tail.1"}


class Rounding(Net):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = self.body(x)
        return self.tail(x.float())


def test_autocast_that_rounds_stays_and_is_folded_in(tmp_path):
    module = zoo.randomize(Rounding()).eval()
    folded = bnfold.fold(module, (IMAGE,))
    assert folded.ledger.count() == (3, 3) and not folded.captured.notes
    assert any("wrap_with_autocast" in str(node.target) for node in folded.program.graph.nodes)
    assert bnfold.export(module, tmp_path / "net.onnx", (IMAGE,), device="cpu").passed


class Branches(Net):
    """Every branch has a convolution and a BatchNorm; they share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.other, self.alone = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cond(x.mean() > 0, self.body, lambda x: self.alone(torch.tanh(self.other(self.body[0](x)))), (x,))
        return self.tail(x)


def test_branches_are_folded_into(tmp_path):
    module = zoo.randomize(Branches()).eval()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    folded = bnfold.fold(module, (IMAGE,))
    assert folded.ledger.count() == (4, 5)
    (left,) = folded.ledger.left
    assert left.module == "alone" and {r.reason for r in left.refusals} == {"nonlinear", "region"}
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    run, precise = folded.program.module(), copy.deepcopy(module).double()
    for x in (IMAGE + 1, IMAGE - 1):
        truth = precise(x.double()).detach()
        assert float((run(x).detach() - truth).abs().max()) < 1e-5 * float(truth.abs().max())
    report = bnfold.export(folded.program, tmp_path / "net.onnx", device="cpu")
    assert report.passed and report.file.batch_norms == 1
