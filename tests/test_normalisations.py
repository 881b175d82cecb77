"""Normalisations written as arithmetic: known for what they are, folded, and fewer operators where they stay."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from checker import build, fold_exactly, noise, operators
from torch import Tensor, nn

import bnfold
from bnfold.graph.capture import capture
from bnfold.lowering.lower import lower

CHANNELS = 5


class Written(nn.Module):
    """BatchNorm's arithmetic, its statistics along one axis of the input."""

    def __init__(self, shape: tuple[int, ...], way: Callable[..., Tensor]) -> None:
        super().__init__()
        self.shape, self.way = shape, way
        self.gamma, self.beta = nn.Parameter(noise(CHANNELS)), nn.Parameter(noise(CHANNELS))
        self.register_buffer("mean", noise(CHANNELS))
        self.register_buffer("variance", noise(CHANNELS).square() + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        parts = (self.gamma, self.beta, self.mean, self.variance)
        return self.way(x, *(part.reshape(self.shape) for part in parts))


WAYS: dict[str, Callable[..., Tensor]] = {
    "one factor": lambda x, g, b, m, v: (x - m) * ((v + 1e-3).rsqrt() * g) + b,
    "two factors": lambda x, g, b, m, v: (x - m) * (v + 1e-3).rsqrt() * g + b,
    "divided": lambda x, g, b, m, v: (x - m) / torch.sqrt(v + 1e-3) * g + b,
    "a power": lambda x, g, b, m, v: b + g * ((x + -m) * (v + 1e-3) ** -0.5),
    "from the mean": lambda x, g, b, m, v: (m - x) / (v + 1e-3).sqrt() * g - b,
}


def first(shape: tuple[int, ...] = (-1, 1, 1), way: str = "one factor", **more: Any) -> nn.Module:
    """A convolution, the activation behind it, and the normalisation."""
    return build(
        lambda m, x: torch.tanh(m.norm(m.act(m.conv(x)))),
        **{"conv": nn.Conv2d(3, CHANNELS, 3), "act": nn.Identity(), "norm": Written(shape, WAYS[way])} | more,
    )


def last(m: nn.Module, x: Tensor) -> Tensor:
    """The same for channels that are moved to the end before the normalisation, and back behind it."""
    return torch.tanh(m.norm(m.act(m.conv(x)).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)


@pytest.mark.parametrize("way", WAYS)
def test_it_folds_as_a_batchnorm(way: str) -> None:
    folded = fold_exactly(first(way=way), noise(2, 3, 7, 6))
    (entry,) = folded.ledger.entries
    assert (entry.module, entry.kind, entry.outcome, entry.into) == ("norm", "batch_norm", "backward", ("conv",))
    assert operators(folded.program) == {"conv2d": 1, "tanh": 1}


@pytest.mark.parametrize("way", WAYS)
def test_one_that_stays_is_one_operator(way: str) -> None:
    folded = fold_exactly(first(way=way, act=nn.Tanh()), noise(2, 3, 7, 6), left=1)
    assert folded.ledger.count() == (0, 1) and folded.ledger.left[0].module == "norm"
    assert operators(folded.program) == {"conv2d": 1, "tanh": 2, "batch_norm": 1}
    assert [node.op_type for node in lower(folded.program).model.graph] == [
        "Conv",
        "Tanh",
        "BatchNormalization",
        "Tanh",
    ]


def test_with_the_channels_last_right_behind_a_transposition() -> None:
    norm = Written((-1,), WAYS["one factor"])
    net = build(last, conv=nn.Conv2d(3, CHANNELS, 3), act=nn.Identity(), norm=norm)
    folded = fold_exactly(net, noise(2, 3, 7, 6))
    assert folded.ledger.count() == (1, 1) and folded.ledger.entries[0].into == ("conv",)
    net = build(last, conv=nn.Conv2d(3, CHANNELS, 3), act=nn.Tanh(), norm=copy.deepcopy(norm))
    folded = fold_exactly(net, noise(2, 3, 7, 6), left=1)
    assert folded.ledger.count() == (0, 1)
    assert operators(folded.program) == {"conv2d": 1, "tanh": 2, "batch_norm": 1, "permute": 2}


def test_along_another_axis_a_multiply_and_an_add_are_left() -> None:
    net = build(
        lambda m, x: torch.tanh(m.norm(torch.tanh(m.layer(x)))),
        layer=nn.Linear(4, CHANNELS),
        norm=Written((-1,), WAYS["two factors"]),
    )
    folded = fold_exactly(net, noise(2, 7, 4), left=2)
    assert operators(folded.program) == {"linear": 1, "tanh": 2, "mul": 1, "add": 1}
    assert {entry.module for entry in folded.ledger.left} == {"norm"}


#: name -> what is no normalisation, or not one to be written anew: forward(m, x), and the operators that stay. A shift
#: in front of a multiply goes into the one behind it.
REFUSED: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], dict[str, int]]] = {
    "a part is read": (
        lambda m, x: (y := m.act(x) - m.mean) * m.variance.rsqrt() * m.gamma + y,
        {"tanh": 1, "sub": 1, "mul": 1, "add": 1},
    ),
    "no root": (
        lambda m, x: ((m.act(x) - m.mean) * m.gamma + m.variance).tanh(),
        {"tanh": 2, "mul": 1, "add": 1},
    ),
    "of an input": (
        lambda m, x: ((x - m.mean) * m.variance.rsqrt() + m.gamma).tanh(),
        {"tanh": 1, "mul": 1, "add": 1},
    ),
    "along two axes": (
        lambda m, x: ((m.act(x) - m.mean) * m.variance.rsqrt() + m.columns).tanh(),
        {"tanh": 2, "mul": 1, "add": 1},
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_none_stays_as_it_is_written(name: str) -> None:
    run, left = REFUSED[name]
    parts = {"mean": noise(3, 1, 1), "variance": noise(3, 1, 1).square() + 0.5, "gamma": noise(3, 1, 1)}
    net = build(run, act=nn.Tanh(), columns=noise(6), **parts)
    assert operators(fold_exactly(net, noise(2, 3, 7, 6), left=None).program) == left


class Functional(nn.Module):
    """A net as Keras builds one: layers in a list, and a dictionary of the parameters that they hold elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.Conv2d(3, CHANNELS, 3), {"norm": Written((-1, 1, 1), WAYS["one factor"])}]
        self.layers[1]["norm"].name = "batch_normalization"
        self.held = nn.ParameterDict({"kernel": nn.Parameter(noise(4, CHANNELS, 1, 1))})
        self.kernels = (self.held["kernel"],)

    def forward(self, x: Tensor) -> Tensor:
        conv, norms = self.layers
        return nn.functional.conv2d(norms["norm"](conv(x)).tanh(), self.kernels[0])


def test_one_that_has_not_been_trained_is_one_too() -> None:
    norm = Written((-1, 1, 1), WAYS["one factor"])
    with torch.no_grad():
        for name, value in {"gamma": 1.0, "beta": 0.0, "mean": 0.0, "variance": 1.0}.items():
            getattr(norm, name).fill_(value)
    assert fold_exactly(first(act=nn.Tanh(), norm=norm), noise(2, 3, 7, 6), left=1).ledger.count() == (0, 1)


def test_modules_in_lists_and_parameters_held_elsewhere_have_names() -> None:
    net = Functional().float()
    net.layers[0].float(), net.layers[1]["norm"].float()
    folded = bnfold.fold(net, (torch.randn(2, 3, 7, 6),))
    (entry,) = folded.ledger.entries
    assert (entry.module, entry.into) == ("batch_normalization", ("layers.0",))
    program = capture(net, (torch.randn(2, 3, 7, 6),)).program
    (first_conv, *_) = (node for node in program.graph.nodes if node.op == "call_function")
    assert next(reversed(first_conv.meta["nn_module_stack"].values()))[0] == "layers.0"
    assert "held.kernel" in set(lower(folded.program).model.graph.initializers)


def test_modules_of_one_name_have_those_of_their_places() -> None:
    net = Functional().float()
    again = copy.deepcopy(net.layers[1]["norm"]).float()
    net.layers = [net.layers[0].float(), {"norm": nn.Sequential(net.layers[1]["norm"].float(), nn.Tanh(), again)}]
    again.name = net.layers[1]["norm"].name = "batch_normalization"
    modules = [entry.module for entry in bnfold.fold(net, (torch.randn(2, 3, 7, 6),)).ledger.entries]
    assert modules == ["batch_normalization.0", "batch_normalization.2"]
