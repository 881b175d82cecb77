"""A report as JUnit XML: what CI servers read. A suite per question, a case per thing that was judged."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Iterator
from itertools import starmap

from bnfold.render import words
from bnfold.render.words import judged, next_steps, problem_of, site_verdict
from bnfold.report import (
    FINDINGS,
    CalibrationReport,
    CheckReport,
    Diagnosis,
    Entry,
    ExportReport,
    FleetReport,
    LatencyReport,
    Report,
)

#: What XML 1.0 has no way to write, not even escaped.
_UNWRITABLE = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit(report: Report) -> str:
    """The report as XML. Only a pass passes: *inconclusive* is a failure of that type, what was not judged is skipped.

    Suites: ``verdict`` (the gate as a whole, with every problem in words), ``outputs`` and ``fold sites`` of every
    candidate, ``accuracy``, ``baseline``, ``folds`` (a BatchNorm that stays is skipped with its reason), ``latency``.
    """
    root = ET.Element("testsuites", name="bnfold")
    match report:
        case Diagnosis():
            _suite(root, "health", starmap(_case, _health(report)))
            if report.plan is not None:
                _suite(root, "folds", map(_fold, report.plan.ledger.grouped()))
        case CalibrationReport():
            _suite(root, "statistics", starmap(_case, _statistics(report)))
        case FleetReport():
            _suite(root, "fleet", starmap(_case, _fleet(report)), report.seconds)
        case LatencyReport():
            _suite(root, "latency", (_case(c.name, "pass", "", seconds=c.median) for c in report.contestants))
        case ExportReport() | CheckReport():
            _judged(root, report)
    for name in ("tests", "failures", "skipped"):
        root.set(name, str(sum(int(suite.get(name, "0")) for suite in root)))
    root.set("errors", "0")
    ET.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def _judged(root: ET.Element, report: ExportReport | CheckReport) -> None:
    check = report.check if isinstance(report, ExportReport) else report
    advice = "".join(f"\nto {what}: {command}" for what, command in next_steps(report))
    seconds = sum(report.timings.values()) if isinstance(report, ExportReport) else 0.0
    if check is None:
        why = "a plan is judged by nobody" if report.kind == "plan" else "nothing was judged: --no-check"
        _suite(root, "verdict", [_case("gate", "skipped", why)], seconds)
    else:
        problems = "\n".join(check.problems) + advice
        _suite(root, "verdict", [_case("gate", check.verdict, "; ".join(check.problems[:3]), problems)], seconds)
        _checked(root, check, advice)
    if isinstance(report, ExportReport):
        _suite(root, "folds", map(_fold, report.ledger.grouped()))


def _checked(root: ET.Element, check: CheckReport, advice: str) -> None:
    suites: dict[str, list[ET.Element]] = {}
    for o in check.outputs:
        verdict, numbers = judged(o, check), f"error {words.error(o.error)}, noise {words.error(o.noise)}"
        what = f"output '{o.output}', {o.candidate}: {_ratio(o.ratio, check.limit)}; {numbers}"
        why = (problem_of(o, check) if verdict != "pass" and o.ratio <= check.limit else None) or what
        suites.setdefault(f"outputs: {o.candidate}", []).append(_case(o.output, verdict, why, why + advice))
    for s in check.sites:
        whole = s.ratio <= check.limit  # what is left is its worst element
        ratio = _ratio(s.channel_ratio, check.site_limit) if whole else _ratio(s.ratio, check.limit)
        what, verdict = f"fold of '{s.module or s.value}', {s.candidate}: {ratio}", site_verdict(s, check)
        case = _case(f"{s.module} ({s.value})", verdict, what, what + advice)
        suites.setdefault(f"fold sites: {s.candidate}", []).append(case)
    for name, cases in suites.items():
        _suite(root, name, cases)
    if check.accuracy is not None:
        far = check.accuracy.far_flips
        what = f"{words.plural(far, 'class')} changed that the noise does not explain"
        _suite(root, "accuracy", [_case("flips", "fail" if far else "pass", what, what + advice)])
    if check.baseline is not None:
        rows = [(r, f"{r.said(r.then)} before, {r.said(r.now)} now") for r in check.baseline.rows]
        _suite(root, "baseline", (_case(r.what, "fail" if r.regressed else "pass", said) for r, said in rows))


def _fold(group: list[Entry]) -> ET.Element:
    name = group[0].module or group[0].value
    reasons = dict.fromkeys(r.reason for entry in group if entry.outcome == "left" for r in entry.refusals)
    stays = any(entry.outcome == "left" for entry in group)
    return _case(name, "skipped" if stays else "pass", f"stays: {', '.join(reasons)}")


def _ratio(ratio: float, limit: float) -> str:
    known = "not known" if math.isnan(ratio) else f"{words.number(ratio)} times the noise"
    return f"error is {known} (limit {limit:g})"


def _case(name: str, verdict: str, message: str, text: str = "", seconds: float = 0.0) -> ET.Element:
    """A case that passes, is ``skipped``, or else fails with its verdict for the type of the failure."""
    case = ET.Element("testcase", name=_clean(name), time=f"{seconds:.6f}")
    if verdict == "skipped":
        ET.SubElement(case, "skipped", message=_clean(message))
    elif verdict != "pass":
        failure = ET.SubElement(case, "failure", type=verdict, message=_clean(f"{verdict}: {message}"))
        failure.text = _clean(text)
    return case


def _suite(root: ET.Element, name: str, cases: Iterable[ET.Element], seconds: float = 0.0) -> None:
    suite = ET.SubElement(root, "testsuite", name=_clean(name), time=f"{seconds:.3f}")
    for case in cases:
        case.set("classname", f"bnfold.{_clean(name)}")
        suite.append(case)
    for kind, tag in (("tests", "testcase"), ("failures", "testcase/failure"), ("skipped", "testcase/skipped")):
        suite.set(kind, str(len(suite.findall(tag))))
    suite.set("errors", "0")


def _clean(text: str) -> str:
    return _UNWRITABLE.sub("\ufffd", text)


# -- cases of the other commands: a name, a verdict, one line, the whole text, and the seconds ------------------------


def _statistics(report: CalibrationReport) -> Iterator[tuple[str, str, str]]:
    """A case per BatchNorm."""
    yield from ((layer.module, "pass", "") for layer in report.layers)
    yield from ((name, "skipped", "the data does not reach it") for name in report.unreached)


def _health(report: Diagnosis) -> Iterator[tuple[str, str, str, str]]:
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


def _fleet(report: FleetReport) -> Iterator[tuple[str, str, str, str, float]]:
    """A case per model."""
    for row in report.rows:
        why = row.said or "nothing was judged"
        yield row.name, "skipped" if row.outcome == "not judged" else row.outcome, why, why, row.seconds
