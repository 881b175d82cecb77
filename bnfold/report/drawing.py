"""The operators of a model, and what became of each: what a picture of a fold is drawn from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

#: ``kept``: as it was. ``folded``, ``merged``: no longer there. ``changed``: it took something in. ``left``: an affine
#: that stays. ``new``: it was not there before.
Fate = Literal["kept", "folded", "merged", "changed", "left", "new"]


@dataclass(frozen=True)
class Operator:
    """One operator of the model before or after folding.

    Attributes:
        kind: ``"conv2d"``, or an ONNX operator; ``"input"`` and ``"output"`` for those of the model.
        module: the qualified name of its module.
        reads: the operators that it reads, by their place in the list.
        fate: what became of it.
    """

    kind: str
    module: str
    reads: tuple[int, ...]
    fate: Fate

    @property
    def before(self) -> bool:
        """Whether the unfolded model has it."""
        return self.fate != "new" and self.kind not in ("input", "output")

    @property
    def after(self) -> bool:
        """Whether the folded model has it."""
        return self.fate not in ("folded", "merged") and self.kind not in ("input", "output")
