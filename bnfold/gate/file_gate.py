"""One ONNX file against another that it claims to equal, by the same three questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnfold.errors import BnfoldError, InputError, LowerError
from bnfold.evaluate.evaluator import MissingOperatorError
from bnfold.evaluate.subject import Array
from bnfold.gate.candidates import DEPLOYED, PLAIN, OnnxCandidate, Setting
from bnfold.gate.deployed import Sessions
from bnfold.gate.effort import DEAR, file_effort
from bnfold.gate.findings import Findings
from bnfold.gate.gate import LIMIT
from bnfold.gate.judge import Case, Judge, run_cases
from bnfold.gate.samples import Batch, provoke
from bnfold.gate.values import as_tensor, identical
from bnfold.gate.witnesses import FileWitness
from bnfold.report import CheckReport
from bnfold.report.progress import Progress, silent
from bnfold.runtime.runtime import Device, resolve_device

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


class Original(FileWitness):
    """A file that another one is compared with: in float64, and as ONNX Runtime runs it without optimisations."""

    def __init__(self, path: Path, device: Device | str) -> None:
        super().__init__(path)
        setting = Setting(resolve_device(device))
        self._session = OnnxCandidate(path, setting=setting, optimized=False, inputs=self.inputs, outputs=self.outputs)

    def open(self) -> None:
        """Opens it in ONNX Runtime.

        Raises:
            InputError: ONNX Runtime does not take it.
        """
        try:
            self._session.session  # noqa: B018  # opened on first use
        except LowerError as error:
            raise InputError(
                f"ONNX Runtime does not run the original: {error.what}", where=str(self.path),
                hint="--no-check folds it unproved",
            ) from error  # fmt: skip

    def own(self, batch: Batch) -> list[Tensor]:
        """As ``Witness.own``; it must be open."""
        return self._session.run(batch.flat)


@dataclass
class FileGate:
    """One judgement: ``path`` against what it was made from. Build it, then ``judge``.

    ``data`` are samples by input name, in place of made ones.
    """

    original: Path
    path: Path
    device: Any = "cpu"
    seed: int = 0
    limit: float = LIMIT
    data: Mapping[str, Array] | None = None
    progress: Progress = silent
    findings: Findings = field(default_factory=Findings)

    def judge(self) -> CheckReport:
        """The verdict.

        Raises:
            BnfoldError: a file cannot be opened, or the original runs on none of the inputs made for it.
        """
        findings, claim = self.findings, None
        try:
            claim = self.open()
        except MissingOperatorError as error:
            self.reference = Original(self.original, self.device)
            findings.doubts.append(f"{error.what}: the file is judged by what ONNX Runtime makes of it alone")
        if findings.problems:
            return Judge(self.reference, [], findings, self.limit).verdict("none", [])
        cases, provider = self.cases(), "none"
        first = cases[0]
        if not all(map(identical, first.own, self.reference.own(first.batch))):
            raise InputError("it answers otherwise from run to run on the same inputs", where=str(self.original))
        judge = Judge(self.reference, cases, findings, self.limit)
        if claim is not None:
            judge.claim(claim)
            judge.report(claim.name)
        sessions = Sessions(judge, claim, self.onnx, resolve_device(self.device))
        try:
            sessions.run_plain()
            judge.report(PLAIN)
            candidate = self.onnx(optimized=True)
            provider = candidate.session.provider
            sessions.run_deployed(candidate)
            if (said := sessions.blame()) is not None:
                findings.problems.append(said)
            judge.report(DEPLOYED)
        except BnfoldError as error:
            findings.problems.append(f"ONNX Runtime: {error}")
        if not any(row.shown for row in judge.table):
            findings.doubts.append("no output has an element to compare")
        return judge.verdict(provider, [case.batch for case in cases])

    # -- witnesses -------------------------------------------------------------------------------------------------

    def open(self) -> FileWitness:
        """The file in float64, and the original as ``reference``; what tells them apart from outside is a problem.

        Raises:
            BnfoldError: a file cannot be opened.
            MissingOperatorError: an operator of one has no implementation.
        """
        theirs = self.reference = Original(self.original, self.device)
        mine = FileWitness(self.path, None, theirs.inputs, theirs.outputs, {}, theirs)
        pairs = (("input", mine.file.inputs, theirs.file.inputs), ("output", mine.file.outputs, theirs.file.outputs))
        for kind, values, wanted in pairs:
            known = {value.name: value for value in wanted}
            if {value.name for value in values} != known.keys():
                self.findings.problems.append(
                    f"its {kind}s are {', '.join(v.name for v in values)} and not {', '.join(v.name for v in wanted)}"
                )
            self.findings.problems += [
                f"{kind} '{value.name}' is {value.dtype.name} and not {other.dtype.name}"
                for value in values if (other := known.get(value.name, value)).dtype != value.dtype
            ]  # fmt: skip
        return mine

    def onnx(self, *, optimized: bool, disabled: Sequence[str] = ()) -> OnnxCandidate:
        """The file in ONNX Runtime."""
        return OnnxCandidate(
            self.path, setting=Setting(resolve_device(self.device)), optimized=optimized,
            inputs=self.reference.inputs, outputs=self.reference.outputs, disabled=disabled,
        )  # fmt: skip

    # -- inputs ----------------------------------------------------------------------------------------------------

    def cases(self) -> list[Case]:
        """Cases that the original runs on: every kind of values, batch and size in turn.

        Raises:
            InputError: ONNX Runtime does not take it, or it runs on none of the inputs made for it.
        """
        self.reference.open()
        cases: list[Case] = []
        known, reason = SIZES[0], ""
        todo = list(enumerate(PLAN))
        for turn, (count, kinds) in todo:
            self.progress("truth", turn, len(todo))
            notes = Findings()
            for sizes in dict.fromkeys((known, *SIZES)):
                batch = self._batch(turn, count, kinds, sizes)
                if batch is None:
                    break
                found, reason = run_cases(self.reference, [batch], notes, silent)
                if found:
                    known, notes = sizes, Findings()
                    cases += found
                    break
            if turn == 0 and cases and self.data is None and self._effort(cases[0]) > DEAR:
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

    def _effort(self, case: Case) -> float:
        """What one sample costs, in operations."""
        file = self.reference.file
        shapes = {value.name: x.shape for value, x in zip(file.inputs, case.batch.flat)}
        shapes |= {name: weight.shape for name, weight in file.weights().items()}
        return file_effort(file.nodes(), {**shapes, **case.truth.shapes}, case.batch.samples)

    def _batch(self, turn: int, count: int, kinds: Sequence[str], sizes: Sequence[int]) -> Batch | None:
        """Inputs of some kinds, sample by sample; None where they would be too many."""
        flat, named, data, dynamic = list[Any](), dict[str, int](), self.data or {}, False
        rng, generator = np.random.default_rng((self.seed, turn)), torch.Generator().manual_seed(self.seed + turn)
        rows = max((len(x) for x in data.values()), default=0)
        for value in self.reference.file.inputs:
            shape: list[int] = []
            for axis, size in enumerate(value.shape):
                if not isinstance(size, int) or size < 0:
                    made = count if axis == 0 else sizes[(turn + len(named)) % len(sizes)]
                    dynamic |= axis == 0
                    size = named.setdefault(str(size or f"{value.name}.{axis}"), made)
                shape.append(size)
            if count > 3 and np.prod(shape, dtype=float) > LARGE:
                return None
            if value.name in data and kinds[0] == "ordinary":
                picked = np.arange(turn * 7, turn * 7 + (shape[0] if shape else 1)) % max(rows, 1)
                drawn: Any = np.ascontiguousarray(data[value.name][picked])
            elif value.dtype.kind in "iub":
                drawn = np.asarray(rng.random(shape) > 0.5)
            else:
                values = torch.from_numpy(np.asarray(rng.standard_normal(shape)))
                if values.numel() > 1:  # a number alone is a parameter, as a scale is one
                    values = provoke(values, values, kinds, generator, batched=len(kinds) > 1)
                drawn = values.numpy()
            flat.append(as_tensor(drawn.astype(value.dtype)))
        if count > 3 and not dynamic:
            return None
        size = flat[0].shape[0] if flat and flat[0].ndim and dynamic else 0
        words = ", ".join(f"{name}={size}" for name, size in named.items() if size != count)
        origin = "mixed inputs" if len(kinds) > 1 else "" if kinds[0] == "ordinary" else f"{kinds[0]} inputs"
        return Batch(tuple(flat), size, words, origin)
