"""The closed vocabulary: what an operator does to an Affine.

An operator is described once, by one of these kinds, and both directions use the description:

- ``pull(out)``: the operator must emit ``out(y)`` in place of ``y``; answer what each operand must become instead,
  and which constants change.
- ``push(given)``: some operands arrive as ``u`` where ``given[slot](u)`` is meant; answer the Affine by which the
  output then differs, and which constants change.

The answers hold algebra only. Who else reads a value, and whether an edit is legal in the graph, is the engine's.
A slot is the name of an operand in the operator's schema, with an index for lists: ``"self"``, ``"tensors.2"``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from bnfold.affine import Affine

Shape = tuple[int, ...]


@dataclass(frozen=True)
class No:
    """The operator does not let the Affine pass; ``reason`` is one of ``report.REASONS``."""

    reason: str
    detail: str = ""


@dataclass(frozen=True)
class Yes:
    """The operator lets it pass.

    Attributes:
        operands: what each operand must become (pull).
        out: by what the output differs (push); None when nothing is left of it.
        constants: float64 tensors that replace constant operands, by slot.
        add: float64 tensor to add to the operator's output, where it has no operand for a bias.
        bypass: the slot whose value takes the place of the output: the operator itself goes.
    """

    operands: Mapping[str, Affine] = field(default_factory=dict)
    out: Affine | None = None
    constants: Mapping[str, Tensor] = field(default_factory=dict)
    add: Tensor | None = None
    bypass: str | None = None


Answer = Yes | No


class Semantics:
    """Base of the vocabulary, and its last word: *Opaque*, which lets nothing pass."""

    reason: ClassVar[str] = "nonlinear"
    #: Slots that are read for their shape alone.
    shape_only: tuple[str, ...] = ()

    def pull(self, out: Affine) -> Answer:
        """What the operands must be for the operator to emit ``out(y)``."""
        return No(self.reason)

    def push(self, given: Mapping[str, Affine]) -> Answer:
        """By what the output differs when operands arrive without their Affine."""
        return No(self.reason)

    def takes(self, shift: bool, operands: Mapping[str, bool]) -> bool:
        """Whether a scale (or a shift) asked of the output is likely to find a home; ``operands`` says so for each."""
        return False


class Opaque(Semantics):
    """Nothing passes: nonlinear, random, data dependent or unknown."""


@dataclass(frozen=True)
class Unknown(Opaque):
    """An operator that the table does not hold."""

    reason = "unknown-operator"


@dataclass(frozen=True)
class Refused(Opaque):
    """An operator that would be folded but for what it is configured to do, such as using batch statistics."""

    reason: str  # type: ignore[misc]
    detail: str = ""
    kind: str = "batch_norm"

    def pull(self, out: Affine) -> Answer:
        """Refused, with the reason."""
        return No(self.reason, self.detail)

    def push(self, given: Mapping[str, Affine]) -> Answer:
        """Refused, with the reason."""
        return No(self.reason, self.detail)


@dataclass(frozen=True)
class ShapeOnly(Semantics):
    """Reads the shape of its operand and none of its elements: never in the way."""

    slot: str

    @property
    def shape_only(self) -> tuple[str, ...]:  # type: ignore[override]
        """Its only operand."""
        return (self.slot,)


@dataclass(frozen=True)
class Scaling(Semantics):
    """Multiplies and adds constants: ``y = affine(x)``. A source of Affines, and a place where others end.

    ``write`` answers the constants that make the operator compute another Affine, or None where it cannot.
    """

    slot: str
    affine: Affine
    kind: str
    write: Callable[[Affine], Mapping[str, Tensor] | None]

    def pull(self, out: Affine) -> Answer:
        """``out(affine(x))``: into the own constants; else the scale travels on; else all of it, and the node goes."""
        total = out.after(self.affine)
        constants = self.write(total)
        if constants is not None:
            return Yes(constants=constants)
        if not self.affine.has_scale:  # s*(x + c) + t = (s*x) + (s*c + t)
            constants = self.write(Affine(self.affine.scale, total.shift))
            if constants is not None:
                return Yes(operands={self.slot: out.only_scale()}, constants=constants)
        return Yes(operands={self.slot: total}, bypass=self.slot)

    def push(self, given: Mapping[str, Affine]) -> Answer:
        """``affine(given(u))``: into the own constants; else all of it travels on, and the node goes."""
        total = self.affine.after(given[self.slot])
        constants = self.write(total)
        if constants is not None:
            return Yes(constants=constants)
        return Yes(out=total, bypass=self.slot)

    def takes(self, shift: bool, operands: Mapping[str, bool]) -> bool:
        """A scaling that is still there can take either."""
        return True


@dataclass(frozen=True)
class Contraction(Semantics):
    """Linear in its data with a constant weight.

    The weight, viewed as ``view``, has one letter per axis in ``letters``; ``out`` and ``inp`` give for every axis of
    the output and of the data the letters that, flattened, make it up (``""``: the weight does not know that axis).
    A convolution with groups is ``letters="goixy"``, ``out=("", "go", "", "")``, ``inp=("", "gi", "", "")``.

    - affine after: ``W[o] *= s[o]``, ``b = b*s + t``
    - affine before: ``W[o,j] *= s[g(o)*Cin/G + j]``, ``b[o] += sum_jk W_old[o,j,k] * t[j]``
    """

    data: str
    weight: str
    view: Shape
    letters: str
    out: tuple[str, ...]
    inp: tuple[str, ...]
    get_weight: Callable[[], Tensor]
    set_weight: Callable[[Tensor], Tensor]
    get_bias: Callable[[], Tensor | None]
    #: Writes a bias with as many axes as the output, as constants by slot; None where there is no slot for it.
    set_bias: Callable[[Tensor], Mapping[str, Tensor] | None]
    #: Why a shift cannot come in from before, if it cannot.
    no_shift: str | None = None

    def pull(self, out: Affine) -> Answer:
        """Absorbs an affine on its output."""
        for axis in out.varies():
            if not self.out[axis]:
                return No("other-axis", f"the affine varies along axis {axis}, which the weight does not")
        weight = self.get_weight() * self._on_weight(out.scale, self.out)
        constants = {self.weight: self.set_weight(weight)}
        bias = self.get_bias()
        if bias is None and not out.has_shift:
            return Yes(constants=constants)
        return self._with_bias(constants, out.shift if bias is None else bias * out.scale + out.shift)

    def push(self, given: Mapping[str, Affine]) -> Answer:
        """Absorbs an affine on its data."""
        affine = given[self.data]
        if len(given) > 1:
            return No("nonlinear", "the weight depends on the affine as well")
        for axis in affine.varies():
            if not self.inp[axis]:
                return No("other-axis", f"the affine varies along axis {axis}, which the weight does not")
        old = self.get_weight()
        constants = {self.weight: self.set_weight(old * self._on_weight(affine.scale, self.inp))}
        if not affine.has_shift:
            return Yes(constants=constants)
        if self.no_shift is not None:
            return No(self.no_shift, "a shift before it would have to reach into the padding")
        kept = set("".join(self.out))
        summed = [i for i, letter in enumerate(self.letters) if letter not in kept]
        moved = (old * self._on_weight(affine.shift, self.inp)).sum(summed, keepdim=True)
        bias, delta = self.get_bias(), self._on_output(moved)
        return self._with_bias(constants, delta if bias is None else bias + delta)

    def takes(self, shift: bool, operands: Mapping[str, bool]) -> bool:
        """Takes both."""
        return True

    def _with_bias(self, constants: dict[str, Tensor], bias: Tensor) -> Answer:
        written = self.set_bias(bias)
        return Yes(constants=constants, add=bias) if written is None else Yes(constants={**constants, **written})

    def _on_weight(self, t: Tensor, axes: Sequence[str]) -> Tensor:
        """``t``, laid out as a value whose axes are made of ``axes``, laid out as the viewed weight."""
        sizes, order = dict(zip(self.letters, self.view)), "".join(axes)
        t = t.reshape([sizes[letter] if size > 1 else 1 for size, letters in zip(t.shape, axes) for letter in letters])
        t = t.permute([order.index(letter) for letter in self.letters if letter in order])
        return t[tuple(slice(None) if letter in order else None for letter in self.letters)]

    def _on_output(self, moved: Tensor) -> Tensor:
        """``moved``, laid out as the viewed weight with size 1 on what was summed, laid out as the output."""
        order = "".join(self.out)
        where = [self.letters.index(letter) for letter in order]
        rest = [i for i in range(len(self.letters)) if i not in where]
        sizes = dict(zip(self.letters, moved.shape))
        shape = [1] * len(self.out)
        for axis, letters in enumerate(self.out):
            for letter in letters:
                shape[axis] *= sizes[letter]
        return moved.permute(where + rest).reshape(shape)


@dataclass(frozen=True)
class Movement(Semantics):
    """Moves elements and changes none: view, permute, slice, cat, pad, roll, pixel_shuffle, ...

    A movement is a gather, so it is described by running it on the indices of its operands' elements: output element
    ``j`` is operand element ``index[j]``, and 0 stands for an element that it made up as zero.
    """

    slots: tuple[str, ...]
    shapes: tuple[Shape, ...]
    apply: Callable[[Sequence[Tensor]], Tensor]
    ignored: tuple[str, ...] = ()

    @property
    def shape_only(self) -> tuple[str, ...]:  # type: ignore[override]
        """The operands that only lend their shape."""
        return self.ignored

    def _index(self) -> tuple[Tensor, list[int]]:
        start, parts, bounds = 1, [], [1]
        for shape in self.shapes:
            count = int(torch.Size(shape).numel())
            # float64 holds every index exactly, and every movement is implemented for it.
            parts.append(torch.arange(start, start + count, dtype=torch.float64).reshape(shape))
            start += count
            bounds.append(start)
        return self.apply(parts).to(torch.int64), bounds

    def pull(self, out: Affine) -> Answer:
        """Scatters what is asked of the outputs to the elements they came from; copies must agree."""
        index, bounds = self._index()
        made_up = index == 0
        if bool(made_up.any()) and bool((out.shift.expand(index.shape)[made_up].nan_to_num() != 0).any()):
            return No("zero-padding", "a shift would have to reach into padded zeros")
        flat = index.flatten()
        found = []
        for wanted in (out.scale, out.shift):
            wanted = wanted.expand(index.shape).flatten()
            known = (flat > 0) & ~wanted.isnan()
            buffer = torch.full((bounds[-1],), torch.nan, dtype=torch.float64)
            buffer[flat[known]] = wanted[known]
            if not bool((buffer[flat[known]] == wanted[known]).all()):
                return No("copies-differ", "one element is copied to places with different affines")
            found.append(buffer)
        operands = {}
        for slot, shape, low, high in zip(self.slots, self.shapes, bounds, bounds[1:]):
            scale, shift = (buffer[low:high].reshape(shape) for buffer in found)
            operands[slot] = Affine(scale, shift).compressed()
        return Yes(operands=operands)

    def push(self, given: Mapping[str, Affine]) -> Answer:
        """Gathers the operands' affines; an operand without one contributes the identity, padding anything."""
        index, bounds = self._index()
        scale = torch.ones(bounds[-1], dtype=torch.float64)
        shift = torch.zeros(bounds[-1], dtype=torch.float64)
        scale[0] = torch.nan
        for slot, shape, low, high in zip(self.slots, self.shapes, bounds, bounds[1:]):
            if slot in given:
                scale[low:high] = given[slot].scale.expand(shape).flatten()
                shift[low:high] = given[slot].shift.expand(shape).flatten()
        return Yes(out=Affine(scale[index], shift[index]).settled())

    def takes(self, shift: bool, operands: Mapping[str, bool]) -> bool:
        """Where all its operands do."""
        return all(operands[slot] for slot in self.slots)


@dataclass(frozen=True)
class Same(Semantics):
    """A movement that leaves every element where it is: dropout in eval mode, clone, contiguous, a widening cast."""

    slot: str

    def pull(self, out: Affine) -> Answer:
        """Asks the same of its operand."""
        return Yes(operands={self.slot: out})

    def push(self, given: Mapping[str, Affine]) -> Answer:
        """Passes it on."""
        return Yes(out=given[self.slot])

    def takes(self, shift: bool, operands: Mapping[str, bool]) -> bool:
        """Where its operand does."""
        return operands[self.slot]


@dataclass(frozen=True)
class Lookup(Semantics):
    """Picks rows of a constant table (embedding): an affine on the last axis goes into the table."""

    slot: str

    def pull(self, out: Affine) -> Answer:
        """``s*W[i] + t`` is a row of ``s*W + t``."""
        if any(axis != out.ndim - 1 for axis in out.varies()):
            return No("other-axis", "the affine varies along the axes of the indices")
        return Yes(operands={self.slot: Affine(out.scale.reshape(1, -1), out.shift.reshape(1, -1))})

    def takes(self, shift: bool, operands: Mapping[str, bool]) -> bool:
        """Takes both."""
        return True


@dataclass(frozen=True)
class Average(Semantics):
    """A weighted mean along ``axes`` of its operand: ``mean(s*x + t) = s*mean(x) + t`` where s, t are constant there.

    ``drops``: the axes are gone from the output. ``sums_to_one`` is false where padded zeros are counted, or for a sum;
    then only a scale passes.
    """

    slot: str
    axes: tuple[int, ...]
    ndim: int
    drops: bool = False
    sums_to_one: bool = True

    def _check(self, affine: Affine) -> No | None:
        if not self.sums_to_one and affine.has_shift:
            return No("zero-padding", "its weights do not sum to one everywhere, so a shift would change")
        if set(self.axes) & set(affine.varies()):
            return No("other-axis", "the affine varies along the axis that is averaged")
        return None

    def pull(self, out: Affine) -> Answer:
        """Commutes."""
        if self.drops:
            shape = [1 if axis in self.axes else 0 for axis in range(self.ndim)]
            scale, shift = iter(out.scale.shape), iter(out.shift.shape)
            out = Affine(
                out.scale.reshape([1 if dropped else next(scale) for dropped in shape]),
                out.shift.reshape([1 if dropped else next(shift) for dropped in shape]),
            )
        return self._check(out) or Yes(operands={self.slot: out})

    def push(self, given: Mapping[str, Affine]) -> Answer:
        """Commutes."""
        if set(given) != {self.slot}:
            return No("nonlinear", "the weights of the average depend on it")
        affine = given[self.slot]
        refused = self._check(affine)
        if refused or not self.drops:
            return refused or Yes(out=affine)
        kept = [axis for axis in range(self.ndim) if axis not in self.axes]
        return Yes(
            out=Affine(
                affine.scale.reshape([affine.scale.shape[a] for a in kept]),
                affine.shift.reshape([affine.shift.shape[a] for a in kept]),
            )
        )

    def takes(self, shift: bool, operands: Mapping[str, bool]) -> bool:
        """Where its operand does, a shift only if the weights sum to one."""
        return operands[self.slot] and (self.sums_to_one or not shift)


@dataclass(frozen=True)
class Sum(Semantics):
    """``y = a + alpha*b`` of two values: the scale goes into both, the shift into one."""

    slots: tuple[str, str]
    shapes: tuple[Shape, Shape]
    out_ndim: int
    alpha: float = 1.0
    #: Set by the engine: the slot that should take a shift.
    home: str | None = None

    def pull(self, out: Affine) -> Answer:
        """``s*(a + alpha*b) + t = (s*a + t) + alpha*(s*b)``."""
        operands = {}
        for slot, shape in zip(self.slots, self.shapes):
            part = out.only_scale().unbroadcast(shape)
            if part is None:
                return No("broadcast", "an operand is broadcast along the axis that the affine varies along")
            operands[slot] = part
        if not out.has_shift:
            return Yes(operands=operands)
        order = sorted(zip(self.slots, self.shapes), key=lambda pair: pair[0] != self.home)
        for slot, shape in order:
            factor = 1.0 if slot == self.slots[0] else self.alpha
            part = Affine(out.scale, out.shift / factor).unbroadcast(shape) if factor else None
            if part is not None:
                operands[slot] = part
                return Yes(operands=operands)
        return No("broadcast", "an operand is broadcast along the axis that the shift varies along")

    def push(self, given: Mapping[str, Affine]) -> Answer:
        """Both operands must carry the same scale; the shifts add."""
        parts = []
        for slot in self.slots:
            part = given.get(slot)
            parts.append(Affine.identity(self.out_ndim) if part is None else part.broadcast(self.out_ndim))
        first, second = parts
        if not torch.equal(*torch.broadcast_tensors(first.scale, second.scale)):
            return No("unequal-scales", "the two operands of the sum do not carry the same scale")
        return Yes(out=Affine(first.scale, first.shift + self.alpha * second.shift).settled())

    def takes(self, shift: bool, operands: Mapping[str, bool]) -> bool:
        """A shift needs one operand that takes it, a scale both."""
        return (any if shift else all)(operands[slot] for slot in self.slots)


@dataclass(frozen=True)
class Product(Semantics):
    """``y = a*b`` (or ``a/b``: only the first slot) of two values: a scale passes into one factor."""

    slots: tuple[str, ...]
    shapes: tuple[Shape, ...]
    out_ndim: int
    home: str | None = None

    def pull(self, out: Affine) -> Answer:
        """``s*(a*b) = (s*a)*b``."""
        if out.has_shift:
            return No("shift-through-product", "a shift does not pass a product of two values")
        for slot, shape in sorted(zip(self.slots, self.shapes), key=lambda pair: pair[0] != self.home):
            part = out.unbroadcast(shape)
            if part is not None:
                return Yes(operands={slot: part})
        return No("broadcast", "both factors are broadcast along the axes that the scale varies along")

    def push(self, given: Mapping[str, Affine]) -> Answer:
        """``(s1*a)*(s2*b) = (s1*s2)*(a*b)``."""
        if any(affine.has_shift for affine in given.values()):
            return No("shift-through-product", "a shift does not pass a product of two values")
        if not set(given) <= set(self.slots):
            return No("nonlinear", "it is the divisor")
        scale = torch.ones((1,) * self.out_ndim, dtype=torch.float64)
        for affine in given.values():
            scale = scale * affine.broadcast(self.out_ndim).scale
        return Yes(out=Affine(scale, torch.zeros((1,) * self.out_ndim, dtype=torch.float64)))

    def takes(self, shift: bool, operands: Mapping[str, bool]) -> bool:
        """A scale, where one factor does."""
        return not shift and any(operands[slot] for slot in self.slots)


@dataclass(frozen=True)
class Homogeneous(Semantics):
    """``f(s*x) = s*f(x)`` for s > 0: the ReLU family. With ``shifts`` also ``f(x + t) = f(x) + t``: max and its pools.

    ``axes``: the axes along which elements are compared; scale and shift must not vary there.
    """

    slots: tuple[str, ...]
    axes: tuple[int, ...] = ()
    shifts: bool = False

    def _check(self, affine: Affine) -> No | None:
        if affine.has_shift and not self.shifts:
            return No("shift-through-activation", "a shift does not pass an activation")
        if not affine.is_positive:
            return No("sign", "a scale that is zero or negative does not pass an activation or a maximum")
        if set(self.axes) & set(affine.varies()):
            return No("other-axis", "the affine varies along the axis that is compared")
        return None

    def pull(self, out: Affine) -> Answer:
        """Asks the same of every operand."""
        return self._check(out) or Yes(operands=dict.fromkeys(self.slots, out))

    def push(self, given: Mapping[str, Affine]) -> Answer:
        """All operands must carry the same affine."""
        first = next(iter(given.values()))
        for slot in self.slots:
            other = given.get(slot)
            if other is None or first.agree(other) is None:
                return No("unequal-scales", "the operands that are compared do not carry the same affine")
        return self._check(first) or Yes(out=first)

    def takes(self, shift: bool, operands: Mapping[str, bool]) -> bool:
        """Where all operands do."""
        return (self.shifts or not shift) and all(operands[slot] for slot in self.slots)
