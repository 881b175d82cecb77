"""The operators of ONNX that decide on floats, on the rules that ATen's have."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import torch
from torch import Tensor

from bnfold.aten.deciding import Comparison, Deciding, Modulus, Rounding, Selection, rare
from bnfold.evaluate.quantised import ROWS as QUANTISED
from bnfold.evaluate.quantised import Levels

if TYPE_CHECKING:
    from bnfold.evaluate.attributes import Attributes


def _cast(at: Attributes) -> Deciding | None:
    if at.to == onnx.TensorProto.BOOL:
        return Comparison(zero=True)
    whole = onnx.helper.tensor_dtype_to_np_dtype(at.to).kind in "iu"
    return Rounding("trunc") if whole else None


@dataclass(frozen=True)
class Quantisation(Deciding):
    """Rounds a quotient by a scale, of its own along an axis perhaps, to a level of an integer type, or to its ends."""

    axis: int

    def _along(self, at: Mapping[str, Any], name: str) -> Tensor:
        value, ndim = torch.as_tensor(at[name]).double(), at["self"].ndim
        return value.reshape([-1 if i == self.axis % ndim else 1 for i in range(ndim)]) if value.ndim == 1 else value

    def compared(self, at: Mapping[str, Any]) -> Tensor:
        """The quotient, one step being 1."""
        value: Tensor = at["self"]
        return value.double() / self._along(at, "other")

    def gap(self, at: Mapping[str, Any], own: Tensor, chosen: Tensor) -> Tensor:
        """How far the quotient lies from those that the chosen level stands for."""
        value, ends = self.compared(at), torch.iinfo(own.dtype)
        level = chosen.double() - (self._along(at, "zero") if "zero" in at else 0.0)
        low = torch.where(chosen == ends.min, -torch.inf, level - 0.5)
        high = torch.where(chosen == ends.max, torch.inf, level + 0.5)
        gap = torch.maximum(low - value, value - high).clamp(min=0.0)
        wrong = self.differs(own, chosen)
        gap = torch.where(wrong, gap, 0.0).nan_to_num(nan=torch.inf, posinf=torch.inf)
        ties = (value - value.floor()) == 0.5
        return rare(gap, ties, wrong & (gap == 0))


def _quantised(at: Attributes) -> Deciding | None:
    plain = not at.block_size and at.output_dtype in (None, 0, onnx.TensorProto.UINT8, onnx.TensorProto.INT8)
    return Quantisation(1 if at.axis is None else at.axis) if plain else None


_TABLE: dict[str, Callable[[Attributes], Deciding | None]] = {
    **dict.fromkeys(("ArgMax", "ArgMin"), lambda at: Selection(at.axis or 0)),
    "TopK": lambda at: Selection(-1 if at.axis is None else at.axis, item=1, ranked=at.sorted != 0),
    "MaxPool": lambda at: None if at.outputs < 2 else Selection(None, item=1, flat=len(at.kernel_shape) + 2),
    **dict.fromkeys(("Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Equal"), lambda at: Comparison()),
    "Round": lambda at: Rounding("round"),
    "Floor": lambda at: Rounding("floor"),
    "Ceil": lambda at: Rounding("ceil"),
    "Sign": lambda at: Rounding("sign"),
    "Mod": lambda at: Modulus("trunc" if at.fmod else "floor"),
    "Cast": _cast,
    "QuantizeLinear": _quantised,
}


def deciding(operator: str, at: Attributes, operands: Sequence[Any]) -> tuple[Deciding, dict[str, Any]] | None:
    """How an operator decides and on what, as the rules name it; None where it does not, or not on floats."""
    if operator in QUANTISED:
        levels = QUANTISED[operator](at, *(None if x is None else torch.from_numpy(np.array(x)) for x in operands))
        if not isinstance(levels, Levels):
            return None
        return Quantisation(1), {"self": levels.quotient, "other": 1.0, "zero": levels.zero, "size": levels.size}
    row = _TABLE.get(operator)
    arrays = [x for x in operands if isinstance(x, np.ndarray) and x.dtype == np.float64]
    rule = row(at) if row is not None and arrays else None
    if rule is None:
        return None
    if isinstance(rule, Quantisation) and any(
        x.dtype not in (np.uint8, np.int8) for x in operands[2:] if x is not None
    ):
        return None
    given = ((n, x) for n, x in zip(("self", "other", "zero"), operands) if isinstance(x, np.ndarray))
    return rule, {n: torch.as_tensor(x if x.flags.writeable else x.copy()) for n, x in given}
