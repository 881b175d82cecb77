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
from bnfold.gate.evidence import ELEMENT, MANY, STEPS, Row, Source, compare, settled, specials
from bnfold.gate.findings import first_line
from bnfold.gate.judge import CHAOTIC, Case, Judge, listed
from bnfold.gate.witnesses import Program64, Witness
from bnfold.report import Ledger, SiteResult

#: About as many elements of a value at a fold site are compared; of what lies between channels no fewer than this.
ELEMENTS, LINES = 16_384, 3
#: The part of a value that is compared.
Part = Callable[[Tensor], Tensor]


def judge_sites(
    judge: Judge, ledger: Ledger, meant: Mapping[str, Meaning], claim: Witness, folded: ExportedProgram | None
) -> list[SiteResult]:
    """The ratio of error to noise at every site, in the order of the graph; what exceeds the limit is a problem.

    A site that has no value of its own in the file, because a neighbour took it in, is judged in the folded program.
    """
    sites, findings = list(ledger.sites), judge.findings
    modules = {value: entry.module or entry.value for entry in ledger.entries for value, _ in entry.site}
    modules |= {value: merge.into for merge in ledger.merges for value, _ in merge.site}
    modules |= {value: ", ".join(scaled.into) for scaled in ledger.scaled for value, _ in scaled.site}
    rest, program = [name for name in sites if claim.called(name) is None], isinstance(claim, Program64)
    if rest and program:
        findings.problems.append(f"{claim.name}: {len(rest)} of {len(sites)} fold sites are not in the program")
    elif rest:
        findings.notes.append(
            f"{len(rest)} of {len(sites)} fold sites have no value of their own in the file (a neighbour took them "
            "in): there the folded program is judged"
        )
    results = _judged(judge, claim, sites, meant, modules)
    if rest and not program and folded is not None:
        results += _judged(judge, Program64(folded), rest, meant, modules)
    for case in judge.cases[:1] if sites else ():  # they are large
        case.truth = replace(case.truth, kept={})
        case.claimed = replace(case.claimed, kept={}) if case.claimed is not None else None
    return sorted(results, key=lambda site: sites.index(site.value))


def _judged(
    judge: Judge, claim: Witness, sites: Sequence[str], meant: Mapping[str, Meaning], modules: Mapping[str, str]
) -> list[SiteResult]:
    results, wrong, first, chaotic = list[SiteResult](), list[str](), "", list[str]()
    names = {own: name for name in sites if (own := claim.called(name)) is not None}
    if not names:
        return []
    try:
        rows = compared(judge, claim, _case(judge), {own: meant[name] for own, name in names.items()}, _part)
    except Exception as error:
        judge.findings.problems.append(f"{claim.name}: fails when asked for the fold sites: {first_line(error)}")
        return []
    judge.table += rows.values()
    for own, row in rows.items():
        module = modules[names[own]]
        results.append(SiteResult(claim.name, names[own], module, row.ratio, row.worst))
        if not row.misfit(judge.limit) <= 1 and row.chaotic:
            chaotic.append(f"'{module}'")
        elif not row.misfit(judge.limit) <= 1:
            whole = not row.ratio <= judge.limit
            found, limit = (row.ratio, judge.limit) if whole else (row.worst, ELEMENT * judge.limit)
            off = f"error is {found:.3g} times the noise{'' if whole else ' at one element'} (limit {limit:g})"
            wrong.append(off if not wrong else f"'{module}'")
            first = first or module
    if wrong:  # what comes after the first is mostly its error passed on
        more = f"; off as well: {listed(wrong[1:])}" if wrong[1:] else ""
        judge.findings.problems.append(f"{claim.name}, fold of '{first}': {wrong[0]}{more}")
    if chaotic:
        where = f"{claim.name}, fold of {listed(chaotic)}"
        judge.findings.doubts.append(f"{where}: error is above the limit, but {CHAOTIC}")
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
    judge: Judge, claim: Witness, case: Case, partners: Mapping[str, Meaning], part: Part = lambda value: value
) -> dict[str, Row]:
    """Values of a claim by its own names against what they stand for in the reference, drawn until sure.

    A row is infinitely far off where shapes differ, or NaNs and infinities do. Elsewhere ``part`` of each is compared.

    Raises:
        Exception: one of them does not run.
    """
    claimed, truth = _runs(judge, claim, case, partners)
    rows, given, right = dict[str, Row](), dict[str, Tensor](), dict[str, Tensor]()

    def put(name: str, *numbers: Any, elements: int = 0, chaotic: bool = False) -> None:
        rows[name] = Row(case.words, claim.name, name, *numbers, elements=elements, samples=case.batch.samples,
                         inside=True, chaotic=chaotic)  # fmt: skip

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
    draws, limit, unsure = judge.reference.draws(sources), judge.limit, set(right)
    # One constant may move all of a channel, and there are many channels: of one source a draw or two say too little.
    for step in range(MANY if len(sources) == 1 else 0, len(STEPS) if right else 0):
        draws.more(step)
        for i, (name, true) in enumerate(right.items()):
            if name in unsure:
                put(name, *compare(given[name], true, draws.noise(i), unit=judge.reference.coarsest, enough=limit,
                                   draws=draws.count, batched=case.batch.leads(true)),
                    elements=true.numel(), chaotic=i in draws.chaotic)  # fmt: skip
        unsure = {name for name in unsure if not settled([rows[name]], limit, step, draws)}
        if not unsure:
            break
    return {name: rows[name] for name in partners if name in rows}


def _runs(judge: Judge, claim: Witness, case: Case, partners: Mapping[str, Meaning]) -> tuple[Run, Run]:
    """A run of the claim and one of the reference after its decisions, with the values of both kept."""
    wanted, known = {meaning.value for meaning in partners.values()}, case.claimed
    if (
        known is not None and judge.claimer is claim and not known.decided
        and known.kept.keys() >= partners.keys() and case.truth.kept.keys() >= wanted
    ):  # fmt: skip
        return known, case.truth  # in which all was kept
    claimed, taken = judge.taken(claim, case, list(partners))
    decided = {**case.truth.decided, **taken}
    return claimed, replace(judge.reference.run(case.batch, wanted, follow=decided), decided=decided)


def _sources(
    judge: Judge, claim: Witness, case: Case, of: Mapping[str, Meaning], part: Part,
    still: tuple[Mapping[str, Tensor], Mapping[str, Tensor]], decided: tuple[Mapping[str, Any], Mapping[str, Any]],
) -> list[Source]:  # fmt: skip
    """What rounds values: the reference's constants, and the claim's where the reference has no louder run."""
    reference, batch, wanted = judge.reference, case.batch, {meaning.value for meaning in of.values()}

    def meant(run: Run) -> Sequence[Tensor]:
        return [part(meaning.of(run.kept[meaning.value])) for meaning in of.values()]

    given, right = (list(values.values()) for values in still)
    theirs = Source(right, lambda seed: meant(reference.run(batch, wanted, follow=decided[1], seed=seed)))
    if reference.louder > 1 and not decided[1]:
        own = meant(reference.loudly(batch, None, wanted))
        return [Source(own, lambda seed: meant(reference.loudly(batch, seed, wanted)), reference.louder, theirs)]

    def claimed(seed: int) -> Sequence[Tensor]:
        kept = claim.run(batch, list(of), follow=decided[0] or None, seed=seed).kept
        return [part(kept[name]) for name in of]

    return [theirs, Source(given, claimed)]
