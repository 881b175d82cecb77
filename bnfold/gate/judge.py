"""The questions that the gate asks of everything that runs, and the table that the answers go into."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from bnfold.errors import BnfoldError
from bnfold.evaluate.subject import Run, Turn
from bnfold.gate.decisions import DRAWS, WILD, judge_turns, near_noise
from bnfold.gate.evidence import (
    ELEMENT,
    STEPS,
    Draws,
    Row,
    Source,
    compare,
    seen_error,
    settled,
    specials,
    unit_roundoff,
)
from bnfold.gate.findings import Findings, first_line, kind_of
from bnfold.gate.samples import Batch
from bnfold.gate.screen import Screen
from bnfold.gate.values import numbers
from bnfold.gate.witnesses import Witness
from bnfold.report import CheckReport, OutputResult
from bnfold.report.progress import Progress

#: Why a value that is too far off may be right.
CHAOTIC = "rounding moves it out of proportion on these inputs, so it may be by chance: try --data"


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

    reference: Witness
    cases: list[Case]
    findings: Findings
    limit: float
    #: All that was seen. Verdicts, sites and reports are questions to it.
    table: list[Row] = field(default_factory=list)
    claimer: Witness | None = None
    #: Why a case could not be run in float64.
    unrun: dict[str, str] = field(default_factory=dict)
    #: The cases on which a witness fails, by their names.
    failed: dict[str, set[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        told: dict[str, int] = {}
        for case in self.cases:  # what is said of a case is kept by its words
            count = told[case.words] = told.get(case.words, 0) + 1
            case.words += f" ({count})" if count > 1 else ""

    def of(self, witness: str, value: str | None = None, *, said: bool = False) -> list[Row]:
        """The rows of a witness, of one output or of all; where it is asked for those too that no number says."""
        rows = [row for row in self.table if row.witness == witness and not row.inside and (said or not row.said)]
        return rows if value is None else [row for row in rows if row.value == value]

    def misfit(self, rows: Iterable[Row]) -> float:
        """The largest: at most 1 where all is right, infinite where no number says how wrong it is."""
        return max((row.misfit(self.limit) for row in rows), default=0.0)

    # -- question 1: the file, in float64 --------------------------------------------------------------------------

    def claim(self, claim: Witness, keep: Collection[str] = ()) -> None:
        """Every case of a claim in float64, the first with values to ``keep``. What it does not run is in ``unrun``."""
        self.claimer = claim
        for i, case in enumerate(self.cases):
            try:
                case.claimed, taken = self.taken(claim, case, () if i else keep)
            except BnfoldError as error:
                self.unrun[case.words] = first_line(error)
                continue
            truth, failed = case.truth, ""
            if claim.knows:
                truth, failed = self._following(case, taken)
            rows = self._claimed(claim, case, truth)
            if taken and not claim.knows and (misfit := self.misfit(rows)) > 1:  # its decisions may be the model's
                other, failed = self._following(case, taken)
                before, again = case.draws, self._claimed(claim, case, other)
                if self.misfit(again) < misfit:
                    rows, truth = again, other
                else:
                    case.draws = before
            self.table += rows
            if failed:
                self.findings.problems.append(
                    f"{claim.name}: its decisions at {case.words} cannot be followed: {failed}"
                )
            redrawn = partial(self.reference.run, case.batch, follow={**case.truth.decided, **taken})
            judge_turns(self.findings, claim.name, truth.turns, redrawn, partial(_compared_noise, claim, case))

    def taken(self, claim: Witness, case: Case, keep: Collection[str] = ()) -> tuple[Run, dict[str, Tensor]]:
        """A run of a claim, and what it decides where the reference does, by the reference's names."""
        names = {name: own for name in case.truth.decided if (own := claim.called(name)) is not None}
        run = claim.run(case.batch, [*keep, *names.values()])
        taken = {name: run.kept[own] for name, own in names.items() if own in run.kept}
        return run, self.reference.complete(taken)

    def _following(self, case: Case, taken: Mapping[str, Tensor]) -> tuple[Run, str]:
        """The reference with somebody's decisions, and why not where they make no sense."""
        try:
            return self.reference.after(case.batch, case.truth, taken), ""
        except Exception as error:
            return case.truth, first_line(error)

    def _claimed(self, claim: Witness, case: Case, truth: Run) -> list[Row]:
        batch, run = case.batch, case.claimed
        assert run is not None
        follow = run.decided or None
        theirs = Source(run.outputs, lambda seed: claim.run(batch, follow=follow, seed=seed).outputs)
        mine = self._source(case, truth)
        case.draws = draws = self.reference.draws([mine, theirs], case.draws if mine.louder > 1 else None)

        def noise(i: int) -> Tensor:
            found = draws.noise(i)
            if "adversarial" not in batch.origin or case.own[i].shape != found.shape:
                return found
            # Searched for what differs most: of all ways to round, the one that was taken is the worst there.
            return torch.hypot(found, seen_error(case.own[i], truth.outputs[i]))

        return self.sure(draws, lambda: self.rows(claim.name, case, run.outputs, truth, noise, draws=draws.count))

    # -- any witness -----------------------------------------------------------------------------------------------

    def answers(self, witness: str, run: Callable[[Case], Any]) -> Iterator[tuple[Case, Any]]:
        """What a witness makes of every case; that it fails on some is a problem."""
        failed: dict[str, list[str]] = {}
        for case in self.cases:
            try:
                answer = run(case)
            except Exception as error:
                failed.setdefault(first_line(error), []).append(case.words)
                self.failed.setdefault(witness, set()).add(case.words)
            else:
                yield case, answer
        for reason, at in failed.items():
            self.findings.problems.append(f"{witness}: fails at {listed(at)}: {reason}")

    def sure(self, draws: Draws, rows: Callable[[], list[Row]], steps: int = len(STEPS)) -> list[Row]:
        """The rows when constants have been drawn as often as it takes to be sure of what they say."""
        found: list[Row] = []
        for step in range(steps):
            draws.more(step)
            found = rows()
            if settled(found, self.limit, step, draws):
                break
        return found

    def rows(
        self, witness: str, case: Case, given: Sequence[Any], truth: Run, noise: Callable[[int], Tensor], *,
        coarser: float = 1.0, wider: bool = False, typed: bool = False, draws: float = math.inf,
    ) -> list[Row]:  # fmt: skip
        """What is seen of one run.

        ``typed``: it has dtypes of its own; ``wider`` may be float32 for half floats. ``draws`` as for ``compare``.
        """
        names, values, found = self.reference.outputs, numbers(given), list[Row]()
        chaotic = case.draws.chaotic if case.draws is not None else frozenset()

        def row(name: str, *numbers: Any, **more: Any) -> None:
            found.append(Row(case.words, witness, name, *numbers, samples=case.batch.samples, **more))

        def say(name: str, text: str, *, shown: bool = False) -> None:
            row(name, math.inf, math.inf, said=text, shown=shown)

        if len(values) != len(case.own):
            say("", f"{len(values)} outputs instead of {len(case.own)}")
            return found
        for i, (value, true, own) in enumerate(zip(values, truth.outputs, case.own)):
            name, shown = names[i] if i < len(names) else str(i), own.numel() > 0
            if value.shape != true.shape or (typed and value.dtype != own.dtype and not (wider and _half(own, value))):
                dtypes = (f" {value.dtype}", f" {own.dtype}") if typed else ("", "")
                say(name, f"{tuple(value.shape)}{dtypes[0]} instead of {tuple(true.shape)}{dtypes[1]}")
            elif not own.is_floating_point():
                if wrong := int((value != true).sum()):
                    say(name, f"{wrong} of {true.numel()} integers differ", shown=shown)
                else:
                    row(name, 0.0, 0.0, shown=shown)
            else:
                if (problem := specials(value, true)) is not None:
                    say(name, problem, shown=shown)
                unit = self.reference.units.get(name, unit_roundoff(own.dtype))
                seen = compare(value, true, noise(i), unit=unit, batched=case.batch.leads(true), coarser=coarser,
                               draws=draws)  # fmt: skip
                count = int((true.isfinite() & value.isfinite()).sum())
                row(name, *seen, elements=count, finite=bool(count) or not true.numel(), shown=shown,
                    chaotic=i in chaotic)  # fmt: skip
        return found

    def drawn(self, case: Case, step: int = 0) -> Draws:
        """What rounding does to the outputs of a case, drawn as often as a step of ``STEPS`` says."""
        if case.draws is None:
            case.draws = Draws([self._source(case, case.truth)])
        case.draws.more(step)
        return case.draws

    def _source(self, case: Case, truth: Run) -> Source:
        """What rounding the reference's constants does, in float64 or where that says the same as the model runs."""
        reference, batch = self.reference, case.batch
        quiet = Source(truth.outputs, lambda seed: reference.run(batch, follow=truth.decided, seed=seed).outputs)
        if reference.louder > 1 and not truth.decided and len(case.own) == len(truth.outputs):
            return Source(case.own, lambda seed: reference.loudly(batch, seed).outputs, reference.louder, quiet)
        return quiet

    # -- what it comes to --------------------------------------------------------------------------------------------

    def report(self, witness: str, *, unread: Callable[[str], int] = lambda name: 0, hint: str = "") -> None:
        """Adds what speaks against a witness: one line per output and kind of fault, on all inputs together."""
        found, problems = self.findings, list[tuple[str, str]]()
        kinds: dict[tuple[str, str], list[Row]] = {}
        for row in self.of(witness, said=True):  # sizes and counts differ from input to input, the cause does not
            if row.said:
                kinds.setdefault((row.value, kind_of(row.said)), []).append(row)
        for (output, _), (first, *others) in kinds.items():
            where = f"{witness}, output '{output}'" if output else witness
            more = f", and the like at {listed([row.case for row in others])}" if others else ""
            problems.append((output, f"{where}: {first.said} at {first.case}{more}"))
        for output in dict.fromkeys(row.value for row in self.of(witness)):
            rows = self.of(witness, output)
            off = [row for row in rows if not row.misfit(self.limit) <= 1]
            if off and all(row.chaotic for row in off):
                found.doubts.append(f"{witness}, output '{output}': {self._words(off, len(rows))}, but {CHAOTIC}")
            elif off:
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

    def wild(self, witness: str) -> None:
        """Doubts outputs that rounding alone makes unsure."""
        for output in dict.fromkeys(row.value for row in self.of(witness)):
            rows = [row for row in self.of(witness, output) if row.elements]
            noise = sorted(row.noise for row in rows)[len(rows) // 2] if rows else 0.0
            if noise > max(WILD, 32 * self.reference.units.get(output, 0.0)):
                self.findings.doubts.append(
                    f"output '{output}': rounding the model's constants moves it by {noise:.2g} of itself, so almost "
                    "anything would pass; it is discontinuous on these inputs (top-k, rounding) or out of its range: "
                    "try --data"
                )

    def verdict(self, provider: str, batches: Sequence[Batch], **more: Any) -> CheckReport:
        """All that was found; ``more`` are fields of the report."""
        found = self.findings
        found.once()
        return CheckReport(
            "fail" if found.problems else "inconclusive" if found.doubts else "pass", provider,
            sum(batch.samples for batch in batches), tuple(dict.fromkeys(batch.size for batch in batches)),
            outputs=tuple(self._results()), problems=(*found.problems, *found.doubts), notes=tuple(found.notes),
            limit=self.limit, site_limit=ELEMENT * self.limit, **more,
        )  # fmt: skip

    def _results(self) -> Iterator[OutputResult]:
        """What the report says of every witness, output by output."""
        for witness in dict.fromkeys(row.witness for row in self.table):
            for output in dict.fromkeys(row.value for row in self.of(witness)):
                rows = self.of(witness, output)
                noise, error = (sorted(getattr(row, key) for row in rows)[len(rows) // 2] for key in ("noise", "error"))
                ratio, worst = (max(getattr(row, key) for row in rows) for key in ("ratio", "worst"))
                counts = tuple(map(sum, zip_longest(*(row.doublings for row in rows), fillvalue=0)))
                samples = sum(row.samples for row in rows)
                yield OutputResult(witness, output, noise, error, ratio, worst, samples, counts)


def _compared_noise(claim: Witness, case: Case, turn: Turn) -> float:
    """What rounding a claim's constants does to what it compares, where the reference decides so."""
    name, run = claim.called(turn.value), case.claimed
    if name is None or run is None or name not in run.decided:
        return 0.0
    runs = [claim.run(case.batch, follow=run.decided, seed=seed) for seed in (None, *range(DRAWS))]
    own, *moved = ([t for t in each.turns if t.value == name] for each in runs)
    return near_noise(own[0], moved)[0] if own else 0.0


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
    reference: Witness, batches: Sequence[Batch], findings: Findings, progress: Progress,
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
                findings.notes.append(f"the original does not run at {batch.words}: {reason}")
        failed = ""
        if not isinstance(own, Exception) and truth is None:
            if screen is not None and screen.clears(batch, own, first=not cases):
                continue
            try:
                truth = reference.run(batch, () if cases else keep)
            except Exception as error:
                failed = first_line(error)
        if (accept is not None and not accept(batch, own, truth)) or isinstance(own, Exception):
            continue
        if truth is None:
            reason = f"the graph does not run in float64 ({failed}), so there is no truth to compare with"
            findings.doubts.append(reason)
            continue
        over = overflow(own, truth.outputs)
        if over is not None and "adversarial" in batch.origin:
            findings.problems.append(f"in its own dtype the model itself overflows at {batch.words}: {over}")
        elif over is not None and (batch.origin or accept is None):
            reason = f"the model itself overflows at {batch.words}: not judged there"
            findings.notes.append(reason)
            continue
        cases.append(Case(batch, truth, own, draws=screen.drawn.get(batch) if screen else None, words=batch.words))
    return cases, reason
