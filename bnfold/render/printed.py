"""What each command prints of its report."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.text import Text

from bnfold.render.health import calibration, diagnosis
from bnfold.render.page import STYLES, Page
from bnfold.render.reports import check_report, export_report, loaded
from bnfold.render.words import number, seconds, size
from bnfold.report import (
    Bisection,
    CalibrationReport,
    CheckReport,
    Diagnosis,
    ExportReport,
    Latency,
    LatencyReport,
    Report,
)

if TYPE_CHECKING:
    from bnfold.runtime.doctor import Finding


def printed(report: Report, page: Page, *, verbose: bool = False, destination: str | None = None) -> None:
    """Prints a report; ``destination`` is where an export was to write, None where nothing was to be written."""
    match report:
        case ExportReport():
            export_report(report, page, destination=destination, verbose=verbose)
        case CheckReport():
            check_report(report, page, verbose=verbose)
        case Bisection():
            _bisection(report, page, verbose=verbose)
        case Diagnosis():
            diagnosis(report, page, verbose=verbose)
        case CalibrationReport():
            calibration(report, page, verbose=verbose)
        case LatencyReport():
            _latency(report, page)


def in_a_line(report: Report) -> str:
    """What is wrong in one line, for those who see nothing else; empty where there is no verdict."""
    if isinstance(report, Bisection):
        return _found(report)
    check = report.check if isinstance(report, ExportReport) else report
    if not isinstance(check, CheckReport):
        return ""
    word = "the gate failed" if check.verdict == "fail" else "no verdict"
    return f"{word}: {'; '.join(check.problems[:3])}" + ("; ..." if len(check.problems) > 3 else "")


def findings(found: Iterable[Finding], page: Page) -> None:
    """What ``doctor`` prints."""
    for finding in found:
        page.line(finding.level, Text(finding.what, STYLES[finding.level] if finding.level == "problem" else ""))
        if finding.hint:
            page.line("", finding.hint)


def _bisection(report: Bisection, page: Page, *, verbose: bool) -> None:
    """Which values were compared, the first one that is off, and what touched it."""
    loaded(report.source, report.notes, page)
    page.line("Against", subject=report.file)
    page.line("Compared", f"{report.compared} of {report.values} values of the file with the model's own")
    outputs = f"outputs: at most {number(report.worst)} times the noise without ONNX Runtime's optimisations"
    page.line("", f"{outputs}, {number(report.optimized)} with them")
    if report.agree and (report.culprit is not None or verbose):
        page.line("Right", f"up to '{report.agree}'")
    if report.culprit is not None:
        first = report.culprit
        name = first.module or f"value '{first.value}'"
        page.line("Wrong", Text(name, STYLES["fail"]), subject="")
        jump = f"error {number(first.ratio)} times the noise (limit {number(report.limit)})"
        page.line("", f"{jump}, {number(first.before)} times in what it is computed from")
        node = f", node '{first.node}'" if first.node else ""
        page.line("", f"{first.operator}{node}, value '{first.value}'")
        for fold in first.folds:
            page.line("", fold)
        if not first.sure:
            page.line("", "the model has no such value: it is the first after those that agree")
    for name in report.optimizers:
        page.line("Wrong", Text(f"ONNX Runtime's optimisation {name}", STYLES["fail"]), "the file is right without it")
    if report.optimizers:
        page.line("", f"disable it: InferenceSession(..., disabled_optimizers={list(report.optimizers)})")
    if report.passed:
        page.line("Verdict", Text("nothing leaves the noise", STYLES["pass"]))


def _found(report: Bisection) -> str:
    if report.culprit is not None:
        place = f"module '{report.culprit.module}'" if report.culprit.module else f"value '{report.culprit.value}'"
        return f"{place} is the first to leave the noise: {number(report.culprit.ratio)} times"
    if report.optimizers:
        return f"ONNX Runtime's optimisation {' with '.join(report.optimizers)} makes the file wrong"
    return f"the outputs are {number(max(report.worst, report.optimized))} times the noise off, no single value is"


def _latency(report: LatencyReport, page: Page) -> None:
    """A line per contestant, and under what conditions."""
    inputs = ", ".join(f"{name}:{written}" for name, written in report.inputs.items())
    threads = "as many threads as each chooses" if report.threads is None else f"threads: {report.threads}"
    page.line("Measured", inputs or "no inputs", threads, f"{report.rounds} rounds after {report.warmup} calls each")
    known = dict(report.machine)
    words = [known.pop("processor", ""), f"{known.pop('cores', '?')} cores", known.pop("system", "")]
    known.pop("date", None)
    page.line("", ", ".join([*words, *(f"{name} {version}" for name, version in known.items())]))
    rows = [_contestant(latency, first=i == 0) for i, latency in enumerate(report.contestants)]
    page.table(("latency", "median", "p95", "ratio (95 % interval)", "speed", "load", "memory", "on"), rows)
    for note in report.notes:
        page.line("", f"note: {note}")


def _contestant(latency: Latency, *, first: bool) -> tuple[str, ...]:
    low, high = latency.interval
    known = f"{latency.ratio:.3f} " if latency.told_apart else "not told apart "
    ratio = f"{known}({low:.3f} to {high:.3f})"
    return (
        latency.name, seconds(latency.median), seconds(latency.p95),
        "1" if first else ratio, f"{latency.speedup:.2f}x" if latency.told_apart and not first else "",
        "" if latency.load is None else seconds(latency.load), "" if latency.memory is None else size(latency.memory),
        latency.provider,
    )  # fmt: skip
