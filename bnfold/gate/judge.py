"""The questions that the gate asks of everything that runs, and the table that the answers go into."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, Protocol

import torch
from torch import Tensor

from bnfold.errors import BnfoldError
from bnfold.evaluate.subject import Run, Turn
from bnfold.gate.evidence import (
    ELEMENT,
    EXCUSE,
    MANY,
    STEPS,
    Draws,
    Row,
    Source,
    Table,
    compare,
    seen_error,
    specials,
    unit_roundoff,
)  # fmt: skip
from bnfold.gate.findings import Findings, first_line, kind_of, words
from bnfold.gate.models import Reference, coarsest_unit
from bnfold.gate.samples import Batch
from bnfold.gate.screen import Screen
from bnfold.gate.turns import DRAWS, WILD, judge_turns, near_noise
from bnfold.gate.values import batched, numbers
from bnfold.report import OutputResult

#: A value this many limits off is no chance, whatever else is drawn.
CERTAIN = 100.0


def settled(rows: Iterable[Row], limit: float, step: int, draws: Draws) -> bool:
    """Whether no further draw changes what is said of any value.

    One draw says little of how far off it is, and none nothing: a claim may store its constants more coarsely.
    """
    certain = CERTAIN if step >= MANY else CERTAIN**2 if draws.whole else math.inf
    return not any(1 < row.misfit(limit) <= certain for row in rows)


class Claim(Protocol):
    """What claims to equal the reference, run in float64."""

    name: str
    #: Whether it is told what the reference's values are called in it, or has to guess.
    knows: bool

    def run(
        self, batch: Batch, keep: Collection[str] = (), *, follow: Mapping[str, Any] | None = None,
        seed: int | None = None,
    ) -> Run:  # fmt: skip
        """As the reference's; decisions and values by the claim's own names, outputs in the reference's order."""

    def called(self, name: str) -> str | None:
        """What it calls a value of the reference; None where it has none."""

    def unread(self, decisions: Iterable[str]) -> list[str]:
        """The decisions of the reference that it has no name for."""


@dataclass
class Case:
    """One batch of inputs, and what is known of it."""

    batch: Batch
    truth: Run
    own: list[Tensor]
    #: Float64 runs of the claim, and what rounding does to the outputs of both.
    claimed: Run | None = None
    draws: Draws | None = None
    #: No other case's: what it is in words.
    words: str = ""


@dataclass
class Judge:
    """Holds witnesses against a reference, case by case."""

    reference: Reference
    cases: list[Case]
    findings: Findings
    limit: float
    table: Table = field(default_factory=Table)
    #: What is wrong or missing with an output on a case, and no number says.
    said: dict[tuple[str, str], dict[str, list[str]]] = field(default_factory=dict)
    compared: dict[str, set[str]] = field(default_factory=dict)
    claimer: Claim | None = None
    #: Why a case could not be run in float64.
    unrun: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        told: dict[str, int] = {}
        for case in self.cases:  # what is said of a case is kept by its words
            count = told[case.words] = told.get(case.words, 0) + 1
            case.words += f" ({count})" if count > 1 else ""

    # -- question 1: the file, in float64 --------------------------------------------------------------------------

    def claim(self, claim: Claim, keep: Collection[str] = ()) -> None:
        """Every case of a claim in float64, the first with values to ``keep``. What it does not run is in ``unrun``."""
        self.claimer = claim
        for i, case in enumerate(self.cases):
            try:
                case.claimed, taken = self.taken(claim, case, () if i else keep)
            except BnfoldError as error:
                self.unrun[case.words] = first_line(error)
                continue
            truth, failed = case.truth, ""
            if claim.knows or not taken:
                truth, failed = self._following(case, taken)
            rows, misfit = self._claimed(claim, case, truth)
            if misfit > 1 and not claim.knows and taken:
                truth, failed = self._following(case, taken)
                again, better = self._claimed(claim, case, truth)
                if better < misfit:
                    rows = again
                else:
                    self._claimed(claim, case, case.truth)
                    truth = case.truth
            self.table.rows += rows
            if failed:
                self.findings.problems.append(
                    f"{claim.name}: its decisions at {case.words} cannot be followed: {failed}"
                )
            redrawn, theirs = _again(self.reference, case, taken), _compares(claim, case)
            judge_turns(self.findings, claim.name, truth.turns, redrawn, theirs)

    def taken(self, claim: Claim, case: Case, keep: Collection[str] = ()) -> tuple[Run, dict[str, Tensor]]:
        """A run of a claim, and what it decides where the reference does, by the reference's names."""
        names = {name: own for name in case.truth.decided if (own := claim.called(name)) is not None}
        run = claim.run(case.batch, [*keep, *names.values()])
        taken = {name: run.kept[own] for name, own in names.items() if own in run.kept}
        return run, self.reference.complete(taken)

    def _following(self, case: Case, taken: Mapping[str, Tensor]) -> tuple[Run, str]:
        """The reference with somebody's decisions, and why not where they make no sense."""
        mine = case.truth.decided
        if all(x.shape == mine[n].shape and torch.equal(x.to(mine[n].dtype), mine[n]) for n, x in taken.items()):
            return case.truth, ""
        try:
            return self.reference.run(case.batch, follow={**mine, **taken}), ""
        except Exception as error:
            return case.truth, first_line(error)

    def _claimed(self, claim: Claim, case: Case, truth: Run) -> tuple[list[Row], float]:
        batch, run = case.batch, case.claimed
        assert run is not None
        follow = run.decided or None
        theirs = Source(run.outputs, lambda seed: claim.run(batch, follow=follow, seed=seed).outputs)
        mine = self._source(case, truth)
        case.draws = draws = drawing(self.reference, [mine, theirs], case.draws if mine.louder > 1 else None)

        def noise(i: int) -> Tensor:
            found = draws.noise(i)
            if "adversarial" not in batch.origin or case.own[i].shape != found.shape:
                return found
            # Searched for what differs most: of all ways to round, the one that was taken is the worst there.
            return torch.hypot(found, seen_error(case.own[i], truth.outputs[i]))

        rows: list[Row] = []
        misfit = 0.0
        for step in range(len(STEPS)):
            draws.more(step)
            rows, misfit = self.judge(claim.name, case, run.outputs, truth.outputs, noise, draws=draws.count)
            if settled(rows, self.limit, step, draws):
                break
        return rows, misfit

    # -- any witness -----------------------------------------------------------------------------------------------

    def judge(
        self, witness: str, case: Case, given: Sequence[Any], truth: Sequence[Any], noise: Callable[[int], Tensor],
        *, coarser: float = 1.0, wider: bool = False, typed: bool = False, draws: float = math.inf,
    ) -> tuple[list[Row], float]:  # fmt: skip
        """The rows of one run, and the largest misfit: infinite where no number says how wrong it is.

        ``typed``: it has dtypes of its own; ``wider`` may be float32 for half floats. ``draws`` as for ``compare``.
        """
        names, said = self.reference.outputs, dict[str, list[str]]()
        values = numbers(given)
        if len(values) != len(case.own):
            self.said[witness, case.words] = {"": [f"{len(values)} outputs instead of {len(case.own)}"]}
            return [], torch.inf
        rows: list[Row] = []
        for i, (value, true, own) in enumerate(zip(values, truth, case.own)):
            name = names[i] if i < len(names) else str(i)
            if value.shape != true.shape or (typed and value.dtype != own.dtype and not (wider and _half(own, value))):
                dtypes = (f" {value.dtype}", f" {own.dtype}") if typed else ("", "")
                said.setdefault(name, []).append(
                    f"{tuple(value.shape)}{dtypes[0]} instead of {tuple(true.shape)}{dtypes[1]}"
                )
                continue
            if own.numel():
                self.compared.setdefault(witness, set()).add(name)
            if not own.is_floating_point():
                wrong = int((value != true).sum())
                if wrong:
                    said.setdefault(name, []).append(f"{wrong} of {true.numel()} integers differ")
                else:
                    rows.append(Row(case.words, witness, name, 0.0, 0.0, elements=0, samples=case.batch.samples))
                continue
            if (problem := specials(value, true)) is not None:
                said.setdefault(name, []).append(problem)
            unit = self.reference.units.get(name, unit_roundoff(own.dtype))
            found = compare(value, true, noise(i), unit=unit, batched=batched(case.batch, true), coarser=coarser,
                            draws=draws)  # fmt: skip
            count = int((true.isfinite() & value.isfinite()).sum())
            whole = bool(count) or not true.numel()
            rows.append(Row(case.words, witness, name, *found, count, case.batch.samples, finite=whole))
        self.said.pop((witness, case.words), None)
        if said:
            self.said[witness, case.words] = said
        return rows, torch.inf if said else max((row.misfit(self.limit) for row in rows), default=0.0)

    def drawn(self, case: Case, step: int = 0) -> Draws:
        """What rounding does to the outputs of a case, drawn as often as a step of ``STEPS`` says."""
        if case.draws is None:
            case.draws = Draws([self._source(case, case.truth)])
        case.draws.more(step)
        return case.draws

    def _source(self, case: Case, truth: Run) -> Source:
        """What rounding the reference's constants does, in float64 or where that says the same as the model runs."""
        reference, batch = self.reference, case.batch
        if reference.louder > 1 and not truth.decided and len(case.own) == len(truth.outputs):
            return Source(case.own, lambda seed: reference.loudly(batch, seed).outputs, reference.louder)
        return Source(truth.outputs, lambda seed: reference.run(batch, follow=truth.decided, seed=seed).outputs)

    def right(self, witness: str, cases: Iterable[Case]) -> bool:
        """Whether a witness has been right on some cases."""
        names = {case.words for case in cases}
        return not any(key[0] == witness and key[1] in names for key in self.said) and all(
            row.misfit(self.limit) <= 1 for row in self.table.of(witness) if row.case in names
        )

    # -- what it comes to --------------------------------------------------------------------------------------------

    def report(self, witness: str, *, unread: Callable[[str], int] = lambda name: 0, hint: str = "") -> None:
        """Adds what speaks against a witness: one line per output and kind of fault, on all inputs together."""
        found, problems = self.findings, list[tuple[str, str]]()
        kinds: dict[tuple[str, str], tuple[str, list[str]]] = {}
        for (name, case), said in self.said.items():
            for output, texts in said.items() if name == witness else ():
                for text in texts:  # sizes and counts differ from input to input, the cause does not
                    _, at = kinds.setdefault((output, kind_of(text)), (text, []))
                    at.append(case)
        for (output, _), (text, at) in kinds.items():
            where = f"{witness}, output '{output}'" if output else witness
            more = f", and the like at {listed(at[1:])}" if at[1:] else ""
            problems.append((output, f"{where}: {text} at {at[0]}{more}"))
        for output in dict.fromkeys(row.value for row in self.table.of(witness)):
            rows = self.table.of(witness, output)
            off = [row for row in rows if not row.misfit(self.limit) <= 1]
            if off:
                problems.append((output, f"{witness}, output '{output}': {self._words(off, len(rows))}"))
            if not any(row.finite for row in rows):
                found.doubts.append(
                    f"{witness}, output '{output}': it has no finite element; give real inputs (--data)"
                )
        for output, text in problems:
            if count := unread(output):
                text += f" (depends on decisions of the model that the file gives no names to, {count} of them)"
                found.doubts.append(text)
            else:
                found.problems.append(text + hint)

    def _words(self, off: Sequence[Row], of: int) -> str:
        worst = max(off, key=lambda row: row.misfit(self.limit))
        cases = listed([row.case for row in off]) if len(off) < of else f"all {of} inputs"
        text = f"error is {worst.ratio:.3g} times the noise (limit {self.limit:g}) at {cases}"
        if not worst.element:
            return text
        return f"{text}, {worst.worst:.3g} times at element {list(worst.element)} (limit {ELEMENT * self.limit:g})"

    def results(self, witness: str) -> list[OutputResult]:
        """What the report says of a witness, output by output."""
        found = []
        for output in dict.fromkeys(row.value for row in self.table.of(witness)):
            rows = self.table.of(witness, output)
            noise, error = (sorted(getattr(row, key) for row in rows)[len(rows) // 2] for key in ("noise", "error"))
            ratio, worst = (max(getattr(row, key) for row in rows) for key in ("ratio", "worst"))
            counts = tuple(map(sum, zip_longest(*(row.doublings for row in rows), fillvalue=0)))
            samples = sum(row.samples for row in rows)
            found.append(OutputResult(witness, output, noise, error, ratio, worst, samples, counts))
        return found

    def wild(self, witness: str) -> None:
        """Doubts outputs that rounding alone makes unsure."""
        for output in dict.fromkeys(row.value for row in self.table.of(witness)):
            rows = [row for row in self.table.of(witness, output) if row.elements]
            noise = sorted(row.noise for row in rows)[len(rows) // 2] if rows else 0.0
            if noise > max(WILD, 32 * self.reference.units.get(output, 0.0)):
                self.findings.doubts.append(
                    f"output '{output}': rounding the model's constants moves it by {noise:.2g} of itself, so almost "
                    "anything would pass; it is discontinuous on these inputs (top-k, rounding) or out of its range: "
                    "try --data"
                )


def drawing(reference: Reference, sources: Sequence[Source], begun: Draws | None = None) -> Draws:
    """Draws of a reference and of a claim. One that rounds to halves may move by much of itself, and is no bound."""
    return Draws(sources, begun, coarsest_unit(reference), math.inf if reference.halves else EXCUSE)


def _compares(claim: Claim, case: Case) -> Callable[[Turn], float]:
    """What rounding a claim's constants does to what it compares, where the reference decides so."""

    def noise(turn: Turn) -> float:
        name, run = claim.called(turn.value), case.claimed
        if name is None or run is None or name not in run.decided:
            return 0.0
        runs = [claim.run(case.batch, follow=run.decided, seed=seed) for seed in (None, *range(DRAWS))]
        own, *moved = ([t for t in each.turns if t.value == name] for each in runs)
        return near_noise(own[0], moved)[0] if own else 0.0

    return noise


def _again(reference: Reference, case: Case, taken: Mapping[str, Any]) -> Callable[[int], Sequence[Turn]]:
    return lambda seed: reference.run(case.batch, follow={**case.truth.decided, **taken}, seed=seed).turns


def _half(own: Tensor, value: Tensor) -> bool:
    return own.dtype in (torch.bfloat16, torch.float16) and value.dtype == torch.float32


def listed(cases: Sequence[str], most: int = 3) -> str:
    """The first few, and how many more there are."""
    names = list(dict.fromkeys(cases))
    return "; ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def overflow(own: Sequence[Tensor], truth: Sequence[Tensor]) -> str | None:
    """How a run in the model's own dtype is NaN or infinite otherwise than the truth, in words; None: it is not."""
    found = (specials(v, true) for v, true in zip(own, truth) if v.is_floating_point() and v.shape == true.shape)
    return next((said for said in found if said is not None), None)


def run_cases(
    reference: Reference, batches: Sequence[Batch], findings: Findings, progress: Callable[[str, int, int], None],
    accept: Callable[[Batch, list[Tensor] | Exception, Run | None], bool] | None = None, screen: Screen | None = None,
    keep: Collection[str] = (),
) -> tuple[list[Case], str]:  # fmt: skip
    """The cases that the reference runs on and ``screen`` does not clear, and why the last of the others was dropped.

    The first has the values to ``keep``.

    Inputs of the gate's own making on which the model itself overflows are dropped and told. Those that were searched
    for are a problem: that is what the search is asked for.
    """
    cases: list[Case] = []
    reason = ""
    for i, batch in enumerate(batches):
        progress("truth", i, len(batches))
        own: list[Tensor] | Exception
        truth: Run | None = None
        try:
            if accept is None and any(isinstance(x, Tensor) and not x.is_floating_point() for x in batch.flat):
                truth = reference.run(batch)  # first: on sizes that make no sense a runtime may end this process
            own = reference.own(batch)
        except Exception as error:
            own, reason = error, first_line(error)
            if accept is None:
                findings.notes.append(f"the original does not run at {words(batch)}: {reason}")
        failed = ""
        if screen is not None and not isinstance(own, Exception) and screen.clears(batch, own, first=not cases):
            continue
        if not isinstance(own, Exception) and truth is None:
            try:
                truth = reference.run(batch, () if cases else keep)
            except Exception as error:
                failed = first_line(error)
        if accept is not None and not accept(batch, own, truth):
            continue
        if isinstance(own, Exception):
            continue
        if truth is None:
            reason = f"the graph does not run in float64 ({failed}), so there is no truth to compare with"
            findings.doubts.append(reason)
            continue
        over = overflow(own, truth.outputs)
        if over is not None and "adversarial" in batch.origin:
            findings.problems.append(f"in its own dtype the model itself overflows at {words(batch)}: {over}")
        elif over is not None and (batch.origin or accept is None):
            reason = f"the model itself overflows at {words(batch)}: not judged there"
            findings.notes.append(reason)
            continue
        cases.append(Case(batch, truth, own, draws=screen.drawn.get(batch) if screen else None, words=words(batch)))
    return cases, reason
