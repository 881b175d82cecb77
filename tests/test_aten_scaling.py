"""Rows that multiply and add: normalisations, constants along the right axis and the wrong one, sums and products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checker import build, fold_exactly, noise, operators, removed
from torch import Tensor, nn

import bnfold

ops = torch.ops.aten
IMAGE = (2, 4, 5, 7)


def conv(bias: bool = True) -> nn.Module:
    return nn.Conv2d(4, 4, 1, bias=bias)


# -- normalisations ----------------------------------------------------------------------------------------------------


def functional(m: Any, x: Tensor) -> Tensor:
    return F.batch_norm(x, m.mean, m.var, m.weight, m.bias, eps=0.3)


STATISTICS = {"mean": noise(4), "var": noise(4).square(), "weight": nn.Parameter(noise(4)), "bias": noise(4, seed=1)}

NORMS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "batch_norm": (lambda m, x: m.norm(x), {"norm": nn.BatchNorm2d(4)}),
    "batch_norm, eps": (lambda m, x: m.norm(x), {"norm": nn.BatchNorm2d(4, eps=0.5)}),
    "batch_norm, not affine": (lambda m, x: m.norm(x), {"norm": nn.BatchNorm2d(4, affine=False)}),
    "batch_norm, momentum None": (lambda m, x: m.norm(x), {"norm": nn.BatchNorm2d(4, momentum=None)}),
    "batch_norm, synchronised": (lambda m, x: m.norm(x), {"norm": nn.SyncBatchNorm(4)}),
    "batch_norm, function": (functional, STATISTICS),
    "batch_norm, function without a bias": (
        lambda m, x: F.batch_norm(x, m.mean, m.var, m.weight), {n: STATISTICS[n] for n in ("mean", "var", "weight")}),
    "batch_norm, function without a weight": (
        lambda m, x: F.batch_norm(x, m.mean, m.var, None, m.bias), {n: STATISTICS[n] for n in ("mean", "var", "bias")}),
    "instance_norm": (
        lambda m, x: m.norm(x), {"norm": nn.InstanceNorm2d(4, affine=True, track_running_stats=True)}),
    "instance_norm, not affine": (lambda m, x: m.norm(x), {"norm": nn.InstanceNorm2d(4, track_running_stats=True)}),
    "_native_batch_norm_legit_no_training": (
        lambda m, x: ops._native_batch_norm_legit_no_training(x, m.weight, m.bias, m.mean, m.var, 0.1, 1e-5)[0],
        STATISTICS),
    "native_batch_norm": (
        lambda m, x: ops.native_batch_norm(x, m.weight, m.bias, m.mean, m.var, False, 0.1, 1e-5)[0], STATISTICS),
}  # fmt: skip


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("case", NORMS)
def test_a_norm_folds_both_ways(case, bias):
    run, parts = NORMS[case]
    row = case.split(",")[0]
    after = build(lambda m, x: run(m, m.conv(x)), conv=conv(bias), **parts)
    folded = fold_exactly(after, noise(*IMAGE))
    assert removed(folded) == {row: 1}
    assert folded.ledger.entries[0].is_batch_norm and folded.ledger.entries[0].outcome == "backward"
    before = build(lambda m, x: m.conv(run(m, x)), conv=conv(bias), **parts)
    folded = fold_exactly(before, noise(*IMAGE))
    assert removed(folded) == {row: 1}
    assert folded.ledger.entries[0].outcome == "forward"


@pytest.mark.parametrize(("make", "shape"), [
    (nn.BatchNorm1d, (2, 4)), (nn.BatchNorm1d, (2, 4, 5)), (nn.BatchNorm3d, (2, 4, 2, 3, 4)),
    (lambda c: nn.InstanceNorm1d(c, track_running_stats=True), (2, 4, 5)),
    (lambda c: nn.InstanceNorm3d(c, track_running_stats=True), (2, 4, 2, 3, 4)),
])  # fmt: skip
def test_a_norm_of_any_number_of_axes(make, shape):
    net = build(lambda m, x: m.linear(m.norm(x).movedim(1, -1)), norm=make(4), linear=nn.Linear(4, 3))
    fold_exactly(net, noise(*shape))


class Last(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.movedim(1, -1)


class First(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.movedim(-1, 1)


def settled(module: nn.Module) -> nn.Module:
    """Weights and biases of norms as training leaves them."""
    for i, parameter in enumerate(module.parameters()):
        parameter.data = noise(*parameter.shape, seed=7 + i)
    return module


def untracked(kind: type[nn.Module]) -> nn.Module:
    return kind(4, track_running_stats=False)


NOT_CONSTANT = {
    "no running statistics": (lambda m, x: m.norm(m.conv(x)), {"norm": untracked(nn.BatchNorm2d)}, "batch-statistics"),
    "native, training": (
        lambda m, x: ops.native_batch_norm(m.conv(x), None, None, m.mean + 0, m.var + 0, True, 0.1, 1e-5)[0],
        STATISTICS, "batch-statistics"),
    "statistics of the input": (
        lambda m, x: F.batch_norm(m.conv(x), x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)), {}, "not-constant"),
    "a weight from the input": (
        lambda m, x: F.batch_norm(m.conv(x), m.mean, m.var, x.mean((0, 2, 3)), m.bias), STATISTICS, "not-constant"),
}  # fmt: skip


@pytest.mark.parametrize("case", NOT_CONSTANT)
def test_a_norm_without_constants_is_left(case):
    run, parts, reason = NOT_CONSTANT[case]
    fold_exactly(build(run, conv=conv(), **parts), noise(*IMAGE), left={reason}, dynamic=False)


BROKEN = {
    "NaN in the variance": ("running_var", 2, torch.nan, "running_var is NaN or infinite in channels [2]"),
    "infinity in the mean": ("running_mean", 1, torch.inf, "running_mean is NaN or infinite in channels [1]"),
    "NaN in the weight": ("weight", 3, torch.nan, "weight is NaN or infinite in channels [3]"),
    "-inf in the bias": ("bias", 0, -torch.inf, "bias is NaN or infinite in channels [0]"),
    "negative variance": ("running_var", 1, -0.5, "variance + eps is not positive in channels [1]"),
    "variance of -eps": ("running_var", 0, -1e-5, "variance + eps is not positive in channels [0]"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_statistic_is_refused_and_its_channel_named(case):
    tensor, channel, value, words = BROKEN[case]
    net = build(lambda m, x: m.norm(m.conv(x)), conv=conv(), norm=nn.BatchNorm2d(4))
    with torch.no_grad():
        getattr(net.norm, tensor)[channel] = value
    folded = fold_exactly(net, noise(*IMAGE), left={"nonfinite"})
    assert {refusal.detail for refusal in folded.ledger.left[0].refusals} == {words}
    with pytest.raises(bnfold.FoldError, match="module 'norm'"):
        bnfold.fold(net, (noise(*IMAGE),), allow_nonfinite=False)


def test_gamma_of_zero_and_a_tiny_variance_fold_as_they_are():
    net = build(lambda m, x: m.norm(m.conv(x)), conv=conv(), norm=nn.BatchNorm2d(4, eps=1e-13))
    with torch.no_grad():
        net.norm.weight[1] = 0
        net.norm.running_var[2] = 1e-12
    folded = fold_exactly(net, noise(*IMAGE))
    weight, bias = (folded.program.state_dict[f"conv.{name}"] for name in ("weight", "bias"))
    assert not weight[1].any() and bias[1] == net.norm.bias[1]
    assert weight[2].abs().max() > 1e4


# -- constants ---------------------------------------------------------------------------------------------------------

C = nn.Parameter(noise(4, 1, 1, seed=5))
CONSTANTS: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "x * c": (lambda m, x: x * m.c, "mul"),
    "c * x": (lambda m, x: m.c * x, "mul"),
    "x * 3": (lambda m, x: x * 3, "mul"),
    "0.5 * x": (lambda m, x: 0.5 * x, "mul"),
    "x * 0-dim tensor": (lambda m, x: x * m.scalar, "mul"),
    "x * (1, C, 1, 1)": (lambda m, x: x * m.c[None], "mul"),
    "multiply": (lambda m, x: ops.multiply(x, m.c), "multiply"),
    "x / c": (lambda m, x: x / m.c, "div"),
    "x / 7": (lambda m, x: x / 7, "div"),
    "divide": (lambda m, x: ops.divide(x, m.c), "divide"),
    "true_divide": (lambda m, x: ops.true_divide(x, m.c), "true_divide"),
    "x + c": (lambda m, x: x + m.c, "add"),
    "c + x": (lambda m, x: m.c + x, "add"),
    "x + 1": (lambda m, x: x + 1, "add"),
    "x + 2c": (lambda m, x: torch.add(x, m.c, alpha=2), "add"),
    "c + 2x": (lambda m, x: torch.add(m.c, x, alpha=2), "add"),
    "c + 0x": (lambda m, x: torch.add(m.c, x, alpha=0), "add"),
    "x - c": (lambda m, x: x - m.c, "sub"),
    "c - x": (lambda m, x: m.c - x, "sub"),
    "x - 0.25": (lambda m, x: x - 0.25, "sub"),
    "1 - x": (lambda m, x: 1 - x, "rsub"),
    "rsub": (lambda m, x: torch.rsub(x, m.c, alpha=3), "rsub"),
    "x - 2c": (lambda m, x: torch.sub(x, m.c, alpha=2), "sub"),
    "c - 2x": (lambda m, x: torch.sub(m.c, x, alpha=2), "sub"),
    "subtract": (lambda m, x: ops.subtract(x, m.c), "subtract"),
    "c rsub x": (lambda m, x: torch.rsub(m.c, x, alpha=3), "rsub"),
    "-x": (lambda m, x: -x, "neg"),
    "negative": (lambda m, x: ops.negative(x), "negative"),
}


@pytest.mark.parametrize("case", CONSTANTS)
def test_a_constant_folds_both_ways(case):
    run, row = CONSTANTS[case]
    parts = {"conv": conv(bias=False), "c": C, "scalar": torch.tensor(-1.5)}
    for net in (build(lambda m, x: run(m, m.conv(x)), **parts), build(lambda m, x: m.conv(run(m, x)), **parts)):
        folded = fold_exactly(net, noise(*IMAGE))
        assert removed(folded)[row] == 1
        assert operators(folded.program) == {"conv2d": 1}


NUMBERS = {
    "1 - x": (lambda x: 1 - x, "rsub"),
    "rsub": (lambda x: torch.rsub(x, 0.75, alpha=2), "rsub"),
    "add": (lambda x: ops.add.Scalar(x, 0.75, 2), "add"),
    "sub": (lambda x: ops.sub.Scalar(x, 0.75, 2), "sub"),
}


@pytest.mark.parametrize("case", NUMBERS)
def test_a_number_becomes_one_for_each_channel(case):
    """A scale in front of a ReLU passes the addition of a number, which is stored times the scale then."""
    run, row = NUMBERS[case]
    net = build(
        lambda m, x: m.conv(torch.relu(run(torch.relu(x * m.c)))),
        conv=nn.Conv2d(IMAGE[1], 5, 3), c=torch.rand(IMAGE[1], 1, 1, generator=torch.Generator().manual_seed(3)) + 0.5,
    )  # fmt: skip
    folded = fold_exactly(net, noise(*IMAGE), left=None)
    assert operators(folded.program) == {"relu": 2, row: 1, "conv2d": 1}


@pytest.mark.parametrize("run", [lambda x, c: x * c, lambda x, c: c - x, lambda x, c: x / c])
def test_a_constant_of_shape_c_after_a_linear(run):
    net = build(lambda m, x: run(m.linear(x), m.c), linear=nn.Linear(4, 4), c=noise(4))
    fold_exactly(net, noise(2, 3, 4))


NORMALISED = {
    "group_norm": nn.GroupNorm(2, 4),
    "group_norm, not affine": nn.GroupNorm(4, 4, affine=False),
    "instance_norm": nn.InstanceNorm2d(4, affine=True),
    "instance_norm, not affine": nn.InstanceNorm2d(4),
    "layer_norm": nn.Sequential(Last(), nn.LayerNorm(4), First()),
    "layer_norm, not affine": nn.Sequential(Last(), nn.LayerNorm(4, elementwise_affine=False), First()),
    "layer_norm without a bias": nn.Sequential(Last(), nn.LayerNorm(4, bias=False), First()),
    "layer_norm over an image": nn.LayerNorm((4, 5, 7)),
}


@pytest.mark.parametrize("case", NORMALISED)
def test_an_affine_after_a_norm_goes_into_its_own_constants_and_none_before_it_does(case):
    row = case.split(",")[0].split()[0]
    parts = {"own": settled(NORMALISED[case]), "norm": nn.BatchNorm2d(4), "conv": conv(), "c": noise(7)}
    folded = fold_exactly(build(lambda m, x: m.norm(m.own(x)), **parts), noise(*IMAGE))
    assert removed(folded) == {"batch_norm": 1} and operators(folded.program)[row] == 1
    assert [entry.kind for entry in folded.ledger.entries] == ["batch_norm"]
    fold_exactly(build(lambda m, x: m.own(m.norm(x)), **parts), noise(*IMAGE), left={"model-input", "nonlinear"})
    if "image" not in case:
        fold_exactly(build(lambda m, x: m.own(x) * m.c, **parts), noise(*IMAGE), left={"other-axis", "model-output"})


def test_a_norm_whose_weight_comes_from_the_inputs_takes_nothing():
    run = lambda m, x: F.group_norm(x, 2, x.mean((0, 2, 3)), m.bias) * 2  # noqa: E731
    fold_exactly(build(run, bias=noise(4)), noise(*IMAGE), left={"nonlinear", "model-output"}, dynamic=False)


ROWS = {name.split(",")[0].split()[0] for name in (*NORMS, *NORMALISED)} | {row for _, row in CONSTANTS.values()}
OTHER_AXES = {
    "width": (lambda m, x: m.conv(x) * m.c, (7,), {"other-axis", "model-output"}),
    "height": (lambda m, x: m.conv(x) + m.c, (5, 1), {"other-axis", "model-output"}),
    "width, before": (lambda m, x: m.conv(x * m.c), (7,), {"model-input", "other-axis"}),
    "height, before": (lambda m, x: m.conv(x / m.c), (1, 5, 1), {"model-input", "other-axis"}),
    # Neither is a per-channel affine: no entry, and nothing changes.
    "height and width": (lambda m, x: m.conv(x) * m.c, (5, 7), set()),
    "channels and width": (lambda m, x: m.conv(x) + m.c, (4, 1, 7), set()),
    "it has more axes than the value": (lambda m, x: m.conv(x) * m.c, (3, 1, 4, 1, 1), set()),
    "it widens the value": (lambda m, x: m.conv(x)[:, :1] * m.c, (4, 1, 1), set()),
    "-inf": (lambda m, x: m.conv(x) + m.c.masked_fill(m.c > 0, -torch.inf), (4, 1, 1), set()),
    "c / x": (lambda m, x: m.c / m.conv(x), (4, 1, 1), set()),
    "x // c": (lambda m, x: torch.div(m.conv(x), m.c, rounding_mode="floor"), (4, 1, 1), set()),
    "x / 0": (lambda m, x: m.conv(x) / (m.c * 0), (4, 1, 1), set()),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHER_AXES)
def test_a_constant_that_is_no_channel_affine(case):
    run, shape, reasons = OTHER_AXES[case]
    # As many channels as rows and columns: nothing but the axis tells them apart.
    net = build(run, conv=nn.Conv2d(4, 4, 1), c=noise(*shape))
    folded = fold_exactly(net, noise(*IMAGE), left=reasons)
    assert len(folded.ledger.entries) == bool(reasons)
    assert torch.equal(folded.program.state_dict["conv.weight"], net.conv.weight)


@pytest.mark.parametrize(("shape", "reasons"), [
    ((4, 1, 1), set()), ((4, 1), {"other-axis", "model-output"}), ((4,), {"other-axis", "model-output"}),
    ((4, 1, 1, 1), {"other-axis", "model-output"}),
])  # fmt: skip
def test_axes_of_one_size_are_told_apart(shape, reasons):
    net = build(lambda m, x: m.conv(x) * m.c, conv=conv(), c=noise(*shape))
    fold_exactly(net, noise(4, 4, 4, 4), left=reasons, dynamic=False)


WHOLE = torch.tensor([3, 7, 9, 11]).reshape(4, 1, 1)
BY_INTEGERS: dict[str, tuple[Callable[..., Any], Callable[[Tensor], Tensor]]] = {
    "x / n": (lambda x, n: x / n, lambda n: 1 / n),
    "x * (1 / n)": (lambda x, n: x * (1 / n), lambda n: 1 / n),
    "x * n": (lambda x, n: x * n, lambda n: n),
    "x * n.sqrt()": (lambda x, n: x * n.sqrt(), torch.sqrt),
    "x * (n * 0.1)": (lambda x, n: x * (n * 0.1), lambda n: n * 0.1),
}


@pytest.mark.parametrize("case", BY_INTEGERS)
def test_a_constant_of_integers_is_computed_in_float64(case):
    run, scale = BY_INTEGERS[case]
    net = build(lambda m, x: run(m.conv(x), m.n), conv=conv(), n=WHOLE).float()
    folded = bnfold.fold(net, (noise(*IMAGE).float(),))
    wanted = net.conv.weight.detach().double() * scale(WHOLE.double())[..., None]
    assert torch.equal(folded.program.state_dict["conv.weight"], wanted.float())


# -- sums and products of values ---------------------------------------------------------------------------------------


def two(**more: Any) -> dict[str, Any]:
    return {"a": conv(), "b": conv(bias=False), "norm": nn.BatchNorm2d(4), "c": noise(4, 1, 1, seed=7), **more}


SUMS: dict[str, tuple[Callable[..., Any], set[str]]] = {
    "add": (lambda m, x: m.norm(m.a(x) + m.b(x)), set()),
    "add, alpha": (lambda m, x: m.norm(torch.add(m.a(x), m.b(x), alpha=-2)), set()),
    "sub": (lambda m, x: m.norm(m.a(x) - m.b(x)), set()),
    "sub, alpha": (lambda m, x: m.norm(torch.sub(m.b(x), m.a(x), alpha=3)), set()),
    "subtract": (lambda m, x: m.norm(ops.subtract(m.b(x), m.a(x))), set()),
    "rsub": (lambda m, x: m.norm(torch.rsub(m.b(x), m.a(x), alpha=3)), set()),
    "the second operand alone takes a shift": (lambda m, x: torch.sub(x.tanh(), m.a(x), alpha=3) + m.c, set()),
    "alpha 0": (lambda m, x: m.norm(torch.add(m.a(x), m.b(x), alpha=0)), set()),
    "twice the same": (lambda m, x: m.norm((y := m.a(x)) + y), set()),
    "broadcast over the image": (lambda m, x: m.norm(m.a(x) + m.b(x.mean((2, 3), keepdim=True))), set()),
    "broadcast over the channels": (
        lambda m, x: m.norm(m.a(x) + m.b(x)[:, :1]), {"broadcast", "model-output"}),
    "one operand is the input": (
        lambda m, x: m.norm(m.a(x.tanh()) + x.sigmoid()), {"nonlinear", "model-output"}),
    "before: one affine on both": (lambda m, x: m.a((y := x * m.c).flip(3) + y), set()),
    "before: a shift on one": (lambda m, x: m.a(x.tanh() + (x.sigmoid() + m.c)), set()),
    "before: a scale on one": (
        lambda m, x: m.a(x.tanh() + x.sigmoid() * m.c), {"nonlinear", "unequal-scales"}),
    "before: sub": (lambda m, x: m.a(x.tanh() - (x.sigmoid() + m.c)), set()),
}  # fmt: skip
PRODUCTS: dict[str, tuple[Callable[..., Any], set[str]]] = {
    "gate": (lambda m, x: m.a(x) * x.sigmoid() * m.c, set()),
    "gate on the left": (lambda m, x: x.sigmoid() * m.b(x) * m.c, set()),
    "gate of a channel": (lambda m, x: m.a(x) * x.mean((1, 2, 3), keepdim=True).sigmoid() * m.c, set()),
    "squeeze and excite": (lambda m, x: m.a(x.mean((2, 3), keepdim=True)) * x.sigmoid() * m.c, set()),
    "dividend": (lambda m, x: m.a(x) / x.exp() * m.c, set()),
    "divide": (lambda m, x: ops.divide(m.a(x), x.exp()) * m.c, set()),
    "divisor": (lambda m, x: x.exp() / (m.a(x) + 9) * m.c, set()),
    "both broadcast along the channels": (
        lambda m, x: m.a(x)[:, :1] * x.sigmoid()[:, 1:2] * 2.0, set()),
    "neither factor takes it": (lambda m, x: x.sigmoid() * x.tanh() * m.c, {"nonlinear", "model-output"}),
    "square": (lambda m, x: (y := m.a(x)) * y * m.c, {"nonlinear", "model-output"}),
    "before: a square": (lambda m, x: m.a((y := x.sigmoid() * m.c) * y), set()),
    "quotient of one value": (lambda m, x: (y := m.a(x).exp()) / y * m.c, {"nonlinear", "model-output"}),
    "a shift": (lambda m, x: m.a(x) * x.sigmoid() + m.c, {"shift-through-product", "model-output"}),
    "before: a scale": (lambda m, x: m.a((x.sigmoid() * m.c) * x.tanh()), set()),
    "before: a scale on both": (lambda m, x: m.a((y := x.sigmoid() * m.c) * y.flip(3)), set()),
    "before: a shift": (
        lambda m, x: m.a((x.sigmoid() + m.c) * x.tanh()), {"nonlinear", "shift-through-product"}),
    "before: a dividend": (lambda m, x: m.a((x.sigmoid() * m.c) / x.exp()), set()),
    "before: a divisor": (lambda m, x: m.a(x.sigmoid() / (x.exp() * m.c)), set()),
}  # fmt: skip


@pytest.mark.parametrize("case", SUMS)
def test_sum(case):
    run, reasons = SUMS[case]
    fold_exactly(build(run, **two()), noise(*IMAGE), left=reasons)


@pytest.mark.parametrize("case", PRODUCTS)
def test_product(case):
    run, reasons = PRODUCTS[case]
    fold_exactly(build(run, **two()), noise(*IMAGE), left=reasons)


@pytest.mark.parametrize(("table", "left"), [((1, 1, 6, 1), None), ((4, 1, 1), 0)])
def test_what_is_added_to_a_channel_that_is_multiplied_by_zero_counts(table, left):
    """No reader leaves such a channel out behind an addition that stays."""
    parts = {
        "first": nn.BatchNorm2d(4),
        "norm": nn.BatchNorm2d(4),
        "c": noise(*table, seed=5),
        "conv": nn.Conv2d(4, 3, 1),
    }
    net = build(lambda m, x: m.conv(m.norm(m.first(x)) + m.c), **parts)
    net.norm.weight.data[0] = 0
    fold_exactly(net, noise(2, 4, 6, 5), left=left)


def test_a_multiply_by_zero_cannot_make_up_for_a_shift_in_front_of_it():
    parts = {
        "first": nn.BatchNorm2d(4),
        "norm": nn.BatchNorm2d(4),
        "c": noise(4, 1, 1, seed=5),
        "conv": nn.Conv2d(4, 3, 1),
    }
    net = build(lambda m, x: m.conv(m.norm(m.first(x + x) * m.c)), **parts)
    for zeros in (net.first.weight, net.norm.weight, net.c):
        zeros.data[0] = 0
    fold_exactly(net, noise(2, 4, 6, 5), left=None)
