"""Running statistics from data: the exact mean and variance of what every BatchNorm is fed, not a moving average.

*Sequential* (the default): a BatchNorm is measured when all those before it have their new statistics, so that in the
calibrated model each one normalises what it was measured on. BatchNorms that wait for the same ones share a pass over
the data, and there are as many passes as BatchNorms in the longest chain. The first measures those that wait for none
and sees from every batch who waits for whom: which layers are called, and how often, may differ from batch to batch. A
later one stops at the last layer that it measures. *One-pass*: every BatchNorm normalises with the statistics of the
batch, as in training, and its inputs' moments are pooled; cheaper, and exact only where the whole data is one batch.

BatchNorms that share their running statistics are measured as calls of one.

The variance stored is that of all values, divided by their number: what eval mode then makes of the data has variance
``var/(var + eps)``, that is 1 but for eps. In training torch averages unbiased variances of batches instead.
"""

from __future__ import annotations

import difflib
import fnmatch
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, cast

import torch
from torch import Tensor, nn

from bnfold.errors import InputError, UsageError
from bnfold.graph.copies import copied, eval_copy
from bnfold.report import CalibratedLayer
from bnfold.report.progress import Progress, silent
from bnfold.statistics.batchnorms import (
    EPS,
    STATISTICS,
    batch_norms,
    eps_of,
    keep_statistics,
    lacks_statistics,
    sharers,
    statistics_like,
    without_numbers,
)
from bnfold.statistics.moments import Moments
from bnfold.statistics.schemes import (
    Batch,
    Batches,
    Pass,
    Read,
    Seen,
    Spread,
    observe,
    one_pass,
    rereadable,
    sequential,
    write,
)
from bnfold.user_code import unended

Scheme = Literal["sequential", "one-pass"]


@unended()
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

    Warns:
        UserWarning: the data does not reach a BatchNorm, which is left as it was.

    Raises:
        InputError: no batches, no BatchNorm, one value per channel, NaN or infinities at a BatchNorm, the model fails
            on a batch, or what it calls depends on the very statistics that are measured.
        CaptureError: the model cannot be copied, or has lazy layers without a shape.
        UsageError: ``only`` names no BatchNorm, the batches can be read only once, or a model made under
            ``torch.inference_mode`` is to be changed in place.
    """
    if inplace and any(tensor.is_inference() for tensor in model.buffers()):
        raise UsageError("buffers made under inference_mode cannot be changed", hint="Calibrate without inplace=True")
    measured = measure(model, batches, only=only, scheme=scheme)
    if inplace:
        measured.write(model)
    calibrated = model if inplace else measured.written(model)
    if measured.unreached:
        names = ", ".join(f"'{name}'" for name in measured.unreached)
        warnings.warn(f"the data does not reach BatchNorm {names}, left as before", stacklevel=2)
    return calibrated


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
    rows: int = 0

    def written(self, model: nn.Module) -> nn.Module:
        """A deep copy of ``model`` with them; CaptureError where it cannot be copied."""
        duplicate = copied(model)
        self.write(duplicate)
        return duplicate

    def write(self, model: nn.Module) -> None:
        """Writes them into ``model``, which has the modules that were measured."""
        for name, moments in self.moments.items():
            norm = model.get_submodule(name)
            if lacks_statistics(norm):
                keep_statistics(norm, self.like[name])
            write(norm, moments)
            if isinstance(counter := getattr(norm, "num_batches_tracked", None), Tensor):
                counter.fill_(self.batches)


@dataclass(frozen=True)
class Scratch:
    """A copy of a model in which statistics are measured."""

    model: nn.Module  #: in eval mode.
    asked: tuple[str, ...]  #: the BatchNorms to measure.
    owner: Mapping[str, str]  #: those and all that share their statistics, each with the one it goes by.
    targets: Mapping[str, Sequence[nn.Module]]  #: the modules that go by one, by its name.
    like: Mapping[str, Tensor]  #: of those that had no statistics, a tensor of the dtype and device for them.
    before: Mapping[str, tuple[Tensor, ...]]  #: the statistics that were there.

    @classmethod
    def of(cls, model: nn.Module, only: str | Sequence[str] | None) -> Scratch:
        """A copy of ``model``, and what ``only`` names of it; raises what ``calibrate`` does."""
        asked, owner = _asked(model, only)
        scratch = eval_copy(model)
        modules = dict(scratch.named_modules())
        targets: dict[str, list[nn.Module]] = {}
        for name, first in owner.items():
            targets.setdefault(first, []).append(modules[name])
        before, like = dict[str, tuple[Tensor, ...]](), dict[str, Tensor]()
        for name, (norm, *_) in targets.items():
            if lacks_statistics(norm):
                like[name] = statistics_like(norm, scratch)
                keep_statistics(norm, like[name])
            else:
                before[name] = tuple(getattr(norm, each).detach().double().flatten().clone() for each in STATISTICS)
        return cls(scratch, asked, owner, targets, like, before)

    def observe(self, turn: Pass, read: Read, progress: Progress) -> Seen:
        """What one part of the data shows in one pass."""
        return observe(self.model, self.targets, read, turn, progress)


def measure(
    model: nn.Module,
    batches: Batches,
    *,
    only: str | Sequence[str] | None = None,
    scheme: Scheme = "sequential",
    progress: Progress = silent,
    spread: Spread | None = None,
) -> Measured:
    """What ``calibrate`` writes, and raises.

    Args:
        model, batches, only, scheme: as for ``calibrate``.
        progress: is told how many batches are done, and of how many.
        spread: makes the passes, over data that ``batches`` knows nothing of.
    """
    if scheme not in ("sequential", "one-pass"):
        raise UsageError(f"there is no scheme {scheme!r}", hint="There are 'sequential' and 'one-pass'")
    why = "the sequential scheme reads them once per level of BatchNorms"
    once = scheme == "one-pass" and isinstance(batches, Iterator)  # one reading is all that it needs
    read = (lambda: iter(cast("Iterator[Batch]", batches))) if once else rereadable(batches, why)
    scratch = Scratch.of(model, only)
    passes = {"sequential": sequential, "one-pass": one_pass}[scheme]
    plan, moments, first = passes(spread or (lambda turn: [scratch.observe(turn, read, progress)]))
    if not moments:
        hint = "bnfold inspect lists them. Calls of torch.nn.functional with a module's tensors are not measured"
        raise InputError("the data reaches no BatchNorm", hint=hint)
    owner, targets = scratch.owner, scratch.targets
    turns = {site.module: turn for turn, wave in enumerate(plan.waves, 1) for site in wave}
    layers = tuple(
        _layer(name, targets[name][0], moments[name], plan.calls(name), turns[name], scratch.before.get(name))
        for name in sorted(moments, key=turns.__getitem__)
    )
    unreached = tuple(name for name in scratch.asked if owner[name] not in moments)
    gained = {name: tensor for name, tensor in scratch.like.items() if name in moments}
    every = {name: moments[first] for name, first in owner.items() if first in moments}
    return Measured(every, layers, len(plan.waves), first.batches, unreached, plan.circular, gained, first.rows)


def _asked(model: nn.Module, only: str | Sequence[str] | None) -> tuple[tuple[str, ...], dict[str, str]]:
    """Names of the BatchNorms to measure, and of all that share their statistics, each with the one it goes by."""
    instance_norm = nn.modules.instancenorm._InstanceNorm
    norms = {name: norm for name, norm in batch_norms(model).items() if not isinstance(norm, instance_norm)}
    if not norms:
        raise InputError("the model has no BatchNorm", hint="There is nothing to calibrate")
    patterns = ("*",) if only is None else (only,) if isinstance(only, str) else tuple(only)
    for pattern in patterns:
        if not fnmatch.filter(norms, pattern):
            near = difflib.get_close_matches(pattern, norms, n=3, cutoff=0.4) or list(norms)[:3]
            raise UsageError(f"no BatchNorm is called {pattern!r}", where="only", hint=f"There are {', '.join(near)}")
    asked = tuple(name for name in norms if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns))
    first = sharers(norms)
    known = {first[name]: name for name in reversed(asked)}
    owner = {name: known[first[name]] for name in norms if first[name] in known}
    for name in owner:
        if isinstance(norms[name], torch.jit.ScriptModule):
            raise InputError(f"layer '{name}' is TorchScript", hint="Calibrate the model that was scripted")
        if why := without_numbers(norms[name]):
            hint = "Calibrate a model with real weights, or leave this layer out (only=, --only)"
            raise InputError(f"layer '{name}' is {why}", hint=hint)
    return asked, owner


def _layer(
    name: str, norm: nn.Module, new: Moments, calls: int, turn: int, before: tuple[Tensor, ...] | None
) -> CalibratedLayer:
    layer = CalibratedLayer(name, len(new.mean), new.count, calls, turn, before is not None)
    if before is None:
        return layer
    mean, variance = before
    eps = EPS if (known := eps_of(norm)) is None else known
    wide = (new.variance + eps).abs()
    ratio = (variance + eps) / wide
    moved = float(((mean - new.mean).abs() / wide.sqrt()).max())
    return replace(layer, moved=moved, stretched=float(torch.maximum(ratio, 1 / ratio).max()))
