"""Every fold and merge, judged where it happened: the folded value against the value it replaces, both in float64.

An error in one layer can be invisible at the outputs (a dead channel, a branch behind a small LayerScale) and is large
where it arises.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.export import ExportedProgram

from bnfold.affine import Meaning
from bnfold.gate.claims import FileClaim, ProgramClaim
from bnfold.gate.evidence import ELEMENT, STEPS, Draws, Row, compare, specials
from bnfold.gate.judge import Case, Judge, listed, settled
from bnfold.gate.models import batched, first_line
from bnfold.report import Ledger, SiteResult

#: Values at fold sites are compared for as many samples as fit into this many elements.
ELEMENTS = 16_000_000


def judge_sites(
    judge: Judge, ledger: Ledger, meanings: Mapping[str, Meaning | None], claim: FileClaim | ProgramClaim,
    folded: ExportedProgram | None,
) -> list[SiteResult]:  # fmt: skip
    """The ratio of error to noise at every site, in the order of the graph; what exceeds the limit is a problem.

    A site that has no value of its own in the file, because a neighbour took it in, is judged in the folded program.
    """
    sites, findings = ledger.sites, judge.findings
    if not sites:
        return []
    modules = {value: entry.module or entry.value for entry in ledger.entries for value, _ in entry.site}
    meant = {name: meanings.get(name) or Meaning(captured) for name, captured in sites.items()}
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
    order = {name: i for i, name in enumerate(sites)}
    return sorted(results, key=lambda site: order[site.value])


def _judged(
    judge: Judge, claim: FileClaim | ProgramClaim, pairs: Mapping[str, tuple[str, Meaning]], modules: Mapping[str, str]
) -> list[SiteResult]:
    results: list[SiteResult] = []
    wrong, first = list[str](), ""
    if not pairs:
        return results
    case = _case(judge, len(pairs))
    try:
        rows = compared(judge, claim, case, {own: meaning for own, (_, meaning) in pairs.items()})
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


def _case(judge: Judge, count: int) -> Case:
    """The largest case of the first sizes, or the smallest of all."""
    cases = [c for c in judge.cases if c.batch.sizes == judge.cases[0].batch.sizes and not c.batch.origin]
    few = [c for c in cases if c.batch.samples <= 8]
    return max(few or cases or judge.cases[:1], key=lambda c: c.batch.samples)


def compared(judge: Judge, claim: Any, case: Case, partners: Mapping[str, Meaning]) -> dict[str, Row]:
    """Values of a claim by its own names against what they stand for in the reference, drawn until sure.

    A row is infinitely far off where shapes differ, or NaNs and infinities do.

    Raises:
        Exception: one of them does not run.
    """
    wanted = {meaning.value for meaning in partners.values()}
    kept, taken = judge.taken(claim, case, list(partners))
    decided = {**case.truth.decided, **taken}
    truth = judge.reference.run(case.batch, wanted, follow=decided).kept
    names = [n for n in partners if n in kept.kept and isinstance(truth.get(partners[n].value), Tensor)]
    given, right = [kept.kept[n] for n in names], [partners[n].of(truth[partners[n].value]) for n in names]

    def own(seed: int) -> Sequence[Tensor]:
        found = judge.reference.run(case.batch, wanted, follow=decided, seed=seed).kept
        return [partners[n].of(found[partners[n].value]) for n in names]

    def mine(seed: int) -> Sequence[Tensor]:
        found = claim.run(case.batch, names, follow=kept.decided or None, seed=seed).kept
        return [found[n] for n in names]

    draws = Draws([(right, own), (given, mine)])
    rows: dict[str, Row] = {}
    unit = max(judge.reference.units.values(), default=2.0**-24)
    for step in range(len(STEPS)):
        draws.more(step)
        for i, name in enumerate(names):
            if given[i].shape != right[i].shape or specials(given[i], right[i]) is not None:
                rows[name] = Row(case.words, claim.name, name, math.inf, math.inf, inside=True)
            elif right[i].is_floating_point():
                found = compare(given[i], right[i], draws.noise(i), unit=unit, batched=batched(case.batch, right[i]))
                rows[name] = Row(
                    case.words, claim.name, name, *found, right[i].numel(), case.batch.samples, inside=True
                )
            else:
                wrong = bool((given[i] != right[i]).any())
                rows[name] = Row(case.words, claim.name, name, *((math.inf,) * 2 if wrong else (0.0, 0.0)), inside=True)
        if settled(rows.values(), judge.limit, step):
            break
    return rows
