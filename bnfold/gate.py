"""The gate: the captured graph, the folded graph and the ONNX file, each against float64.

Three questions: does the capture equal the eager model, does every fold site equal the value it replaces, do the
outputs. Anything that cannot be judged is *inconclusive*, which is no pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.export import ExportedProgram

from bnfold.candidates import Candidate, OnnxCandidate, TorchCandidate, match_inputs, needs_widening, widened
from bnfold.capture import Captured
from bnfold.errors import BnfoldError
from bnfold.interpret import Runner
from bnfold.judge import Tally, epsilon, finite_problem, site_ratios
from bnfold.report import Accuracy, CheckReport, Ledger, OutputResult, SiteResult, Verdict
from bnfold.runtime import open_session
from bnfold.samples import Batch, batches, stored_batches

#: Median ratio of a whole output, ratio at a fold site, and median ratio of any one run (one batch size, one shape).
LIMIT, SITE_LIMIT, RUN_FACTOR = 4.0, 16.0, 16.0
#: A model whose own error is above this, relative, is discontinuous on these inputs and nothing follows from a ratio.
NOISE_LIMIT = 1e-2
#: Values at fold sites are compared for as many samples as fit into this many elements.
SITE_ELEMENTS = 32_000_000

Progress = Callable[[str, int, int], None]


@dataclass
class Gate:
    """One judgement. Build it, then ``judge``."""

    captured: Captured
    ledger: Ledger
    folded: ExportedProgram | None = None
    path: Path | None = None
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
        self._problems: list[str] = []
        self._doubts: list[str] = []
        self._notes: list[str] = []
        captured = self.captured
        self._batches = batches(
            captured.program, captured.names, captured.flat, samples=self.samples, seed=self.seed, data=self.data,
            ranges=captured.ranges,
        )  # fmt: skip
        self._run_references()
        capture_error = self._judge_capture()
        outputs: list[OutputResult] = []
        sites: list[SiteResult] = []
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
        sites = self._judge_sites(candidates)
        accuracy = self._judge_accuracy(candidates)
        self.progress("check", len(candidates) + 1, len(candidates) + 1)
        if not outputs:
            self._problems.append("no output was compared")
        verdict: Verdict = "fail" if self._problems else "inconclusive" if self._doubts else "pass"
        batch_sizes = tuple(dict.fromkeys(b.size for b in self._batches))
        return CheckReport(
            verdict, provider, sum(b.samples for b in self._batches), batch_sizes, tuple(outputs), tuple(sites),
            capture_error, (*self._problems, *self._doubts), tuple(self._notes), accuracy, self.limit, self.site_limit,
        )  # fmt: skip

    # -- references ------------------------------------------------------------------------------------------------

    def _run_references(self) -> None:
        """Truth and unfolded outputs for every batch that the unfolded model itself can run."""
        program, masters = self.captured.program, self.captured.masters
        unfolded, precise = Runner(program), Runner(program, precise=True, masters=masters)
        self._truth: list[list[Any]] = []
        self._unfolded: list[list[Any]] = []
        runnable: list[Batch] = []
        for i, batch in enumerate(self._batches):
            self.progress("truth", i, len(self._batches))
            try:
                own = unfolded(batch.flat)
            except Exception as error:
                if not runnable and i == len(self._batches) - 1:
                    raise
                words = f"batch {batch.size}" + (f", {batch.sizes}" if batch.sizes else "")
                self._notes.append(f"the unfolded model itself does not run at {words}: {_first_line(error)}")
                continue
            try:
                truth = precise(batch.flat)
            except Exception as error:
                self._doubts.append(
                    f"the graph does not run in float64 ({_first_line(error)}), so there is no truth to compare with; "
                    "compared with the unfolded model in its own dtype instead"
                )
                truth = [v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in own]
            runnable.append(batch)
            self._truth.append(truth)
            self._unfolded.append(own)
        self._batches = runnable
        self._doubts = list(dict.fromkeys(self._doubts))

    def _judge_capture(self) -> float:
        """Eager model against captured graph, in one dtype: by ratio to the noise where not bitwise equal."""
        if self.captured.eager is None or not self._batches:
            return 0.0
        batch = max(self._batches[:3], key=lambda b: b.samples)
        at = self._batches.index(batch)
        worst = 0.0
        eager = self.captured.run_eager(batch.flat)
        pairs = [(e, g, t) for e, g, t in zip(eager, self._unfolded[at], self._truth[at]) if isinstance(t, Tensor)]
        if len(eager) != len(self._unfolded[at]):
            self._problems.append("capture: the eager model and the captured graph differ in their number of outputs")
        for own, graph, truth in pairs:
            if own.shape != graph.shape or own.dtype != graph.dtype:
                self._problems.append(f"capture: the eager model gives {tuple(own.shape)} {own.dtype}")
            elif own.is_floating_point():
                if torch.equal(own, graph) or (own.isnan() & graph.isnan() | (own == graph)).all():
                    continue
                tally = Tally(epsilon(own.dtype))
                tally.add(own, graph, truth, batched=batch.size > 0, run=0)
                worst = max(worst, float(tally.ratios().median()))
            elif not torch.equal(own, graph):
                self._problems.append("capture: an integer output of the eager model differs from the captured graph's")
        if worst > self.limit:
            self._problems.append(
                f"capture: the eager model is {worst:.3g} times as far from float64 as the captured graph"
            )
        return worst

    # -- candidates ------------------------------------------------------------------------------------------------

    def _candidates(self) -> list[Candidate]:
        found: list[Candidate] = []
        if self.folded is not None:
            found.append(TorchCandidate("folded torch", self.folded))
        if self.path is not None:
            widen = needs_widening(self.path, self.device)
            if widen:
                self._notes.append(
                    "ONNX Runtime has no bfloat16 kernels on the CPU: the file's bfloat16 values were run in float32"
                )
            probe = open_session(widened(self.path) if widen else self.path, device=self.device, optimized=False)
            inputs = match_inputs(self.captured, probe)
            del probe
            found += [
                OnnxCandidate(self.path, device=self.device, optimized=on, inputs=inputs, widen=widen)
                for on in (False, True)
            ]
        return found

    def _judge_outputs(self, candidate: Candidate) -> list[OutputResult]:
        tallies: dict[int, Tally] = {}
        wrong_integers: dict[int, tuple[int, int]] = {}
        for run, (batch, truth, unfolded) in enumerate(zip(self._batches, self._truth, self._unfolded)):
            try:
                outputs = candidate.run(batch.flat)
            except Exception as error:
                words = f"batch {batch.size}" + (f", {batch.sizes}" if batch.sizes else "")
                self._problems.append(f"{candidate.name}: fails at {words}: {_first_line(error)}")
                continue
            expected = [v for v in unfolded if isinstance(v, Tensor)]
            truths = [v for v in truth if isinstance(v, Tensor)]
            given = [v for v in outputs if isinstance(v, Tensor)]
            if len(given) != len(expected):
                self._problems.append(f"{candidate.name}: {len(given)} outputs instead of {len(expected)}")
                return []
            for i, (own, value, true) in enumerate(zip(expected, given, truths)):
                where = f"{candidate.name}, output {i}"
                widened = self._widened_ok(candidate, own, value)
                if value.shape != own.shape or (value.dtype != own.dtype and not widened):
                    problem = f"{where}: {tuple(value.shape)} {value.dtype} instead of {tuple(own.shape)} {own.dtype}"
                    self._problems.append(f"{problem} at batch {batch.size}")
                    continue
                problem_found = finite_problem(value, true)
                if problem_found:
                    self._problems.append(f"{where}: {problem_found}")
                if own.is_floating_point():
                    batched = batch.size > 0 and own.ndim > 0 and own.shape[0] == batch.size
                    tally = tallies.setdefault(i, Tally(epsilon(own.dtype)))
                    tally.add(value, own, true, batched=batched, run=run)
                elif not own.is_complex():
                    wrong, total = wrong_integers.get(i, (0, 0))
                    wrong_integers[i] = (wrong + int((value != own).sum()), total + own.numel())
        for i, (wrong, total) in wrong_integers.items():
            if wrong:
                self._doubts.append(
                    f"{candidate.name}, output {i}: {wrong} of {total} integers differ; whether they are near-ties "
                    "cannot be told"
                )
        results = [self._judge_tally(candidate, i, tally) for i, tally in tallies.items()]
        if not results and wrong_integers:
            results = [OutputResult(candidate.name, str(i), 0.0, 0.0, 0.0, 0.0, self.samples) for i in wrong_integers]
        self._problems = list(dict.fromkeys(self._problems))
        return results

    def _widened_ok(self, candidate: Candidate, own: Tensor, value: Tensor) -> bool:
        return (
            isinstance(candidate, OnnxCandidate)
            and candidate.widen
            and own.dtype == torch.bfloat16
            and value.dtype == torch.float32
        )

    def _judge_tally(self, candidate: Candidate, index: int, tally: Tally) -> OutputResult:
        ratios = tally.ratios()
        median, noise = float(ratios.median()), tally.relative(tally.noise)
        where = f"{candidate.name}, output {index}"
        if not median <= self.limit:
            self._problems.append(f"{where}: error is {median:.3g} times the noise (limit {self.limit:g})")
        for run, ratio in tally.per_run().items():
            if not ratio <= self.limit * RUN_FACTOR:
                batch = self._batches[run]
                words = f"batch {batch.size}" + (f", {batch.sizes}" if batch.sizes else "")
                self._problems.append(f"{where}: error is {ratio:.3g} times the noise at {words}")
        if noise > max(NOISE_LIMIT, 16 * tally.eps):
            self._doubts.append(
                f"output {index}: the unfolded model's own error is {noise:.2g} of its output, so almost anything "
                "would pass; it is discontinuous on these inputs (top-k, rounding) or out of its range: try --data"
            )
        return OutputResult(
            candidate.name, self._output_name(index), noise, tally.relative(tally.error), median,
            float(ratios.max()), len(tally.error),
        )  # fmt: skip

    def _output_name(self, index: int) -> str:
        from bnfold.names import output_names

        names = output_names(self.captured.program)
        return names[index] if index < len(names) else str(index)

    # -- sites -----------------------------------------------------------------------------------------------------

    def _judge_sites(self, candidates: Sequence[Candidate]) -> list[SiteResult]:
        sites = self.ledger.sites
        if not sites or not self._batches:
            return []
        modules = {value: entry for entry in self.ledger.entries for value, _ in entry.site}
        batch = self._site_batch(sites)
        program, masters = self.captured.program, self.captured.masters
        precise, own = Runner(program, precise=True, masters=masters), Runner(program)
        try:
            precise(batch.flat, keep=set(sites.values()))
        except Exception:  # no float64 truth: said already, and inconclusive
            return []
        own(batch.flat, keep=set(sites.values()))
        results: list[SiteResult] = []
        for candidate in candidates:
            if candidate.name == "ONNX Runtime":
                continue  # extra outputs block its fusions, so it would be another program
            try:
                found = candidate.values(batch.flat, list(sites))
            except Exception as error:
                self._problems.append(f"{candidate.name}: fails when asked for the fold sites: {_first_line(error)}")
                continue
            for folded, value in found.items():
                truth, unfolded = precise.kept[sites[folded]], own.kept[sites[folded]]
                entry = modules[folded]
                where = f"{candidate.name}, fold of '{entry.module or entry.value}'"
                if value.shape != truth.shape:
                    self._problems.append(f"{where}: shape {tuple(value.shape)} instead of {tuple(truth.shape)}")
                    continue
                ratio, channel = site_ratios(value, unfolded, truth, epsilon(unfolded.dtype))
                results.append(SiteResult(candidate.name, folded, entry.module or entry.value, ratio, channel))
                if not max(ratio, channel) <= self.site_limit:
                    self._problems.append(
                        f"{where}: error is {max(ratio, channel):.3g} times the noise (limit {self.site_limit:g})"
                    )
        return results

    def _site_batch(self, sites: Mapping[str, str]) -> Batch:
        wanted = set(sites.values())
        elements = 0
        for node in self.captured.program.graph.nodes:
            value = node.meta.get("val")
            if node.name in wanted and isinstance(value, Tensor):
                elements += int(np.prod([n if isinstance(n, int) else max(int(n.node.hint), 1) for n in value.shape]))
        example = self.captured.flat[0] if self.captured.flat else None
        per_sample = max(elements // max(example.shape[0] if isinstance(example, Tensor) and example.ndim else 1, 1), 1)
        fitting = [b for b in self._batches if not b.sizes or b.sizes == self._batches[0].sizes]
        small = [b for b in fitting if b.samples * per_sample <= SITE_ELEMENTS]
        return max(small, key=lambda b: b.samples) if small else min(fitting, key=lambda b: b.samples)

    # -- accuracy --------------------------------------------------------------------------------------------------

    def _judge_accuracy(self, candidates: Sequence[Candidate]) -> Accuracy | None:
        if self.labels is None or self.data is None or not candidates or not self._batches:
            return None
        outputs = [v for v in self._unfolded[0] if isinstance(v, Tensor)]
        index = next((i for i, v in enumerate(outputs) if v.is_floating_point() and v.ndim == 2), None)
        if index is None:
            self._notes.append("labels were given, but no output has the shape (samples, classes)")
            return None
        candidate, unfolded = candidates[-1], Runner(self.captured.program)
        size = 64 if self._batches[0].size else 1
        before, after = [], []
        for flat in stored_batches(self.captured.names, self.captured.flat, self.data, size=size):
            before.append([v for v in unfolded(flat) if isinstance(v, Tensor)][index].double())
            after.append([v for v in candidate.run(flat) if isinstance(v, Tensor)][index].double())
        old, new, labels = torch.cat(before), torch.cat(after), torch.from_numpy(self.labels).long().flatten()
        if isinstance(candidate, OnnxCandidate):
            candidate.close()
        top = old.topk(2, dim=1).values if old.shape[1] > 1 else torch.cat([old, old * 0], 1)
        margin, flipped = top[:, 0] - top[:, 1], old.argmax(1) != new.argmax(1)
        count = len(labels)
        correct = [float((logits.argmax(1) == labels[: len(logits)]).double().mean()) for logits in (old, new)]
        smallest = margin[flipped] if bool(flipped.any()) else margin
        return Accuracy(count, correct[0], correct[1], int(flipped.sum()), float(smallest.min()))


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
