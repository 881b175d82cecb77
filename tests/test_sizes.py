"""Sizes: what folds at the example's size must be right at every size that the program takes.

Height and width are dynamic and the program is compared at sizes that are multiples of nothing, for every row that has
an argument along them. ``folds`` says whether the BatchNorm before it and the one after it go.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from checker import assert_close, build, noise, operators
from hostile_graphs import grow
from torch import Tensor, nn
from torch.export import Dim

import bnfold
from bnfold.graph.capture import capture
from bnfold.graph.graph import Graph
from bnfold.semantics.sizes import WAYS

HERE = [(1, 13, 17), (2, 16, 16), (3, 11, 23), (2, 29, 14), (1, 19, 10)]
FREE = {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO}


@dataclass(frozen=True)
class Case:
    """``run`` acts on an image with dynamic height and width."""

    run: Callable[[nn.Module, Tensor], Tensor]
    #: How many of two BatchNorms go, the one before ``run`` and the one after.
    folds: int = 2
    #: Sizes that it takes.
    sizes: tuple[tuple[int, int, int], ...] = tuple(HERE)
    example: tuple[int, int] = (16, 16)


def half(x: Tensor, axis: int) -> int:
    return x.shape[axis] // 2


def same(pad: Callable[[int], int], **how: object) -> Callable[[nn.Module, Tensor], Tensor]:
    return lambda m, x: F.pad(x, (0, pad(x.shape[3]), 0, pad(x.shape[2])), **how)  # type: ignore[arg-type]


EVEN = ((2, 14, 22), (1, 10, 26), (3, 12, 34))
CASES = {
    # padding by a size: nothing at the example's, something elsewhere
    "pad to a multiple": Case(same(lambda n: -n % 8), 0),
    "pad to a multiple of what a pool left": Case(lambda m, x: same(lambda n: -n % 4)(m, F.max_pool2d(x, 2)), 0),
    "pad to a half": Case(lambda m, x: F.pad(x, (0, half(x, 3) - x.shape[3] // 2, 0, 0))),
    "pad beyond a size": Case(same(lambda n: max(n, 20) - n), 0),
    "pad where large": Case(same(lambda n: n // 24), 0),
    "reflect by a size": Case(same(lambda n: n % 3, mode="reflect")),
    "replicate by a size": Case(same(lambda n: n % 3, mode="replicate")),
    "a pad that is no padding": Case(lambda m, x: F.pad(x, (0, x.shape[3] - x.shape[3], 0, 0))),
    "convolution padding by a size": Case(lambda m, x: F.conv2d(x, m.kernel, padding=(x.shape[2] % 2, 0)), 1),
    "convolution padding where large": Case(lambda m, x: F.conv2d(x, m.kernel, padding=(x.shape[2] // 24, 0)), 1),
    "convolution stride by a size": Case(lambda m, x: F.conv2d(x, m.kernel, stride=(x.shape[2] % 2 + 1, 1))),
    "transposed by a size": Case(lambda m, x: F.conv_transpose2d(x, m.kernel, padding=(x.shape[2] % 2, 0)), 1),
    # positions by a size
    "narrow channels": Case(lambda m, x: x.narrow(1, x.shape[2] % 2, 2).repeat(1, 2, 1, 1), 0),
    "slice channels": Case(lambda m, x: x[:, (n := x.shape[2] % 2) : n + 2].repeat(1, 2, 1, 1), 0),
    "select a channel": Case(lambda m, x: x.select(1, x.shape[2] % 4).unsqueeze(1).repeat(1, 4, 1, 1), 0),
    "roll channels": Case(lambda m, x: x.roll(half(x, 2), 1), 0),
    "roll everything": Case(lambda m, x: x.roll(half(x, 2)), 0),
    "narrow rows": Case(lambda m, x: x.narrow(2, x.shape[2] % 3, 6)),
    "slice rows": Case(lambda m, x: x[:, :, half(x, 2) :, : half(x, 3)]),
    "select a row": Case(lambda m, x: x.select(2, half(x, 2)).unsqueeze(2)),
    "roll rows": Case(lambda m, x: x.roll((half(x, 2), -half(x, 3)), (2, 3))),
    "split rows": Case(lambda m, x: torch.cat(x.split([half(x, 2), x.shape[2] - half(x, 2)], 2)[::-1], 2)),
    "chunks of rows": Case(lambda m, x: torch.cat(x.chunk(2, 2), 2), sizes=EVEN),
    "windows of rows": Case(lambda m, x: x.unfold(2, 3, 2).mean(-1)),
    # how often
    "repeat rows": Case(lambda m, x: x.repeat(1, 1, x.shape[2] % 3 + 1, 1)),
    "repeat channels": Case(lambda m, x: x.repeat(1, x.shape[2] % 3 + 1, 1, 1)[:, -4:], 0),
    "expand rows": Case(lambda m, x: x.mean(2, keepdim=True).expand(-1, -1, x.shape[3], -1)),
    # sizes of the result
    "flatten": Case(lambda m, x: x.flatten(2).unsqueeze(2)),
    "view of positions": Case(lambda m, x: x.view(x.shape[0], 4, -1, 1)),
    "batch and channels swapped without moving": Case(
        lambda m, x: x.reshape(4, x.shape[0], x.shape[2], x.shape[3]).transpose(0, 1), 0),
    "the first of the rows of 32": Case(
        lambda m, x: x.reshape(x.shape[0], -1, 32)[:, 0].reshape(x.shape[0], 4, 8, 1), 0,
        ((1, 3, 8), (2, 5, 8), (3, 24, 8))),
    "heads in the batch": Case(
        lambda m, x: (y := x.unflatten(1, (2, 2))).reshape(-1, 2, *y.shape[3:]).mean(-1).reshape(-1, 4, x.shape[2], 1)),
    "windows": Case(
        lambda m, x: x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 2, 4, 1, 3, 5).reshape(-1, 4, 2, 2),
        sizes=EVEN),
    "shuffled": Case(lambda m, x: F.pixel_shuffle(F.pixel_unshuffle(x, 2), 2), sizes=EVEN),
    # averages
    "interpolate to a size": Case(lambda m, x: F.interpolate(x, (half(x, 2) + 1, x.shape[3] + 3))),
    "interpolate by a factor": Case(lambda m, x: F.interpolate(x, scale_factor=1.5, mode="bilinear")),
    "bicubic to a size": Case(lambda m, x: F.interpolate(x, (half(x, 2), half(x, 3)), mode="bicubic")),
    "adaptive pool to a size": Case(lambda m, x: F.adaptive_avg_pool2d(x, (half(x, 2), 3))),
    "pool": Case(lambda m, x: F.avg_pool2d(x, 3, 2)),
    "pool that counts zeros": Case(lambda m, x: F.avg_pool2d(x, 3, 2, 1), 0),
    "pool that counts none": Case(lambda m, x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False)),
    "pool beyond the end": Case(lambda m, x: F.avg_pool2d(x, 3, 2, ceil_mode=True)),
    "max pool": Case(lambda m, x: F.max_pool2d(x, 3, 2, 1)),
    "mean": Case(lambda m, x: x.mean((2, 3), keepdim=True)),
    "sum": Case(lambda m, x: x.sum((2, 3), keepdim=True), 0),
    # a size as an operand
    "times a size": Case(lambda m, x: x * x.shape[2], 0),
    "over a size": Case(lambda m, x: x / x.shape[2], 0),
    "a size over it": Case(lambda m, x: x.shape[2] / (x.abs() + 1), 0),
    "plus a size": Case(lambda m, x: x + x.shape[2], 0),
    "minus from a size": Case(lambda m, x: x.shape[2] - x, 0),
    "alpha": Case(lambda m, x: torch.add(x, x.tanh(), alpha=x.shape[2]), 0),
}  # fmt: skip


def fold_everywhere(net: nn.Module, case: Case) -> bnfold.Folded:
    net = net.double().eval()
    folded = bnfold.fold(net, (noise(2, 4, *case.example),), dynamic_shapes=((FREE,),))
    reference = copy.deepcopy(net)
    for batch, height, width in case.sizes:
        x = noise(batch, 4, height, width, seed=height)
        with torch.no_grad():
            assert_close(folded.module(x), reference(x))
    return folded


def gone(folded: bnfold.Folded) -> int:
    return 2 - operators(folded.program)["batch_norm"]


def channels_kept(net: nn.Module) -> nn.Module:
    """Its BatchNorms have a gain per channel, positive so that it passes maxima."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data = torch.tensor([0.5, 1.0, 1.5, 2.0], dtype=torch.float64)
    return net


@pytest.mark.parametrize("name", CASES)
def test_what_folds_at_one_size_is_right_at_all(name):
    case = CASES[name]
    net = build(
        lambda m, x: m.after(case.run(m, m.second(m.before(x).sigmoid()))).tanh() + m.third(case.run(m, m.other(x))),
        before=nn.Conv2d(4, 4, 1), after=nn.Conv2d(4, 4, 1), other=nn.Conv2d(4, 4, 1),
        second=nn.BatchNorm2d(4), third=nn.BatchNorm2d(4), kernel=noise(4, 4, 3, 3),
    )  # fmt: skip
    folded = fold_everywhere(channels_kept(net), case)
    assert gone(folded) == case.folds, [(e.value, e.refusals) for e in folded.ledger.left]


def test_the_reason_names_what_depends_on_a_size():
    net = build(lambda m, x: m.norm(m.conv(x).roll(half(x, 2), 1)), conv=nn.Conv2d(4, 4, 1), norm=nn.BatchNorm2d(4))
    folded = fold_everywhere(net, CASES["roll channels"])
    (left,) = folded.ledger.left
    assert [(r.reason, r.operator) for r in left.refusals] == [("dynamic-size", "aten.roll"), ("model-output", "")]


def test_a_table_that_is_cut_to_a_size_takes_the_scale():
    """Every row of the table may be reached, so all of them take it; a part that is read as it is keeps it."""
    parts = {"fc": nn.Linear(4, 4), "norm": nn.Linear(4, 4), "table": noise(40, 4), "c": noise(4)}
    net = build(lambda m, x: (m.fc(x) + m.table[: x.shape[1]]) * m.c, **parts)
    both = build(
        lambda m, x: ((m.fc(x) + m.table[: x.shape[1]]) * m.c, m.table[x.shape[1] : x.shape[1] * 2].tanh()), **parts
    )
    for module, left in ((net, 0), (both, 0)):
        folded = bnfold.fold(module, (noise(2, 5, 4),), dynamic_shapes=(({0: Dim.AUTO, 1: Dim.AUTO},),))
        assert len(folded.ledger.left) == left
        for length in (3, 7, 13, 20):
            x = noise(1, length, 4, seed=length)
            with torch.no_grad():
                assert_close(folded.module(x), module(x))


def test_an_affine_on_the_first_position_of_a_dynamic_axis():
    net = build(
        lambda m, x: (
            y := torch.cat([m.token.expand(x.shape[0], -1, -1), m.fc(x)], 1), m.head((y[:, 0] * m.c).tanh()), y[:, 1:]
        )[1:],
        token=nn.Parameter(noise(1, 1, 4)), fc=nn.Linear(4, 4), head=nn.Linear(4, 2), c=noise(4),
    )  # fmt: skip
    folded = bnfold.fold(net, (noise(2, 5, 4),), dynamic_shapes=(({0: Dim.AUTO, 1: Dim.AUTO},),))
    assert not folded.ledger.left
    for length in (3, 7, 13, 20):
        with torch.no_grad():
            assert_close(folded.module(x := noise(3, length, 4)), net(x))


def graph_of(run: Callable[[nn.Module, Tensor], Tensor], *shape: int) -> Graph:
    return Graph(capture(build(run), (noise(*shape),), dynamic_shapes=((FREE,),)).program)


def test_sizes_that_are_chosen_are_legal_and_differ():
    graph = graph_of(lambda m, x: F.pixel_unshuffle(x, 4) + 1, 2, 4, 16, 16)
    (image,) = (n for n in graph.graph.nodes if n.name == "inputs_0")
    chosen = []
    for way in range(WAYS):
        graph.resize(way)
        batch, _, height, width = graph.shape(image)
        assert height % 4 == width % 4 == 0 and (way == 2 or len({batch, height, width}) == 3)
        chosen.append((batch, height, width))
    assert len(set(chosen)) == WAYS


def test_the_size_of_an_axis_may_be_an_expression():
    """``Dim`` says so, or a guard that made two axes one."""
    size = Dim("size", min=4, max=40)
    net = build(lambda m, x: m.norm(m.conv(x)), conv=nn.Conv2d(4, 4, 1), norm=nn.BatchNorm2d(4))
    folded = bnfold.fold(net, (noise(2, 4, 8, 16),), dynamic_shapes=(({2: size, 3: 2 * size},),))
    assert not folded.ledger.left
    graph = Graph(grow(3389))
    (image,) = (n for n in graph.graph.nodes if n.name == "x")
    assert not image.meta["val"].shape[3].node.expr.is_symbol
    assert graph.example_shape(image)[2:] == (8, 8) != graph.shape(image)[2:]


def test_sizes_stay_in_their_range():
    height = Dim("height", min=12, max=18)
    net = build(lambda m, x: x.tanh())
    graph = Graph(capture(net, (noise(2, 4, 16, 8),), dynamic_shapes=(({2: height},),)).program)
    (value,) = graph.values()
    for way in range(WAYS):
        graph.resize(way)
        assert graph.shape(value)[0] == 2 and 12 <= graph.shape(value)[2] <= 18


def test_a_number_is_settled_only_where_its_range_leaves_no_choice():
    net = build(lambda m, x: F.pad(x, (0, x.shape[3] // 40, 0, -x.shape[2] % 4)))
    shapes = (({2: Dim("height", min=4, max=99), 3: Dim("width", min=4, max=39)},),)
    graph = Graph(capture(net, (noise(2, 4, 16, 16),), dynamic_shapes=shapes).program)
    *_, padded = graph.values()
    amounts = graph.call(padded)["pad"]
    assert [graph.settled(n) if graph.is_number(n) else n for n in amounts] == [0, 0, 0, None]
