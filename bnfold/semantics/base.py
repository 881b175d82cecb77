"""What an operator may answer, and the kinds that let nothing pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from bnfold.affine import Affine
from bnfold.semantics.equations import Equations, Gauge, pinned

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Rewritten:
    """Constants of an operator whose operands and result are stored in other gauges, float64."""

    constants: Mapping[str, Tensor] = field(default_factory=dict)  #: those that replace constant operands, by slot.
    add: Tensor | None = None  #: what is added to the operator's output, where it has no operand for a bias.


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
    """Nothing passes: nonlinear, random, data dependent, unknown, or an affine but for what it is configured to do."""

    reason: str = "nonlinear"  #: one of ``report.REASONS``.
    detail: str = ""  #: more about it.
    kind: str = ""  #: ``"batch_norm"`` for one that is none because of that, as with batch statistics.


@dataclass(frozen=True)
class ShapeOnly(Semantics):
    """Reads the shape of its operand and none of its elements: never in the way."""

    shape_only: tuple[str, ...]
