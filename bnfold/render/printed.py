"""What each command prints of its report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.text import Text

from bnfold.render.page import STYLES, Page
from bnfold.render.reports import check_report, export_report, fold_plan, loaded
from bnfold.render.words import SIGNS, count, known, number, plural, seconds, size
from bnfold.report import (
    FINDINGS,
    Bisection,
    CalibrationReport,
    CheckReport,
    Diagnosis,
    ExportReport,
    Finding,
    FleetReport,
    LatencyReport,
    ModelRow,
    NormHealth,
    Report,
    Spread,
)

if TYPE_CHECKING:
    from bnfold.runtime import doctor

#: Rows of a table, and modules of one kind of finding, that are shown without --verbose.
_SHOWN, _MODULES = 20, 5
_STYLE = {"error": STYLES["problem"], "warning": STYLES["note"], "note": "dim"}
#: The columns that a line can stand for, and its words.
_WORDS = {
    "kind": "{}", "channels": "{} channels", "eps": "eps {}", "momentum": "momentum {}", "affine": "affine: {}",
    "mode": "mode: {}", "statistics": "statistics {}", "calls": "calls: {}",
}  # fmt: skip


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
        if (first := report.culprit) is not None:
            place = f"module '{first.module}'" if first.module else f"value '{first.value}'"
            return f"{place} is the first to leave the noise: {number(first.ratio)} times"
        if report.optimizers:
            return f"ONNX Runtime's optimisation {' with '.join(report.optimizers)} makes the file wrong"
        worst = number(max(report.worst, report.optimized))
        return f"the outputs are {worst} times the noise off, no single value is"
    check = report.check if isinstance(report, ExportReport) else report
    if not isinstance(check, CheckReport):
        return ""
    word = "the gate failed" if check.verdict == "fail" else "no verdict"
    return f"{word}: {'; '.join(check.problems[:3])}" + ("; ..." if len(check.problems) > 3 else "")


def findings(found: Iterable[doctor.Finding], page: Page) -> None:
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


def _latency(report: LatencyReport, page: Page) -> None:
    """A line per contestant, and under what conditions."""
    inputs = ", ".join(f"{name}:{written}" for name, written in report.inputs.items())
    threads = "as many threads as each chooses" if report.threads is None else f"threads: {report.threads}"
    page.line("Measured", inputs or "no inputs", threads, f"{report.rounds} rounds after {report.warmup} calls each")
    facts = dict(report.machine)
    words = [facts.pop("processor", ""), f"{facts.pop('cores', '?')} cores", facts.pop("system", "")]
    facts.pop("date", None)
    page.line("", ", ".join([*words, *(f"{name} {version}" for name, version in facts.items())]))
    rows = []
    for each in report.contestants:
        first, (low, high) = each is report.contestants[0], each.interval
        ratio = f"{each.ratio:.3f}" if each.told_apart else "not told apart"
        rows.append((
            each.name, seconds(each.median), seconds(each.p95), "1" if first else f"{ratio} ({low:.3f} to {high:.3f})",
            f"{each.speedup:.2f}x" if each.told_apart and not first else "",
            known(each.load, seconds, ""), known(each.memory, size, ""), each.provider,
        ))  # fmt: skip
    page.table(("latency", "median", "p95", "ratio (95 % interval)", "speed", "load", "memory", "on"), rows)
    page.notes(report.notes)


def fleet_line(row: ModelRow, done: int, total: int) -> str:
    """A model that has ended."""
    spent = "from an earlier run" if row.earlier else f"{row.seconds:.1f} s"
    return f"{done:>{len(str(total))}}/{total}  {SIGNS[row.outcome]} {row.outcome:<12} {row.name}   {spent}"


def fleet_report(report: FleetReport, page: Page, *, where: str) -> None:
    """The summary, and why each model that did not pass did not."""
    earlier = sum(row.earlier for row in report.rows)
    took = f"{earlier} from an earlier run" if earlier else ""
    page.line("Models", f"{len(report.rows)} in {report.seconds:.1f} s", outcomes(report), took)
    for row in report.rows:
        if row.outcome != "pass":
            outcome = (row.outcome.upper(), STYLES.get(row.outcome, STYLES["problem"]))
            page.line("", Text.assemble(outcome, f"   {row.name}: {row.said or 'nothing judged it'}"))
    changed = [row for row in report.rows if row.changed and row.changed != ("new",)]
    for row in changed:
        page.line("Changed" if row is changed[0] else "", f"{row.name}: {', '.join(row.changed)}")
    page.line("Wrote", where)


def outcomes(report: FleetReport) -> str:
    """How many models there are of each outcome."""
    order = [outcome for outcome in SIGNS if outcome in report.counts]
    return ", ".join(f"{report.counts[outcome]} {outcome}" for outcome in order)


# -- health and statistics ---------------------------------------------------------------------------------------------


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
    page.more(done - len(shown))
    if report.unreached:
        page.notes([f"the data does not reach {', '.join(report.unreached)}, left as before"])
    if report.circular:
        exact = "for which no statistics are exact: its calls were measured in turn"
        page.notes([f"{', '.join(report.circular)} feeds itself, {exact}"])
    if report.path is not None:
        page.line("Wrote", f"{size(report.bytes)}, for --weights", subject=report.path)


def _norms(report: Diagnosis, page: Page, *, verbose: bool) -> None:
    sick = {name for finding in report.findings if finding.severity != "note" for name in finding.modules}
    rows = list(report.norms)
    if not verbose and len(rows) > _SHOWN:
        rows = sorted(rows, key=lambda norm: norm.module not in sick)[:_SHOWN]
    every = [cells(norm) for norm in report.norms]
    # What is the same for all is said once.
    same = {t: every[0][t] for t in _WORDS if len(rows) > 1 and len({each[t] for each in every}) == 1}
    if same:
        page.line("", "all: " + ", ".join(_WORDS[title].format(cell) for title, cell in same.items()))
    shown = [title for title in every[0] if title not in same and (report.samples or title != "off data")]
    page.table(shown, [[cells(norm)[title] for title in shown] for norm in rows])
    page.more(len(report.norms) - len(rows))


def cells(norm: NormHealth) -> dict[str, str]:
    """What is said of a BatchNorm, by the titles of the columns."""
    seen = "running" if norm.batches_tracked is None else f"of {norm.batches_tracked} batches"
    return {
        "module": (f"in {norm.module}" if norm.functional else norm.module) or norm.layer,
        "kind": norm.layer,
        "channels": known(norm.channels, "{:g}".format, "?"),
        "eps": known(norm.eps, "{:g}".format, "in its code"),
        "momentum": known(norm.momentum, "{:g}".format, "none"),
        "affine": "yes" if norm.affine else "no",
        "mode": {True: "train", False: "eval", None: "none"}[norm.training],
        "statistics": seen if norm.track_running_stats else "of the batch",
        "calls": known(norm.calls, "{:g}".format, "?"),
        "scale": known(norm.scale, _range, ""),
        "shift": known(norm.shift, _range, ""),
        "off data": known(norm.distance, lambda distance: number(distance.maximum), ""),
    }


def _range(spread: Spread) -> str:
    return f"{number(spread.minimum)} to {number(spread.maximum)}"


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
