"""Operators with a constant weight: the places where an Affine ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from bnfold.affine import Affine
from bnfold.semantics.base import Answer, No, Semantics, Shape, Yes


@dataclass(frozen=True)
class Geometry:
    """How a convolution or a pool walks over the spatial axes: one number per axis; none for a linear layer."""

    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    transposed: bool = False
    output_padding: tuple[int, ...] = ()

    @classmethod
    def pointwise(cls, spatial: int) -> Geometry:
        """Every position on its own."""
        return cls((1,) * spatial, (0,) * spatial, (1,) * spatial)


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
    #: For a convolution or a linear layer: what merging must know.
    geometry: Geometry | None = None

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
