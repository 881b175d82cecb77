"""What can be seen to be wrong with a BatchNorm from its own numbers. Every limit is arithmetic, none is a taste.

With ``u`` the epsilon of the dtype that a layer is stored in, ``sigma = sqrt(var + eps)``:

- *vanishing variance*: ``var < eps``; then eps is the larger part of ``sigma``.
- *dead*: over the data that the statistics describe, a channel's output has mean ``beta`` and deviation
  ``|gamma|*sqrt(var)/sigma``. Where that deviation is at most ``u`` times the layer's largest output, one rounding of a
  sum over the channels swallows it.
- *exploding*: a scale, a shift or ``|beta| + |gamma|`` (an output one deviation out) beyond float16's 65504; or a scale
  more than ``1/sqrt(u)`` times the median one. The next layer sums over channels; of one that is ``1/sqrt(u)`` times
  smaller than another, half the digits are left. Sums run in float32 at least, so ``u`` is float32's here: 2896 times.
- *cancellation*: ``|mean| > sigma/sqrt(u)``. The input, near ``mean``, is rounded to ``u*|mean|``, which is then more
  than ``sqrt(u)*sigma``: half the digits of what is left after the subtraction are noise.
- *momentum m*: a moving average weighs batch ``k`` with ``m*(1 - m)^k``, which has the variance of a mean over
  ``(2 - m)/m`` batches: fewer than two above ``m = 2/3``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from bnfold.report import Finding
from bnfold.statistics.batchnorms import Layer

_SHOWN = 5
_HALF = {torch.float16, torch.bfloat16}
_HALF_MAX = float(torch.finfo(torch.float16).max)
_SINGLE_EPS = float(torch.finfo(torch.float32).eps)
_FEWER_THAN_TWO_BATCHES = 2 / 3


def findings(layers: Sequence[Layer]) -> list[Finding]:
    """What is wrong with each BatchNorm, and with how they go together."""
    checks = (_of_use, _of_statistics, _of_channels)
    return [*_together(layers), *(found for layer in layers for check in checks for found in check(layer))]


def _together(layers: Sequence[Layer]) -> Iterator[Finding]:
    tracked = [layer.health for layer in layers if layer.health.kind != "frozen" and layer.health.training is not None]
    training = tuple(norm.module for norm in tracked if norm.training)
    frozen = tuple(norm.module for norm in tracked if not norm.training)
    if training and frozen:
        detail = f"{_listed(training)} in train mode; {_listed(frozen)} in eval mode"
        yield Finding("partly-frozen", (*training, *frozen), detail)
    elif training:
        yield Finding("train-mode", training, f"all {len(training)} of them" if len(training) > 1 else "")


def _of_use(layer: Layer) -> Iterator[Finding]:
    """How it is built, trained and called."""
    norm, about = layer.health, (layer.health.module,)
    if layer.shapeless:
        yield Finding("no-channels", about)
    if not norm.track_running_stats:
        called = norm.training is None or "running_var" in layer.stored
        yield Finding("batch-statistics", about, "called with training=True" if called else "track_running_stats=False")
    elif norm.kind == "batch_norm" and norm.training is not None:  # a captured program writes 0 for None
        if norm.momentum is None:
            yield Finding("momentum-none", about)
        elif norm.momentum == 0:
            yield Finding("momentum-zero", about)
        elif norm.momentum > _FEWER_THAN_TWO_BATCHES:
            batches = (2 - norm.momentum) / norm.momentum
            yield Finding("momentum-high", about, f"with {norm.momentum:g} over {batches:.3g}")
    variance = layer.stored.get("running_var")
    if variance is not None and variance.dtype in _HALF:
        yield Finding("half-statistics", about, norm.dtype)
    if norm.calls == 0:
        yield Finding("not-called", about)
    if (norm.calls or 0) > 1:
        yield Finding("shared-statistics", about, f"called {norm.calls} times")
    if layer.shared:
        yield Finding("shared-statistics", about, f"its statistics are those of {', '.join(layer.shared)} too")


def _of_statistics(layer: Layer) -> Iterator[Finding]:
    """What no statistics are, those of no data, and a mean that costs half the digits."""
    for name, tensor in layer.stored.items():
        yield from channel_findings("nonfinite", layer, ~tensor.isfinite(), f"{name} is NaN or infinite")
    mean, variance = layer.wide("running_mean"), layer.wide("running_var")
    if variance is not None:
        bad = (variance < 0) | (variance + layer.eps <= 0)
        words = f"running_var goes down to {_among(variance, bad).min():.3g}"
        yield from channel_findings("negative-variance", layer, bad, words)
    if mean is None or variance is None:
        return
    if not bool((mean != 0).any() or (variance != 1).any()):
        counted = layer.health.batches_tracked
        how = {None: "it counts no batches", 0: "0 batches tracked"}
        detail = how.get(counted, f"although it counts {counted} batches")
        yield Finding("never-trained", (layer.health.module,), detail)
    apart = mean.abs() / (variance + layer.eps).sqrt()
    far = (apart > _epsilon(layer) ** -0.5) & apart.isfinite()
    yield from channel_findings("cancellation", layer, far, f"up to {_among(apart, far).max():.3g} deviations")


def _of_channels(layer: Layer) -> Iterator[Finding]:
    """A variance below eps under a gamma to speak of, a constant output, and what is too large."""
    if not layer.per_channel:
        return
    gamma, beta, variance = layer.gamma.abs(), layer.beta.abs(), layer.wide("running_var")
    output, spread = beta + gamma, gamma
    if variance is not None:
        below = (variance >= 0) & (variance < layer.eps) & (gamma > _epsilon(layer) * _largest(output))
        words = f"running_var goes down to {_among(variance, below).min():.2g}, eps is {layer.eps:g}"
        yield from channel_findings("vanishing-variance", layer, below, words)
        spread = gamma * (variance / (variance + layer.eps)).sqrt()  # NaN where the variance is not one
    yield from channel_findings("dead-channels", layer, spread <= _epsilon(layer) * _largest(beta + spread), "constant")
    if layer.affine is None:
        return
    scale, shift = (part.abs() for part in layer.affine)
    largest = torch.stack([scale, shift, output]).amax(0)
    beyond = (largest > _HALF_MAX) & largest.isfinite()
    live = scale[scale.isfinite() & (scale > 0)]
    if bool(beyond.any()):
        words = f"up to {largest[beyond].max():.3g}, beyond float16's {_HALF_MAX:g}"
        yield from channel_findings("exploding-scale", layer, beyond, words)
    elif live.numel() > 2:
        apart = scale / live.median()
        far = (apart > _SINGLE_EPS**-0.5) & apart.isfinite()
        words = f"up to {_among(apart, far).max():.3g} times the layer's median"
        yield from channel_findings("exploding-scale", layer, far, words)


def channel_findings(code: str, layer: Layer, bad: Tensor, detail: str) -> Iterator[Finding]:
    """A finding about the channels where ``bad`` is true, if there are any."""
    if count := int(bad.sum()):
        first = tuple(bad.nonzero().flatten()[:_SHOWN].tolist())
        which = ", ".join(map(str, first)) + (", ..." if count > len(first) else "")
        some = f"channel{'s' * (count > 1)} {which} of {bad.numel()}"
        where = some if count < bad.numel() else f"all {count} channels"
        yield Finding(code, (layer.health.module,), f"{where}: {detail}", first, count)


def _among(values: Tensor, bad: Tensor) -> Tensor:
    """The values where ``bad`` is true; a zero where it nowhere is."""
    return values[bad] if bool(bad.any()) else values.new_zeros(1)


def _largest(values: Tensor) -> Tensor:
    return values.nan_to_num(0, 0, 0).max()


def _epsilon(layer: Layer) -> float:
    stored = layer.stored.get("running_var", next(iter(layer.stored.values())))
    return float(torch.finfo(stored.dtype).eps) if stored.is_floating_point() else _SINGLE_EPS


def _listed(names: Sequence[str]) -> str:
    return f"{len(names)} ({', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''})"
