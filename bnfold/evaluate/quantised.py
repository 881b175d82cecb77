"""Operators that compute on quantised values: exact in float64, up to the one rounding to a level of an integer type.

A row gives what is rounded. Runtimes compute that in float32, where two levels are as near to one another as they are
to it that decides otherwise: so these are decisions, as those of QuantizeLinear are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bnfold.evaluate.attributes import Attributes, Row
from bnfold.evaluate.windows import average_pool, conv

#: How many levels there are.
LEVELS = 256


@dataclass(frozen=True)
class Levels:
    """What is rounded, one level being 1, and the zero point that is added then, of the result's type.

    ``size``: how large the numbers may be, in levels, that a runtime has added to get it.
    """

    quotient: Tensor
    zero: Tensor
    size: float = LEVELS

    def rounded(self) -> Tensor:
        """The nearest levels, the even one of two, or the ends."""
        ends = torch.iinfo(self.zero.dtype)
        wide = self.quotient.round() + _along(self.zero, self.quotient.ndim, 1)
        return wide.nan_to_num(nan=0.0).clamp(ends.min, ends.max).to(self.zero.dtype)


def _along(value: Tensor, ndim: int, axis: int) -> Tensor:
    """A number, or one for each place along an axis."""
    wide = value.double()
    return wide.reshape([-1 if i == axis % ndim else 1 for i in range(ndim)]) if value.numel() > 1 else wide.reshape(())


def _whole(x: Tensor, zero: Tensor | None, axis: int = 0) -> Tensor:
    return x.double() if zero is None else x.double() - _along(zero, x.ndim, axis)


def _zero(zero: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros((), dtype=like.dtype) if zero is None else zero


# fmt: off
def _conv(
    at: Attributes, x: Tensor, xs: Tensor, xz: Tensor, w: Tensor, ws: Tensor, wz: Tensor, ys: Tensor, yz: Tensor,
    b: Tensor | None = None,
) -> Levels:
    sums = conv(at, _whole(x, xz), _whole(w, wz), None if b is None else b.double())
    return Levels(sums * (_along(xs, 1, 0) * _along(ws, sums.ndim, 1) / _along(ys, 1, 0)), yz)


def _matmul(
    at: Attributes, a: Tensor, as_: Tensor, az: Tensor, b: Tensor, bs: Tensor, bz: Tensor, ys: Tensor, yz: Tensor
) -> Levels:
    sums = _whole(a, az, -2) @ _whole(b, bz, -1)
    return Levels(sums * (_along(as_, sums.ndim, -2) * _along(bs, sums.ndim, -1) / _along(ys, 1, 0)), yz)


def _gemm(
    at: Attributes, a: Tensor, as_: Tensor, az: Tensor, b: Tensor, bs: Tensor, bz: Tensor, c: Tensor | None = None,
    ys: Tensor | None = None, yz: Tensor | None = None,
) -> Levels | Tensor:
    sums = (_whole(a, az).T if at.transA else _whole(a, az)) @ _whole(b.T if at.transB else b, bz, -1)
    real = (sums if c is None else sums + c.double()) * _along(as_, 1, 0) * _along(bs, 2, -1)
    real = real * (1.0 if at.alpha is None else float(at.alpha))
    return real if ys is None else Levels(real / _along(ys, 1, 0), _zero(yz, a))
# fmt: on


def _one(function: Callable[[Attributes, Tensor], Tensor]) -> Callable[..., Levels]:
    def row(
        at: Attributes, x: Tensor, xs: Tensor, xz: Tensor | None, ys: Tensor, yz: Tensor | None = None
    ) -> Levels:  # fmt: skip
        quotient = function(at, _whole(x, xz) * xs.reshape(())) / ys.reshape(())
        return Levels(quotient, _zero(yz, x), LEVELS * max(float(xs.sum() / ys.sum()), 1.0))

    return row


def _two(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Levels]:
    def row(
        at: Attributes, a: Tensor, as_: Tensor, az: Tensor | None, b: Tensor, bs: Tensor, bz: Tensor | None,
        ys: Tensor, yz: Tensor | None = None,
    ) -> Levels:  # fmt: skip
        real = function(_whole(a, az) * as_.reshape(()), _whole(b, bz) * bs.reshape(()))
        return Levels(real / ys.reshape(()), _zero(yz, a), LEVELS * max(float((as_ + bs).sum() / ys.sum()), 1.0))

    return row


def _concat(at: Attributes, ys: Tensor, yz: Tensor, *given: Tensor) -> Levels:
    parts = [_whole(x, zero) * scale.reshape(()) for x, scale, zero in zip(given[::3], given[1::3], given[2::3])]
    return Levels(torch.cat(parts, at.axis) / ys.reshape(()), yz)


def _where(
    at: Attributes, which: Tensor, x: Tensor, xs: Tensor, xz: Tensor, y: Tensor, ys: Tensor, yz: Tensor, zs: Tensor,
    zz: Tensor,
) -> Levels:  # fmt: skip
    real = torch.where(which, _whole(x, xz) * xs.reshape(()), _whole(y, yz) * ys.reshape(()))
    return Levels(real / zs.reshape(()), zz)


def _last(function: Row) -> Callable[[Attributes, Tensor], Tensor]:
    """A pool whose channels may be the last axis."""

    def row(at: Attributes, x: Tensor) -> Tensor:
        if not at.channels_last:
            first: Tensor = function(at, x)
            return first
        return function(at, x.movedim(-1, 1)).movedim(1, -1)  # type: ignore[no-any-return]

    return row


def _softmax(at: Attributes, x: Tensor) -> Tensor:
    axis = (-1 if at.axis is None else at.axis) % x.ndim
    if at.values.get("opset", 13) >= 13:
        return x.softmax(axis)
    return x.flatten(axis).softmax(-1).reshape(x.shape)


#: What is rounded, by an operator's name with its domain.
ROWS: dict[str, Callable[..., Levels | Tensor]] = {
    "QLinearConv": _conv,
    "QLinearMatMul": _matmul,
    "com.microsoft.QGemm": _gemm,
    "com.microsoft.QLinearAdd": _two(torch.add),
    "com.microsoft.QLinearMul": _two(torch.mul),
    "com.microsoft.QLinearSigmoid": _one(lambda at, x: x.sigmoid()),
    "com.microsoft.QLinearLeakyRelu": _one(lambda at, x: torch.where(x < 0, x * (at.alpha or 0.01), x)),
    "com.microsoft.QLinearGlobalAveragePool": _one(_last(lambda at, x: x.mean(tuple(range(2, x.ndim)), keepdim=True))),
    "com.microsoft.QLinearAveragePool": _one(_last(average_pool)),
    "com.microsoft.QLinearSoftmax": _one(_softmax),
    "com.microsoft.QLinearConcat": _concat,
    "com.microsoft.QLinearWhere": _where,
}


def _levelled(row: Callable[..., Levels | Tensor]) -> Row:
    def levelled(at: Attributes, *given: Tensor | None) -> Tensor:
        found = row(at, *given)
        return found.rounded() if isinstance(found, Levels) else found

    return levelled


#: What computes them, by domain and name.
TABLE: dict[tuple[str, str], Row] = {
    (domain, operator): _levelled(row) for name, row in ROWS.items() for domain, _, operator in (name.rpartition("."),)
}
