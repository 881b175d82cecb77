"""The inputs that the gate runs: several batch sizes, scales and kinds, every dynamic dimension at more than one size.

A file may be wrong only for batches above eight, for images in [0, 1] or in [0, 255], where an input holds an exact
zero, or where all are small. So beside numbers like the example's there are inputs that provoke: ``KINDS``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.export import ExportedProgram

from bnfold.gate.draw import draw, index_limits, is_mask
from bnfold.gate.stored import Rows
from bnfold.graph.dimensions import Sizes

BATCHES = (1, 2, 7)
#: A verdict rests on at least this many samples, whatever is asked for.
MIN_SAMPLES = 10
#: Batches of inputs that provoke: the kind of every sample, over again. Alone, because what a file decides on may be
#: the least or the largest value of a whole batch; the last one is as large as batches get in use.
PROVOKING: tuple[tuple[int, tuple[str, ...]], ...] = (
    (1, ("binary",)), (1, ("bytes",)), (1, ("faint",)), (3, ("unit", "sparse", "outlier")),
    (33, ("ordinary", "binary", "unit", "channel", "sparse", "outlier")),
)  # fmt: skip
#: The same for a model whose every sample is dear: four, of which the outlier is the ordinary one but for one element.
DEAR: tuple[tuple[int, tuple[str, ...]], ...] = ((1, ("faint",)), (3, ("outlier", "binary", "bytes")))
#: Sizes of the other dynamic dimensions, as factors on the example's; two dimensions get different ones at a time, or
#: swapping height and width would go unseen. A declared range adds its ends, up to FAR times the example.
FACTORS, FAR = (2.0, 0.5, 1.5), 8


@dataclass(frozen=True, eq=False)
class Batch:
    """Flat inputs for one run. ``size`` is the batch size, 0 where the model has no dynamic batch.

    ``origin`` says where inputs come from that are neither random nor the user's.
    """

    flat: tuple[Any, ...]
    size: int
    sizes: str
    origin: str = ""

    @property
    def samples(self) -> int:
        """How many samples it holds: one where there is no batch axis."""
        return self.size or 1

    @property
    def words(self) -> str:
        """Its sizes, for a message."""
        size = f"batch {self.size}" if self.size else "the fixed batch"
        return ", ".join(filter(None, (size, self.sizes, self.origin)))

    def leads(self, output: Tensor) -> bool:
        """Whether axis 0 of an output is the batch."""
        return self.size > 0 and output.ndim > 0 and output.shape[0] == self.size


def batches(
    program: ExportedProgram, names: Sequence[str], example: Sequence[Any], *, samples: int = 16, seed: int = 0,
    data: Mapping[str, Rows] | None = None, sizes: Sizes | None = None, pinned: Mapping[str, int] | None = None,
    runs: int = 1, affordable: int = 0, dear: bool = False,
) -> list[Batch]:  # fmt: skip
    """Batches of inputs for the program's user inputs ``names``, at least ``samples`` samples in all.

    Args:
        program: a captured program; its placeholders say which sizes are symbolic.
        names, example: of flat inputs. Generated floats share the example's mean, spread and sign, integers lie between
            its extremes or are any rows of the tables that they index, masks keep its pattern (``draw``).
        data: real samples, by input name, in place of random ones: in order and over again, cropped or repeated along
            dynamic axes.
        sizes, pinned: those that the program takes; the only one to use, by symbol.
        runs: how many batches to make at least.
        affordable: how many samples are made in any case where they can be one batch.
        dear: few samples, because each takes long.
    """
    inputs = {n.name: n.meta["val"] for n in program.graph.nodes if n.op == "placeholder" and n.name in set(names)}
    inputs = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    limits = {n.name: index_limits(n) for n in program.graph.nodes
              if n.name in inputs and not inputs[n.name].is_floating_point()}  # fmt: skip
    first = next((s for value in inputs.values() for s in value.shape[:1] if isinstance(s, torch.SymInt)), None)
    batch = str(first.node.expr) if first is not None and first.node.expr.is_symbol else None
    symbols, known = _symbols(value.shape for value in inputs.values()), sizes or Sizes()
    leads = {symbol: known.alike.get(symbol, symbol) for symbol in symbols}
    others = list(_other_sizes({s: n for s, n in symbols.items() if leads[s] == s}, batch, known))
    only = {leads[symbol]: size for symbol, size in (pinned or {}).items() if symbol in leads}
    if pinned:
        others = [dict(each) for each in dict.fromkeys(tuple({**each, **only}.items()) for each in others)]
    pinned_batch = only.get(batch or "")
    samples = max(samples, MIN_SAMPLES, affordable if batch is not None and pinned_batch is None else 0)
    plan = _plan(samples, known.ranges.get(batch or ""), pinned_batch, known=batch is not None, dear=dear)
    # Many samples at once have the example's sizes, so that none are many of the largest.
    small = sum(count <= MIN_SAMPLES for count, _ in plan)
    plan += [(plan[0][0], ("ordinary",))] * max(len(others) - small, runs - len(plan))
    sizes_in_turn, generator = itertools.cycle(others), torch.Generator().manual_seed(seed)
    made: list[Batch] = []
    offset = 0
    for i, (count, kinds) in enumerate(plan):
        provoking = kinds != ("ordinary",)
        taken = next(sizes_in_turn) if count <= MIN_SAMPLES else others[0]
        chosen = {**taken, **({batch: count} if batch is not None else {})}
        now = {symbol: chosen[lead] for symbol, lead in leads.items() if lead in chosen}
        flat: list[Any] = []
        for name, leaf in zip(names, example):
            if name not in inputs or not isinstance(leaf, Tensor):
                flat.append(leaf)
                continue
            shape = [_size(size, now) for size in inputs[name].shape]
            if data is not None and name in data and not (provoking and leaf.is_floating_point()):
                flat.append(_resized(_rows(data[name], leaf, offset, count, batch is not None), shape))
                continue
            batched = batch is not None and bool(shape) and shape[0] == count
            legal = [(_size(rows, now), shift) for rows, shift in limits.get(name, ())]
            drawn = draw(shape, leaf, generator, (0 if data is None else offset) if batched else None, i, legal)
            flat.append(provoke(drawn, leaf, kinds, generator, batched=batched) if provoking else drawn)
        offset += 0 if provoking else count
        words = ", ".join(f"{symbol}={size}" for symbol, size in chosen.items() if symbol != batch)
        origin = f"{kinds[0] if len(kinds) == 1 else 'mixed'} inputs" if provoking else ""
        made.append(Batch(tuple(flat), count if batch is not None else 0, words, origin))
    return made


def _symbols(shapes: Iterable[Sequence[Any]]) -> dict[str, int]:
    """Every symbol in the shapes with its size in the example; ``8*h`` in a shape makes ``h`` one of them."""
    import sympy  # takes long, and no file has symbols of its

    found: dict[str, int] = {}
    sizes = [size for shape in shapes for size in shape if isinstance(size, torch.SymInt)]
    for size in sorted(sizes, key=lambda size: not size.node.expr.is_symbol):
        symbols = size.node.expr.free_symbols
        if len(symbols) == 1 and size.node.has_hint():
            (symbol,) = symbols
            solved = sympy.solve(size.node.expr - int(size.node.hint), symbol)
            if len(solved) == 1 and solved[0].is_Integer:
                found.setdefault(str(symbol), int(solved[0]))
    return found


def _plan(
    samples: int, limits: tuple[int, int | None] | None, pinned: int | None, *, known: bool, dear: bool
) -> list[tuple[int, tuple[str, ...]]]:
    """How many samples every batch holds, and of which kinds."""
    plain = ("ordinary",)
    if pinned is not None or not known:
        size, kinds = pinned or 1, tuple(kind for kind in _KINDS if kind != "ordinary")
        first = [(size, plain)] * (2 if dear else -(-samples // size))
        more = [kinds[i : i + size] for i in range(0, len(kinds), size)]
        return [*first, *((size, each) for each in (more[:3] if dear else more))]
    # torch.export writes "from 2" where it could not tell 1 apart; 1 is what people deploy, so it is always tried.
    high = limits[1] if limits and limits[1] is not None else None
    low = limits[0] if limits and limits[0] > 2 else 1

    def kept(plan: Sequence[tuple[int, tuple[str, ...]]]) -> list[tuple[int, tuple[str, ...]]]:
        return [(min(max(n, low), high or n), kinds) for n, kinds in plan]

    if dear:
        return kept(DEAR)
    fixed = list(dict.fromkeys(max(n, low) for n in BATCHES if high is None or n <= high)) or [high or 1]
    rest = max(samples - sum(fixed), 0)
    step = max(min(rest, high or rest), low)
    counts = [*fixed, *([step] * (rest // step)), *([max(rest % step, low)] if rest % step else [])]
    top = [high] if high is not None and high not in counts and high <= 64 else []
    return [*((n, plain) for n in (*counts, *top)), *kept(PROVOKING)]


def provoke(values: Tensor, leaf: Tensor, kinds: Sequence[str], generator: torch.Generator, *, batched: bool) -> Tensor:
    """``values``, drawn like the example ``leaf``, as inputs that provoke; ``kinds`` go over the samples."""
    if not values.is_floating_point() or is_mask(leaf) or not values.numel():
        return values
    if not batched:
        return _KINDS[kinds[0]](values, generator)
    parts = [values[i : i + 1] for i in range(len(values))]
    return torch.cat([_KINDS[kinds[i % len(kinds)]](part, generator) for i, part in enumerate(parts)])


def _random(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(like.shape, generator=generator, dtype=torch.float64)


def _is_image(values: Tensor) -> bool:
    return values.ndim in (4, 5) and (values.shape[1] in (1, 3, 4) or values.shape[-1] in (1, 3, 4))


def _one_each(values: Tensor) -> Tensor:
    """The first value of every channel."""
    return values[tuple(slice(None) if axis < 2 else slice(0, 1) for axis in range(values.ndim))]


def _bytes(values: Tensor, generator: torch.Generator) -> Tensor:
    """Whole numbers up to 255, the same all over a channel; of what is no image, up to 1."""
    channel = _one_each(values)
    top = 255.0 if _is_image(values) else 1.0
    numbers = (_random(channel, generator) * top).round() if top > 1 else _random(channel, generator)
    numbers = torch.where(torch.arange(numbers.numel()).reshape(numbers.shape) == 0, top, numbers)
    return numbers.to(values.dtype).expand(values.shape).contiguous()


def _outlier(values: Tensor, generator: torch.Generator) -> Tensor:
    far = values.flatten().clone()
    far[torch.randint(far.numel(), (1,), generator=generator)] *= 30.0
    return far.reshape(values.shape)


def _sparse(values: Tensor, generator: torch.Generator) -> Tensor:
    return torch.where(_random(values, generator) < 0.5, 0.0, values.abs()).to(values.dtype)


#: What kinds of inputs there are, from ordinary ones of one sample.
_KINDS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "ordinary": lambda values, generator: values,
    "binary": lambda values, generator: (_random(values, generator) > 0.5).to(values.dtype),
    "unit": lambda values, generator: _random(values, generator).to(values.dtype),
    "channel": lambda values, generator: _one_each(values).expand(values.shape).contiguous(),
    "bytes": _bytes,
    "sparse": _sparse,
    "faint": lambda values, generator: (_sparse(values, generator) * 0.05).clamp(max=0.25),
    "outlier": _outlier,
}  # fmt: skip


def _other_sizes(symbols: Mapping[str, int], batch: str | None, known: Sizes) -> Iterator[dict[str, int]]:
    """Sizes of everything but the batch: the example's, and others that the program takes."""
    others = {symbol: n for symbol, n in symbols.items() if symbol != batch}
    yield dict(others)
    beside = {symbol: n for symbol, n in symbols.items() if symbol == batch}

    def taken(wanted: Iterable[float]) -> Iterator[dict[str, int]]:
        found: dict[str, int] = {}
        for symbol, size in zip(others, wanted):
            low, high = known.ranges.get(symbol, (1, None))
            near = known.near(symbol, max(int(size), low) if high is None else min(max(int(size), low), high))
            found[symbol] = others[symbol] if near is None else near
        if found and known.takes({**beside, **found}):
            yield found

    # No multiple of anything, with other remainders: padding to a multiple, strides and unrolled loops show there.
    yield from taken(n + 1 + 2 * (i % 2) for i, n in enumerate(others.values()))
    yield from taken(_prime(n + 3 + 10 * (i % 2)) for i, n in enumerate(others.values()))
    for turn in range(len(FACTORS)):
        factors = (FACTORS[turn], FACTORS[turn - 1]) if turn else (FACTORS[0], FACTORS[0])
        yield from taken(n * factors[i % 2] for i, n in enumerate(others.values()))
    declared = [symbol for symbol in others if known.ranges.get(symbol, (1, None))[1] is not None]
    for end in (0, FAR) if declared else ():
        yield from taken(n * end if symbol in declared else n for symbol, n in others.items())


def _prime(least: int) -> int:
    """The first prime from there on."""
    return next(n for n in itertools.count(max(least, 2)) if all(n % d for d in range(2, math.isqrt(n) + 1)))


def _size(size: Any, sizes: Mapping[str, int]) -> int:
    if isinstance(size, int):
        return size
    import sympy

    found = sympy.sympify(size.node.expr)
    return int(found.subs({symbol: sizes[str(symbol)] for symbol in found.free_symbols if str(symbol) in sizes}))


def _rows(rows: Rows, leaf: Tensor, offset: int, count: int, batched: bool) -> Tensor:
    if not batched:  # a fixed batch takes as many rows at a time as it has
        count = leaf.shape[0] if rows.ndim == leaf.ndim else 1
        offset *= count
    picked = rows[np.arange(offset, offset + count) % len(rows)]
    picked = picked if picked.ndim == leaf.ndim else picked[0]
    return torch.from_numpy(np.ascontiguousarray(picked)).to(leaf.dtype)


def _resized(rows: Tensor, shape: Sequence[int]) -> Tensor:
    """``rows`` cropped or repeated to ``shape`` along every axis but the first."""
    for axis, size in enumerate(shape[1:], 1):
        if rows.ndim == len(shape) and rows.shape[axis] != size:
            rows = rows.index_select(axis, torch.arange(size) % rows.shape[axis])
    return rows
