"""What the rows of the table share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from bnfold.semantics import Opaque, Semantics

if TYPE_CHECKING:
    from bnfold.graph.call import Call

Row = Callable[["Call"], Semantics]
OPAQUE = Opaque()


def per_axis(call: Call, name: str, axes: int) -> tuple[int, ...]:
    """An argument that gives one number per spatial axis, or one for all of them."""
    value = call.concrete(name) if name in call else []
    values = [value] if isinstance(value, int) else list(value or [])
    return tuple(values * axes if len(values) == 1 else values)


def constant_operands(call: Call, *slots: str) -> bool:
    """Whether every one of the slots is empty or depends on no input."""
    return all(call[slot] is None or call.graph.is_constant(call[slot]) for slot in slots)
