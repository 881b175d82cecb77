"""Questions 2 and 3: what ONNX Runtime makes of a file, operator by operator, and as it is deployed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnfold.errors import BnfoldError, InputError
from bnfold.evaluate.reading import outer_names
from bnfold.evaluate.subject import Run
from bnfold.gate.alone import alone
from bnfold.gate.by_operator import Asked, as_kernels_round, ask, rounded_once
from bnfold.gate.candidates import DEPLOYED, PLAIN, OnnxCandidate
from bnfold.gate.decisions import DRAWS, judge_turns, near_noise
from bnfold.gate.evidence import (
    CERTAIN,
    EXCUSE,
    MANY,
    SLACK,
    STEPS,
    TINY,
    Draws,
    Row,
    Source,
    seen_error,
    settled,
    unit_roundoff,
)
from bnfold.gate.findings import first_line
from bnfold.gate.judge import Case, Judge
from bnfold.gate.optimizers import guilty
from bnfold.gate.screen import Screen
from bnfold.gate.values import identical, to_numpy
from bnfold.gate.witnesses import FileWitness

#: Elements of intermediate values that are held at a time.
ELEMENTS = 32_000_000
#: Inputs on which all operators were asked and right: what the same operators lose on others is theirs to lose.
ENOUGH = 3


@dataclass
class Sessions:
    """A file in ONNX Runtime. ``make`` opens it: with which optimisations, and how.

    ``claim`` is the file in float64; None where nothing computes it so, which has been told.
    """

    judge: Judge
    claim: FileWitness | None
    make: Callable[..., OnnxCandidate]
    device: Any
    #: What was seen of the deployed session before.
    screen: Screen | None = None
    #: By a case's words what the session without optimisations answers, and the file in float64 after its decisions.
    plain: dict[str, list[Any]] = field(default_factory=dict)
    followed: dict[str, Run] = field(default_factory=dict)
    _asked: bool = False
    _lost: set[str] = field(default_factory=set)
    _cleared: dict[str, bool] = field(default_factory=dict)

    # -- without optimisations -----------------------------------------------------------------------------------------

    def run_plain(self) -> None:
        """The file without optimisations on every case, and its operators one by one."""
        candidate, judge = self.make(optimized=False), self.judge

        def run(case: Case) -> tuple[list[Any], dict[str, Tensor]]:
            names = list(case.claimed.decided) if case.claimed is not None else []
            return candidate.also(case.batch.flat, names) if names else (candidate.run(case.batch.flat), {})

        for case, (outputs, decided) in judge.answers(PLAIN, run):
            truth, mine = case.truth, case.claimed
            if mine is not None and self.claim is not None:
                truth = self.claim.after(case.batch, mine, decided)
            self.plain[case.words], self.followed[case.words] = outputs, truth
        candidate.close()  # what operators are asked on is another session: there is one at a time
        ran = [case for case in judge.cases if case.words in self.plain]
        for case in ran:
            judged = partial(self._rows, case, candidate, self.plain[case.words], self.followed[case.words])
            rows = judged(plain=False, steps=MANY)  # more draws cost more than asking the operators
            if 1 < (misfit := judge.misfit(rows)) < math.inf:
                clears = self._clears(candidate, case, misfit)
                if clears and misfit > EXCUSE / 4:
                    self._lose(case)
                rows = judged(plain=clears)
            judge.table += rows
        if ran and not self._asked:
            self._clears(candidate, min(ran, key=lambda case: case.batch.samples))
        candidate.close()
        for words, reason in judge.unrun.items():
            if words in self.plain:
                judge.findings.doubts.append(f"the file in float64: cannot be computed at {words}: {reason}")

    def _lose(self, case: Case) -> None:
        """A problem for every output that loses its digits where operators round their results once and no more.

        On inputs like the example's alone, and over whole channels: what is next to nothing may lose all of its own.
        """
        claim, truth, judge = self.claim, self.followed[case.words], self.judge
        if claim is None or case.claimed is None or case.batch.origin:
            return
        # In the dtype of the model: what is a normal number to bfloat16 may be none to float16.
        dtype = "bfloat16" if "bfloat16" in claim.file.halves() else self._dtype
        outputs = claim.run(case.batch, follow=truth.decided or None, after=partial(rounded_once, dtype)).outputs
        for i, name in enumerate(judge.reference.outputs):
            own, true, right = case.own[i], case.truth.outputs[i], truth.outputs[i]
            if not own.is_floating_point() or not own.shape == true.shape == right.shape == outputs[i].shape:
                continue
            unit = judge.reference.units.get(name, unit_roundoff(own.dtype))
            noise = sum((_size(x).square() for x in (own - true, judge.drawn(case).noise(i), unit * true)), start=TINY)
            lost = float((_size(outputs[i] - right) / noise**0.5).max()) if own.numel() else 0.0
            if lost > EXCUSE * judge.limit and name not in self._lost:
                self._lost.add(name)
                judge.findings.problems.append(
                    f"{PLAIN}, output '{name}': error is {lost:.3g} times the model's own at {case.words}, though "
                    "every operator is right: the file adds and takes away what hides the digits of its values"
                )

    def _rows(
        self, case: Case, candidate: OnnxCandidate, outputs: Sequence[Any], truth: Run, *, plain: bool,
        steps: int = len(STEPS),
    ) -> list[Row]:  # fmt: skip
        """Judged by what rounding does, by the model's own error and (``plain``) the plain session's and kernels'."""
        judge, draws = self.judge, self.judge.drawn(case)
        kernels: Draws | None = None

        def noise(i: int) -> Tensor:
            parts, right = [draws.noise(i)], truth.outputs[i]
            seen = [(case.own, case.truth)]
            if plain and case.words in self.plain:
                seen.append((self.plain[case.words], self.followed[case.words]))
            for given, run in seen:
                if given[i].shape == run.outputs[i].shape:
                    parts.append(seen_error(given[i], run.outputs[i]))
            parts += [kernels.noise(i)] if kernels is not None else []
            squares = (part.square() for part in parts if part.shape == right.shape)
            return sum(squares, torch.zeros(right.shape, dtype=torch.float64)).sqrt()

        rows = partial(judge.rows, candidate.name, case, outputs, truth, noise, coarser=SLACK * candidate.coarser,
                       wider=candidate.wider, typed=True)  # fmt: skip
        found = judge.sure(draws, rows, steps)
        if plain and not settled(found, judge.limit, MANY, draws):
            kernels = self._kernels(case, truth)
            found = found if kernels is None else rows()
        return found

    def _kernels(self, case: Case, truth: Run) -> Draws | None:
        """What other kernels than the ones that were asked may do to the outputs."""
        if self.claim is None or case.claimed is None:
            return None
        draws = Draws([Source(truth.outputs, lambda seed: self._by_kernels(case, truth.decided, seed).outputs)])
        draws.more(MANY)
        return draws

    def _by_kernels(self, case: Case, decided: Mapping[str, Any], seed: int) -> Run:
        """The file after decisions, each result off as kernels may be."""
        assert self.claim is not None
        rng = np.random.default_rng(seed)
        after = partial(as_kernels_round, opsets=self.claim.opsets, dtype=self._dtype, rng=rng)
        return self.claim.run(case.batch, follow=decided or None, after=after)

    @property
    def _dtype(self) -> str:
        return "float16" if self.claim is not None and self.claim.halves else "float32"

    # -- operator by operator ------------------------------------------------------------------------------------------

    @property
    def _exact(self) -> bool:
        """Whether a session must return the same where it is asked for its values as well.

        Half floats are computed in float32 on a CPU, and rounded only where somebody reads them.
        """
        finest = min(self.judge.reference.units.values(), default=0.0)
        weights = self.claim.file.weights().values() if self.claim is not None else ()
        return self.device.is_cpu and finest <= 2.0**-24 and not any(weight.dtype == "float16" for weight in weights)

    def _clears(self, candidate: OnnxCandidate, case: Case, misfit: float = 0.0) -> bool:
        """Whether the runtime computes every operator right on a case; the first time, by themselves as well."""
        if self.claim is None:
            return False
        findings, opsets = self.judge.findings, self.claim.opsets
        if case.words in self._cleared:
            return self._cleared[case.words]
        if len(self._cleared) >= ENOUGH and misfit < CERTAIN and all(self._cleared.values()):
            return True
        found: list[Asked] = []
        try:
            for nodes, given, constants in self._pieces(candidate, case):
                found.append(ask(nodes, opsets, given, constants))
                if not self._asked:
                    found.append(alone(nodes, opsets, given, constants, self.device))
        except BnfoldError as error:
            self._cleared[case.words] = False
            findings.doubts.append(f"{PLAIN}: its operators cannot be asked one by one: {first_line(error)}")
            return False
        self._asked = True
        faults = {(f.operator, f.node): f for asked in found for f in asked.faults}
        for fault in list({f.operator: f for f in faults.values()}.values())[:3]:
            findings.problems.append(
                f"ONNX Runtime computes operator {fault.operator} wrongly: at '{fault.node}' {fault.why}"
            )
            findings.notes.append(f"to reproduce {fault.operator}:\n{fault.script}")
        if unknown := sorted({name for asked in found for name in asked.unbounded}):
            findings.notes.append(
                f"no rounding bound is known beforehand for {', '.join(unknown)}: judged by what rounding operands does"
            )
        if missing := sorted({name for asked in found for name in asked.missing}):
            findings.doubts.append(f"operators that cannot be computed in float64: {', '.join(missing)}")
        self._cleared[case.words] = not faults and any(asked.count for asked in found)
        return self._cleared[case.words]

    def _pieces(self, candidate: OnnxCandidate, case: Case) -> Iterator[tuple[list[Any], Any, Any]]:
        """Runs of nodes, with their operands and results as the runtime has them: so many elements at a time."""
        assert self.claim is not None
        shapes = case.claimed.shapes if case.claimed else self.claim.file.shapes(self.claim.feeds(case.batch))
        weights, feeds = self.claim.file.weights(), candidate.feeds(case.batch.flat)
        chunk: list[Any] = []
        held = 0
        nodes = list(self.claim.graph.node)
        # What nobody reads is nobody's fault: the mask of a Dropout, the running statistics of a BatchNormalization.
        read_by = {name for node in nodes for name in (*node.input, *outer_names(node))}
        read_by.update(value.name for value in self.claim.graph.output)
        for i, node in enumerate(nodes):
            chunk.append(node)
            held += sum(math.prod(shapes.get(name, ())) for name in node.output if name)
            if held < ELEMENTS and i + 1 < len(nodes):
                continue
            inside = {name for each in chunk for name in (*each.input, *each.output) if name}
            outputs, values = candidate.also(case.batch.flat, [n for n in shapes if n in inside & read_by])
            candidate.close()
            if self._exact and not all(map(identical, outputs, self.plain[case.words])):
                raise InputError("its outputs are others when its values are asked for")
            made = {name: to_numpy(x) for name, x in values.items()}
            seen = inside.union(*map(outer_names, chunk))
            stored = {name: weights[name].array() for name in seen if name in weights}
            del outputs, values
            yield chunk, {**stored, **feeds, **made}, frozenset(n for n in inside if n in weights)
            chunk, held = [], 0

    # -- as it is deployed ---------------------------------------------------------------------------------------------

    def run_deployed(self, candidate: OnnxCandidate) -> None:
        """The optimised file on every case, against the one without."""
        seen, table = self.screen, self.judge.table

        def run(case: Case) -> list[Any]:
            known = seen.outputs.get(case.batch) if seen is not None else None
            return candidate.run(case.batch.flat) if known is None else known

        for case, outputs in self.judge.answers(candidate.name, run):
            truth = self.followed.get(case.words) or case.claimed or case.truth
            rows = self._rows(case, candidate, outputs, truth, plain=True)
            if case.claimed is not None and case.claimed.decided and self.judge.misfit(rows) > 1:
                rows = self._decided(candidate, case, outputs, rows)
            table += rows
        table += seen.rows if seen is not None else []

    def _decided(self, candidate: OnnxCandidate, case: Case, outputs: Sequence[Any], rows: list[Row]) -> list[Row]:
        """The rows after decisions that the session itself shows, where they explain what it returns."""
        assert case.claimed is not None and self.claim is not None
        try:
            decided = candidate.also(case.batch.flat, list(case.claimed.decided))[1]
            follow = {**case.claimed.decided, **decided}
            again = partial(self.claim.run, case.batch, follow=follow)
            truth = again()
            kernels = [self._by_kernels(case, follow, seed).turns for seed in range(DRAWS)]
        except Exception:
            return rows
        found = self._rows(case, candidate, outputs, truth, plain=True)
        if not self.judge.misfit(found) < self.judge.misfit(rows):
            return rows
        # A sigmoid's kernel is off by 1e-7 wherever it is, and so are scores of next to nothing that are compared.
        judge_turns(
            self.judge.findings, candidate.name, truth.turns, again, lambda turn: near_noise(turn, kernels)[0]
        )  # fmt: skip
        return found

    def guilty(self) -> tuple[str, ...] | None:
        """The optimisations that make a file wrong that is right without them, if one knows them; None: none does."""
        judge = self.judge
        wrong = {row.case for row in judge.of(DEPLOYED, said=True) if not row.misfit(judge.limit) <= 1}
        wrong |= judge.failed.get(DEPLOYED, set())
        case = next((case for case in judge.cases if case.words in wrong), None)
        if case is None:
            return None
        without = [row for row in judge.of(PLAIN, said=True) if row.case == case.words]
        if not all(row.misfit(judge.limit) <= 1 for row in without):
            return None

        def off(disabled: Sequence[str]) -> bool:
            candidate = self.make(optimized=True, disabled=disabled)
            try:
                truth = self.followed.get(case.words) or case.truth
                return judge.misfit(self._rows(case, candidate, candidate.run(case.batch.flat), truth, plain=True)) > 1
            except Exception:
                return True

        return guilty(off)

    def blame(self) -> str | None:
        """Whose fault it is where optimisations alone make a file wrong, as a problem."""
        found = self.guilty()
        if found is None:
            return None
        if not found:
            return (
                "ONNX Runtime: the file is right without its optimisations and wrong with them, whichever is left out"
            )
        return (
            f"ONNX Runtime: its optimisation {' with '.join(found)} makes the file wrong, which is right without it: "
            f"disable it where the file runs (InferenceSession(..., disabled_optimizers={list(found)}))"
        )


def _size(value: Tensor) -> Tensor:
    """RMS of what is finite, by place on axis 1."""
    axes = [axis for axis in range(value.ndim) if axis != 1]
    return value.double().nan_to_num(0.0, 0.0, 0.0).square().mean(axes).sqrt() if axes else value.double().abs()
