"""Running statistics from data: the exact mean and variance of what every BatchNorm is fed, not a moving average.

*Sequential* (the default): a BatchNorm is measured when all those before it have their new statistics, so that in the
calibrated model each one normalises what it was measured on. BatchNorms that wait for the same ones share a pass over
the data, a pass stops at the last layer that it measures, and there are as many passes as BatchNorms in the longest
chain. *One-pass*: every BatchNorm normalises with the statistics of the batch, as in training, and its inputs' moments
are pooled; cheaper, and exact only where the whole data is one batch.

The variance stored is that of all values, divided by their number: what eval mode then makes of the data has variance
``var/(var + eps)``, that is 1 but for eps. In training torch averages unbiased variances of batches instead.
"""

from __future__ import annotations

import copy
import difflib
import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from bnfold.errors import CaptureError, InputError, UsageError
from bnfold.graph.capture import eval_copy
from bnfold.report import CalibratedLayer
from bnfold.statistics.batches import Batch, Batches, call, rereadable
from bnfold.statistics.batchnorms import (
    EPS,
    STATISTICS,
    batch_norms,
    channels_of,
    eps_of,
    keep_statistics,
    lacks_statistics,
    watching_inputs,
)
from bnfold.statistics.moments import Moments
from bnfold.statistics.waves import Schedule, Site, schedule

Scheme = Literal["sequential", "one-pass"]
Progress = Callable[[str, int, int], None]


def calibrate(
    model: nn.Module,
    batches: Batches,
    *,
    only: str | Sequence[str] | None = None,
    scheme: Scheme = "sequential",
    inplace: bool = False,
) -> nn.Module:
    """Gives the BatchNorms of ``model`` the mean and variance of their inputs over ``batches``.

    Those of ``track_running_stats=False`` have running statistics afterwards, and can be folded. InstanceNorms stay:
    they are meant to normalise every sample by itself. Dropout is off, and no weight changes.

    Args:
        model: in any mode; as it was afterwards, unless ``inplace``.
        batches: an iterable of batches that can be read several times, or a function that returns one. A batch is a
            tensor, a tuple of positional inputs or a dict of inputs by name, without labels.
        only: patterns as for ``fnmatch``, of the qualified names of the BatchNorms to measure. Default: all.
        scheme: ``"sequential"`` reads the batches once per BatchNorm of the longest chain, ``"one-pass"`` once; see
            above. Memory is that of the model on one batch, whatever the number of batches.
        inplace: change ``model`` instead of a deep copy; its training flags stay.

    Returns:
        The calibrated model, in the mode in which ``model`` is.

    Raises:
        InputError: no batches, no BatchNorm, one value per channel, NaN or infinities at a BatchNorm, or the model
            fails on a batch.
        CaptureError: the model cannot be copied, or has lazy layers without a shape.
        UsageError: ``only`` names no BatchNorm, or the batches can be read only once.
    """
    measured = measure(model, batches, only=only, scheme=scheme)
    if not inplace:
        return measured.written(model)
    measured.write(model)
    return model


@dataclass(frozen=True)
class Measured:
    """New statistics by module name, and how they came about."""

    moments: Mapping[str, Moments]
    layers: tuple[CalibratedLayer, ...]
    passes: int
    batches: int
    unreached: tuple[str, ...] = ()
    circular: tuple[str, ...] = ()
    like: Mapping[str, Tensor] = field(default_factory=dict, repr=False)  # of those that had no statistics

    def written(self, model: nn.Module) -> nn.Module:
        """A deep copy of ``model`` with them.

        Raises:
            CaptureError: it cannot be copied.
        """
        duplicate = _deep_copy(model)
        self.write(duplicate)
        return duplicate

    def write(self, model: nn.Module) -> None:
        """Writes them into ``model``, which has the modules that were measured."""
        for name, moments in self.moments.items():
            norm = model.get_submodule(name)
            if lacks_statistics(norm):
                keep_statistics(norm, self.like[name])
            _write(norm, moments)
            if isinstance(counter := getattr(norm, "num_batches_tracked", None), Tensor):
                counter.fill_(self.batches)


def measure(
    model: nn.Module,
    batches: Batches,
    *,
    only: str | Sequence[str] | None = None,
    scheme: Scheme = "sequential",
    progress: Progress = lambda stage, done, total: None,
) -> Measured:
    """What ``calibrate`` writes, and raises; ``progress`` is told how many batches are done, and of how many."""
    if scheme not in ("sequential", "one-pass"):
        raise UsageError(f"there is no scheme {scheme!r}", hint="There are 'sequential' and 'one-pass'")
    why = "the sequential scheme reads them once per level of BatchNorms"
    # One reading is all that one pass needs, so a generator will do.
    read = (lambda: iter(batches)) if scheme == "one-pass" and isinstance(batches, Iterator) else None
    read = read or rereadable(batches, why)
    scratch = eval_copy(model)
    targets = {name: scratch.get_submodule(name) for name in chosen(model, only)}
    before = {name: _statistics(norm) for name, norm in targets.items()}
    like: dict[str, Tensor] = {}
    for name, norm in targets.items():
        if lacks_statistics(norm):
            like[name] = _like(norm, scratch)
            keep_statistics(norm, like[name])
    with torch.no_grad():
        if scheme == "sequential":
            plan, moments, count = _sequential(scratch, targets, read, progress)
        else:
            plan, moments, count = _one_pass(scratch, targets, read, progress)
    if not moments:
        raise InputError("the data reaches no BatchNorm", hint="bnfold inspect lists them and says which are called")
    turns = {site.module: turn for turn, wave in enumerate(plan.waves, 1) for site in wave}
    layers = tuple(
        _layer(name, targets[name], moments[name], plan.calls(name), turns[name], before[name])
        for name in sorted(moments, key=turns.__getitem__)
    )
    unreached = tuple(name for name in targets if name not in moments)
    gained = {name: tensor for name, tensor in like.items() if name in moments}
    return Measured(moments, layers, len(plan.waves), count, unreached, plan.circular, gained)


def chosen(model: nn.Module, only: str | Sequence[str] | None) -> tuple[str, ...]:
    """Names of the BatchNorms to measure, in the model's order.

    Raises:
        InputError: the model has none.
        UsageError: a pattern fits none.
    """
    norms = {name: norm for name, norm in batch_norms(model).items() if not _is_instance_norm(norm)}
    if not norms:
        raise InputError("the model has no BatchNorm", hint="There is nothing to calibrate")
    if only is None:
        return tuple(norms)
    patterns = (only,) if isinstance(only, str) else tuple(only)
    for pattern in patterns:
        if not fnmatch.filter(norms, pattern):
            near = difflib.get_close_matches(pattern, norms, n=3, cutoff=0.4) or list(norms)[:3]
            raise UsageError(f"no BatchNorm is called {pattern!r}", where="only", hint=f"There are {', '.join(near)}")
    return tuple(name for name in norms if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns))


# -- the schemes -------------------------------------------------------------------------------------------------------

_Read = Callable[[], Iterator[Batch]]
_Found = tuple[Schedule, dict[str, Moments], int]


class _Enough(BaseException):
    """Everything that a pass measures has been seen; the rest of the model need not run."""


def _sequential(model: nn.Module, targets: Mapping[str, nn.Module], read: _Read, progress: Progress) -> _Found:
    first = next(read(), None)
    if first is None:
        raise InputError("there are no batches", hint="Calibration needs data")
    plan = schedule(lambda: call(model, first), targets)
    total: dict[str, Moments] = {}
    count = known = 0
    for turn, wave in enumerate(plan.waves):
        found: dict[Site, Moments] = {}
        count = 0
        for batch in read():
            seen: dict[Site, Moments] = {}
            with _watching(targets, wave, seen), suppress(_Enough):
                call(model, batch)
            for site, moments in seen.items():
                found[site] = found[site] + moments if site in found else moments
            count += 1
            known = max(known, count)
            progress("calibrate", turn * known + count, len(plan.waves) * known + 1)
        for site, moments in found.items():
            total[site.module] = total[site.module] + moments if site.module in total else moments
        for name in {site.module for site in wave}:
            _check_count(name, total[name])
            _write(targets[name], total[name])
    return plan, total, count


@contextmanager
def _watching(targets: Mapping[str, nn.Module], wave: Iterable[Site], seen: dict[Site, Moments]) -> Iterator[None]:
    """While it lasts, the inputs at the sites of ``wave`` are measured; at the last one the model stops."""
    wanted, calls = set(wave), dict[str, int]()

    def watch(name: str, norm: nn.Module, x: Tensor) -> None:
        site = Site(name, calls.get(name, 0))
        calls[name] = site.call + 1
        if site in wanted:
            seen[site] = _moments(name, norm, x)
            if len(seen) == len(wanted):
                raise _Enough

    with watching_inputs({site.module: targets[site.module] for site in wave}, watch):
        yield


def _one_pass(model: nn.Module, targets: Mapping[str, nn.Module], read: _Read, progress: Progress) -> _Found:
    found: dict[str, Moments] = {}
    calls: dict[str, int] = {}
    now: dict[str, int] = {}

    def normalise_with_batch(name: str, norm: nn.Module, x: Tensor) -> None:
        moments = _moments(name, norm, x)
        _check_count(name, moments)
        _write(norm, moments)  # eval mode with these statistics is what training mode computes
        found[name] = found[name] + moments if name in found else moments
        now[name] = now.get(name, 0) + 1

    count = 0
    with watching_inputs(targets, normalise_with_batch):
        for batch in read():
            now.clear()
            call(model, batch)
            count += 1
            calls |= {name: max(times, calls.get(name, 0)) for name, times in now.items()}
            progress("calibrate", count, count + 1)
    if not count:
        raise InputError("there are no batches", hint="Calibration needs data")
    sites = tuple(Site(name, i) for name, times in calls.items() for i in range(times))
    return Schedule((sites,) if sites else (), ()), found, count


# -- one layer ---------------------------------------------------------------------------------------------------------


def _moments(name: str, norm: nn.Module, x: Tensor) -> Moments:
    channels = channels_of(norm)
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
            f"layer '{name}' sees one value per channel, which has no variance",
            hint="Give two samples at least, and for the one-pass scheme two in every batch",
        )


def _write(norm: nn.Module, moments: Moments) -> None:
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


def _layer(
    name: str, norm: nn.Module, new: Moments, calls: int, turn: int, before: tuple[Tensor, Tensor] | None
) -> CalibratedLayer:
    channels = len(new.mean)
    if before is None:
        return CalibratedLayer(name, channels, new.count, calls, turn, had_statistics=False)
    mean, variance = before
    eps = EPS if (known := eps_of(norm)) is None else known
    wide = (new.variance + eps).abs()
    moved = float(((mean - new.mean).abs() / wide.sqrt()).max())
    ratio = (variance + eps) / wide
    return CalibratedLayer(
        name, channels, new.count, calls, turn, True, moved, float(torch.maximum(ratio, 1 / ratio).max())
    )  # fmt: skip


def _statistics(norm: nn.Module) -> tuple[Tensor, Tensor] | None:
    if lacks_statistics(norm):
        return None
    mean, variance = (getattr(norm, name).detach().double().flatten().clone() for name in STATISTICS)
    return mean, variance


def _like(norm: nn.Module, model: nn.Module) -> Tensor:
    """A tensor of the dtype and device for new statistics: gamma's, else any weight's."""
    weight = getattr(norm, "weight", None)
    if isinstance(weight, Tensor):
        return weight
    return next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))


def _is_instance_norm(norm: nn.Module) -> bool:
    return isinstance(norm, nn.modules.instancenorm._InstanceNorm)


def _deep_copy(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise CaptureError(
            f"the model cannot be copied: {type(error).__name__}: {error}", hint="Calibrate it with inplace=True"
        ) from error
