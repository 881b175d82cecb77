"""What ``bisect`` prints."""

from __future__ import annotations

from rich.text import Text

from bnfold.render.page import STYLES, Page
from bnfold.render.reports import loaded
from bnfold.render.words import number
from bnfold.report import Bisection


def bisection(report: Bisection, page: Page, *, verbose: bool) -> None:
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


def found(report: Bisection) -> str:
    """What is wrong in one line, for those who see nothing else."""
    if report.culprit is not None:
        place = f"module '{report.culprit.module}'" if report.culprit.module else f"value '{report.culprit.value}'"
        return f"{place} is the first to leave the noise: {number(report.culprit.ratio)} times"
    if report.optimizers:
        return f"ONNX Runtime's optimisation {' with '.join(report.optimizers)} makes the file wrong"
    return f"the outputs are {number(max(report.worst, report.optimized))} times the noise off, no single value is"
