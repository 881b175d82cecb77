"""Rows that average or compare elements: pools, resizing, attention over values, the ReLU family, maxima."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from checker import build, fold_exactly, noise, operators
from torch import Tensor, nn

import bnfold

ops = torch.ops.aten
IMAGE = (2, 4, 5, 7)
SEQUENCE = (2, 4, 7)
VOLUME = (2, 4, 3, 5, 4)


@dataclass
class Average:
    """``run`` averages a value of ``shape``; channels (axis 1) end up along ``axis``."""

    row: str
    run: Callable[[Tensor], Tensor]
    axis: int = 1
    shape: tuple[int, ...] = IMAGE
    #: Its weights sum to one everywhere.
    shifts: bool = True


resize = partial(partial, F.interpolate)

AVERAGES = [
    Average("avg_pool1d", lambda x: F.avg_pool1d(x, 3), shape=SEQUENCE),
    Average("avg_pool1d", lambda x: F.avg_pool1d(x, 3, 2, 1, count_include_pad=False), shape=SEQUENCE),
    Average("avg_pool1d", lambda x: F.avg_pool1d(x, 3, 2, 1), shape=SEQUENCE, shifts=False),
    Average("avg_pool1d", lambda x: F.avg_pool1d(x, 2, 2, ceil_mode=True), shape=SEQUENCE),
    Average("avg_pool2d", lambda x: F.avg_pool2d(x, (2, 3), (1, 2))),
    Average("avg_pool2d", lambda x: F.avg_pool2d(x, 3, padding=(0, 1)), shifts=False),
    Average("avg_pool2d", lambda x: F.avg_pool2d(x, 3, padding=1, count_include_pad=False)),
    Average("avg_pool2d", lambda x: F.avg_pool2d(x, 2, ceil_mode=True)),
    Average("avg_pool2d", lambda x: F.avg_pool2d(x, 3, 2, 1, True), shifts=False),
    Average("avg_pool2d", lambda x: F.avg_pool2d(x, 3, 2, 1, True, False)),
    Average("avg_pool2d", lambda x: F.avg_pool2d(x, 2, divisor_override=4)),
    Average("avg_pool2d", lambda x: F.avg_pool2d(x, (2, 3), divisor_override=5), shifts=False),
    Average("avg_pool2d", lambda x: F.avg_pool2d(x, 2, 2, 1, False, False, 4), shifts=False),
    Average("avg_pool2d", lambda x: F.avg_pool2d(x, 2, ceil_mode=True, divisor_override=4), shifts=False),
    Average("avg_pool3d", lambda x: F.avg_pool3d(x, 2, 1), shape=VOLUME),
    Average("avg_pool3d", lambda x: F.avg_pool3d(x, (1, 2, 3), padding=(0, 1, 1)), shape=VOLUME, shifts=False),
    Average("avg_pool3d", lambda x: F.avg_pool3d(x, 3, padding=1, count_include_pad=False), shape=VOLUME),
    Average("avg_pool3d", lambda x: F.avg_pool3d(x, 2, divisor_override=8), shape=VOLUME),
    Average("adaptive_avg_pool1d", lambda x: F.adaptive_avg_pool1d(x, 3), shape=SEQUENCE),
    Average("adaptive_avg_pool2d", lambda x: F.adaptive_avg_pool2d(x, 1)),
    Average("adaptive_avg_pool2d", lambda x: F.adaptive_avg_pool2d(x, (3, None))),
    Average("adaptive_avg_pool2d", lambda x: F.adaptive_avg_pool2d(x, (6, 4))),
    Average("adaptive_avg_pool3d", lambda x: F.adaptive_avg_pool3d(x, (2, 3, 3)), shape=VOLUME),
    Average("_adaptive_avg_pool2d", lambda x: ops._adaptive_avg_pool2d(x, [2, 3])),
    Average("_adaptive_avg_pool3d", lambda x: ops._adaptive_avg_pool3d(x, [2, 3, 1]), shape=VOLUME),
    Average("mean", lambda x: x.mean((2, 3))),
    Average("mean", lambda x: x.mean((-1, -2), keepdim=True)),
    Average("mean", lambda x: x.mean(-1)),
    Average("mean", lambda x: x.movedim(1, -1).mean(1), 2),
    Average("mean", lambda x: x.movedim(1, -1).mean((1, 2), keepdim=True), 3),
    Average("sum", lambda x: x.sum((2, 3))),
    Average("sum", lambda x: x.sum(-1, keepdim=True)),
    Average("upsample_nearest1d", resize(scale_factor=2), shape=SEQUENCE),
    Average("upsample_nearest2d", resize(size=(7, 3))),
    Average("upsample_nearest3d", resize(scale_factor=2), shape=VOLUME),
    Average("_upsample_nearest_exact1d", resize(size=11, mode="nearest-exact"), shape=SEQUENCE),
    Average("_upsample_nearest_exact2d", resize(scale_factor=1.5, mode="nearest-exact")),
    Average("_upsample_nearest_exact3d", resize(size=(2, 2, 5), mode="nearest-exact"), shape=VOLUME),
    Average("upsample_linear1d", resize(scale_factor=2, mode="linear"), shape=SEQUENCE),
    Average("upsample_linear1d", resize(size=5, mode="linear", align_corners=True), shape=SEQUENCE),
    Average("upsample_bilinear2d", resize(scale_factor=(2, 1.5), mode="bilinear")),
    Average("upsample_bilinear2d", resize(size=(9, 3), mode="bilinear", align_corners=True)),
    Average("upsample_trilinear3d", resize(scale_factor=2, mode="trilinear"), shape=VOLUME),
    Average("upsample_bicubic2d", resize(scale_factor=2, mode="bicubic")),
    Average("upsample_bicubic2d", resize(size=(3, 11), mode="bicubic", align_corners=True)),
    Average("_upsample_bilinear2d_aa", resize(size=(3, 4), mode="bilinear", antialias=True)),
    Average("_upsample_bicubic2d_aa", resize(size=(3, 12), mode="bicubic", antialias=True)),
]
AVERAGE_CASES = [pytest.param(case, id=f"{case.row}-{i}") for i, case in enumerate(AVERAGES)]


def pointwise(dims: int) -> nn.Module:
    return {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims](4, 4, 1)


def norm(dims: int) -> nn.Module:
    return {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dims](4)


@pytest.mark.parametrize("case", AVERAGE_CASES)
def test_an_average_lets_an_affine_after_it_go_before(case):
    out = case.run(torch.zeros(case.shape))
    c, d = (noise(4, seed=seed).reshape(-1, *[1] * (out.ndim - 1 - case.axis)) for seed in (1, 2))
    net = build(lambda m, x: case.run(m.conv(x)) * m.c + m.d, conv=pointwise(len(case.shape) - 2), c=c, d=d)
    left = set() if case.shifts else {"zero-padding", "model-output"}
    folded = fold_exactly(net, noise(*case.shape), left=left)
    assert operators(folded.program)[case.row] == 1
    assert operators(folded.program)["mul"] == 0


@pytest.mark.parametrize("case", AVERAGE_CASES)
def test_an_average_lets_an_affine_before_it_go_after(case):
    net = build(
        lambda m, x: m.linear(case.run(m.norm(x)).movedim(case.axis, -1)),
        norm=norm(len(case.shape) - 2), linear=nn.Linear(4, 3),
    )  # fmt: skip
    if not case.shifts:
        fold_exactly(net, noise(*case.shape), left={"model-input", "zero-padding"})
        with torch.no_grad():  # only the shift is in the way
            net.norm.running_mean.zero_()
            net.norm.bias.zero_()
    folded = fold_exactly(net, noise(*case.shape))
    assert operators(folded.program)[case.row] == 1


# -- attention over values ---------------------------------------------------------------------------------------------


def weights(x: Tensor) -> Tensor:
    return (x @ x.mT).softmax(-1)


def in_heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (2, 2)).transpose(1, 2)


def attention(x: Tensor, **options: object) -> Callable[[Tensor], Tensor]:
    return partial(F.scaled_dot_product_attention, x, x, **options)  # type: ignore[arg-type]


MASK = noise(7, 7).tril() - 0.5
#: ``run(x, v)`` attends over v, (N, L, C), by what x says
ATTENTION = {
    "matmul": lambda x, v: weights(x) @ v,
    "bmm": lambda x, v: torch.bmm(weights(x), v),
    "dropout": lambda x, v: F.dropout(weights(x), 0.5, training=False) @ v,
    "heads": lambda x, v: (weights(in_heads(x)) @ in_heads(v)).transpose(1, 2).flatten(2),
    "heads in the batch": lambda x, v: torch.bmm(
        weights(in_heads(x)).reshape(-1, 7, 7), in_heads(v).reshape(-1, 7, 2)
    ).view(-1, 2, 7, 2).transpose(1, 2).reshape(-1, 7, 4),
    "expand": lambda x, v: (weights(x).unsqueeze(1).expand(-1, 2, -1, -1) @ in_heads(v)).transpose(1, 2).flatten(2),
    "clone": lambda x, v: weights(x).clone().contiguous() @ v,
    "-inf mask": lambda x, v: (x @ x.mT).masked_fill(MASK == -0.5, -torch.inf).softmax(-1) @ v,
    "sdpa": lambda x, v: attention(x)(v),
    "sdpa, causal": lambda x, v: attention(x, is_causal=True)(v),
    "sdpa, mask": lambda x, v: attention(x, attn_mask=MASK)(v),
    "sdpa, boolean mask": lambda x, v: attention(x, attn_mask=MASK > -1)(v),
    "sdpa, scale": lambda x, v: attention(x, scale=0.1)(v),
    "sdpa, heads": lambda x, v: attention(in_heads(x))(in_heads(v)).transpose(1, 2).flatten(2),
}  # fmt: skip


@pytest.mark.parametrize("run", ATTENTION.values(), ids=ATTENTION.keys())
def test_attention_over_values(run):
    after = build(lambda m, x: run(x, m.v(x)) * m.c + m.d, v=nn.Linear(4, 4), c=noise(4), d=noise(4))
    assert set(fold_exactly(after, noise(2, 7, 4)).ledger.entries[0].into) == {"v"}
    before = build(lambda m, x: m.o(run(x, x * m.c + m.d)), o=nn.Linear(4, 4), c=noise(4), d=noise(4))
    assert set(fold_exactly(before, noise(2, 7, 4)).ledger.entries[0].into) == {"o"}


NOT_AVERAGES = {
    "softmax over the queries": (
        lambda m, x: ((x @ x.mT).softmax(-2) @ m.v(x)) + m.c, {"shift-through-product", "model-output"}),
    "weights that are no softmax": (
        lambda m, x: ((x @ x.mT).sigmoid() @ m.v(x)) + m.c, {"shift-through-product", "model-output"}),
    "weights scaled after the softmax": (
        lambda m, x: ((weights(x) * 2 * x[:, :, :1]) @ m.v(x)) + m.c, {"shift-through-product", "model-output"}),
    "along the queries": (
        lambda m, x: (weights(x) @ m.v(x)) * m.d, {"other-axis", "model-output"}),
    "along the keys": (
        lambda m, x: m.v(weights(x) @ (x.tanh() * m.d)), {"nonlinear", "other-axis"}),
    "the weights depend on it": (
        lambda m, x: m.v(weights(y := x * m.c) @ y), {"model-input", "other-axis"}),
    "sdpa whose keys depend on it": (
        lambda m, x: m.v(attention(y := x * m.c)(y)), {"model-input", "nonlinear"}),
    "sdpa, one value for all": (lambda m, x: attention(y := m.v(x))(y) * m.c, {"nonlinear", "model-output"}),
    "sdpa with fewer heads for the values": (
        lambda m, x: F.scaled_dot_product_attention(
            in_heads(x), in_heads(x)[:, :1], in_heads(m.v(x))[:, :1], enable_gqa=True) * 2.0,
        {"nonlinear", "model-output"}),
    "sum over a batch of any size": (lambda m, x: m.v(x).sum(0) + 2, {"dynamic-size", "model-output"}),
    "mean over the channels": (lambda m, x: (x * m.c).mean(-1, keepdim=True), {"model-input", "other-axis"}),
}  # fmt: skip


@pytest.mark.parametrize("case", NOT_AVERAGES)
def test_what_is_no_average_refuses(case):
    run, reasons = NOT_AVERAGES[case]
    fold_exactly(build(run, v=nn.Linear(4, 4), c=noise(4), d=noise(7, 1)), noise(2, 7, 4), left=reasons)


def test_a_query_that_sees_nothing_takes_no_shift():
    """scaled_dot_product_attention gives zeros where a mask hides every key: the weights sum to zero there."""
    hidden = torch.ones(7, 7, dtype=torch.bool)
    hidden[3] = False

    def run(m, x, *mask):
        return F.scaled_dot_product_attention(x, x, m.v(x), mask[0] if mask else m.mask) * m.c + m.d

    net = build(run, v=nn.Linear(4, 4), c=noise(4), d=noise(4), mask=torch.zeros(1))
    net.mask = hidden
    fold_exactly(net, noise(2, 7, 4), left={"zero-padding", "model-output"})
    fold_exactly(net, noise(2, 7, 4), hidden, left={"zero-padding", "model-output"})


# -- the ReLU family and maxima ----------------------------------------------------------------------------------------


@dataclass
class Positive:
    """``run`` lets a positive scale pass, and a shift if ``shifts``."""

    row: str
    run: Callable[[Tensor], Tensor]
    shape: tuple[int, ...] = IMAGE
    shifts: bool = False


SLOPE = noise(4)
POSITIVE = [
    Positive("relu", F.relu),
    Positive("leaky_relu", F.leaky_relu),
    Positive("leaky_relu", lambda x: F.leaky_relu(x, -0.3)),
    Positive("prelu", lambda x: F.prelu(x, SLOPE)),
    Positive("prelu", lambda x: F.prelu(x, SLOPE[:1])),
    Positive("max_pool1d", lambda x: F.max_pool1d(x, 3, 2, 1), SEQUENCE, shifts=True),
    Positive("max_pool2d", lambda x: F.max_pool2d(x, 2), shifts=True),
    Positive("max_pool2d", lambda x: F.max_pool2d(x, (3, 2), (2, 1), (1, 0), (1, 2), True), shifts=True),
    Positive("max_pool3d", lambda x: F.max_pool3d(x, 3, 1, 1), VOLUME, shifts=True),
    Positive("max_pool2d_with_indices", lambda x: ops.max_pool2d_with_indices(x, [3, 3], [2, 2], [1, 1])[0],
             shifts=True),
    Positive("max_pool3d_with_indices", lambda x: F.max_pool3d(x, 2, return_indices=True)[0], VOLUME, shifts=True),
    Positive("adaptive_max_pool1d", lambda x: F.adaptive_max_pool1d(x, 3), SEQUENCE, shifts=True),
    Positive("adaptive_max_pool2d", lambda x: F.adaptive_max_pool2d(x, (2, 1)), shifts=True),
    Positive("adaptive_max_pool3d", lambda x: F.adaptive_max_pool3d(x, 1), VOLUME, shifts=True),
    Positive("amax", lambda x: x.amax((2, -1), keepdim=True), shifts=True),
    Positive("amin", lambda x: x.amin(-1).unsqueeze(2), shifts=True),
    Positive("abs", torch.abs),
    Positive("maximum", lambda x: torch.maximum(x, x.flip(2)), shifts=True),
    Positive("minimum", lambda x: torch.minimum(x, x.roll(1, 3)), shifts=True),
]  # fmt: skip
ROWS = {case.row for case in (*AVERAGES, *POSITIVE)} | {"scaled_dot_product_attention", "where", "masked_fill"}
POSITIVE_CASES = [pytest.param(case, id=f"{case.row}-{i}") for i, case in enumerate(POSITIVE)]


@pytest.mark.parametrize("case", POSITIVE_CASES)
def test_a_positive_scale_passes(case):
    dims = len(case.shape) - 2
    c = noise(4, *[1] * dims).abs() + 0.1
    after = build(lambda m, x: case.run(m.conv(x)) * m.c, conv=pointwise(dims), c=c)
    assert operators(fold_exactly(after, noise(*case.shape)).program)[case.row] == 1
    before = build(lambda m, x: m.conv(case.run(x * m.c)), conv=pointwise(dims), c=c)
    assert operators(fold_exactly(before, noise(*case.shape)).program)[case.row] == 1


@pytest.mark.parametrize("value", [0.0, -0.5])
@pytest.mark.parametrize("case", POSITIVE_CASES)
def test_a_negative_scale_does_not_and_a_zero_does(case, value):
    dims = len(case.shape) - 2
    c = noise(4, *[1] * dims).abs() + 0.1
    c[2] = value
    after = build(lambda m, x: case.run(m.conv(x)) * m.c, conv=pointwise(dims), c=c)
    # What is zero afterwards may be zero from the start, and what is zero before is left out by the convolution.
    fold_exactly(after, noise(*case.shape), left={"sign", "model-output"} if value else set())
    before = build(lambda m, x: m.conv(case.run(x * m.c)), conv=pointwise(dims), c=c)
    fold_exactly(before, noise(*case.shape), left={"model-input", "sign"} if value else set())


@pytest.mark.parametrize("case", POSITIVE_CASES)
def test_a_shift_passes_a_maximum_and_no_activation(case):
    dims = len(case.shape) - 2
    d = noise(4, *[1] * dims)
    after = build(lambda m, x: case.run(m.conv(x)) + m.d, conv=pointwise(dims), d=d)
    before = build(lambda m, x: m.conv(case.run(x + m.d)), conv=pointwise(dims), d=d)
    activation = "shift-through-activation"
    fold_exactly(after, noise(*case.shape), left=set() if case.shifts else {activation, "model-output"})
    fold_exactly(before, noise(*case.shape), left=set() if case.shifts else {"model-input", activation})


MASK_OF_IMAGE = noise(5, 7) > 0
CHOICES = {
    "where": lambda m, x: torch.where(MASK_OF_IMAGE, m.a(x), m.b(x)),
    "where, a mask from the inputs": lambda m, x: torch.where(x > 0.1, m.a(x), m.b(x)),
}
HIDDEN = {
    "masked_fill": lambda m, x: m.a(x).masked_fill(x[:, :1] > 0.1, 0.0),
    "where, zero": lambda m, x: torch.where(MASK_OF_IMAGE, m.a(x), 0.0),
    "where, zero first": lambda m, x: torch.where(MASK_OF_IMAGE, torch.zeros(()), m.a(x)),
}


@pytest.mark.parametrize("case", [*CHOICES, *HIDDEN])
def test_any_scale_passes_a_choice_and_a_shift_one_between_two_values(case):
    parts = {"a": pointwise(2), "b": pointwise(2), "c": noise(4, 1, 1), "d": noise(4, 1, 1)}
    run = (CHOICES | HIDDEN)[case]
    fold_exactly(build(lambda m, x: run(m, x) * m.c, **parts), noise(*IMAGE))
    left = set() if case in CHOICES else {"shift-through-activation", "model-output"}
    fold_exactly(build(lambda m, x: run(m, x) + m.d, **parts), noise(*IMAGE), left=left)


COMPARED = {
    "masked_fill with another value": (
        lambda m, x: m.a(x).masked_fill(x > 0.1, 1.0) * 2, {"nonlinear", "model-output"}),
    "masked_fill that makes the value larger": (
        lambda m, x: m.a(x)[:, :1].masked_fill(x > 0.1, 0.0) * 2, {"nonlinear", "model-output"}),
    "where with a constant": (lambda m, x: torch.where(x > 0.1, m.a(x), m.c) * 2, {"nonlinear", "model-output"}),
    "where of two shapes": (
        lambda m, x: torch.where(x > 0.1, m.a(x), m.b(x)[:, :1]) * 2, {"nonlinear", "model-output"}),
    "where, one side alone": (
        lambda m, x: m.b(torch.where(x > 0.1, x.sigmoid() * 2, x.tanh())), {"nonlinear", "unequal-scales"}),
    "amax over the channels": (
        lambda m, x: m.a(x).amax(1) * m.d, {"other-axis", "model-output"}),
    "amax, before, over the channels": (
        lambda m, x: m.b((x.sigmoid() * m.c.abs()).amax(1, keepdim=True).expand(-1, 4, -1, -1)),
        {"nonlinear", "other-axis"}),
    "adaptive_max_pool whose indices are read": (
        lambda m, x: ((y := F.adaptive_max_pool2d(m.a(x), 2, return_indices=True))[0] * 2, y[1]),
        set()),
    "adaptive_max_pool whose indices a sign would change": (
        lambda m, x: ((y := F.adaptive_max_pool2d(m.a(x), 2, return_indices=True))[0] * -2, y[1]),
        {"sign", "model-output"}),
    "maximum with a constant": (lambda m, x: torch.maximum(m.a(x), m.c) * 2, {"nonlinear", "model-output"}),
    "maximum of two shapes": (
        lambda m, x: torch.maximum(m.a(x), m.b(x)[:, :1]) * 2, {"nonlinear", "model-output"}),
    "maximum, one side alone": (
        lambda m, x: m.b(torch.maximum(x.sigmoid() * 2, x.tanh())), {"nonlinear", "unequal-scales"}),
    "maximum, two scales": (
        lambda m, x: m.b(torch.maximum(x.sigmoid() * 2, x.tanh() * 3)), {"nonlinear", "unequal-scales"}),
    "max_pool along its windows": (
        lambda m, x: F.max_pool2d(m.a(x), 3, 1, 1) * m.d, {"other-axis", "model-output"}),
    "max_pool whose indices are read": (
        lambda m, x: ((y := F.max_pool2d(m.a(x), 2, return_indices=True))[0] * 2, y[1]), set()),
    "max_pool whose indices a sign would change": (
        lambda m, x: ((y := F.max_pool2d(m.a(x), 2, return_indices=True))[0] * -2, y[1]), {"sign", "model-output"}),
    "prelu with a slope that is a value": (
        lambda m, x: F.prelu(m.a(x), x.mean((0, 2, 3))) * 2, {"nonlinear", "model-output"}),
}  # fmt: skip


@pytest.mark.parametrize("case", COMPARED)
def test_a_comparison_refuses(case):
    run, reasons = COMPARED[case]
    net = build(run, a=nn.Conv2d(4, 4, 1), b=nn.Conv2d(4, 4, 1), c=noise(4, 1, 1), d=noise(7).abs())
    fold_exactly(net, noise(*IMAGE), left=reasons)


def test_maximum_of_two_convolutions_with_one_affine_after():
    net = build(lambda m, x: torch.maximum(m.a(x), m.b(x)) * 2 + m.c,
                a=nn.Conv2d(4, 4, 1), b=nn.Conv2d(4, 4, 1), c=noise(4, 1, 1))  # fmt: skip
    assert set(fold_exactly(net, noise(*IMAGE)).ledger.entries[0].into) == {"a", "b"}


def test_random_dropout_inside_attention_refuses():
    net = build(lambda m, x: attention(x, dropout_p=0.5)(m.v(x)) * m.c, v=nn.Linear(4, 4), c=noise(4))
    (entry,) = bnfold.fold(net, (noise(2, 7, 4),)).ledger.left
    assert [refusal.reason for refusal in entry.refusals] == ["nonlinear", "model-output"]
