"""A report as the text of a file, by the file's suffix."""

from __future__ import annotations

from bnfold.report import Bisection, CalibrationReport, CheckReport, Diagnosis, ExportReport, FleetReport, LatencyReport

Report = ExportReport | CheckReport | LatencyReport | Diagnosis | CalibrationReport | FleetReport


def document(report: Report | Bisection, suffix: str) -> str:
    """The report as JSON, HTML or JUnit XML for ``.json``, ``.html``, ``.xml``; a bisection is JSON alone.

    Raises:
        ProviderError: ``.html`` without matplotlib.
    """
    if isinstance(report, Bisection):
        return report.to_json() + "\n"
    if suffix == ".html":
        from bnfold.render.html import page

        return page(report)
    if suffix == ".xml":
        from bnfold.render.junit import junit

        return junit(report)
    return report.to_json() + "\n"
