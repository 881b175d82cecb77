"""The operators of ONNX that decide on floats, on the rules that ATen's have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import torch

from bnfold.aten.deciding import Comparison, Deciding, Modulus, Rounding, Selection

if TYPE_CHECKING:
    from bnfold.evaluate.attributes import Attributes


def _arg(at: Attributes) -> Deciding:
    return Selection(at.axis or 0)


def _top(at: Attributes) -> Deciding:
    return Selection(-1 if at.axis is None else at.axis, item=1, ranked=at.sorted != 0)


def _pool(at: Attributes) -> Deciding | None:
    return None if at.outputs < 2 else Selection(None, item=1, flat=len(at.kernel_shape) + 2)


def _cast(at: Attributes) -> Deciding | None:
    if at.to == onnx.TensorProto.BOOL:
        return Comparison(zero=True)
    whole = onnx.helper.tensor_dtype_to_np_dtype(at.to).kind in "iu"
    return Rounding("trunc") if whole else None


_TABLE: dict[str, Callable[[Attributes], Deciding | None]] = {
    "ArgMax": _arg,
    "ArgMin": _arg,
    "TopK": _top,
    "MaxPool": _pool,
    **dict.fromkeys(("Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Equal"), lambda at: Comparison()),
    "Round": lambda at: Rounding("round"),
    "Floor": lambda at: Rounding("floor"),
    "Ceil": lambda at: Rounding("ceil"),
    "Sign": lambda at: Rounding("sign"),
    "Mod": lambda at: Modulus("trunc" if at.fmod else "floor"),
    "Cast": _cast,
}


def deciding(operator: str, at: Attributes, operands: Sequence[Any]) -> tuple[Deciding, dict[str, Any]] | None:
    """How an operator decides and on what, as the rules name it; None where it does not, or not on floats."""
    row = _TABLE.get(operator)
    arrays = [x for x in operands if isinstance(x, np.ndarray) and x.dtype == np.float64]
    rule = row(at) if row is not None and arrays else None
    if rule is None:
        return None
    given = ((n, x) for n, x in zip(("self", "other"), operands) if isinstance(x, np.ndarray))
    return rule, {n: torch.as_tensor(x if x.flags.writeable else x.copy()) for n, x in given}
