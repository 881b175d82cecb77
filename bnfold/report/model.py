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


#: Why an affine stays, and what the user can do about it.
REASONS: dict[str, tuple[str, str]] = {code: (row["why"], row["way_out"]) for code, row in table("reasons").items()}
Outcome = Literal["backward", "forward", "merged", "left"]


@dataclass(frozen=True)
class Refusal:
    """Why an affine cannot go one way.

    Attributes:
        reason: a key of ``REASONS``.
        blocker: the module, or failing that the operator, in the way.
        operator: the operator in the way, as ``aten.relu``.
        detail: the same in words for this case.
        chain: modules or operators between the affine and what is in the way.
    """

    reason: str
    blocker: str
    operator: str = ""
    detail: str = ""
    chain: tuple[str, ...] = ()


@dataclass(frozen=True)
class Entry:
    """What became of one affine.

    Attributes:
        value: name of the affine's output in the captured graph.
        module: qualified name of the module it belongs to.
        layer: class name of that module.
        kind: ``"batch_norm"``, ``"mul"``, ``"add"`` or ``"div"``.
        outcome: went ``backward``, went ``forward``, was ``merged`` with a parallel branch, or is ``left``.
        into: what absorbed it, as module names (operator names where there is no module).
        through: the operators it passed on the way.
        refusals: where it is left, why it could go neither backward nor forward.
        site: name of the value in the folded graph that takes its place, and of the value in the captured graph that
            it must equal; the gate compares them.
    """

    value: str
    module: str
    layer: str
    kind: str
    outcome: Outcome
    into: tuple[str, ...] = ()
    through: tuple[str, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    site: tuple[tuple[str, str], ...] = ()

    @property
    def is_batch_norm(self) -> bool:
        """Whether it is (part of) a BatchNorm, a frozen one's arithmetic included, not a bare multiply or add."""
        return self.kind == "batch_norm" or "BatchNorm" in self.layer


@dataclass(frozen=True)
class Merge:
    """Linear maps that became one.

    Attributes:
        value: name of the value in the folded graph that takes their place.
        kind: ``"parallel"`` (a sum), ``"serial"`` (one after the other) or ``"joined"`` (a concatenation).
        modules: the modules that were merged; ``into`` is the one that stays.
        values: names of the values that are gone.
        operators: how many operators fewer.
        multiply_adds: how many multiply-adds fewer per sample (per position for a linear layer).
        site: as an Entry's.
    """

    value: str
    kind: str
    modules: tuple[str, ...]
    into: str
    values: tuple[str, ...]
    operators: int
    multiply_adds: int
    site: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Change:
    """What becomes of a module when its model's class is to express a fold.

    Attributes:
        module: its qualified name.
        kind: an ``"identity"`` takes its place, its own ``"child"`` does, it gains a ``"parameter"``, or it is a
            BatchNorm with running ``"statistics"``, which it gains where its class builds it without.
        name: of the child or of the parameter.
        shape: of the parameter.
    """

    module: str
    kind: Literal["identity", "child", "parameter", "statistics"]
    name: str = ""
    shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class Scaled:
    """A layer whose output channels were divided by what its readers' input channels were multiplied with.

    Attributes:
        value: name of its output.
        module: the layer.
        into: the layers that read it.
        largest: the largest of the scales and their reciprocals; powers of two.
        site: as an Entry's.
    """

    value: str
    module: str
    into: tuple[str, ...]
    largest: float
    site: tuple[tuple[str, str], ...] = ()


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
        """The ledger that ``to_json`` wrote.

        Raises:
            ValueError: the text is not one.
        """
        try:
            found = json.loads(text)
            ledger: Ledger = revived(cls, {"entries": found["entries"], **found})
            return ledger
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"this is no ledger ({type(error).__name__}: {error})") from error
