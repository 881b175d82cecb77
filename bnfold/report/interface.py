"""What a model takes and gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

#: Letters of an expression that a line shows; ``shape`` has all of it.
_LONGEST = 24
Role = Literal["input", "output"]


@dataclass(frozen=True)
class Port:
    """A tensor that goes into a model or comes out of it.

    Attributes:
        role: ``"input"`` or ``"output"``.
        name: as the file has it.
        dtype: ``"float32"``.
        shape: a number where a size is fixed, a name or an expression of names where it is dynamic.
    """

    role: Role
    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        sizes = (str(size) if len(str(size)) <= _LONGEST else "…" for size in self.shape)
        return f"{self.name} {self.dtype}[{', '.join(sizes)}]"
