"""What an operator may answer, and the kinds that let nothing pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from torch import Tensor

from bnfold.affine import Affine
from bnfold.semantics.equations import Equations, Gauge, pinned

Shape = tuple[int, ...]


class Operands(Protocol):
    """One operator application, as a row sees it: a slot is the name of an operand, with an index for lists."""

    def __getitem__(self, name: str) -> Any:
        """The argument in a slot; None where it is empty."""

    def is_constant(self, slot: str) -> bool:
        """Whether what is in a slot depends on no input; an empty one does not."""

    def constant(self, slot: str) -> Tensor | None:
        """The float64 value of such a slot; None for another."""

    def shape(self, slot: str) -> Shape:
        """The shape of a slot's tensor."""

    def size(self, axis: int) -> int:
        """The size of the result along one axis."""

    @property
    def rank(self) -> int:
        """The number of axes of the result."""

    @property
    def out_shape(self) -> Shape:
        """The shape of the result."""


@dataclass(frozen=True)
class Rewritten:
    """Constants of an operator whose operands and result are stored in other gauges.

    Attributes:
        constants: float64 tensors that replace constant operands, by slot.
        add: float64 tensor to add to the operator's output, where it has no operand for a bias.
    """

    constants: Mapping[str, Tensor] = field(default_factory=dict)
    add: Tensor | None = None


class Semantics:
    """Base of the vocabulary. Of what is said here alone nothing passes."""

    reason: str = "nonlinear"
    #: Slots that are read for their shape alone.
    shape_only: tuple[str, ...] = ()
    #: Whether its constants can make up for gauges around it.
    absorbs: ClassVar[bool] = False

    def relate(self, given: Mapping[str, Gauge], equations: Equations, shape: Shape) -> Gauge:
        """The result's gauge, given those of the operands that are values; adds what must hold between them."""
        for gauge in given.values():
            equations.pin(gauge, self.reason)
        return pinned(len(shape))

    def rewritten(self, given: Mapping[str, Affine], after: Affine) -> Rewritten:
        """The constants, given ``v = given[slot](v')`` of stored operands v', to store ``after(y)`` in place of y."""
        return Rewritten()


@dataclass(frozen=True)
class Opaque(Semantics):
    """Nothing passes: nonlinear, random, data dependent, unknown, or an affine but for what it is configured to do.

    Attributes:
        reason: one of ``report.REASONS``.
        detail: more about it.
        kind: ``"batch_norm"`` for one that is none because of that, as with batch statistics.
    """

    reason: str = "nonlinear"
    detail: str = ""
    kind: str = ""


@dataclass(frozen=True)
class ShapeOnly(Semantics):
    """Reads the shape of its operand and none of its elements: never in the way."""

    shape_only: tuple[str, ...]
