"""What a model takes and gives, its operators, the ranges of its weights, and what became of every affine of it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from statistics import median
from typing import ClassVar, Literal

from bnfold.report.plain import plain, revived, table

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
    """One operator of the model before or after folding."""

    kind: str  #: ``"conv2d"``, or an ONNX operator; ``"input"`` and ``"output"`` for those of the model.
    module: str  #: the qualified name of its module.
    reads: tuple[int, ...]  #: the operators that it reads, by their place in the list.
    fate: Fate  #: what became of it.

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
    """A tensor that goes into a model or comes out of it."""

    role: Role  #: ``"input"`` or ``"output"``.
    name: str  #: as the file has it.
    dtype: str  #: ``"float32"``.
    #: a number where a size is fixed, a name or an expression of names where it is dynamic.
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        sizes = (str(size) if len(str(size)) <= _LONGEST else "…" for size in self.shape)
        return f"{self.name} {self.dtype}[{', '.join(sizes)}]"


@dataclass(frozen=True)
class WeightRange:
    """How far the weights of one layer reach."""

    maxima: tuple[float, ...]  #: the largest absolute weight of every output channel.
    input_spread: float  #: ``spread``, of the input channels.
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
        """The largest maximum over the median one; 1 where nothing lives."""
        return self.largest / self.median if self.median else 1.0

    @property
    def fits_int8(self) -> bool:
        """Whether one step for the whole tensor leaves its typical channels more than four of eight bits."""
        return max(self.spread, self.input_spread) <= SPREAD_LIMIT

    def _live(self) -> list[float]:
        return [maximum for maximum in self.maxima if 0 < maximum < math.inf]


@dataclass(frozen=True)
class LayerRange:
    """The weights of one contraction before and after folding, and what it reads."""

    value: str  #: name of the contraction's output in the folded graph.
    module: str  #: the module that it belongs to.
    before: WeightRange | None  #: its weights in the unfolded model; None for a layer that a merge made.
    after: WeightRange  #: its weights in the folded model.
    #: lowest and highest activation that it reads, estimated from the BatchNorm in front of it (``beta`` and six times
    #: ``gamma`` to either side, through what lies between); None where there is none, and for a merge.
    reads: tuple[float, float] | None = None
    derived: ClassVar[tuple[str, ...]] = ("spoiled",)

    @property
    def spoiled(self) -> bool:
        """Whether folding makes per-tensor int8 hopeless: ``after`` is spread too far, ``before`` was not."""
        return not self.after.fits_int8 and (self.before is None or self.before.fits_int8)


@dataclass(frozen=True)
class NormRange:
    """What one BatchNorm multiplies every channel with, and what it adds."""

    value: str  #: name of its output in the captured graph.
    module: str  #: the module that it belongs to.
    scale: tuple[float, ...]  #: ``gamma / sqrt(var + eps)`` of every channel.
    shift: tuple[float, ...]  #: ``beta - mean * scale`` of every channel.


#: Why an affine stays, and what the user can do about it.
REASONS: dict[str, tuple[str, str]] = {code: (row["why"], row["way_out"]) for code, row in table("reasons").items()}
Outcome = Literal["backward", "forward", "merged", "left"]


@dataclass(frozen=True)
class Refusal:
    """Why an affine cannot go one way."""

    reason: str  #: a key of ``REASONS``.
    blocker: str  #: the module, or failing that the operator, in the way.
    operator: str = ""  #: the operator in the way, as ``aten.relu``.
    detail: str = ""  #: the same in words for this case.
    chain: tuple[str, ...] = ()  #: modules or operators between the affine and what is in the way.


@dataclass(frozen=True)
class Entry:
    """What became of one affine."""

    value: str  #: name of the affine's output in the captured graph.
    module: str  #: qualified name of the module it belongs to.
    layer: str  #: class name of that module.
    kind: str  #: ``"batch_norm"``, ``"mul"``, ``"add"`` or ``"div"``.
    outcome: Outcome  #: went ``backward``, went ``forward``, was ``merged`` with a parallel branch, or is ``left``.
    into: tuple[str, ...] = ()  #: what absorbed it, as module names (operator names where there is no module).
    through: tuple[str, ...] = ()  #: the operators it passed on the way.
    refusals: tuple[Refusal, ...] = ()  #: where it is left, why it could go neither backward nor forward.
    #: name of the value in the folded graph that takes its place, and of the value in the captured graph that it must
    #: equal; the gate compares them.
    site: tuple[tuple[str, str], ...] = ()

    @property
    def is_batch_norm(self) -> bool:
        """Whether it is (part of) a BatchNorm, a frozen one's arithmetic included, not a bare multiply or add."""
        return self.kind == "batch_norm" or "BatchNorm" in self.layer


@dataclass(frozen=True)
class Merge:
    """Linear maps that became one."""

    value: str  #: name of the value in the folded graph that takes their place.
    kind: str  #: ``"parallel"`` (a sum), ``"serial"`` (one after the other) or ``"joined"`` (a concatenation).
    modules: tuple[str, ...]  #: the modules that were merged; ``into`` is the one that stays.
    into: str
    values: tuple[str, ...]  #: names of the values that are gone.
    operators: int  #: how many operators fewer.
    multiply_adds: int  #: how many multiply-adds fewer per sample (per position for a linear layer).
    site: tuple[tuple[str, str], ...] = ()  #: as an Entry's.


@dataclass(frozen=True)
class Change:
    """What becomes of a module when its model's class is to express a fold."""

    module: str  #: its qualified name.
    #: an ``"identity"`` takes its place, its own ``"child"`` does, it gains a ``"parameter"``, or it is a BatchNorm
    #: with running ``"statistics"``, which it gains where its class builds it without.
    kind: Literal["identity", "child", "parameter", "statistics"]
    name: str = ""  #: of the child or of the parameter.
    shape: tuple[int, ...] = ()  #: of the parameter.


@dataclass(frozen=True)
class Scaled:
    """A layer whose output channels were divided by what its readers' input channels were multiplied with."""

    value: str  #: name of its output.
    module: str  #: the layer.
    into: tuple[str, ...]  #: the layers that read it.
    largest: float  #: the largest of the scales and their reciprocals; powers of two.
    site: tuple[tuple[str, str], ...] = ()  #: as an Entry's.


@dataclass(frozen=True)
class Ledger:
    """One entry per affine of the model, in the order of the captured graph, and one per merge.

    ``changes`` says how a model's own class expresses the folds; None where that was not asked for.
    """

    entries: tuple[Entry, ...] = ()
    merges: tuple[Merge, ...] = ()
    changes: tuple[Change, ...] | None = None
    #: Layers that were equalised with what reads them.
    scaled: tuple[Scaled, ...] = ()

    @property
    def left(self) -> tuple[Entry, ...]:
        """The affines that are still there."""
        return tuple(e for e in self.entries if e.outcome == "left")

    @property
    def folded(self) -> tuple[Entry, ...]:
        """The affines that are gone."""
        return tuple(e for e in self.entries if e.outcome != "left")

    @property
    def batch_norms(self) -> tuple[Entry, ...]:
        """The entries of BatchNorms; a frozen one, written as a multiply and an add, has two."""
        return tuple(e for e in self.entries if e.is_batch_norm)

    def count(self) -> tuple[int, int]:
        """How many BatchNorms are folded, and how many there were."""
        groups = self.grouped()
        return sum(all(e.outcome != "left" for e in group) for group in groups), len(groups)

    def grouped(self) -> list[list[Entry]]:
        """The entries of every BatchNorm: one, or two for a frozen one."""
        groups: dict[tuple[str, str], list[Entry]] = {}
        for entry in self.batch_norms:
            groups.setdefault((entry.module, entry.value if entry.kind == "batch_norm" else "frozen"), []).append(entry)
        return list(groups.values())

    @property
    def sites(self) -> dict[str, str]:
        """Folded value -> the captured value that it must equal."""
        everything: tuple[Entry | Merge | Scaled, ...] = (*self.entries, *self.merges, *self.scaled)
        return {folded: captured for item in everything for folded, captured in item.site}

    def to_json(self, indent: int | None = None) -> str:
        """The ledger as JSON, for ``from_json``."""
        return json.dumps(plain(self), indent=indent, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Ledger:
        """The ledger that ``to_json`` wrote; ValueError where the text is none."""
        try:
            found = json.loads(text)
            ledger: Ledger = revived(cls, {"entries": found["entries"], **found})
            return ledger
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"this is no ledger ({type(error).__name__}: {error})") from error
