"""A fleet for people: a line per model, the summary, the page of all models, and the cases for CI servers."""

from __future__ import annotations

import platform
from collections.abc import Iterator

from rich.text import Text

from bnfold._version import __version__
from bnfold.render import words
from bnfold.render.page import STYLES, Page
from bnfold.render.sections import SIGNS
from bnfold.render.tables import Link, Section, Table, section
from bnfold.report import FleetReport, ModelRow
from bnfold.report.plain import versions

_SIGNS = SIGNS | {"error": "✗"}


def fleet_line(row: ModelRow, done: int, total: int) -> str:
    """A model that has ended."""
    spent = "from an earlier run" if row.earlier else f"{row.seconds:.1f} s"
    return f"{done:>{len(str(total))}}/{total}  {_SIGNS[row.outcome]} {row.outcome:<12} {row.name}   {spent}"


def fleet_report(report: FleetReport, page: Page, *, where: str) -> None:
    """The summary, and why each model that did not pass did not."""
    earlier = sum(row.earlier for row in report.rows)
    took = f"{earlier} from an earlier run" if earlier else ""
    page.line("Models", f"{len(report.rows)} in {report.seconds:.1f} s", _counted(report), took)
    for row in report.rows:
        if row.outcome != "pass":
            style = STYLES.get(row.outcome, STYLES["problem"])
            page.line(
                "", Text.assemble((row.outcome.upper(), style), f"   {row.name}: {row.said or 'nothing judged it'}")
            )
    changed = [row for row in report.rows if row.changed and row.changed != ("new",)]
    for row in changed:
        page.line("Changed" if row is changed[0] else "", f"{row.name}: {', '.join(row.changed)}")
    page.line("Wrote", where)


def fleet_sections(report: FleetReport) -> Iterator[Section]:
    """What did not pass, every model, and what it rests on."""
    bad = [f"{row.name} ({row.outcome}, exit code {row.exit_code}): {row.said}" for row in report.rows if row.exit_code]
    if bad:
        yield section("problems", "What did not pass", ("alert", bad))
    heads = ("model", "outcome", "folded", "ratio", "size", "latency", "seconds", "changed", "source")
    rows = [
        (Link(row.name, f"{row.report}.html") if row.report else row.name, f"{_SIGNS[row.outcome]} {row.outcome}",
         f"{row.folded} of {row.batch_norms}" if row.report else "–",
         "–" if row.ratio is None else words.number(row.ratio), "–" if row.bytes is None else words.size(row.bytes),
         "–" if row.latency is None else f"{row.latency * 1e3:.3g} ms",
         "earlier" if row.earlier else f"{row.seconds:.1f}", ", ".join(row.changed) or "the same", row.source)
        for row in report.rows
    ]  # fmt: skip
    yield section("models", "Models", ("table", Table("Every model", heads, rows, code=(0, 8))))
    facts = [("bnfold", __version__), *versions().items(), ("platform", platform.platform())]
    yield section("origin", "Where it comes from", ("facts", [("list of models", report.source), *facts]))


def fleet_summary(report: FleetReport) -> list[str]:
    """The page's first lines."""
    earlier = sum(row.earlier for row in report.rows)
    return [f"{_counted(report)}.", f"{words.plural(len(report.rows), 'model')}, {earlier} from an earlier run."]


def fleet_cases(report: FleetReport) -> Iterator[tuple[str, str, str, str, float]]:
    """A case per model: its name, its verdict as JUnit knows it, why, the same at length, and the seconds."""
    for row in report.rows:
        verdict = "skipped" if row.outcome == "not judged" else row.outcome
        why = row.said or "nothing was judged"
        yield row.name, verdict, why, why, row.seconds


def _counted(report: FleetReport) -> str:
    order = [outcome for outcome in _SIGNS if outcome in report.counts]
    return ", ".join(f"{report.counts[outcome]} {outcome}" for outcome in order)
