"""What runs the model elsewhere and shows its outputs alone: a folded class in torch, a user's runner."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bnfold.gate.candidates import Candidate
from bnfold.gate.evidence import SLACK, STEPS, Draws, Row, compare, seen_error, specials, unit_roundoff
from bnfold.gate.findings import first_line
from bnfold.gate.judge import Case, Judge, listed, settled
from bnfold.gate.runners import RunnerCandidate
from bnfold.gate.values import batched, numbers


def judge_outside(judge: Judge, candidate: Candidate) -> None:
    """Every case, against float64: by what rounding the constants does, and by the model's own error."""
    failed: dict[str, list[str]] = {}
    for case in judge.cases:
        try:
            outputs = candidate.run(case.batch.flat)
        except Exception as error:
            failed.setdefault(first_line(error), []).append(case.words)
            continue
        judge.table.rows += _judged(judge, candidate, case, outputs)
    for reason, at in failed.items():
        judge.findings.problems.append(f"{candidate.name}: fails at {listed(at)}: {reason}")


def _judged(judge: Judge, candidate: Candidate, case: Case, outputs: Sequence[Any]) -> list[Row]:
    rows: list[Row] = []
    for step in range(len(STEPS)):
        draws = judge.drawn(case, step)

        def noise(i: int, draws: Draws = draws) -> Tensor:
            return torch.hypot(draws.noise(i), seen_error(case.own[i], case.truth.outputs[i]))

        rows, _ = judge.judge(
            candidate.name, case, outputs, case.truth.outputs, noise, coarser=SLACK * candidate.coarser, typed=True
        )  # fmt: skip
        if settled(rows, judge.limit, step, draws):
            break
    return rows


def own_error(case: Case, index: int) -> Tensor:
    """How far the model itself is off in its own dtype."""
    found: Tensor = case.own[index].double() - case.truth.outputs[index]
    return found.nan_to_num(0.0, 0.0, 0.0)


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
                            batched=batched(case.batch, own), coarser=candidate.coarser)[0]  # fmt: skip
        worst = max(worst, ratio)
        if not ratio <= judge.limit:
            findings.problems.append(
                f"{candidate.name}, output '{name}': answers otherwise when it is asked again, by {ratio:.3g} times "
                f"the noise (limit {judge.limit:g})"
            )
    if 0 < worst <= judge.limit:
        findings.notes.append(f"{candidate.name}: its answers to one input differ by up to {worst:.2g} times the noise")
