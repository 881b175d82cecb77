"""Rows built from slot names: what the tables of all dialects share. Nothing here knows an operator by its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from bnfold.affine import Affine
from bnfold.semantics.base import Opaque, Semantics
from bnfold.semantics.contraction import Contraction, Geometry
from bnfold.semantics.moving import Average, Same
from bnfold.semantics.pointwise import Homogeneous, Normalised, Product, Scaling, Sum

if TYPE_CHECKING:
    from bnfold.semantics.call import Call

OPAQUE = Opaque()
Reduction = Literal["mean", "sum", "extremum"]


def contraction(call: Call, data: str, weight: str, *, bias: str | None = None, **how: Any) -> Semantics:
    """``Contraction``, see there for what is in ``how``; nothing passes where its weight or bias is no constant."""
    constant = call.is_constant(weight) and (bias is None or call.is_constant(bias))
    return Contraction(call, data, weight, bias=bias, **how) if constant else OPAQUE


def convolution(
    call: Call, data: str, weight: str, bias: str, groups: int, walk: Geometry | None, *, transposed: bool,
    padded: bool = True,
) -> Semantics:  # fmt: skip
    """A convolution, batched or not; a transposed one's borders see fewer taps, as if it padded.

    Its weight is (Cout, Cin/G, k...), transposed (Cin, Cout/G, k...).
    """
    first, second, *kernel = call.shape(weight)
    batched, tail = call.rank - len(kernel) - 1, ("",) * len(kernel)
    lead = ("",) * batched
    return contraction(
        call, data, weight, view=(groups, first // groups, second, *kernel),
        letters=("gio" if transposed else "goi") + "xyz"[: len(kernel)], out=(*lead, "go", *tail),
        inp=(*lead, "gi", *tail), bias=bias, bias_axis=batched, no_shift="zero-padding" if padded else None,
        geometry=walk,
    )  # fmt: skip


def matmul(call: Call, left: str, right: str, *, rows_sum_to_one: bool) -> Semantics:
    """``x @ W`` or ``W @ x`` with a constant W, whose leading axes are shared with x or not; else of two values.

    Those are averaged where rows of the first, such as a softmax's, sum to one; else it is a product, which sums the
    last axis of the first, and all of two vectors.
    """
    if call.is_constant(right):
        data, weight, letters, rows = left, right, "io", (("", "o"), ("", "i"))
    elif call.is_constant(left):
        data, weight, letters, rows = right, left, "oi", (("o", ""), ("i", ""))
    else:
        first, second, ndim = call.shape(left), call.shape(right), call.rank
        if rows_sum_to_one and len(second) == ndim and second[:-2] == call.out_shape[:-2]:
            return Average(right, (ndim - 2,), ndim)
        matrices = len(first) == len(second) == ndim >= 2
        return Product((left, right), uniform=((-1,), (-2,)) if matrices else _everywhere(call, left, right))
    stored, given, out = call.shape(weight), call.shape(data), call.out_shape
    leading = len(stored) - 2
    if leading < 0 or len(given) < 2 or len(given) != len(out) or leading > len(out) - 2:
        return OPAQUE
    # A leading axis of the weight is one that data and output have too, or of size 1 and then of no concern.
    names = ["" if n == 1 else letter for n, letter in zip(stored, "abcdef")][:leading]
    known = ("",) * (len(out) - len(stored)) + tuple(names)
    if any(
        name and not n == m == k for name, n, m, k in zip(names, stored, out[-2 - leading :], given[-2 - leading :])
    ):
        return OPAQUE
    view = [n for n, name in zip(stored, names) if name] + list(stored[-2:])
    return contraction(
        call, data, weight, view=view, letters="".join(names) + letters, out=(*known, *rows[0]), inp=(*known, *rows[1]),
    )  # fmt: skip


def _everywhere(call: Call, first: str, second: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    one, other = (tuple(range(-call.graph.rank(call.at(slot)), 0)) for slot in (first, second))
    return one, other


def einsum(call: Call, equation: str, slots: Sequence[str]) -> Semantics:
    """One constant operand, no ellipsis, no letter twice in an operand; else a product of two values."""
    equation = equation.replace(" ", "")
    if len(slots) != 2 or "." in equation or "->" not in equation:
        return OPAQUE
    terms, output = equation.split("->")
    parts = terms.split(",")
    constants = [i for i, slot in enumerate(slots) if call.is_constant(slot)]
    if not constants:
        return Product((slots[0], slots[1]), uniform=_everywhere(call, *slots))
    if len(constants) != 1 or any(len(set(p)) != len(p) for p in [*parts, output]):
        return OPAQUE
    w = constants[0]
    letters, inp = parts[w], parts[1 - w]
    if set(inp) - set(output) - set(letters):
        return OPAQUE  # the data is also summed on its own
    return contraction(
        call, slots[1 - w], slots[w], view=call.shape(slots[w]), letters=letters,
        out=tuple(c if c in letters else "" for c in output), inp=tuple(c if c in letters else "" for c in inp),
    )  # fmt: skip


def normalisation(call: Call, data: str, slots: Sequence[str], eps: float, *, batch_statistics: bool) -> Semantics:
    """``gamma*(x - mean)/sqrt(var + eps) + beta`` along axis 1 of (N, C, ...); ``slots``: gamma, beta, mean, var.

    Those are (C,), or of the shape of a sample, and then it varies along every axis but the first.
    """
    mean_slot, var_slot = slots[2:]
    if batch_statistics or call[mean_slot] is None or call[var_slot] is None:
        return Opaque("batch-statistics", "it normalises with the statistics of the batch it sees", "batch_norm")
    if not all(call.is_constant(slot) for slot in slots):
        return Opaque("not-constant", "its parameters are computed from the model's inputs", "batch_norm")
    params = {slot: None if call[slot] is None else call.constant(slot) for slot in slots}
    weight, bias, mean, var = params.values()
    assert mean is not None and var is not None
    for slot, value in params.items():
        if value is not None and not bool(value.isfinite().all()):
            channels = value.isfinite().logical_not().nonzero().flatten().tolist()
            return Opaque("nonfinite", f"{slot} is NaN or infinite in channels {channels[:5]}", "batch_norm")
    if not bool((var + eps > 0).all()):
        channels = (var + eps <= 0).nonzero().flatten().tolist()
        return Opaque("nonfinite", f"variance + eps is not positive in channels {channels[:5]}", "batch_norm")
    sigma = (var + eps).sqrt()
    scale = (torch.ones_like(sigma) if weight is None else weight) / sigma
    shift = (torch.zeros_like(sigma) if bias is None else bias) - mean * scale

    def write(new: Affine) -> Mapping[str, Tensor]:
        s, t = (p.reshape(p.shape[1 : 1 + sigma.ndim]).expand(sigma.shape) for p in (new.scale, new.shift))
        return {slots[0]: s * sigma, slots[1]: t + s * mean}

    sizes = (1, *sigma.shape, *(1,) * (call.rank - 1 - sigma.ndim))
    own, usual = (Affine(a.reshape(sizes), b.reshape(sizes)) for a, b in ((scale, shift), (sigma, mean)))
    own, axes = own.compressed() if sigma.ndim > 1 else own, tuple(range(1, 1 + sigma.ndim))
    return Scaling(data, own, "batch_norm", write, ("scale", "shift"), axes, usual=usual)


def normalised(call: Call, axes: Sequence[int], weight: str, bias: str) -> Semantics:
    """Normalises with what it sees, then multiplies and adds constants that lie along ``axes``."""
    if not call.is_constant(weight) or not call.is_constant(bias):
        return OPAQUE
    sizes = [call.size(axis) for axis in axes]
    shape = [call.size(axis) if axis in axes else 1 for axis in range(call.rank)]

    def write(after: Affine) -> Mapping[str, Tensor]:
        own = (call.constant(slot) if call[slot] is not None else None for slot in (weight, bias))
        scale, shift = (
            torch.full(shape, empty, dtype=torch.float64) if given is None else given.reshape(shape)
            for given, empty in zip(own, (1.0, 0.0))
        )
        total = after.after(Affine(scale, shift))
        return {slot: part.expand(shape).reshape(sizes) for slot, part in ((weight, total.scale), (bias, total.shift))}

    return Normalised(tuple(axes), write)


def lookup(call: Call, slot: str) -> Semantics:
    """Rows of a constant table (embedding): ``s*W[i] + t`` is a row of ``s*W + t``."""

    def write(after: Affine) -> Mapping[str, Tensor]:
        table = call.constant(slot)
        assert table is not None
        return {slot: table * after.scale.flatten() + after.shift.flatten()}

    return Normalised((call.rank - 1,), write) if call.is_constant(slot) else OPAQUE


def _by_constant(
    call: Call, slot: str, constant: str, kind: str, affine: Callable[[Tensor], Affine], of: Callable[[Affine], Tensor]
) -> Semantics:
    """A value in ``slot`` with a constant that is multiplied to it, divides it, or is added (``kind``).

    ``affine`` is what a constant, with as many axes as the value, does; ``of`` the constant that does an affine.
    """
    value = call.constant(constant)
    assert value is not None
    ndim = call.rank
    # A constant that widens the value copies its elements; scales and shifts are real.
    if value.is_complex() or call.shape(slot) != call.out_shape:
        return OPAQUE
    value = value.double()  # that of an integer buffer is one: torch divides it in float32
    found = affine(value.reshape((1,) * (ndim - value.ndim) + tuple(value.shape)))
    if not found.is_finite:
        return OPAQUE  # a mask of -inf is no affine, nor is a division by zero
    free = ("shift",) if kind == "add" else ("scale",)
    return Scaling(slot, found.compressed(), kind, lambda new: {constant: of(new)}, free)


def negated(call: Call, slot: str) -> Semantics:
    """``-x``: an affine without a constant of its own."""
    return Scaling(slot, Affine.per_channel(-1.0, 0.0, call.rank), "mul", lambda new: {})


def multiplied(call: Call, first: str, second: str) -> Semantics:
    """By a constant an affine; of two values a product."""
    slot, constant = (second, first) if call.is_constant(first) else (first, second)
    if not call.is_constant(constant):
        return Product((first, second))
    return _by_constant(call, slot, constant, "mul", lambda c: Affine(c, _zero(c)), lambda new: new.scale)


def divided(call: Call, first: str, second: str) -> Semantics:
    """By a constant an affine by its reciprocal; of two values a quotient; a constant by a value is none."""
    if call.is_constant(first):
        return OPAQUE
    if not call.is_constant(second):
        return Product((first, second), divides=True)
    return _by_constant(call, first, second, "div", lambda c: Affine(1 / c, _zero(c)), lambda new: 1 / new.scale)


def added(call: Call, first: str, second: str, alpha: float = 1.0) -> Semantics:
    """``first + alpha*second``: with a constant an affine, of two values a sum."""
    if call.is_constant(first):
        slot, constant, scale, factor = second, first, alpha, 1.0
    elif call.is_constant(second):
        slot, constant, scale, factor = first, second, 1.0, alpha
    else:
        return Sum((first, second), alpha)
    return _by_constant(
        call, slot, constant, "add", lambda c: Affine(_zero(c) + scale, c * factor), lambda new: new.shift / factor
    )


def chosen(call: Call, first: str, second: str) -> Semantics:
    """Of two values of one shape, or of one and zero, whichever of any mask."""
    operands = tuple(slot for slot in (first, second) if not call.is_constant(slot))
    if not operands or any(call.shape(slot) != call.out_shape for slot in operands):
        return OPAQUE
    if len(operands) == 2:
        return Homogeneous(operands, shifts=True, any_sign=True)
    return Homogeneous(operands, any_sign=True) if is_zero(call, second if operands == (first,) else first) else OPAQUE


def is_zero(call: Call, slot: str) -> bool:
    """Whether a slot holds nothing but zeros."""
    constant = call.constant(slot)
    return constant is not None and not bool(constant.any())


def greatest(call: Call, slots: Sequence[str]) -> Semantics:
    """The elementwise maximum or minimum of values of one shape."""
    if any(call.is_constant(slot) for slot in slots) or len({call.shape(slot) for slot in slots}) != 1:
        return OPAQUE
    return Homogeneous(tuple(slots), shifts=True)


def pool(
    call: Call, slot: str, axes: tuple[int, ...], window: tuple[int, ...], walk: Geometry | None, *, padded: bool,
    counts: bool, ceil: bool, divisor: int | None = None,
) -> Semantics:  # fmt: skip
    """An average pool: where padding counts as zeros no shift passes; one that leaves nothing out is a convolution."""
    own = divisor in (None, prod(window))
    whole = divisor is not None and own and not padded and not ceil
    one = whole if divisor is not None else not (padded and counts)
    walk = walk if own and (counts or not padded) and not ceil else None
    return Average(slot, axes, call.rank, no_shift=None if one else "zero-padding", window=window, geometry=walk)


def reduced(call: Call, slot: str, axes: tuple[int, ...] | None, kind: Reduction, *, keep: bool) -> Semantics:
    """A mean, a sum, which is so many times the mean, or an extremum along some axes."""
    shape = call.shape(slot)
    if axes is None:
        return OPAQUE
    if kind == "extremum":
        return Homogeneous((slot,), axes, shifts=True, drops=not keep)
    if kind == "mean":
        return Average(slot, axes, len(shape), drops=not keep)
    dynamic = set(axes) & set(call.graph.dynamic_axes(call[slot]))
    count, no_shift = prod(shape[axis] for axis in axes), "dynamic-size" if dynamic else None
    return Average(slot, axes, len(shape), not keep, float(count), no_shift) if count else OPAQUE


def cast(call: Call, slot: str, size: Callable[[], Tensor | None] = lambda: None) -> Semantics:
    """A cast that loses nothing leaves every element where it is; a narrowing one rounds. ``size``: see ``Same``."""
    if not (call.graph.is_float(call[slot]) and call.graph.is_float(call.value)):
        return OPAQUE
    wide, narrow = call.graph.dtype(call.value), call.graph.dtype(call[slot])
    if torch.promote_types(wide, narrow) != wide:
        return OPAQUE
    return Same(slot, True, size()) if wide != narrow else Same(slot)


def _zero(constant: Tensor) -> Tensor:
    """A single zero with as many axes."""
    return torch.zeros((1,) * constant.ndim, dtype=torch.float64)
