"""What became of every affine, and the closed list of reasons why one stays."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal

from bnfold.report.plain import plain, revived, table

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
