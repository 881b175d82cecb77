"""Inputs that nobody named: assumed where the first layer and a run settle them, asked for where they do not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

import bnfold
from bnfold.cli import cli
from bnfold.loading.inputs import assumed, proposed
from bnfold.loading.specs import parse_input

torch.set_num_threads(1)


class On(nn.Module):
    """A convolution of three channels, and what a case makes of its input and its answer."""

    def __init__(self, before: str = "x", after: str = "y.mean((2, 3))", layer: nn.Module | None = None) -> None:
        super().__init__()
        self.layer = layer or nn.Conv2d(3, 4, 3)
        self.before, self.after = before, after

    def forward(self, image: Tensor, scale: float = 2.0) -> Tensor:
        known = {"x": image, "scale": scale, "torch": torch}
        return eval(self.after, known | {"y": self.layer(eval(self.before, known))})


class Keyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 2)

    def forward(self, *, x: Tensor) -> dict[str, Tensor]:
        return {"y": self.body(x)}


def lenet(edge: int, features: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 6, 5), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(features, edge)
    )


TAKEN = {
    "any size": (On(), "image:float32[N,3,224,224]"),
    "one size": (lenet(28, 6 * 12 * 12), "input:float32[N,1,28,28]"),
    "another": (lenet(32, 6 * 14 * 14), "input:float32[N,1,32,32]"),
    "its dtype": (On().double(), "image:float64[N,3,224,224]"),
    "features": (nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5), nn.Linear(5, 1)), "input:float32[N,7]"),
    "one feature": (nn.Linear(1, 2), "input:float32[N,1]"),
    "a keyword and a dict": (Keyword(), "x:float32[N,6]"),
    "several answers": (On(after="(y, [y.flatten(1), scale])"), "image:float32[N,3,224,224]"),
    "not a number": (On(after="y * float('nan')"), "image:float32[N,3,224,224]"),
}
ASKED = {
    "no layer": (nn.ReLU(), "--input input:float32[N,...]"),
    "two inputs": (nn.Bilinear(2, 3, 4), "--input input1:float32[N,...] --input input2:float32[N,...]"),
    "a length": (nn.Conv1d(2, 1, 1), '--input "input:float32[N,2,1000]"'),
    "a volume": (nn.Conv3d(2, 1, 1), '--input "input:float32[N,2,32,64,64]"'),
    "channels last": (On("x.permute(0, 3, 1, 2)"), '--input "image:float32[N,3,224,224]"'),
    "a size not tried": (lenet(30, 6 * 13 * 13), '--input "input:float32[N,1,224,224]"'),
    "flattened images": (nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), '--input "input:float32[N,12]"'),
    "tokens of one sample": (On("x - x.mean(0)", "y", nn.Linear(6, 2)), '--input "image:float32[N,6]"'),
    "images that mix": (On("x.flip(0)"), '--input "image:float32[N,3,224,224]"'),
    "one answer for all": (On(after="y.mean()"), '--input "image:float32[N,3,224,224]"'),
    "rows of its own": (On(after="y[:1]"), '--input "image:float32[N,3,224,224]"'),
    "none at all": (On(after="None"), '--input "image:float32[N,3,224,224]"'),
    "chance": (On("x + torch.rand(())"), '--input "image:float32[N,3,224,224]"'),
}


@pytest.mark.parametrize("name", TAKEN)
def test_what_the_first_layer_and_a_run_settle_is_assumed(name: str) -> None:
    model, said = TAKEN[name]
    assert str(assumed(model)) == said
    assert parse_input(said) == assumed(model), "what is printed can be given"


@pytest.mark.parametrize("name", ASKED)
def test_what_they_leave_open_is_asked_for(name: str) -> None:
    model, said = ASKED[name]
    assert assumed(model) is None
    assert said in proposed(model)


def test_a_model_that_is_tried_stays_as_it_is() -> None:
    model = lenet(32, 6 * 14 * 14).train()
    held = {name: value.clone() for name, value in model.state_dict().items()}
    assert assumed(model) is not None
    assert model.training and all(torch.equal(held[name], value) for name, value in model.state_dict().items())


NET = """
from torch import nn
def images(): return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 26 * 26, 3))
def lengths(): return nn.Sequential(nn.Conv1d(1, 4, 3), nn.BatchNorm1d(4))
"""


@pytest.mark.parametrize("command", ["export", "inspect"])
def test_the_first_command_needs_no_second(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NET)
    written = ["-o", "net.onnx"] if command == "export" else []
    done = CliRunner().invoke(cli, [command, "net.py:images", *written])
    assert done.exit_code == 0, done.stderr
    assert 'assumed, after its first layer: --input "input:float32[N,1,28,28]"' in done.stdout
    assert "1 of 1 BatchNorm" in done.stdout
    given = CliRunner().invoke(cli, [command, "net.py:images", "--input", "input:float32[N,1,28,28]", *written])
    assert given.exit_code == 0 and "assumed" not in given.stdout


def test_where_it_does_the_error_has_the_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NET)
    lost = CliRunner().invoke(cli, ["export", "net.py:lengths", "-o", "net.onnx"])
    assert lost.exit_code == 3 and '--input "input:float32[N,1,1000]"' in lost.stderr and not Path("net.onnx").exists()
    health = CliRunner().invoke(cli, ["inspect", "net.py:lengths"])
    assert health.exit_code == 0 and "note: no fold plan" in health.stdout and "float32[N,1,1000]" in health.stdout
    assert "never-trained" in health.stdout


def test_python_assumes_the_same(tmp_path: Path) -> None:
    report = bnfold.export(lenet(28, 6 * 12 * 12), tmp_path / "net.onnx", device="cpu")
    assert report.passed and "input:float32[N,1,28,28]" in report.notes[0]
    assert report.interface[0].shape == ("N", 1, 28, 28)
    with pytest.raises(bnfold.InputError, match="nothing says what the model takes"):
        bnfold.export(nn.Conv1d(2, 1, 1), tmp_path / "net.onnx")
