"""What an example and the asked sizes make of a model: a sample stays one, letters are as dynamic as it allows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import bnfold
from bnfold.errors import BnfoldError, CaptureError
from bnfold.graph.capture import Captured, capture
from bnfold.graph.dimensions import number
from bnfold.graph.interpret import Runner

ONE = torch.randn(1, 3, 12, 16, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A convolution, its BatchNorm, and whatever comes after."""

    def __init__(self, after: Callable[[Tensor], Any] = lambda y: y) -> None:
        super().__init__()
        self.conv, self.norm, self.after = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), after

    def forward(self, x: Tensor) -> Any:
        return self.after(self.norm(self.conv(x)))


def shape(captured: Captured) -> list[str | int]:
    """The first input's shape, symbols by the names that the user knows."""
    (x,) = (node for node in captured.program.graph.find_nodes(op="placeholder") if node.name == captured.names[0])
    return [captured.dims.get(str(n)) or number(n) or 0 for n in x.meta["val"].shape]


def agrees(captured: Captured, x: Tensor) -> None:
    (found,), (wanted,) = Runner(captured.program)((x,)), captured.run_eager((x,))
    assert torch.equal(found, wanted)


# -- an example of one sample ------------------------------------------------------------------------------------------

#: What a model does with one sample that it does not do with two, and what is said of that.
SINGLES: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "loops": (lambda y: torch.stack([row / row.abs().max() for row in y]), "specialises it"),
    "asks": (lambda y: y.contiguous() if y.shape[0] >= 64 else y, "takes batches of 2 to 63 only"),
    "branches": (lambda y: y * 2 if y.shape[0] == 1 else y.sum(0), "returns other shapes"),
    "squeezes": (lambda y: y.mean((2, 3)).squeeze(), "returns other shapes"),
    "fails for two": (lambda y: y.reshape(1, 4, 12, 16), "cannot be captured"),
    "asserts": (lambda y: (y, [][len(y) - 1 :])[0] if len(y) == 1 else [][0], "cannot be captured"),
}


@pytest.mark.parametrize("name", SINGLES)
def test_a_model_for_one_sample_takes_one(name: str) -> None:
    after, said = SINGLES[name]
    captured = capture(Net(after), (ONE,))
    assert shape(captured) == [1, 3, 12, 16]
    assert len(captured.notes) == 1 and said in captured.notes[0] and "the batch is fixed" in captured.notes[0]
    agrees(captured, ONE)


def test_an_example_of_one_sample_has_a_dynamic_batch_where_the_model_does() -> None:
    captured = capture(Net(), (ONE,))
    assert shape(captured) == ["batch", 3, 12, 16] and not captured.notes
    for size in (1, 2, 5):
        agrees(captured, torch.randn(size, 3, 12, 16))


@pytest.mark.parametrize("hint", [Dim.AUTO, Dim.DYNAMIC, "H", Dim("H", min=4)])
def test_a_fixed_one_stays_one_beside_dynamic_sizes(hint: Any) -> None:
    captured = capture(Net(), (ONE,), dynamic_shapes=({2: hint, 3: Dim.AUTO},))
    assert shape(captured) == [1, 3, "H" if hint is not Dim.AUTO and hint is not Dim.DYNAMIC else "x_dim2", "x_dim3"]
    agrees(captured, torch.randn(1, 3, 7, 9))


def test_a_dynamic_axis_of_size_one_is_no_constant() -> None:
    captured = capture(Net(), (torch.randn(1, 3, 1, 16),), dynamic_shapes=({0: "N", 2: "H"},))
    assert shape(captured) == ["N", 3, "H", 16]
    agrees(captured, torch.randn(3, 3, 5, 16))


def test_only_the_axis_that_the_code_fixes_is_fixed() -> None:
    loops = Net(SINGLES["loops"][0])
    captured = capture(loops, (ONE,), dynamic_shapes=({0: Dim.AUTO, 2: Dim.AUTO},))
    assert shape(captured) == [1, 3, "x_dim2", 16] and "the batch is fixed" in captured.notes[0]
    agrees(captured, torch.randn(1, 3, 9, 16))


def test_a_table_with_as_many_rows_as_a_widened_batch_is_none() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, table: Tensor) -> Tensor:
            return x + table.sum(0)

    captured = capture(Two(), (torch.randn(1, 4), torch.randn(2, 4)))
    shapes = [tuple(n.meta["val"].shape) for n in captured.program.graph.find_nodes(op="placeholder")]
    assert [isinstance(each[0], int) for each in shapes] == [False, True] and len(captured.dims) == 1


# -- letters -----------------------------------------------------------------------------------------------------------


def test_letters_are_as_dynamic_as_the_model_allows(tmp_path: Path) -> None:
    class Half(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            small = nn.functional.max_pool2d(x, 4)
            return torch.cat([nn.functional.interpolate(small, scale_factor=4.0), x], 1)

    report = bnfold.export(
        nn.Sequential(Net(), Half()), tmp_path / "net.onnx", (ONE,), dynamic_shapes=({0: "N", 2: "H", 3: "W"},)
    )  # fmt: skip
    assert report.passed and "sizes that it takes: N: any; H, W: multiples of 4 from 8 up" in report.notes
    assert not report.check.notes  # no size was tried that the model does not take
    (info,) = onnx.load(tmp_path / "net.onnx").graph.input
    assert [d.dim_param or d.dim_value for d in info.type.tensor_type.shape.dim] == ["N", 3, "H", "W"]


@pytest.mark.parametrize("wanted", ["H", Dim("H"), Dim("H", min=4, max=64)])
def test_a_letter_that_the_code_fixes_is_an_error_at_its_line(wanted: Any) -> None:
    def fixes(y: Tensor) -> Tensor:
        return y * int(y.shape[2])

    with pytest.raises(CaptureError) as caught:
        capture(Net(fixes), (ONE,), dynamic_shapes=({0: "N", 2: wanted},))
    assert caught.value.where == f"test_asking.py:{fixes.__code__.co_firstlineno + 1} in fixes"
    assert "'H' (axis 2 of input 'x') cannot be dynamic: the model's code fixes it at 12" in str(caught.value)


def test_a_range_narrows_what_the_model_allows() -> None:
    captured = capture(Net(), (ONE.expand(2, 3, 12, 16),), dynamic_shapes=({2: Dim("H", min=8, max=32)},))
    assert captured.notes == ("sizes that it takes: H: 8 to 32",) and list(captured.ranges.values()) == [(8, 32)]


def test_multiples_of_a_dimension() -> None:
    h = Dim("h", min=1, max=16)
    captured = capture(Net(), (ONE,), dynamic_shapes=({2: 4 * h},))
    assert list(captured.dims.values()) == ["h"] and captured.notes == ("sizes that it takes: h: up to 16",)
    agrees(captured, torch.randn(1, 3, 20, 16))

    class Halved(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.unflatten(1, (-1, 6)).sum(1)

    captured = capture(Halved(), (torch.randn(2, 12),), dynamic_shapes=({1: 4 * Dim("h")},))  # it takes multiples of 6
    agrees(captured, torch.randn(2, 18))


# -- what torch.export does not get through ----------------------------------------------------------------------------


def test_what_plain_tracing_fails_at_is_compiled() -> None:
    class Only(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling():
                raise NotImplementedError("plain tracing")
            return x.relu() * 2

    captured = capture(Only(), (torch.randn(2, 3),))
    assert captured.dims
    agrees(captured, torch.randn(5, 3))


# -- state -------------------------------------------------------------------------------------------------------------


class Leaky(nn.Module):
    """A leaky integrator, as spiking nets have them."""

    def __init__(self) -> None:
        super().__init__()
        self.v: Any = 0.0

    def forward(self, x: Tensor) -> Tensor:
        self.v = self.v * 0.5 + x
        return torch.sigmoid(self.v)


class Listed(Leaky):
    """Keeps all it has seen in a list, and answers with the last but one."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return self.seen[max(len(self.seen) - 2, 0)] * 2


class Memory:
    """No module, and no container that anybody looks into."""

    last: Any = None


class Hidden(Leaky):
    """Keeps it out of sight."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = Memory()

    def forward(self, x: Tensor) -> Tensor:
        last, self.memory.last = self.memory.last, x
        return x if last is None or last.shape != x.shape else x - last * 0.5


class Cached(Leaky):
    """Keeps what it computed for the last size, which is no state."""

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(self.v, Tensor) or self.v.shape[0] != x.shape[-1]:
            self.v = torch.arange(x.shape[-1], dtype=x.dtype)
        return x * self.v


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("kind", [Leaky, Listed])
def test_state_from_call_to_call_is_refused(kind: type[nn.Module], static: bool) -> None:
    model = nn.Sequential(Net(), kind())
    with pytest.raises(CaptureError, match=r"attribute '1\.(v|seen).*keeps state from call to call.*Take the state"):
        bnfold.fold(model, (ONE.repeat(2, 1, 1, 1),), static=static)
    assert model[1].v == 0.0 and not getattr(model[1], "seen", [])


@pytest.mark.parametrize("static", [False, True])
def test_state_out_of_sight_is_no_pass_and_no_advice_makes_it_one(static: bool, tmp_path: Path) -> None:
    model = nn.Sequential(Net(), Hidden())
    try:
        report = bnfold.export(model, tmp_path / "net.onnx", (ONE.repeat(2, 1, 1, 1),), static=static)
    except BnfoldError as error:
        assert "state" in str(error)
        return
    assert not report.passed and any("keeps state" in problem for problem in report.check.problems)
    assert not any("--static" in problem for problem in report.check.problems)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
def test_what_is_kept_for_a_size_is_no_state(static: bool, batch: int, tmp_path: Path) -> None:
    model = nn.Sequential(Net(), Cached())
    report = bnfold.export(model, tmp_path / "net.onnx", (ONE.repeat(batch, 1, 1, 1),), static=static)
    assert report.passed and report.check.samples >= 10 and model[1].v == 0.0


# -- recurrent layers --------------------------------------------------------------------------------------------------

LAYERS: list[tuple[Callable[..., nn.Module], dict[str, Any]]] = [
    (nn.LSTM, {}),
    (nn.LSTM, {"bidirectional": True, "num_layers": 2, "bias": False}),
    (nn.GRU, {}),
    (nn.GRU, {"bidirectional": True, "batch_first": False}),
    (nn.RNN, {}),
    (nn.RNN, {"nonlinearity": "relu", "num_layers": 2}),
    (nn.RNN, {"bidirectional": True, "num_layers": 2}),
    (nn.RNN, {"bias": False, "batch_first": False}),
]


class Recurrent(nn.Module):
    def __init__(self, kind: Callable[..., nn.Module], options: dict[str, Any]) -> None:
        super().__init__()
        self.rnn, self.norm = kind(8, 6, **{"batch_first": True, **options}), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Any:
        return self.rnn(self.norm(x.transpose(1, 2)).transpose(1, 2))


@pytest.mark.parametrize(("kind", "options"), LAYERS)
def test_time_stays_dynamic_behind_recurrent_layers(kind: Any, options: dict[str, Any], tmp_path: Path) -> None:
    x = torch.randn(2, 20, 8, generator=torch.Generator().manual_seed(1))
    model = Recurrent(kind, options)
    report = bnfold.export(model, tmp_path / "net.onnx", (x,), dynamic_shapes=({0: "N", 1: "T"},))
    assert report.passed and "sizes that it takes: N, T: any" in report.notes
    graph = onnx.load(tmp_path / "net.onnx").graph
    assert [d.dim_param for d in graph.input[0].type.tensor_type.shape.dim] == ["N", "T", ""]
    layers = [node.op_type for node in graph.node if node.op_type in ("LSTM", "GRU", "RNN")]
    assert len(layers) == options.get("num_layers", 1) and len(graph.node) < 40


def test_a_layer_with_projections_says_what_onnx_lacks(tmp_path: Path) -> None:
    model = Recurrent(nn.LSTM, {"proj_size": 3})
    with pytest.raises(BnfoldError, match=r"'rnn'.*proj_size"):
        bnfold.export(model, tmp_path / "net.onnx", (torch.randn(2, 5, 8),))


def test_a_walk_step_by_step_is_told_while_it_goes_on() -> None:
    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(120):
                x = self.cell(x)
            return x

    said: list[str] = []
    capture(Steps(), (torch.randn(2, 3),), say=said.append)
    assert len(said) == 1 and "'cell' is walked step by step" in said[0]
