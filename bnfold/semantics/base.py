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
class No:
    """Why something cannot be; ``reason`` is one of ``report.REASONS``."""

    reason: str
    detail: str = ""


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
    """Base of the vocabulary, and its last word: *Opaque*, which lets nothing pass."""

    reason: ClassVar[str] = "nonlinear"
    #: Slots that are read for their shape alone.
    shape_only: tuple[str, ...] = ()
    #: Whether its constants can make up for gauges around it.
    absorbs: ClassVar[bool] = False

    def relate(self, given: Mapping[str, Gauge], equations: Equations, shape: Shape) -> Gauge:
        """The result's gauge, given those of the operands that are values; adds what must hold between them."""
        for gauge in given.values():
            pin(equations, gauge, self.reason)
        return pinned(len(shape))

    def rewritten(self, given: Mapping[str, Affine], after: Affine) -> Rewritten:
        """The constants, given ``v = given[slot](v')`` of stored operands v', to store ``after(y)`` in place of y."""
        return Rewritten()


def pin(equations: Equations, gauge: Gauge, reason: str) -> None:
    """A value is stored as it is."""
    equations.scale.pin(gauge.scale, reason)
    equations.shift.pin(gauge.base, reason)


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


@dataclass(frozen=True)
class ShapeOnly(Semantics):
    """Reads the shape of its operand and none of its elements: never in the way."""

    slot: str

    @property
    def shape_only(self) -> tuple[str, ...]:  # type: ignore[override]
        """Its only operand."""
        return (self.slot,)
