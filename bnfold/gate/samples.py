"""The inputs that the gate runs: several batch sizes, several scales, every dynamic dimension at more than one size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import sympy
import torch
from torch import Tensor
from torch.export import ExportedProgram

from bnfold.gate.draw import draw, index_limits
from bnfold.gate.stored import Rows
from bnfold.graph.dimensions import Sizes

BATCHES = (1, 2, 7)
#: A verdict rests on at least this many samples, whatever is asked for.
MIN_SAMPLES = 10
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
    counts = _counts(max(samples, MIN_SAMPLES), known.ranges.get(str(batch_symbol)), known=batch_symbol is not None)
    leads = {symbol: known.alike.get(str(symbol), str(symbol)) for symbol in symbols}
    others = list(_other_sizes({s: n for s, n in symbols.items() if leads[s] == str(s)}, batch_symbol, known))
    if pinned:
        leaders = {str(symbol): symbol for symbol in symbols}
        only = {leaders[leads[symbol]]: pinned[str(symbol)] for symbol in symbols if str(symbol) in pinned}
        others = [dict(each) for each in dict.fromkeys(tuple({**each, **only}.items()) for each in others)]
        if batch_symbol in only:
            counts = [only[batch_symbol]] * -(-max(samples, MIN_SAMPLES) // only[batch_symbol])
    counts += [counts[0]] * (max(len(others), runs) - len(counts))
    for i, count in enumerate(counts):
        chosen = {**others[i % len(others)], **({batch_symbol: count} if batch_symbol is not None else {})}
        by_name = {str(symbol): size for symbol, size in chosen.items()}
        now = {symbol: by_name[lead] for symbol, lead in leads.items() if lead in by_name}
        scale_at = 0 if data is None else offset
        flat = []
        for name, leaf in zip(names, example):
            if name not in shapes or not isinstance(leaf, Tensor):
                flat.append(leaf)
            elif data is not None and name in data:
                rows = _rows(data[name], leaf, offset, count, batch_symbol is not None)
                flat.append(_resized(rows, [_size(s, now) for s in shapes[name]]))
            else:
                shape = [_size(s, now) for s in shapes[name]]
                batched = batch_symbol is not None and bool(shape) and shape[0] == count
                legal = [(_size(rows, now), shift) for rows, shift in limits.get(name, ())]
                flat.append(draw(shape, leaf, generator, scale_at if batched else None, i, legal))
        offset += count
        words = ", ".join(f"{symbol}={size}" for symbol, size in chosen.items() if symbol != batch_symbol)
        made.append(Batch(tuple(flat), count if batch_symbol is not None else 0, words))
    return made


def _is_tensor(node: torch.fx.Node) -> bool:
    return node.op == "placeholder" and isinstance(node.meta.get("val"), Tensor)


def _symbols(shapes: Mapping[str, Sequence[Any]]) -> dict[Any, int]:
    """Every symbol in the shapes with its size in the example; ``8*h`` in a shape makes ``h`` one of them."""
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


def _counts(samples: int, limits: tuple[int, int | None] | None, *, known: bool) -> list[int]:
    if not known:
        return [1] * samples
    # torch.export writes "from 2" where it could not tell 1 apart; 1 is what people deploy, so it is always tried.
    high = limits[1] if limits and limits[1] is not None else None
    low = limits[0] if limits and limits[0] > 2 else 1
    fixed = list(dict.fromkeys(max(n, low) for n in BATCHES if high is None or n <= high)) or [high or 1]
    rest = max(samples - sum(fixed), 0)
    step = max(min(rest, high or rest), low)
    counts = [*fixed, *([step] * (rest // step)), *([max(rest % step, low)] if rest % step else [])]
    return counts if high is None or high in counts or high > 64 else [*counts, high]


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

    for turn in range(len(FACTORS)):
        factors = (FACTORS[turn], FACTORS[turn - 1]) if turn else (FACTORS[0], FACTORS[0])
        yield from taken({symbol: n * factors[i % 2] for i, (symbol, n) in enumerate(others.items())})
    declared = [symbol for symbol in others if known.ranges.get(str(symbol), (1, None))[1] is not None]
    for end in (0, FAR) if declared else ():
        yield from taken({**others, **{symbol: others[symbol] * end for symbol in declared}})


def _size(size: Any, sizes: Mapping[Any, int]) -> int:
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
