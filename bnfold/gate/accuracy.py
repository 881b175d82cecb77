"""Accuracy on the user's data, before and after: every sample through the unfolded model and what is judged.

The unfolded model runs in its own dtype: float64 costs several times as much, and is asked only where its answer
decides something. That is where a class changed, for how far from a tie the logits really are, and for the sample that
differs most; as in the gate, float64 follows the decisions of what it is compared with. The gate's own samples (the
first of the data) are compared with float64 one and all.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bnfold.errors import InputError
from bnfold.gate.candidates import Candidate, OnnxCandidate
from bnfold.gate.data import IGNORED, VOID, Labels, stored_batches
from bnfold.gate.following import Follower
from bnfold.gate.judge import Tally, epsilon, finite_problem
from bnfold.gate.metrics import Classification, Errors, Regression, rms
from bnfold.gate.reference import RUN_FACTOR, SAMPLE_FACTOR, Findings, References, batched, first_line, numbers
from bnfold.gate.samples import MIN_SAMPLES, Batch
from bnfold.gate.stored import Rows, in_order
from bnfold.graph.capture import Captured, tensor_inputs
from bnfold.graph.interpret import Runner
from bnfold.graph.names import number_names
from bnfold.report import Accuracy

#: Samples that are run at once, and bytes of their inputs and outputs.
SAMPLES, BYTES = 64, 32 << 20
#: Batches with flips that are run in float64; of further flips the noise is taken to be the usual one.
TRUTHS = 16


def judge_accuracy(
    references: References,
    candidate: Candidate,
    data: Mapping[str, Rows],
    labels: Labels | None = None,
    *,
    pinned: Mapping[str, int] | None = None,
    before: Candidate | None = None,
) -> Accuracy | None:
    """Runs all of ``data``; None where the candidate fails on it, which is a problem.

    A class that changes is a near-tie where the two logits are closer than the gate lets the error of a run be
    (``limit * RUN_FACTOR`` times the noise), and a problem where they are not. So are NaN and infinities that the
    unfolded model does not give. A sample that is further off than the gate lets a single one be is a doubt.

    Args:
        references: the runs that the gate has made, for the noise.
        candidate: what is judged.
        data: samples by input name.
        labels: what is known about them, after ``data.assign``.
        pinned: sizes that the file fixes, by symbol.
        before: another candidate, that probably decides alike and shows its decisions.

    Raises:
        InputError: the labels do not fit the output that they belong to.
    """
    size, fixed = _batch_size(references.captured, data, pinned or {}), bool(pinned) or not references.batches[0].size
    run = _Run(references, candidate, before, data, labels or Labels(), size, fixed=fixed)
    try:
        return run.judge()
    finally:
        for used in (candidate, before):
            if isinstance(used, OnnxCandidate):
                used.close()


class _Run:
    """One pass over the data."""

    def __init__(
        self, references: References, candidate: Candidate, before: Candidate | None, data: Mapping[str, Rows],
        labels: Labels, size: int, *, fixed: bool,
    ) -> None:  # fmt: skip
        self.references, self.candidate, self.before, self.labels = references, candidate, before, labels
        self.data, self.size, self.fixed = data, size, fixed
        captured, self.findings = references.captured, references.findings
        self.names = number_names(captured.program)
        self.unfolded = Runner(captured.program)
        self.truths = 0
        first = references.unfolded[0]
        # What has no samples along its first axis cannot be told apart by them.
        self.outputs = [
            i
            for i, value in enumerate(first)
            if value.is_floating_point()
            and value.ndim
            and value.numel()
            and all(
                values[i].shape[0] == (batch.size or size)
                for values, batch in zip(references.unfolded, references.batches)
            )
        ]
        self.noise = {i: _typical_noise(references, i) for i in self.outputs}
        self.errors = {i: Errors(self.names[i]) for i in self.outputs}
        self.targets = {i: Regression(self.names[i]) for i in self.outputs if self.names[i] in labels.targets}
        self.classes = self._classes(first)
        self.worst: dict[int, tuple[float, int, int]] = {}

    def _classes(self, first: list[Tensor]) -> dict[int, Classification]:
        """Where classes are: where the labels belong, else along axis 1 of the first (samples, classes)."""
        near = self.references.limit * RUN_FACTOR
        if self.labels.output:
            wanted = [i for i in self.outputs if self.names[i] == self.labels.output]
            if not wanted:
                raise InputError(f"output '{self.labels.output}' has no sample axis for the labels")
            return {wanted[0]: Classification(self.names[wanted[0]], self.labels.axis, near)}
        plain = [i for i in self.outputs if first[i].ndim == 2 and first[i].shape[1] > 1 and i not in self.targets]
        return {i: Classification(self.names[i], 1, near) for i in plain[:1]}

    def judge(self) -> Accuracy | None:
        """Runs the data, ``size`` samples at a time."""
        captured, total = self.references.captured, len(next(iter(self.data.values())))
        known = {i: in_order(self.labels.targets[self.names[i]], self.size) for i in self.targets}
        classes = in_order(self.labels.classes, self.size) if self.labels.classes is not None else None
        done = 0
        for flat, count in stored_batches(captured.names, captured.flat, self.data, size=self.size, fixed=self.fixed):
            self.references.progress("accuracy", done, total)
            try:
                before, after = numbers(self.unfolded(flat)), numbers(self.candidate.run(flat))
            except Exception as error:
                self.findings.problems.append(
                    f"{self.candidate.name}: fails on the data, samples {done} to {done + count - 1}: "
                    f"{first_line(error)}"
                )
                return None
            right = torch.from_numpy(next(classes)) if classes is not None else None
            targets = {i: torch.from_numpy(next(rows)) for i, rows in known.items()}
            if not self._add(flat, before, after, count, done, right, targets):
                return None
            done += count
        self.references.progress("accuracy", total, total)
        return self._result(done)

    def _add(
        self, flat: tuple[Any, ...], before: list[Tensor], after: list[Tensor], count: int, start: int,
        right: Tensor | None, targets: dict[int, Tensor],
    ) -> bool:  # fmt: skip
        for i in self.outputs:
            own, new = before[i], after[i] if i < len(after) else before[i][:0]
            where = f"{self.candidate.name}, output '{self.names[i]}'"
            if own.shape != new.shape:
                self.findings.problems.append(
                    f"{where}: {tuple(new.shape)} instead of {tuple(own.shape)} on the data, sample {start} and on"
                )
                return False
            own, new = own[:count], new[:count]
            if problem := finite_problem(new, own):
                self.findings.problems.append(
                    f"{where}: on the data, samples {start} to {start + count - 1}, {problem} (of the unfolded model)"
                )
            relative = self.errors[i].add(own, new)
            worst = int(relative.argmax())
            if i not in self.worst or float(relative[worst]) > self.worst[i][0]:
                self.worst[i] = float(relative[worst]), start, worst
            if i in targets:
                if targets[i].numel() != own.numel():
                    raise InputError(
                        f"targets {tuple(targets[i].shape)} for output '{self.names[i]}' {tuple(own.shape)}"
                    )
                self.targets[i].add(own, new, targets[i])
            if i in self.classes:
                self._classify(i, flat, own, new, right, start)
        return True

    def _classify(
        self, index: int, flat: tuple[Any, ...], own: Tensor, new: Tensor, right: Tensor | None, start: int
    ) -> None:
        good = own.isfinite()
        noise = self.noise[index] * rms(own, good)
        if right is not None and right.shape != (shape := own.movedim(self.classes[index].axis, -1).shape[:-1]):
            raise InputError(
                f"labels of samples {tuple(right.shape[1:])}, classes of output '{self.names[index]}' for "
                f"{tuple(shape[1:])}",
                where=self.labels.where,
            )
        void = right is not None and right.ndim > 1 and own.shape[self.classes[index].axis] <= VOID
        ignored = (IGNORED, VOID) if void else (IGNORED,)

        def truth() -> Tensor:
            return self._true_noise(index, flat, own) if self.truths < TRUTHS else noise

        self.classes[index].add(own, new, right, ignored, noise, start, truth)

    def _true_noise(self, index: int, flat: tuple[Any, ...], own: Tensor) -> Tensor:
        self.truths += 1
        try:
            _, _, true, followed = (values[index][: len(own)] for values in self._follow(flat))
        except Exception:  # the gate has said so
            return torch.zeros(len(own), dtype=torch.float64)
        noise = rms(own.double() - true, own.isfinite() & true.isfinite())
        # What the candidate's own decisions change is no error: they are judged by themselves.
        return torch.hypot(noise, rms(followed - true, followed.isfinite() & true.isfinite()))

    def _follow(self, flat: tuple[Any, ...]) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        """One batch: the unfolded model, the candidate, and for each of them the truth that took its decisions.

        Raises:
            Exception: there is no truth, or one of them does not run.
        """
        captured, limit = replace(self.references.captured, eager=None), self.references.limit
        rows = flat[captured.names.index(next(iter(self.data)))].shape[0] if self.references.batches[0].size else 0
        alone = References(captured, [Batch(flat, rows, "")], Findings(), limit, lambda stage, done, total: None)
        alone.run()
        if alone.blind:
            raise RuntimeError("no float64")
        findings, known = Findings(), None
        if self.before is not None and self.candidate.deployed and alone.decisions.names:
            known = Follower(alone, self.before, findings=Findings())
            with contextlib.suppress(Exception):  # it is no more than a help
                known.run(0)
        follower = Follower(alone, self.candidate, known, findings)
        outputs, followed = follower.run(0)
        follower.report()
        self.findings.problems += findings.problems
        self.findings.doubts += findings.doubts
        return alone.unfolded[0], numbers(outputs), alone.truth[0], followed

    def _result(self, samples: int) -> Accuracy:
        agreement = tuple(errors.result(self.noise[i], *self._judge_worst(i)) for i, errors in self.errors.items())
        found = next((c.result() for c in self.classes.values()), {"before": None, "after": None, "flips": 0})
        for classification in self.classes.values():
            self._judge_flips(classification, samples)
        if samples < MIN_SAMPLES:
            self.findings.notes.append(
                f"the data hold only {samples} of the {MIN_SAMPLES} samples that make a verdict: each is used again"
            )
        if self.labels.unused:
            listed = ", ".join(repr(name) for name in self.labels.unused)
            self.findings.notes.append(f"the data's {listed}: no input, output, labels or targets, and not used")
        targets = tuple(regression.result() for regression in self.targets.values())
        return Accuracy(
            samples=samples, candidate=self.candidate.name, agreement=agreement, targets=targets,
            data=self.labels.digest, **{"smallest_margin": None, **found},
        )  # fmt: skip

    def _judge_worst(self, index: int) -> tuple[int, float]:
        """The sample that differs most, and its error against float64 in multiples of the noise."""
        captured, (_, start, row) = self.references.captured, self.worst[index]
        sample = start + row
        again = {name: rows[start : start + self.size] for name, rows in self.data.items()}
        flat, _ = next(stored_batches(captured.names, captured.flat, again, size=self.size, fixed=self.fixed))
        try:
            own, new, true, followed = (values[index][row : row + 1] for values in self._follow(flat))
            good = own.isfinite() & new.isfinite() & true.isfinite() & followed.isfinite()
        except Exception:
            return sample, math.nan
        noise = max(float(rms(own.double() - true, good)), self.noise[index] * float(rms(true, good)))
        error = float(rms(new.double() - followed, good))
        ratio = error / noise if noise else (math.inf if error else 0.0)
        if not ratio <= self.references.limit * SAMPLE_FACTOR:
            self.findings.doubts.append(
                f"{self.candidate.name}, output '{self.names[index]}': sample {sample} of the data is off by "
                f"{ratio:.3g} times the noise: wrong for some inputs, or a decision (top-k, rounding) that fell the "
                "other way"
            )
        return sample, ratio

    def _judge_flips(self, found: Classification, samples: int) -> None:
        if not found.far:
            return
        flip = found.flipped[0]
        many = "1 class changes" if found.far == 1 else f"{found.far} classes change"
        self.findings.problems.append(
            f"{self.candidate.name}, output '{found.output}': {many} in {samples} samples and not by noise: sample "
            f"{flip.sample} goes from {flip.before} to {flip.after} although they are {flip.units:.3g} times the noise "
            f"apart (a near-tie is up to {found.near:g})"
        )


def _typical_noise(references: References, index: int) -> float:
    """The unfolded model's relative error in one output, median over the gate's samples; a few ulp at least."""
    eps = epsilon(references.unfolded[0][index].dtype)
    tally = Tally(eps)
    for run, (batch, own, true) in enumerate(zip(references.batches, references.unfolded, references.truth)):
        tally.add(own[index], own[index], true[index], batched=batched(batch, own[index]), run=run)
    return max(tally.relative(tally.noise), eps)


def _batch_size(captured: Captured, data: Mapping[str, Rows], pinned: Mapping[str, int]) -> int:
    """How many samples are run at once: as many as the batch is fixed at, else what fits."""
    program = captured.program
    names = [name for name in tensor_inputs(program) if name in data]
    sizes = {n.name: n.meta["val"].shape for n in program.graph.nodes if n.op == "placeholder" and n.name in names}
    batch = next((shape[0] for shape in sizes.values() if len(shape)), 1)
    if isinstance(batch, int):
        return batch
    if str(batch) in pinned:
        return pinned[str(batch)]
    example = sum(v.numel() * 8 for v in numbers(Runner(program)(captured.flat)))  # float64, as they are compared
    rows = captured.flat[captured.names.index(names[0])].shape[0]
    per_sample = example // rows + sum(math.prod(data[name].shape[1:]) * 8 for name in names)
    high = captured.ranges.get(str(batch), (1, None))[1]
    return int(min(SAMPLES, high or SAMPLES, max(BYTES // max(per_sample, 1), 1)))
