"""Every finding has a model that shows it and a twin that does not; what is known of every kind of BatchNorm."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from torch import Tensor, nn
from torch.nn import functional as F

import bnfold
from bnfold.render import document
from bnfold.report import FINDINGS, Diagnosis
from bnfold.statistics.moments import Distance, Moments, Sampled

torch.set_num_threads(1)
SHAPE = (8, 3, 6, 5)


def images(count: int = SHAPE[0], seed: int = 3) -> Tensor:
    return torch.randn(count, *SHAPE[1:], generator=torch.Generator().manual_seed(seed))


def net(*norms: nn.Module) -> nn.Sequential:
    """Convolutions of four channels with ``norms`` behind them, randomised, in eval mode."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for norm in norms or (nn.BatchNorm2d(4),):
        layers += [nn.Conv2d(4 if layers else 3, 4, 1), norm]
    model = zoo.randomize(nn.Sequential(*layers))
    with torch.no_grad():
        for norm in norms:
            if isinstance(getattr(norm, "weight", None), Tensor):
                norm.weight[norm.weight == 0] = 1
    return model


def changed(change: Callable[[nn.BatchNorm2d], Any], *norms: nn.Module) -> nn.Sequential:
    model = net(*norms)
    with torch.no_grad():
        change(model[1])
    return model


def put(name: str, channel: int, value: float) -> Callable[[nn.BatchNorm2d], Any]:
    def change(norm: nn.BatchNorm2d) -> None:
        getattr(norm, name)[channel] = value

    return change


class Shared(nn.Module):
    def __init__(self, norms: int) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(norms))
        zoo.randomize(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.norms[0](self.left(x)) * self.norms[-1](self.right(x)).sigmoid()


class Auxiliary(nn.Module):
    """A head that only training uses."""

    def __init__(self, *, uses: bool) -> None:
        super().__init__()
        self.norm, self.head, self.uses = nn.BatchNorm2d(3), nn.BatchNorm2d(3), uses
        zoo.randomize(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.head(x) if self.training or self.uses else x


class Branching(nn.Module):
    """torch.export cannot follow a branch on a value."""

    def __init__(self, *, branches: bool) -> None:
        super().__init__()
        self.norm, self.branches = nn.BatchNorm2d(3), branches
        zoo.randomize(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) if not self.branches or x.sum() > 0 else self.norm(-x)


class Momentary(nn.Module):
    """Normalises with the statistics of the batch although it has running ones."""

    def __init__(self, *, training: bool) -> None:
        super().__init__()
        self.conv, self.norm, self.flag = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), training
        zoo.randomize(self)

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        return F.batch_norm(self.conv(x), norm.running_mean, norm.running_var, norm.weight, norm.bias, self.flag)


def trained_on(x: Tensor) -> nn.Sequential:
    return bnfold.calibrate(net(), [x])


def mixed(*flags: bool) -> nn.Sequential:
    model = net(*(nn.BatchNorm2d(4) for _ in flags))
    for norm, flag in zip(model[1::2], flags):
        norm.train(flag)
    return model


def momentum(value: float | None) -> nn.Sequential:
    return net(nn.BatchNorm2d(4, momentum=value))


@dataclass
class Case:
    """``detail`` must be in the message; ``data`` is compared with."""

    sick: Callable[[], nn.Module]
    healthy: Callable[[], nn.Module]
    detail: str = ""
    data: Tensor | None = None


def norm_case(change, twin, detail: str = "") -> Case:
    return Case(lambda: changed(change), lambda: changed(twin), detail)


def fresh(norm: nn.BatchNorm2d) -> None:
    norm.reset_running_stats()


def switched_off(norm: nn.BatchNorm2d) -> None:
    norm.running_var[3], norm.weight[3] = 1e-6, 1e-9


def half(norm: nn.BatchNorm2d) -> None:
    norm.half()


CASES: dict[str, list[Case]] = {
    "nonfinite": [
        norm_case(put(name, 2, value), put(name, 2, 0.5), f"channel 2 of 4: {name} is NaN or infinite")
        for name in ("running_mean", "running_var", "weight", "bias")
        for value in (float("nan"), float("inf"))
    ],
    "negative-variance": [
        norm_case(put("running_var", 1, -0.25), put("running_var", 1, 0.25), "of 4: running_var goes down to -0.25"),
        # At eps 0 a variance of zero divides by zero.
        Case(
            lambda: changed(put("running_var", 1, 0.0), nn.BatchNorm2d(4, eps=0.0)),
            lambda: changed(put("running_var", 1, 0.0), nn.BatchNorm2d(4, eps=1e-3)),
            "goes down to 0",
        ),
    ],
    "no-channels": [Case(lambda: nn.Sequential(nn.LazyBatchNorm2d()).eval(), lambda: net(nn.BatchNorm2d(4)))],
    "batch-statistics": [
        Case(lambda: net(nn.BatchNorm2d(4, track_running_stats=False)), net),
        Case(lambda: Momentary(training=True), lambda: Momentary(training=False), "called with training=True"),
    ],
    "never-trained": [
        Case(lambda: nn.Sequential(nn.BatchNorm2d(3)).eval(), net, "0 batches tracked"),
        norm_case(lambda n: (fresh(n), n.num_batches_tracked.fill_(7)), lambda n: None, "although it counts 7"),
        # One channel that happens to be standard is no sign of anything.
        norm_case(fresh, lambda n: (put("running_mean", 0, 0)(n), put("running_var", 0, 1)(n))),
    ],
    "statistics-far": [
        Case(lambda: trained_on(images(64)), lambda: trained_on(images(64)), "deviations off", 8 * images(64, 4) + 30),
    ],
    "vanishing-variance": [
        norm_case(put("running_var", 3, 1e-6), put("running_var", 3, 1e-4), "goes down to 1e-06, eps is 1e-05"),
        # A channel that is switched off by gamma does no harm.
        norm_case(put("running_var", 3, 1e-6), switched_off, "channel 3"),
    ],
    "dead-channels": [
        norm_case(put("weight", 1, 0.0), put("weight", 1, 1e-3), "channel 1 of 4: constant"),
        norm_case(put("running_var", 1, 0.0), put("running_var", 1, 1e-4), "channel 1 of 4: constant"),
        norm_case(lambda n: n.weight.zero_(), lambda n: None, "all 4 channels: constant"),
    ],
    "exploding-scale": [
        norm_case(put("weight", 0, 1e5), put("weight", 0, 1e2), "beyond float16's 65504"),
        norm_case(put("bias", 0, -1e5), put("bias", 0, -1e2), "beyond float16's 65504"),
        norm_case(put("weight", 0, 3e4), put("weight", 0, 1e3), "times the layer's median"),
    ],
    "cancellation": [
        norm_case(put("running_mean", 0, 1e5), put("running_mean", 0, 1e3), "channel 0 of 4: up to"),
    ],
    "half-statistics": [
        norm_case(half, lambda n: n.float(), "float16"),
        norm_case(lambda n: n.bfloat16(), lambda n: n.double(), "bfloat16"),
    ],
    "partly-frozen": [
        Case(lambda: mixed(True, False, True), lambda: mixed(True, True), "2 (1, 5) in train mode; 1 (3) in eval mode"),
        Case(lambda: mixed(True, False), lambda: mixed(False, False)),
    ],
    "momentum-zero": [Case(lambda: momentum(0.0), lambda: momentum(0.01))],
    "momentum-high": [Case(lambda: momentum(0.99), lambda: momentum(0.6), "with 0.99 over 1.02")],
    "momentum-none": [Case(lambda: momentum(None), net)],
    "not-captured": [Case(lambda: Branching(branches=True), lambda: Branching(branches=False), "branches on values")],
    "shared-statistics": [Case(lambda: Shared(1), lambda: Shared(2), "called 2 times")],
    "not-called": [Case(lambda: Auxiliary(uses=False), lambda: Auxiliary(uses=True))],
    "train-mode": [Case(lambda: mixed(True, True), lambda: mixed(False, False), "all 2 of them")],
}  # fmt: skip
EVERY = [pytest.param(code, case, id=f"{code}-{i}") for code, cases in CASES.items() for i, case in enumerate(cases)]


def inspected(model: nn.Module, data: Tensor | None = None, **more: Any) -> Diagnosis:
    lazy = any(isinstance(layer, nn.LazyBatchNorm2d) for layer in model.modules())
    rows = None if data is None else {"input": data.numpy()}
    halved = any(p.dtype in (torch.float16, torch.bfloat16, torch.float64) for p in model.parameters())
    return bnfold.inspect(model, None if lazy or halved else (images(),), data=rows, **more)


def test_every_finding_has_its_models():
    assert set(CASES) == set(FINDINGS)


@pytest.mark.parametrize(("code", "case"), EVERY)
def test_a_sick_model_is_told_and_its_twin_is_not(code, case):
    data = case.data
    found = inspected(case.sick(), data).of(code)
    assert found, f"{code} is not seen"
    assert all(finding.severity == FINDINGS[code][0] and finding.way_out for finding in found)
    assert case.detail in " ".join(finding.detail for finding in found)
    twin = inspected(case.healthy(), None if data is None else images(64, 5))
    assert not twin.of(code), twin.of(code)


@pytest.mark.parametrize("code", FINDINGS)
def test_every_finding_is_printed_with_its_way_out(code):
    from rich.console import Console

    from bnfold.render.page import Page
    from bnfold.render.printed import diagnosis

    report = inspected(CASES[code][0].sick(), CASES[code][0].data)
    console = Console(width=2000)
    with console.capture() as captured:
        diagnosis(report, Page(console), verbose=False)
    severity, why, way_out = FINDINGS[code]
    assert f"{severity.capitalize():9}{code}: {why}" in captured.get()
    assert f"what you can do: {way_out}" in captured.get()


def test_a_healthy_model_has_no_finding():
    report = inspected(net(nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False)))
    assert report.findings == () and report.healthy
    assert [norm.affine for norm in report.norms] == [True, False]


def test_the_worst_comes_first_and_a_note_is_no_illness():
    model = net(nn.BatchNorm2d(4, momentum=None), nn.BatchNorm2d(4), nn.BatchNorm2d(4, momentum=0.0))
    assert [f.severity for f in inspected(model).findings] == ["warning", "note"]
    with torch.no_grad():
        model[3].running_var[0] = -1
    report = inspected(model)
    assert [f.severity for f in report.findings] == ["error", "warning", "note"] and not report.healthy
    assert inspected(net(nn.BatchNorm2d(4, momentum=None))).healthy


# -- what is known of each kind ----------------------------------------------------------------------------------------


class Frozen(nn.Module):
    """As in transformers: four buffers, eps in the code."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(channels) * (name in ("weight", "running_var")))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return x * scale[:, None, None] + (self.bias - self.running_mean * scale)[:, None, None]


class NormAct(nn.BatchNorm2d):
    """As in timm: the activation is in the same module."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


def test_every_kind_is_found_with_what_it_says_of_itself():
    model = zoo.randomize(nn.Sequential(
        nn.BatchNorm2d(3, eps=1e-3, momentum=0.2), nn.SyncBatchNorm(3), NormAct(3), Frozen(3),
        nn.InstanceNorm2d(3, track_running_stats=True), nn.InstanceNorm2d(3),
    ))  # fmt: skip
    model[0].num_batches_tracked.fill_(12)
    norms = bnfold.inspect(model, (images(),)).norms
    assert [(n.module, n.layer, n.kind) for n in norms] == [
        ("0", "BatchNorm2d", "batch_norm"), ("1", "SyncBatchNorm", "batch_norm"), ("2", "NormAct", "batch_norm"),
        ("3", "Frozen", "frozen"), ("4", "InstanceNorm2d", "instance_norm"),
    ]  # fmt: skip
    first, frozen = norms[0], norms[3]
    assert (first.channels, first.eps, first.momentum, first.batches_tracked, first.dtype) == (
        3,
        1e-3,
        0.2,
        12,
        "float32",
    )
    assert first.affine and first.track_running_stats and first.training is False and first.calls == 1
    assert (frozen.eps, frozen.momentum, frozen.batches_tracked) == (None, None, None)
    scale = model[0].weight.detach().double() / (model[0].running_var.double() + 1e-3).sqrt()
    assert first.scale.median == pytest.approx(float(scale.median()))
    assert (first.scale.minimum, first.scale.maximum) == pytest.approx((float(scale.min()), float(scale.max())))


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm3d])
def test_one_and_three_dimensions(kind):
    model = zoo.randomize(nn.Sequential(kind(3)))
    shape = {nn.BatchNorm1d: (4, 3), nn.BatchNorm3d: (4, 3, 2, 2, 2)}[kind]
    (norm,) = bnfold.inspect(model, (torch.randn(shape),)).norms
    assert (norm.layer, norm.channels, norm.calls) == (kind.__name__, 3, 1)


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.5, -1.0, 2.0]))
        self.register_buffer("spread", torch.tensor([1.0, float("nan"), 0.5]))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.mean, self.spread, eps=1e-4)


def test_a_functional_one_is_seen_in_the_captured_graph():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), Functional()).eval()
    report = bnfold.inspect(model, (images(),), data={"input": images().numpy()})
    (norm,) = report.norms
    assert norm.functional and (norm.module, norm.channels, norm.eps, norm.affine) == ("1", 3, 1e-4, False)
    assert [f.code for f in report.findings] == ["nonfinite", "statistics-far"]
    assert [f.channels for f in report.findings] == [(1,), (2,)]
    assert norm.distance is not None
    assert bnfold.inspect(nn.Sequential(nn.Conv3d(3, 3, 1), Functional())).norms == ()  # without an example no graph


def test_a_program_tells_the_same_of_its_graph():
    model = net(nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False, eps=1e-2))
    model[1].num_batches_tracked.fill_(5)
    with torch.no_grad():
        model[3].running_var[2] = float("inf")
    program = torch.export.export(model, (images(),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    report = bnfold.inspect(program, data={"input": images(40).numpy()})
    own = bnfold.inspect(model, (images(),), data={"input": images(40).numpy()})
    assert [f.code for f in report.findings] == [f.code for f in own.findings]
    assert {f.code for f in report.findings} == {"nonfinite", "statistics-far"}
    for seen, known in zip(report.norms, own.norms, strict=True):
        assert (seen.module, seen.layer, seen.channels, seen.eps, seen.affine, seen.batches_tracked, seen.dtype) == (
            known.module, known.layer, known.channels, known.eps, known.affine, known.batches_tracked, known.dtype
        )  # fmt: skip
        assert seen.training is None and seen.scale == known.scale
        assert seen.distance.median == pytest.approx(known.distance.median, rel=1e-3)


def test_a_program_with_a_shared_one_counts_its_calls():
    program = torch.export.export(Shared(1), (images(),))
    report = bnfold.inspect(program)
    assert [(n.module, n.calls) for n in report.norms] == [("norms.0", 2)]
    assert [f.code for f in report.findings] == ["shared-statistics"]


def test_buffers_under_two_modules_are_shared_statistics():
    model = net(nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    assert not inspected(model).of("shared-statistics")
    model[3].running_mean = model[1].running_mean
    assert [f.modules for f in inspected(model).of("shared-statistics")] == [("1",), ("3",)]


class Twice(nn.Module):
    """Two functional ones in one module."""

    def __init__(self, *channels: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, channels[0], 1), nn.Conv2d(channels[0], channels[1], 1)
        for i, count in enumerate(channels):
            self.register_buffer(f"mean{i}", torch.zeros(count))
            self.register_buffer(f"variance{i}", torch.full((count,), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(self.first(x), self.mean0, self.variance0).relu()
        return F.batch_norm(self.second(x), self.mean1, self.variance1)


@pytest.mark.parametrize("channels", [(4, 6), (4, 4)])
def test_two_functional_ones_of_one_module_are_compared_each_with_its_own_data(channels):
    model, x = nn.Sequential(Twice(*channels)).eval(), images(64)
    norms = bnfold.inspect(model, (images(),), data={"input": x.numpy()}).norms
    assert [(norm.module, norm.channels) for norm in norms] == [("0", count) for count in channels]
    with torch.no_grad():
        first = model[0].first(x)
        second = model[0].second(F.batch_norm(first, model[0].mean0, model[0].variance0).relu())
    for norm, seen in zip(norms, (first, second), strict=True):
        shift = seen.mean((0, 2, 3)).abs() / 2**0.5
        stretch = 0.5 * torch.log2(seen.var((0, 2, 3), correction=0) / 2).abs()
        assert norm.distance.maximum == pytest.approx(float(torch.maximum(shift, stretch).max()), rel=1e-3)


def test_tensors_of_a_module_in_a_functional_call_are_that_module():
    model = Momentary(training=False)
    with torch.no_grad():
        model.norm.running_mean += 100
    report = bnfold.inspect(model, (images(),), data={"x": images(64).numpy()})
    (norm,) = report.norms
    assert (norm.module, norm.functional, norm.calls) == ("norm", False, 1) and norm.distance.minimum > 50
    assert [finding.code for finding in report.findings] == ["statistics-far"]
    assert Auxiliary(uses=False).head and bnfold.inspect(Auxiliary(uses=False), (images(),)).norms[1].calls == 0


class TwoNames(nn.Module):
    """One layer under two names, called by the second; and, where asked for, one with tensors of its own inside."""

    def __init__(self, *, tracks: bool) -> None:
        super().__init__()
        self.first = nn.BatchNorm2d(3, track_running_stats=tracks)
        self.second = self.first
        zoo.randomize(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(x)


@pytest.mark.parametrize("tracks", [True, False])
def test_one_layer_under_two_names_is_listed_once(tracks):
    (norm,) = bnfold.inspect(TwoNames(tracks=tracks), (images(),)).norms
    assert (norm.module, norm.functional, norm.calls, norm.track_running_stats) == ("first", False, 1, tracks)


def test_a_functional_one_inside_a_module_with_statistics_of_its_own_is_another():
    class Two(nn.BatchNorm2d):
        def __init__(self) -> None:
            super().__init__(3)
            self.register_buffer("other_mean", torch.ones(3))
            self.register_buffer("other_var", torch.full((3,), 2.0))

        def forward(self, x: Tensor) -> Tensor:
            return F.batch_norm(super().forward(x), self.other_mean, self.other_var)

    norms = bnfold.inspect(zoo.randomize(nn.Sequential(Two())), (images(),), data={"input": images(64).numpy()}).norms
    assert [(norm.module, norm.calls) for norm in norms] == [("0", 1), ("0", 1)]
    assert norms[0].variance != norms[1].variance and norms[0].distance != norms[1].distance


def test_statistics_by_groups_are_listed_without_a_scale():
    class Ghost(nn.BatchNorm2d):
        def __init__(self, channels: int, groups: int) -> None:
            super().__init__(channels)
            self.running_mean, self.running_var = torch.randn(channels * groups), torch.rand(channels * groups)

        def forward(self, x: Tensor) -> Tensor:
            mean, variance = self.running_mean[: self.num_features], self.running_var[: self.num_features]
            return F.batch_norm(x, mean, variance, self.weight, self.bias)

    for groups in (1, 2):
        model = nn.Sequential(Ghost(3, groups)).eval()
        (norm,) = bnfold.inspect(model, (images(),), data={"input": images(64).numpy()}).norms
        assert (norm.module, norm.layer, norm.channels) == ("0", "Ghost", 3)
        assert (norm.scale is None, norm.distance is None) == ((groups > 1,) * 2)


class Standing(nn.Module):
    """A BatchNorm in arithmetic, of any dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(3, dtype=dtype))
        self.register_buffer("running_var", torch.full((3,), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.running_mean[:, None, None]) / self.running_var[:, None, None].sqrt()


def test_complex_layers_are_named_and_not_looked_at():
    for dtype in (torch.complex64, torch.float32):
        report = bnfold.inspect(nn.Sequential(Standing(dtype)).eval(), (images().to(dtype),))
        assert (
            (report.norms == ()) == ("layer '0' is complex: it was not looked at" in report.notes) == dtype.is_complex
        )
        assert report.plan is not None


def test_a_model_without_values_is_said_to_have_none():
    for example in (images(), images().to("meta")):
        report = bnfold.inspect(net().to("meta"), (example,))
        assert report.norms == () and "layer '1' is on the meta device, without values" in " ".join(report.notes)
        assert "load_state_dict" in report.of("not-captured")[0].detail


# -- against data ------------------------------------------------------------------------------------------------------


def test_distance_is_in_deviations_and_doublings():
    x = images(200)
    known = Moments.of(x)
    mean, variance = known.mean.float(), known.variance.float()
    sampled = Sampled.of(x, mean)
    same = Distance.between(sampled, mean, variance, 0.0)
    assert float(same.largest.max()) < 1e-5
    off = Distance.between(Sampled.of(x, mean + 2 * variance.sqrt()), mean + 2 * variance.sqrt(), variance, 0.0)
    torch.testing.assert_close(off.shift, torch.full((3,), 2.0, dtype=torch.float64), rtol=1e-5, atol=1e-5)
    wide = Distance.between(sampled, mean, variance / 16, 0.0)
    torch.testing.assert_close(wide.stretch, torch.full((3,), 2.0, dtype=torch.float64), rtol=1e-5, atol=1e-5)
    assert off.far(3).all() and wide.far(3).all() and not same.far(3).any()


def test_the_standard_errors_are_those_of_repeated_draws():
    generator = torch.Generator().manual_seed(0)
    # Values of one sample go together, as those of an image do.
    draws = [
        torch.randn(50, 2, 1, generator=generator) + 0.3 * torch.randn(50, 2, 20, generator=generator)
        for _ in range(300)
    ]
    mean, variance = torch.zeros(2), torch.full((2,), 1.09)
    found = [Distance.between(Sampled.of(x, mean), mean, variance, 0.0) for x in draws]
    means = torch.stack([Moments.of(x).mean for x in draws])
    spreads = torch.stack([0.5 * torch.log2(Moments.of(x).variance / 1.09) for x in draws])
    for seen, told in (
        (means.std(0) / 1.09**0.5, [f.shift_error for f in found]),
        (spreads.std(0), [f.stretch_error for f in found]),
    ):
        ratio = torch.stack(told).mean(0) / seen
        assert (ratio > 0.9).all() and (ratio < 1.6).all()  # that of the variance is an upper bound


@pytest.mark.parametrize("samples", [4, 8, 30])
def test_chance_is_not_called_far(samples):
    """A layer half a deviation off the truth, seen through few samples: in 100 tries far once at most."""
    mean, variance = torch.full((16,), 0.5), torch.ones(16)
    generator = torch.Generator().manual_seed(0)
    draws = (Sampled.of(torch.randn(samples, 16, generator=generator), mean) for _ in range(200))
    assert sum(bool(Distance.between(x, mean, variance, 1e-5).far(16).any()) for x in draws) <= 2


def test_eight_samples_are_enough_for_a_gross_mistake():
    mean, variance = torch.zeros(16), torch.ones(16)
    x = 8 * torch.randn(8, 16, generator=torch.Generator().manual_seed(0)) + 30
    assert Distance.between(Sampled.of(x, mean), mean, variance, 1e-5).far(16).sum() > 8


def test_one_sample_says_nothing():
    report = bnfold.inspect(net(), (images(),), data={"input": 100 + images(1).numpy()})
    assert not report.of("statistics-far") and "too few" in report.notes[0]


def test_unprepared_data_is_seen():
    """Pixels of 0 to 255 where the model was trained on 0 to 1."""
    x = images(64).abs().clamp(max=1)
    model = trained_on(x)
    assert inspected(model, x).findings == ()
    report = inspected(model, 255 * x)
    (finding,) = report.of("statistics-far")
    assert finding.modules == ("1",) and finding.count >= 3 and report.norms[0].distance.maximum > 5


def test_an_instance_norm_is_not_held_against_the_variance_of_all_samples():
    """It averages the variances of single samples, which is less where samples differ in their means."""
    x = images(64) + 6 * torch.randn(64, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    far = []
    for kind in (nn.InstanceNorm2d, nn.BatchNorm2d):
        norm = kind(3, affine=True, track_running_stats=True).eval()
        norm.running_mean, norm.running_var = x.mean((0, 2, 3)), x.var((2, 3)).mean(0)
        report = bnfold.inspect(nn.Sequential(norm), (images(),), data={"input": x.numpy()})
        assert (report.norms[0].distance is None) == (kind is nn.InstanceNorm2d)
        far.append(bool(report.of("statistics-far")))
    assert far == [False, True]


class Positive(nn.Module):
    """Its BatchNorm sees the rows of which the first value is positive."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        zoo.randomize(self)

    def forward(self, x: Tensor) -> Tensor:
        x = x.mean((2, 3))
        return self.norm(x[x[:, 0] > 0])


def test_batches_of_which_nothing_reaches_a_layer_are_no_data():
    x = images(96) + torch.tensor([-50.0, 50, -50]).repeat_interleave(32)[:, None, None, None]
    (norm,) = bnfold.inspect(Positive(), (images(),), data={"x": x.numpy()}).norms
    (only,) = bnfold.inspect(Positive(), (images(),), data={"x": x[32:64].numpy()}).norms
    assert norm.distance == only.distance and norm.distance is not None
    assert bnfold.inspect(Positive(), (images(),), data={"x": x[:32].numpy()}).norms[0].distance is None


class Wrapped(nn.Module):
    """Hands on whatever it is given, as DataParallel does."""

    def __init__(self) -> None:
        super().__init__()
        self.module = net()

    def forward(self, *inputs: Tensor, **more: Tensor) -> Tensor:
        return self.module(*inputs, **more)


class Nameless(Wrapped):
    """Takes its input by place alone."""

    def forward(self, x: Tensor, /) -> Tensor:
        return self.module(x)


def test_one_array_is_that_of_a_wrapper_which_names_no_inputs(tmp_path):
    x = images(64).numpy()
    known = bnfold.inspect(net(), (images(),), data={"input": x}).norms[0].distance
    np.savez(tmp_path / "x.npz", pixels=x, labels=np.arange(64))
    np.save(tmp_path / "x.npy", x)
    for data in ({"pixels": x}, {"input": x, "labels": np.arange(64)}, tmp_path / "x.npz", tmp_path / "x.npy"):
        assert bnfold.inspect(Wrapped(), (images(),), data=data).norms[0].distance == known
    parallel = nn.DataParallel(net())  # is taken for what it wraps, whose input has a name
    for data in ({"input": x, "labels": np.arange(64)}, tmp_path / "x.npy"):
        assert bnfold.inspect(parallel, (images(),), data=data).norms[0].distance == known
    with pytest.raises(bnfold.InputError, match="pixels"):
        bnfold.inspect(parallel, (images(),), data={"pixels": x})
    with pytest.raises(bnfold.InputError, match="forward names no inputs, and the data has 2 arrays"):
        bnfold.inspect(Wrapped(), (images(),), data={"left": x, "right": x})
    assert bnfold.inspect(Nameless(), (images(),), data={"x": x}).norms[0].distance == known
    with pytest.raises(bnfold.InputError, match="no array for x"):
        bnfold.inspect(Nameless(), (images(),), data={"pixels": x})


# -- the run -----------------------------------------------------------------------------------------------------------


def test_nothing_of_the_model_changes():
    model = mixed(True, False)
    before = copy.deepcopy(model.state_dict())
    flags = [(name, module.training) for name, module in model.named_modules()]
    inspected(model, images(16))
    assert [(name, module.training) for name, module in model.named_modules()] == flags
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_without_inputs_there_is_health_and_no_plan():
    report = bnfold.inspect(zoo.randomize(nn.Sequential(nn.BatchNorm2d(4, momentum=0.0))).eval())
    assert report.plan is None and [f.code for f in report.findings] == ["momentum-zero"]
    assert report.norms[0].calls is None


def test_health_does_not_need_a_capture():
    report = bnfold.inspect(Branching(branches=True), (images(),), data={"x": images(32).numpy()})
    assert report.plan is None and report.norms[0].calls == 1 and report.norms[0].distance is not None


def test_the_plan_is_that_of_a_fold():
    report = inspected(net(nn.BatchNorm2d(4), nn.BatchNorm2d(4, track_running_stats=False)))
    assert report.plan.ledger.count() == (1, 2)


def test_json_holds_everything_with_null_for_nan():
    model = changed(put("running_var", 0, float("nan")))
    document = json.loads(inspected(model, images(8)).to_json())
    assert document["findings"][0]["severity"] == "error" and document["findings"][0]["way_out"]
    assert document["norms"][0]["module"] == "1" and document["healthy"] is False
    assert document["plan"]["ledger"]["entries"]


def test_notes_are_on_the_page_without_a_finding_too():
    for samples in (2, 64):
        report = bnfold.inspect(trained_on(images(64)), (images(),), data={"input": images(64)[:samples].numpy()})
        assert not report.findings
        page = document(report, ".html")
        assert ("too few to call any statistics far" in page) == (samples == 2) == ("BatchNorm health" in page)


def test_data_that_does_not_fit_is_refused():
    with pytest.raises(bnfold.InputError, match="no array for input"):
        bnfold.inspect(net(), (images(),), data={"pixels": images().numpy()})
    with pytest.raises(bnfold.InputError, match=r"fails on the data .*float32\[8, 5, 6\]"):
        bnfold.inspect(net(), (images(),), data={"input": np.zeros((8, 5, 6), np.float32)})
