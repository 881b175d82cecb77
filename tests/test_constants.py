"""Constants of bnfold's own files: an edit that shows at no output is seen, a model stored otherwise is none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import zoo
from onnx import numpy_helper
from torch import Tensor, nn

import bnfold
from bnfold.evaluate.weights import Weight
from bnfold.gate.constants import damaged
from bnfold.graph.capture import capture
from bnfold.lowering import lower

torch.set_num_threads(1)
Edit = Callable[[np.ndarray[Any, Any]], None]


class Gated(nn.Module):
    """Channel 3 is closed on whatever the gate or anybody feeds it, but for numbers that are far out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).clamp(0, 6))


@pytest.fixture(scope="module")
def net() -> Gated:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Gated()
    zoo.randomize(zoo.he_init(net))
    with torch.no_grad():
        net.norm.bias[3] = -1e5
    return net.eval()


X = (torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)),)


def edited(path: Path, name: str, edit: Edit, *, tool: str = "") -> Path:
    """The file with a constant edited, and, where another ``tool`` is named, no word of bnfold in it."""
    model = onnx.load(path)
    tensor = next(t for t in model.graph.initializer if t.name == name)
    values = numpy_helper.to_array(tensor).copy()
    edit(values)
    tensor.CopyFrom(numpy_helper.from_array(values, name))
    if tool:
        model.producer_name = tool
        del model.metadata_props[:]
    target = path.with_name("edited.onnx")
    onnx.save(model, target)
    return target


def halve(values: np.ndarray[Any, Any]) -> None:
    values[3] *= 0.5


def flip(values: np.ndarray[Any, Any]) -> None:
    values.view(np.uint32).reshape(-1)[np.abs(values[0]).argmax()] ^= 1 << 3


@pytest.mark.parametrize(("name", "edit"), [("conv.bias", halve), ("conv.weight", halve), ("conv.weight", flip)])
@pytest.mark.parametrize("fold", [True, False])
def test_an_edit_that_shows_at_no_output_is_seen(name: str, edit: Edit, fold: bool, net: Gated, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    assert bnfold.export(net, path, X, fold=fold).passed and bnfold.check(path, net, X).passed
    name = name if fold else name.replace("conv.bias", "norm.bias")
    report = bnfold.check(edited(path, name, edit), net, X)
    assert report.verdict == "fail" and report.problems[0].startswith(f"constant '{name}': "), report.problems
    # Nothing else sees it.
    assert bnfold.check(edited(path, name, edit, tool="another"), net, X).passed


def test_weights_beside_the_file_are_compared_too(net: Gated, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    assert bnfold.export(net, path, X, external_data=True).passed and bnfold.check(path, net, X).passed


def test_what_lowering_does_to_a_constant_is_seen(net: Gated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    translate = lower.translate

    def nudged(*args: Any) -> Any:
        model = translate(*args)
        held = model.graph.initializers["head.bias"]
        values = held.const_value.numpy().copy()
        values[2] = np.nextafter(values[2], np.float32(np.inf))
        held.const_value = lower.ir.tensor(values, name="head.bias")
        return model

    monkeypatch.setattr(lower, "translate", nudged)
    report = bnfold.export(net, tmp_path / "net.onnx", X)
    assert report.check is not None and not report.passed and not (tmp_path / "net.onnx").exists()
    assert report.check.problems[0].startswith("constant 'head.bias': 1 of 4 elements")


def test_a_model_that_is_stored_otherwise_is_judged_by_what_it_computes(net: Gated, tmp_path: Path) -> None:
    """By hand, in float32: constants a few roundings apart, and of other sizes in some of the same names."""
    path, norm = tmp_path / "net.onnx", net.norm
    assert bnfold.export(net, path, X).passed
    other = Gated().eval()
    other.norm = nn.Identity()
    other.conv = nn.Conv2d(3, 8, 3).eval()
    other.head.load_state_dict(net.head.state_dict())
    with torch.no_grad():
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        other.conv.weight.copy_(net.conv.weight * scale[:, None, None, None])
        other.conv.bias.copy_(norm.bias - norm.running_mean * scale)
    report = bnfold.check(path, other, X)
    assert report.passed, report.problems


def test_the_same_bits_are_asked_for_in_any_dtype() -> None:
    module = nn.BatchNorm1d(4).eval()
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        captured = capture(module, (torch.randn(2, 4, dtype=dtype),), dtype=dtype)
        held = {n: bnfold.gate.values.to_numpy(x) for n, x in captured.program.state_dict.items()}
        held["weight"] = np.array([1, 1, np.nan, 1], held["weight"].dtype)
        captured.program.state_dict["weight"].data[2] = torch.nan
        weights = {n: Weight(numpy_helper.from_array(x, n), None) for n, x in held.items()}
        assert damaged(captured.program, weights, 0) == []
        held["weight"][1] = np.nextafter(held["weight"][1], held["weight"].dtype.type(2))
        weights["weight"] = Weight(numpy_helper.from_array(held["weight"], "weight"), None)
        assert len(damaged(captured.program, weights, 0)) == 1 and damaged(captured.program, weights, 6) == []
