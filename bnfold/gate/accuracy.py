"""Accuracy on the user's data, before and after: every sample through the unfolded model and what is judged.

The unfolded model runs in its own dtype: float64 costs several times as much, and is asked only where its answer
decides something. That is where a class changed, for how far from a tie the logits really are, and for the sample that
differs most; as in the gate, float64 follows the decisions of what it is compared with. The gate's own samples (the
first of the data) are compared with float64 one and all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from operator import add
from typing import Any

import torch
from torch import Tensor

from bnfold.errors import InputError
from bnfold.gate.candidates import OnnxCandidate
from bnfold.gate.data import IGNORED, VOID, Labels, stored_batches
from bnfold.gate.evidence import TINY, specials, unit_roundoff
from bnfold.gate.findings import Findings, first_line
from bnfold.gate.judge import Case, Judge
from bnfold.gate.metrics import Classification, Errors, Facts, Part, Regression, Spread, rms
from bnfold.gate.models import Model
from bnfold.gate.outside import Candidate
from bnfold.gate.samples import MIN_SAMPLES, Batch
from bnfold.gate.stored import Rows, in_order
from bnfold.gate.values import numbers
from bnfold.graph.capture import Captured, tensor_inputs
from bnfold.graph.interpret import Runner
from bnfold.graph.names import number_names
from bnfold.report import Accuracy
from bnfold.report.progress import Progress, silent

#: Samples that are run at once, and bytes of their inputs and outputs.
SAMPLES, BYTES = 64, 32 << 20
#: Batches with flips that are run in float64; of further flips the noise is taken to be the usual one.
TRUTHS = 16
#: Two logits are a near-tie within so many limits of their own noise; a single sample may be off by so many.
NEAR_FACTOR, SAMPLE_FACTOR = 16.0, 64.0
#: The model in float64 with the decisions that the candidate takes, for a batch of inputs: outputs.
Follow = Callable[[Batch], Sequence[Tensor]]


def judge_accuracy(
    judge: Judge, candidate: Candidate, data: Mapping[str, Rows], labels: Labels | None = None, *,
    pinned: Mapping[str, int] | None = None, spread: Spread | None = None, follow: Follow | None = None,
    progress: Progress = silent,
) -> Accuracy | None:  # fmt: skip
    """Runs all of ``data``; None where the candidate fails on it, which is a problem.

    A class that changes is a near-tie where the two logits are closer than ``NEAR_FACTOR`` limits of the noise that
    these two have, and a problem where they are not. So is an accuracy that falls by more than the samples that are so
    close, and so are NaN and infinities that the unfolded model does not give. A sample that is further off than
    ``SAMPLE_FACTOR`` limits is a doubt.

    The runs that the gate has made tell the noise. ``data`` are samples by input name, or the first of the parts that
    ``spread`` goes through; ``pinned`` are sizes that the file fixes, by symbol.

    Raises:
        InputError: the labels do not fit the output that they belong to.
    """
    assert isinstance(judge.reference, Model)
    captured, findings, labels = judge.reference.captured, judge.findings, labels or Labels()
    facts = _facts(judge, captured, data, labels, pinned or {}, candidate.coarser)
    if spread is None:
        part = look(captured, candidate, data, labels, facts, progress, follow)
    else:
        part = reduce(add, spread(facts))
    findings.problems += part.problems
    findings.doubts += part.doubts
    return None if part.ended else _result(part, facts, candidate, findings)


def look(
    captured: Captured, candidate: Candidate, data: Mapping[str, Rows], labels: Labels, facts: Facts,
    progress: Progress, follow: Follow | None = None,
) -> Part:  # fmt: skip
    """Runs some data, and closes the candidate.

    Raises:
        InputError: the labels do not fit the output that they belong to, or are not those that all the data have.
    """
    run = _Run(captured, candidate, data, labels, facts, progress, follow)
    if (labels.classes is not None, set(labels.targets)) != (facts.labelled, {run.names[i] for i in facts.targets}):
        raise InputError("these data have not the labels and targets that the first have", where=labels.where)
    try:
        return run.go()
    finally:
        if isinstance(candidate, OnnxCandidate):
            candidate.close()


# ---- what is known beforehand ----------------------------------------------------------------------------------------


def _facts(
    judge: Judge, captured: Captured, data: Mapping[str, Rows], labels: Labels, pinned: Mapping[str, int],
    coarser: float,
) -> Facts:  # fmt: skip
    cases = [case for case in judge.cases if not case.batch.origin] or judge.cases
    names, first = number_names(captured.program), cases[0].own
    size = _batch_size(captured, data, pinned)
    # What has no samples along its first axis cannot be told apart by them.
    outputs = [
        i for i, value in enumerate(first)
        if value.is_floating_point() and value.ndim and value.numel()
        and all(case.own[i].shape[0] == (case.batch.size or size) for case in cases)
    ]  # fmt: skip
    targets = frozenset(i for i in outputs if names[i] in labels.targets)
    # Classes are where the labels belong, else along axis 1 of the first (samples, classes).
    classes = {i: labels.axis for i in outputs if names[i] == labels.output}
    if labels.output and not classes:
        raise InputError(f"output '{labels.output}' has no sample axis for the labels")
    if not labels.output:
        plain = [i for i in outputs if first[i].ndim == 2 and first[i].shape[1] > 1 and i not in targets]
        classes = dict.fromkeys(plain[:1], 1)
    batched = bool(cases[0].batch.size)
    noise = {i: coarser * _typical_noise(cases, i) for i in outputs}
    logits = {i: tuple((coarser * _class_noise(cases, i, axis)).tolist()) for i, axis in classes.items()}
    return Facts(noise, classes, targets, labels.classes is not None, size, bool(pinned) or not batched, batched,
                 judge.limit, logits, coarser)  # fmt: skip


def _own_error(case: Case, index: int) -> Tensor:
    """How far the model itself is off in its own dtype."""
    found: Tensor = case.own[index].double() - case.truth.outputs[index]
    return found.nan_to_num(0.0, 0.0, 0.0)


def _typical_noise(cases: Sequence[Case], index: int) -> float:
    """The unfolded model's relative error in one output, median over the gate's samples; a few ulp at least."""
    found: list[float] = []
    for case in cases:
        true = case.truth.outputs[index]
        good = true.isfinite() & case.own[index].isfinite()
        ratio = rms(_own_error(case, index), good) / rms(true, good).clamp(min=TINY)
        found += ratio[good.reshape(len(good), -1).any(1)].tolist()
    return max(sorted(found)[len(found) // 2] if found else 0.0, 2 * unit_roundoff(cases[0].own[index].dtype))


def _class_noise(cases: Sequence[Case], index: int, axis: int) -> Tensor:
    """The RMS error of every class's logit in the unfolded model, a rounding of it at least."""
    off, true = (
        torch.cat([value.movedim(axis, -1).flatten(0, -2) for value in values])
        for values in ([_own_error(case, index) for case in cases], [case.truth.outputs[index] for case in cases])
    )
    size = true.nan_to_num(0.0, 0.0, 0.0).square().mean(0).sqrt()
    return torch.maximum(off.square().mean(0).sqrt(), unit_roundoff(cases[0].own[index].dtype) * size)


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


# ---- the data --------------------------------------------------------------------------------------------------------


class _Run:
    """One pass over some data."""

    def __init__(
        self, captured: Captured, candidate: Candidate, data: Mapping[str, Rows], labels: Labels, facts: Facts,
        progress: Progress, follow: Follow | None,
    ) -> None:  # fmt: skip
        self.captured, self.candidate, self.labels, self.follow = captured, candidate, labels, follow
        self.data, self.facts, self.progress = data, facts, progress
        self.names = number_names(captured.program)
        self.unfolded, self.model, self.truths = Runner(captured.program), Model(captured), 0
        near = facts.limit * NEAR_FACTOR
        self.part = Part(
            0, {i: Errors(self.names[i]) for i in facts.noise}, {i: Regression(self.names[i]) for i in facts.targets},
            {i: Classification(self.names[i], axis, near) for i, axis in facts.classes.items()},
            digest=labels.digest, unused=labels.unused,
        )  # fmt: skip
        #: By output how far the sample is off that is furthest off, the first one of its batch, and its place there.
        self.worst: dict[int, tuple[float, int, int]] = {}

    def go(self) -> Part:
        """Runs the data, ``size`` samples at a time."""
        part, size, labels = self.part, self.facts.size, self.labels
        total = len(next(iter(self.data.values())))
        known = {i: in_order(labels.targets[self.names[i]], size) for i in part.targets}
        classes = in_order(labels.classes, size) if labels.classes is not None else None
        for flat, count in self._batches(self.data):
            self.progress("accuracy", part.samples, total)
            try:
                before, after = self._both(flat)
            except Exception as error:
                part.problems.append(
                    f"{self.candidate.name}: fails on the data, samples {part.samples} to {part.samples + count - 1}: "
                    f"{first_line(error)}"
                )
                part.ended = True
                return part
            right = torch.from_numpy(next(classes)) if classes is not None else None
            targets = {i: torch.from_numpy(next(rows)) for i, rows in known.items()}
            for i in self.facts.noise:
                if not self._add(i, before[i], after[i] if i < len(after) else before[i][:0], count):
                    part.ended = True
                    return part
                own, new = before[i][:count], after[i][:count]
                if i in targets:
                    if targets[i].numel() != own.numel():
                        shapes = f"{tuple(targets[i].shape)} for output '{self.names[i]}' {tuple(own.shape)}"
                        raise InputError(f"targets {shapes}")
                    part.targets[i].add(own, new, targets[i])
                if i in self.facts.classes:
                    self._classify(i, flat, own, new, right)
            part.samples += count
        self.progress("accuracy", total, total)
        for i in self.worst:
            part.worst[i] = (self.worst[i][0], *self._judge_worst(i))
        return part

    def _batches(self, data: Mapping[str, Rows]) -> Any:
        return stored_batches(
            self.captured.names, self.captured.flat, data, size=self.facts.size, fixed=self.facts.fixed
        )

    def _both(self, flat: tuple[Any, ...]) -> tuple[list[Tensor], list[Tensor]]:
        return numbers(self.unfolded(flat)), numbers(self.candidate.run(flat))

    def _add(self, i: int, own: Tensor, new: Tensor, count: int) -> bool:
        """Adds the errors of an output; False where it has another shape, and nothing more can be said."""
        where, start = f"{self.candidate.name}, output '{self.names[i]}'", self.part.samples
        if own.shape != new.shape:
            self.part.problems.append(
                f"{where}: {tuple(new.shape)} instead of {tuple(own.shape)} on the data, sample {start} and on"
            )
            return False
        if problem := specials(new[:count], own[:count]):
            self.part.problems.append(
                f"{where}: on the data, samples {start} to {start + count - 1}, {problem} (of the unfolded model)"
            )
        relative = self.part.errors[i].add(own[:count], new[:count])
        worst = int(relative.argmax())
        if i not in self.worst or float(relative[worst]) > self.worst[i][0]:
            self.worst[i] = float(relative[worst]), start, worst
        return True

    def _classify(self, index: int, flat: tuple[Any, ...], own: Tensor, new: Tensor, right: Tensor | None) -> None:
        noise, axis = torch.tensor(self.facts.logits[index], dtype=torch.float64), self.facts.classes[index]
        if right is not None and right.shape != (shape := own.movedim(axis, -1).shape[:-1]):
            raise InputError(
                f"labels of samples {tuple(right.shape[1:])}, classes of output '{self.names[index]}' for "
                f"{tuple(shape[1:])}",
                where=self.labels.where,
            )
        void = right is not None and right.ndim > 1 and own.shape[axis] <= VOID

        def errors() -> Tensor | None:
            return self._errors(index, flat, own) if self.truths < TRUTHS else None

        ignored = (IGNORED, VOID) if void else (IGNORED,)
        self.part.classes[index].add(own, new, right, ignored, noise, self.part.samples, errors)

    def _errors(self, index: int, flat: tuple[Any, ...], own: Tensor) -> Tensor | None:
        """How far off every logit of the unfolded model is, and what the candidate's own decisions change of it."""
        self.truths += 1
        try:
            true, followed = (values[index][: len(own)] for values in self._truths(flat))
        except Exception:  # the gate has said so
            return None
        off = self.facts.coarser * (own.double() - true).nan_to_num(0.0, 0.0, 0.0)
        return torch.hypot(off, (followed - true).nan_to_num(0.0, 0.0, 0.0))

    def _truths(self, flat: tuple[Any, ...]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """One batch in float64: the model, and what took the candidate's decisions.

        Raises:
            Exception: there is no truth, or it does not run.
        """
        rows = flat[self.captured.names.index(next(iter(self.data)))].shape[0] if self.facts.batched else 0
        batch = Batch(flat, rows, "")
        true = self.model.run(batch).outputs
        return true, true if self.follow is None else self.follow(batch)

    def _judge_worst(self, index: int) -> tuple[int, float]:
        """The sample that differs most, and its error against float64 in multiples of the noise."""
        _, start, row = self.worst[index]
        flat, _ = next(self._batches({name: rows[start : start + self.facts.size] for name, rows in self.data.items()}))
        try:
            runs = (*self._both(flat), *self._truths(flat))
            own, new, true, followed = (values[index][row : row + 1] for values in runs)
            good = own.isfinite() & new.isfinite() & true.isfinite() & followed.isfinite()
        except Exception:
            return start + row, math.nan
        own_noise = self.candidate.coarser * float(rms(own.double() - true, good))
        noise = max(own_noise, self.facts.noise[index] * float(rms(true, good)))
        error = float(rms(new.double() - followed, good))
        ratio = error / noise if noise else (math.inf if error else 0.0)
        if not ratio <= self.facts.limit * SAMPLE_FACTOR:
            self.part.doubts.append(
                f"{self.candidate.name}, output '{self.names[index]}': sample {start + row} of the data is off by "
                f"{ratio:.3g} times the noise: wrong for some inputs, or a decision (top-k, rounding) that fell the "
                "other way"
            )
        return start + row, ratio


# ---- what it comes to ------------------------------------------------------------------------------------------------


def _result(part: Part, facts: Facts, candidate: Candidate, findings: Findings) -> Accuracy:
    agreement = tuple(errors.result(facts.noise[i], *part.worst[i][1:]) for i, errors in part.errors.items())
    found = next((c.result() for c in part.classes.values()), {"before": None, "after": None, "flips": 0})
    for classes in (classes for classes in part.classes.values() if classes.far):
        flip = classes.flipped[0]
        many = "1 class changes" if classes.far == 1 else f"{classes.far} classes change"
        findings.problems.append(
            f"{candidate.name}, output '{classes.output}': {many} in {part.samples} samples and not by noise: sample "
            f"{flip.sample} goes from {flip.before} to {flip.after} although they are {flip.units:.3g} times the noise "
            f"apart (a near-tie is up to {classes.near:g})"
        )
    if part.samples < MIN_SAMPLES:
        findings.notes.append(
            f"the data hold only {part.samples} of the {MIN_SAMPLES} samples that make a verdict: each is used again"
        )
    if part.unused:
        listed = ", ".join(repr(name) for name in part.unused)
        findings.notes.append(f"the data's {listed}: no input, output, labels or targets, and not used")
    fell = (found["before"] or 0.0) - (found["after"] or 0.0)
    if fell > (found.get("undecided") or 0) / max(found.get("labelled") or 0, 1):
        findings.problems.append(
            f"{candidate.name}: top-1 falls from {found['before']:.2%} to {found['after']:.2%}, and of the labelled "
            f"samples only {found.get('undecided', 0)} are so close to a tie that noise decides them"
        )
    targets = tuple(regression.result() for regression in part.targets.values())
    return Accuracy(
        samples=part.samples, candidate=candidate.name, agreement=agreement, targets=targets, data=part.digest,
        **{"smallest_margin": None, **found},
    )  # fmt: skip
