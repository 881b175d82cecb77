"""What the files of ``inspect`` and ``calibrate`` hold: the parts of an HTML page, and JUnit cases."""

from __future__ import annotations

from collections.abc import Iterator

from bnfold.render.health import COLUMNS, severities
from bnfold.render.sections import norm_section
from bnfold.render.tables import Section, Table, section, table
from bnfold.report import FINDINGS, CalibrationReport, Diagnosis, Spread

#: Name of a case, its verdict, one line, and the whole text.
Case = tuple[str, str, str, str]


def health_sections(report: Diagnosis) -> Iterator[Section]:
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
    about = ("module", "kind", "channels", "eps", "momentum", "affine", "mode", "statistics", "calls", "scale", "shift")
    if report.norms:
        columns = {head: [COLUMNS[head](norm) for norm in report.norms] for head in about}
        same = [head for head in about[1:] if everyone and len(set(columns[head])) == 1]
        text = f"The same for all: {', '.join(f'{head} {columns[head][0]}' for head in same)}." if same else ""
        shown = [head for head in about if head not in same]
        rows = [*zip(*(columns[head] for head in shown))]
        yield section("layers", "BatchNorms", ("text", text), ("table", Table("All of them", shown, rows)))
    pictured = [(n.module, _five(n.scale), _five(n.shift)) for n in report.norms if n.scale and n.shift]
    if pictured:
        yield norm_section(pictured)


def calibration_sections(report: CalibrationReport) -> Iterator[Section]:
    """What was measured."""
    facts = [
        ("scheme", report.scheme), ("samples", str(report.samples)), ("passes over the data", str(report.passes)),
        ("not reached by the data", ", ".join(report.unreached)), ("feed themselves", ", ".join(report.circular)),
    ]  # fmt: skip
    new = ("table", table("New statistics", report.layers)) if report.layers else ("text", "Nothing was measured.")
    yield section("statistics", "New statistics", ("facts", [pair for pair in facts if pair[1]]), new)


def counted(report: Diagnosis) -> str:
    """How many findings there are of each severity, in a sentence."""
    return f"Health of {len(report.norms)} BatchNorm: {severities(report) or 'nothing to report'}."


def _five(spread: Spread) -> tuple[float, ...]:
    return spread.minimum, spread.lower, spread.median, spread.upper, spread.maximum


def calibration_cases(report: CalibrationReport) -> Iterator[Case]:
    """A case per BatchNorm."""
    yield from ((layer.module, "pass", "", "") for layer in report.layers)
    yield from ((name, "skipped", "the data does not reach it", "") for name in report.unreached)


def health_cases(report: Diagnosis) -> Iterator[Case]:
    """A case per BatchNorm; one with an error or a warning fails."""
    everyone = [finding for finding in report.findings if len(finding.modules) != 1 or not finding.modules[0]]
    for norm in report.norms:
        found = [f for f in report.findings if f not in everyone and norm.module in f.modules and f.severity != "note"]
        lines = [f"{f.code}: {f.detail or FINDINGS[f.code][1]}; {f.way_out}" for f in found]
        verdict = found[0].severity if found else "pass"
        yield norm.module, verdict, "; ".join(f.code for f in found), "\n".join(lines)
    for finding in everyone:
        if finding.severity != "note":
            yield finding.code, finding.severity, finding.detail, f"{finding.detail}\n{finding.way_out}"
