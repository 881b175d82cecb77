"""Questions, answers and the kinds that let nothing pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

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
