"""One ONNX file against another that it claims to equal, by the same three questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bnfold.errors import BnfoldError, InputError
from bnfold.evaluate.evaluator import MissingOperatorError
from bnfold.evaluate.subject import Array, ValueInfo
from bnfold.gate.candidates import OnnxCandidate
from bnfold.gate.claims import FileClaim
from bnfold.gate.deployed import DEPLOYED, PLAIN, Sessions
from bnfold.gate.effort import DEAR, file_effort
from bnfold.gate.engines import Setting
from bnfold.gate.evidence import ELEMENT
from bnfold.gate.findings import Findings
from bnfold.gate.judge import Case, Judge, run_cases
from bnfold.gate.original import Original
from bnfold.gate.samples import Batch, provoke
from bnfold.gate.values import as_tensor, identical
from bnfold.report import CheckReport, SiteResult, Verdict
from bnfold.report.progress import Progress
from bnfold.runtime.model_file import read_model
from bnfold.runtime.runtime import resolve_device

#: Batches, each with the kinds of its samples, and what follows the first of them where a sample is dear.
PLAN: tuple[tuple[int, tuple[str, ...]], ...] = (
    (1, ("faint",)), (1, ("ordinary",)), (2, ("unit",)), (1, ("binary",)), (3, ("ordinary",)), (1, ("bytes",)),
    (1, ("outlier",)), (2, ("channel",)), (33, ("sparse",)),
)  # fmt: skip
FEW: tuple[tuple[int, tuple[str, ...]], ...] = ((3, ("outlier", "binary", "bytes")),)
#: Sizes of other dynamic axes, until the original runs: what nets with strides take, and what those without may.
SIZES = ((37, 41, 53), (64, 96, 160), (224, 256, 320), (1, 2, 3))
#: Elements of inputs beyond which a large batch is left out.
LARGE = 4_000_000


@dataclass
class FileGate:
    """One judgement. Build it, then ``judge``.

    Args:
        original: what the file was made from, or is compared with.
        path: the file.
        device: where the file is to run.
        data: samples by input name, in place of made ones.
    """

    original: Path
    path: Path
    device: Any = "cpu"
    seed: int = 0
    limit: float = 4.0
    data: Mapping[str, Array] | None = None
    progress: Progress = lambda stage, done, total: None
    findings: Findings = field(default_factory=Findings)

    def judge(self) -> CheckReport:
        """The verdict.

        Raises:
            BnfoldError: a file cannot be opened, or the original runs on none of the inputs made for it.
        """
        findings = self.findings
        claim: FileClaim | None = None
        try:
            reference, claim = self.opened()
        except MissingOperatorError as error:
            reference = Original(self.original, self.device)
            findings.doubts.append(f"{error.what}: the file is judged by what ONNX Runtime makes of it alone")
        if findings.problems:
            return self._report(None, [], [])
        cases = self.cases(reference)
        first = cases[0]
        if not all(map(identical, first.own, reference.own(first.batch))):
            raise InputError("it answers otherwise from run to run on the same inputs", where=str(self.original))
        judge = Judge(reference, cases, findings, self.limit)
        if claim is not None:
            judge.claim(claim)
            judge.report(claim.name)
        make = partial(self.candidate, reference)
        sessions = Sessions(judge, claim, make, resolve_device(self.device))
        provider = "none"
        try:
            sessions.run_plain()
            judge.report(PLAIN)
            candidate = make(optimized=True)
            provider = candidate.session.provider
            sessions.run_deployed(candidate)
            if (said := sessions.blame()) is not None:
                findings.problems.append(said)
            judge.report(DEPLOYED)
        except BnfoldError as error:
            findings.problems.append(f"ONNX Runtime: {error}")
        if not any(judge.compared.values()):
            findings.doubts.append("no output has an element to compare")
        return self._report(judge, cases, [], provider)

    def _report(
        self, judge: Judge | None, cases: Sequence[Case], sites: Sequence[SiteResult], provider: str = "none"
    ) -> CheckReport:
        found = self.findings
        found.once()
        verdict: Verdict = "fail" if found.problems else "inconclusive" if found.doubts else "pass"
        witnesses = dict.fromkeys(row.witness for row in judge.table.rows) if judge else {}
        outputs = [result for witness in witnesses for result in judge.results(witness)] if judge else []
        return CheckReport(
            verdict, provider, sum(c.batch.samples for c in cases), tuple(dict.fromkeys(c.batch.size for c in cases)),
            tuple(outputs), tuple(sites), 0.0, (*found.problems, *found.doubts), tuple(found.notes), None, self.limit,
            ELEMENT * self.limit,
        )  # fmt: skip

    # -- witnesses -------------------------------------------------------------------------------------------------

    def opened(self) -> tuple[Original, FileClaim]:
        """Both files in float64; what tells their inputs and outputs apart is a problem.

        Raises:
            BnfoldError: a file cannot be opened.
            MissingOperatorError: an operator of one has no implementation.
        """
        reference = Original(self.original, self.device)
        inputs = self._inputs(reference)
        model = read_model(self.path, light=True)
        claim = FileClaim(self.path, model, inputs, reference.outputs, {}, reference.epsilon, reference.halves)
        self._compare_signatures(reference, claim)
        return reference, claim

    def candidate(self, reference: Original, *, optimized: bool, disabled: Sequence[str] = ()) -> OnnxCandidate:
        """The file in ONNX Runtime."""
        return OnnxCandidate(
            self.path, setting=Setting(resolve_device(self.device)), optimized=optimized,
            inputs=self._inputs(reference), outputs=reference.outputs, disabled=disabled,
        )  # fmt: skip

    @staticmethod
    def _inputs(reference: Original) -> list[tuple[int, str]]:
        return [(i, value.name) for i, value in enumerate(reference.inputs)]

    def _compare_signatures(self, original: Original, claim: FileClaim) -> None:
        ours, theirs = claim.file, original.file
        for kind, mine, wanted in (("input", ours.inputs, theirs.inputs), ("output", ours.outputs, theirs.outputs)):
            if {v.name for v in mine} != {v.name for v in wanted}:
                self.findings.problems.append(
                    f"its {kind}s are {', '.join(v.name for v in mine)} and not {', '.join(v.name for v in wanted)}"
                )
            for value in mine:
                other = next((v for v in wanted if v.name == value.name), value)
                if value.dtype != other.dtype:
                    self.findings.problems.append(
                        f"{kind} '{value.name}' is {value.dtype.name} and not {other.dtype.name}"
                    )

    # -- inputs ----------------------------------------------------------------------------------------------------

    def cases(self, original: Original) -> list[Case]:
        """Cases that the original runs on: every kind of values, batch and size in turn.

        Raises:
            InputError: ONNX Runtime does not take it, or it runs on none of the inputs made for it.
        """
        original.open()
        cases: list[Case] = []
        known, reason = SIZES[0], ""
        todo = list(enumerate(PLAN))
        for turn, (count, kinds) in todo:
            self.progress("truth", turn, len(todo))
            notes = Findings()
            for sizes in dict.fromkeys((known, *SIZES)):
                batch = self._batch(original.inputs, turn, count, kinds, sizes)
                if batch is None:
                    break
                found, reason = run_cases(original, [batch], notes, lambda stage, done, total: None)
                if found:
                    known, notes = sizes, Findings()
                    cases += found
                    break
            if turn == 0 and cases and self.data is None and self._effort(original, cases[0]) > DEAR:
                dynamic = cases[0].batch.size > 0
                few = FEW if dynamic else [(1, (kind,)) for _, kinds in FEW for kind in kinds]
                todo[1:] = enumerate(few, 1)
            self.findings.notes += notes.notes[:1]
        if not cases:
            raise InputError(
                f"it runs on none of the inputs made for it: {reason}", where=str(self.original),
                hint="Give real ones: --data",
            )  # fmt: skip
        return cases

    @staticmethod
    def _effort(original: Original, case: Case) -> float:
        """What one sample costs, in operations."""
        shapes = {value.name: x.shape for value, x in zip(original.inputs, case.batch.flat)}
        shapes |= {name: weight.shape for name, weight in original.file.weights().items()}
        return file_effort(original.file.nodes(), {**shapes, **case.truth.shapes}, case.batch.samples)

    def _batch(
        self, inputs: Sequence[ValueInfo], turn: int, count: int, kinds: Sequence[str], sizes: Sequence[int]
    ) -> Batch | None:
        """Inputs of some kinds, sample by sample; None where they would be too many."""
        flat: list[Any] = []
        named: dict[str, int] = {}
        rng, generator = np.random.default_rng((self.seed, turn)), torch.Generator().manual_seed(self.seed + turn)
        rows = max((len(x) for x in (self.data or {}).values()), default=0)
        dynamic = False
        for value in inputs:
            shape: list[int] = []
            for axis, size in enumerate(value.shape):
                if not isinstance(size, int) or size < 0:
                    key = size or f"{value.name}.{axis}"
                    made = count if axis == 0 else sizes[(turn + len(named)) % len(sizes)]
                    dynamic |= axis == 0
                    size = named.setdefault(str(key), made)
                shape.append(size)
            if count > 3 and np.prod(shape, dtype=float) > LARGE:
                return None
            if self.data is not None and value.name in self.data and kinds[0] == "ordinary":
                given = self.data[value.name]
                picked = np.arange(turn * 7, turn * 7 + (shape[0] if shape else 1)) % max(rows, 1)
                flat.append(as_tensor(np.ascontiguousarray(given[picked]).astype(value.dtype)))
            elif value.dtype.kind in "iub":
                flat.append(as_tensor(np.asarray(rng.random(shape) > 0.5).astype(value.dtype)))
            else:
                values = torch.from_numpy(np.asarray(rng.standard_normal(shape)))
                if values.numel() > 1:  # a number alone is a parameter, as a scale is one
                    values = provoke(values, values, kinds, generator, batched=len(kinds) > 1)
                flat.append(as_tensor(values.numpy().astype(value.dtype)))
        if count > 3 and not dynamic:
            return None
        size = flat[0].shape[0] if flat and flat[0].ndim and dynamic else 0
        words = ", ".join(f"{name}={size}" for name, size in named.items() if size != count)
        origin = "mixed inputs" if len(kinds) > 1 else "" if kinds[0] == "ordinary" else f"{kinds[0]} inputs"
        return Batch(tuple(flat), size, words, origin)
