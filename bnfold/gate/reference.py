"""What candidates are compared with: truth in float64, and the unfolded model, whose error is the noise."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from bnfold.errors import InputError
from bnfold.gate.decisions import Decisions, Following
from bnfold.gate.judge import Tally, epsilon, finite_problem, median
from bnfold.gate.samples import MIN_SAMPLES, Batch
from bnfold.graph.capture import Captured
from bnfold.graph.functional import module_of
from bnfold.graph.interpret import Runner

#: Median ratio of any one run (one batch size, one shape), in limits.
RUN_FACTOR = 16.0
#: A single sample this many limits away is a wrong value or a decision that fell the other way: no pass either way.
SAMPLE_FACTOR = 64.0
#: How often the effect of rounding the constants is drawn. Drawn once, one channel in fifty happens to move a sixteenth
#: of what it typically does and its ratio is off by as much; over the sites of one MobileNetV2 and six sets of inputs
#: the worst ratio of a correct fold was 14.6 with one, 7.9 with two, 5.5 with four and 4.1 with eight.
ROUNDINGS = 4
#: Values at fold sites are compared for as many samples as fit into this many elements.
WATCHED_ELEMENTS = 16_000_000
#: How many limits away torch's kernels may take a program that is right in float64. Some of them start the sum of a
#: convolution with its bias, so that every term is rounded to the bias's precision, and a fold adds biases: where a
#: signal is small beside them (a net with random weights, deep down) that came to 5.5 times the noise over the stages
#: of an EfficientNet and to 18 in one channel. ONNX Runtime adds the bias last and stayed below 1.
KERNELS = 4.0

Progress = Callable[[str, int, int], None]


@dataclass
class Findings:
    """What speaks against a pass: ``problems`` make it a fail, ``doubts`` inconclusive, ``notes`` only inform."""

    problems: list[str] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def once(self) -> None:
        """Drops what is said twice."""
        self.problems, self.doubts, self.notes = (
            list(dict.fromkeys(x)) for x in (self.problems, self.doubts, self.notes)
        )


@dataclass
class References:
    """The runs that every candidate is compared with, batch by batch: ``truth`` and ``unfolded`` outputs."""

    captured: Captured
    batches: list[Batch]
    findings: Findings
    limit: float
    progress: Progress
    truth: list[list[Tensor]] = field(default_factory=list)
    unfolded: list[list[Tensor]] = field(default_factory=list)
    #: The batches for which there is no truth.
    blind: set[int] = field(default_factory=set)
    #: Values to keep of one batch, which is in ``watched`` with them: true, and in the program's own dtypes.
    watch: Collection[str] = ()
    watched: tuple[Batch, Mapping[str, Tensor], Mapping[str, Tensor]] | None = None
    _rounding: dict[int, list[Tensor]] = field(default_factory=dict)

    @property
    def samples(self) -> int:
        """How many samples could be run."""
        return sum(batch.samples for batch in self.batches)

    def run(self) -> None:
        """Truth and unfolded outputs for every batch that the unfolded model itself can run."""
        program, masters = self.captured.program, self.captured.masters
        unfolded, precise = Runner(program), Runner(program, precise=True, masters=masters)
        self.decisions = Decisions(program, masters, module_of)
        self._precise = precise
        self.truth: list[list[Tensor]] = []
        self.unfolded: list[list[Tensor]] = []
        self._eager: dict[int, Tally] = {}
        runnable: list[Batch] = []
        seen: set[tuple[int, str]] = set()
        reason = ""
        first: tuple[Batch, list[Tensor], list[Tensor]] | None = None
        watching = watched_batch(self.captured, self.batches, self.watch) if self.watch else None
        for i, batch in enumerate(self.batches):
            self.progress("truth", i, len(self.batches))
            # The captured graph may hold for fewer sizes than the model: each size is put to the model itself once.
            eager = None if (batch.size, batch.sizes) in seen else self._run_eager(batch)
            seen.add((batch.size, batch.sizes))
            try:
                watch = self.watch if batch is watching else ()
                own = numbers(unfolded(batch.flat, keep={*self.decisions.names, *watch}))
                kept = unfolded.kept
                self.decisions.note(batch, kept)
            except Exception as error:
                reason = first_line(error)
                if isinstance(eager, list):
                    self.findings.problems.append(
                        f"capture: the model runs at {words(batch)}, its captured graph does not ({reason}): fix that "
                        "dimension (--static)"
                    )
                else:
                    self.findings.notes.append(f"the unfolded model itself does not run at {words(batch)}: {reason}")
                continue
            if isinstance(eager, Exception):
                reason = first_line(eager)
                self.findings.notes.append(f"the unfolded model itself does not run at {words(batch)}: {reason}")
                continue
            try:
                followed = self.decisions.follow(precise, batch, keep=watch)
                truth = numbers(followed.outputs)
                if watch:
                    self.watched = batch, followed.kept, {name: kept[name] for name in watch}
            except Exception as error:
                self.findings.doubts.append(
                    f"the graph does not run in float64 ({first_line(error)}), so there is no truth to compare with; "
                    "compared with the unfolded model in its own dtype instead"
                )
                truth = [v.double() if v.is_floating_point() else v for v in own]
                self.blind.add(len(runnable))
            if eager is not None:
                self._add_eager(eager, own, truth, batch, len(runnable))
            if isinstance(eager, list) and first is None:
                first = batch, eager, truth
            runnable.append(batch)
            self.truth.append(truth)
            self.unfolded.append(own)
        self.batches = runnable
        if first is not None:
            self._ask_again(*first)
        if not runnable:
            raise InputError(
                f"the unfolded model runs on none of the inputs made for it: {reason}", hint="Give real ones: --data"
            )
        ran = sum(batch.samples for batch in runnable)
        if ran < MIN_SAMPLES:
            self.findings.doubts.append(
                f"only {ran} samples could be run, which is too few for a verdict: give real ones, --data"
            )
        self.findings.doubts = list(dict.fromkeys(self.findings.doubts))

    def following(self, run: int, chosen: Mapping[str, Tensor]) -> Following:
        """Truth of a batch that follows a candidate's decisions, by the names of their values.

        Raises:
            Exception: whatever an operator raises where the decisions make no sense.
        """
        batch = self.batches[run]
        if self.decisions.same(batch, chosen):
            return Following(list(self.truth[run]), {})
        found = self.decisions.follow(self._precise, batch, chosen)
        return replace(found, outputs=numbers(found.outputs))

    def disturbed(self, batch: Batch, *, keep: Collection[str] = ()) -> Iterator[Following]:
        """Truth of a batch where every constant is rounded once, drawn ``ROUNDINGS`` times."""
        program, masters = self.captured.program, self.captured.masters
        for seed in range(ROUNDINGS):
            moved = Runner(program, precise=True, masters=masters, jitter=True, seed=seed)
            yield self.decisions.follow(moved, batch, keep=keep)

    def rounding(self, run: int) -> list[Tensor]:
        """How far each output moves on a batch where every constant is rounded once: RMS over ``ROUNDINGS`` draws."""
        if run not in self._rounding:
            truth = self.truth[run]
            squares = [torch.zeros_like(value, dtype=torch.float64) for value in truth]
            for moved in self.disturbed(self.batches[run]):
                for square, value, true in zip(squares, numbers(moved.outputs), truth):
                    square += (value.double() - true.double()).square()
            self._rounding[run] = [(square / ROUNDINGS).sqrt() for square in squares]
        return self._rounding[run]

    def _run_eager(self, batch: Batch) -> list[Tensor] | Exception | None:
        if self.captured.eager is None:
            return None
        try:
            return numbers(self.captured.run_eager(batch.flat))
        except Exception as error:
            return error

    def _ask_again(self, batch: Batch, before: list[Tensor], truth: list[Tensor]) -> None:
        """Whether what ran in between changed what the model answers: then it keeps state, which no file does."""
        halved = [x * 0.5 if isinstance(x, Tensor) and x.is_floating_point() else x for x in batch.flat]
        self._run_eager(replace(batch, flat=tuple(halved)))
        after = self._run_eager(batch)
        if isinstance(after, list) and all(map(_same, before, after, truth)):
            return
        # Whatever differed was the state's doing, and no size that is fixed would mend it.
        self._eager.clear()
        self.findings.problems[:] = [each for each in self.findings.problems if not each.startswith("capture:")]
        self.findings.problems.append(
            "capture: the model keeps state from call to call: the same input gives another result the next time; take "
            "the state as an input and return it, or set it anew where forward begins"
        )

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
                tally.add(own, value, true, batched=batched(batch, own), run=run)
        if problem:
            self.findings.problems.append(f"capture: at {words(batch)} the model gives {problem}")

    def judge_capture(self) -> float:
        """Eager model against captured graph, in one dtype: by ratio to the noise where not bitwise equal."""
        worst = 0.0
        for tally in self._eager.values():
            ratios = tally.ratios(steady=True)
            if not len(ratios):
                continue
            worst = max(worst, median(ratios))
            if not median(ratios) <= self.limit:
                self.findings.problems.append(
                    f"capture: the eager model is {median(ratios):.3g} times as far from float64 as the captured graph"
                )
            for run, ratio in tally.per_run().items():
                if not ratio <= self.limit * RUN_FACTOR:
                    self.findings.problems.append(
                        f"capture: at {words(self.batches[run])} the model and its graph differ by {ratio:.3g} "
                        "times the noise: its code depends on that size, so fix the dimension (--static)"
                    )
        return worst


def _same(before: Tensor, after: Tensor, truth: Tensor) -> bool:
    """Whether two answers of one model differ by no more than the first is off."""
    if before.shape != after.shape or not before.is_floating_point() or torch.equal(before, after):
        return torch.equal(before, after)
    both = before.isfinite()
    if not torch.equal(both, after.isfinite()) or not bool(both.any()) or truth.shape != before.shape:
        return torch.equal(both, after.isfinite())
    moved, off = ((a.double() - before.double())[both].abs().max() for a in (after, truth))
    return bool(moved <= off)


def numbers(values: Sequence[Any]) -> list[Tensor]:
    """The outputs that hold numbers: tensors, complex ones as pairs of reals, as ONNX has them, and bare numbers."""
    tensors = [torch.tensor(v) if isinstance(v, (int, float)) else v for v in values]
    return [torch.view_as_real(v) if v.is_complex() else v for v in tensors if isinstance(v, Tensor)]


def batched(batch: Batch, output: Tensor) -> bool:
    """Whether axis 0 of an output is the batch."""
    return batch.size > 0 and output.ndim > 0 and output.shape[0] == batch.size


def words(batch: Batch) -> str:
    """The sizes of a batch, for a message."""
    size = f"batch {batch.size}" if batch.size else "the fixed batch"
    return ", ".join(filter(None, (size, batch.sizes, batch.origin)))


def first_line(error: BaseException) -> str:
    """Type and first line of an exception, for a message."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def watched_batch(captured: Captured, batches: Sequence[Batch], names: Collection[str]) -> Batch:
    """The largest batch of the first sizes whose values of those names fit into ``WATCHED_ELEMENTS``."""
    elements = 0
    for node in captured.program.graph.nodes:
        value = node.meta.get("val")
        if node.name in names and isinstance(value, Tensor):
            elements += prod(n if isinstance(n, int) else max(int(n.node.hint or 1), 1) for n in value.shape)
    example = captured.flat[0] if captured.flat else None
    per_sample = max(elements // max(example.shape[0] if isinstance(example, Tensor) and example.ndim else 1, 1), 1)
    fitting = [b for b in batches if not b.sizes or b.sizes == batches[0].sizes]
    small = [b for b in fitting if b.samples * per_sample <= WATCHED_ELEMENTS]
    return max(small, key=lambda b: b.samples) if small else min(fitting, key=lambda b: b.samples)
