"""One ONNX file against another that it claims to equal: in float64, and as ONNX Runtime runs it.

What differs in float64 is the file's fault, and is judged against what rounding every constant once, to its own dtype,
does to that output and channel. What ONNX Runtime adds is judged against the error that it has on the original.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnfold.errors import BnfoldError, InputError, LowerError
from bnfold.evaluate.evaluator import File64
from bnfold.evaluate.subject import Array, Run, ValueInfo
from bnfold.gate.decisions import NEAR
from bnfold.gate.judge import Tally, epsilon, finite_problem, site_ratios
from bnfold.gate.reference import RUN_FACTOR, SAMPLE_FACTOR, Findings, Progress
from bnfold.report import CheckReport, OutputResult, SiteResult, Verdict
from bnfold.runtime.runtime import open_session
from bnfold.runtime.session import Session

#: Batches, one per kind of values and over again.
BATCHES = (1, 2, 1, 3, 1)
#: Sizes of other dynamic axes, until the original runs: what nets with strides take, and what those without may.
SIZES = ((37, 41, 53), (64, 96, 160), (224, 256, 320), (1, 2, 3))
#: Draws of rounded constants.
DRAWS = 2
_TORCH = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass
class _Case:
    """Inputs, what the original makes of them, and how far rounding its constants moves that."""

    feeds: dict[str, Array]
    size: int
    truth: Run
    moved: list[Run]
    #: What ONNX Runtime makes of the original.
    own: list[Array]


@dataclass
class FileGate:
    """One judgement. Build it, then ``judge``.

    Args:
        original: what the file was made from, or is compared with.
        path: the file.
        device: where the file is to run.
        data: samples by input name, in place of made ones.
    """

    original: Path
    path: Path
    device: Any = "cpu"
    seed: int = 0
    limit: float = 4.0
    site_limit: float = 16.0
    data: Mapping[str, Array] | None = None
    progress: Progress = lambda stage, done, total: None
    _findings: Findings = field(default_factory=Findings)
    _names: Sequence[str] = ()

    def judge(self) -> CheckReport:
        """The verdict.

        Raises:
            BnfoldError: a file cannot be opened, or the original runs on none of the inputs made for it.
        """
        found = self._findings
        original, file = File64(self.original), File64(self.path)
        self._names = [value.name for value in original.outputs]
        self._compare_signatures(original, file)
        outputs: list[OutputResult] = []
        sites: list[SiteResult] = []
        cases: list[_Case] = []
        provider = "none"
        if not found.problems:
            cases = list(self._cases(original))
            if not cases:
                why = found.notes[-1] if found.notes else ""
                raise InputError(
                    f"it runs on none of the inputs made for it: {why}", where=str(self.original),
                    hint="Give real ones: --data",
                )  # fmt: skip
            outputs += self._judge("the file in float64", lambda case: self._run64(file, original, case), cases, sites)
            for optimized in (False, True):
                self.progress("check", 1 + optimized, 3)
                try:
                    session = open_session(self.path, device=self.device, optimized=optimized)
                    provider = session.provider
                    run = self._runtime(session.run, original)
                    name = "ONNX Runtime" if optimized else "ONNX Runtime, optimisations off"
                    outputs += self._judge(name, run, cases, sites, runtime=True)
                except BnfoldError as error:
                    found.problems.append(f"ONNX Runtime: {error}")
                    break
        found.once()
        verdict: Verdict = "fail" if found.problems else "inconclusive" if found.doubts else "pass"
        return CheckReport(
            verdict, provider, sum(case.size for case in cases), tuple(dict.fromkeys(case.size for case in cases)),
            tuple(outputs), tuple(sites), 0.0, (*found.problems, *found.doubts), tuple(found.notes), None, self.limit,
            self.site_limit,
        )  # fmt: skip

    def _compare_signatures(self, original: File64, file: File64) -> None:
        for kind, mine, theirs in (("input", file.inputs, original.inputs), ("output", file.outputs, original.outputs)):
            missing = [v.name for v in theirs if v.name not in {w.name for w in mine}]
            more = [v.name for v in mine if v.name not in {w.name for w in theirs}]
            if missing or more:
                self._findings.problems.append(
                    f"its {kind}s are {', '.join(v.name for v in mine)} and not {', '.join(v.name for v in theirs)}"
                )
            for value in mine:
                other = next((v for v in theirs if v.name == value.name), value)
                if value.dtype != other.dtype:
                    self._findings.problems.append(
                        f"{kind} '{value.name}' is {value.dtype.name} and not {other.dtype.name}"
                    )

    # -- inputs ----------------------------------------------------------------------------------------------------

    def _cases(self, original: File64) -> Iterator[_Case]:
        """Cases that the original runs on: every family of values, batches and sizes in turn."""
        eps = max((epsilon(_TORCH[v.dtype.name]) for v in original.outputs if v.dtype.name in _TORCH), default=2.0**-23)
        rows = max((len(x) for x in (self.data or {}).values()), default=0)
        session = self._session()
        known, reason = SIZES[0], ""
        for turn, family in enumerate(FAMILIES):
            self.progress("truth", turn, len(FAMILIES))
            for sizes in dict.fromkeys((known, *SIZES)):
                rng = np.random.default_rng((self.seed, turn))
                feeds, batch = self._feeds(original.inputs, turn, sizes, family, rng, rows)
                try:
                    truth = original.run(feeds, decide=True)
                    moved = [original.run(feeds, follow=truth.decided, jitter=(eps, seed)) for seed in range(DRAWS)]
                    own = session.run(feeds, self._names)
                except BnfoldError as error:
                    reason = str(error)
                    continue
                if turn == 0 and not all(map(_same, own, session.run(feeds, self._names))):
                    raise InputError(
                        "it answers otherwise from run to run on the same inputs", where=str(self.original)
                    )
                known = sizes
                yield _Case(feeds, batch, truth, moved, own)
                break
            else:
                self._findings.notes.append(f"the original does not run on inputs of its kind: {reason}")

    def _session(self) -> Session:
        """The original in ONNX Runtime.

        Raises:
            InputError: ONNX Runtime does not take it.
        """
        try:
            return open_session(self.original, device=self.device, optimized=False)
        except LowerError as error:
            raise InputError(
                f"ONNX Runtime does not run the original: {error.what}", where=str(self.original),
                hint="--no-check folds it unproved",
            ) from error  # fmt: skip

    def _feeds(
        self, inputs: Sequence[ValueInfo], turn: int, sizes: Sequence[int], family: Family, rng: np.random.Generator,
        rows: int,
    ) -> tuple[dict[str, Array], int]:  # fmt: skip
        feeds, named, batch = {}, dict[str, int](), 1
        for value in inputs:
            shape = []
            for axis, size in enumerate(value.shape):
                if not isinstance(size, int) or size <= 0:
                    key, count = size or f"{value.name}.{axis}", len(named)
                    made = BATCHES[turn % len(BATCHES)] if axis == 0 else sizes[(turn + count) % len(sizes)]
                    size = named.setdefault(str(key), made)
                shape.append(size)
            batch = shape[0] if shape and value is inputs[0] else batch
            if self.data is not None and value.name in self.data:
                given = self.data[value.name]
                picked = np.arange(turn * 7, turn * 7 + (shape[0] if shape else 1)) % max(rows, 1)
                feeds[value.name] = np.ascontiguousarray(given[picked]).astype(value.dtype)
            elif value.dtype.kind in "iub":
                feeds[value.name] = (rng.random(shape) > 0.5).astype(value.dtype)
            else:
                feeds[value.name] = np.asarray(family(rng, tuple(shape))).astype(value.dtype)
        return feeds, batch

    # -- judging ---------------------------------------------------------------------------------------------------

    def _run64(self, file: File64, original: File64, case: _Case) -> tuple[list[Array], Run]:
        run = file.run(case.feeds, decide=True)
        order = {v.name: x for v, x in zip(file.outputs, run.outputs)}
        return [order[name] for name in self._names], self._followed(original, case, run.decided, "the file in float64")

    def _runtime(
        self, run: Callable[[Mapping[str, Array], Sequence[str]], list[Array]], original: File64
    ) -> Callable[[_Case], tuple[list[Array], Run]]:
        """Runs a session; its decisions are those that explain its outputs: its own where they are outputs."""

        def each(case: _Case) -> tuple[list[Array], Run]:
            outputs = run(case.feeds, self._names)
            names = {v.name: x for v, x in zip(original.outputs, outputs)}
            mine = {name: names[name] for name in case.truth.decided if name in names}
            return outputs, self._followed(original, case, {**case.truth.decided, **mine}, "ONNX Runtime")

        return each

    def _followed(self, original: File64, case: _Case, decided: Mapping[str, Array], name: str) -> Run:
        """The original with somebody else's decisions; those that are no near-ties are a problem."""
        same = all(np.array_equal(decided.get(n, x), x) for n, x in case.truth.decided.items())
        if same:
            return case.truth
        truth = original.run(case.feeds, follow=decided)
        moved = original.run(case.feeds, follow=decided, jitter=(2.0**-23, 0))
        noises = {t.value: t.compared for t in moved.turns}
        for turn in truth.turns:
            other = noises.get(turn.value, turn.compared)
            off = other - turn.compared if other.shape == turn.compared.shape else np.zeros(1)
            off = off[np.isfinite(off)]
            noise = max(float(np.sqrt(np.mean(np.square(off)))), 2.0**-23 * float(np.sqrt(np.mean(turn.compared**2))))
            multiple = float(turn.gap.max()) / max(noise, 1e-300)
            words = f"{name}: {turn.operator} '{turn.value}' decides otherwise in {turn.different} places"
            if multiple > NEAR:
                self._findings.problems.append(f"{words}, {multiple:.3g} times the noise from a tie (limit {NEAR:g})")
            else:
                self._findings.notes.append(f"{words}, all near-ties, and was followed")
        return truth

    def _judge(
        self, name: str, run: Callable[[_Case], tuple[list[Array], Run]], cases: Sequence[_Case],
        sites: list[SiteResult], *, runtime: bool = False,
    ) -> list[OutputResult]:  # fmt: skip
        """Every output of one candidate, and its channels."""
        problems, tallies = self._findings.problems, dict[str, Tally]()
        worst: dict[str, tuple[float, float]] = {}
        elements = 0
        for i, case in enumerate(cases):
            try:
                outputs, truth = run(case)
            except BnfoldError as error:
                problems.append(f"{name} fails where the original runs: {error}")
                return []
            for info, value, true, *rest in zip(
                self._names, outputs, truth.outputs, case.truth.outputs, *(m.outputs for m in case.moved)
            ):
                where = f"{name}, output '{info}'"
                if isinstance(value, list) or value.shape != np.shape(true):
                    if not isinstance(value, list):
                        problems.append(f"{where} is of shape {list(value.shape)} and not {list(np.shape(true))}")
                    continue
                if runtime:
                    value = self._less_overflown(value, case.own[self._names.index(info)], true)
                elements += value.size
                if value.dtype.kind in "iubOUS" and value.dtype.name != "bfloat16":
                    wrong = int((value != true).sum())
                    if wrong:
                        problems.append(f"{where}: {wrong} of {value.size} elements differ")
                    continue
                given, exact, plain, *moved = (torch.from_numpy(np.array(x, np.float64)) for x in (value, true, *rest))
                if (problem := finite_problem(given, exact)) is not None:
                    problems.append(f"{where}: {problem}")
                    continue
                self._add(info, i, case, (given, exact, plain, moved), tallies, worst, runtime=runtime)
        if not elements:
            self._findings.doubts.append(f"{name}: no output has an element to compare")
        for info, (whole, channel) in worst.items():
            sites.append(SiteResult(name, info, f"output '{info}'", whole, channel))
            if not max(whole, channel) <= self.site_limit:
                problems.append(
                    f"{name}, output '{info}': a channel's error is {max(whole, channel):.3g} times the noise (limit "
                    f"{self.site_limit:g})"
                )
        return [self._result(name, info, tally) for info, tally in tallies.items() if len(tally.ratios(steady=True))]

    def _less_overflown(self, value: Array, own: Array, true: Any) -> Array:
        """A result with the truth where the original leaves its dtype's range as well, in the same way."""
        if value.dtype.kind in "iubOUS" or value.shape != own.shape or value.shape != np.shape(true):
            return value
        same = ~np.isfinite(own) & ((value == own) | (np.isnan(value) & np.isnan(own)))
        return np.where(same, true, value) if same.any() else value

    def _add(
        self, info: str, run: int, case: _Case, values: tuple[Tensor, Tensor, Tensor, list[Tensor]],
        tallies: dict[str, Tally], worst: dict[str, tuple[float, float]], *, runtime: bool,
    ) -> None:  # fmt: skip
        given, exact, plain, moved = values
        eps, batched = 2.0**-23, bool(given.ndim) and given.shape[0] == case.size > 1
        rounding = torch.stack([m - plain for m in moved]).square().mean(0).sqrt()
        noise = rounding
        if runtime:
            own = torch.from_numpy(np.array(case.own[self._names.index(info)], np.float64))
            if own.shape == plain.shape:
                noise = torch.hypot(rounding, (own - plain).nan_to_num(0.0, 0.0, 0.0))
        tally = tallies.setdefault(info, Tally(eps))
        tally.add(given, exact + noise if noise.shape == exact.shape else exact, exact, batched=batched, run=run)
        if given.numel() and noise.shape == exact.shape:
            whole, channel = site_ratios(given, exact + noise, exact, eps, rounding, batched=batched)
            before = worst.get(info, (0.0, 0.0))
            worst[info] = (max(before[0], whole), max(before[1], channel))

    def _result(self, name: str, info: str, tally: Tally) -> OutputResult:
        problems, ratios = self._findings.problems, tally.ratios(steady=True)
        typical = tally.typical(steady=True)
        largest = float(ratios.max()) if len(ratios) else 0.0
        run = max(tally.per_run().values(), default=0.0)
        where = f"{name}, output '{info}'"
        if not typical <= self.limit:
            problems.append(f"{where}: error is {typical:.3g} times the noise (limit {self.limit:g})")
        elif not run <= RUN_FACTOR * self.limit:
            problems.append(f"{where}: on one kind of inputs the error is {run:.3g} times the noise")
        elif not largest <= SAMPLE_FACTOR * self.limit:
            problems.append(f"{where}: on one sample the error is {largest:.3g} times the noise")
        return OutputResult(
            name, info, tally.relative(tally.noise), tally.relative(tally.error), typical, largest, len(ratios)
        )


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(np.array_equal(one, other, equal_nan=one.dtype.kind == "f"))


Family = Callable[[np.random.Generator, tuple[int, ...]], Array]


def _per_channel(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    sizes = [n if axis < 2 else 1 for axis, n in enumerate(shape)]
    return np.broadcast_to(rng.standard_normal(sizes), shape)


def _outlier(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    value = rng.standard_normal(shape)
    value.flat[:1] *= 30.0
    return value


#: Kinds of input values: every file is run on all of them.
FAMILIES: tuple[Family, ...] = (
    lambda rng, shape: rng.standard_normal(shape),
    lambda rng, shape: rng.random(shape),
    lambda rng, shape: rng.standard_normal(shape) * 3.0,
    lambda rng, shape: rng.integers(0, 256, shape).astype(np.float64),
    lambda rng, shape: np.maximum(rng.standard_normal(shape), 0.0),
    _per_channel,
    _outlier,
    lambda rng, shape: (rng.random(shape) > 0.5).astype(np.float64),
    lambda rng, shape: rng.standard_normal(shape) * 0.1,
    lambda rng, shape: np.zeros(shape),
)
