"""The batches that a module is called with, and the two schemes by which the inputs of its BatchNorms are measured.

Either is made of passes, and a pass over the data of passes over its parts, wherever those run: what a part shows is
added up in the order of the parts. The first pass of the sequential scheme follows the data through the model. In a
later one the layers that it measures must be called exactly as often as in the first, or else their statistics would be
those of a part of the data.
"""

from __future__ import annotations

import inspect
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial, reduce
from operator import add
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from bnfold.errors import BnfoldError, InputError, UsageError
from bnfold.gate.data import select
from bnfold.gate.stored import Rows, in_order, open_arrays
from bnfold.graph.scripted import signature
from bnfold.report.progress import Progress
from bnfold.statistics.batchnorms import STATISTICS, channels_of, own_tensors, watching_inputs
from bnfold.statistics.moments import Moments
from bnfold.statistics.waves import Schedule, Site, schedule, trace

#: What a model is called with: one tensor, a tuple or list of positional inputs, or a mapping of keyword inputs.
Batch = Any
Batches = Iterable[Batch] | Callable[[], Iterable[Batch]]


def rereadable(batches: Batches, why: str) -> Callable[[], Iterator[Batch]]:
    """A function that begins ``batches`` anew at every call; UsageError where they can be read only once."""
    if callable(batches):
        return lambda: iter(batches())
    if isinstance(batches, (Tensor, Mapping)) or not isinstance(batches, Iterable):
        hint = f"For one batch write [batch]; this is a {type(batches).__name__}"
        raise UsageError("batches must be an iterable of batches", hint=hint)
    if isinstance(batches, Iterator):
        hint = "Give a list, a DataLoader, or a function that returns an iterator"
        raise UsageError(f"batches can be read only once, and {why}", hint=hint)
    return lambda: iter(batches)


def call(model: nn.Module, batch: Batch) -> Any:
    """Calls a model with one batch; InputError where it fails on it."""
    args: tuple[Any, ...] = (batch,) if isinstance(batch, Tensor) else ()
    kwargs = dict(batch) if isinstance(batch, Mapping) else {}
    if isinstance(batch, (tuple, list)):
        args = tuple(batch)
    elif not isinstance(batch, (Tensor, Mapping)):
        hint = "A batch is a tensor, a tuple of positional inputs or a dict of inputs by name"
        raise InputError(f"a batch is a {type(batch).__name__}", hint=hint)
    try:
        return model(*args, **kwargs)
    except BnfoldError:
        raise
    except Exception as error:
        shapes = ", ".join(
            f"{value.dtype}{list(value.shape)}".removeprefix("torch.")
            for value in (*args, *kwargs.values())
            if isinstance(value, Tensor)
        )
        takes = signature(model)
        raise InputError(
            f"the model fails on the data with {type(error).__name__}: {error}",
            hint=f"It was given {shapes or 'no tensor'}; forward is {takes}. "
            "Batches hold the inputs alone, without labels",
        ) from error


def data_batches(
    model: nn.Module, data: Path | str | Mapping[str, Any], size: int
) -> tuple[Callable[[], Iterator[Batch]], int]:
    """Batches of the rows of ``data``, by the names of ``forward``'s parameters, and how many rows there are.

    For a ``forward(*inputs)``, which names none, there may be one array; that and what has no keyword is positional.

    Args:
        model: says what its inputs are called and, by its own parameters, in which precision it takes them.
        data: an .npz, an .npy for a model of one input, or arrays by name; of an .npz a few rows are in memory.
        size: rows in a batch; the last has fewer, or one more where a single row would remain.

    Raises:
        InputError: see ``load_data``; no array is called like an input.
    """
    parameters = signature(model).parameters.values()
    many = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    named = [p for p in parameters if p.kind not in many]
    optional = [p.name for p in named if p.default is not p.empty]
    names = [*(p.name for p in named if p.default is p.empty), *optional]
    where = str(data) if isinstance(data, (str, Path)) else None
    known: Mapping[str, Rows]
    if isinstance(data, (str, Path)):
        known = open_arrays(Path(data))
    else:
        known = {name: np.asarray(value) for name, value in data.items()}
    kinds = {p.kind for p in parameters}
    positional = inspect.Parameter.POSITIONAL_ONLY in kinds
    if not names and inspect.Parameter.VAR_POSITIONAL in kinds:
        positional = True
        names = [name for name in known if name not in ("labels", "targets")]
        if len(names) != 1:
            raise InputError(
                f"forward names no inputs, and the data has {len(names)} arrays",
                where=where,
                hint="Give one array, or a model whose forward names its inputs",
            )
    arrays, _ = select(known, names, optional=optional, where=where)
    if not arrays:
        what = f"no array for {names[0] if names else 'an input'}"
        raise InputError(what, where=where, hint="Name it like the input")
    floats = (t.dtype for t in itertools.chain(model.parameters(), model.buffers()) if t.is_floating_point())
    dtype = next(floats, torch.float32)

    def read() -> Iterator[Batch]:
        for batch in _batches(arrays, size, dtype):
            yield tuple(batch.values()) if positional else batch

    return read, min(map(len, arrays.values()))


def _batches(arrays: Mapping[str, Rows], size: int, dtype: torch.dtype) -> Iterator[dict[str, Tensor]]:
    with ExitStack() as stack:
        streams = {name: in_order(rows, size) for name, rows in arrays.items()}
        for stream in streams.values():
            stack.callback(stream.close)
        waiting: dict[str, np.ndarray] = {}
        for rows in zip(*streams.values(), strict=True):
            chunk = dict(zip(streams, rows))
            if waiting and len(rows[0]) == 1:  # one row alone has no variance
                chunk = {name: np.concatenate([waiting[name], chunk[name]]) for name in chunk}
            elif waiting:
                yield {name: _tensor(values, dtype) for name, values in waiting.items()}
            waiting = chunk
        if waiting:
            yield {name: _tensor(values, dtype) for name, values in waiting.items()}


def _tensor(rows: np.ndarray, dtype: torch.dtype) -> Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(rows))
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


#: By name, modules that have one set of running statistics between them.
Targets = Mapping[str, Sequence[nn.Module]]
Read = Callable[[], Iterator[Batch]]
#: The order of measurement, the moments by name, and what the first pass has shown.
Found = tuple[Schedule, dict[str, Moments], "Seen"]


class _Enough(BaseException):
    """Everything that a pass measures has been seen; the rest of the model need not run."""


@dataclass(frozen=True)
class Pass:
    """What is to be measured in one pass over the data."""

    #: ``first`` of the sequential scheme, a ``later`` one of it, or the only one of the other.
    kind: Literal["first", "later", "one-pass"]
    #: the statistics measured before, by name, which are to be in the model.
    known: Mapping[str, Moments] = field(default_factory=dict)
    wanted: frozenset[Site] = frozenset()
    #: whether a later one may stop at the last layer that it measures. Not where batches call differently, or where
    #: Python learns something of a normalised tensor, by which it may decide what is called: then every pass counts all
    #: calls.
    stops: bool = False
    done: int = 0
    total: int = 0  #: batches of all passes; 0 where that is not known yet.


@dataclass
class Seen:
    """What a pass over some of the data has shown."""

    #: of the inputs at sites: in the first pass those that wait for none.
    moments: dict[Site, Moments] = field(default_factory=dict)
    times: Counter[Site] = field(default_factory=Counter)  #: in how many batches every call took place.
    #: in the first pass, which sites every site waits for.
    before: dict[Site, frozenset[Site]] = field(default_factory=dict)
    told: bool = False  #: whether Python has learnt something of a normalised tensor.
    batches: int = 0
    rows: int = 0  #: how many rows of data they held, where that is known.

    def __add__(self, other: Seen) -> Seen:
        """What both have shown, this one first."""
        told, batches = self.told or other.told, self.batches + other.batches
        both = Seen({**self.moments}, self.times + other.times, {**self.before}, told, batches, self.rows + other.rows)
        both.waits_for(other.before)
        for site, more in other.moments.items():
            both.moments[site] = _pooled(both.moments.get(site), more)
        return both

    def waits_for(self, sources: Mapping[Site, frozenset[Site]]) -> None:
        """Notes that the sites wait for these too."""
        for site, more in sources.items():
            self.before[site] = self.before.get(site, frozenset()) | more


#: Makes a pass over all the data: what every part of it shows, in their order.
Spread = Callable[[Pass], Iterable[Seen]]


def sequential(spread: Spread) -> Found:
    """Measures every BatchNorm behind measured ones; raises what ``calibrate`` does, as all of these do."""
    seen = first = _whole(spread(Pass("first")))
    plan = schedule(first.before)
    stops = not first.told and set(first.times.values()) <= {first.batches}
    total: dict[str, Moments] = {}
    for turn, wave in enumerate(plan.waves):
        if turn:
            done, of = turn * first.batches, len(plan.waves) * first.batches + 1
            seen = _whole(spread(Pass("later", dict(total), frozenset(wave), stops, done, of)))
            _check_calls(first, seen, wave if stops else {*first.times, *seen.times})
        for site in wave:
            total[site.module] = _pooled(total.get(site.module), seen.moments[site])
        for name in {site.module for site in wave}:
            _check_count(name, total[name])
    return plan, total, first


def one_pass(spread: Spread) -> Found:
    """Measures every BatchNorm behind the batch's own statistics."""
    seen = _whole(spread(Pass("one-pass")))
    found = {site.module: moments for site, moments in seen.moments.items()}
    for name, moments in found.items():
        _check_count(name, moments)
    return Schedule((tuple(seen.times),) if seen.times else (), ()), found, seen


def _whole(parts: Iterable[Seen]) -> Seen:
    seen = reduce(add, parts, Seen())
    if not seen.batches:
        raise InputError("there are no batches", hint="Calibration needs data")
    return seen


def _check_calls(first: Seen, seen: Seen, sites: Iterable[Site]) -> None:
    for site in sites:
        if seen.times[site] != first.times[site]:
            raise InputError(
                f"layer '{site.module}' is not called alike in every pass over the data "
                f"(call {site.call + 1} in {first.times[site]} batches, then in {seen.times[site]})",
                hint="Its calls depend on the statistics themselves, or the batches differ from pass to pass: "
                "the one-pass scheme (scheme='one-pass', --scheme one-pass) reads them once",
            )


# -- one pass over one part --------------------------------------------------------------------------------------------


def observe(model: nn.Module, targets: Targets, read: Read, turn: Pass, progress: Progress) -> Seen:
    """Runs the model on every batch, with the statistics that are known, and measures what is wanted."""
    for name, moments in turn.known.items():
        for norm in targets[name]:
            write(norm, moments)
    pairs = [(name, norm) for name, norms in targets.items() for norm in norms]
    seen, calls, left, waves = Seen(), Counter[str](), set[Site](), 0

    def measure(site: Site, norm: nn.Module, x: Tensor) -> None:
        moments = _moments(site.module, norm, x)
        if turn.kind == "one-pass" and moments.count:
            _check_count(site.module, moments)
            write(norm, moments)  # eval mode with these statistics is what training mode computes
        seen.moments[site] = _pooled(seen.moments.get(site), moments)

    def entering(name: str, norm: nn.Module, x: Tensor) -> None:
        site = Site(name, calls[name])
        calls[name] += 1
        seen.times[site] += 1
        if turn.kind == "one-pass":
            measure(Site(name, 0), norm, x)
        elif site in turn.wanted:
            measure(site, norm, x)
            left.discard(site)
            if turn.stops and not left:
                raise _Enough

    with torch.no_grad(), nullcontext() if turn.kind == "first" else watching_inputs(pairs, entering):
        for batch in read():
            calls.clear()
            left |= turn.wanted
            if turn.kind == "first":
                found = trace(partial(call, model, batch), pairs, measure)
                seen.waits_for(found.before)
                seen.times.update(found.before.keys())
                seen.told = seen.told or bool(found.told)
            else:
                with suppress(_Enough):
                    call(model, batch)
            seen.batches += 1
            waves = waves or len(schedule(seen.before).waves) or 1
            total = turn.total or waves * seen.batches + 1
            progress("calibrate", min(turn.done + seen.batches, total - 1), total)
    return seen


def _pooled(known: Moments | None, more: Moments) -> Moments:
    return more if known is None else known + more


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
    """Gives a BatchNorm new running statistics, in place; InputError where the dtype of its own cannot hold them."""
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
