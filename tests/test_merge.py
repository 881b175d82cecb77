"""Merging: what becomes one, what it is numerically, and the twins that must stay apart.

Every case goes through ``fold_exactly``, which compares with the eager float64 module at several batch sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import zoo
from checker import build, count_operators, fold_exactly, noise, operators
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import bnfold
from bnfold import pipeline

torch.set_num_threads(1)
IMAGE = (2, 4, 7, 6)


def conv(
    k: int | tuple[int, ...] = 3, p: int | tuple[int, ...] | str = 1, i: int = 4, o: int = 4, **kw: object
) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, padding=p, **kw)  # type: ignore[arg-type]


Run = Callable[..., Tensor]


@dataclass
class Case:
    """``run`` over ``parts`` becomes the operators in ``into``."""

    name: str
    run: Run
    parts: dict[str, Callable[[], nn.Module]]
    into: dict[str, int]
    shape: tuple[int, ...] = IMAGE


TWO = {"a": lambda: conv(3, 1), "b": lambda: conv(1, 0)}

PARALLEL = [
    Case("3x3 and 1x1", lambda m, x: m.a(x) + m.b(x), TWO, {"conv2d": 1}),
    Case("1x1 and 3x3", lambda m, x: m.b(x) + m.a(x), TWO, {"conv2d": 1}),
    Case("difference", lambda m, x: m.a(x) - m.b(x), TWO, {"conv2d": 1}),
    Case("difference, the larger one second", lambda m, x: m.b(x) - m.a(x), TWO, {"conv2d": 1}),
    Case("input minus branch", lambda m, x: x - m.a(x), {"a": conv}, {"conv2d": 1}),
    Case("alpha on the host", lambda m, x: torch.add(m.b(x), m.a(x), alpha=0.3), TWO, {"conv2d": 1}),
    Case("alpha", lambda m, x: torch.add(m.a(x), m.b(x), alpha=0.3), TWO, {"conv2d": 1}),
    Case("identity", lambda m, x: x + m.a(x), {"a": lambda: conv()}, {"conv2d": 1}),
    Case("identity, 1x1", lambda m, x: m.a(x) + x, {"a": lambda: conv(1, 0)}, {"conv2d": 1}),
    Case("same padding", lambda m, x: m.a(x) + x, {"a": lambda: conv(3, "same")}, {"conv2d": 1}),
    Case("BatchNorm alone", lambda m, x: m.n(x) + m.a(x), {"a": conv, "n": lambda: nn.BatchNorm2d(4)}, {"conv2d": 1}),
    Case("RepVGG", lambda m, x: m.n(x) + m.p(m.a(x)) + m.q(m.b(x)),
         {**TWO, "n": lambda: nn.BatchNorm2d(4), "p": lambda: nn.BatchNorm2d(4), "q": lambda: nn.BatchNorm2d(4)},
         {"conv2d": 1}),
    Case("strided", lambda m, x: m.a(x) + m.b(x),
         {"a": lambda: conv(3, 1, stride=2), "b": lambda: conv(1, 0, stride=2)}, {"conv2d": 1}),
    Case("strips", lambda m, x: m.a(x) + m.b(x) + m.c(x),
         {"a": conv, "b": lambda: conv((3, 1), (1, 0)), "c": lambda: conv((1, 3), (0, 1))}, {"conv2d": 1}),
    Case("dilated in a larger one", lambda m, x: m.a(x) + m.b(x),
         {"a": lambda: conv(5, 2), "b": lambda: conv(3, 2, dilation=2)}, {"conv2d": 1}),
    Case("grouped", lambda m, x: x + m.a(x) + m.b(x),
         {"a": lambda: conv(3, 1, groups=2), "b": lambda: conv(1, 0, groups=2)}, {"conv2d": 1}),
    Case("groups of one into groups of two", lambda m, x: m.a(x) + m.b(x),
         {"a": lambda: conv(groups=2), "b": lambda: conv(1, 0, groups=4)}, {"conv2d": 1}),
    Case("depthwise into dense", lambda m, x: m.a(x) + m.b(x), {"a": conv, "b": lambda: conv(groups=4)}, {"conv2d": 1}),
    Case("pool", lambda m, x: m.a(x) + F.avg_pool2d(x, 3, 1, 1), {"a": conv}, {"conv2d": 1}),
    Case("strided pool", lambda m, x: m.a(x) + F.avg_pool2d(x, 2), {"a": lambda: conv(2, 0, stride=2)}, {"conv2d": 1}),
    Case("padded 1x1 then pool", lambda m, x: m.a(x) + F.avg_pool2d(m.b(x), 3, 1),
         {"a": conv, "b": lambda: conv(1, 1)}, {"conv2d": 1}),
    Case("padded 1x1 then 3x3", lambda m, x: m.a(x) + m.c(m.b(x)),
         {"a": conv, "b": lambda: conv(1, 1, o=3), "c": lambda: conv(3, 0, i=3)}, {"conv2d": 1}),
    Case("1x1 then pool", lambda m, x: m.a(x) + F.avg_pool2d(m.b(x), 3, 1, 1),
         {"a": conv, "b": lambda: conv(1, 0, bias=False)}, {"conv2d": 1}),
    Case("1x1 then 3x3", lambda m, x: m.a(x) + m.c(m.b(x)),
         {"a": conv, "b": lambda: conv(1, 0, o=8, bias=False), "c": lambda: conv(i=8)}, {"conv2d": 1}),
    Case("through dropout", lambda m, x: m.a(m.d(x)) + m.b(x), {**TWO, "d": nn.Dropout}, {"conv2d": 1}),
    Case("a copy that two branches read", lambda m, x: m.a(x) + m.b(y := x.clone()) + y, TWO, {"conv2d": 1}),
    Case("tree of sums", lambda m, x: (m.a(x) + m.b(x)) + (m.c(x) + x), {**TWO, "c": conv}, {"conv2d": 1}),
    Case("its input twice", lambda m, x: m.a(x) + (x + x), {"a": conv}, {"conv2d": 1}),
    Case("a scaled sum of what needs no convolution", lambda m, x: m.a(x) + 0.5 * (x - F.avg_pool2d(x, 3, 1, 1)),
         {"a": conv}, {"conv2d": 1}),
    Case("a normalised sum of what needs no convolution", lambda m, x: m.n(x + F.avg_pool2d(x, 3, 1, 1)) + m.a(x),
         {"a": conv, "n": lambda: nn.BatchNorm2d(4)}, {"conv2d": 1}),
    Case("beside another value", lambda m, x: (m.a(x) + x.relu()) + m.b(x), TWO, {"conv2d": 1, "relu": 1, "add": 1}),
    Case("scaled branch", lambda m, x: m.a(x) + 0.5 * m.b(x), TWO, {"conv2d": 1}),
    Case("LayerScale", lambda m, x: x + m.s.weight[:, 0] * m.a(x), {"a": conv, "s": lambda: nn.Conv2d(1, 4, (1, 1))},
         {"conv2d": 1}),
    Case("linears", lambda m, x: m.a(x) + m.b(x), {"a": lambda: nn.Linear(6, 5), "b": lambda: nn.Linear(6, 5)},
         {"linear": 1}),
    Case("linear and identity", lambda m, x: m.a(x) + x, {"a": lambda: nn.Linear(6, 6)}, {"linear": 1}),
    Case("1d", lambda m, x: m.a(x) + x, {"a": lambda: nn.Conv1d(4, 4, 5, padding=2)}, {"conv1d": 1}, (2, 4, 9)),
    Case("3d", lambda m, x: m.a(x) + m.b(x),
         {"a": lambda: nn.Conv3d(4, 3, 3, padding=1), "b": lambda: nn.Conv3d(4, 3, 1)}, {"conv3d": 1}, (2, 4, 3, 4, 3)),
    Case("transposed", lambda m, x: m.a(x) + m.b(x),
         {"a": lambda: nn.ConvTranspose2d(4, 3, 3, 2, 1, 1), "b": lambda: nn.ConvTranspose2d(4, 3, 3, 2, 1, 1)},
         {"conv_transpose2d": 1}),
    Case("transposed, smaller in larger", lambda m, x: m.a(x) + m.b(x),
         {"a": lambda: nn.ConvTranspose2d(4, 3, 4, 2, 1), "b": lambda: nn.ConvTranspose2d(4, 3, 2, 2)},
         {"conv_transpose2d": 1}),
    Case("transposed, with its input", lambda m, x: m.a(x) + x, {"a": lambda: nn.ConvTranspose2d(4, 4, 3, 1, 1)},
         {"conv_transpose2d": 1}),
    Case("transposed, depthwise into dense", lambda m, x: m.a(x) + m.b(x),
         {"a": lambda: nn.ConvTranspose2d(4, 4, 2, 2), "b": lambda: nn.ConvTranspose2d(4, 4, 2, 2, groups=4)},
         {"conv_transpose2d": 1}),
    Case("transposed, grouped", lambda m, x: m.a(x) + m.b(x),
         {"a": lambda: nn.ConvTranspose2d(4, 4, 2, 2, groups=2), "b": lambda: nn.ConvTranspose2d(4, 4, 2, 2, groups=2)},
         {"conv_transpose2d": 1}),
]  # fmt: skip

SERIAL = [
    Case("linear, linear", lambda m, x: m.b(m.a(x)), {"a": lambda: nn.Linear(6, 6), "b": lambda: nn.Linear(6, 3)},
         {"linear": 1}),
    Case("1x1, 3x3 unpadded", lambda m, x: m.b(m.a(x)), {"a": lambda: conv(1, 0), "b": lambda: conv(3, 0)},
         {"conv2d": 1}),
    Case("1x1 biasless, 3x3 padded", lambda m, x: m.b(m.a(x)), {"a": lambda: conv(1, 0, bias=False), "b": conv},
         {"conv2d": 1}),
    Case("3x3, 1x1", lambda m, x: m.b(m.a(x)), {"a": conv, "b": lambda: conv(1, 0, o=3)}, {"conv2d": 1}),
    Case("strided 3x3, 1x1", lambda m, x: m.b(m.a(x)), {"a": lambda: conv(stride=2), "b": lambda: conv(1, 0)},
         {"conv2d": 1}),
    Case("three in a row", lambda m, x: m.c(m.b(m.a(x))),
         {"a": lambda: conv(1, 0), "b": lambda: conv(3, 0), "c": lambda: conv(1, 0)}, {"conv2d": 1}),
    Case("sum, then BatchNorm", lambda m, x: m.n(m.a(x) + m.b(x) + x), {**TWO, "n": lambda: nn.BatchNorm2d(4)},
         {"conv2d": 1}),
    Case("through a copy", lambda m, x: m.b(m.a(x).clone()), {"a": conv, "b": lambda: conv(1, 0)}, {"conv2d": 1}),
    Case("1x1, depthwise 1x1", lambda m, x: m.b(m.a(x)), {"a": lambda: conv(1, 0), "b": lambda: conv(1, 0, groups=4)},
         {"conv2d": 1}),
    Case("depthwise 1x1, 1x1", lambda m, x: m.b(m.a(x)), {"a": lambda: conv(1, 0, groups=4), "b": lambda: conv(1, 0)},
         {"conv2d": 1}),
    Case("transposed, 1x1", lambda m, x: m.b(m.a(x)),
         {"a": lambda: nn.ConvTranspose2d(4, 4, 2, 2), "b": lambda: conv(1, 0)}, {"conv_transpose2d": 1}),
    Case("grouped alike", lambda m, x: m.b(m.a(x)), {"a": lambda: conv(groups=2), "b": lambda: conv(1, 0, groups=2)},
         {"conv2d": 1}),
]  # fmt: skip

JOINED = [
    Case("two", lambda m, x: torch.cat([m.a(x), m.b(x)], 1), {"a": conv, "b": lambda: conv(o=3)}, {"conv2d": 1}),
    Case("three, one without bias", lambda m, x: torch.cat([m.a(x), m.b(x), m.c(x)], 1),
         {"a": lambda: conv(bias=False), "b": lambda: conv(o=3), "c": conv}, {"conv2d": 1}),
    Case("linears", lambda m, x: torch.cat([m.a(x), m.b(x)], -1),
         {"a": lambda: nn.Linear(6, 5), "b": lambda: nn.Linear(6, 2)}, {"linear": 1}),
]  # fmt: skip

APART = [
    Case("what is left would need its sign", lambda m, x: (m.b(x) - x.relu()) + m.a(x), TWO,
         {"conv2d": 2, "relu": 1, "sub": 1, "add": 1}),
    Case("strips without a square to hold them", lambda m, x: m.a(x) + m.b(x),
         {"a": lambda: conv((3, 1), (1, 0)), "b": lambda: conv((1, 3), (0, 1))}, {"conv2d": 2, "add": 1}),
    Case("dilated beside dense", lambda m, x: m.a(x) + m.b(x), {"a": conv, "b": lambda: conv(3, 2, dilation=2)},
         {"conv2d": 2, "add": 1}),
    Case("transposed, another padding", lambda m, x: m.a(x) + m.b(x),
         {"a": lambda: nn.ConvTranspose2d(4, 3, 3, 2), "b": lambda: nn.ConvTranspose2d(4, 3, 3, 2, 1, dilation=2)},
         {"conv_transpose2d": 2, "add": 1}),
    Case("pool with a divisor of its own", lambda m, x: m.a(x) + F.avg_pool2d(x, 3, 1, 1, divisor_override=4),
         {"a": conv}, {"conv2d": 1, "avg_pool2d": 1, "add": 1}),
    Case("a constant over space is no branch", lambda m, x: m.a(x) + x.mean((2, 3), keepdim=True), {"a": conv},
         {"conv2d": 1, "mean": 1, "add": 1}),
    Case("1x1, depthwise 3x3", lambda m, x: m.b(m.a(x)), {"a": lambda: conv(1, 0), "b": lambda: conv(3, 0, groups=4)},
         {"conv2d": 2}),
    Case("3x3, strided 1x1", lambda m, x: m.b(m.a(x)), {"a": conv, "b": lambda: conv(1, 0, stride=2)}, {"conv2d": 2}),
    Case("activation in a branch", lambda m, x: m.a(x) + m.b(x).relu(), TWO, {"conv2d": 2, "relu": 1, "add": 1}),
    Case("another stride", lambda m, x: m.a(x) + m.b(x),
         {"a": lambda: conv(3, 1, stride=2), "b": lambda: conv((4, 4), 0, i=4)}, {"conv2d": 2, "add": 1}, (2, 4, 6, 6)),
    Case("a branch used elsewhere", lambda m, x: (m.a(x) + (y := m.b(x))) * y.sigmoid(), TWO,
         {"conv2d": 2, "add": 1, "sigmoid": 1, "mul": 1}),
    Case("padding that does not line up", lambda m, x: m.a(x) + m.b(x),
         {"a": lambda: conv(3, 1), "b": lambda: conv(2, "same")}, {"conv2d": 2, "add": 1}),
    Case("pool that does not count padding", lambda m, x: m.a(x) + F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
         {"a": conv}, {"conv2d": 1, "avg_pool2d": 1, "add": 1}),
    Case("bias before a padded pool", lambda m, x: m.a(x) + F.avg_pool2d(m.b(x), 3, 1, 1), TWO,
         {"conv2d": 2, "avg_pool2d": 1, "add": 1}),
    Case("bias before a padded convolution", lambda m, x: m.a(x) + m.c(m.b(x)), {**TWO, "c": conv},
         {"conv2d": 3, "add": 1}),
    Case("two inputs", lambda m, x: m.a(x) + m.b(x * x), TWO, {"conv2d": 2, "add": 1, "mul": 1}),
    Case("dense into grouped", lambda m, x: m.a(x) + m.b(x), {"a": lambda: conv(groups=4), "b": lambda: conv(1, 0)},
         {"conv2d": 2, "add": 1}),
    Case("bottleneck", lambda m, x: m.b(m.a(x)), {"a": lambda: nn.Linear(6, 1), "b": lambda: nn.Linear(1, 6)},
         {"linear": 2}),
    Case("depthwise, pointwise", lambda m, x: m.b(m.a(x)), {"a": lambda: conv(groups=4), "b": lambda: conv(1, 0)},
         {"conv2d": 2}),
    Case("3x3, 3x3", lambda m, x: m.b(m.a(x)), {"a": conv, "b": conv}, {"conv2d": 2}),
    Case("1x1 with bias, 3x3 padded", lambda m, x: m.b(m.a(x)), {"a": lambda: conv(1, 0), "b": conv}, {"conv2d": 2}),
    Case("strided 1x1, 3x3", lambda m, x: m.b(m.a(x)), {"a": lambda: conv(1, 0, stride=2), "b": lambda: conv(3, 0)},
         {"conv2d": 2}, (2, 4, 9, 9)),
    Case("joined along H", lambda m, x: torch.cat([m.a(x), m.b(x)], 2), {"a": conv, "b": conv},
         {"conv2d": 2, "cat": 1}),
    Case("joined, another kernel", lambda m, x: torch.cat([m.a(x), m.b(x)], 1), TWO, {"conv2d": 2, "cat": 1}),
    Case("joined, another input", lambda m, x: torch.cat([m.a(x), m.b(x.relu())], 1), {"a": conv, "b": conv},
         {"conv2d": 2, "cat": 1, "relu": 1}),
    Case("joined, one used elsewhere", lambda m, x: torch.cat([(y := m.a(x)), m.b(x)], 1) * y.mean(),
         {"a": conv, "b": conv}, {"conv2d": 2, "cat": 1, "mean": 1, "mul": 1}),
]  # fmt: skip


def net(case: Case) -> tuple[nn.Module, Tensor]:
    return build(case.run, **{name: part() for name, part in case.parts.items()}), noise(*case.shape)


@pytest.mark.parametrize("case", [*PARALLEL, *SERIAL, *JOINED], ids=lambda case: case.name)
def test_merges(case: Case) -> None:
    module, x = net(case)
    folded = fold_exactly(module, x)
    assert operators(folded.program) == case.into
    assert all(merge.operators > 0 for merge in folded.ledger.merges)


@pytest.mark.parametrize("case", APART, ids=lambda case: case.name)
@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
def test_stays_apart(case: Case) -> None:
    module, x = net(case)
    folded = fold_exactly(module, x)
    assert operators(folded.program) == case.into
    assert not folded.ledger.merges


def test_a_sum_that_is_read_before_its_batchnorm_too_keeps_it() -> None:
    """The twin of "sum, then BatchNorm"."""
    parts = {name: part() for name, part in TWO.items()}
    net = build(lambda m, x: m.n(y := m.a(x) + m.b(x)) * y.sigmoid(), **parts, n=nn.BatchNorm2d(4))
    folded = fold_exactly(net, noise(*IMAGE), left={"several-readers", "model-output"})
    assert operators(folded.program) == {"conv2d": 1, "batch_norm": 1, "sigmoid": 1, "mul": 1}


def test_merge_can_be_turned_off() -> None:
    module, x = net(PARALLEL[0])
    folded = bnfold.fold(module, (x,), merge=False)
    assert operators(folded.program) == {"conv2d": 2, "add": 1}
    assert not folded.ledger.merges


def test_dtypes_do_not_mix() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4).half()

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x.half())

    folded = bnfold.fold(Mixed(), (torch.randn(2, 4),))
    assert operators(folded.program)["linear"] == 2


def test_the_ledger_names_what_was_merged() -> None:
    module, x = net(next(case for case in PARALLEL if case.name == "RepVGG"))
    ledger = fold_exactly(module, x).ledger
    assert {e.module: e.outcome for e in ledger.entries} == {"n": "merged", "p": "backward", "q": "backward"}
    assert [merge.into for merge in ledger.merges] == ["a", "a"]
    assert sum(merge.operators for merge in ledger.merges) == 4
    assert ledger.count() == (3, 3)
    # Values that the merge changed are no fold sites any more; its own is.
    assert list(ledger.sites) == ["conv2d"]


def reparametrised(block: nn.Module) -> nn.Conv2d:
    """RepVGG's own formula, from the published code's description: pad the 1x1, write the identity as a kernel, add."""
    channels, groups = block.dense[0].out_channels, block.dense[0].groups
    weight, bias = torch.zeros(channels, channels // groups, 3, 3).double(), torch.zeros(channels).double()
    point = F.pad(block.point[0].weight, [1] * 4)
    branches = ((block.dense[0].weight, block.dense[1]), (point, block.point[1]), (None, block.identity))
    for kernel, norm in branches:
        if kernel is None:
            kernel = torch.zeros_like(weight)
            for c in range(channels):
                kernel[c, c % (channels // groups), 1, 1] = 1
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        weight = weight + kernel * scale.reshape(-1, 1, 1, 1)
        bias = bias + norm.bias - norm.running_mean * scale
    merged = nn.Conv2d(channels, channels, 3, padding=1, groups=groups).double()
    merged.weight, merged.bias = nn.Parameter(weight), nn.Parameter(bias)
    return merged


def test_repvgg_equals_its_published_reparametrisation() -> None:
    module, (x,) = zoo.NETS["repvgg"]()
    module = module.double()
    folded = fold_exactly(module, x.double())
    hand = nn.Sequential(*(
        nn.Sequential(reparametrised(part), nn.ReLU()) if hasattr(part, "dense") else part for part in module
    ))  # fmt: skip
    by_hand = bnfold.fold(hand, (x.double(),))
    assert count_operators(folded.program) == count_operators(by_hand.program)
    constants = [folded.program.state_dict[f"{i}.dense.0.weight"] for i in (1, 2)]
    for constant, layer in zip(constants, (hand[1][0], hand[2][0])):
        assert torch.allclose(constant, layer.weight, rtol=1e-13, atol=1e-15)


#: Operators of the hand-reparametrised form: what each block's authors' deployment code leaves.
DEPLOYED = {
    "repvgg": {"conv2d": 3, "relu": 3, "linear": 1, "adaptive_avg_pool2d": 1, "flatten": 1},
    "mobileone": {"conv2d": 3, "relu": 3, "linear": 1, "adaptive_avg_pool2d": 1, "flatten": 1},
    "acnet": {"conv2d": 3, "relu": 3, "linear": 1, "adaptive_avg_pool2d": 1, "flatten": 1},
    "repmixer": {"conv2d": 3, "gelu": 1, "linear": 1, "adaptive_avg_pool2d": 1, "flatten": 1},
}


@pytest.mark.parametrize("name", DEPLOYED)
def test_branchy_nets_reach_their_deployed_form(name: str) -> None:
    module, (x,) = zoo.NETS[name]()
    folded = fold_exactly(module.double(), x.double())
    assert operators(folded.program) == DEPLOYED[name]
    assert folded.ledger.count() == (zoo.BATCHNORMS[name],) * 2


# -- random trees of branches ------------------------------------------------------------------------------------------


@dataclass
class Tree:
    """A random sum: what computes it, the modules that it uses, and how many activations are among its leaves."""

    run: Run
    parts: dict[str, nn.Module]
    activations: int = 0


LEAVES = ("conv", "point", "depth", "strip", "dilated", "norm", "identity", "pool", "deep", "averaged")


@st.composite
def leaf(draw: st.DrawFn, name: str, channels: int, *, linear: bool) -> Tree:
    """A branch from x that a 5x5 dense convolution can hold; or, where not ``linear``, an activation."""
    if not linear:
        return Tree(lambda m, x: x.relu(), {}, 1)
    kind, bias = draw(st.sampled_from(LEAVES)), draw(st.booleans())
    size = draw(st.sampled_from([3, 5]))
    group = draw(st.sampled_from([g for g in (1, 2, channels) if channels % g == 0]))
    made: dict[str, tuple[Callable[[], nn.Module], ...]] = {
        "conv": (lambda: nn.Conv2d(channels, channels, size, padding=size // 2, groups=group, bias=bias),),
        "point": (lambda: nn.Conv2d(channels, channels, 1, groups=group, bias=bias),),
        "depth": (lambda: nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=bias),),
        "strip": (lambda: nn.Conv2d(channels, channels, (1, size), padding=(0, size // 2), bias=bias),),
        "dilated": (lambda: nn.Conv2d(channels, channels, 3, padding=2, dilation=2, bias=bias),),
        "norm": (lambda: nn.BatchNorm2d(channels),),
        "identity": (nn.Identity,),
        "pool": (lambda: nn.AvgPool2d(size, 1, size // 2),),
        # A first one of one tap that pads, so that its bias fills the border: exact.
        "deep": (lambda: nn.Conv2d(channels, 3, 1, padding=1, bias=bias), lambda: nn.Conv2d(3, channels, 3)),
        "averaged": (lambda: nn.Conv2d(channels, channels, 1, padding=1, bias=bias), lambda: nn.AvgPool2d(3, 1)),
    }  # fmt: skip
    return Tree(lambda m, x: getattr(m, name)(x), {name: nn.Sequential(*(part() for part in made[kind]))})


@st.composite
def trees(draw: st.DrawFn, *, activations: bool) -> tuple[Tree, int]:
    """A random tree of sums over one input with a 5x5 convolution somewhere in it; differences too if all is linear."""
    channels = draw(st.sampled_from([2, 4]))
    count = draw(st.integers(1, 5))
    host = Tree(lambda m, x: m.host(x), {"host": nn.Conv2d(channels, channels, 5, padding=2)})
    nonlinear = draw(st.sets(st.integers(0, count - 1), min_size=1, max_size=2)) if activations else set()
    forest = [host, *(draw(leaf(f"b{i}", channels, linear=i not in nonlinear)) for i in range(count))]
    while len(forest) > 1:
        a, b = (forest.pop(draw(st.integers(0, len(forest) - 1))) for _ in range(2))
        how = draw(st.sampled_from(["add", "add", "sub", "scaled", "alpha"] if not activations else ["add"]))
        run: Run = {
            "add": lambda m, x, a=a, b=b: a.run(m, x) + b.run(m, x),
            "sub": lambda m, x, a=a, b=b: a.run(m, x) - b.run(m, x),
            "scaled": lambda m, x, a=a, b=b: 0.5 * (a.run(m, x) + b.run(m, x)),
            "alpha": lambda m, x, a=a, b=b: torch.add(a.run(m, x), b.run(m, x), alpha=-0.7),
        }[how]
        forest.append(Tree(run, a.parts | b.parts, a.activations + b.activations))
    return forest[0], channels


@settings(max_examples=15, deadline=None, derandomize=True)
@given(trees(activations=False))
def test_a_tree_of_linear_branches_becomes_one_convolution(drawn: tuple[Tree, int]) -> None:
    tree, channels = drawn
    folded = fold_exactly(build(tree.run, **tree.parts), noise(2, channels, 5, 6))
    assert operators(folded.program) == {"conv2d": 1}
    assert sum(merge.operators for merge in folded.ledger.merges) >= len(folded.ledger.merges)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(trees(activations=True))
def test_a_tree_keeps_its_activations_and_no_other_branch(drawn: tuple[Tree, int]) -> None:
    tree, channels = drawn
    folded = fold_exactly(build(tree.run, **tree.parts), noise(2, channels, 5, 6))
    assert operators(folded.program) == {"conv2d": 1, "relu": tree.activations, "add": tree.activations}


# -- every form of output ----------------------------------------------------------------------------------------------


def test_a_merged_program_is_stored_and_loaded(tmp_path: Path) -> None:
    """The other form of output, ONNX, is in test_merge_architectures."""
    module, (x,) = zoo.NETS["dbb"]()
    report = pipeline.save_folded(module, tmp_path / "net.pt2", (x,), samples=10)
    assert report.passed and len(report.ledger.merges) == 3
    program = torch.export.load(tmp_path / "net.pt2")
    assert operators(program)["conv2d"] == 2 and operators(program)["add"] == 0
    with torch.no_grad():
        truth = module.double()(x.double())
        assert float((program.module()(x) - truth).norm() / truth.norm()) < 1e-5
