"""Operators with a constant weight: their two sides are free of one another."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor
from torch.nn.functional import pad

from bnfold.affine import Affine
from bnfold.semantics.base import Rewritten, Semantics, Shape
from bnfold.semantics.equations import EMPTY, Equations, Gauge, pinned

if TYPE_CHECKING:
    from bnfold.semantics.call import Call


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
    """Linear in its data with a constant weight: ``W' = W*a_x/a_y``, ``c' = (c + W*b_x - b_y)/a_y``.

    The weight, viewed as ``view``, has one letter per axis in ``letters``; ``out`` and ``inp`` give for every axis of
    the output and of the data the letters that, flattened, make it up (``""``: the weight does not know that axis).
    A convolution with groups is ``letters="goixy"``, ``out=("", "go", "", "")``, ``inp=("", "gi", "", "")``.
    """

    call: Call
    data: str  #: slot of the data, as the next is of the weight.
    weight: str
    view: Sequence[int]  #: the weight's shape with an axis per letter.
    letters: str
    out: tuple[str, ...]
    inp: tuple[str, ...]
    bias: str | None = None  #: slot of the bias, which may be empty; None where there is no place for one.
    #: the axis of the result that the bias, shape (n,), lies along; None for one that broadcasts to it.
    bias_axis: int | None = None
    bias_scale: float = 1.0  #: what the operator multiplies the bias with.
    weight_scale: float = 1.0  #: what it multiplies the weight with; not 0.
    no_shift: str | None = None  #: why no shift may come in from before, if none may.
    geometry: Geometry | None = None  #: of a convolution or a linear layer, how it walks: what merging must know.
    absorbs: ClassVar[bool] = True

    def get_weight(self) -> Tensor:
        """The weight as it is viewed."""
        found = self.call.constant(self.weight)
        assert found is not None
        return found.reshape(tuple(self.view)) * self.weight_scale

    def get_bias(self) -> Tensor | None:
        """The bias with as many axes as the output, if there is one."""
        found = None if self.bias is None or self.call[self.bias] is None else self.call.constant(self.bias)
        if found is None:
            return None
        ndim = len(self.out)
        axis = ndim - found.ndim if self.bias_axis is None else self.bias_axis
        return found.reshape((1,) * axis + tuple(found.shape) + (1,) * (ndim - axis - found.ndim)) * self.bias_scale

    def relate(self, given: Mapping[str, Gauge], equations: Equations, shape: Shape) -> Gauge:
        """No relation between the two sides; each varies along the axes of the weight only."""
        self.read(given[self.data], equations)
        return equations.own([n if letters else 1 for n, letters in zip(shape, self.out)])

    def read(self, data: Gauge, equations: Equations) -> None:
        """What holds of the data."""
        unknown = [axis for axis, letters in enumerate(self.inp) if not letters]
        data = equations.uniform(data, unknown, "other-axis")
        equations.scale.pin(data.scale, "several-readers", (EMPTY,))
        if self.no_shift is not None:
            equations.shift.pin(data.base, self.no_shift)

    def without_bias(self, data: Gauge, made: Gauge, equations: Equations) -> None:
        """What must hold for no bias to be needed where there is no place for one."""
        equations.shift.pin(data.shift, "no-saving")
        equations.shift.pin(made.shift, "no-saving")

    def rewritten(self, given: Mapping[str, Affine], after: Affine) -> Rewritten:
        """See the class."""
        old, bias = self.get_weight(), self.get_bias()
        weight = old
        if self.data in given:
            before = given[self.data]
            weight = weight * self.on_weight(before.scale, self.inp)
            if before.has_shift:
                kept = set("".join(self.out))
                summed = [i for i, letter in enumerate(self.letters) if letter not in kept]
                moved = self._on_output((old * self.on_weight(before.shift, self.inp)).sum(summed, keepdim=True))
                bias = moved if bias is None else bias + moved
        weight = weight * self.on_weight(after.scale, self.out)
        if bias is not None or after.has_shift:
            bias = after.shift if bias is None else bias * after.scale + after.shift
        constants = {self.weight: weight.reshape(self.call.shape(self.weight)) / self.weight_scale}
        if bias is None:
            return Rewritten(constants)
        if self.bias is None:
            return Rewritten(constants, bias if bool((bias != 0).any()) else None)
        if self.bias_axis is not None:
            bias = bias.flatten().expand(self.call.size(self.bias_axis)).clone()
        return Rewritten({**constants, self.bias: bias / self.bias_scale})

    def on_weight(self, t: Tensor, axes: Sequence[str]) -> Tensor:
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
        shape = [prod(sizes[letter] for letter in letters) for letters in self.out]
        return moved.permute(where + rest).reshape(shape)


@dataclass(frozen=True)
class Recurrent(Semantics):
    """A recurrent layer: a contraction of its input by ``weights``, one per direction; its results stay as they are.

    ``weights``: for every direction the slots of the weight (..., rows, features) and of a bias (..., n*rows), which
    begins with that of the input; no slot, no shift. ``parts`` is n.
    """

    data: str
    weights: tuple[tuple[str, str | None], ...]
    get: Callable[[str], Tensor | None]
    parts: int = 1
    absorbs: ClassVar[bool] = True

    def relate(self, given: Mapping[str, Gauge], equations: Equations, shape: Shape) -> Gauge:
        """Its input varies along its features only; hidden states are pinned."""
        for slot, gauge in given.items():
            if slot == self.data:
                gauge = equations.uniform(gauge, range(gauge.scale.ndim - 1), "other-axis")
                equations.scale.pin(gauge.scale, "nonlinear", (EMPTY,))
                if any(bias is None for _, bias in self.weights):
                    equations.shift.pin(gauge.base, "no-saving")
            else:
                super().relate({slot: gauge}, equations, shape)
        return pinned(len(shape))

    def rewritten(self, given: Mapping[str, Affine], after: Affine) -> Rewritten:
        """``W' = W*a``, ``c' = c + W*b``."""
        if self.data not in given:
            return Rewritten()
        before, constants = given[self.data], {}
        scale, shift = before.scale.flatten(), before.shift.flatten()
        for weight, bias in self.weights:
            old = self.get(weight)
            assert old is not None
            constants[weight] = old * scale
            if bias is not None and before.has_shift:
                moved, own = old @ shift.expand(old.shape[-1]), self.get(bias)
                moved = pad(moved, (0, (self.parts - 1) * moved.shape[-1]))
                constants[bias] = moved if own is None else own + moved
        return Rewritten(constants)
