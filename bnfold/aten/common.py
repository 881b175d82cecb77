"""What the rows of the table share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from bnfold.semantics import Opaque, Semantics

if TYPE_CHECKING:
    from bnfold.call import Call

Row = Callable[["Call"], Semantics]
OPAQUE = Opaque()


def constant_operands(call: Call, *slots: str) -> bool:
    """Whether every one of the slots is empty or depends on no input."""
    return all(call[slot] is None or call.graph.is_constant(call[slot]) for slot in slots)
