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

import torch
from torch import nn
from torch.export import ExportedProgram

from bnfold.affine import Meaning
from bnfold.errors import InputError
from bnfold.evaluate.evaluator import MissingOperatorError
from bnfold.gate.accuracy import Follow, judge_accuracy, look
from bnfold.gate.adversarial import Found, search
from bnfold.gate.candidates import (
    Candidate,
    EagerCandidate,
    FoldedCandidate,
    OnnxCandidate,
    half_inside,
    needs_widening,
    probe_session,
    quantised_nodes,
    refuse_training,
)
from bnfold.gate.claims import FileClaim, ProgramClaim
from bnfold.gate.data import Labels
from bnfold.gate.deployed import DEPLOYED, Sessions
from bnfold.gate.devices import judge_device
from bnfold.gate.effort import DEAR, effort, has_summaries
from bnfold.gate.empty import prove_nothing
from bnfold.gate.engines import Setting, settings
from bnfold.gate.evidence import ELEMENT
from bnfold.gate.findings import Findings
from bnfold.gate.judge import Judge, overflow, run_cases
from bnfold.gate.matching import Match, match
from bnfold.gate.models import Model
from bnfold.gate.outside import judge_outside, judge_twice
from bnfold.gate.parts import Facts, Part, Spread
from bnfold.gate.runners import RunnerCandidate
from bnfold.gate.samples import MIN_SAMPLES, Batch, batches
from bnfold.gate.screen import Screen
from bnfold.gate.sites import judge_sites
from bnfold.gate.stored import Rows
from bnfold.gate.turns import judge_turns
from bnfold.graph.capture import Captured
from bnfold.graph.program import meanings
from bnfold.graph.threads import torch_threads
from bnfold.report import CheckReport, Engine, Ledger, OutputResult, Placement, Verdict
from bnfold.report.progress import Progress
from bnfold.runtime.model_file import read_model
from bnfold.runtime.runner import UserRunner
from bnfold.runtime.runtime import Arithmetic, Device, Session, provider_notes, resolve_device

#: Largest RMS of error over noise, of an output or any of its samples; a single element may be off by ``ELEMENT`` such.
LIMIT = 4.0
MANY = 64  # samples of a model that is cheap: a fault in one of twenty shows itself to so many in 96 % of all runs
ENOUGH = 4  # samples that a verdict rests on at least
_SEVERITY: tuple[Verdict, ...] = ("pass", "inconclusive", "fail")


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
    progress: Progress = lambda stage, done, total: None
    #: The fold written back into the model's own class.
    eager: nn.Module | None = None
    #: Goes through all the parts of the data, of which ``data`` is the first.
    spread: Spread | None = None
    #: Whatever else runs the model, and what that computes in.
    runner: UserRunner | None = None
    arithmetic: Arithmetic | None = None
    #: Fail where a node runs on another provider than the one asked for.
    require_all_nodes: bool = False

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
        self._findings = Findings()
        self._match()
        return look(self.captured, self._deployed(), self.data, self.labels or Labels(), facts, self.progress)

    def _judge(self) -> CheckReport:
        captured = self.captured
        findings = self._findings = Findings()
        self._match()
        made = batches(
            captured.program, captured.names, captured.flat, samples=self.samples, seed=self.seed, data=self.data,
            sizes=captured.sizes, pinned=self._matched.pinned, runs=MIN_SAMPLES if has_summaries(captured) else 1,
            affordable=min(MANY, int(3 * DEAR / max(self._cost, 1.0))),
            dear=self._dear and self.samples <= MIN_SAMPLES and self.data is None,
        )  # fmt: skip
        found = self._search(made)
        model = self._model = Model(captured, dear=self._dear)
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
        ran, at = sum(batch.samples for batch, _ in runs), dict.fromkeys(batch.size for batch, _ in runs)
        if ran < ENOUGH:
            findings.doubts.append(
                f"only {ran} samples could be run, which is too few for a verdict: give real ones, --data"
            )
        judge = self._judged = Judge(model, cases, findings, self.limit)
        claim = self._claim()
        sites = []
        if claim is not None:
            self.progress("check", 0, 4)
            judge.claim(claim, [own for name in meant if self._dear and (own := claim.called(name)) is not None])
            sites = judge_sites(judge, self.ledger, meant, claim, self.folded)
            first = next((s.module for s in sites if not s.ratio <= self.limit
                          or not s.channel_ratio <= ELEMENT * self.limit), "")  # fmt: skip
            judge.report(
                claim.name, unread=self._unread(claim),
                hint=f"; the first fold that is off is that of '{first}'" if first else "",
            )  # fmt: skip
            judge.wild(claim.name)
        for case in () if stateful else cases:
            noise = judge.drawn(case).noise
            model.judge_capture(case.batch, case.own, case.truth, noise, findings, self.limit)
        self.progress("check", 1, 4)
        engines, placed = self._run_file(claim if isinstance(claim, FileClaim) else None, screen)
        self.progress("check", 3, 4)
        for candidate in self._outside():
            judge_outside(judge, candidate)
            if isinstance(candidate, RunnerCandidate):
                judge_twice(judge, candidate)
            judge.report(candidate.name, unread=self._unread(None))
            if isinstance(candidate, RunnerCandidate):
                engines.append(self._engine(candidate.setting, candidate.name))
        accuracy = None
        if self.data and (last := self._deployed()) is not None:
            accuracy = judge_accuracy(
                judge, last, self.data, self.labels, pinned=self._matched.pinned, spread=self.spread,
                follow=self._follow(claim), progress=self.progress,
            )  # fmt: skip
        prove_nothing(judge, captured, runs)
        self.progress("check", 4, 4)
        findings.once()
        problems, doubts = findings.problems, findings.doubts
        verdict: Verdict = "fail" if problems else "inconclusive" if doubts else "pass"
        witnesses = dict.fromkeys(row.witness for row in judge.table.rows)
        outputs: list[OutputResult] = [r for witness in witnesses for r in judge.results(witness)]
        return CheckReport(
            verdict, engines[-1].name if engines else "torch", ran, tuple(at), tuple(outputs), tuple(sites),
            model.capture_error, (*problems, *doubts), tuple(findings.notes), accuracy, self.limit,
            ELEMENT * self.limit, placement=placed, engines=tuple(engines),
            adversarial=found.result(self._worst_found(found)),
        )  # fmt: skip

    # -- question 1 ----------------------------------------------------------------------------------------------------

    def _claim(self) -> FileClaim | ProgramClaim | None:
        if self.path is None:
            return None if self.folded is None else ProgramClaim(self.folded)
        try:
            specs = self.captured.program.graph_signature.output_specs
            returned = [str(getattr(spec.arg, "name", "")) for spec in specs]
            outputs = self._matched.outputs or self._returned
            names = dict(zip(returned, outputs)) if len(returned) == len(outputs) else {}
            claim = FileClaim(self.path, self._held, self._matched.inputs, self._matched.outputs,
                              self.file_names or names, self._model.epsilon, self._model.halves)  # fmt: skip
            claim.knows = self.folded is not None
            del self._held
            return claim
        except MissingOperatorError as error:
            self._findings.doubts.append(f"{error.what}: the file is judged by what ONNX Runtime makes of it alone")
            return None

    def _unread(self, claim: FileClaim | ProgramClaim | None) -> Callable[[str], int]:
        """On how many decisions that the file gives no names to, or of all that are not seen, an output depends."""
        hidden = self._model.decisions if claim is None else claim.unread(self._model.decisions)

        def count(output: str) -> int:
            at = self._model.outputs.index(output) if output in self._model.outputs else -1
            return sum(at in (self._model.influence(name) or ()) for name in hidden)

        return count

    def _follow(self, claim: FileClaim | ProgramClaim | None) -> Follow | None:
        """The model in float64, with what the file decides in ONNX Runtime; None where it decides nothing."""
        if not isinstance(claim, FileClaim) or not self._model.decisions:
            return None
        model, judge = self._model, self._judged
        shown = self._onnx(optimized=True, setting=self._settings[-1])
        names = {name: own for name in model.decisions if (own := claim.called(name)) is not None}

        def follow(batch: Batch) -> Sequence[torch.Tensor]:
            decided = shown.also(batch.flat, list(names.values()))[1]
            taken = model.complete({name: decided[own] for name, own in names.items() if own in decided})
            run = model.run(batch, follow=taken)
            again = partial(model.run, batch, follow=taken)
            judge_turns(judge.findings, shown.name, run.turns, lambda seed: again(seed=seed).turns)
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
        return Screen(model, self._onnx(optimized=True, setting=self._settings[0]), self.limit)

    def _run_file(self, claim: FileClaim | None, screen: Screen | None) -> tuple[list[Engine], Placement | None]:
        if self.path is None:
            return [], None
        judge, findings, placed = self._judged, self._findings, None
        findings.notes += provider_notes(self._device)
        sessions = Sessions(judge, claim, self._onnx, self._settings[0].device, screen)
        unread = self._unread(claim)
        sessions.run_plain()
        judge.report("ONNX Runtime, optimisations off", unread=unread)
        engines = []
        for setting in self._settings:
            candidate = self._onnx(optimized=True, setting=setting)
            sessions.run_deployed(candidate)
            if candidate.name == DEPLOYED and (said := sessions.blame()) is not None:
                findings.problems.append(said)
            judge.report(candidate.name, unread=unread)
            if placed is None and not setting.device.is_cpu:
                placed = judge_device(candidate, judge.cases[0].batch.flat, findings, whole=self.require_all_nodes)
            candidate.close()
            engines.append(self._engine(setting, candidate.name))
        return engines, placed

    def _engine(self, setting: Setting, name: str) -> Engine:
        """What the report says of an engine."""
        ratios = [row.ratio for row in self._judged.table.of(name)]
        bad, unsure = (any(text.startswith(name) or "ONNX Runtime:" in text for text in texts) for texts in
                       (self._findings.problems, self._findings.doubts))  # fmt: skip
        return setting.result(max(ratios, default=math.inf), "fail" if bad else "inconclusive" if unsure else "pass")

    def _outside(self) -> list[Candidate]:
        """What runs the model elsewhere: its own class with the fold in it, and a user's runner."""
        found: list[Candidate] = []
        if self.eager is not None:
            found.append(EagerCandidate("folded class", replace(self.captured, eager=self.eager)))
        if self.runner is not None:
            found.append(self._runner())
        return found

    def _runner(self) -> RunnerCandidate:
        assert self.runner is not None
        names = self._matched.inputs if self.path is not None else None
        return RunnerCandidate(self.runner, self.captured, names, self._matched.outputs, self.path, self.arithmetic)

    def _deployed(self) -> Candidate:
        """What accuracy is that of."""
        if self.runner is not None:
            return self._runner()
        if self.path is not None:
            return self._onnx(optimized=True, setting=self._settings[-1])
        if self.eager is not None:
            return EagerCandidate("folded class", replace(self.captured, eager=self.eager))
        assert self.folded is not None
        return FoldedCandidate(self.folded)

    # -- inputs --------------------------------------------------------------------------------------------------------

    def _search(self, made: list[Batch]) -> Found:
        """Inputs found by gradients, where they are asked for."""
        if not self.adversarial:
            return Found(())
        self.progress("search", 0, 1)
        found = search(self.captured, self.folded, made)
        self._findings.notes += [f"adversarial: {note}" for note in found.notes]
        return found

    def _worst_found(self, found: Found) -> float:
        """The largest ratio on inputs that were searched for."""
        names = {batch.origin for batch in found.batches}
        judge = self._judged
        over = any(c.batch.origin in names and overflow(c.own, c.truth.outputs) is not None for c in judge.cases)
        if over or (names and any(case.endswith(tuple(names)) for _, case in judge.said)):
            return math.inf
        return max((row.ratio for row in judge.table.rows if names and row.case.endswith(tuple(names))), default=0.0)

    def _match(self) -> None:
        """Which of the file's inputs and outputs are the model's, and which sizes it takes."""
        self._widen, self._matched = False, Match(())
        self._probe: Session | None = None
        if self.path is None:
            return
        self._device = resolve_device(self.device)
        self._settings = settings(self._device, self.captured.program)
        held = self._held = read_model(self.path, light=True)
        self._widen = needs_widening(held, self._settings[0].device)
        if self._widen:
            self._findings.notes.append(
                "ONNX Runtime has no bfloat16 kernels on the CPU: the file's bfloat16 values were run in float32"
            )
        if self.folded is None:
            refuse_training(held, str(self.path))
        probe = self._probe = probe_session(self.path, device=self._settings[0].device, widen=self._widen)
        self._returned = [value.name for value in probe.outputs]
        self._matched = match(self.captured, probe, strict=self.folded is not None, widened=self._widen)
        self._findings.notes += self._matched.notes
        weights = self.captured.program.state_dict.values()
        if self.folded is None and half_inside(held) and not any(v.dtype == torch.float16 for v in weights):
            self._findings.notes.append(
                "the file computes in float16 and the model does not: judge it against the model in that dtype "
                "(--dtype float16, dtype=torch.float16)"
            )
        if self.folded is None and (nodes := quantised_nodes(held)):
            self._findings.notes.append(
                f"the file is quantised ({nodes} nodes): no such file equals a float model; what that costs is "
                "seen on data (--data)"
            )

    def _onnx(self, *, optimized: bool, setting: Setting | None = None, disabled: Sequence[str] = ()) -> OnnxCandidate:
        assert self.path is not None
        first, session = self._settings[0], None
        if not (optimized or setting or first.deployed):  # it is open already, and closed by whoever asks for it
            session, self._probe = self._probe, None
        return OnnxCandidate(
            self.path, setting=setting or first, optimized=optimized, inputs=self._matched.inputs,
            widen=self._widen, outputs=self._matched.outputs, wider=self._matched.wider, disabled=disabled,
            session=session,
        )  # fmt: skip
