"""Dtypes: no fold gives a value another dtype than it had, or rounds a constant to a coarser one than it was for."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checker import Net, build, noise, operators
from torch import Tensor, nn

import bnfold
from bnfold.graph.capture import capture
from bnfold.graph.interpret import Runner

half, single, double = torch.float16, torch.float32, torch.float64
FEATURES = noise(2, 4, dtype=single)
INDEX = torch.tensor([[0, 1, 2], [3, 4, 1]])


def linear(dtype: torch.dtype) -> nn.Module:
    return nn.Linear(4, 4).to(dtype)


def table(dtype: torch.dtype) -> Tensor:
    return torch.arange(-10, 10).reshape(5, 4).to(dtype)


def vector(size: int, dtype: torch.dtype = single) -> Tensor:
    return noise(size, dtype=dtype)


Run = Callable[[Any, Tensor], Any]
#: what is computed, its parts, its input, how many of its multiplies and adds stay
CASES: dict[str, tuple[Run, dict[str, Any], Tensor, int]] = {
    "a table of int8": (
        lambda m, i: F.embedding(i, m.table) * m.c + m.d, {"table": table(torch.int8), "c": vector(4), "d": vector(4)},
        INDEX, 2),
    "a table of float16 that is scaled in float32": (
        lambda m, i: F.embedding(i, m.table) * m.c, {"table": table(half), "c": vector(4)}, INDEX, 1),
    "integers": (lambda m, i: (i + 3) / 1 - 0.25, {}, INDEX, 3),
    "integers times numbers": (lambda m, i: m.fc((i * 2).float()[:, :1] * m.c), {"fc": linear(single), "c": vector(4)},
                               INDEX, 2),
    "float64 constants": (
        lambda m, x: m.fc(x) * m.c + m.d,
        {"fc": linear(single), "c": vector(4, double), "d": vector(4, double)}, FEATURES, 2),
    "a float64 number": (
        lambda m, x: (x.relu() * m.two * m.c).sigmoid() + m.two,
        {"two": torch.tensor(2.0, dtype=double), "c": vector(4)}, FEATURES, 2),
    "a float64 number before a convolution": (
        lambda m, x: m.fc(x.relu() * m.two), {"two": torch.tensor(2.0, dtype=double), "fc": linear(single)},
        FEATURES, 0),
    "a float32 shift behind float16": (
        lambda m, x: m.fc(x.half()).float() * m.c + m.d,
        {"fc": linear(half), "c": vector(4), "d": 1000 + vector(4)}, FEATURES, 1),
    "a float32 constant behind float16": (
        lambda m, x: m.fc(x.half()) * m.c + m.d, {"fc": linear(half), "c": vector(4), "d": vector(4)}, FEATURES, 2),
    "a sum of two dtypes": (
        lambda m, x: (m.fc(x.half()) + m.other(x)) + m.d, {"fc": linear(half), "other": linear(single), "d": vector(4)},
        FEATURES, 2),
    "a concatenation of two dtypes": (
        lambda m, x: torch.cat([m.fc(x.half()), m.other(x)], 1) * m.d,
        {"fc": linear(half), "other": linear(single), "d": vector(8)}, FEATURES, 1),
    "a concatenation with integers": (
        lambda m, x: m.fc(torch.cat([x[:, :2] * m.c, m.order.expand(x.shape[0], -1)], 1)),
        {"fc": linear(single), "c": vector(2), "order": torch.tensor([3, 1])}, FEATURES, 1),
    "a mean in another dtype": (
        lambda m, x: m.fc(x.half()).mean(0, dtype=single) + m.d, {"fc": linear(half), "d": 1000 + vector(4)},
        FEATURES, 1),
    "an integer buffer": (
        lambda m, x: m.fc(x).relu() * m.steps * m.c, {"fc": linear(single), "steps": torch.tensor([1, 2, 3, 4]),
                                                     "c": vector(4)}, FEATURES, 1),
    "a number": (lambda m, x: m.fc(x).mean().sum(-1).mean(0) * m.c.sum() + 1, {"fc": linear(single), "c": vector(4)},
                 FEATURES, 0),
    "a float16 constant on float32": (
        lambda m, x: m.fc(x).relu() * m.c * m.d, {"fc": linear(single), "c": vector(4, half), "d": -vector(4).abs()},
        FEATURES, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_every_value_keeps_its_dtype_and_its_precision(name):
    run, parts, x, left = CASES[name]
    net = Net(run, **copy.deepcopy(parts)).eval()
    folded = bnfold.fold(net, (x,))
    found = operators(folded.program)
    assert sum(found[name] for name in ("mul", "add", "sub", "div")) == left, found
    with torch.no_grad():
        own, mine = net(x), folded.module(x)
        (true,) = Runner(capture(net, (x,)).program, precise=True)((x,))
    assert own.dtype == mine.dtype
    epsilon = torch.finfo(own.dtype).eps
    noise_ = (own.double() - true).abs().max() + 4 * epsilon * true.abs().max()
    assert (mine.double() - true).abs().max() <= 4 * noise_


def test_a_scale_passes_a_widening_cast_and_a_shift_only_forward():
    net = build(lambda m, x: m.fc(m.norm(x).float()), norm=nn.BatchNorm1d(4), fc=nn.Linear(4, 4))
    net.norm.half()
    net.fc.float()
    folded = bnfold.fold(net, (FEATURES.half(),))
    assert not operators(folded.program)["batch_norm"]


@pytest.mark.parametrize("bias", [1.0, 1000.0])
def test_a_shift_goes_back_through_a_cast_where_it_is_no_larger_than_what_the_norm_has_seen(bias):
    net = build(lambda m, x: m.norm(m.fc(x).float()), norm=nn.BatchNorm1d(4), fc=nn.Linear(4, 4))
    net.norm.bias.data = torch.full((4,), bias)
    net.norm.weight.data = torch.tensor([1.0, -1.0, 0.0, 1.0])
    net.fc.half()
    net.norm.float()
    folded = bnfold.fold(net, (x := FEATURES.half(),))
    assert operators(folded.program)["batch_norm"] == (bias == 1000)
    true = copy.deepcopy(net).double()
    with torch.no_grad():
        true = true.norm(true.fc(x.double()))
        own, mine = ((each(x).double() - true).norm() for each in (net, folded.module))
    assert mine <= 4 * own
