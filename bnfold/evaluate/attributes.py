"""The attributes of a node, as the rows of the table read them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

#: What computes an operator, from its attributes and its inputs.
Row = Callable[..., Any]


@dataclass(frozen=True)
class Attributes:
    """The attributes of one node, ``None`` for one that is not there."""

    values: dict[str, Any]
    opset: int
    outputs: int

    def __getattr__(self, name: str) -> Any:
        return self.values.get(name)
