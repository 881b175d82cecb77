"""What is said where a model or a file is not what it should be: the cause, and the way out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

import bnfold
from bnfold.errors import CaptureError, InputError
from bnfold.lowering.lower import _rejected
from bnfold.render import Progress

IMAGE = torch.randn(2, 3, 8, 10, generator=torch.Generator().manual_seed(0))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    bnfold.export(net(), tmp_path / "net.onnx", (IMAGE,), device="cpu")
    return tmp_path / "net.onnx"


def test_channels_first_and_last(file: Path) -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x.permute(0, 3, 1, 2))

    with pytest.raises(InputError, match="the model takes NHWC and the file NCHW"):
        bnfold.check(file, Last(), (IMAGE.permute(0, 2, 3, 1).contiguous(),), device="cpu")
    bnfold.export(Last(), file, (IMAGE.permute(0, 2, 3, 1).contiguous(),), device="cpu")
    with pytest.raises(InputError, match="the model takes NCHW and the file NHWC"):
        bnfold.check(file, net(), (IMAGE,), device="cpu")


@pytest.mark.parametrize("outputs", [1, 3])
def test_a_file_in_training_mode(outputs: int, file: Path) -> None:
    names = ["y", "mean", "var"][:outputs]
    mode = {"training_mode": 1} if outputs == 3 else {}
    node = helper.make_node("BatchNormalization", ["x", "s", "b", "m", "v"], names, name="norm", **mode)
    if outputs == 1:
        node.output.extend(["", "mean"])
    ones = [numpy_helper.from_array(torch.ones(3).numpy(), name) for name in "sbmv"]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 3, 8, 10]) for name in ("x", "y")]
    graph = helper.make_graph([node], "g", values[:1], values[1:], ones)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), file)
    with pytest.raises(InputError, match=r"BatchNormalization 'norm' is in training mode.*model\.eval\(\)"):
        bnfold.check(file, nn.BatchNorm2d(3), (IMAGE,), device="cpu")
    if outputs == 3:  # there is no verdict on it, but it runs, and where it goes wrong can be told
        found = bnfold.bisect(file, nn.BatchNorm2d(3), (IMAGE,), device="cpu")
        assert found.culprit is not None and found.culprit.node == "norm"


def test_float16_inside_a_file(file: Path) -> None:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 3, 8, 10]) for name in "xy")
    nodes = [
        helper.make_node("Cast", ["x"], ["h"], to=TensorProto.FLOAT16), helper.make_node("Mul", ["h", "w"], ["m"]),
        helper.make_node("Cast", ["m"], ["y"], to=TensorProto.FLOAT),
    ]  # fmt: skip
    weight = numpy_helper.from_array(torch.tensor(0.3).half().numpy(), "w")
    graph = helper.make_graph(nodes, "g", [x], [y], [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), file)

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor(0.3))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.w

    report = bnfold.check(file, Scaled(), (IMAGE,), device="cpu")
    assert not report.passed and any("--dtype float16" in note for note in report.notes)
    half = bnfold.check(file, Scaled(), (IMAGE,), device="cpu", dtype=torch.float16)
    assert not any("--dtype float16" in note for note in half.notes)


def test_packed_sequences() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.GRU(8, 6, batch_first=True)

        def forward(self, x: Tensor, lengths: Tensor) -> Any:
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            return nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0]

    with pytest.raises(CaptureError, match=r"test_hints.py:\d+ in forward.*packed sequences: give"):
        bnfold.fold(Packed(), (torch.randn(2, 5, 8), torch.tensor([5, 3])))


def test_a_shape_that_onnx_rejects_names_its_module() -> None:
    text = (
        "[ShapeInferenceError] Inference error(s): (op_type:Squeeze, node name: encoder.rnn/Squeeze_3): "
        "[ShapeInferenceError] Dimension of input 1 must be 1 instead of 8"
    )
    error = _rejected(text)
    assert error.where == "module 'encoder.rnn'" and "Squeeze" in error.what and error.what.endswith("1 instead of 8")
    assert "rejects the file: something" in _rejected("something").what


def test_what_is_said_while_it_lasts_is_printed_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    import sys

    with Progress(sys.stderr, quiet=False) as progress:
        progress("capture", 0, 1)
        progress("capture: 'cell' is walked step by step", 0, 1)
        assert "'cell' is walked step by step" in capsys.readouterr().err
        progress("fold", 0, 1)
    assert [line.split(" ...")[0] for line in capsys.readouterr().err.splitlines()] == ["capture", "fold"]


def branches(kind: Callable[[], nn.Module]) -> nn.Module:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.a, self.b = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), kind(), kind()

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.conv(x))
            return torch.cond(y.sum() > 0, lambda y: self.a(y), lambda y: self.b(y), (y,))

    return Branching().eval()


def test_norms_in_branches_stay_and_those_before_them_go_back_into_the_class() -> None:
    model = branches(lambda: nn.BatchNorm2d(4))
    folded = bnfold.fold(model, (IMAGE,))
    written = folded.apply_to(model)
    assert isinstance(written.norm, nn.Identity) and isinstance(written.a, nn.BatchNorm2d)
    left = {entry.module: {refusal.reason for refusal in entry.refusals} for entry in folded.ledger.left}
    assert left == {"a": {"region"}, "b": {"region"}} and folded.ledger.count() == (1, 3)
