"""Every fold and merge, judged where it happened: the folded value against the value it replaces, both in float64.

An error in one layer can be invisible at the outputs (a dead channel, a branch behind a small LayerScale) and is large
where it arises.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from bnfold.affine import Meaning
from bnfold.evaluate.subject import Run
from bnfold.gate.claims import FileClaim, ProgramClaim
from bnfold.gate.evidence import ELEMENT, MANY, STEPS, Row, Source, compare, specials
from bnfold.gate.findings import first_line
from bnfold.gate.judge import Case, Judge, drawing, listed, settled
from bnfold.gate.models import coarsest_unit
from bnfold.gate.values import batched
from bnfold.report import Ledger, SiteResult

#: About as many elements of a value at a fold site are compared; of what lies between channels no fewer than this.
ELEMENTS, LINES = 16_384, 3


def judge_sites(
    judge: Judge, ledger: Ledger, meant: Mapping[str, Meaning], claim: FileClaim | ProgramClaim,
    folded: ExportedProgram | None,
) -> list[SiteResult]:  # fmt: skip
    """The ratio of error to noise at every site, in the order of the graph; what exceeds the limit is a problem.

    A site that has no value of its own in the file, because a neighbour took it in, is judged in the folded program.
    """
    sites, findings = ledger.sites, judge.findings
    if not sites:
        return []
    modules = {value: entry.module or entry.value for entry in ledger.entries for value, _ in entry.site}
    modules |= {value: merge.into for merge in ledger.merges for value, _ in merge.site}
    modules |= {value: ", ".join(scaled.into) for scaled in ledger.scaled for value, _ in scaled.site}
    mine = {name: own for name in sites if (own := claim.called(name)) is not None}
    results: list[SiteResult] = []
    rest = [name for name in sites if name not in mine]
    if rest and isinstance(claim, FileClaim):
        findings.notes.append(
            f"{len(rest)} of {len(sites)} fold sites have no value of their own in the file (a neighbour took them "
            "in): there the folded program is judged"
        )
    elif rest:
        findings.problems.append(f"{claim.name}: {len(rest)} of {len(sites)} fold sites are not in the program")
    results += _judged(judge, claim, {own: (name, meant[name]) for name, own in mine.items()}, modules)
    if rest and folded is not None and isinstance(claim, FileClaim):
        program = ProgramClaim(folded)
        there = {name: (name, meant[name]) for name in rest if program.called(name)}
        results += _judged(judge, program, there, modules)
    for case in judge.cases[:1]:  # they are large
        case.truth = replace(case.truth, kept={})
        case.claimed = replace(case.claimed, kept={}) if case.claimed is not None else None
    order = {name: i for i, name in enumerate(sites)}
    return sorted(results, key=lambda site: order[site.value])


def _judged(
    judge: Judge, claim: FileClaim | ProgramClaim, pairs: Mapping[str, tuple[str, Meaning]], modules: Mapping[str, str]
) -> list[SiteResult]:
    results: list[SiteResult] = []
    wrong, first = list[str](), ""
    if not pairs:
        return results
    case = _case(judge)
    try:
        rows = compared(judge, claim, case, {own: meaning for own, (_, meaning) in pairs.items()}, _part)
    except Exception as error:
        judge.findings.problems.append(f"{claim.name}: fails when asked for the fold sites: {first_line(error)}")
        return results
    for own, row in rows.items():
        name = pairs[own][0]
        judge.table.rows.append(row)
        results.append(SiteResult(claim.name, name, modules[name], row.ratio, row.worst))
        if not row.misfit(judge.limit) <= 1:
            whole = not row.ratio <= judge.limit
            found, limit = (row.ratio, judge.limit) if whole else (row.worst, ELEMENT * judge.limit)
            off = f"error is {found:.3g} times the noise{'' if whole else ' at one element'} (limit {limit:g})"
            wrong.append(off if not wrong else f"'{modules[name]}'")
            first = first or modules[name]
    if wrong:  # what comes after the first is mostly its error passed on
        more = f"; off as well: {listed(wrong[1:])}" if wrong[1:] else ""
        judge.findings.problems.append(f"{claim.name}, fold of '{first}': {wrong[0]}{more}")
    return results


def _case(judge: Judge) -> Case:
    """The largest case of the first sizes, or the smallest of all."""
    cases = [c for c in judge.cases if c.batch.sizes == judge.cases[0].batch.sizes and not c.batch.origin]
    few = [c for c in cases if c.batch.samples <= 8]
    return max(few or cases or judge.cases[:1], key=lambda c: c.batch.samples)


def _part(value: Tensor) -> Tensor:
    """Of a large value some of what lies between its first two axes and its last one, where its channels may be.

    What is wrong in a constant is wrong all over its channel.
    """
    between, beside = math.prod(value.shape[2:-1]), value.numel() // max(math.prod(value.shape[2:-1]), 1)
    few = max(ELEMENTS // max(beside, 1), LINES)
    if value.ndim < 4 or between <= few:
        return value
    return value.flatten(2, -2)[:, :, torch.linspace(0, between - 1, few).round().long()]


def compared(
    judge: Judge, claim: Any, case: Case, partners: Mapping[str, Meaning],
    part: Callable[[Tensor], Tensor] = lambda value: value,
) -> dict[str, Row]:  # fmt: skip
    """Values of a claim by its own names against what they stand for in the reference, drawn until sure.

    A row is infinitely far off where shapes differ, or NaNs and infinities do. Elsewhere ``part`` of each is compared.

    Raises:
        Exception: one of them does not run.
    """
    claimed, truth = _runs(judge, claim, case, partners)
    rows, given, right = dict[str, Row](), dict[str, Tensor](), dict[str, Tensor]()

    def put(name: str, ratio: float, worst: float, *more: Any) -> None:
        element, error, noise, doublings = more or ((), 0.0, 0.0, ())
        count = right[name].numel() if name in right else 0
        rows[name] = Row(case.words, claim.name, name, ratio, worst, element, error, noise, doublings, count,
                         case.batch.samples, inside=True)  # fmt: skip

    for name, meaning in partners.items():
        if name not in claimed.kept or not isinstance(truth.kept.get(meaning.value), Tensor):
            continue
        one, true = claimed.kept[name], meaning.of(truth.kept[meaning.value])
        like = one.shape == true.shape and specials(one, true) is None
        if like and true.is_floating_point():
            given[name], right[name] = part(one), part(true)
        else:
            put(name, *(0.0 if like and bool((one == true).all()) else math.inf,) * 2)
    of = {name: partners[name] for name in right}
    sources = _sources(judge, claim, case, of, part, (given, right), (claimed.decided, truth.decided))
    del claimed, truth
    unit = coarsest_unit(judge.reference)
    draws, limit, unsure = drawing(judge.reference, sources), judge.limit, set(right)
    # One constant may move all of a channel, and there are many channels: of one source a draw or two say too little.
    for step in range(MANY if len(sources) == 1 else 0, len(STEPS) if right else 0):
        draws.more(step)
        for i, (name, true) in enumerate(right.items()):
            if name in unsure:
                put(name, *compare(given[name], true, draws.noise(i), unit=unit, draws=draws.count, enough=limit,
                                   batched=batched(case.batch, true)))  # fmt: skip
        unsure = {name for name in unsure if not settled([rows[name]], limit, step, draws)}
        if not unsure:
            break
    return {name: rows[name] for name in partners if name in rows}


def _runs(judge: Judge, claim: Any, case: Case, partners: Mapping[str, Meaning]) -> tuple[Run, Run]:
    """A run of the claim and one of the reference after its decisions, with the values of both kept."""
    wanted, known = {meaning.value for meaning in partners.values()}, case.claimed
    if (
        known is not None and judge.claimer is claim and not known.decided
        and known.kept.keys() >= partners.keys() and case.truth.kept.keys() >= wanted
    ):  # fmt: skip
        return known, case.truth  # in which all was kept
    claimed, taken = judge.taken(claim, case, list(partners))
    decided = {**case.truth.decided, **taken}
    truth = judge.reference.run(case.batch, wanted, follow=decided)
    return claimed, replace(truth, decided=decided)


def _sources(
    judge: Judge, claim: Any, case: Case, of: Mapping[str, Meaning], part: Callable[[Tensor], Tensor],
    still: tuple[Mapping[str, Tensor], Mapping[str, Tensor]], decided: tuple[Mapping[str, Any], Mapping[str, Any]],
) -> list[Source]:  # fmt: skip
    """What rounds values: the reference's constants, and the claim's where the reference has no louder run."""
    reference, batch, wanted = judge.reference, case.batch, {meaning.value for meaning in of.values()}

    def meant(run: Run) -> Sequence[Tensor]:
        return [part(meaning.of(run.kept[meaning.value])) for meaning in of.values()]

    if reference.louder > 1 and not decided[1]:
        quiet = meant(reference.loudly(batch, None, wanted))
        return [Source(quiet, lambda seed: meant(reference.loudly(batch, seed, wanted)), reference.louder)]

    def claimed(seed: int) -> Sequence[Tensor]:
        kept = claim.run(batch, list(of), follow=decided[0] or None, seed=seed).kept
        return [part(kept[name]) for name in of]

    given, right = (list(values.values()) for values in still)
    theirs = Source(right, lambda seed: meant(reference.run(batch, wanted, follow=decided[1], seed=seed)))
    return [theirs, Source(given, claimed)]
