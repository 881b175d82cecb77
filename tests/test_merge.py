"""Merging: what becomes one, what it is numerically, and the twins that must stay apart.

Every case goes through ``fold_exactly``, which compares with the eager float64 module at several batch sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
import zoo
from checker import build, count_operators, fold_exactly, noise, operators
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import bnfold

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
    Case("depthwise into dense", lambda m, x: m.a(x) + m.b(x), {"a": conv, "b": lambda: conv(groups=4)}, {"conv2d": 1}),
    Case("pool", lambda m, x: m.a(x) + F.avg_pool2d(x, 3, 1, 1), {"a": conv}, {"conv2d": 1}),
    Case("1x1 then pool", lambda m, x: m.a(x) + F.avg_pool2d(m.b(x), 3, 1, 1),
         {"a": conv, "b": lambda: conv(1, 0, bias=False)}, {"conv2d": 1}),
    Case("1x1 then 3x3", lambda m, x: m.a(x) + m.c(m.b(x)),
         {"a": conv, "b": lambda: conv(1, 0, o=8, bias=False), "c": lambda: conv(i=8)}, {"conv2d": 1}),
    Case("through dropout", lambda m, x: m.a(m.d(x)) + m.b(x), {**TWO, "d": nn.Dropout}, {"conv2d": 1}),
    Case("tree of sums", lambda m, x: (m.a(x) + m.b(x)) + (m.c(x) + x), {**TWO, "c": conv}, {"conv2d": 1}),
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
    Case("grouped alike", lambda m, x: m.b(m.a(x)), {"a": lambda: conv(groups=2), "b": lambda: conv(1, 0, groups=2)},
         {"conv2d": 1}),
]  # fmt: skip

JOINED = [
    Case("two", lambda m, x: torch.cat([m.a(x), m.b(x)], 1), {"a": conv, "b": lambda: conv(o=3)}, {"conv2d": 1}),
    Case("three, one without bias", lambda m, x: torch.cat([m.a(x), m.b(x), m.c(x)], 1),
         {"a": lambda: conv(bias=False), "b": lambda: conv(o=3), "c": conv}, {"conv2d": 1}),
]  # fmt: skip

APART = [
    Case("what is left would need its sign", lambda m, x: m.b(x) - m.a(x), TWO, {"conv2d": 2, "sub": 1}),
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


@st.composite
def branches(draw: st.DrawFn) -> tuple[nn.Module, int]:
    """A random sum of linear branches over one input, and how many of them a 3x3 dense host can take."""
    channels = draw(st.sampled_from([2, 4]))
    parts: dict[str, nn.Module] = {"host": nn.Conv2d(channels, channels, 3, padding=1)}
    kinds = draw(
        st.lists(st.sampled_from(["one", "three", "depth", "norm", "identity", "pool", "relu"]), min_size=1, max_size=5)
    )
    for i, kind in enumerate(kinds):
        if kind in ("one", "three", "depth"):
            k, groups = (1 if kind == "one" else 3), (channels if kind == "depth" else 1)
            bias = draw(st.booleans())
            parts[f"b{i}"] = nn.Conv2d(channels, channels, k, padding=k // 2, groups=groups, bias=bias)
        elif kind == "norm":
            parts[f"b{i}"] = nn.BatchNorm2d(channels)
    order = draw(st.permutations(range(-1, len(kinds))))
    signs = draw(st.lists(st.booleans(), min_size=len(order), max_size=len(order)))

    def run(m: nn.Module, x: Tensor) -> Tensor:
        total = None
        for i, positive in zip(order, signs):
            kind = "host" if i < 0 else kinds[i]
            if kind == "identity":
                y = x
            elif kind == "pool":
                y = F.avg_pool2d(x, 3, 1, 1)
            elif kind == "relu":
                y = x.relu()
            else:
                y = getattr(m, "host" if i < 0 else f"b{i}")(x)
            total = y if total is None else (total + y if positive else total - y)
        assert total is not None
        return total

    return build(run, **parts), channels


@settings(max_examples=25, deadline=None, derandomize=True)
@given(branches())
def test_random_sums_of_branches(drawn: tuple[nn.Module, int]) -> None:
    module, channels = drawn
    folded = fold_exactly(module, noise(2, channels, 5, 6))
    counts = operators(folded.program)
    assert counts["batch_norm"] == 0 or counts["conv2d"] >= 1
    assert sum(merge.operators for merge in folded.ledger.merges) >= 0
