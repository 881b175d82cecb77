"""A report as one HTML page that needs nothing else: no scripts, no requests, readable on a phone, dark or light."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass

from bnfold.render import words
from bnfold.render.plots import latency_plot, require_matplotlib
from bnfold.render.printed import cells, outcomes, severities
from bnfold.render.sections import (
    Link,
    Section,
    Table,
    fold_sections,
    graph_sections,
    interface_section,
    judged_sections,
    norm_section,
    origin_section,
    problem_section,
    ran_on,
    range_sections,
    section,
    site_sections,
    table,
)
from bnfold.report import (
    FINDINGS,
    CalibrationReport,
    CheckReport,
    Diagnosis,
    ExportReport,
    FleetReport,
    LatencyReport,
    Report,
)


@dataclass(frozen=True)
class Content:
    """What a page holds: ``verdict`` is a word for the badge, ``tone`` the verdict whose colour and sign it has."""

    title: str
    heading: str
    verdict: str
    tone: str
    summary: Sequence[str]
    sections: Sequence[Section]


def page(report: Report) -> str:
    """The report as an HTML document; ProviderError where matplotlib is not installed."""
    require_matplotlib()
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("bnfold.render"), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    match report:
        case ExportReport() | CheckReport():
            content = _judged(report)
        case Diagnosis():
            content = _diagnosis(report)
        case FleetReport():
            content = _fleet(report)
        case CalibrationReport():
            content = _calibration(report)
        case LatencyReport():
            content = _latency(report)
        case _:
            raise TypeError(f"there is no page of a {type(report).__name__}")
    return environment.get_template("report.html.j2").render(content=content, signs=words.SIGNS) + "\n"


def _judged(report: ExportReport | CheckReport) -> Content:
    check = report.check if isinstance(report, ExportReport) else report
    sections = [] if check is None else [*problem_section(report, check), *judged_sections(check)]
    sections += interface_section(report.interface)
    if isinstance(report, ExportReport):
        sections += [*fold_sections(report), *graph_sections(report)]
    sections += site_sections(check)
    if isinstance(report, ExportReport):
        sections += range_sections(report)
    verdict = "not judged" if check is None else check.verdict
    return _content(report, report.kind.capitalize(), verdict, verdict, _summary(report, check), sections)


def _content(
    report: ExportReport | CheckReport | Diagnosis | CalibrationReport, title: str, verdict: str, tone: str,
    summary: Iterable[str], sections: Iterable[Section],
) -> Content:  # fmt: skip
    """A page about one model, with where it comes from at its end."""
    heading = str(report.source.get("source") or "model")
    return Content(title, heading, verdict, tone, [*summary], [*sections, origin_section(report)])


def _summary(report: ExportReport | CheckReport, check: CheckReport | None) -> Iterator[str]:
    if isinstance(report, ExportReport):
        yield _counted(report)
    if check is not None and check.outputs:
        ratio = f"{words.number(check.ratio)} times the noise at the outputs (limit {check.limit:g})"
        sites = f", {words.number(check.site_ratio)} at the fold sites (limit {check.site_limit:g})"
        yield f"Error of the worst candidate: {ratio}{sites if check.sites else ''}."
    if isinstance(report, CheckReport):
        yield f"The file judged is {report.file}."
    elif report.kind != "plan":
        unproved = " without being judged (--no-check)" if check is None else ""
        file = report.file
        yield "Nothing was written." if file is None else f"Wrote {file.path}, {words.size(file.bytes)}{unproved}."


def _counted(report: ExportReport) -> str:
    gone, total = report.ledger.count()
    before, after = report.operators
    would = "would be " if report.kind == "plan" else ""
    return f"{gone} of {total} BatchNorm {would}folded; {before} operators before, {after} after."


def _diagnosis(report: Diagnosis) -> Content:
    summary = [f"Health of {len(report.norms)} BatchNorm: {severities(report) or 'nothing to report'}."]
    sections = [*_health(report)]
    if (plan := report.plan) is not None:
        summary.append(_counted(plan))
        sections += [*fold_sections(plan), *graph_sections(plan), *range_sections(plan, norms=False)]
    word, tone = ("healthy", "pass") if report.healthy else ("look at the findings", "inconclusive")
    return _content(report, "Inspect", word, tone, summary, sections)


def _health(report: Diagnosis) -> Iterator[Section]:
    """What is wrong with which BatchNorm, all of them, and a picture of their scales and shifts."""
    heads = ("module", "severity", "code", "detail")
    everyone = len(report.norms) if len(report.norms) > 1 else 0
    rows = [
        ("all of them" if len(f.modules) == everyone else ", ".join(f.modules), f.severity, f.code, f.detail)
        for f in report.findings
    ]
    codes = dict.fromkeys(finding.code for finding in report.findings)
    if rows or report.notes:
        yield section(
            "health", "BatchNorm health", ("notes", list(report.notes)),
            ("table", rows and Table("Findings, the worst first", heads, rows, (0, 2))),
            ("reasons", [(code, *FINDINGS[code][1:]) for code in codes]),
        )  # fmt: skip
    if report.norms:
        every = [cells(norm) for norm in report.norms]
        columns = {head: [each[head] for each in every] for head in every[0] if head != "off data"}
        alike = [head for head, column in columns.items() if everyone and head != "module" and len(set(column)) == 1]
        same = {head: columns.pop(head)[0] for head in alike}
        text = f"The same for all: {', '.join(f'{head} {cell}' for head, cell in same.items())}." if same else ""
        listed = Table("All of them", [*columns], [*zip(*columns.values())])
        yield section("layers", "BatchNorms", ("text", text), ("table", listed))
    pictured = [(n.module, astuple(n.scale), astuple(n.shift)) for n in report.norms if n.scale and n.shift]
    if pictured:
        yield norm_section(pictured)


def _calibration(report: CalibrationReport) -> Content:
    summary = f"{words.plural(len(report.layers), 'BatchNorm')} measured over {report.samples} samples."
    facts = [
        ("scheme", report.scheme), ("samples", str(report.samples)), ("passes over the data", str(report.passes)),
        ("not reached by the data", ", ".join(report.unreached)), ("feed themselves", ", ".join(report.circular)),
    ]  # fmt: skip
    new = ("table", table("New statistics", report.layers)) if report.layers else ("text", "Nothing was measured.")
    measured = section("statistics", "New statistics", ("facts", [pair for pair in facts if pair[1]]), new)
    return _content(report, "Calibrate", "measured", "not judged", [summary], [measured])


def _fleet(report: FleetReport) -> Content:
    bad = [f"{row.name} ({row.outcome}, exit code {row.exit_code}): {row.said}" for row in report.rows if row.exit_code]
    heads = ("model", "outcome", "folded", "ratio", "size", "latency", "seconds", "changed", "source")
    rows = [
        (Link(row.name, f"{row.report}.html") if row.report else row.name, words.verdict(row.outcome),
         f"{row.folded} of {row.batch_norms}" if row.report else "–", words.known(row.ratio, words.number),
         words.known(row.bytes, words.size), words.known(row.latency, words.milliseconds),
         "earlier" if row.earlier else f"{row.seconds:.1f}", ", ".join(row.changed) or "the same", row.source)
        for row in report.rows
    ]  # fmt: skip
    sections = [section("problems", "What did not pass", ("alert", bad))] if bad else []
    sections += [
        section("models", "Models", ("table", Table("Every model", heads, rows, code=(0, 8)))),
        section("origin", "Where it comes from", ("facts", [("list of models", report.source), *ran_on()])),
    ]
    earlier = sum(row.earlier for row in report.rows)
    summary = [f"{outcomes(report)}.", f"{words.plural(len(report.rows), 'model')}, {earlier} from an earlier run."]
    word, tone = ("failed", "fail") if report.exit_code else ("every model passed", "pass")
    return Content("Fleet", report.source, word, tone, summary, sections)


def _latency(report: LatencyReport) -> Content:
    rows = [
        (c.name, words.milliseconds(c.median), words.milliseconds(c.p95),
         f"{c.ratio:.3g}" if c.told_apart or c is report.contestants[0] else "not told apart",
         f"{c.interval[0]:.3g} to {c.interval[1]:.3g}", words.known(c.load, words.milliseconds),
         words.known(c.memory, words.size), c.provider)
        for c in report.contestants
    ]  # fmt: skip
    heads = ("model", "median", "95 % below", "over the first's", "95 % interval", "loading", "memory", "runs on")
    facts = [
        ("rounds", f"{report.rounds}, after {report.warmup} calls that do not count"),
        ("threads", "as the runtime chose" if report.threads is None else str(report.threads)),
        *((f"input {name}", shape) for name, shape in report.inputs.items()), *report.machine.items(),
    ]  # fmt: skip
    text = (
        "In every round each had a turn, in random order; ratios are medians over the rounds with their 95 % interval. "
        "A bar is the median beside it, the line at its end that interval, the tick what 95 % of the turns stay below."
    )
    side_by_side = section(
        "latency", "Side by side", ("text", text), ("plot", latency_plot(report)),
        ("table", Table("Time per call", heads, rows)), ("facts", facts), ("notes", list(report.notes)),
    )  # fmt: skip
    heading = " and ".join(c.name for c in report.contestants)
    return Content("Latency", heading, "measured", "not judged", (), [side_by_side])
