"""Every output of every candidate, judged: by the median over samples of error over noise.

A torch program that is off by little is run in float64 as well, which tells the rounding of torch's kernels from a
wrong fold.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bnfold.gate.candidates import Candidate, EagerCandidate, OnnxCandidate, TorchCandidate
from bnfold.gate.decisions import NOISE_LIMIT
from bnfold.gate.following import Follower
from bnfold.gate.judge import Tally, epsilon, finite_problem
from bnfold.gate.reference import (
    KERNELS,
    RUN_FACTOR,
    SAMPLE_FACTOR,
    Findings,
    References,
    batched,
    first_line,
    numbers,
    words,
)
from bnfold.graph.names import number_names
from bnfold.report import OutputResult


@dataclass
class _Integers:
    """An output of integers: how many are wrong of how many, and whether the unfolded model's own are known."""

    wrong: int = 0
    total: int = 0
    known: bool = True


@dataclass
class _Tallies:
    """What was counted of one candidate, by output."""

    floats: dict[int, Tally] = field(default_factory=dict)
    integers: dict[int, _Integers] = field(default_factory=dict)
    #: Without an element on some batch.
    empty: set[int] = field(default_factory=set)

    @property
    def exact(self) -> list[int]:
        """Outputs that are right or wrong and no more: integers, and those that were empty on every batch."""
        return [*self.integers, *sorted(self.empty - self.floats.keys() - self.integers.keys())]


class OutputJudge:
    """Judges candidates one after another; what speaks against one goes to ``findings``.

    Args:
        references: the references, which have been run.
        limit: the largest median ratio of a pass.
        findings: in place of those of the references.
    """

    def __init__(self, references: References, limit: float, findings: Findings | None = None) -> None:
        self._references, self._limit = references, limit
        self._findings = references.findings if findings is None else findings
        self._names = number_names(references.captured.program)
        self.follower: Follower | None = None
        #: The worst ratio of any sample of inputs that were searched for.
        self.worst_found = 0.0

    def judge(self, candidate: Candidate) -> list[OutputResult]:
        """The result for each of a candidate's outputs."""
        tallies = self._run(candidate)
        assert self.follower is not None
        self.follower.report()
        for i, counted in tallies.integers.items():
            known = counted.known and not self.follower.unread(i)
            if counted.wrong:
                (self._findings.problems if known else self._findings.doubts).append(
                    f"{self._where(candidate, i)}: {counted.wrong} of {counted.total} integers differ"
                    + ("" if known else "; whether they are near-ties cannot be told")
                )
        floats = {i: self._with_rounding(i, tally) for i, tally in tallies.floats.items()}
        name = candidate.name
        if isinstance(candidate, TorchCandidate | EagerCandidate) and self._may_be_rounding(floats.values()):
            precise = candidate.precise()
            second = OutputJudge(self._references, self._limit, Findings())
            exact = second._run(precise).floats
            failed = bool(second._findings.problems) or exact.keys() != floats.keys()
            if not failed and all(self._is_right(tally) for tally in exact.values()):
                self._findings.notes.append(
                    f"{name}: error is up to {_worst(floats):.3g} times the noise, and that of the same program in "
                    f"float64 {_worst(exact):.3g} times: the rest is rounding in torch's kernels for convolutions with "
                    "a bias"
                )
                floats, name = exact, precise.name
        results = [self._judge_tally(name, i, tally) for i, tally in floats.items()]
        if not results and not tallies.integers and tallies.empty:
            self._findings.doubts.append(f"{name}: no output has an element to compare; give real inputs (--data)")
        ran = self._references.samples
        return results + [OutputResult(name, self._name(i), 0.0, 0.0, 0.0, 0.0, ran) for i in tallies.exact]

    def _run(self, candidate: Candidate) -> _Tallies:
        """Runs a candidate on every batch and counts; problems are what cannot be counted."""
        references, problems, found = self._references, self._findings.problems, _Tallies()
        self.follower = follower = Follower(references, candidate, self.follower, self._findings)
        failed: dict[str, list[str]] = {}
        for run, (batch, truth, unfolded) in enumerate(zip(references.batches, references.truth, references.unfolded)):
            try:
                outputs, followed = follower.run(run)
            except Exception as error:
                failed.setdefault(first_line(error), []).append(words(batch))
                continue
            given = numbers(outputs)
            if len(given) != len(unfolded):
                problems.append(f"{candidate.name}: {len(given)} outputs instead of {len(unfolded)}")
                return _Tallies()
            for i, (own, value, true, right) in enumerate(zip(unfolded, given, truth, followed)):
                where = self._where(candidate, i)
                if value.shape != right.shape or (
                    value.dtype != own.dtype and not _may_be_wider(candidate, own, value)
                ):
                    shapes = f"{tuple(value.shape)} {value.dtype} instead of {tuple(right.shape)} {own.dtype}"
                    problems.append(f"{where}: {shapes} at batch {batch.size}")
                    continue
                if problem := finite_problem(value, right):
                    searched = f" on {batch.origin} inputs" if batch.origin else ""
                    self.worst_found = float("inf") if searched else self.worst_found
                    problems.append(f"{where}: {problem}{searched}")
                if not own.numel():
                    found.empty.add(i)  # its shape was all there is to compare
                elif own.is_floating_point():
                    tally = found.floats.setdefault(i, Tally(epsilon(own.dtype), candidate.coarser))
                    tally.add(value, own, true, batched=batched(batch, own), run=run, followed=right)
                else:
                    counted = found.integers.setdefault(i, _Integers())
                    counted.wrong += int((value != right).sum())
                    counted.total += own.numel()
                    counted.known &= run not in references.blind and torch.equal(own, true)
        problems += [f"{candidate.name}: fails at {'; '.join(at)}: {reason}" for reason, at in failed.items()]
        return found

    def _with_rounding(self, index: int, tally: Tally) -> Tally:
        """A tally that may be off by chance, with what rounding the constants does added to its noise.

        The noise of the unfolded model is one draw for each sample. Where every sample is a number or two it says
        little, and so it does where single samples are off and the rest is not: a net that amplifies errors a hundred
        times more on one input than on the next has samples that by chance are next to exact.
        """
        if self._references.blind or not tally.elements or not self._may_be_chance(tally):
            return tally
        moved = Tally(tally.eps, tally.coarser)
        for run, (batch, truth) in enumerate(zip(self._references.batches, self._references.truth)):
            true, off = truth[index], self._references.rounding(run)[index]
            moved.add(true, true + off, true, batched=batched(batch, true), run=run)
        return tally.with_more_noise(moved.noise) if len(moved.noise) == len(tally.noise) else tally

    def _may_be_chance(self, tally: Tally) -> bool:
        if tally.typical() > self._limit:
            return tally.few
        samples = float(tally.ratios(steady=True).max())
        return not self._is_right(tally) or samples > self._limit * SAMPLE_FACTOR

    def _may_be_rounding(self, tallies: Iterable[Tally]) -> bool:
        """Whether something is off, and nothing, at no batch size and for no sample, by more than kernels do."""
        off = [tally for tally in tallies if not self._is_right(tally)]
        most = KERNELS * self._limit
        return bool(off) and all(
            max(tally.per_run().values()) <= most and float(tally.ratios(steady=True).max()) <= most * KERNELS
            for tally in off
        )

    def _is_right(self, tally: Tally) -> bool:
        return not tally.elements or (
            tally.typical() <= self._limit
            and all(ratio <= self._limit * RUN_FACTOR for ratio in tally.per_run().values())
        )

    def _judge_tally(self, candidate: str, index: int, tally: Tally) -> OutputResult:
        where = f"{candidate}, output '{self._name(index)}'"
        if not tally.elements:
            self._findings.doubts.append(f"{where}: it has no finite element to compare; give real inputs (--data)")
            nan = float("nan")
            return OutputResult(candidate, self._name(index), nan, nan, nan, nan, 0)
        noise, steady = tally.relative(tally.noise) * tally.coarser, tally.ratios(steady=True)
        searched = [r for r, run in zip(steady.tolist(), tally.runs) if self._references.batches[run].origin]
        self.worst_found = max([self.worst_found, *searched])
        wild = noise > max(NOISE_LIMIT, 16 * tally.eps * tally.coarser)
        # A discontinuous model is by chance exact on some samples, and an error over that noise means nothing.
        ratios = steady if wild else tally.ratios()
        typical = tally.typical(steady=wild)
        unread = self.follower.unread(index) if self.follower else 0
        against = self._findings.doubts if unread else self._findings.problems
        if unread and not typical <= self._limit:
            where = f"{where} (depends on decisions of the model that the file gives no names to, {unread} of them)"
        if not typical <= self._limit:
            against.append(f"{where}: error is {typical:.3g} times the noise (limit {self._limit:g})")
        apart: dict[str, float] = {}
        for run, ratio in tally.per_run().items():
            size = words(self._references.batches[run])
            if not ratio <= max(self._limit * RUN_FACTOR, apart.get(size, 0.0)):
                apart[size] = ratio
        against += [f"{where}: error is {ratio:.3g} times the noise at {size}" for size, ratio in apart.items()]
        far = int((~(steady <= self._limit * SAMPLE_FACTOR)).sum())
        if far and typical <= self._limit:
            self._findings.doubts.append(
                f"{where}: {far} of {len(steady)} samples are off by up to {float(steady.max()):.3g} times the noise, "
                "the others not: wrong for some inputs, or a decision (top-k, rounding) that fell the other way"
            )
        if wild:
            self._findings.doubts.append(
                f"output '{self._name(index)}': the unfolded model's own error is {noise:.2g} of it, so almost "
                "anything would pass; it is discontinuous on these inputs (top-k, rounding) or out of its range: try "
                "--data"
            )
        error = tally.relative(tally.error)
        return OutputResult(candidate, self._name(index), noise, error, typical, float(ratios.max()), len(tally.error))

    def _where(self, candidate: Candidate, index: int) -> str:
        return f"{candidate.name}, output '{self._name(index)}'"

    def _name(self, index: int) -> str:
        return self._names[index] if index < len(self._names) else str(index)


def _worst(tallies: Mapping[int, Tally]) -> float:
    return max(tally.typical() for tally in tallies.values() if tally.elements)


def _may_be_wider(candidate: Candidate, own: Tensor, value: Tensor) -> bool:
    """Whether a candidate may return float32 for a half float."""
    half = own.dtype in (torch.bfloat16, torch.float16)
    return isinstance(candidate, OnnxCandidate) and candidate.wider and half and value.dtype == torch.float32
