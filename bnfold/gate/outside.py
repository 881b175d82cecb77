"""What runs the model elsewhere and shows its outputs alone: torch, and a user's own runner."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from bnfold.evaluate.subject import Run
from bnfold.gate.candidates import OnnxCandidate, Setting, coarser
from bnfold.gate.evidence import SLACK, Draws, compare, seen_error, specials, unit_roundoff
from bnfold.gate.findings import first_line
from bnfold.gate.judge import Case, Judge
from bnfold.gate.models import Model
from bnfold.gate.samples import Batch
from bnfold.gate.values import as_tensor, numbers, to_numpy
from bnfold.graph.capture import Captured, tensor_inputs
from bnfold.graph.names import number_names
from bnfold.runtime.runner import Raised, UserRunner
from bnfold.runtime.runtime import FLOAT32, Arithmetic, Device, Provider

#: How many limits the eager model and its captured graph may differ by, in the dtype that both run in: where they are
#: not equal bit for bit, their noise is one draw.
SAME = 4.0


@dataclass(frozen=True)
class TorchCandidate:
    """What torch runs: a module as its users do, or the folded program in its own dtypes.

    ``run`` answers flat outputs for flat inputs; it rounds ``coarser`` times more coarsely than the model's own dtype.
    """

    name: str
    run: Callable[[Any], list[Any]]
    coarser: float = 1.0


class RunnerCandidate:
    """The model as a user's own runner has it, of which ``path`` is the file to run, if any.

    ``inputs`` are flat input index and the name that the runner is given it under, ``outputs`` what its own may be
    called, ``arithmetic`` what it computes in: by default as the model has them.
    """

    def __init__(
        self, runner: UserRunner, captured: Captured, inputs: Sequence[tuple[int, str]] | None = None,
        outputs: Sequence[str] | None = None, path: Path | None = None, arithmetic: Arithmetic | None = None,
    ) -> None:  # fmt: skip
        own = [(captured.names.index(name), name) for name in tensor_inputs(captured.program)]
        self._runner, self._path, self.name = runner, path, runner.name
        self._inputs = own if inputs is None else inputs
        returned: Any = captured.program.graph.output_node().args[0]
        values = [value for value in returned if isinstance(value, torch.fx.Node | int | float)]
        self._dtypes = [getattr(getattr(value, "meta", {}).get("val"), "dtype", None) for value in values]
        self._names = [*(outputs or number_names(captured.program))][: len(values)]
        self.coarser = 1.0 if arithmetic is None else coarser(arithmetic, captured.program)
        self.setting = Setting(Device(Provider("runner", runner.name)), arithmetic or FLOAT32, self.coarser)

    def run(self, flat: Sequence[Any]) -> list[Any]:
        """As ``TorchCandidate.run``; outputs go by name where there are names, else by position.

        Numbers that crossed a wire as wider ones are the model's again.

        Raises:
            Exception: the runner raised, hung or crashed, or its outputs' names are not the model's.
        """
        answer, names = self._runner({name: to_numpy(flat[i]) for i, name in self._inputs}, self._path), self._names
        if isinstance(answer, dict):
            if len(answer) > 1 and not set(names) <= set(answer):
                raise Raised(f"its outputs are {', '.join(answer)}, those of the model {', '.join(names)}")
            answer = [answer[name] for name in names] if set(names) <= set(answer) else [*answer.values()]
        found = [as_tensor(array) for array in answer]
        return [self._as_own(*pair) for pair in zip(found, self._dtypes)] if len(found) == len(self._dtypes) else found

    def _as_own(self, value: Tensor, own: torch.dtype | None) -> Tensor:
        if own is None or value.dtype == own:
            return value
        both_float = value.is_floating_point() and own.is_floating_point
        wider = both_float and (unit_roundoff(value.dtype) < unit_roundoff(own) or self.coarser > 1)
        neither = not (value.is_floating_point() or value.is_complex() or own.is_floating_point or own.is_complex)
        return value.to(own) if wider or (neither and torch.equal(value.to(own).to(value.dtype), value)) else value


#: Whatever runs and claims to equal the unfolded model.
Candidate = OnnxCandidate | TorchCandidate | RunnerCandidate


def judge_outside(judge: Judge, candidate: Candidate) -> None:
    """Every case, against float64: by what rounding the constants does, and by the model's own error."""
    for case, outputs in judge.answers(candidate.name, lambda case: candidate.run(case.batch.flat)):
        draws = judge.drawn(case)

        def noise(i: int, case: Case = case, draws: Draws = draws) -> Tensor:
            return torch.hypot(draws.noise(i), seen_error(case.own[i], case.truth.outputs[i]))

        rows = partial(judge.rows, candidate.name, case, outputs, case.truth, noise, coarser=SLACK * candidate.coarser,
                       typed=True)  # fmt: skip
        judge.table += judge.sure(draws, rows)


def judge_capture(judge: Judge, case: Case, model: Model) -> None:
    """Where the captured graph is another than the eager model: where that is off from the graph in float64 by more
    than rounding explains, the graph in its own dtypes says whether it is right.
    """
    batch, eager, truth, draws = case.batch, case.own, case.truth, judge.drawn(case)
    (returned,) = model.program.graph.output_node().args
    values = [value.meta.get("val") if isinstance(value, fx.Node) else value for value in returned]
    dtypes = [value.dtype for value in values if isinstance(value, Tensor)]

    def noise(i: int) -> Tensor:
        drawn = draws.noise(i)  # of the model after the file's decisions, which may make other shapes
        return drawn if drawn.shape == eager[i].shape else torch.zeros(eager[i].shape, dtype=torch.float64)

    if len(eager) == len(truth.outputs) and [x.dtype for x in eager] == dtypes:
        rows = judge.rows("capture", case, eager, truth, noise)
        if all(not row.said and row.ratio <= SAME * judge.limit for row in rows):
            return
    try:
        own = numbers(model.graph(batch.flat))
    except Exception as error:
        judge.findings.problems.append(f"capture: its graph does not run at {batch.words}: {first_line(error)}")
        return
    if problem := _differs(batch, eager, own, truth, model, judge.limit):
        judge.findings.problems.append(f"capture: at {batch.words} the model {problem}")


def _differs(
    batch: Batch, eager: list[Tensor], own: list[Tensor], truth: Run, model: Model, limit: float
) -> str | None:
    if len(eager) != len(own):
        return f"gives {len(eager)} outputs and its captured graph {len(own)}"
    for theirs, mine, true in zip(eager, own, truth.outputs):
        if theirs.shape != mine.shape or theirs.dtype != mine.dtype:
            what = f"{tuple(theirs.shape)} {theirs.dtype} and its captured graph {tuple(mine.shape)} {mine.dtype}"
            return f"gives {what}"
        if torch.equal(theirs, mine):
            continue
        if not theirs.is_floating_point():
            return "gives other integers than its captured graph"
        if differs := specials(theirs, mine):
            return f"gives other NaNs or infinities than its captured graph: {differs}"
        ratio = compare(theirs, mine.double(), seen_error(mine, true), unit=unit_roundoff(mine.dtype),
                        batched=batch.leads(mine))[0]  # fmt: skip
        model.capture_error = max(model.capture_error, ratio)
        if not ratio <= SAME * limit:
            return (
                f"and its graph differ by {ratio:.3g} times the noise: its code depends on that size, so fix the "
                "dimension (--static)"
            )
    return None


def judge_twice(judge: Judge, candidate: RunnerCandidate) -> None:
    """Asks twice on one batch: other answers are a problem where they differ by more than the noise may make them."""
    case, findings = judge.cases[0], judge.findings
    try:
        first, second = (numbers(candidate.run(case.batch.flat)) for _ in range(2))
    except Exception as error:
        if not any(candidate.name in problem for problem in findings.problems):
            findings.problems.append(f"{candidate.name}: fails when asked again: {first_line(error)}")
        return
    worst = 0.0
    for name, one, other, own, true in zip(judge.reference.outputs, first, second, case.own, case.truth.outputs):
        ratio = torch.inf
        if torch.equal(one, other) or one.shape != true.shape:  # other shapes have been told
            ratio = 0.0
        elif one.shape == other.shape and own.is_floating_point() and specials(other, one) is None:
            noise = (own.double() - true).abs()
            ratio = compare(other, one.double(), noise, unit=unit_roundoff(own.dtype),
                            batched=case.batch.leads(own), coarser=candidate.coarser)[0]  # fmt: skip
        worst = max(worst, ratio)
        if not ratio <= judge.limit:
            findings.problems.append(
                f"{candidate.name}, output '{name}': answers otherwise when it is asked again, by {ratio:.3g} times "
                f"the noise (limit {judge.limit:g})"
            )
    if 0 < worst <= judge.limit:
        findings.notes.append(f"{candidate.name}: its answers to one input differ by up to {worst:.2g} times the noise")
