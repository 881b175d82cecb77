"""What a model takes and gives, its operators, and the ranges of its weights and activations."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median
from typing import ClassVar, Literal

#: ``kept``: as it was. ``folded``, ``merged``: no longer there. ``changed``: it took something in. ``left``: an affine
#: that stays. ``new``: it was not there before.
Fate = Literal["kept", "folded", "merged", "changed", "left", "new"]
Role = Literal["input", "output"]
#: Letters of an expression that a line shows; ``shape`` has all of it.
_LONGEST = 24
#: Per-tensor int8 is hopeless where the widest channel is more than this many times the typical one; see
#: ``bnfold.statistics.ranges`` for the reason.
SPREAD_LIMIT = 16.0


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


@dataclass(frozen=True)
class WeightRange:
    """How far the weights of one layer reach.

    Attributes:
        maxima: the largest absolute weight of every output channel.
        input_spread: ``spread``, of the input channels.
        channels: how many output channels there are, ``dead`` ones of nothing but zeros among them.
        smallest: of the maxima of channels that are not dead, as ``median`` and ``largest``.
        spread: the largest maximum over the median one; 1 where nothing lives.
    """

    maxima: tuple[float, ...]
    input_spread: float
    derived: ClassVar[tuple[str, ...]] = ("channels", "dead", "smallest", "median", "largest", "spread")

    @property
    def channels(self) -> int:
        """How many output channels there are."""
        return len(self.maxima)

    @property
    def dead(self) -> int:
        """How many of them hold nothing but zeros."""
        return sum(maximum == 0 for maximum in self.maxima)

    @property
    def smallest(self) -> float:
        """The smallest maximum of a live channel."""
        return min(self._live(), default=0.0)

    @property
    def median(self) -> float:
        """The typical maximum of a live channel."""
        live = self._live()
        return median(live) if live else 0.0

    @property
    def largest(self) -> float:
        """The largest maximum."""
        return max(self._live(), default=0.0)

    @property
    def spread(self) -> float:
        """The largest maximum over the median one."""
        return self.largest / self.median if self.median else 1.0

    @property
    def fits_int8(self) -> bool:
        """Whether one step for the whole tensor leaves its typical channels more than four of eight bits."""
        return max(self.spread, self.input_spread) <= SPREAD_LIMIT

    def _live(self) -> list[float]:
        return [maximum for maximum in self.maxima if 0 < maximum < math.inf]


@dataclass(frozen=True)
class LayerRange:
    """The weights of one contraction before and after folding, and what it reads.

    Attributes:
        value: name of the contraction's output in the folded graph.
        module: the module that it belongs to.
        before: its weights in the unfolded model; None for a layer that a merge made.
        after: its weights in the folded model.
        reads: lowest and highest activation that it reads, estimated from the BatchNorm in front of it (``beta`` and
            six times ``gamma`` to either side, through what lies between); None where there is none, and for a merge.
        spoiled: folding makes per-tensor int8 hopeless: ``after`` is spread too far, ``before`` was not.
    """

    value: str
    module: str
    before: WeightRange | None
    after: WeightRange
    reads: tuple[float, float] | None = None
    derived: ClassVar[tuple[str, ...]] = ("spoiled",)

    @property
    def spoiled(self) -> bool:
        """Whether folding makes per-tensor int8 hopeless."""
        return not self.after.fits_int8 and (self.before is None or self.before.fits_int8)


@dataclass(frozen=True)
class NormRange:
    """What one BatchNorm multiplies every channel with, and what it adds.

    Attributes:
        value: name of its output in the captured graph.
        module: the module that it belongs to.
        scale: ``gamma / sqrt(var + eps)`` of every channel.
        shift: ``beta - mean * scale`` of every channel.
    """

    value: str
    module: str
    scale: tuple[float, ...]
    shift: tuple[float, ...]
