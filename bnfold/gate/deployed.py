"""Questions 2 and 3: what ONNX Runtime makes of a file, operator by operator, and as it is deployed."""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Callable, Iterator, Sequence
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
from bnfold.gate.candidates import OnnxCandidate
from bnfold.gate.claims import FileClaim
from bnfold.gate.evidence import (
    EXCUSE,
    MANY,
    SLACK,
    STEPS,
    TINY,
    Draws,
    Row,
    Source,
    seen_error,
    unit_roundoff,
)  # fmt: skip
from bnfold.gate.findings import first_line
from bnfold.gate.judge import CERTAIN, Case, Judge, listed, settled
from bnfold.gate.optimizers import guilty
from bnfold.gate.screen import Screen
from bnfold.gate.turns import judge_turns
from bnfold.gate.values import identical, to_numpy

#: Elements of intermediate values that are held at a time.
ELEMENTS = 32_000_000
#: Inputs on which all operators were asked and right: what the same operators lose on others is theirs to lose.
ENOUGH = 3
PLAIN, DEPLOYED = "ONNX Runtime, optimisations off", "ONNX Runtime"


@dataclass
class Sessions:
    """A file in ONNX Runtime. ``make`` opens it: with which optimisations, and how.

    ``claim`` is the file in float64; None where nothing computes it so, which has been told.
    """

    judge: Judge
    claim: FileClaim | None
    make: Callable[..., OnnxCandidate]
    device: Any
    #: What was seen of the deployed session before.
    screen: Screen | None = None
    plain: dict[str, list[Any]] = field(default_factory=dict)
    followed: dict[str, Run] = field(default_factory=dict)
    _asked: bool = False
    _lost: set[str] = field(default_factory=set)
    _cleared: dict[str, bool] = field(default_factory=dict)
    _blamed: bool = False
    #: The cases on which the deployed session fails.
    _broken: set[str] = field(default_factory=set)

    # -- without optimisations -----------------------------------------------------------------------------------------

    def run_plain(self) -> None:
        """The file without optimisations on every case, and its operators one by one."""
        candidate = self.make(optimized=False)
        failed: dict[str, list[str]] = {}
        for case in self.judge.cases:
            names = list(case.claimed.decided) if case.claimed is not None else []
            try:
                outputs, decided = (
                    candidate.also(case.batch.flat, names) if names else (candidate.run(case.batch.flat), {})
                )
            except Exception as error:
                failed.setdefault(first_line(error), []).append(case.words)
                continue
            self.plain[case.words] = outputs
            self.followed[case.words] = self._following(case, decided)
        candidate.close()  # what operators are asked on is another session: there is one at a time
        for case in (case for case in self.judge.cases if case.words in self.plain):
            judged = partial(self._rows, PLAIN, case, candidate, self.plain[case.words], self.followed[case.words])
            rows, misfit = judged(plain=False, steps=MANY)  # more draws cost more than asking the operators
            if 1 < misfit < math.inf:
                clears = self._clears(candidate, case, misfit)
                if clears and misfit > EXCUSE / 4:
                    self._lose(case)
                rows, _ = judged(plain=clears)
            self.judge.table.rows += rows
        if not self._asked and self.plain:
            small = min((c for c in self.judge.cases if c.words in self.plain), key=lambda c: c.batch.samples)
            self._clears(candidate, small)
        candidate.close()
        self._failures(PLAIN, failed)
        for words, reason in self.judge.unrun.items():
            if words in self.plain:
                self.judge.findings.doubts.append(f"the file in float64: cannot be computed at {words}: {reason}")

    def _lose(self, case: Case) -> None:
        """A problem for every output that loses its digits where operators round their results once and no more.

        On inputs like the example's alone, and over whole channels: what is next to nothing may lose all of its own.
        """
        claim, truth, judge = self.claim, self.followed[case.words], self.judge
        if claim is None or case.claimed is None or case.batch.origin:
            return
        outputs = claim.run(case.batch, follow=truth.decided or None, after=partial(rounded_once, self._dtype)).outputs
        units = judge.reference.units
        for i, name in enumerate(judge.reference.outputs):
            own, true, right = case.own[i], case.truth.outputs[i], truth.outputs[i]
            if not own.is_floating_point() or not own.shape == true.shape == right.shape == outputs[i].shape:
                continue
            unit = units.get(name, unit_roundoff(own.dtype))
            noise = sum((_size(x).square() for x in (own - true, judge.drawn(case).noise(i), unit * true)), start=TINY)
            lost = float((_size(outputs[i] - right) / noise**0.5).max()) if own.numel() else 0.0
            if lost > EXCUSE * judge.limit and name not in self._lost:
                self._lost.add(name)
                judge.findings.problems.append(
                    f"{PLAIN}, output '{name}': error is {lost:.3g} times the model's own at {case.words}, though "
                    "every operator is right: the file adds and takes away what hides the digits of its values"
                )

    def _following(self, case: Case, decided: dict[str, Tensor]) -> Run:
        """The file in float64, with the decisions of a run; the model where there is no such file."""
        claimed = case.claimed
        if claimed is None or self.claim is None:
            return case.truth
        if all(n not in decided or torch.equal(decided[n].to(x.dtype), x) for n, x in claimed.decided.items()
               if n not in decided or decided[n].shape == x.shape):  # fmt: skip
            return claimed
        return self.claim.run(case.batch, follow={**claimed.decided, **decided})

    def _rows(
        self,
        name: str,
        case: Case,
        candidate: Any,
        outputs: Sequence[Any],
        truth: Run,
        *,
        plain: bool,
        steps: int = len(STEPS),
    ) -> tuple[list[Row], float]:
        """Judged by what rounding does, by the model's own error and (``plain``) the plain session's and kernels'."""
        kernels: Draws | None = None

        def noise(i: int) -> Tensor:
            parts = []
            right = truth.outputs[i]
            if not right.is_floating_point():
                return torch.zeros(right.shape, dtype=torch.float64)
            parts.append(self.judge.drawn(case).noise(i))
            if case.own[i].shape == case.truth.outputs[i].shape:
                parts.append(seen_error(case.own[i], case.truth.outputs[i]))
            if plain and case.words in self.plain:
                cleared, true = self.plain[case.words][i], self.followed[case.words].outputs[i]
                if cleared.shape == true.shape:
                    parts.append(seen_error(cleared, true))
            if kernels is not None:
                parts.append(kernels.noise(i))
            fitting = [part for part in parts if part.shape == right.shape]
            if not fitting:
                return torch.zeros_like(right, dtype=torch.float64)
            return torch.stack(fitting).square().sum(0).sqrt()

        found: tuple[list[Row], float] = ([], 0.0)
        for step in range(steps + plain):
            if step < len(STEPS):
                draws = self.judge.drawn(case, step)
            elif (kernels := self._kernels(case, truth)) is None:
                break
            found = self.judge.judge(
                name, case, outputs, truth.outputs, noise, coarser=SLACK * candidate.coarser, wider=candidate.wider,
                typed=True,
            )  # fmt: skip
            if settled(found[0], self.judge.limit, step, draws):
                break
        return found

    def _kernels(self, case: Case, truth: Run) -> Draws | None:
        """What other kernels than the ones that were asked may do to the outputs."""
        claim = self.claim
        if claim is None or case.claimed is None:
            return None

        def draw(seed: int) -> Sequence[Tensor]:
            after = partial(as_kernels_round, opsets=claim.opsets, dtype=self._dtype, rng=np.random.default_rng(seed))
            return claim.run(case.batch, follow=truth.decided or None, after=after).outputs

        draws = Draws([Source(truth.outputs, draw)])
        draws.more(MANY)
        return draws

    @property
    def _dtype(self) -> str:
        return "float16" if self.claim is not None and self.claim.file.halves() else "float32"

    # -- operator by operator ------------------------------------------------------------------------------------------

    @property
    def _exact(self) -> bool:
        """Whether a session must return the same where it is asked for its values as well.

        Half floats are computed in float32 on a CPU, and rounded only where somebody reads them.
        """
        return (
            self.device.is_cpu
            and min(self.judge.reference.units.values(), default=0.0) <= 2.0**-24
            and not any(
                weight.dtype == "float16" for weight in (self.claim.file.weights().values() if self.claim else ())
            )
        )

    def _clears(self, candidate: OnnxCandidate, case: Case, misfit: float = 0.0) -> bool:
        """Whether the runtime computes every operator right on a case; the first time, by themselves as well."""
        if self.claim is None:
            return False
        if case.words in self._cleared:
            return self._cleared[case.words]
        if len(self._cleared) >= ENOUGH and misfit < CERTAIN and all(self._cleared.values()):
            return True
        opsets = self.claim.opsets
        found: list[Asked] = []
        try:
            for nodes, given, constants in self._pieces(candidate, case):
                found.append(ask(nodes, opsets, given, constants))
                if not self._asked:
                    found.append(alone(nodes, opsets, given, constants, self.device))
        except BnfoldError as error:
            self._cleared[case.words] = False
            self.judge.findings.doubts.append(f"{PLAIN}: its operators cannot be asked one by one: {first_line(error)}")
            return False
        self._asked = True
        faults = {(f.operator, f.node): f for asked in found for f in asked.faults}
        for fault in list({f.operator: f for f in faults.values()}.values())[:3]:
            self.judge.findings.problems.append(
                f"ONNX Runtime computes operator {fault.operator} wrongly: at '{fault.node}' {fault.why}"
            )
            self.judge.findings.notes.append(f"to reproduce {fault.operator}:\n{fault.script}")
        if unknown := sorted({name for asked in found for name in asked.unbounded}):
            self.judge.findings.notes.append(
                f"no rounding bound is known beforehand for {', '.join(unknown)}: judged by what rounding operands does"
            )
        if missing := sorted({name for asked in found for name in asked.missing}):
            self.judge.findings.doubts.append(f"operators that cannot be computed in float64: {', '.join(missing)}")
        self._cleared[case.words] = not faults and any(asked.count for asked in found)
        return self._cleared[case.words]

    def _pieces(self, candidate: OnnxCandidate, case: Case) -> Iterator[tuple[list[Any], Any, Any]]:
        """Runs of nodes, with their operands and results as the runtime has them: so many elements at a time."""
        assert self.claim is not None
        shapes = case.claimed.shapes if case.claimed else self.claim.file.shapes(self.claim.feeds(case.batch))
        weights, feeds = self.claim.weights(), candidate.feeds(case.batch.flat)
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
            shown = inside & read_by
            wanted = [name for name in shapes if name in shown]
            outputs, values = candidate.also(case.batch.flat, wanted)
            candidate.close()
            if self._exact and not all(map(identical, outputs, self.plain[case.words])):
                raise InputError("its outputs are others when its values are asked for")
            made = {name: to_numpy(x) for name, x in values.items()}
            given = ChainMap[str, Any](made, feeds, weights)  # type: ignore[arg-type]  # which is read alone
            del outputs, values
            yield chunk, given, frozenset(n for n in inside if n in weights)
            chunk, held = [], 0

    # -- as it is deployed ---------------------------------------------------------------------------------------------

    def run_deployed(self, candidate: OnnxCandidate) -> None:
        """The optimised file on every case, against the one without."""
        failed: dict[str, list[str]] = {}
        for case in self.judge.cases:
            try:
                known = self.screen.outputs.get(case.batch) if self.screen is not None else None
                outputs = candidate.run(case.batch.flat) if known is None else known
            except Exception as error:
                failed.setdefault(first_line(error), []).append(case.words)
                continue
            truth = self.followed.get(case.words) or case.claimed or case.truth
            rows, misfit = self._rows(candidate.name, case, candidate, outputs, truth, plain=True)
            if misfit > 1 and case.claimed is not None and case.claimed.decided:
                rows = self._decided(candidate, case, outputs, truth, rows, misfit)
            self.judge.table.rows += rows
        self.judge.table.rows += self.screen.rows if self.screen is not None else []
        self._failures(candidate.name, failed)
        self._broken = {words for at in failed.values() for words in at} if candidate.name == DEPLOYED else self._broken

    def _decided(
        self, candidate: OnnxCandidate, case: Case, outputs: Sequence[Any], before: Run, rows: list[Row], misfit: float
    ) -> list[Row]:
        """The rows after decisions that the session itself shows, where they explain what it returns."""
        assert case.claimed is not None and self.claim is not None
        claim, names = self.claim, list(case.claimed.decided)
        try:
            decided = candidate.also(case.batch.flat, names)[1]
            truth = claim.run(case.batch, follow={**case.claimed.decided, **decided})
        except Exception:
            return rows
        found, better = self._rows(candidate.name, case, candidate, outputs, truth, plain=True)
        if not better < misfit:
            self._rows(candidate.name, case, candidate, outputs, before, plain=True)
            return rows
        again = partial(claim.run, case.batch, follow={**case.claimed.decided, **decided})
        judge_turns(self.judge.findings, candidate.name, truth.turns, lambda seed: again(seed=seed).turns)
        return found

    def guilty(self) -> tuple[str, ...]:
        """The optimisations that make a file wrong that is right without them; none where it is right with them."""
        judge = self.judge
        rows = [row for row in judge.table.of(DEPLOYED) if not row.misfit(judge.limit) <= 1]
        cases = {row.case for row in rows} | {words for name, words in judge.said if name == DEPLOYED} | self._broken
        case = next((c for c in judge.cases if c.words in cases), None)
        self._blamed = case is not None and judge.right(PLAIN, [case])
        if case is None or not self._blamed:
            return ()

        def wrong(disabled: Sequence[str]) -> bool:
            candidate = self.make(optimized=True, disabled=disabled)
            try:
                truth = self.followed.get(case.words) or case.truth
                return self._rows("blame", case, candidate, candidate.run(case.batch.flat), truth, plain=True)[1] > 1
            except Exception:
                return True

        found = guilty(wrong)
        judge.said.pop(("blame", case.words), None)
        judge.compared.pop("blame", None)
        return found

    def blame(self) -> str | None:
        """Whose fault it is where optimisations alone make a file wrong, as a problem."""
        found = self.guilty()
        if not self._blamed:
            return None
        if not found:
            return (
                "ONNX Runtime: the file is right without its optimisations and wrong with them, whichever is left out"
            )
        return (
            f"ONNX Runtime: its optimisation {' with '.join(found)} makes the file wrong, which is right without it: "
            f"disable it where the file runs (InferenceSession(..., disabled_optimizers={list(found)}))"
        )

    def _failures(self, name: str, failed: dict[str, list[str]]) -> None:
        for reason, at in failed.items():
            self.judge.findings.problems.append(f"{name}: fails at {listed(at)}: {reason}")


def _size(value: Tensor) -> Tensor:
    """RMS of what is finite, by place on axis 1."""
    axes = [axis for axis in range(value.ndim) if axis != 1]
    return value.double().nan_to_num(0.0, 0.0, 0.0).square().mean(axes).sqrt() if axes else value.double().abs()
