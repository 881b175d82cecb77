"""The health of every BatchNorm of a model: what it is, what is wrong with it, and whether data agrees with it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
from bnfold.statistics.batches import call, data_batches
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
from bnfold.statistics.findings import channel_findings, findings
from bnfold.statistics.moments import FREEDOM, Distance, Sampled

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
    found = findings(layers) + ([] if failure is None else [Finding("not-captured", ("",), str(failure))])
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
    return Diagnosis({}, tuple(layer.health for layer in layers), worst_first(found), None, samples, tuple(notes))


def worst_first(found: Iterable[Finding]) -> tuple[Finding, ...]:
    """By severity, then in the order of ``FINDINGS``, then as they come: in the order of the layers."""
    codes = list(FINDINGS)
    return tuple(sorted(found, key=lambda f: (_SEVERITIES.index(f.severity), codes.index(f.code))))


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
