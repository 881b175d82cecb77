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

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from bnfold.report import Finding
from bnfold.statistics.layers import Layer

_SHOWN = 5
_HALF = {torch.float16, torch.bfloat16}
_HALF_MAX = float(torch.finfo(torch.float16).max)
_SINGLE_EPS = float(torch.finfo(torch.float32).eps)
_FEWER_THAN_TWO_BATCHES = 2 / 3


def layer_findings(layer: Layer) -> list[Finding]:
    """What is wrong with one BatchNorm."""
    return [finding for check in _CHECKS for finding in check(layer)]


def model_findings(layers: Sequence[Layer]) -> list[Finding]:
    """What is wrong with how the BatchNorms of a model go together."""
    tracked = [layer.health for layer in layers if layer.health.kind != "frozen" and layer.health.training is not None]
    training = tuple(norm.module for norm in tracked if norm.training)
    frozen = tuple(norm.module for norm in tracked if not norm.training)
    if training and frozen:
        detail = f"{_listed(training)} in train mode; {_listed(frozen)} in eval mode"
        return [Finding("partly-frozen", (*training, *frozen), detail)]
    if training:
        return [Finding("train-mode", training, f"all {len(training)} of them" if len(training) > 1 else "")]
    return []


def _no_channels(layer: Layer) -> Iterator[Finding]:
    if layer.shapeless:
        yield _finding("no-channels", layer)


def _batch_statistics(layer: Layer) -> Iterator[Finding]:
    if not layer.health.track_running_stats:
        called = layer.health.training is None or "running_var" in layer.stored
        how = "called with training=True" if called else "track_running_stats=False"
        yield _finding("batch-statistics", layer, how)


def _nonfinite(layer: Layer) -> Iterator[Finding]:
    for name, tensor in layer.stored.items():
        yield from channel_findings("nonfinite", layer, ~tensor.isfinite(), f"{name} is NaN or infinite")


def _negative_variance(layer: Layer) -> Iterator[Finding]:
    """A variance below zero, or of zero where eps is zero too."""
    if (variance := layer.wide("running_var")) is not None:
        bad = (variance < 0) | (variance + layer.eps <= 0)
        words = f"running_var goes down to {_among(variance, bad).min():.3g}"
        yield from channel_findings("negative-variance", layer, bad, words)


def _never_trained(layer: Layer) -> Iterator[Finding]:
    mean, variance = layer.wide("running_mean"), layer.wide("running_var")
    if mean is None or variance is None or bool((mean != 0).any()) or bool((variance != 1).any()):
        return
    counted = layer.health.batches_tracked
    words = {None: "it counts no batches", 0: "0 batches tracked"}
    yield _finding("never-trained", layer, words.get(counted, f"although it counts {counted} batches"))


def _vanishing_variance(layer: Layer) -> Iterator[Finding]:
    """A variance below eps in a channel that has a gamma to speak of."""
    variance = layer.wide("running_var")
    if variance is None or not layer.per_channel:
        return
    largest = (layer.gamma.abs() + layer.beta.abs()).nan_to_num(0, 0, 0).max()
    below = (variance >= 0) & (variance < layer.eps) & (layer.gamma.abs() > _epsilon(layer) * largest)
    words = f"running_var goes down to {_among(variance, below).min():.2g}, eps is {layer.eps:g}"
    yield from channel_findings("vanishing-variance", layer, below, words)


def _dead_channels(layer: Layer) -> Iterator[Finding]:
    if not layer.per_channel:
        return
    spread = layer.gamma.abs()
    if (variance := layer.wide("running_var")) is not None:
        spread = spread * (variance / (variance + layer.eps)).sqrt()  # NaN where the variance is not one
    largest = (layer.beta.abs() + spread).nan_to_num(0, 0, 0).max()
    yield from channel_findings("dead-channels", layer, spread <= _epsilon(layer) * largest, "constant")


def _exploding_scale(layer: Layer) -> Iterator[Finding]:
    """A scale or shift beyond float16, or far above the layer's other scales."""
    if layer.affine is None:
        return
    scale, shift = (part.abs() for part in layer.affine)
    output = layer.beta.abs() + layer.gamma.abs()
    largest = torch.stack([scale, shift, output]).amax(0)
    beyond = (largest > _HALF_MAX) & largest.isfinite()
    if bool(beyond.any()):
        words = f"up to {largest[beyond].max():.3g}, beyond float16's {_HALF_MAX:g}"
        yield from channel_findings("exploding-scale", layer, beyond, words)
        return
    live = scale[scale.isfinite() & (scale > 0)]
    if live.numel() > 2:
        apart = scale / live.median()
        far = (apart > _SINGLE_EPS**-0.5) & apart.isfinite()
        words = f"up to {_among(apart, far).max():.3g} times the layer's median"
        yield from channel_findings("exploding-scale", layer, far, words)


def _cancellation(layer: Layer) -> Iterator[Finding]:
    """A mean so far from zero that subtracting it costs half the digits."""
    mean, variance = layer.wide("running_mean"), layer.wide("running_var")
    if mean is not None and variance is not None:
        apart = mean.abs() / (variance + layer.eps).sqrt()
        far = (apart > _epsilon(layer) ** -0.5) & apart.isfinite()
        yield from channel_findings("cancellation", layer, far, f"up to {_among(apart, far).max():.3g} deviations")


def _half_statistics(layer: Layer) -> Iterator[Finding]:
    variance = layer.stored.get("running_var")
    if variance is not None and variance.dtype in _HALF:
        yield _finding("half-statistics", layer, layer.health.dtype)


def _momentum(layer: Layer) -> Iterator[Finding]:
    """Zero, None, or so large that one batch decides."""
    norm = layer.health
    # A captured program writes 0 for None, and trains no more.
    if norm.kind != "batch_norm" or not norm.track_running_stats or norm.training is None:
        return
    if norm.momentum is None:
        yield _finding("momentum-none", layer)
    elif norm.momentum == 0:
        yield _finding("momentum-zero", layer)
    elif norm.momentum > _FEWER_THAN_TWO_BATCHES:
        batches = (2 - norm.momentum) / norm.momentum
        yield _finding("momentum-high", layer, f"with {norm.momentum:g} over {batches:.3g}")


def _shared_statistics(layer: Layer) -> Iterator[Finding]:
    """Called in several places, or its buffers are those of another module."""
    if (layer.health.calls or 0) > 1:
        yield _finding("shared-statistics", layer, f"called {layer.health.calls} times")
    if layer.shared:
        yield _finding("shared-statistics", layer, f"its statistics are those of {', '.join(layer.shared)} too")


def _not_called(layer: Layer) -> Iterator[Finding]:
    if layer.health.calls == 0:
        yield _finding("not-called", layer)


_CHECKS: tuple[Callable[[Layer], Iterator[Finding]], ...] = (
    _no_channels, _nonfinite, _negative_variance, _batch_statistics, _never_trained, _vanishing_variance,
    _dead_channels, _exploding_scale, _cancellation, _half_statistics, _momentum, _shared_statistics, _not_called,
)  # fmt: skip


def _finding(code: str, layer: Layer, detail: str = "") -> Finding:
    return Finding(code, (layer.health.module,), detail)


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


def _epsilon(layer: Layer) -> float:
    stored = layer.stored.get("running_var", next(iter(layer.stored.values())))
    return float(torch.finfo(stored.dtype).eps) if stored.is_floating_point() else _SINGLE_EPS


def _listed(names: Sequence[str]) -> str:
    return f"{len(names)} ({', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''})"
