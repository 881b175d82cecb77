"""A report as one HTML page that needs nothing else: no scripts, no requests, readable on a phone, dark or light."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bnfold.render import words
from bnfold.render.fleet import fleet_sections, fleet_summary
from bnfold.render.health_files import calibration_sections, counted, health_sections
from bnfold.render.plots import latency_plot, require_matplotlib
from bnfold.render.sections import (
    SIGNS,
    fold_sections,
    graph_sections,
    interface_section,
    judged_sections,
    origin_section,
    problem_section,
    range_sections,
    site_sections,
)
from bnfold.render.tables import Section, Table, section
from bnfold.report import (
    CalibrationReport,
    CheckReport,
    Diagnosis,
    ExportReport,
    FleetReport,
    Latency,
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
    """The report as an HTML document.

    Raises:
        ProviderError: matplotlib is not installed.
    """
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
            word, tone = ("failed", "fail") if report.exit_code else ("every model passed", "pass")
            content = Content("Fleet", report.source, word, tone, fleet_summary(report), [*fleet_sections(report)])
        case CalibrationReport():
            content = _calibration(report)
        case LatencyReport():
            content = _latency(report)
        case _:
            raise TypeError(f"there is no page of a {type(report).__name__}")
    return environment.get_template("report.html.j2").render(content=content, signs=SIGNS) + "\n"


def _judged(report: ExportReport | CheckReport) -> Content:
    check = report.check if isinstance(report, ExportReport) else report
    sections = [] if check is None else [*problem_section(report, check), *judged_sections(check)]
    sections += interface_section(report.interface)
    if isinstance(report, ExportReport):
        sections += [
            *fold_sections(report), *graph_sections(report), *site_sections(check), *range_sections(report),
        ]  # fmt: skip
    else:
        sections += site_sections(report)
    verdict = "not judged" if check is None else check.verdict
    summary = [*_summary(report, check)]
    return Content(
        report.kind.capitalize(), _model(report.source), verdict, verdict, summary,
        [*sections, origin_section(report)],
    )  # fmt: skip


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
    summary, sections = [counted(report)], [*health_sections(report)]
    if report.plan is not None:
        summary.append(_counted(report.plan))
        sections += [*fold_sections(report.plan), *graph_sections(report.plan)]
        sections += [*range_sections(report.plan, norms=False)]
    word, tone = ("healthy", "pass") if report.healthy else ("look at the findings", "inconclusive")
    return Content("Inspect", _model(report.source), word, tone, summary, [*sections, origin_section(report)])


def _calibration(report: CalibrationReport) -> Content:
    summary = [f"{words.plural(len(report.layers), 'BatchNorm')} measured over {report.samples} samples."]
    sections = [*calibration_sections(report), origin_section(report)]
    return Content("Calibrate", _model(report.source), "measured", "not judged", summary, sections)


def _latency(report: LatencyReport) -> Content:
    rows = [
        (c.name, _milliseconds(c.median), _milliseconds(c.p95), _ratio(c, report),
         f"{c.interval[0]:.3g} to {c.interval[1]:.3g}", "–" if c.load is None else _milliseconds(c.load),
         "–" if c.memory is None else words.size(c.memory), c.provider)
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


def _ratio(latency: Latency, report: LatencyReport) -> str:
    known = latency.told_apart or latency is report.contestants[0]
    return f"{latency.ratio:.3g}" if known else "not told apart"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def _model(source: dict[str, object]) -> str:
    return str(source.get("source") or "model")
