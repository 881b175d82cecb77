"""The gate: the captured graph, the folded graph and the ONNX file, each against float64.

Three questions: does the capture equal the eager model, does every fold site equal the value it replaces, do the
outputs. Anything that cannot be judged is *inconclusive*, which is no pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.export import ExportedProgram

from bnfold.candidates import Candidate, OnnxCandidate, TorchCandidate, match_inputs, needs_widening, widened
from bnfold.capture import Captured, tensor_inputs
from bnfold.errors import BnfoldError, InputError
from bnfold.interpret import Runner
from bnfold.judge import Tally, epsilon, finite_problem, median, site_ratios
from bnfold.report import Accuracy, CheckReport, Ledger, OutputResult, SiteResult, Verdict
from bnfold.runtime import open_session
from bnfold.samples import MIN_SAMPLES, Batch, batches, stored_batches

#: Median ratio of a whole output, ratio at a fold site, and median ratio of any one run (one batch size, one shape).
LIMIT, SITE_LIMIT, RUN_FACTOR = 4.0, 16.0, 16.0
#: A single sample this many limits away is a wrong value or a decision that fell the other way: no pass either way.
SAMPLE_FACTOR = 64.0
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
        self._truth: list[list[Tensor]] = []
        self._unfolded: list[list[Tensor]] = []
        self._eager: dict[int, Tally] = {}
        runnable: list[Batch] = []
        seen: set[tuple[int, str]] = set()
        reason = ""
        for i, batch in enumerate(self._batches):
            self.progress("truth", i, len(self._batches))
            # The captured graph may hold for fewer sizes than the model: each size is put to the model itself once.
            eager = None if (batch.size, batch.sizes) in seen else self._run_eager(batch)
            seen.add((batch.size, batch.sizes))
            try:
                own = numbers(unfolded(batch.flat))
            except Exception as error:
                reason = _first_line(error)
                if isinstance(eager, list):
                    self._problems.append(
                        f"capture: the model runs at {_words(batch)}, its captured graph does not ({reason}): fix that "
                        "dimension (--static)"
                    )
                else:
                    self._notes.append(f"the unfolded model itself does not run at {_words(batch)}: {reason}")
                continue
            if isinstance(eager, Exception):
                reason = _first_line(eager)
                self._notes.append(f"the unfolded model itself does not run at {_words(batch)}: {reason}")
                continue
            try:
                truth = numbers(precise(batch.flat))
            except Exception as error:
                self._doubts.append(
                    f"the graph does not run in float64 ({_first_line(error)}), so there is no truth to compare with; "
                    "compared with the unfolded model in its own dtype instead"
                )
                truth = [v.double() if v.is_floating_point() else v for v in own]
            if eager is not None:
                self._add_eager(eager, own, truth, batch, len(runnable))
            runnable.append(batch)
            self._truth.append(truth)
            self._unfolded.append(own)
        self._batches = runnable
        if not runnable:
            raise InputError(
                f"the unfolded model runs on none of the inputs made for it: {reason}", hint="Give real ones: --data"
            )
        ran = sum(batch.samples for batch in runnable)
        if ran < MIN_SAMPLES:
            self._doubts.append(
                f"only {ran} samples could be run, which is too few for a verdict: give real ones, --data"
            )
        self._doubts = list(dict.fromkeys(self._doubts))

    def _run_eager(self, batch: Batch) -> list[Tensor] | Exception | None:
        if self.captured.eager is None:
            return None
        try:
            return numbers(self.captured.run_eager(batch.flat))
        except Exception as error:
            return error

    def _add_eager(self, eager: list[Tensor], graph: list[Tensor], truth: list[Tensor], batch: Batch, run: int) -> None:
        problem = None
        if len(eager) != len(graph):
            problem = f"{len(eager)} outputs and its captured graph {len(graph)}"
        for i, (own, value, true) in enumerate(zip(eager, graph, truth)):
            if own.shape != value.shape or own.dtype != value.dtype:
                problem = f"{tuple(own.shape)} {own.dtype} and its captured graph {tuple(value.shape)} {value.dtype}"
            elif not own.is_floating_point():
                problem = problem if torch.equal(own, value) else "other integers than its captured graph"
            elif not torch.equal(own, value):
                differs = finite_problem(own, value)
                problem = f"other NaNs or infinities than its captured graph: {differs}" if differs else problem
                tally = self._eager.setdefault(i, Tally(epsilon(own.dtype)))
                tally.add(own, value, true, batched=_batched(batch, own), run=run)
        if problem:
            self._problems.append(f"capture: at {_words(batch)} the model gives {problem}")

    def _judge_capture(self) -> float:
        """Eager model against captured graph, in one dtype: by ratio to the noise where not bitwise equal."""
        worst = 0.0
        for tally in self._eager.values():
            ratios = tally.ratios(steady=True)
            if not len(ratios):
                continue
            worst = max(worst, median(ratios))
            if not median(ratios) <= self.limit:
                self._problems.append(
                    f"capture: the eager model is {median(ratios):.3g} times as far from float64 as the captured graph"
                )
            for run, ratio in tally.per_run().items():
                if not ratio <= self.limit * RUN_FACTOR:
                    self._problems.append(
                        f"capture: at {_words(self._batches[run])} the model and its graph differ by {ratio:.3g} "
                        "times the noise: its code depends on that size, so fix the dimension (--static)"
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
                OnnxCandidate(
                    self.path, device=self.device, optimized=on, inputs=inputs, widen=widen, names=self.file_names
                )
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
                self._problems.append(f"{candidate.name}: fails at {_words(batch)}: {_first_line(error)}")
                continue
            given = numbers(outputs)
            if len(given) != len(unfolded):
                self._problems.append(f"{candidate.name}: {len(given)} outputs instead of {len(unfolded)}")
                return []
            for i, (own, value, true) in enumerate(zip(unfolded, given, truth)):
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
                    tally = tallies.setdefault(i, Tally(epsilon(own.dtype)))
                    tally.add(value, own, true, batched=_batched(batch, own), run=run)
                else:
                    wrong, total = wrong_integers.get(i, (0, 0))
                    wrong_integers[i] = (wrong + int((value != own).sum()), total + own.numel())
        for i, (wrong, total) in wrong_integers.items():
            if wrong:
                self._doubts.append(
                    f"{candidate.name}, output {i}: {wrong} of {total} integers differ; whether they are near-ties "
                    "cannot be told"
                )
        results = [self._judge_tally(candidate, i, tally) for i, tally in tallies.items()]
        ran = sum(batch.samples for batch in self._batches)
        results += [OutputResult(candidate.name, self._output_name(i), 0.0, 0.0, 0.0, 0.0, ran) for i in wrong_integers]
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
        where = f"{candidate.name}, output {index}"
        if not tally.elements:
            self._doubts.append(f"{where}: it has no finite element to compare; give real inputs (--data)")
            nan = float("nan")
            return OutputResult(candidate.name, self._output_name(index), nan, nan, nan, nan, 0)
        ratios, steady = tally.ratios(), tally.ratios(steady=True)
        typical, noise = median(ratios), tally.relative(tally.noise)
        if not typical <= self.limit:
            self._problems.append(f"{where}: error is {typical:.3g} times the noise (limit {self.limit:g})")
        for run, ratio in tally.per_run().items():
            if not ratio <= self.limit * RUN_FACTOR:
                self._problems.append(f"{where}: error is {ratio:.3g} times the noise at {_words(self._batches[run])}")
        far = int((~(steady <= self.limit * SAMPLE_FACTOR)).sum())
        if far:
            self._doubts.append(
                f"{where}: {far} of {len(steady)} samples are off by up to {float(steady.max()):.3g} times the noise, "
                "the others not: wrong for some inputs, or a decision (top-k, rounding) that fell the other way"
            )
        if noise > max(NOISE_LIMIT, 16 * tally.eps):
            self._doubts.append(
                f"output {index}: the unfolded model's own error is {noise:.2g} of its output, so almost anything "
                "would pass; it is discontinuous on these inputs (top-k, rounding) or out of its range: try --data"
            )
        return OutputResult(
            candidate.name, self._output_name(index), noise, tally.relative(tally.error), typical,
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
        modules = {value: entry.module or entry.value for entry in self.ledger.entries for value, _ in entry.site}
        modules |= {value: merge.into for merge in self.ledger.merges for value, _ in merge.site}
        batch = self._site_batch(sites)
        program, masters = self.captured.program, self.captured.masters
        precise, own = Runner(program, precise=True, masters=masters), Runner(program)
        try:
            precise(batch.flat, keep=set(sites.values()))
        except Exception:  # no float64 truth: said already, and inconclusive
            return []
        own(batch.flat, keep=set(sites.values()))
        # Outputs are in the program's dtype, so its first one says what the constants are rounded to.
        dtype = next((v.dtype for v in self._unfolded[0] if isinstance(v, Tensor) and v.is_floating_point()), None)
        rounded = Runner(program, precise=True, masters=masters, jitter=epsilon(dtype or torch.float32))
        rounded(batch.flat, keep=set(sites.values()))
        results: list[SiteResult] = []
        for candidate in candidates:
            if candidate.name == "ONNX Runtime":
                continue  # extra outputs block its fusions, so it would be another program
            try:
                found = candidate.values(batch.flat, list(sites))
            except Exception as error:
                self._problems.append(f"{candidate.name}: fails when asked for the fold sites: {_first_line(error)}")
                continue
            if missing := len(set(sites) - set(found)):
                self._lost_sites(candidate, missing, len(sites))
            for folded, value in found.items():
                truth, unfolded = precise.kept[sites[folded]], own.kept[sites[folded]]
                where = f"{candidate.name}, fold of '{modules[folded]}'"
                if value.shape != truth.shape:
                    self._problems.append(f"{where}: shape {tuple(value.shape)} instead of {tuple(truth.shape)}")
                    continue
                ratio, channel = site_ratios(
                    value, unfolded, truth, epsilon(unfolded.dtype), rounded.kept[sites[folded]]
                )
                results.append(SiteResult(candidate.name, folded, modules[folded], ratio, channel))
                if not max(ratio, channel) <= self.site_limit:
                    self._problems.append(
                        f"{where}: error is {max(ratio, channel):.3g} times the noise (limit {self.site_limit:g})"
                    )
        return results

    def _lost_sites(self, candidate: Candidate, missing: int, total: int) -> None:
        if not isinstance(candidate, OnnxCandidate):
            self._problems.append(f"{candidate.name}: {missing} of {total} fold sites are not in the program")
        else:
            self._notes.append(
                f"{missing} of {total} fold sites have no value of their own in the file (a neighbour took them in): "
                "there the file is judged by its outputs alone"
            )

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
        if self.labels is None or not self.data or not candidates or not self._batches:
            return None
        index = next((i for i, v in enumerate(self._unfolded[0]) if v.is_floating_point() and v.ndim == 2), None)
        if index is None:
            self._notes.append("labels were given, but no output has the shape (samples, classes)")
            return None
        rows, labels = min(len(r) for r in self.data.values()), torch.from_numpy(self.labels).long().flatten()
        if len(labels) != rows:
            raise InputError(f"there are {len(labels)} labels for {rows} samples", hint="Give one class per sample")
        candidate, unfolded = candidates[-1], Runner(self.captured.program)
        size = self._batch_size()
        before, after = [], []
        for flat in stored_batches(self.captured.names, self.captured.flat, self.data, size=size):
            given = next(len(v) for v, name in zip(flat, self.captured.names) if name in self.data)
            if not self._batches[0].size and given < size:
                break  # a fixed batch does not take the rest
            try:
                before.append(numbers(unfolded(flat))[index].double())
                after.append(numbers(candidate.run(flat))[index].double())
            except Exception as error:
                self._problems.append(f"{candidate.name}: fails on the labelled data: {_first_line(error)}")
                return None
            if before[-1].shape != after[-1].shape or len(before[-1]) != given:
                self._notes.append("labels were given, but no output has the shape (samples, classes)")
                return None
        if isinstance(candidate, OnnxCandidate):
            candidate.close()
        if not before:
            self._notes.append(f"labels were given, but fewer samples than the fixed batch of {size}")
            return None
        old, new = torch.cat(before), torch.cat(after)
        labels = labels[: len(old)]
        top = old.topk(2, dim=1).values if old.shape[1] > 1 else torch.cat([old, old * 0], 1)
        margin, flipped = top[:, 0] - top[:, 1], old.argmax(1) != new.argmax(1)
        correct = [float((logits.argmax(1) == labels).double().mean()) for logits in (old, new)]
        smallest = margin[flipped] if bool(flipped.any()) else margin
        return Accuracy(len(labels), correct[0], correct[1], int(flipped.sum()), float(smallest.min()))

    def _batch_size(self) -> int:
        """How many labelled samples are run at once: 64, or fewer where the batch's range or its fixed size says so."""
        if not self._batches[0].size:
            first = next((v for v in self.captured.flat if isinstance(v, Tensor) and v.ndim), None)
            return 1 if first is None else int(first.shape[0])
        node = next(n for n in self.captured.program.graph.nodes if n.name == tensor_inputs(self.captured.program)[0])
        high = self.captured.ranges.get(str(node.meta["val"].shape[0]), (1, None))[1]
        return min(64, high or 64)


def numbers(values: Sequence[Any]) -> list[Tensor]:
    """The outputs that hold numbers: tensors, complex ones as pairs of reals, as ONNX has them, and bare numbers."""
    tensors = [torch.tensor(v) if isinstance(v, (int, float)) else v for v in values]
    return [torch.view_as_real(v) if v.is_complex() else v for v in tensors if isinstance(v, Tensor)]


def _batched(batch: Batch, output: Tensor) -> bool:
    return batch.size > 0 and output.ndim > 0 and output.shape[0] == batch.size


def _words(batch: Batch) -> str:
    size = f"batch {batch.size}" if batch.size else "the fixed batch"
    return f"{size}, {batch.sizes}" if batch.sizes else size


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
