"""The gate on outputs of a few numbers, on None, on NaN, on faults at one batch size, on constants that decide."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F

import bnfold
from bnfold.gate.gate import Gate
from bnfold.gate.samples import batches
from bnfold.graph.capture import capture
from bnfold.graph.dimensions import Sizes
from bnfold.graph.graph import Graph
from bnfold.graph.interpret import Runner
from bnfold.passes.folding import fold
from bnfold.report import Ledger

torch.set_num_threads(1)
IMAGE = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self, run: Callable[[Tensor], Any], layers: int = 2) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        for i in range(layers):
            parts += [nn.Conv2d(8 if i else 3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
        self.body, self.run = nn.Sequential(*parts), run

    def forward(self, x: Tensor) -> Any:
        return self.run(self.body(x))


def net(run: Callable[[Tensor], Any], layers: int = 2, seed: int = 0) -> nn.Module:
    return zoo.randomize(zoo.he_init(Net(run, layers)), seed).eval()


@pytest.mark.parametrize(
    ("run", "names"),
    [
        (lambda y: (y, None), ["output_0"]),
        (lambda y: (None, y.tanh()), ["output_1"]),
        (lambda y: {"aux": None, "logits": y}, ["logits"]),
        (lambda y: (y, None, y * 2), ["output_0", "output_2"]),
    ],
)
def test_none_among_the_outputs(run, names, tmp_path):
    report = bnfold.export(net(run), tmp_path / "net.onnx", (IMAGE,), device="cpu")
    assert report.passed, report.check.problems
    assert list(dict.fromkeys(output.output for output in report.check.outputs)) == names
    assert bnfold.check(tmp_path / "net.onnx", net(run), (IMAGE,), device="cpu").passed


EMPTY: dict[str, Callable[[Tensor], Any]] = {
    "no channels": lambda y: (y, y[:, :0]),
    "none left of the batch": lambda y: (y, y[y.shape[0] :]),
    "no batch": lambda y: (y, y[0, 0, 0, :0]),
    "integers": lambda y: (y, torch.zeros(y.shape[0], 0, dtype=torch.int64)),
}


@pytest.mark.parametrize("case", EMPTY)
def test_an_output_without_elements_is_compared_by_its_shape(case, tmp_path):
    path = tmp_path / "net.onnx"
    report = bnfold.export(net(EMPTY[case]), path, (IMAGE,), device="cpu")
    assert report.passed, report.check.problems
    assert {output.output for output in report.check.outputs} == {"output_0", "output_1"}
    model = net(lambda y: (y, EMPTY[case](y)[1][..., None]))
    assert any("instead of" in problem for problem in bnfold.check(path, model, (IMAGE,), device="cpu").problems)


def test_outputs_without_elements_alone_prove_nothing(tmp_path):
    report = bnfold.export(net(lambda y: y[:, :0]), tmp_path / "net.onnx", (IMAGE,), device="cpu")
    assert report.check.verdict == "inconclusive" and not list(tmp_path.iterdir())
    assert "ONNX Runtime: no output has an element to compare" in " ".join(report.check.problems)


@pytest.mark.parametrize("seed", range(3))
def test_an_output_of_one_number_is_no_lottery(seed, tmp_path):
    report = bnfold.export(net(torch.mean, 14, seed), tmp_path / "net.onnx", (IMAGE,), device="cpu", seed=seed)
    assert report.passed, report.check.problems
    assert report.check.samples > 16  # ten runs


def judged(module: nn.Module, change: Callable[[dict[str, Tensor]], None] | None = None) -> bnfold.CheckReport:
    captured = capture(module, (IMAGE,))
    graph = Graph(captured.program)
    ledger = fold(graph)
    folded = graph.finish()
    if change is not None:
        change(folded.state_dict)
    return Gate(captured, ledger, folded).judge()


def test_an_output_of_one_number_that_is_wrong_fails():
    def change(constants):
        constants["body.0.weight"] = constants["body.0.weight"] * (1 + 1e-4)

    assert judged(net(torch.mean, 3)).verdict == "pass" and judged(net(torch.mean, 3), change).verdict == "fail"


@pytest.mark.parametrize(("off", "verdict"), [(0.0, "pass"), (6e-6, "fail")])
def test_a_fold_is_judged_in_float64_where_no_kernel_rounds(off, verdict):
    def change(constants):
        constants["body.3.weight"] = constants["body.3.weight"] * (1 + off)

    assert judged(net(torch.tanh), change).verdict == verdict


def test_a_class_that_gives_nan_fails(monkeypatch):
    captured = capture(net(torch.tanh), (IMAGE,))
    other = net(lambda y: torch.where(y > 1.5, torch.nan, y.tanh()))
    report = Gate(captured, Ledger(), captured.program, eager=other).judge()
    assert report.verdict == "fail" and any("folded class" in p and "NaN" in p for p in report.problems)
    assert Gate(captured, Ledger(), captured.program, eager=net(torch.tanh)).judge().passed


def test_one_element_in_a_large_output_is_a_fault():
    """One pixel of one channel, a twentieth of what is typical there, beside channels a thousand times as large."""
    loud = torch.tensor([1e-3, 1.0, 1e3, 1.0, 1.0, 1.0, 1.0, 1.0])[:, None, None]
    captured = capture(net(lambda y: y * loud), (IMAGE,))
    spot = torch.zeros(8, 12, 12)
    spot[0, 3, 4] = 1e-7
    other = capture(net(lambda y: y * loud + spot), (IMAGE,)).program
    report = Gate(captured, Ledger(), other).judge()
    assert report.verdict == "fail" and "0, 3, 4]" in report.problems[0], report.problems


class Reordered(nn.Module):
    """Channels in an order that is kept as floats, and a branch that no output shows."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.second, self.last = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
        self.register_buffer("order", torch.tensor([3, 1, 0, 2, 5, 4, 7, 6]).to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        middle = self.norm(self.first(x)).relu()[:, self.order.long()]
        return self.last(self.second(middle)).relu() * 1e-9 + x.mean((1, 2, 3), keepdim=True)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_a_constant_that_decides_is_not_disturbed(dtype):
    def change(constants):
        constants["second.weight"] = constants["second.weight"] * 1.05

    module = zoo.randomize(Reordered(dtype)).eval()
    assert judged(module).verdict == "pass" and judged(module, change).verdict == "fail"
    program = capture(module, (IMAGE,)).program
    moved, still = (Runner(program, precise=True, jitter=jitter)((IMAGE,)) for jitter in (True, False))
    assert torch.allclose(moved[0], still[0], rtol=1e-5) and not torch.equal(moved[0], still[0])


@pytest.mark.parametrize(("low", "expected"), [(4, [4, 7, 5]), (2, [1, 2, 7, 6]), (8, [8, 8])])
def test_a_declared_least_batch_is_kept(low, expected):
    shapes = ({0: Dim("n", min=low, max=64)},)
    captured = capture(net(torch.tanh), (torch.randn(8, 3, 12, 12),), dynamic_shapes=shapes)
    made = batches(captured.program, captured.names, captured.flat, sizes=captured.sizes)
    assert [batch.size for batch in made if batch.size != 64 and not batch.origin] == expected


def test_a_bias_free_conv3d_is_exported(tmp_path: Path):
    module = nn.Sequential(nn.Conv3d(3, 4, 3, 1, 1, bias=False), nn.ReLU(), nn.Conv3d(4, 2, 1, bias=False))
    report = bnfold.export(module, tmp_path / "net.onnx", (torch.randn(2, 3, 4, 6, 6),), device="cpu")
    assert report.passed, report.check.problems


class Two(nn.Module):
    """Two inputs whose batches torch.export cannot tell to be one; only equal ones make sense."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Linear(4, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.einsum("bchw,bc->bhw", x, self.table(y))


def test_inputs_have_one_batch_unless_told_otherwise():
    captured = capture(Two(), (IMAGE, torch.randn(2, 4)))
    report = Gate(captured, bnfold.Ledger(), captured.program).judge()
    assert report.verdict == "pass" and not report.notes


class Apart(nn.Module):
    """Two inputs whose batches torch.export keeps apart."""

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x * 2, y.flatten(1)


def test_batches_kept_apart_are_tried_alike():
    captured = capture(Apart(), (IMAGE, torch.randn(2, 4, 3)))
    assert len(captured.sizes.alike) == 1
    for sizes, same in ((captured.sizes, True), (Sizes(captured.ranges), False)):
        made = batches(captured.program, captured.names, captured.flat, sizes=sizes)
        assert all(b.flat[0].shape[0] == b.flat[1].shape[0] == b.size for b in made) == same
    apart = capture(Apart(), (IMAGE, torch.randn(2, 4, 3)), dynamic_shapes=({0: Dim("n")}, {0: Dim("m")}))
    assert not apart.sizes.alike
    named = capture(Apart(), (IMAGE, torch.randn(2, 4, 3)), dynamic_shapes=({0: "n"}, {0: "n"}))
    assert len(named.sizes.alike) == 1 and list(named.dims.values()) == ["n", "n"]


def test_bfloat16_in_the_model_itself_needs_no_option(tmp_path: Path):
    """ONNX has a bfloat16 convolution from opset 22 on, whoever asked for bfloat16."""
    module = net(torch.tanh).bfloat16()
    report = bnfold.export(module, tmp_path / "net.onnx", (IMAGE.bfloat16(),), device="cpu", check=False)
    assert report.file.opset >= 22
    assert bnfold.export(net(torch.tanh), tmp_path / "net.onnx", (IMAGE,), device="cpu", check=False).file.opset < 22


@pytest.mark.parametrize(("kept", "verdict"), [(True, "inconclusive"), (False, "pass")])
def test_outputs_that_read_no_input_are_no_pass(kept, verdict):
    class Kept(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(4))

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return (self.table * 2,) if kept else (self.table * 2, x * self.table[0])

    captured = capture(Kept(), (IMAGE,))
    report = Gate(captured, bnfold.Ledger(), captured.program).judge()
    assert report.verdict == verdict and kept == any("no output depends" in said for said in report.problems)


@pytest.mark.parametrize(
    ("last", "rows", "verdict"), [(0.0, 10, "inconclusive"), (1.0, 10, "pass"), (0.0, 1, "inconclusive")]
)
def test_outputs_that_never_differ_are_no_pass(last, rows, verdict):
    """A last layer of zeros, as some libraries make it, hides all before it."""
    layer = nn.Conv2d(8, 2, 1)
    layer.weight.data *= last
    module = nn.Sequential(net(torch.tanh), layer).eval()
    captured = capture(module, (IMAGE,))
    data = {captured.names[0]: torch.randn(rows, *IMAGE.shape[1:]).numpy()}
    report = Gate(captured, bnfold.Ledger(), captured.program, data=data).judge()
    assert report.verdict == verdict
    assert (verdict == "inconclusive") == any("every output is the same" in said for said in report.problems)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_parameter_of_the_dtype_of_a_value_is_a_constant(dtype, tmp_path):
    """torch.onnx gives what ``type_as`` returns the name of its operand's initializer, and then fails."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.scale = nn.Conv2d(3, 4, 1), nn.Parameter(torch.randn(4, 1, 1, dtype=dtype))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.conv(x)
            return y * self.scale.type_as(y), y.mean((1, 2, 3))

    report = bnfold.export(Scaled(), tmp_path / "net.onnx", (IMAGE,), device="cpu")
    assert report.passed
    (entry,) = report.ledger.left
    assert entry.refusals[0].reason == "several-readers"


class Sampled(nn.Module):
    """A grid of its own making, whose middle torch.onnx computes to a rounding of one and float64 to zero."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.theta = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        theta = self.theta(y.mean((2, 3))).view(-1, 2, 3) * 0.1 + torch.eye(3)[:2]
        return F.grid_sample(y, F.affine_grid(theta, (x.shape[0], 8, 7, 9), align_corners=False), align_corners=False)


def test_a_table_that_float32_computes_is_no_fault(tmp_path: Path):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        module = Sampled()
    report = bnfold.export(zoo.randomize(module), tmp_path / "net.onnx", (torch.randn(2, 3, 13, 12),))
    assert report.passed, report.check
