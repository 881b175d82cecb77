"""How many elements a node's operands ask for: a file can ask for any number of them, in a few bytes."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

#: Operators whose operands broadcast to the shape of the result.
_OF_ALIKE = (
    "Add Sub Mul Div Pow Mod And Or Xor BitShift BitwiseAnd BitwiseOr BitwiseXor Equal Greater GreaterOrEqual Less "
    "LessOrEqual Max Min Mean Sum Where PRelu MatMul"
)
_BROADCASTS = frozenset(_OF_ALIKE.split())
#: What a single result may take: a quarter of this machine's memory, in float64.
MAX_ELEMENTS = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 32


def asked(operator: str, given: Sequence[Any]) -> float:
    """The elements of the first result, where operands say how many; of others at least as many as broadcasting makes.

    Args:
        operator: a standard operator's type.
        given: its operands, None where there is none.
    """
    arrays = [x for x in given if isinstance(x, np.ndarray)]
    if not arrays:
        return 0.0
    first, last = arrays[0], arrays[-1]
    if operator in ("ConstantOfShape", "RandomNormal", "RandomUniform"):
        return _product(first)
    if operator == "Expand":
        return _broadcast(first.shape, tuple(int(size) for size in np.abs(last).reshape(-1)))
    if operator == "Tile":
        return first.size * _product(last)
    if operator in ("Resize", "Upsample"):
        return max(_product(last), first.size * _product(last) if last.dtype.kind == "f" else 0.0)
    if operator == "Pad" and len(arrays) > 1 and arrays[1].size == 2 * first.ndim:
        return _product(np.array(first.shape) + np.maximum(arrays[1].reshape(2, -1), 0).sum(0))
    if operator == "Range" and len(arrays) == 3:
        start, stop, step = (float(x.reshape(-1)[0]) for x in arrays)
        return abs((stop - start) / step) if step else math.inf
    if operator == "OneHot":
        return first.size * _product(arrays[1])
    if operator == "CenterCropPad" or operator.endswith("Window"):
        return _product(last)
    if operator == "MatMul" and min(x.ndim for x in arrays) > 1:
        return float(first.size // max(first.shape[-1], 1) * last.shape[-1])
    if operator in ("Gather", "GatherND"):
        return 0.0 if operator != "Gather" else float(last.size) * first.size / max(max(first.shape, default=1), 1)
    if operator not in _BROADCASTS:
        return 0.0
    return _broadcast(*(x.shape for x in arrays))


def _broadcast(*shapes: tuple[int, ...]) -> float:
    """The elements of what shapes broadcast to; Python's own numbers, for a shape may ask for more than there are."""
    ranks = max(map(len, shapes))
    aligned = zip(*((1,) * (ranks - len(shape)) + shape for shape in shapes))
    sizes = [set(axis) - {1} for axis in aligned]
    # Those that do not broadcast make nothing, which is told where it is computed.
    return float(math.prod(max(axis, default=1) for axis in sizes)) if all(len(axis) < 2 for axis in sizes) else 0.0


def _product(sizes: Any) -> float:
    return float(np.prod(np.abs(np.asarray(sizes, np.float64))))
