"""Operators that decide: their result, or a part of it, jumps where what they compare crosses a border.

A row says what is compared, what the result is once the choice is somebody else's, and the *gap* of a choice: how far
what is compared would have to move for the operator to choose so itself. A gap within the noise is a near-tie; a larger
one is a wrong choice, and one that no values could lead to (an index twice, a rounded number that is no integer) is
infinite. A choice is named by an index, a truth value or a number, as the operator returns it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from bnfold.semantics.call import bound as bound

#: The arguments of one application, by their names in the operator's schema.
Arguments = Mapping[str, Any]
#: Of the exact ties of a comparison or rounding, this part may be decided otherwise: next to a ReLU's zeros lie values
#: that one program has just above zero and another just below.
BROKEN_TIES = 0.01


@dataclass(frozen=True, kw_only=True)
class Deciding:
    """How an operator decides. ``item`` is which of several results holds the choice, None where it has one result."""

    item: int | None = None

    def compared(self, at: Arguments) -> Tensor:
        """What it decides on, in float64."""
        return torch.as_tensor(at["self"] if "self" in at else at["input"]).double()

    def differs(self, own: Tensor, chosen: Tensor) -> Tensor:
        """Where two choices differ."""
        return chosen.to(own.dtype) != own

    def gap(self, at: Arguments, own: Tensor, chosen: Tensor) -> Tensor:
        """How far ``compared`` is from where ``chosen`` would be right; of ``chosen``'s shape."""
        raise NotImplementedError

    def result(self, at: Arguments, own: Any, chosen: Tensor) -> Any:
        """What the operator returns where ``chosen`` is its choice, ``own`` being what it returns by itself."""
        return chosen.to(own.dtype)


def rare(gap: Tensor, ties: Tensor, broken: Tensor) -> Tensor:
    """``gap``, infinite at ``broken`` ties unless they are few among all ``ties``."""
    few = int(broken.sum()) <= BROKEN_TIES * int(ties.sum())
    return gap if few else torch.where(broken, torch.inf, gap)


@dataclass(frozen=True)
class Selection(Deciding):
    """Chooses elements by their order along ``dim``, or over the last ``flat`` axes together where that is given.

    The i-th chosen element is compared with the i-th that the operator would choose: values that are off by at most e
    have order statistics that are off by at most e, so a choice made on such values has a gap of at most 2e.
    """

    dim: int | None
    ranked: bool = True
    flat: int = 0

    def _picked(self, value: Tensor, index: Tensor) -> tuple[Tensor, bool]:
        """The elements at ``index``, the ordered axis last, and whether they can have been chosen together."""
        if self.flat or self.dim is None:
            axes = self.flat or value.ndim
            value = value.reshape(*value.shape[: value.ndim - axes], -1)
            index = index.reshape(*value.shape[:-1], -1)
        elif value.ndim:
            alone = index.ndim < value.ndim
            value = value.movedim(self.dim, -1)
            index = index[..., None] if alone else index.movedim(self.dim, -1)
        else:
            value, index = value[None], index.reshape(1)
        index = index.long()
        valid = bool(((index >= 0) & (index < value.shape[-1])).all())
        if valid and not self.flat and index.shape[-1] > 1:
            valid = bool((index.sort(-1).values.diff(dim=-1) > 0).all())
        return value.gather(-1, index.clamp(0, max(value.shape[-1] - 1, 0))), valid

    def gap(self, at: Arguments, own: Tensor, chosen: Tensor) -> Tensor:
        """Distance between the elements chosen and those that would have been."""
        value = self.compared(at)
        (theirs, valid), (mine, _) = self._picked(value, chosen), self._picked(value, own)
        if not valid:
            return torch.full(chosen.shape, torch.inf, dtype=torch.float64)
        if not self.ranked:
            theirs, mine = theirs.sort(-1).values, mine.sort(-1).values
        gap = torch.where(theirs == mine, 0.0, (theirs - mine).abs())
        back = gap.movedim(-1, self.dim) if self.dim is not None and gap.ndim == chosen.ndim and not self.flat else gap
        return back.reshape(chosen.shape).nan_to_num(nan=torch.inf, posinf=torch.inf)

    def result(self, at: Arguments, own: Any, chosen: Tensor) -> Any:
        """The chosen indices, with the values there where the operator returns them too."""
        if self.item is None:
            return chosen.to(own.dtype)
        picked, _ = self._picked(at["self"], chosen)
        if self.dim is not None and picked.ndim == own[0].ndim and not self.flat and picked.ndim:
            picked = picked.movedim(-1, self.dim)
        return picked.reshape(own[0].shape), chosen.to(own[1].dtype)


@dataclass(frozen=True)
class Comparison(Deciding):
    """``a > b`` and the like, or of ``a`` with ``zero``."""

    zero: bool = False

    def compared(self, at: Arguments) -> Tensor:
        """a - b, zero where two infinities are equal."""
        a, b = torch.as_tensor(at["self"]).double(), torch.as_tensor(0 if self.zero else at["other"]).double()
        return torch.where(a == b, 0.0, a - b)

    def gap(self, at: Arguments, own: Tensor, chosen: Tensor) -> Tensor:
        """|a - b|: it would have to reach zero."""
        distance = self.compared(at).abs().expand(chosen.shape)
        wrong, ties = self.differs(own, chosen), distance == 0
        gap = torch.where(wrong, distance, 0.0).nan_to_num(nan=torch.inf, posinf=torch.inf)
        return rare(gap, ties, wrong & ties)


#: The inputs that a rounding takes to c: from where to where.
_INTERVALS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "round": lambda c: (c - 0.5, c + 0.5),
    "floor": lambda c: (c, c + 1),
    "ceil": lambda c: (c - 1, c),
    "trunc": lambda c: (torch.where(c > 0, c, c - 1), torch.where(c < 0, c, c + 1)),
    "sign": lambda c: (torch.where(c < 0, -torch.inf, 0.0), torch.where(c > 0, torch.inf, 0.0)),
}


def _outside(kind: str, value: Tensor, level: Tensor) -> Tensor:
    """How far ``value`` is from the interval that is rounded to ``level``; infinite where that is no such number."""
    low, high = _INTERVALS[kind](level)
    gap = torch.maximum(low - value, value - high).clamp(min=0.0)
    possible = (level == level.round()) & ((level.abs() <= 1) | torch.tensor(kind != "sign"))
    return torch.where(possible, gap, torch.inf).nan_to_num(nan=torch.inf, posinf=torch.inf)


@dataclass(frozen=True)
class Rounding(Deciding):
    """A step function: to so many decimals, to the sign, or of a quotient."""

    kind: str
    decimals: int = 0
    quotient: bool = False

    def compared(self, at: Arguments) -> Tensor:
        """What is rounded, one step being 1."""
        value = torch.as_tensor(at["self"]).double()
        return value / at["other"] if self.quotient else value * 10.0**self.decimals

    def _level(self, chosen: Tensor) -> Tensor:
        # A decimal fraction is stored as the number next to it.
        return (chosen.double() * 10.0**self.decimals).round() if self.decimals else chosen.double()

    def differs(self, own: Tensor, chosen: Tensor) -> Tensor:
        """Other numbers."""
        return self._level(own) != self._level(chosen)

    def gap(self, at: Arguments, own: Tensor, chosen: Tensor) -> Tensor:
        """How far what is rounded lies from what would be rounded so."""
        value, wrong = self.compared(at), self.differs(own, chosen)
        gap = torch.where(wrong, _outside(self.kind, value, self._level(chosen)), 0.0)
        low, high = _INTERVALS[self.kind](self._level(own))
        return rare(gap, (value == low) | (value == high), wrong & (gap == 0))

    def result(self, at: Arguments, own: Any, chosen: Tensor) -> Any:
        """The chosen numbers."""
        return (self._level(chosen) / 10.0**self.decimals).to(own.dtype)


@dataclass(frozen=True)
class Modulus(Deciding):
    """``a - b * floor(a / b)``, or with ``trunc``: what is chosen is the multiple of b that is taken off."""

    kind: str

    def _divisor(self, at: Arguments) -> Tensor:
        return torch.as_tensor(at.get("other", 1.0)).double()

    def compared(self, at: Arguments) -> Tensor:
        """a / b."""
        return torch.as_tensor(at["self"]).double() / self._divisor(at)

    def differs(self, own: Tensor, chosen: Tensor) -> Tensor:
        """Results a step apart: a step is larger than every result, an error much smaller than most."""
        return (own.double() - chosen.double()).abs() > 0.5 * own.double().abs().max()

    def _level(self, at: Arguments, chosen: Tensor) -> Tensor:
        return (self.compared(at) - chosen.double() / self._divisor(at)).round()

    def gap(self, at: Arguments, own: Tensor, chosen: Tensor) -> Tensor:
        """How far a / b lies from what that multiple is taken off from."""
        gap = _outside(self.kind, self.compared(at), self._level(at, chosen))
        return torch.where(self.differs(own, chosen), gap, 0.0)

    def result(self, at: Arguments, own: Any, chosen: Tensor) -> Any:
        """What is left of a."""
        return (torch.as_tensor(at["self"]).double() - self._level(at, chosen) * self._divisor(at)).to(own.dtype)


@dataclass(frozen=True)
class Bucket(Deciding):
    """The number of boundaries below a value."""

    def gap(self, at: Arguments, own: Tensor, chosen: Tensor) -> Tensor:
        """How far a value lies from its bucket."""
        ends = torch.tensor([torch.inf], dtype=torch.float64)
        edges = torch.cat([-ends, at["boundaries"].double(), ends])
        index = chosen.long().clamp(0, len(edges) - 2)
        value = self.compared(at)
        gap = torch.maximum(edges[index] - value, value - edges[index + 1]).clamp(min=0.0)
        return torch.where(index == chosen, gap, torch.inf)


_Row = Callable[[Arguments], Deciding | None]
_ROWS: dict[str, _Row] = {
    "argmax argmin argsort": lambda at: Selection(at["dim"]),
    "topk sort max min median nanmedian kthvalue": lambda at: Selection(
        at.get("dim", -1), item=1, ranked=at.get("sorted") is not False
    ),
    "max_pool1d_with_indices": lambda at: Selection(None, item=1, flat=1),
    "max_pool2d_with_indices adaptive_max_pool2d": lambda at: Selection(None, item=1, flat=2),
    "max_pool3d_with_indices adaptive_max_pool3d": lambda at: Selection(None, item=1, flat=3),
    "gt ge lt le greater greater_equal less less_equal eq ne not_equal": lambda at: Comparison(),
    "logical_not signbit": lambda at: Comparison(zero=True),
    "round": lambda at: Rounding("round", decimals=at.get("decimals") or 0),
    "floor": lambda at: Rounding("floor"),
    "floor_divide": lambda at: Rounding("floor", quotient=True),
    "ceil": lambda at: Rounding("ceil"),
    "trunc fix": lambda at: Rounding("trunc"),
    "sign sgn": lambda at: Rounding("sign"),
    "div divide true_divide": lambda at: (
        Rounding(at["rounding_mode"], quotient=True) if at.get("rounding_mode") else None
    ),
    "remainder": lambda at: Modulus("floor"),
    "fmod frac": lambda at: Modulus("trunc"),
    "bucketize": lambda at: Bucket(),
}
_TABLE = {name: row for names, row in _ROWS.items() for name in names.split()}
_CASTS = {"to", "_to_copy", "type_as"}


def deciding(node: fx.Node) -> Deciding | None:
    """How a node decides on floating-point numbers; None where it does not."""
    if not isinstance(node.target, OpOverload) or node.target.namespace != "aten":
        return None
    at = bound(node.target, node.args, node.kwargs)
    if not any(_is_float(at.get(name)) for name in ("self", "other")):
        return None
    value = node.meta.get("val")
    if node.target._opname in _CASTS:
        if not isinstance(value, Tensor) or value.is_floating_point() or value.is_complex():
            return None
        return Comparison(zero=True) if value.dtype == torch.bool else Rounding("trunc")
    row = _TABLE.get(node.target._opname)
    rule = row(at) if row is not None else None
    # ``max`` of two tensors or of everything is continuous, and so is every operator that returns values alone.
    several = isinstance(value, (list, tuple))
    return rule if rule is not None and (rule.item is not None) == several else None


def _is_float(value: Any) -> bool:
    found = value.meta.get("val") if isinstance(value, fx.Node) else None
    return isinstance(found, Tensor) and found.dtype.is_floating_point
