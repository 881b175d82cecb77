"""Which inputs of a dear model need no float64: those on which its file, as it is deployed, is the model itself.

Both compute in float32 then, and are apart by what rounding on the way does, which no bound tells beforehand. How far
that is, in multiples of what rounding the constants does, is seen on the first input. That one is judged in float64
whatever is found here; where another one leaves a doubt, so is that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bnfold.gate.candidates import OnnxCandidate
from bnfold.gate.evidence import NEIGHBOURS, SLACK, Draws, Row, Source, compare, unit_roundoff
from bnfold.gate.models import Model
from bnfold.gate.samples import Batch
from bnfold.gate.values import numbers

#: How many times as far apart as on the first input the two may be in the RMS: over six nets it was 1.0 to 2.5 times,
#: in a seventh 3.1. An element may be off as any other of a run in ONNX Runtime.
APART = 3.0


class Screen:
    """Clears inputs, one after another.

    The model is one whose rounding is drawn in float32, and which decides nothing; the candidate its file as deployed.

    Attributes:
        outputs, drawn: what the candidate returned, and what rounding the model's constants does, where that is known.
        rows, cleared: what was seen on inputs that were cleared; these, with what the model answers.
    """

    def __init__(self, model: Model, candidate: OnnxCandidate, limit: float) -> None:
        self._model, self._candidate, self._limit = model, candidate, limit
        self._apart: dict[str, float] = {}
        self.outputs: dict[Batch, list[Any]] = {}
        self.drawn: dict[Batch, Draws] = {}
        self.rows: list[Row] = []
        self.cleared: list[tuple[Batch, list[Tensor]]] = []

    def clears(self, batch: Batch, own: list[Tensor], *, first: bool) -> bool:
        """Whether a batch, on which the model answers ``own``, needs no float64; the ``first`` one always does."""
        if not first and not self._apart:
            return False
        try:
            given = self.outputs[batch] = self._candidate.run(batch.flat)
        except Exception:  # which is told where that batch is judged
            return False
        rows = self._rows(batch, own, numbers(given), first=first)
        if first:
            self._apart = {row.value: max(row.ratio, 1.0) for row in rows}
        elif rows and all(row.ratio <= APART / SLACK and row.misfit(self._limit) <= 1 for row in rows):
            self.rows += rows
            self.cleared.append((batch, own))
            return True
        return False

    def close(self) -> None:
        """Frees the candidate's session."""
        self._candidate.close()

    def _rows(self, batch: Batch, own: list[Tensor], given: list[Tensor], *, first: bool) -> list[Row]:
        """How far apart the two are; none where no number says that."""
        model, rows = self._model, list[Row]()
        floats = [x for x in own if x.is_floating_point()]
        alike = [(x.shape, x.dtype) for x in given] == [(x.shape, x.dtype) for x in own]
        few = not floats or any(x.numel() < NEIGHBOURS for x in floats)  # of so few the RMS is chance
        if not alike or few or not all(bool(x.isfinite().all()) for x in (*own, *given)):
            return []
        unknown = Source([], lambda seed: [])  # but in float64
        draws = Draws([Source(own, lambda seed: model.loudly(batch, seed).outputs, model.louder, unknown)])
        draws.more(0)
        if draws.chaotic:
            return []
        self.drawn[batch] = draws
        for i, (name, value, mine) in enumerate(zip(model.outputs, given, own)):
            seen: Any = 0.0, 0.0
            if mine.is_floating_point():
                seen = compare(
                    value, mine.double(), draws.noise(i), unit=unit_roundoff(mine.dtype), batched=batch.leads(mine),
                    coarser=1.0 if first else SLACK * self._apart.get(name, 0.0), draws=draws.count,
                )  # fmt: skip
            elif not torch.equal(value, mine):
                return []
            elements = mine.numel() if mine.is_floating_point() else 0
            rows.append(Row(batch.words, self._candidate.name, name, *seen, elements=elements, samples=batch.samples))
        return rows
