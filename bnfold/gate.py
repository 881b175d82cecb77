"""The gate: the captured graph, the folded graph and the ONNX file, each against float64.

Three questions: does the capture equal the eager model, does every fold site equal the value it replaces, do the
outputs. Anything that cannot be judged is *inconclusive*, which is no pass.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.export import ExportedProgram

from bnfold.accuracy import judge_accuracy
from bnfold.candidates import Candidate, OnnxCandidate, TorchCandidate, match_inputs, needs_widening, widened
from bnfold.capture import Captured
from bnfold.errors import BnfoldError
from bnfold.interpret import Runner
from bnfold.judge import Tally, epsilon, finite_problem, median
from bnfold.names import output_names
from bnfold.reference import RUN_FACTOR, Findings, Progress, References, batched, first_line, numbers, words
from bnfold.report import CheckReport, Ledger, OutputResult, Verdict
from bnfold.runtime import open_session
from bnfold.samples import batches
from bnfold.sites import judge_sites

#: Median ratio of a whole output, and ratio at a fold site.
LIMIT, SITE_LIMIT = 4.0, 16.0
#: A single sample this many limits away is a wrong value or a decision that fell the other way: no pass either way.
SAMPLE_FACTOR = 64.0
#: A model whose own error is above this, relative, is discontinuous on these inputs and nothing follows from a ratio.
NOISE_LIMIT = 1e-2
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
    data: Mapping[str, np.ndarray] | None = None
    labels: np.ndarray | None = None
    progress: Progress = lambda stage, done, total: None

    def judge(self) -> CheckReport:
        """The verdict.

        Raises:
            BnfoldError: the file cannot be opened, or its inputs do not fit the model's.
        """
        with _threads_that_pay(self.captured):
            return self._judge()

    def _judge(self) -> CheckReport:
        captured = self.captured
        made = batches(
            captured.program, captured.names, captured.flat, samples=self.samples, seed=self.seed, data=self.data,
            ranges=captured.ranges,
        )  # fmt: skip
        self._findings = Findings()
        self._references = References(captured, made, self._findings, self.limit, self.progress)
        self._references.run()
        capture_error = self._references.judge_capture()
        outputs: list[OutputResult] = []
        provider = "torch"
        candidates = self._candidates()
        for i, candidate in enumerate(candidates):
            self.progress("check", i, len(candidates) + 1)
            outputs += self._judge_outputs(candidate)
            if isinstance(candidate, OnnxCandidate):
                with contextlib.suppress(BnfoldError):  # a session that failed has been reported already
                    provider = candidate.session.provider
                candidate.close()
        self.progress("check", len(candidates), len(candidates) + 1)
        sites = judge_sites(self._references, self.ledger, candidates, self.site_limit)
        accuracy = None
        if self.labels is not None and self.data and candidates:
            accuracy = judge_accuracy(self._references, candidates[-1], self.data, self.labels)
        self.progress("check", len(candidates) + 1, len(candidates) + 1)
        if not outputs:
            self._findings.problems.append("no output was compared")
        self._findings.once()
        problems, doubts, notes = self._findings.problems, self._findings.doubts, self._findings.notes
        verdict: Verdict = "fail" if problems else "inconclusive" if doubts else "pass"
        batch_sizes = tuple(dict.fromkeys(b.size for b in self._references.batches))
        return CheckReport(
            verdict, provider, self._references.samples, batch_sizes, tuple(outputs), tuple(sites), capture_error,
            (*problems, *doubts), tuple(notes), accuracy, self.limit, self.site_limit,
        )  # fmt: skip

    # -- candidates ------------------------------------------------------------------------------------------------

    def _candidates(self) -> list[Candidate]:
        found: list[Candidate] = []
        if self.folded is not None:
            found.append(TorchCandidate("folded torch", self.folded))
        if self.path is not None:
            widen = needs_widening(self.path, self.device)
            if widen:
                self._findings.notes.append(
                    "ONNX Runtime has no bfloat16 kernels on the CPU: the file's bfloat16 values were run in float32"
                )
            probe = open_session(widened(self.path) if widen else self.path, device=self.device, optimized=False)
            inputs = match_inputs(self.captured, probe)
            del probe
            found += [
                OnnxCandidate(
                    self.path, device=self.device, optimized=on, inputs=inputs, widen=widen, names=self.file_names
                )
                for on in (False, True)
            ]
        return found

    def _judge_outputs(self, candidate: Candidate) -> list[OutputResult]:
        tallies: dict[int, Tally] = {}
        wrong_integers: dict[int, tuple[int, int]] = {}
        for run, (batch, truth, unfolded) in enumerate(
            zip(self._references.batches, self._references.truth, self._references.unfolded)
        ):
            try:
                outputs = candidate.run(batch.flat)
            except Exception as error:
                self._findings.problems.append(f"{candidate.name}: fails at {words(batch)}: {first_line(error)}")
                continue
            given = numbers(outputs)
            if len(given) != len(unfolded):
                self._findings.problems.append(f"{candidate.name}: {len(given)} outputs instead of {len(unfolded)}")
                return []
            for i, (own, value, true) in enumerate(zip(unfolded, given, truth)):
                where = self._where(candidate, i)
                widened = self._widened_ok(candidate, own, value)
                if value.shape != own.shape or (value.dtype != own.dtype and not widened):
                    problem = f"{where}: {tuple(value.shape)} {value.dtype} instead of {tuple(own.shape)} {own.dtype}"
                    self._findings.problems.append(f"{problem} at batch {batch.size}")
                    continue
                problem_found = finite_problem(value, true)
                if problem_found:
                    self._findings.problems.append(f"{where}: {problem_found}")
                if own.is_floating_point():
                    tally = tallies.setdefault(i, Tally(epsilon(own.dtype)))
                    tally.add(value, own, true, batched=batched(batch, own), run=run)
                else:
                    wrong, total = wrong_integers.get(i, (0, 0))
                    wrong_integers[i] = (wrong + int((value != own).sum()), total + own.numel())
        for i, (wrong, total) in wrong_integers.items():
            if wrong:
                self._findings.doubts.append(
                    f"{self._where(candidate, i)}: {wrong} of {total} integers differ; whether they are near-ties "
                    "cannot be told"
                )
        results = [self._judge_tally(candidate, i, tally) for i, tally in tallies.items()]
        ran = self._references.samples
        results += [OutputResult(candidate.name, self._output_name(i), 0.0, 0.0, 0.0, 0.0, ran) for i in wrong_integers]
        return results

    def _widened_ok(self, candidate: Candidate, own: Tensor, value: Tensor) -> bool:
        return (
            isinstance(candidate, OnnxCandidate)
            and candidate.widen
            and own.dtype == torch.bfloat16
            and value.dtype == torch.float32
        )

    def _judge_tally(self, candidate: Candidate, index: int, tally: Tally) -> OutputResult:
        where = self._where(candidate, index)
        if not tally.elements:
            self._findings.doubts.append(f"{where}: it has no finite element to compare; give real inputs (--data)")
            nan = float("nan")
            return OutputResult(candidate.name, self._output_name(index), nan, nan, nan, nan, 0)
        noise, steady = tally.relative(tally.noise), tally.ratios(steady=True)
        wild = noise > max(NOISE_LIMIT, 16 * tally.eps)
        # A discontinuous model is by chance exact on some samples, and an error over that noise means nothing.
        ratios = steady if wild else tally.ratios()
        typical = median(ratios)
        if not typical <= self.limit:
            self._findings.problems.append(f"{where}: error is {typical:.3g} times the noise (limit {self.limit:g})")
        for run, ratio in tally.per_run().items():
            if not ratio <= self.limit * RUN_FACTOR:
                self._findings.problems.append(
                    f"{where}: error is {ratio:.3g} times the noise at {words(self._references.batches[run])}"
                )
        far = int((~(steady <= self.limit * SAMPLE_FACTOR)).sum())
        if far:
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
        names = output_names(self.captured.program)
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
