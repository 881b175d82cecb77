"""Typed results -> what a person reads on a terminal, and the text of a file."""

from __future__ import annotations

from bnfold.render.page import Page, Progress, text
from bnfold.render.plots import require_matplotlib
from bnfold.render.printed import findings, fleet_line, fleet_report, in_a_line, printed
from bnfold.report import Bisection, Report


def document(report: Report, suffix: str) -> str:
    """The report as JSON, HTML (ProviderError without matplotlib) or JUnit, by the suffix; a bisection as JSON."""
    if suffix == ".html" and not isinstance(report, Bisection):
        from bnfold.render.html import page

        return page(report)
    if suffix == ".xml" and not isinstance(report, Bisection):
        from bnfold.render.junit import junit

        return junit(report)
    return report.to_json() + "\n"
