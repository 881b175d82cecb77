"""Whatever can be run and judged: a witness of what a model computes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy.typing as npt

from bnfold.runtime.session import ValueInfo

__all__ = ["Array", "Run", "Subject", "Turn", "ValueInfo"]

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Turn:
    """Where a run that follows somebody else's decisions meets one; ``different`` is 0 where it decides alike.

    Attributes:
        value: the value that holds the decision; ``operator`` is what decides.
        gap: how far what is compared lies from where the decision that was followed would be right; of its shape.
        different: how many decisions differ.
        compared: what is compared.
    """

    value: str
    operator: str
    gap: Any
    different: int
    compared: Any


@dataclass(frozen=True)
class Run:
    """One run: the outputs in order, the values that were to be kept and the decisions, by name, and the turns.

    ``shapes`` are those of all values, by name, where the run has them.
    """

    outputs: tuple[Any, ...]
    kept: Mapping[str, Any] = field(default_factory=dict)
    decided: Mapping[str, Any] = field(default_factory=dict)
    turns: tuple[Turn, ...] = ()
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


class Subject(Protocol):
    """A model as something that runs: inputs with name, dtype and symbolic shape -> outputs."""

    @property
    def name(self) -> str:
        """What reports call it."""

    @property
    def inputs(self) -> tuple[ValueInfo, ...]:
        """In the model's order."""

    @property
    def outputs(self) -> tuple[ValueInfo, ...]:
        """In the model's order."""

    def run(self, inputs: Mapping[str, Array], keep: Collection[str] = ()) -> Run:
        """Outputs, and those of the values named in ``keep`` that it has.

        Raises:
            BnfoldError: it does not run on these inputs.
        """
