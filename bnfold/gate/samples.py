"""The inputs that the gate runs: several batch sizes, scales and kinds, every dynamic dimension at more than one size.

A file may be wrong only for batches above eight, for images in [0, 1] or in [0, 255], where an input holds an exact
zero, or where all are small. So beside numbers like the example's there are inputs that provoke: ``KINDS``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
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


def batches(
    program: ExportedProgram,
    names: Sequence[str],
    example: Sequence[Any],
    *,
    samples: int = 16,
    seed: int = 0,
    data: Mapping[str, Rows] | None = None,
    sizes: Sizes | None = None,
    pinned: Mapping[str, int] | None = None,
    runs: int = 1,
    affordable: int = 0,
    dear: bool = False,
) -> list[Batch]:
    """Batches of inputs for the program's user inputs ``names``, at least ``samples`` samples in all.

    Args:
        program: a captured program; its placeholders say which sizes are symbolic.
        names: flat input names.
        example: flat example inputs; generated floats share their mean, spread and sign, integers lie between their
            extremes or are any rows of the tables that they index, masks keep their pattern (``draw``).
        samples: how many samples to make, at least ``MIN_SAMPLES``.
        seed: of the generator.
        data: real samples, by input name, in place of random ones: in order and over again, cropped or repeated along
            dynamic axes.
        sizes: those that the program takes.
        pinned: the only size to use, by symbol.
        runs: how many batches to make at least.
        affordable: how many samples are made in any case where they can be one batch.
        dear: few samples, because each takes long.
    """
    inputs = [n for n in program.graph.nodes if n.name in set(names) and _is_tensor(n)]
    shapes = {n.name: n.meta["val"].shape for n in inputs}
    limits = {n.name: index_limits(n) for n in inputs if not n.meta["val"].is_floating_point()}
    symbols = _symbols(shapes)
    batch = next((s for shape in shapes.values() for s in shape[:1] if isinstance(s, torch.SymInt)), None)
    batch_symbol = batch.node.expr if batch is not None and batch.node.expr.is_symbol else None
    generator = torch.Generator().manual_seed(seed)
    made: list[Batch] = []
    offset = 0
    known = sizes or Sizes()
    limit = known.ranges.get(str(batch_symbol))
    leads = {symbol: known.alike.get(str(symbol), str(symbol)) for symbol in symbols}
    others = list(_other_sizes({s: n for s, n in symbols.items() if leads[s] == str(s)}, batch_symbol, known))
    only: dict[Any, int] = {}
    if pinned:
        leaders = {str(symbol): symbol for symbol in symbols}
        only = {leaders[leads[symbol]]: pinned[str(symbol)] for symbol in symbols if str(symbol) in pinned}
        others = [dict(each) for each in dict.fromkeys(tuple({**each, **only}.items()) for each in others)]
    known_batch, pinned_batch = batch_symbol is not None, only.get(batch_symbol)
    samples = max(samples, MIN_SAMPLES, affordable if known_batch and pinned_batch is None else 0)
    plan = _plan(samples, limit, pinned_batch, known=known_batch, dear=dear)
    # Many samples at once have the example's sizes, so that none are many of the largest.
    small = sum(count <= MIN_SAMPLES for count, _ in plan)
    plan += [(plan[0][0], ("ordinary",))] * max(len(others) - small, runs - len(plan))
    sizes_in_turn = itertools.cycle(others)
    for i, (count, kinds) in enumerate(plan):
        provoking = kinds != ("ordinary",)
        taken = next(sizes_in_turn) if count <= MIN_SAMPLES else others[0]
        chosen = {**taken, **({batch_symbol: count} if batch_symbol is not None else {})}
        by_name = {str(symbol): size for symbol, size in chosen.items()}
        now = {symbol: by_name[lead] for symbol, lead in leads.items() if lead in by_name}
        scale_at = 0 if data is None else offset
        flat = []
        for name, leaf in zip(names, example):
            if name not in shapes or not isinstance(leaf, Tensor):
                flat.append(leaf)
            elif data is not None and name in data and not (provoking and leaf.is_floating_point()):
                rows = _rows(data[name], leaf, offset, count, batch_symbol is not None)
                flat.append(_resized(rows, [_size(s, now) for s in shapes[name]]))
            else:
                shape = [_size(s, now) for s in shapes[name]]
                batched = batch_symbol is not None and bool(shape) and shape[0] == count
                legal = [(_size(rows, now), shift) for rows, shift in limits.get(name, ())]
                made_now = draw(shape, leaf, generator, scale_at if batched else None, i, legal)
                flat.append(provoke(made_now, leaf, kinds, generator, batched=batched) if provoking else made_now)
        offset += 0 if provoking else count
        words = ", ".join(f"{symbol}={size}" for symbol, size in chosen.items() if symbol != batch_symbol)
        origin = f"{kinds[0]} inputs" if len(kinds) == 1 and provoking else "mixed inputs" if provoking else ""
        made.append(Batch(tuple(flat), count if batch_symbol is not None else 0, words, origin))
    return made


def _is_tensor(node: torch.fx.Node) -> bool:
    return node.op == "placeholder" and isinstance(node.meta.get("val"), Tensor)


def _symbols(shapes: Mapping[str, Sequence[Any]]) -> dict[Any, int]:
    """Every symbol in the shapes with its size in the example; ``8*h`` in a shape makes ``h`` one of them."""
    import sympy  # takes long, and no file has symbols of its

    found: dict[Any, int] = {}
    sizes = [size for shape in shapes.values() for size in shape if isinstance(size, torch.SymInt)]
    for size in sorted(sizes, key=lambda size: not size.node.expr.is_symbol):
        symbols = size.node.expr.free_symbols
        if len(symbols) == 1 and size.node.has_hint():
            (symbol,) = symbols
            solved = sympy.solve(size.node.expr - int(size.node.hint), symbol)
            if len(solved) == 1 and solved[0].is_Integer:
                found.setdefault(symbol, int(solved[0]))
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


def _bytes(values: Tensor, generator: torch.Generator) -> Tensor:
    """Whole numbers up to 255, the same all over a channel; of what is no image, up to 1."""
    channel = values[tuple(slice(None) if axis < 2 else slice(0, 1) for axis in range(values.ndim))]
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
    "channel": lambda values, generator: values[
        tuple(slice(None) if axis < 2 else slice(0, 1) for axis in range(values.ndim))
    ].expand(values.shape).contiguous(),
    "bytes": _bytes,
    "sparse": _sparse,
    "faint": lambda values, generator: (_sparse(values, generator) * 0.05).clamp(max=0.25),
    "outlier": _outlier,
}  # fmt: skip


def _other_sizes(symbols: Mapping[Any, int], batch: Any, known: Sizes) -> Iterator[dict[Any, int]]:
    """Sizes of everything but the batch: the example's, and others that the program takes."""
    others = {s: n for s, n in symbols.items() if s != batch}
    yield dict(others)
    beside = {str(batch): symbols[batch]} if batch in symbols else {}

    def taken(wanted: Mapping[Any, float]) -> Iterator[dict[Any, int]]:
        found: dict[Any, int] = {}
        for symbol, size in wanted.items():
            low, high = known.ranges.get(str(symbol), (1, None))
            near = known.near(str(symbol), max(int(size), low) if high is None else min(max(int(size), low), high))
            found[symbol] = others[symbol] if near is None else near
        if found and known.takes({**beside, **{str(symbol): size for symbol, size in found.items()}}):
            yield found

    # No multiple of anything, with other remainders: padding to a multiple, strides and unrolled loops show there.
    yield from taken({symbol: n + 1 + 2 * (i % 2) for i, (symbol, n) in enumerate(others.items())})
    yield from taken({symbol: _prime(n + 3 + 10 * (i % 2)) for i, (symbol, n) in enumerate(others.items())})
    for turn in range(len(FACTORS)):
        factors = (FACTORS[turn], FACTORS[turn - 1]) if turn else (FACTORS[0], FACTORS[0])
        yield from taken({symbol: n * factors[i % 2] for i, (symbol, n) in enumerate(others.items())})
    declared = [symbol for symbol in others if known.ranges.get(str(symbol), (1, None))[1] is not None]
    for end in (0, FAR) if declared else ():
        yield from taken({**others, **{symbol: others[symbol] * end for symbol in declared}})


def _prime(least: int) -> int:
    """The first prime from there on."""
    return next(n for n in itertools.count(max(least, 2)) if all(n % d for d in range(2, math.isqrt(n) + 1)))


def _size(size: Any, sizes: Mapping[Any, int]) -> int:
    import sympy

    return size if isinstance(size, int) else int(sympy.sympify(size.node.expr).subs(sizes))


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
