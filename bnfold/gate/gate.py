"""The gate: the captured graph, the folded graph and the ONNX file, each against float64.

Three questions: does the capture equal the eager model, does every fold site equal the value it replaces, do the
outputs. Anything that cannot be judged is *inconclusive*, which is no pass.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.export import ExportedProgram

from bnfold.affine import Meaning
from bnfold.gate.accuracy import judge_accuracy, look
from bnfold.gate.adversarial import Found, search
from bnfold.gate.candidates import (
    Candidate,
    EagerCandidate,
    OnnxCandidate,
    TorchCandidate,
    half_inside,
    needs_widening,
    probe_session,
    quantised_nodes,
    refuse_training,
)
from bnfold.gate.data import Labels
from bnfold.gate.devices import judge_device
from bnfold.gate.engines import Setting, settings
from bnfold.gate.following import Follower
from bnfold.gate.matching import Match, match
from bnfold.gate.optimizers import guilty
from bnfold.gate.outputs import OutputJudge
from bnfold.gate.parts import Facts, Part, Spread
from bnfold.gate.reference import RUN_FACTOR, Findings, Progress, References, batched
from bnfold.gate.runners import RunnerCandidate, judge_runner
from bnfold.gate.samples import MIN_SAMPLES, Batch, batches
from bnfold.gate.sites import judge_sites
from bnfold.gate.stored import Rows
from bnfold.graph.capture import Captured
from bnfold.graph.interpret import Runner
from bnfold.graph.program import meanings
from bnfold.graph.threads import torch_threads
from bnfold.report import CheckReport, Engine, Ledger, OutputResult, Placement, SiteResult, Verdict
from bnfold.runtime.runner import UserRunner
from bnfold.runtime.runtime import Arithmetic, Device, provider_notes, resolve_device

#: Median ratio of a whole output, and ratio at a fold site.
LIMIT, SITE_LIMIT = 4.0, 16.0
#: Seconds that one run of the example takes before a second thread pays.
LONG_RUN = 0.1
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
    site_limit: float = SITE_LIMIT
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
        with _threads_that_pay(self.captured):
            return self._judge()

    def _meanings(self) -> Mapping[str, Meaning | None]:
        if self.meanings is None:
            return {} if self.folded is None else meanings(self.folded)
        return self.meanings

    def look(self, facts: Facts) -> Part:
        """What the data show of the file, where the gate of all the data knows the rest.

        Raises:
            BnfoldError: the file cannot be opened, or the data do not fit.
        """
        assert self.data is not None
        self._findings = Findings()
        self._match()
        candidates = self._candidates()
        return look(
            self.captured, candidates[-1], _undeployed(candidates), self.data, self.labels or Labels(), facts,
            self.progress,
        )  # fmt: skip

    def _judge(self) -> CheckReport:
        captured = self.captured
        self._findings = Findings()
        self._match()
        made = batches(
            captured.program, captured.names, captured.flat, samples=self.samples, seed=self.seed, data=self.data,
            sizes=captured.sizes, pinned=self._matched.pinned, runs=MIN_SAMPLES if _has_summaries(captured) else 1,
        )  # fmt: skip
        found = self._search(made)
        self._references = References(
            captured, [*made, *found.batches], self._findings, self.limit, self.progress,
            watch=set(self.ledger.sites.values()),
        )  # fmt: skip
        self._references.run()
        capture_error = self._references.judge_capture()
        self._outputs = OutputJudge(self._references, self.limit)
        candidates = self._candidates()
        outputs, engines, placed = self._judge_each(candidates)
        self.progress("check", len(candidates), len(candidates) + 1)
        sites = judge_sites(self._references, self.ledger, self._meanings(), candidates, self.site_limit)
        accuracy = None
        if self.data and candidates:
            accuracy = judge_accuracy(
                self._references, candidates[-1], self.data, self.labels, pinned=self._matched.pinned,
                before=_undeployed(candidates), spread=self.spread,
            )  # fmt: skip
        self.progress("check", len(candidates) + 1, len(candidates) + 1)
        if not outputs:
            self._findings.problems.append("no output was compared")
        if captured.names and not _reads_inputs(captured):
            self._findings.doubts.append(
                "no output depends on any input: the model answers with what it kept from an earlier call, or with a "
                "constant"
            )
        elif _says_nothing(self._references):
            self._findings.doubts.append(
                "every output is the same for every input that was tried, so nothing is seen of what lies before it: "
                "load trained weights (is the last layer zero?), or give inputs that matter (--data)"
            )
        self._findings.once()
        self._say_where(sites)
        problems, doubts, notes = self._findings.problems, self._findings.doubts, self._findings.notes
        verdict: Verdict = "fail" if problems else "inconclusive" if doubts else "pass"
        batch_sizes = tuple(dict.fromkeys(b.size for b in self._references.batches))
        return CheckReport(
            verdict, engines[-1].name if engines else "torch", self._references.samples, batch_sizes, tuple(outputs),
            tuple(sites), capture_error,
            (*problems, *doubts), tuple(notes), accuracy, self.limit, self.site_limit,
            placement=placed, engines=tuple(engines), adversarial=found.result(self._outputs.worst_found),
        )  # fmt: skip

    def _judge_each(self, candidates: Sequence[Candidate]) -> tuple[list[OutputResult], list[Engine], Placement | None]:
        """The outputs of every candidate, the verdict of every engine, and where the nodes ran."""
        outputs: list[OutputResult] = []
        engines: dict[Setting, tuple[float, Verdict]] = {}
        problems, doubts, placed, clean = self._findings.problems, self._findings.doubts, None, False
        for i, candidate in enumerate(candidates):
            self.progress("check", i, len(candidates) + 1)
            before, doubted = len(problems), len(doubts)
            judged = self._outputs.judge(candidate)
            outputs += judged
            if not candidate.deployed:
                clean = len(problems) == before
            elif clean and len(problems) > before and isinstance(candidate, OnnxCandidate) and candidate.coarser == 1:
                problems[before:before] = self._blame()
            if isinstance(candidate, OnnxCandidate):
                if candidate.deployed and placed is None and not candidate.setting.device.is_cpu:
                    placed = judge_device(candidate, self._references, whole=self.require_all_nodes)
                candidate.close()
            elif isinstance(candidate, RunnerCandidate):
                judge_runner(candidate, self._references, self.limit)
            if isinstance(candidate, OnnxCandidate | RunnerCandidate):
                verdict: Verdict = "fail" if len(problems) > before else "pass"
                if verdict == "pass" and len(doubts) > doubted:
                    verdict = "inconclusive"
                ratio, sooner = engines.get(candidate.setting, (0.0, verdict))
                worst = max([ratio, *(o.ratio for o in judged)], key=lambda r: math.inf if math.isnan(r) else r)
                engines[candidate.setting] = worst, max(sooner, verdict, key=_SEVERITY.index)
        return outputs, [setting.result(*found) for setting, found in engines.items()], placed

    def _search(self, made: list[Batch]) -> Found:
        """Inputs found by gradients, where they are asked for."""
        if not self.adversarial:
            return Found(())
        self.progress("search", 0, 1)
        found = search(self.captured, self.folded, made)
        self._findings.notes += [f"adversarial: {note}" for note in found.notes]
        return found

    def _say_where(self, sites: Sequence[SiteResult]) -> None:
        """Adds to what is said of an output the first fold site, in the order of the graph, that is off."""
        order = {node.name: i for i, node in enumerate(self.captured.program.graph.nodes)}
        off = [site for site in sites if not max(site.ratio, site.channel_ratio) <= self.site_limit]
        first = {"folded torch": "", "ONNX Runtime": ""}
        for site in sorted(off, key=lambda site: -order[self.ledger.sites[site.value]]):
            first[next(name for name in first if site.candidate.startswith(name))] = site.module
        for i, problem in enumerate(self._findings.problems):
            of_output = ", output '" in problem
            module = next((m for name, m in first.items() if of_output and problem.startswith(name)), "")
            if module:
                self._findings.problems[i] = f"{problem}; the first fold that is off is that of '{module}'"

    # -- candidates ------------------------------------------------------------------------------------------------

    def _match(self) -> None:
        """Which of the file's inputs and outputs are the model's, and which sizes it takes."""
        self._widen, self._matched = False, Match(())
        if self.path is None:
            return
        self._device = resolve_device(self.device)
        self._settings = settings(self._device, self.captured.program)
        self._widen = needs_widening(self.path, self._settings[0].device)
        if self._widen:
            self._findings.notes.append(
                "ONNX Runtime has no bfloat16 kernels on the CPU: the file's bfloat16 values were run in float32"
            )
        if self.folded is None:
            refuse_training(self.path)
        probe = probe_session(self.path, device=self._settings[0].device, widen=self._widen)
        self._matched = match(self.captured, probe, strict=self.folded is not None, widened=self._widen)
        self._findings.notes += self._matched.notes
        held = self.captured.program.state_dict.values()
        if self.folded is None and half_inside(self.path) and not any(v.dtype == torch.float16 for v in held):
            self._findings.notes.append(
                "the file computes in float16 and the model does not: judge it against the model in that dtype "
                "(--dtype float16, dtype=torch.float16)"
            )
        if self.folded is None and (nodes := quantised_nodes(self.path)):
            self._findings.notes.append(
                f"the file is quantised ({nodes} nodes): no such file equals a float model; what that costs is "
                "seen on data (--data)"
            )

    def _candidates(self) -> list[Candidate]:
        found: list[Candidate] = []
        if self.folded is not None:
            found.append(TorchCandidate("folded torch", self.folded))
        if self.eager is not None:
            found.append(EagerCandidate("folded class", replace(self.captured, eager=self.eager)))
        if self.path is not None:
            self._findings.notes += provider_notes(self._device)
            found += [self._onnx(optimized=on) for on in (False, True)]
            found += [self._onnx(optimized=True, setting=setting) for setting in self._settings[1:]]
        if self.runner is not None:
            names = self._matched.inputs if self.path is not None else None
            found.append(
                RunnerCandidate(self.runner, self.captured, names, self._matched.outputs, self.path, self.arithmetic)
            )
        return found

    def _blame(self) -> list[str]:
        """Which of ONNX Runtime's optimisations makes a file wrong that is right without them, as a problem."""
        before = self._outputs.follower
        plain, full = (Follower(self._references, self._onnx(optimized=on), before) for on in (False, True))
        ratios = [(full.misfit(run), run) for run in range(len(self._references.batches))]
        worst, run = max(ratios)
        if not worst > RUN_FACTOR * self.limit:
            return []  # so close to right, rounding may have decided
        # Right or wrong is on which side of the middle, on a logarithmic scale, a run ends.
        middle = math.sqrt(min(worst, 1e30) * max(plain.misfit(run), 1.0))

        def wrong(disabled: Sequence[str]) -> bool:
            candidate = self._onnx(optimized=True, disabled=disabled)
            return not Follower(self._references, candidate, before).misfit(run) < middle

        names = guilty(wrong)
        if not names:
            return [
                "ONNX Runtime: the file is right without its optimisations and wrong with them, whichever is left out"
            ]
        return [
            f"ONNX Runtime: its optimisation {' with '.join(names)} makes the file wrong, which is right without it: "
            f"disable it where the file runs (InferenceSession(..., disabled_optimizers={list(names)}))"
        ]

    def _onnx(self, *, optimized: bool, setting: Setting | None = None, disabled: Sequence[str] = ()) -> OnnxCandidate:
        assert self.path is not None
        return OnnxCandidate(
            self.path, setting=setting or self._settings[0], optimized=optimized, inputs=self._matched.inputs,
            widen=self._widen, names=self.file_names, outputs=self._matched.outputs, wider=self._matched.wider,
            disabled=disabled,
        )  # fmt: skip


def _undeployed(candidates: Sequence[Candidate]) -> Candidate | None:
    """The last of those that probably decide like the deployed one, and show their decisions."""
    return next((c for c in reversed(candidates) if not c.deployed), None)


def _reads_inputs(captured: Captured) -> bool:
    """Whether an output depends on a user input."""
    reached = {node for node in captured.program.graph.nodes if node.name in captured.names}
    for node in captured.program.graph.nodes:
        if any(operand in reached for operand in node.all_input_nodes):
            reached.add(node)
    return captured.program.graph.output_node() in reached


def _says_nothing(references: References) -> bool:
    """Whether inputs differ and no output does: the same floats for every sample of every run."""

    def alike(runs: Sequence[Sequence[Any]]) -> bool:
        first: dict[int, torch.Tensor] = {}
        for batch, values in zip(references.batches, runs):
            for i, value in enumerate(values):
                rows = value if batched(batch, value) else value[None]
                row = first.setdefault(i, rows[0]) if len(rows) else torch.empty(0)
                if not value.is_floating_point() or row.shape != rows.shape[1:] or not bool((rows == row).all()):
                    return False
        return bool(first)

    given = [[value for value in batch.flat if isinstance(value, torch.Tensor)] for batch in references.batches]
    return alike(references.truth) and not alike(given)


def _has_summaries(captured: Captured) -> bool:
    """Whether an output is a handful of numbers for a whole batch, so that a run of many samples says as little as one.

    Ten runs are then made, as ten samples are of other outputs.
    """
    (outputs,) = captured.program.graph.output_node().args
    values = [getattr(node, "meta", {}).get("val") for node in cast("Sequence[Any]", outputs)]
    return any(
        isinstance(value, torch.Tensor)
        and value.is_floating_point()
        and not any(isinstance(size, torch.SymInt) for size in value.shape)
        and value.numel() < MIN_SAMPLES
        for value in values
    )


@contextlib.contextmanager
def _threads_that_pay(captured: Captured) -> Iterator[None]:
    """One thread for a model that runs in a blink: several save it nothing, and cost much on a busy machine."""
    with torch_threads(1) as threads:
        start = time.perf_counter()
        with contextlib.suppress(Exception):  # whoever runs it next reports that
            Runner(captured.program)(captured.flat)
        if time.perf_counter() - start > LONG_RUN:
            torch.set_num_threads(threads)
        yield
