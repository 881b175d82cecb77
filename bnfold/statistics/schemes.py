"""The two schemes by which the inputs of BatchNorms are measured, and how one input is; see ``calibration``.

The first pass of the sequential scheme follows the data through the model. In a later one the layers that it measures
must be called exactly as often as in the first, or else their statistics would be those of a part of the data.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from bnfold.errors import InputError
from bnfold.statistics.batches import Batch, call
from bnfold.statistics.batchnorms import STATISTICS, channels_of, own_tensors, watching_inputs
from bnfold.statistics.moments import Moments
from bnfold.statistics.waves import Schedule, Site, schedule, trace

Progress = Callable[[str, int, int], None]
#: By name, modules that have one set of running statistics between them.
Targets = Mapping[str, Sequence[nn.Module]]
Read = Callable[[], Iterator[Batch]]
#: The order of measurement, the moments by name, and how many batches there were.
Found = tuple[Schedule, dict[str, Moments], int]


class _Enough(BaseException):
    """Everything that a pass measures has been seen; the rest of the model need not run."""


@dataclass(frozen=True)
class _First:
    """What the first pass over the data found.

    Attributes:
        plan: what the passes measure, this one among them.
        times: in how many batches every call took place.
        free: moments at the sites that wait for none.
        batches: how many there are.
        stops: whether a pass may stop at the last layer that it measures. Not where batches call differently, or where
            Python learns something of a normalised tensor, by which it may decide what is called: then every pass
            counts all calls.
    """

    plan: Schedule
    times: Counter[Site]
    free: Mapping[Site, Moments]
    batches: int
    stops: bool


def sequential(model: nn.Module, targets: Targets, read: Read, progress: Progress) -> Found:
    """Measures every BatchNorm behind measured ones, and writes what it measures into ``targets``.

    Raises:
        InputError: see ``calibrate``.
    """
    first = _first_pass(model, targets, read, progress)
    total: dict[str, Moments] = {}
    for turn, wave in enumerate(first.plan.waves):
        found = _later_pass(model, targets, turn, first, read, progress) if turn else first.free
        for site in wave:
            total[site.module] = _pooled(total.get(site.module), found[site])
        for name in {site.module for site in wave}:
            _check_count(name, total[name])
            for norm in targets[name]:
                write(norm, total[name])
    return first.plan, total, first.batches


def _first_pass(model: nn.Module, targets: Targets, read: Read, progress: Progress) -> _First:
    before: dict[Site, frozenset[Site]] = {}
    free: dict[Site, Moments] = {}
    times, told, batches, waves = Counter[Site](), False, 0, 0

    def measure_free(site: Site, norm: nn.Module, x: Tensor) -> None:
        free[site] = _pooled(free.get(site), _moments(site.module, norm, x))

    for batch in read():
        seen = trace(partial(call, model, batch), _pairs(targets), measure_free)
        for site, sources in seen.before.items():
            before[site] = before.get(site, frozenset()) | sources
        times.update(seen.before.keys())
        told = told or bool(seen.told)
        batches += 1
        waves = waves or len(schedule(before).waves)
        progress("calibrate", batches, waves * batches + 1)
    if not batches:
        raise InputError("there are no batches", hint="Calibration needs data")
    return _First(schedule(before), times, free, batches, not told and set(times.values()) <= {batches})


def _later_pass(
    model: nn.Module, targets: Targets, turn: int, first: _First, read: Read, progress: Progress
) -> dict[Site, Moments]:
    found: dict[Site, Moments] = {}
    times, calls, wanted = Counter[Site](), Counter[str](), set(first.plan.waves[turn])
    left = set[Site]()

    def measure_wanted(name: str, norm: nn.Module, x: Tensor) -> None:
        site = Site(name, calls[name])
        calls[name] += 1
        times[site] += 1
        if site in wanted:
            found[site] = _pooled(found.get(site), _moments(name, norm, x))
            left.discard(site)
            if first.stops and not left:
                raise _Enough

    of = len(first.plan.waves) * first.batches + 1
    with watching_inputs(_pairs(targets), measure_wanted):
        for done, batch in enumerate(read(), turn * first.batches + 1):
            calls.clear()
            left |= wanted
            with suppress(_Enough):
                call(model, batch)
            progress("calibrate", min(done, of - 1), of)
    for site in wanted if first.stops else {*first.times, *times}:
        if times[site] != first.times[site]:
            raise InputError(
                f"layer '{site.module}' is not called alike in every pass over the data "
                f"(call {site.call + 1} in {first.times[site]} batches, then in {times[site]})",
                hint="Its calls depend on the statistics themselves, or the batches differ from pass to pass: "
                "the one-pass scheme (scheme='one-pass', --scheme one-pass) reads them once",
            )
    return found


def _pairs(targets: Targets) -> list[tuple[str, nn.Module]]:
    return [(name, norm) for name, norms in targets.items() for norm in norms]


def _pooled(known: Moments | None, more: Moments) -> Moments:
    return more if known is None else known + more


def one_pass(model: nn.Module, targets: Targets, read: Read, progress: Progress) -> Found:
    """Measures every BatchNorm behind the batch's own statistics, which are in ``targets`` afterwards.

    Raises:
        InputError: see ``calibrate``.
    """
    found: dict[str, Moments] = {}
    calls: dict[str, int] = {}
    now: dict[str, int] = {}

    def normalise_with_batch(name: str, norm: nn.Module, x: Tensor) -> None:
        moments = _moments(name, norm, x)
        if moments.count:
            _check_count(name, moments)
            write(norm, moments)  # eval mode with these statistics is what training mode computes
        found[name] = _pooled(found.get(name), moments)
        now[name] = now.get(name, 0) + 1

    count = 0
    with watching_inputs(_pairs(targets), normalise_with_batch):
        for batch in read():
            now.clear()
            call(model, batch)
            count += 1
            calls |= {name: max(times, calls.get(name, 0)) for name, times in now.items()}
            progress("calibrate", count, count + 1)
    if not count:
        raise InputError("there are no batches", hint="Calibration needs data")
    for name, moments in found.items():
        _check_count(name, moments)
    sites = tuple(Site(name, i) for name, times in calls.items() for i in range(times))
    return Schedule((sites,) if sites else (), ()), found, count


# -- one layer ---------------------------------------------------------------------------------------------------------


def _moments(name: str, norm: nn.Module, x: Tensor) -> Moments:
    channels = channels_of(norm)
    tensors = own_tensors(norm)
    for key in STATISTICS:
        if tensors[key].numel() != channels:
            raise InputError(
                f"layer '{name}' has {channels} channels and a {key} of {tensors[key].numel()} values",
                hint="Only layers with one value per channel can be measured; leave this one out (only=, --only)",
            )
    if x.is_complex():
        raise InputError(f"layer '{name}' is given complex numbers", hint="Leave it out (only=, --only)")
    if x.ndim < 2 or x.shape[1] != channels:
        raise InputError(
            f"layer '{name}' with {channels} channels is given {list(x.shape)}, whose axis 1 is not the channels'",
            hint="Only layers that normalise axis 1 can be measured; leave this one out (only=, --only)",
        )
    moments = Moments.of(x)
    if not bool(moments.mean.isfinite().all() and moments.squares.isfinite().all()):
        bad = (~(moments.mean.isfinite() & moments.squares.isfinite())).nonzero().flatten().tolist()
        raise InputError(
            f"the input of layer '{name}' has NaN or infinite values (channels {', '.join(map(str, bad[:5]))})",
            hint="Look for them in the data, and in the weights and statistics before that layer (bnfold inspect)",
        )
    return moments


def _check_count(name: str, moments: Moments) -> None:
    if moments.count < 2:
        raise InputError(
            f"layer '{name}' sees {'one' if moments.count else 'no'} value per channel, which has no variance",
            hint="Give two samples at least, and for the one-pass scheme two in every batch",
        )


def write(norm: nn.Module, moments: Moments) -> None:
    """Gives a BatchNorm new running statistics, in place and in the dtype that it stores them in.

    Raises:
        InputError: that dtype cannot hold them.
    """
    for name, new in zip(STATISTICS, (moments.mean, moments.variance)):
        stored: Tensor = getattr(norm, name)
        rounded = new.to(stored)
        if not bool(rounded.isfinite().all()):
            raise InputError(
                f"the {name} of a layer reaches {float(new.abs().max()):.3g}, which {stored.dtype} cannot hold",
                hint="Keep the model's BatchNorms in float32",
            )
        with torch.no_grad():
            stored.copy_(rounded.reshape(stored.shape))
