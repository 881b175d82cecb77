"""Equalisation: the same numbers to the last bit, ranges that match, and nothing where a scale does not pass."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import bnfold
from bnfold.graph.interpret import Runner
from bnfold.loading.load import load
from bnfold.runtime.runtime import open_session

torch.set_num_threads(1)


class Pair(nn.Module):
    """Two layers with something between, and channels of very different ranges."""

    def __init__(self, between: Callable[[Tensor], Any], second: nn.Module | None = None, *, groups: int = 1) -> None:
        super().__init__()
        self.first, self.between = nn.Conv2d(3, 8, 3, groups=1), between
        self.second = second if second is not None else nn.Conv2d(8, 4, 1, groups=groups)
        with torch.no_grad():
            self.first.weight *= torch.logspace(-2, 2, 8)[:, None, None, None]
            self.first.bias *= torch.logspace(-2, 2, 8)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.second(self.between(self.first(x)))
        return found


def images(count: int = 2, size: int = 8) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def both(module: nn.Module, *args: Tensor) -> tuple[bnfold.Folded, bnfold.Folded]:
    return bnfold.fold(module, args), bnfold.fold(module, args, equalize=True)


def outputs(folded: bnfold.Folded) -> list[Tensor]:
    return Runner(folded.program)(folded.captured.flat)


PASSES: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: Pair(F.relu),
    "leaky_relu": lambda: Pair(lambda x: F.leaky_relu(x, 0.1)),
    "max_pool": lambda: Pair(lambda x: F.max_pool2d(x.relu(), 2)),
    "average": lambda: Pair(lambda x: F.adaptive_avg_pool2d(x.relu(), 1).flatten(1), nn.Linear(8, 4)),
    "flatten": lambda: Pair(lambda x: x.relu().flatten(1), nn.Linear(8 * 36, 4)),
    "groups": lambda: Pair(F.relu, groups=2),
    "depthwise": lambda: Pair(F.relu, nn.Conv2d(8, 8, 3, padding=1, groups=8)),
    "transposed": lambda: Pair(F.relu, nn.ConvTranspose2d(8, 6, 2, groups=2)),
    "padding": lambda: Pair(F.relu, nn.Conv2d(8, 4, 3, padding=1)),
}
STAYS: dict[str, Callable[[], nn.Module]] = {
    "sigmoid": lambda: Pair(torch.sigmoid),
    "relu6": lambda: Pair(F.relu6),
    "gelu": lambda: Pair(F.gelu),
    "an added constant": lambda: Pair(lambda x: (x + 1).sigmoid()),
    "a residual": lambda: Pair(lambda x: x.relu() + x.tanh()),
    "softmax": lambda: Pair(lambda x: x.softmax(1)),
    "its own square": lambda: Pair(lambda x: x.relu() * x.relu()),
    "a gate of its own halves": lambda: Pair(lambda x: x[:, :4] * x[:, 4:], nn.Conv2d(4, 4, 1)),
}


@pytest.mark.parametrize("case", PASSES)
def test_ranges_match_and_no_bit_changes(case: str) -> None:
    module = PASSES[case]().eval()
    plain, equal = both(module, images())
    assert [entry.module for entry in equal.ledger.scaled] == ["first"]
    assert all(torch.equal(a, b) for a, b in zip(outputs(plain), outputs(equal), strict=True))
    first = equal.program.state_dict["first.weight"].abs().amax((1, 2, 3))
    before = plain.program.state_dict["first.weight"].abs().amax((1, 2, 3))
    # The range that was the first layer's alone is now shared by both.
    assert first.max() / first.min() < 3 * (before.max() / before.min()).sqrt() < before.max() / before.min()


@pytest.mark.parametrize("case", STAYS)
def test_nothing_moves_where_a_scale_does_not_pass(case: str) -> None:
    plain, equal = both(STAYS[case]().eval(), images())
    assert not equal.ledger.scaled
    for name, tensor in plain.program.state_dict.items():
        assert torch.equal(tensor, equal.program.state_dict[name])


def test_a_value_that_the_model_returns_stays() -> None:
    class Returned(Pair):
        def forward(self, x: Tensor) -> Any:
            middle = self.first(x).relu()
            return self.second(middle), middle

    assert not both(Returned(F.relu).eval(), images())[1].ledger.scaled


def test_all_readers_take_their_part() -> None:
    class Two(Pair):
        def __init__(self) -> None:
            super().__init__(F.relu)
            self.other = nn.Conv2d(8, 2, 3)

        def forward(self, x: Tensor) -> Any:
            middle = self.first(x).relu()
            return self.second(middle), self.other(middle)

    plain, equal = both(Two().eval(), images())
    assert equal.ledger.scaled[0].into == ("second", "other")
    assert all(torch.equal(a, b) for a, b in zip(outputs(plain), outputs(equal), strict=True))


@settings(max_examples=25, deadline=None)
@given(
    spread=st.lists(st.floats(-6, 6), min_size=4, max_size=4), dead=st.integers(0, 4),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)  # fmt: skip
def test_one_step_leaves_a_factor_of_two(spread: list[float], dead: int, dtype: torch.dtype) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).to(dtype)
    with torch.no_grad():
        net[0].weight *= torch.tensor(spread, dtype=dtype).exp()[:, None]
        if dead < 4:
            net[0].weight[dead] = 0
    plain, equal = both(net, torch.randn(2, 3, dtype=dtype, generator=torch.Generator().manual_seed(0)))
    assert all(torch.equal(a, b) for a, b in zip(outputs(plain), outputs(equal), strict=True))
    own, other = equal.program.state_dict["0.weight"].abs().amax(1), equal.program.state_dict["2.weight"].abs().amax(0)
    alive = (own > 0) & (other > 0)
    ratio = (own / other)[alive]
    assert bool(((ratio <= 2.01) & (ratio >= 0.49)).all())


@pytest.mark.parametrize("name", ["vgg", "resnet_bottleneck", "shufflenet_v2", "densenet"])
def test_whole_nets_pass_the_gate(name: str, tmp_path: Path) -> None:
    module, args = zoo.NETS[name]()
    report = bnfold.export(module, tmp_path / "net.onnx", args, device="cpu", equalize=True)
    assert report.passed, report.check
    assert report.ledger.scaled and report.ledger.sites


def test_with_eager_weights_it_is_a_contradiction() -> None:
    from click.testing import CliRunner

    from bnfold.cli import cli

    done = CliRunner().invoke(cli, ["fold", "net.py:make", "-o", "w.safetensors", "--eager", "--equalize"])
    assert done.exit_code == 2 and "--eager and --equalize contradict" in done.stderr


# -- what it is for ----------------------------------------------------------------------------------------------------


def int8_error(module: nn.Module, x: Tensor, folder: Path, **options: Any) -> float:
    """RMS error, relative, of the file quantised to int8 with one scale per tensor."""
    from onnxruntime import quantization as q
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(q.CalibrationDataReader):
        def __init__(self) -> None:
            self.batches: Iterator[dict[str, np.ndarray]] = iter([{session.inputs[0].name: x.numpy()}])

        def get_next(self) -> Any:
            return next(self.batches, None)

    path, prepared, quantised = folder / "net.onnx", folder / "prepared.onnx", folder / "int8.onnx"
    report = bnfold.export(module, path, (x[:2],), device="cpu", **options)
    assert report.passed, report.check
    session = open_session(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        level = logging.root.level
        logging.root.setLevel(logging.ERROR)
        quant_pre_process(path, prepared, skip_symbolic_shape=True)
        q.quantize_static(prepared, quantised, Reader(), per_channel=False)
        logging.root.setLevel(level)
    want = session.run({session.inputs[0].name: x.numpy()})[0]
    found = open_session(quantised).run({session.inputs[0].name: x.numpy()})[0]
    return float(np.sqrt(((found - want) ** 2).mean() / (want**2).mean()))


@pytest.mark.filterwarnings("ignore")
def test_int8_loses_less(tmp_path: Path) -> None:
    module = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 4, 1),
    )  # fmt: skip
    zoo.randomize(zoo.he_init(module))
    with torch.no_grad():
        for norm in (module[1], module[4]):
            norm.running_var.copy_(torch.logspace(-4, 2, 16))
            norm.running_mean.zero_()
            norm.bias.mul_(norm.running_var.rsqrt())
            norm.bias[0] = 1.0
        module[3].weight.mul_(module[1].running_var.sqrt()[None, :, None, None])
        module[6].weight.mul_(module[4].running_var.sqrt()[None, :, None, None])
    x = images(32)
    plain = int8_error(module, x, tmp_path)
    equal = int8_error(module, x, tmp_path, equalize=True)
    assert equal < plain / 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["digits_mlp", "digits_cnn"])
def test_int8_loses_less_on_trained_nets(name: str, tmp_path: Path) -> None:
    models = Path(__file__).resolve().parent.parent / "models"
    module = load(f"{models / 'digits.py'}:{name}", weights=models / f"{name}.safetensors").model
    assert isinstance(module, nn.Module)
    x = torch.from_numpy(np.load(models / "digits_heldout.npz")["x"])
    x = x.reshape(len(x), *module.example_inputs[0].shape[1:])
    assert int8_error(module, x, tmp_path, equalize=True) < int8_error(module, x, tmp_path)
