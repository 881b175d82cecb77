"""The gate: three questions, one cause of error at a time.

1. Is the file the model? Both in float64, so that nothing is seen but what rounding the constants once may do.
2. Does the runtime compute the file's operators? Each on its own operands, against a bound known beforehand.
3. Is the file, as it is deployed, what it is without optimisations?

Whatever cannot be judged is *inconclusive*, which is no pass.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn
from torch.export import ExportedProgram

from bnfold.affine import Meaning
from bnfold.errors import InputError
from bnfold.evaluate.evaluator import MissingOperatorError
from bnfold.gate.accuracy import Follow, judge_accuracy, look
from bnfold.gate.adversarial import Found, search
from bnfold.gate.candidates import (
    DEPLOYED,
    PLAIN,
    OnnxCandidate,
    Setting,
    foreign,
    judge_device,
    needs_widening,
    settings,
)
from bnfold.gate.constants import damaged
from bnfold.gate.data import Labels
from bnfold.gate.decisions import judge_turns
from bnfold.gate.deployed import Sessions
from bnfold.gate.effort import DEAR, effort, has_summaries
from bnfold.gate.empty import prove_nothing
from bnfold.gate.evidence import ELEMENT
from bnfold.gate.findings import Findings
from bnfold.gate.judge import Judge, overflow, run_cases
from bnfold.gate.matching import Match, match
from bnfold.gate.metrics import Facts, Part, Spread
from bnfold.gate.models import Model
from bnfold.gate.outside import Candidate, RunnerCandidate, TorchCandidate, judge_capture, judge_outside, judge_twice
from bnfold.gate.samples import MIN_SAMPLES, Batch, batches
from bnfold.gate.screen import Screen
from bnfold.gate.sites import judge_sites
from bnfold.gate.stored import Rows
from bnfold.gate.witnesses import FileWitness, Program64
from bnfold.graph.capture import Captured
from bnfold.graph.interpret import Runner
from bnfold.graph.program import meanings
from bnfold.graph.threads import torch_threads
from bnfold.report import CheckReport, Engine, Ledger, Placement, SiteResult
from bnfold.report.progress import Progress, silent
from bnfold.runtime.model_file import read_model
from bnfold.runtime.runner import UserRunner
from bnfold.runtime.runtime import Arithmetic, Device, Session, provider_notes, resolve_device

#: Largest RMS of error over noise, of an output or any of its samples; a single element may be off by ``ELEMENT`` such.
LIMIT = 4.0
MANY = 64  # samples of a model that is cheap: a fault in one of twenty shows itself to so many in 96 % of all runs
ENOUGH = 4  # samples that a verdict rests on at least
Claim = FileWitness | Program64 | None


@dataclass
class Gate:
    """One judgement. Build it, then ``judge``."""

    captured: Captured
    ledger: Ledger
    folded: ExportedProgram | None = None
    path: Path | None = None
    #: What the file calls the folded program's values.
    file_names: Mapping[str, str] = field(default_factory=dict)
    #: What the folded program's values stand for; None: as that says itself.
    meanings: Mapping[str, Meaning | None] | None = None
    device: Device | str = "cpu"
    samples: int = MIN_SAMPLES
    seed: int = 0
    limit: float = LIMIT
    data: Mapping[str, Rows] | None = None
    labels: Labels | None = None
    #: Look for inputs by gradient as well.
    adversarial: bool = False
    progress: Progress = silent
    #: The fold written back into the model's own class.
    eager: nn.Module | None = None
    #: Goes through all the parts of the data, of which ``data`` is the first.
    spread: Spread | None = None
    #: Whatever else runs the model, and what that computes in.
    runner: UserRunner | None = None
    arithmetic: Arithmetic | None = None
    #: Fail where a node runs on another provider than the one asked for.
    require_all_nodes: bool = False
    #: What the file says that it was written from, where that is not judged itself.
    written: ExportedProgram | None = None

    def judge(self) -> CheckReport:
        """The verdict.

        Raises:
            BnfoldError: the file cannot be opened, or its inputs do not fit the model's.
        """
        self._cost = effort(self.captured)
        self._dear = self._cost > DEAR
        # Several threads save nothing on what runs in a blink, and cost much on a busy machine.
        with contextlib.nullcontext() if self._dear else torch_threads(1):
            return self._judge()

    def look(self, facts: Facts) -> Part:
        """What the data show of the file, where the gate of all the data knows the rest.

        Raises:
            BnfoldError: the file cannot be opened, or the data do not fit.
        """
        assert self.data is not None
        self.match()
        return look(self.captured, self._deployed(), self.data, self.labels or Labels(), facts, self.progress)

    # -- inputs --------------------------------------------------------------------------------------------------------

    def inputs(self, **more: Any) -> list[Batch]:
        """Inputs of the sizes that the file takes, after ``match``; ``more`` as for ``batches``."""
        captured = self.captured
        return batches(
            captured.program, captured.names, captured.flat, samples=self.samples, seed=self.seed, data=self.data,
            sizes=captured.sizes, pinned=self._matched.pinned, **more,
        )  # fmt: skip

    def match(self, *, strange: bool = True) -> Sequence[str]:
        """Finds out which of the file's inputs and outputs are the model's, and says how; and which sizes it takes.

        Raises:
            InputError: they fit none, or the file is too ``strange`` for a verdict: one in training mode.
        """
        self._widen, self._matched, self.findings = False, Match(()), Findings()
        self._probe: Session | None = None
        self._held: onnx.ModelProto | None = None
        if self.path is None:
            return ()
        self._device = resolve_device(self.device)
        self._settings = settings(self._device, self.captured.program)
        held = self._held = read_model(self.path, light=True)
        self._widen = needs_widening(held, self._settings[0].device)
        notes = self.findings.notes
        if self._widen:
            notes.append(
                "ONNX Runtime has no bfloat16 kernels on the CPU: the file's bfloat16 values were run in float32"
            )
        more = foreign(held, self.captured.program, str(self.path)) if strange and self.folded is None else []
        probe = self._probe = self.onnx(optimized=False).session
        self._outputs = [value.name for value in probe.outputs]
        self._matched = match(self.captured, probe, strict=self.folded is not None, widened=self._widen)
        notes += [*self._matched.notes, *more]
        return self._matched.notes

    # -- the verdict ---------------------------------------------------------------------------------------------------

    def _judge(self) -> CheckReport:
        self.match()
        findings = self.findings
        made = self.inputs(
            runs=MIN_SAMPLES if has_summaries(self.captured) else 1,
            affordable=min(MANY, int(3 * DEAR / max(self._cost, 1.0))),
            dear=self._dear and self.samples <= MIN_SAMPLES and self.data is None,
        )
        found = self._search(made)
        model = self._model = Model(self.captured, dear=self._dear)
        screen = self._screened()
        held = self.meanings if self.meanings is not None else meanings(self.folded) if self.folded else {}
        meant = {name: held.get(name) or Meaning(value) for name, value in self.ledger.sites.items()}
        cases, reason = run_cases(
            model, [*made, *found.batches], findings, self.progress,
            lambda batch, own, truth: model.accepts(batch, own, truth, findings), screen,
            {meaning.value for meaning in meant.values()} if self._dear else (),
        )  # fmt: skip
        if screen is not None:
            screen.close()
        if not cases and not findings.doubts:
            raise InputError(
                f"the unfolded model runs on none of the inputs made for it: {reason}", hint="Give real ones: --data"
            )
        if not cases:
            return CheckReport("inconclusive", "torch", 0, (), problems=tuple(findings.doubts), limit=self.limit)
        stateful = model.keeps_state(findings)
        runs = [(case.batch, case.truth.outputs if screen is None else case.own) for case in cases]
        runs += screen.cleared if screen is not None else []
        if (ran := sum(batch.samples for batch, _ in runs)) < ENOUGH:
            findings.doubts.append(
                f"only {ran} samples could be run, which is too few for a verdict: give real ones, --data"
            )
        judge = self._judged = Judge(model, cases, findings, self.limit)
        claim = self._claim()
        sites = self._judge_claim(claim, meant) if claim is not None else []
        for case in () if stateful else cases:
            judge_capture(judge, case, model)
        self.progress("check", 1, 4)
        engines, placed = self._run_file(claim, screen)
        self.progress("check", 3, 4)
        engines += self._run_elsewhere()
        accuracy = None
        if self.data:
            accuracy = judge_accuracy(
                judge, self._deployed(), self.data, self.labels, pinned=self._matched.pinned, spread=self.spread,
                follow=self._follow(claim), progress=self.progress,
            )  # fmt: skip
        prove_nothing(judge, self.captured, runs)
        self.progress("check", 4, 4)
        return judge.verdict(
            engines[-1].name if engines else "torch", [batch for batch, _ in runs], sites=tuple(sites),
            capture_error=model.capture_error, accuracy=accuracy, placement=placed, engines=tuple(engines),
            adversarial=found.result(self._worst_found(found)),
        )  # fmt: skip

    # -- question 1 ----------------------------------------------------------------------------------------------------

    def file64(self, model: Model, names: Mapping[str, str] | None) -> FileWitness:
        """The file in float64; ``names`` are what it calls the model's values.

        Raises:
            MissingOperatorError: nothing computes one of its operators so.
        """
        assert self.path is not None
        matched, held, self._held = self._matched, self._held, None  # it is not needed twice
        return FileWitness(self.path, held, matched.inputs, matched.outputs, names, model)

    def _claim(self) -> Claim:
        if self.path is None:
            return None if self.folded is None else Program64(self.folded)
        try:
            claim = self.file64(self._model, self.file_names or dict(self.returned()))
        except MissingOperatorError as error:
            self.findings.doubts.append(f"{error.what}: the file is judged by what ONNX Runtime makes of it alone")
            return None
        claim.knows = self.folded is not None
        if (written := self.folded or self.written) is not None:
            limit = 0.0 if self.folded is not None else ELEMENT * self.limit
            self.findings.problems += damaged(written, claim.file.weights(), limit)
        return claim

    def _judge_claim(self, claim: FileWitness | Program64, meant: Mapping[str, Meaning]) -> list[SiteResult]:
        """Outputs and fold sites; ``meant`` is what the values at these stand for."""
        judge = self._judged
        self.progress("check", 0, 4)
        judge.claim(claim, [own for name in meant if self._dear and (own := claim.called(name)) is not None])
        sites = judge_sites(judge, self.ledger, meant, claim, self.folded)
        off = (s for s in sites if not s.ratio <= self.limit or not s.channel_ratio <= ELEMENT * self.limit)
        first = next((site.module for site in off), "")
        hint = f"; the first fold that is off is that of '{first}'" if first else ""
        judge.report(claim.name, unread=self._unread(claim), hint=hint)
        judge.wild(claim.name)
        return sites

    def returned(self) -> list[tuple[str, str]]:
        """The values that the model returns, and what the file calls them; "" where their numbers differ."""
        specs = self.captured.program.graph_signature.output_specs
        values, names = [str(getattr(spec.arg, "name", "")) for spec in specs], self._matched.outputs or self._outputs
        return list(zip(values if len(values) == len(names) else [""] * len(names), names))

    def _unread(self, claim: Claim) -> Callable[[str], int]:
        """On how many decisions that the file gives no names to, or of all that are not seen, an output depends."""
        model = self._model
        hidden = model.decisions if claim is None else claim.unread(model.decisions)

        def count(output: str) -> int:
            at = model.outputs.index(output) if output in model.outputs else -1
            return sum(at in model.influence(name) for name in hidden)

        return count

    def _follow(self, claim: Claim) -> Follow | None:
        """The model in float64, with what the file decides in ONNX Runtime; None where it decides nothing."""
        if not isinstance(claim, FileWitness) or not self._model.decisions:
            return None
        model, judge = self._model, self._judged
        shown = self.onnx(optimized=True, setting=self._settings[-1])
        names = {name: own for name in model.decisions if (own := claim.called(name)) is not None}

        def follow(batch: Batch) -> Sequence[torch.Tensor]:
            decided = shown.also(batch.flat, list(names.values()))[1]
            taken = model.complete({name: decided[own] for name, own in names.items() if own in decided})
            again = partial(model.run, batch, follow=taken)
            run = again()
            judge_turns(judge.findings, shown.name, run.turns, again)
            return run.outputs

        return follow

    # -- questions 2 and 3 ---------------------------------------------------------------------------------------------

    def _screened(self) -> Screen | None:
        """What tells which inputs need no float64: of a dear model that decides nothing, and of its file alone."""
        model, elsewhere = self._model, self.eager is not None or self.runner is not None or self.data is not None
        if self.path is None or elsewhere or self.adversarial or model.decisions or model.louder == 1:
            return None
        if len(self._settings) > 1 or self._settings[0].coarser > 1:
            return None
        return Screen(model, self.onnx(optimized=True), self.limit)

    def _run_file(self, claim: Claim, screen: Screen | None) -> tuple[list[Engine], Placement | None]:
        if self.path is None:
            return [], None
        judge, findings, placed = self._judged, self.findings, None
        findings.notes += provider_notes(self._device)
        file = claim if isinstance(claim, FileWitness) else None
        sessions = Sessions(judge, file, self.onnx, self._settings[0].device, screen)
        unread = self._unread(file)
        sessions.run_plain()
        judge.report(PLAIN, unread=unread)
        engines = []
        for setting in self._settings:
            candidate = self.onnx(optimized=True, setting=setting)
            sessions.run_deployed(candidate)
            if candidate.name == DEPLOYED and (said := sessions.blame()) is not None:
                findings.problems.append(said)
            judge.report(candidate.name, unread=unread)
            if placed is None and not setting.device.is_cpu:
                placed = judge_device(candidate, judge.cases[0].batch.flat, findings, whole=self.require_all_nodes)
            candidate.close()
            engines.append(self._engine(setting, candidate.name))
        return engines, placed

    def _run_elsewhere(self) -> list[Engine]:
        """The model's own class with the fold in it, and a user's runner."""
        judge, engines = self._judged, list[Engine]()
        found: list[Candidate] = [self._eager()] if self.eager is not None else []
        for candidate in [*found, *([self._runner()] if self.runner is not None else [])]:
            judge_outside(judge, candidate)
            if isinstance(candidate, RunnerCandidate):
                judge_twice(judge, candidate)
            judge.report(candidate.name, unread=self._unread(None))
            if isinstance(candidate, RunnerCandidate):
                engines.append(self._engine(candidate.setting, candidate.name))
        return engines

    def _engine(self, setting: Setting, name: str) -> Engine:
        """What the report says of an engine."""
        ratios = [row.ratio for row in self._judged.of(name)]
        bad, unsure = (any(text.startswith(name) or "ONNX Runtime:" in text for text in texts) for texts in
                       (self.findings.problems, self.findings.doubts))  # fmt: skip
        return setting.result(max(ratios, default=math.inf), "fail" if bad else "inconclusive" if unsure else "pass")

    def _eager(self) -> TorchCandidate:
        return TorchCandidate("folded class", replace(self.captured, eager=self.eager).run_eager)

    def _runner(self) -> RunnerCandidate:
        assert self.runner is not None
        names = self._matched.inputs if self.path is not None else None
        return RunnerCandidate(self.runner, self.captured, names, self._matched.outputs, self.path, self.arithmetic)

    def _deployed(self) -> Candidate:
        """What accuracy is that of."""
        if self.runner is not None:
            return self._runner()
        if self.path is not None:
            return self.onnx(optimized=True, setting=self._settings[-1])
        if self.eager is not None:
            return self._eager()
        assert self.folded is not None
        return TorchCandidate("folded torch", Runner(self.folded))

    def onnx(self, *, optimized: bool, setting: Setting | None = None, disabled: Sequence[str] = ()) -> OnnxCandidate:
        """The file in ONNX Runtime, after ``match``."""
        assert self.path is not None
        session = None
        if not (optimized or setting):  # it is open already, and closed by whoever asks for it
            session, self._probe = self._probe, None
        return OnnxCandidate(
            self.path, setting=setting or self._settings[0], optimized=optimized, inputs=self._matched.inputs,
            widen=self._widen, outputs=self._matched.outputs, wider=self._matched.wider, disabled=disabled,
            session=session,
        )  # fmt: skip

    def _search(self, made: list[Batch]) -> Found:
        """Inputs found by gradients, where they are asked for."""
        if not self.adversarial:
            return Found(())
        self.progress("search", 0, 1)
        found = search(self.captured, self.folded, made)
        self.findings.notes += [f"adversarial: {note}" for note in found.notes]
        return found

    def _worst_found(self, found: Found) -> float:
        """The largest ratio on inputs that were searched for."""
        names, judge = tuple(batch.origin for batch in found.batches), self._judged
        if any(c.batch.origin in names and overflow(c.own, c.truth.outputs) is not None for c in judge.cases):
            return math.inf
        return max((row.ratio for row in judge.table if names and row.case.endswith(names)), default=0.0)
