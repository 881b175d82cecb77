"""The constants of a file that bnfold wrote: each is known, whether or not an edit of it shows at any output."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor
from torch.export import ExportedProgram

from bnfold.evaluate.evaluator import EPSILONS
from bnfold.evaluate.weights import Weight
from bnfold.gate.values import to_numpy


def damaged(program: ExportedProgram, weights: Mapping[str, Weight], limit: float) -> list[str]:
    """Which constants of a file are not those that the program it was written from has by these names, in words.

    Args:
        limit: with 0 they have to be the same bit for bit. Else the file may be that of a model that is stored
            otherwise, folded by hand as it may be: where an element is off, but by no more than so many roundings of
            the largest of its row, nothing is said. Nor is it of a constant of which less than half is the same.
    """
    said = []
    for name, meant in {**program.state_dict, **program.constants}.items():
        weight, right = weights.get(name), to_numpy(meant) if isinstance(meant, Tensor) else None
        if weight is None or right is None or (weight.dtype, weight.shape) != (right.dtype.name, right.shape):
            continue
        given = weight.array()
        wrong = ~((given == right) | ((given != given) & (right != right)))
        if not (count := np.count_nonzero(wrong)):
            continue
        most = np.abs(right.astype(np.float64)).max(tuple(range(1, right.ndim)), keepdims=True)
        off = np.abs(given.astype(np.float64) - right.astype(np.float64))
        if limit and (wrong & (off <= limit * EPSILONS.get(weight.dtype, 0.0) / 2 * most)).any():
            return []
        if not limit or 2 * count <= wrong.size:
            at = tuple(int(i) for i in np.unravel_index(int(wrong.argmax()), wrong.shape))
            said.append(
                f"constant '{name}': {count} of {wrong.size} elements are not what the fold makes of the model, the "
                f"first at {list(at)}: {given[at]:.9g} instead of {right[at]:.9g}"
            )
    return said
