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
from typing import Literal

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from bnfold.accuracy import judge_accuracy
from bnfold.adversarial import Found, search
from bnfold.candidates import (
    Candidate,
    EagerCandidate,
    OnnxCandidate,
    TorchCandidate,
    needs_widening,
    quantised_nodes,
    widened,
)
from bnfold.capture import Captured
from bnfold.data import Labels
from bnfold.decisions import NOISE_LIMIT
from bnfold.devices import judge_device
from bnfold.errors import BnfoldError
from bnfold.following import Follower
from bnfold.interpret import Runner
from bnfold.judge import Tally, epsilon, finite_problem, median
from bnfold.matching import Match, match
from bnfold.names import number_names
from bnfold.optimizers import guilty
from bnfold.reference import (
    RUN_FACTOR,
    SAMPLE_FACTOR,
    Findings,
    Progress,
    References,
    batched,
    first_line,
    numbers,
    words,
)
from bnfold.report import CheckReport, Ledger, OutputResult, SiteResult, Verdict
from bnfold.runtime import open_session, provider_notes
from bnfold.samples import Batch, batches
from bnfold.sites import judge_sites
from bnfold.stored import Rows

#: Median ratio of a whole output, and ratio at a fold site.
LIMIT, SITE_LIMIT = 4.0, 16.0
#: Seconds that one run of the example takes before a second thread pays.
LONG_RUN = 0.1


@dataclass
class Gate:
    """One judgement. Build it, then ``judge``."""

    captured: Captured
    ledger: Ledger
    folded: ExportedProgram | None = None
    path: Path | None = None
    #: What the file calls the folded program's values.
    file_names: Mapping[str, str] = field(default_factory=dict)
    device: Literal["cpu", "cuda"] = "cpu"
    samples: int = 16
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

    def judge(self) -> CheckReport:
        """The verdict.

        Raises:
            BnfoldError: the file cannot be opened, or its inputs do not fit the model's.
        """
        with _threads_that_pay(self.captured):
            return self._judge()

    def _judge(self) -> CheckReport:
        captured = self.captured
        self._findings = Findings()
        self._match()
        made = batches(
            captured.program, captured.names, captured.flat, samples=self.samples, seed=self.seed, data=self.data,
            ranges=captured.ranges, pinned=self._matched.pinned,
        )  # fmt: skip
        found = self._search(made)
        self._references = References(captured, [*made, *found.batches], self._findings, self.limit, self.progress)
        self._references.run()
        capture_error = self._references.judge_capture()
        outputs: list[OutputResult] = []
        provider, placed = "torch", None
        self._follower: Follower | None = None
        clean = False
        candidates = self._candidates()
        for i, candidate in enumerate(candidates):
            self.progress("check", i, len(candidates) + 1)
            before = len(self._findings.problems)
            outputs += self._judge_outputs(candidate)
            if not candidate.deployed:
                clean = len(self._findings.problems) == before
            elif clean and len(self._findings.problems) > before and isinstance(candidate, OnnxCandidate):
                self._findings.problems.insert(before, self._blame())
            if isinstance(candidate, OnnxCandidate):
                with contextlib.suppress(BnfoldError):  # a session that failed has been reported already
                    provider = candidate.session.provider
                    if candidate.deployed and self.device == "cuda":
                        placed = judge_device(candidate, self._references)
                candidate.close()
        deployed = self._as_deployed()
        self.progress("check", len(candidates), len(candidates) + 1)
        sites = judge_sites(self._references, self.ledger, candidates, self.site_limit)
        accuracy = None
        if self.data and candidates:
            accuracy = judge_accuracy(
                self._references, candidates[-1], self.data, self.labels, pinned=self._matched.pinned
            )
        self.progress("check", len(candidates) + 1, len(candidates) + 1)
        if not outputs:
            self._findings.problems.append("no output was compared")
        self._findings.once()
        self._say_where(sites)
        problems, doubts, notes = self._findings.problems, self._findings.doubts, self._findings.notes
        verdict: Verdict = "fail" if problems else "inconclusive" if doubts else "pass"
        batch_sizes = tuple(dict.fromkeys(b.size for b in self._references.batches))
        return CheckReport(
            verdict, provider, self._references.samples, batch_sizes, tuple(outputs), tuple(sites), capture_error,
            (*problems, *doubts), tuple(notes), accuracy, self.limit, self.site_limit,
            placement=placed, deployed=tuple(deployed), adversarial=found.result(self._worst_found),
        )  # fmt: skip

    def _search(self, made: list[Batch]) -> Found:
        """Inputs found by gradients, where they are asked for."""
        self._worst_found = 0.0
        if not self.adversarial:
            return Found(())
        self.progress("search", 0, 1)
        found = search(self.captured, self.folded, made)
        self._findings.notes += [f"adversarial: {note}" for note in found.notes]
        return found

    def _as_deployed(self) -> list[OutputResult]:
        """The outputs on CUDA as ONNX Runtime's defaults make them, with TF32: for information."""
        if self.path is None or self.device != "cuda":
            return []
        candidate = self._onnx(optimized=True, tf32=True)
        judged, self._findings = self._findings, Findings()
        try:
            return self._judge_outputs(candidate)
        finally:
            candidate.close()
            judged.notes += [f"as deployed, not judged: {problem}" for problem in self._findings.problems]
            self._findings = judged

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
        self._widen = needs_widening(self.path, self.device)
        if self._widen:
            self._findings.notes.append(
                "ONNX Runtime has no bfloat16 kernels on the CPU: the file's bfloat16 values were run in float32"
            )
        probe = open_session(widened(self.path) if self._widen else self.path, device=self.device, optimized=False)
        self._matched = match(self.captured, probe, strict=self.folded is not None, widened=self._widen)
        self._findings.notes += self._matched.notes
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
            found.append(EagerCandidate("folded class", replace(self.captured, eager=self.eager).run_eager))
        if self.path is not None:
            self._findings.notes += provider_notes(self.device)
            found += [self._onnx(optimized=on) for on in (False, True)]
        return found

    def _blame(self) -> str:
        """Which of ONNX Runtime's optimisations makes a file wrong that is right without them, as a problem."""
        plain, full = (Follower(self._references, self._onnx(optimized=on), self._follower) for on in (False, True))
        ratios = [(full.misfit(run), run) for run in range(len(self._references.batches))]
        worst, run = max(ratios)
        # Right or wrong is on which side of the middle, on a logarithmic scale, a run ends.
        middle = math.sqrt(min(worst, 1e30) * max(plain.misfit(run), 1.0))

        def wrong(disabled: Sequence[str]) -> bool:
            candidate = self._onnx(optimized=True, disabled=disabled)
            return not Follower(self._references, candidate, self._follower).misfit(run) < middle

        names = guilty(wrong)
        if not names:
            return (
                "ONNX Runtime: the file is right without its optimisations and wrong with them, whichever is left out"
            )
        return (
            f"ONNX Runtime: its optimisation {' with '.join(names)} makes the file wrong, which is right without it: "
            f"disable it where the file runs (InferenceSession(..., disabled_optimizers={list(names)}))"
        )

    def _onnx(self, *, optimized: bool, tf32: bool = False, disabled: Sequence[str] = ()) -> OnnxCandidate:
        assert self.path is not None
        return OnnxCandidate(
            self.path, device=self.device, optimized=optimized, inputs=self._matched.inputs, widen=self._widen,
            tf32=tf32, names=self.file_names, outputs=self._matched.outputs, wider=self._matched.wider,
            disabled=disabled,
        )  # fmt: skip

    def _judge_outputs(self, candidate: Candidate) -> list[OutputResult]:
        tallies: dict[int, Tally] = {}
        wrong_integers: dict[int, tuple[int, int, bool]] = {}
        self._follower = follower = Follower(self._references, candidate, self._follower)
        for run, (batch, truth, unfolded) in enumerate(
            zip(self._references.batches, self._references.truth, self._references.unfolded)
        ):
            try:
                outputs, followed = follower.run(run)
            except Exception as error:
                self._findings.problems.append(f"{candidate.name}: fails at {words(batch)}: {first_line(error)}")
                continue
            given = numbers(outputs)
            if len(given) != len(unfolded):
                self._findings.problems.append(f"{candidate.name}: {len(given)} outputs instead of {len(unfolded)}")
                return []
            for i, (own, value, true, right) in enumerate(zip(unfolded, given, truth, followed)):
                where = self._where(candidate, i)
                widened = self._widened_ok(candidate, own, value)
                if value.shape != right.shape or (value.dtype != own.dtype and not widened):
                    problem = f"{where}: {tuple(value.shape)} {value.dtype} instead of {tuple(right.shape)} {own.dtype}"
                    self._findings.problems.append(f"{problem} at batch {batch.size}")
                    continue
                problem_found = finite_problem(value, right)
                if problem_found:
                    found = f" on {batch.origin} inputs" if batch.origin else ""
                    self._worst_found = float("inf") if found else self._worst_found
                    self._findings.problems.append(f"{where}: {problem_found}{found}")
                if own.is_floating_point():
                    tally = tallies.setdefault(i, Tally(epsilon(own.dtype)))
                    tally.add(value, own, true, batched=batched(batch, own), run=run, followed=right)
                else:
                    wrong, total, known = wrong_integers.get(i, (0, 0, True))
                    known = known and run not in self._references.blind and torch.equal(own, true)
                    wrong_integers[i] = (wrong + int((value != right).sum()), total + own.numel(), known)
        follower.report()
        for i, (wrong, total, known) in wrong_integers.items():
            known = known and not follower.unread(i)
            if wrong:
                (self._findings.problems if known else self._findings.doubts).append(
                    f"{self._where(candidate, i)}: {wrong} of {total} integers differ"
                    + ("" if known else "; whether they are near-ties cannot be told")
                )
        results = [self._judge_tally(candidate, i, tally) for i, tally in tallies.items()]
        ran = self._references.samples
        results += [OutputResult(candidate.name, self._output_name(i), 0.0, 0.0, 0.0, 0.0, ran) for i in wrong_integers]
        return results

    def _widened_ok(self, candidate: Candidate, own: Tensor, value: Tensor) -> bool:
        return (
            isinstance(candidate, OnnxCandidate)
            and candidate.wider
            and own.dtype in (torch.bfloat16, torch.float16)
            and value.dtype == torch.float32
        )

    def _judge_tally(self, candidate: Candidate, index: int, tally: Tally) -> OutputResult:
        where = self._where(candidate, index)
        if not tally.elements:
            self._findings.doubts.append(f"{where}: it has no finite element to compare; give real inputs (--data)")
            nan = float("nan")
            return OutputResult(candidate.name, self._output_name(index), nan, nan, nan, nan, 0)
        noise, steady = tally.relative(tally.noise), tally.ratios(steady=True)
        searched = [r for r, run in zip(steady.tolist(), tally.runs) if self._references.batches[run].origin]
        self._worst_found = max([self._worst_found, *searched])
        wild = noise > max(NOISE_LIMIT, 16 * tally.eps)
        # A discontinuous model is by chance exact on some samples, and an error over that noise means nothing.
        ratios = steady if wild else tally.ratios()
        typical = median(ratios)
        unread = self._follower.unread(index) if self._follower else 0
        against = self._findings.doubts if unread else self._findings.problems
        if unread and not typical <= self.limit:
            where = f"{where} (depends on decisions of the model that the file gives no names to, {unread} of them)"
        if not typical <= self.limit:
            against.append(f"{where}: error is {typical:.3g} times the noise (limit {self.limit:g})")
        apart: dict[str, float] = {}
        for run, ratio in tally.per_run().items():
            size = words(self._references.batches[run])
            if not ratio <= max(self.limit * RUN_FACTOR, apart.get(size, 0.0)):
                apart[size] = ratio
        against += [f"{where}: error is {ratio:.3g} times the noise at {size}" for size, ratio in apart.items()]
        far = int((~(steady <= self.limit * SAMPLE_FACTOR)).sum())
        if far and typical <= self.limit:
            self._findings.doubts.append(
                f"{where}: {far} of {len(steady)} samples are off by up to {float(steady.max()):.3g} times the noise, "
                "the others not: wrong for some inputs, or a decision (top-k, rounding) that fell the other way"
            )
        if wild:
            self._findings.doubts.append(
                f"output '{self._output_name(index)}': the unfolded model's own error is {noise:.2g} of it, so almost "
                "anything would pass; it is discontinuous on these inputs (top-k, rounding) or out of its range: try "
                "--data"
            )
        return OutputResult(
            candidate.name, self._output_name(index), noise, tally.relative(tally.error), typical,
            float(ratios.max()), len(tally.error),
        )  # fmt: skip

    def _where(self, candidate: Candidate, index: int) -> str:
        return f"{candidate.name}, output '{self._output_name(index)}'"

    def _output_name(self, index: int) -> str:
        names = number_names(self.captured.program)
        return names[index] if index < len(names) else str(index)


@contextlib.contextmanager
def _threads_that_pay(captured: Captured) -> Iterator[None]:
    """One thread for a model that runs in a blink.

    torch's threads wait for one another by spinning: on a busy machine that made the check of a small net 25 times
    slower, and on an idle one it saves such a net nothing.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        start = time.perf_counter()
        with contextlib.suppress(Exception):  # whoever runs it next reports that
            Runner(captured.program)(captured.flat)
        if time.perf_counter() - start > LONG_RUN:
            torch.set_num_threads(threads)
        yield
    finally:
        torch.set_num_threads(threads)
