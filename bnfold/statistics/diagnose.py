"""The health of every BatchNorm of a model: what it is, whether data agrees with it, and what is wrong with it.

Every limit is arithmetic, none is a taste. With ``u`` the epsilon of the dtype that a layer is stored in,
``sigma = sqrt(var + eps)``:

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

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from bnfold.errors import CaptureError
from bnfold.gate.data import load_data, select, stored_batches
from bnfold.graph.capture import Captured, tensor_inputs
from bnfold.graph.copies import eval_copy
from bnfold.graph.interpret import Runner
from bnfold.report import FINDINGS, Diagnosis, Finding
from bnfold.report.progress import Progress, silent
from bnfold.statistics.batchnorms import (
    Layer,
    batch_norms,
    is_unshaped,
    lacks_statistics,
    module_layers,
    program_layers,
    spread,
    watching_inputs,
    without_numbers,
)
from bnfold.statistics.moments import FREEDOM, Distance, Sampled
from bnfold.statistics.schemes import call, data_batches

#: Samples of the data in a batch.
BATCH = 32
_SEVERITIES = ("error", "warning", "note")


def examine(
    model: nn.Module | ExportedProgram,
    args: tuple[Any, ...] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    captured: Captured | None = None,
    failure: CaptureError | None = None,
    data: Path | str | Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> Diagnosis:
    """Examines every BatchNorm, without a source or a fold plan; ``model`` is not touched.

    Args:
        model: a module in any mode, or a program, of which only the graph's normalisations can be known.
        args: positional example inputs, to see which layers are called; None leaves that out.
        captured: the captured model, for what belongs to no module (``torch.nn.functional.batch_norm``).
        failure: why there is none, which is a finding.
        data: samples to compare running statistics with, as for ``load_data``.
        progress: told how many samples are done.

    Raises:
        InputError: the data cannot be read, or the model fails on it.
    """
    notes: list[str] = []
    in_graph = [] if captured is None else program_layers(captured.program, captured.masters)
    if isinstance(model, ExportedProgram):
        layers = in_graph
    else:
        calls = None if args is None and not kwargs else _count_calls(model, args or (), kwargs or {}, notes)
        layers = _joined(model, module_layers(model, calls), in_graph)
        whys = {name: without_numbers(norm) for name, norm in _norms(model).items()}
        notes += [f"layer '{name}' is {why}: it was not looked at" for name, why in whys.items() if why]
    found = [] if failure is None else [Finding("not-captured", ("",), str(failure))]
    samples = 0
    if data is not None and any(layer.shapeless for layer in layers):
        notes.append("a model with lazy layers cannot be run yet: nothing was compared with the data")
    elif data is not None and layers:
        sampled: dict[Layer, Sampled] = {}
        if isinstance(model, nn.Module):
            samples = _feed_module(model, data, [layer for layer in layers if not layer.inputs], sampled, progress)
        if captured is not None:
            of_graph = [layer for layer in layers if layer.inputs]
            samples = _feed_program(captured, data, of_graph, sampled, progress) if of_graph else samples
        layers, far = _compared(layers, sampled)
        found += far
        if samples <= FREEDOM:
            notes.append(f"{samples} of {FREEDOM + 1} samples at least: too few to call any statistics far")
    return Diagnosis({}, tuple(layer.health for layer in layers), findings(layers, found), None, samples, tuple(notes))


def _joined(model: nn.Module, own: list[Layer], in_graph: list[Layer]) -> list[Layer]:
    """The modules' BatchNorms with what the graph knows of them, and those of the graph that belong to none of them.

    A call in the graph is a module's where it reads that module's running mean, whatever name either goes by, and
    without a running mean of its own where it takes place in that module.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    means = [getattr(modules[layer.health.module], "running_mean", None) for layer in own]
    place = {id(mean): i for i, mean in reversed([*enumerate(means)]) if mean is not None}
    place |= {id(modules[layer.health.module]): i for i, layer in enumerate(own)}
    rest = []
    for seen in in_graph:
        owner, _, attribute = seen.target.rpartition(".")
        mean = getattr(modules.get(owner), attribute, None) if attribute else None
        i = None if mean is None else place.get(id(mean))
        if i is None and (mean is None or owner != seen.health.module):
            i = place.get(id(modules.get(seen.health.module)))
        if i is None:
            rest.append(seen)
            continue
        health = own[i].health
        if not seen.health.track_running_stats:
            # It may have statistics: its code normalises with those of the batch all the same.
            health = replace(health, track_running_stats=False)
        if health.calls == 0:  # of the module itself; its tensors are used
            own[i] = replace(own[i], inputs=seen.inputs)
            health = replace(health, calls=seen.health.calls)
        own[i] = replace(own[i], health=health)
    return own + rest


def _count_calls(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], notes: list[str]
) -> dict[str, int] | None:
    if any(is_unshaped(norm) for norm in batch_norms(model).values()):
        return None
    counts: dict[str, int] = {}

    def count(name: str, norm: nn.Module, x: Tensor) -> None:
        counts[name] = counts.get(name, 0) + 1

    try:
        duplicate = eval_copy(model)
        with torch.no_grad(), watching_inputs(_norms(duplicate).items(), count):
            duplicate(*args, **kwargs)
    except Exception as error:
        message = " ".join(str(error).split("\n")[0].split())
        notes.append(f"the model does not run on its example ({type(error).__name__}: {message})")
        return None
    return counts


def _norms(model: nn.Module) -> dict[str, nn.Module]:
    return {name: norm for name, norm in batch_norms(model).items() if not is_unshaped(norm)}


# -- against data ------------------------------------------------------------------------------------------------------


def _feed_module(
    model: nn.Module, data: Any, layers: list[Layer], sampled: dict[Layer, Sampled], progress: Progress
) -> int:
    read, samples = data_batches(model, data, BATCH)
    duplicate = eval_copy(model)
    known = {layer.health.module: layer for layer in layers}
    norms = {name: norm for name, norm in _norms(duplicate).items() if name in known and not lacks_statistics(norm)}

    def sample(name: str, norm: nn.Module, x: Tensor) -> None:
        _add(sampled, known[name], x)

    with torch.no_grad(), watching_inputs(norms.items(), sample):
        for done, batch in enumerate(read()):
            call(duplicate, batch)
            progress("health", min((done + 1) * BATCH, samples), samples)
    return samples


def _feed_program(
    captured: Captured, data: Any, layers: list[Layer], sampled: dict[Layer, Sampled], progress: Progress
) -> int:
    names = tensor_inputs(captured.program)
    if isinstance(data, (str, Path)):
        arrays, _ = load_data(Path(data), names)
    else:
        arrays, _ = select({name: np.asarray(value) for name, value in data.items()}, names)
    wanted = {name: layer for layer in layers for name in layer.inputs}
    runner, samples = Runner(captured.program), min(map(len, arrays.values()))
    first, fixed = next(leaf for leaf in captured.flat if isinstance(leaf, Tensor)), not captured.dims
    size = first.shape[0] if fixed and first.ndim else BATCH
    done = 0
    for flat, count in stored_batches(captured.names, captured.flat, arrays, size=size, fixed=fixed):
        runner(flat, keep=set(wanted))
        for name, layer in wanted.items():
            _add(sampled, layer, runner.kept[name])
        done += count
        progress("health", done, samples)
    return samples


def _add(sampled: dict[Layer, Sampled], layer: Layer, x: Tensor) -> None:
    mean = layer.stored.get("running_mean")
    if mean is None or x.ndim < 2 or x.shape[1] != mean.numel() or not x.is_floating_point() or not x.numel():
        return
    if layer.health.kind == "instance_norm":  # its variance is the mean of those of single samples, not that of all
        return
    new = Sampled.of(x, mean.to(x.device))
    sampled[layer] = sampled[layer] + new if layer in sampled else new


def _compared(layers: list[Layer], sampled: Mapping[Layer, Sampled]) -> tuple[list[Layer], list[Finding]]:
    """The layers with their distance from the data, and a finding for those that are far."""
    total = sum(len(known.values.mean) for known in sampled.values())
    result, found = [], list[Finding]()
    for layer in layers:
        known = sampled.get(layer)
        mean, variance = layer.wide("running_mean"), layer.wide("running_var")
        if known is None or mean is None or variance is None:
            result.append(layer)
            continue
        distance = Distance.between(known, mean, variance, layer.eps)
        result.append(replace(layer, health=replace(layer.health, distance=spread(distance.largest))))
        far = distance.far(total)
        if bool(far.any()):
            i = int(torch.where(far, distance.largest, 0).argmax())
            ratio = 2.0 ** float(0.5 * torch.log2((known.values.variance[i] + layer.eps) / (variance[i] + layer.eps)))
            words = (
                f"in {i} the data has mean {float(known.values.mean[i]):.3g} and variance "
                f"{float(known.values.variance[i]):.3g}, the layer {float(mean[i]):.3g} and {float(variance[i]):.3g}: "
                f"{float(distance.shift[i]):.2g} deviations off, {ratio:.2g} times as wide"
            )
            found += channel_findings("statistics-far", layer, far, words)
    return result, found


_SHOWN = 5
_HALF = {torch.float16, torch.bfloat16}
_HALF_MAX = float(torch.finfo(torch.float16).max)
_SINGLE_EPS = float(torch.finfo(torch.float32).eps)
_FEWER_THAN_TWO_BATCHES = 2 / 3


def findings(layers: Sequence[Layer], more: Sequence[Finding] = ()) -> tuple[Finding, ...]:
    """What is wrong with each BatchNorm, with how they go together, and ``more``.

    By severity, then in the order of ``FINDINGS``, then in that of the layers.
    """
    checks, codes = (_of_use, _of_statistics, _of_channels), list(FINDINGS)
    found = [*_together(layers), *(each for layer in layers for check in checks for each in check(layer)), *more]
    return tuple(sorted(found, key=lambda f: (_SEVERITIES.index(f.severity), codes.index(f.code))))


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
