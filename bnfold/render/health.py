"""What ``inspect`` and ``calibrate`` print."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from rich.text import Text

from bnfold.render.page import STYLES, Page
from bnfold.render.reports import fold_plan, loaded
from bnfold.render.words import count, number, plural, size
from bnfold.report import FINDINGS, CalibrationReport, Diagnosis, Finding, NormHealth, Spread

#: Rows of a table, and modules of one kind of finding, that are shown without --verbose.
_SHOWN, _MODULES = 20, 5
_STYLE = {"error": STYLES["problem"], "warning": STYLES["note"], "note": "dim"}


def diagnosis(report: Diagnosis, page: Page, *, verbose: bool) -> None:
    """The BatchNorms, what is wrong with them, and the fold plan."""
    loaded(report.source, (*report.notes, *(report.plan.notes if report.plan else ())), page)
    if report.norms:
        compared = f", {count(report.samples)} samples" if report.samples else ""
        healthy, subject = Text("nothing to report", STYLES["ok"]), f"{len(report.norms)} BatchNorm{compared}"
        page.line("Health", severities(report) or healthy, subject=subject)
        _norms(report, page, verbose=verbose)
    for code in dict.fromkeys(finding.code for finding in report.findings):
        _finding(code, report.of(code), page, verbose=verbose)
    if report.plan is not None:
        fold_plan(report.plan, page, verbose=verbose)


def severities(report: Diagnosis) -> str:
    """How many findings there are of each severity; empty where there are none."""
    counts = Counter(finding.severity for finding in report.findings)
    return ", ".join(plural(counts[each], each) for each in ("error", "warning", "note") if counts[each])


def calibration(report: CalibrationReport, page: Page, *, verbose: bool) -> None:
    """Which BatchNorms have new statistics, from how many values, and how far the old ones were."""
    loaded(report.source, (), page)
    done, of = len(report.layers), len(report.layers) + len(report.unreached)
    page.line(
        "Measured", f"{count(report.samples)} samples", "1 pass" if report.passes == 1 else f"{report.passes} passes",
        f"scheme {report.scheme}", subject=f"{done} of {of} BatchNorm",
    )  # fmt: skip
    shown = report.layers if verbose else report.layers[:_SHOWN]
    rows = [
        (
            layer.module, str(layer.channels), count(layer.values), str(layer.turn),
            f"{number(layer.moved or 0)} deviations" if layer.had_statistics else "had no statistics",
            f"{number(layer.stretched or 1)} times" if layer.had_statistics else "",
        )
        for layer in shown
    ]  # fmt: skip
    page.table(("module", "channels", "values each", "pass", "mean moved by", "variance changed"), rows)
    if len(shown) < done:
        page.line("", f"{done - len(shown)} more: --verbose lists them")
    for names, words in (
        (report.unreached, "the data does not reach {}, left as before"),
        (report.circular, "{} feeds itself, for which no statistics are exact: its calls were measured in turn"),
    ):
        if names:
            page.line("", f"note: {words.format(', '.join(names))}")
    if report.path is not None:
        page.line("Wrote", f"{size(report.bytes)}, for --weights", subject=report.path)


def _norms(report: Diagnosis, page: Page, *, verbose: bool) -> None:
    sick = {name for finding in report.findings if finding.severity != "note" for name in finding.modules}
    rows = list(report.norms)
    if not verbose and len(rows) > _SHOWN:
        rows = sorted(rows, key=lambda norm: norm.module not in sick)[:_SHOWN]
    columns = {title: [cell(norm) for norm in report.norms] for title, cell in COLUMNS.items()}
    # What is the same for all is said once.
    same = [title for title, cells in columns.items() if len(rows) > 1 and title in _WORDS and len(set(cells)) == 1]
    if same:
        page.line("", "all: " + ", ".join(_WORDS[title].format(columns[title][0]) for title in same))
    shown = {title: cell for title, cell in COLUMNS.items() if title not in same}
    if not report.samples:
        shown.pop("off data")
    page.table(list(shown), [[cell(norm) for cell in shown.values()] for norm in rows])
    if len(rows) < len(report.norms):
        page.line("", f"{len(report.norms) - len(rows)} more: --verbose lists them")


def _name(norm: NormHealth) -> str:
    return (f"in {norm.module}" if norm.functional else norm.module) or norm.layer


def _known(value: float | None, unknown: str) -> str:
    return unknown if value is None else f"{value:g}"


def _statistics(norm: NormHealth) -> str:
    if not norm.track_running_stats:
        return "of the batch"
    return "running" if norm.batches_tracked is None else f"of {norm.batches_tracked} batches"


#: Title -> what stands in the column.
COLUMNS: dict[str, Callable[[NormHealth], str]] = {
    "module": _name,
    "kind": lambda norm: norm.layer,
    "channels": lambda norm: _known(norm.channels, "?"),
    "eps": lambda norm: _known(norm.eps, "in its code"),
    "momentum": lambda norm: _known(norm.momentum, "none"),
    "affine": lambda norm: "yes" if norm.affine else "no",
    "mode": lambda norm: {True: "train", False: "eval", None: "none"}[norm.training],
    "statistics": _statistics,
    "calls": lambda norm: _known(norm.calls, "?"),
    "scale": lambda norm: _range(norm.scale),
    "shift": lambda norm: _range(norm.shift),
    "off data": lambda norm: "" if norm.distance is None else number(norm.distance.maximum),
}
#: The columns that a line can stand for, and its words.
_WORDS = {
    "kind": "{}", "channels": "{} channels", "eps": "eps {}", "momentum": "momentum {}", "affine": "affine: {}",
    "mode": "mode: {}", "statistics": "statistics {}", "calls": "calls: {}",
}  # fmt: skip


def _range(spread: Spread | None) -> str:
    return "" if spread is None else f"{number(spread.minimum)} to {number(spread.maximum)}"


def _finding(code: str, findings: tuple[Finding, ...], page: Page, *, verbose: bool) -> None:
    severity, why, way_out = FINDINGS[code]
    page.line(severity.capitalize(), Text.assemble((code, "bold " + _STYLE[severity]), f": {why}"))
    shown = findings if verbose else findings[:_MODULES]
    for finding in shown:
        about = finding.modules[0] if len(finding.modules) == 1 else ""
        if text := ": ".join(filter(None, (about, finding.detail))):
            page.line("", f"  {text}")
    if len(shown) < len(findings):
        names = ", ".join(finding.modules[0] for finding in findings[len(shown) :][:_SHOWN])
        more = len(findings) - len(shown)
        page.line("", f"  {more} more: {names}" + (", ..." if more > _SHOWN else ""))
    page.line("", f"  what you can do: {way_out}")
