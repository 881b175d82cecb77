"""Ranges of weights and activations against their definitions, on layers of every layout."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import bnfold
from bnfold.report import LayerRange, NormRange, WeightRange
from bnfold.report.model import SPREAD_LIMIT
from bnfold.statistics.ranges import REACH, layer_ranges, norm_ranges

torch.set_num_threads(1)


def ranges(model: nn.Module, *shape: int, merge: bool = False) -> tuple[dict[str, LayerRange], dict[str, NormRange]]:
    folded = bnfold.fold(model, (torch.randn(*shape, generator=torch.Generator().manual_seed(0)),), merge=merge)
    layers = layer_ranges(folded.captured, folded.program, folded.ledger)
    return {layer.module: layer for layer in layers}, {n.module: n for n in norm_ranges(folded.captured, folded.ledger)}


def norm(channels: int, dims: int = 2, **state: float) -> Any:
    made = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dims](channels)
    zoo.randomize(made)
    for name, value in state.items():
        getattr(made, name).data.fill_(value)
    return made


# -- weights -----------------------------------------------------------------------------------------------------------

#: Layer, example shape, its weight as (output channels, everything else), its weight as (input channels, rest).
LAYOUTS: dict[str, tuple[nn.Module, tuple[int, ...], Any, Any]] = {
    "conv1d": (nn.Conv1d(3, 4, 3), (2, 3, 7), lambda w: w.flatten(1), lambda w: w.transpose(0, 1).flatten(1)),
    "conv2d": (nn.Conv2d(3, 4, 3), (2, 3, 7, 7), lambda w: w.flatten(1), lambda w: w.transpose(0, 1).flatten(1)),
    "conv3d": (nn.Conv3d(2, 4, 2), (2, 2, 4, 4, 4), lambda w: w.flatten(1), lambda w: w.transpose(0, 1).flatten(1)),
    "pointwise": (nn.Conv2d(3, 4, 1), (2, 3, 5, 5), lambda w: w.flatten(1), lambda w: w.transpose(0, 1).flatten(1)),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4), (2, 4, 7, 7), lambda w: w.flatten(1), lambda w: w.flatten(1)),
    "grouped": (
        nn.Conv2d(4, 6, 3, groups=2), (2, 4, 7, 7), lambda w: w.flatten(1),
        lambda w: torch.stack([w[3 * g : 3 * g + 3, i].flatten() for g in range(2) for i in range(2)]),
    ),
    "transposed": (
        nn.ConvTranspose2d(4, 3, 2), (2, 4, 5, 5), lambda w: w.transpose(0, 1).flatten(1), lambda w: w.flatten(1)
    ),
    "transposed, grouped": (
        nn.ConvTranspose2d(4, 6, 2, groups=2), (2, 4, 5, 5),
        lambda w: torch.stack([w[2 * g : 2 * g + 2, o].flatten() for g in range(2) for o in range(3)]),
        lambda w: w.flatten(1),
    ),
    "linear": (nn.Linear(3, 4), (2, 3), lambda w: w, lambda w: w.T),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_maxima_are_those_of_the_channels(name: str) -> None:
    layer, shape, outputs, inputs = LAYOUTS[name]
    (found,) = ranges(nn.Sequential(layer), *shape)[0].values()
    with torch.no_grad():
        ours, theirs = outputs(layer.weight).abs().amax(1), inputs(layer.weight).abs().amax(1)
    assert found.before == found.after
    assert found.after.maxima == pytest.approx(ours.tolist(), rel=1e-4)
    assert found.after.spread == pytest.approx(float(ours.max() / ours.quantile(0.5)), rel=1e-3)
    assert found.after.input_spread == pytest.approx(float(theirs.max() / theirs.quantile(0.5)), rel=1e-3)
    assert (found.after.smallest, found.after.largest) == (min(found.after.maxima), max(found.after.maxima))


def test_a_fold_multiplies_every_channel_by_its_scale() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), norm(8))
    layers, norms = ranges(model, 2, 3, 6, 6)
    layer, bn = layers["0"], norms["1"]
    assert layer.before is not None
    assert layer.after.maxima == pytest.approx([m * abs(s) for m, s in zip(layer.before.maxima, bn.scale)], rel=1e-3)
    sigma = (model[1].running_var + model[1].eps).double().sqrt()
    scale = model[1].weight.double() / sigma
    assert bn.scale == pytest.approx(scale.tolist(), rel=1e-4, abs=1e-12)
    assert bn.shift == pytest.approx((model[1].bias - model[1].running_mean * scale).tolist(), rel=1e-4, abs=1e-12)


def test_a_layer_that_a_merge_made_has_a_range_and_its_parts_have_none() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.three = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.one(x) + self.three(x)

    (merged,) = ranges(Branches(), 2, 4, 6, 6, merge=True)[0].values()
    apart, _ = ranges(Branches(), 2, 4, 6, 6)
    assert set(apart) == {"one", "three"} and all(layer.before == layer.after for layer in apart.values())
    assert merged.before is None and merged.after not in (apart["one"].after, apart["three"].after)
    assert not merged.spoiled


def test_a_merged_pair_reads_what_its_first_layer_read() -> None:
    """Which is not what the layer of the same name read before."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), norm(4), nn.Conv2d(4, 2, 1))
    (pair,) = ranges(model, 2, 3, 5, 5, merge=True)[0].values()
    assert pair.reads is None and pair.before is None
    assert ranges(model, 2, 3, 5, 5)[0]["2"].reads is not None


def test_a_computed_weight_is_the_one_that_is_used() -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))
    (found,) = ranges(nn.Sequential(layer), 2, 3)[0].values()
    assert found.before is not None
    for weights in (found.before, found.after):
        assert weights.maxima == pytest.approx(layer.weight.detach().abs().amax(1).tolist(), rel=1e-4)


def test_frozen_batch_norm_arithmetic_is_a_norm() -> None:
    class FrozenBatchNorm2d(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in ("weight", "bias", "running_mean"):
                self.register_buffer(name, torch.rand(4) + 0.5)
            self.register_buffer("running_var", torch.rand(4) + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            scale = self.weight * (self.running_var + 1e-5).rsqrt()
            return x * scale.reshape(1, -1, 1, 1) + (self.bias - self.running_mean * scale).reshape(1, -1, 1, 1)

    model = nn.Sequential(nn.Conv2d(3, 4, 1), FrozenBatchNorm2d())
    _, norms = ranges(model, 2, 3, 5, 5)
    scale = model[1].weight / (model[1].running_var + 1e-5).sqrt()
    assert norms["1"].scale == pytest.approx(scale.tolist(), rel=1e-4)
    assert norms["1"].shift == pytest.approx((model[1].bias - model[1].running_mean * scale).tolist(), rel=1e-3)


def test_half_precision_weights_are_read_as_they_are() -> None:
    folded = bnfold.fold(nn.Sequential(nn.Linear(3, 4)), (torch.randn(2, 3),), dtype=torch.bfloat16)
    (found,) = layer_ranges(folded.captured, folded.program, folded.ledger)
    assert len(found.after.maxima) == 4 and all(value > 0 for value in found.after.maxima)


# -- int8 --------------------------------------------------------------------------------------------------------------


def spread_norm(factor: float) -> nn.BatchNorm2d:
    """A BatchNorm that multiplies one of eight channels by ``factor`` and leaves the others."""
    made = nn.BatchNorm2d(8)
    with torch.no_grad():
        made.weight[3] = factor
        made.bias += 0.1  # or it would be the identity for factor 1
    return made


def even_conv() -> nn.Conv2d:
    layer = nn.Conv2d(3, 8, 1)
    nn.init.constant_(layer.weight, 0.5)
    return layer


@pytest.mark.parametrize(("factor", "spoiled"), [(15.0, False), (17.0, True), (1.0, False), (-1000.0, True)])
def test_a_fold_that_spreads_the_channels_too_far_spoils_int8(factor: float, spoiled: bool) -> None:
    layers, _ = ranges(nn.Sequential(even_conv(), spread_norm(factor)), 2, 3, 5, 5)
    assert layers["0"].spoiled is spoiled
    assert layers["0"].after.spread == pytest.approx(abs(factor), rel=1e-3)


def test_channels_that_were_spread_before_are_not_the_folds_fault() -> None:
    layer = even_conv()
    with torch.no_grad():
        layer.weight[0] *= 100
    layers, _ = ranges(nn.Sequential(layer, spread_norm(50.0)), 2, 3, 5, 5)
    assert not layers["0"].after.fits_int8 and not layers["0"].spoiled


def test_a_forward_fold_spreads_the_input_channels() -> None:
    last = nn.Conv2d(8, 4, 1)
    nn.init.constant_(last.weight, 0.5)
    layers, _ = ranges(nn.Sequential(spread_norm(40.0), last), 2, 8, 5, 5)
    layer = layers["1"]
    assert layer.after.spread == pytest.approx(1) and layer.after.input_spread == pytest.approx(40, rel=1e-3)
    assert layer.spoiled


def test_dead_channels_are_counted_and_do_not_spread() -> None:
    found = WeightRange((0.0, 1.0, 0.0, 1.0, 2.0), 1.0)
    assert (found.channels, found.dead, found.smallest, found.median, found.largest) == (5, 2, 1.0, 1.0, 2.0)
    assert found.spread == 2.0 and found.fits_int8
    assert WeightRange((0.0, 0.0), 1.0).spread == 1.0


def test_the_limit_leaves_fewer_than_eight_steps() -> None:
    assert 127 / SPREAD_LIMIT < 8 < 127 / (SPREAD_LIMIT - 0.5)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=12), st.floats(1e-3, 1e3))
@settings(deadline=None)
def test_the_spread_does_not_depend_on_the_scale(maxima: list[float], factor: float) -> None:
    maxima = [m if m > 1e-6 else 0.0 for m in maxima]
    one, other = WeightRange(tuple(maxima), 1.0), WeightRange(tuple(m * factor for m in maxima), 1.0)
    assert one.spread == pytest.approx(other.spread) and one.spread >= 1 and one.dead == other.dead


# -- activations -------------------------------------------------------------------------------------------------------


def reads(*between: nn.Module, **state: float) -> tuple[float, float] | None:
    """What the second convolution reads behind a BatchNorm and ``between``."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), norm(4, **state), *between, nn.Conv2d(4, 2, 1))
    layers, _ = ranges(model.eval(), 2, 3, 8, 8)
    return layers[str(len(model) - 1)].reads


@pytest.mark.parametrize(
    ("between", "expected"),
    [
        ((), (1 - 2 * REACH, 1 + 2 * REACH)),
        ((nn.ReLU(),), (0.0, 1 + 2 * REACH)),
        ((nn.ReLU6(),), (0.0, 6.0)),
        ((nn.Sigmoid(),), (float(torch.tensor(1 - 2 * REACH).sigmoid()), float(torch.tensor(1 + 2 * REACH).sigmoid()))),
        ((nn.LeakyReLU(0.1),), (0.1 * (1 - 2 * REACH), 1 + 2 * REACH)),
        ((nn.SiLU(),), (-0.278465, 1 + 2 * REACH)),
        ((nn.ReLU(), nn.MaxPool2d(2)), (0.0, 1 + 2 * REACH)),
        ((nn.ReLU(), nn.AvgPool2d(2)), (0.0, 1 + 2 * REACH)),
        ((nn.Dropout(), nn.PixelShuffle(1)), (1 - 2 * REACH, 1 + 2 * REACH)),
        ((nn.LayerNorm(8),), None),
    ],
)
def test_activations_are_six_gamma_around_beta(between: tuple[nn.Module, ...], expected: tuple[float, float]) -> None:
    found = reads(*between, weight=-2.0, bias=1.0)
    assert found == (expected if expected is None else pytest.approx(expected, rel=1e-3, abs=1e-6))


def test_the_widest_channel_counts_and_no_affine_means_unit_deviation() -> None:
    made = norm(4)
    with torch.no_grad():
        made.weight.copy_(torch.tensor([1.0, 3.0, -2.0, 0.0]))
        made.bias.copy_(torch.tensor([0.0, 1.0, -9.0, 2.0]))
    layers, _ = ranges(nn.Sequential(nn.Conv2d(3, 4, 1), made, nn.Conv2d(4, 2, 1)), 2, 3, 5, 5)
    assert layers["0"].reads is None  # the model's input
    assert reads(weight=1.0, bias=0.0) == pytest.approx((-REACH, REACH))
    bare = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False), nn.ReLU(), nn.Conv2d(4, 2, 1))
    zoo.randomize(bare)
    assert ranges(bare, 2, 3, 5, 5)[0]["3"].reads == pytest.approx((0.0, REACH))


def test_the_estimate_holds_for_normal_data() -> None:
    """A BatchNorm whose statistics are those of the data puts nearly all of it inside, and fills most of it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 3, 8, 8, generator=generator) * 3 + 1
    model = nn.Sequential(nn.Conv2d(3, 4, 1), norm(4), nn.Conv2d(4, 2, 1))
    with torch.no_grad():
        y = model[0](x)
        model[1].running_mean.copy_(y.mean((0, 2, 3)))
        model[1].running_var.copy_(y.var((0, 2, 3)))
        out = model.eval()[:2](x)
    low, high = ranges(model, 2, 3, 8, 8)[0]["2"].reads or (0.0, 0.0)
    assert low <= float(out.min()) and float(out.max()) <= high
    assert float(out.max() - out.min()) > 0.4 * (high - low)


def test_nothing_is_said_of_a_sum() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.bn, self.last = nn.Conv2d(4, 4, 1), norm(4), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(x + self.bn(self.first(x)))

    assert ranges(Residual(), 2, 4, 5, 5)[0]["last"].reads is None


def test_the_models_weights_are_as_they_were() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), norm(8))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ranges(model, 2, 3, 6, 6)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_report_has_the_ranges() -> None:
    from bnfold import pipeline

    report = pipeline.plan(nn.Sequential(even_conv(), spread_norm(40.0)), (torch.randn(2, 3, 5, 5),))
    assert report.layers[0].spoiled and report.norms[0].module == "1"
    assert replace(report, layers=()).layers == ()
