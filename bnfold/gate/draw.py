"""Random values for one input: like the example, and legal where the graph says what is.

Integers that index a table (an embedding, ``index_select``, ``gather``, ...) are drawn over all of its rows, masks keep
the example's pattern and lose the ends of some rows, floats share the example's mean, spread and sign.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

#: Factors on the example's own scale, in turn: most samples look like the example, some are small, some large.
SCALES = (1.0, 1.0, 0.25, 4.0)
#: Beyond this a float stands for minus infinity in a mask.
MASKED = -1e4
#: A constant integer input whose meaning the graph does not tell is varied on one run in so many, from the second on:
#: where the model does not take other values, the other runs still make a verdict.
GUESSED = 4

_SAME_VALUES = {
    "view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "expand", "repeat", "permute", "transpose", "t",
    "slice", "select", "narrow", "flip", "roll", "clone", "contiguous", "detach", "alias", "to", "_to_copy",
}  # fmt: skip
#: Where an operator takes an index: the argument it is, and the argument of the table and of the axis that it indexes
#: (an embedding's rows are axis 0).
_TABLES = {
    "embedding": (1, 0, None), "_embedding_bag": (1, 0, None), "embedding_bag": (1, 0, None),
    "index_select": (2, 0, 1), "gather": (2, 0, 1), "take_along_dim": (1, 0, 2),
}  # fmt: skip

Evaluate = Callable[[Any], int]


def index_limits(placeholder: fx.Node) -> list[tuple[Any, int]]:
    """What the graph lets the values of an integer input be: ``(rows, offset)`` for every table that it indexes.

    Legal values are ``-offset`` to ``rows - offset - 1``; ``rows`` may be a symbolic size. Values are followed through
    whatever only moves them, and through sums with constants (position embeddings often start at 2).
    """
    found: list[tuple[Any, int]] = []
    seen = {placeholder}
    todo = [(placeholder, 0)]
    while todo:
        node, offset = todo.pop()
        for user in node.users:
            name = getattr(user.target, "_opname", "")
            found += [(rows, offset) for rows in _tables(name, user, node)]
            if user in seen:
                continue
            moved = offset if name in _SAME_VALUES and user.args[:1] == (node,) else _shifted(name, user, node, offset)
            if moved is not None:
                seen.add(user)
                todo.append((user, moved))
    return found


def draw(
    shape: Sequence[int], leaf: Tensor, generator: torch.Generator, scale_at: int | None, run: int,
    limits: Sequence[tuple[int, int]] = (),
) -> Tensor:  # fmt: skip
    """Random values of ``shape`` in the dtype of the example ``leaf``.

    Args:
        scale_at: which of ``SCALES`` the first sample takes; None where axis 0 is no batch.
        run: which run it is for; the first one stays closest to the example.
        limits: ``index_limits``, at this run's sizes.
    """
    if leaf.is_complex():
        parts = [draw((*shape, 1), part[..., None], generator, scale_at, run) for part in (leaf.real, leaf.imag)]
        return torch.view_as_complex(torch.cat(parts, -1).contiguous()).to(leaf.dtype)
    if is_mask(leaf) and not limits:
        return _mask(shape, leaf, generator, run)
    if leaf.dtype.is_floating_point:
        return _floats(shape, leaf, generator, scale_at, run)
    low, high = _integer_range(leaf, run, limits)
    return torch.randint(low, high + 1, tuple(shape), generator=generator).to(leaf.dtype)


def is_mask(leaf: Tensor) -> bool:
    """Whether the example says who may attend to whom: all true, all one, 0 and -inf, a causal triangle, ...

    Two values at most, in runs along the last axis: a boolean or 0 and 1 as integers, or floats of which the lower one
    stands for minus infinity.
    """
    if not leaf.numel() or leaf.is_complex() or leaf.dtype == torch.uint8:
        return False
    if leaf.dtype.is_floating_point:
        return float(leaf.amin()) <= MASKED and len(set(leaf.flatten().tolist())) <= 2
    if leaf.ndim < 2 or (leaf.dtype != torch.bool and not bool(((leaf == 0) | (leaf == 1)).all())):
        return False
    return bool(((leaf[..., 1:] != leaf[..., :-1]).sum(-1) <= 1).all())


def _tables(name: str, user: fx.Node, node: fx.Node) -> Iterator[Any]:
    """The sizes of the axes that ``node`` indexes in ``user``."""
    if name in _TABLES:
        at, table, axis = _TABLES[name]
        if len(user.args) > at and user.args[at] is node:
            dim = 0 if axis is None else user.args[axis] if len(user.args) > axis else None
            shape = _shape(user.args[table])
            if isinstance(dim, int) and shape:
                yield shape[dim]
    elif name == "index" and len(user.args) > 1 and isinstance(user.args[1], (list, tuple)):
        shape = _shape(user.args[0])
        # A boolean index takes as many axes as it has: then positions say nothing.
        plain = all(index is None or _is_integer(index) for index in user.args[1])
        yield from (shape[i] for i, index in enumerate(user.args[1]) if plain and index is node and i < len(shape))
    elif name == "one_hot" and len(user.args) > 1 and user.args[0] is node and isinstance(user.args[1], int):
        yield user.args[1]


def _shifted(name: str, user: fx.Node, node: fx.Node, offset: int) -> int | None:
    """The offset behind ``node + constant`` or ``node - constant``; None for all else."""
    if name in ("add", "sub") and user.args[:1] == (node,) and len(user.args) == 2 and isinstance(user.args[1], int):
        return offset + (user.args[1] if name == "add" else -user.args[1])
    return None


def _shape(value: Any) -> Sequence[Any]:
    known = value.meta.get("val") if isinstance(value, fx.Node) else None
    return known.shape if isinstance(known, Tensor) else ()


def _is_integer(value: Any) -> bool:
    known = value.meta.get("val") if isinstance(value, fx.Node) else None
    return isinstance(known, Tensor) and not known.is_floating_point() and known.dtype != torch.bool


def _integer_range(leaf: Tensor, run: int, limits: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The lowest and the highest value to draw."""
    low, high = (int(leaf.min()), int(leaf.max())) if leaf.numel() else (0, 1)
    if limits:
        # An index below zero is legal where an offset follows; nobody gives one who does not in the example.
        first = max(*(-offset for _, offset in limits), min(low, 0))
        last = max(min(rows - offset - 1 for rows, offset in limits), first)
        if run or low == high:
            return first, last
        return max(low, first), max(min(high, last), first)  # the first run: what the example's values mean is known
    if low < high or leaf.dtype == torch.bool:
        return (low, high) if low < high else (0, 1)
    if leaf.dtype == torch.uint8 and leaf.ndim > 2:  # an image
        return 0, 255
    if run % GUESSED != 1:
        return low, high
    # A length, a time step, a flag: up to what it is in the example.
    return (0, 1) if low in (0, 1) else (1, low) if low > 0 else (low, -1)


def _mask(shape: Sequence[int], leaf: Tensor, generator: torch.Generator, run: int) -> Tensor:
    """The example's pattern at another size, and from the second run on without the end of every other row.

    What may be attended to is 1, 0.0, or of booleans what the first position has; a row keeps some of it, or its
    softmax would be of nothing.
    """
    value = leaf
    for axis, size in enumerate(shape):
        if value.shape[axis] != size:
            value = value.index_select(axis, torch.arange(size) * value.shape[axis] // max(size, 1))
    value = value.clone()
    if leaf.dtype.is_floating_point:
        seen, hidden = leaf.amax(), leaf.amin()
    else:
        seen = leaf.flatten()[0] if leaf.dtype == torch.bool or not bool(leaf.any()) else torch.ones_like(leaf).amax()
        hidden = ~seen if leaf.dtype == torch.bool else 1 - seen
    guessed = not leaf.dtype.is_floating_point and leaf.dtype != torch.bool and not bool(leaf.any())
    if not run or not value.numel() or (guessed and run % GUESSED != 1):
        return value
    rows = value.shape[0] if value.ndim > 1 else 1
    length = value.shape[-1]
    ends = torch.randint(1, length + 1, (rows,), generator=generator)
    ends = torch.where(torch.rand(rows, generator=generator) < 0.5, ends, length)
    ends[0] = max(length // 2, 1) if run == 1 else ends[0]  # one row at least, in every series of runs
    cut = torch.arange(length) >= ends.reshape(-1, *(1,) * (value.ndim - 1))
    hidden_now = value.masked_fill(cut.expand_as(value), hidden)
    left = (hidden_now == seen).any(-1, keepdim=True) | ~(value == seen).any(-1, keepdim=True)
    return torch.where(left, hidden_now, value)


def _floats(shape: Sequence[int], leaf: Tensor, generator: torch.Generator, scale_at: int | None, run: int) -> Tensor:
    known = leaf.double()
    known = known[known.isfinite()]
    spread = float(known.std()) if known.numel() > 1 else 0.0
    factors = torch.tensor([SCALES[run % len(SCALES)]], dtype=torch.float64)
    if scale_at is not None:
        factors = torch.tensor([SCALES[(scale_at + i) % len(SCALES)] for i in range(shape[0])], dtype=torch.float64)
    if shape:
        factors = factors.reshape(-1, *(1,) * (len(shape) - 1))
    value = torch.randn(tuple(shape), generator=generator, dtype=torch.float64)
    if spread == 0 and known.numel() and float(known[0]) != 0:
        # All of one value: a temperature, a length scale, ones for an image. Its sign may matter, its size does not.
        value = float(known[0]) * torch.exp(value / 2) * factors
    else:
        value = value * (spread or 1.0) * factors + (float(known.mean()) if spread > 0 else 0.0)
        if spread > 0 and bool((known >= 0).all()):
            # Whatever takes only non-negative values (images in 0..1, probabilities) gets such, and no zero either
            # where the example has none.
            value = value.abs().clamp(min=float(known.min()) / 4)
    return value.reshape(tuple(shape)).to(leaf.dtype)
