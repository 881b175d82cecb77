"""A report as the text of a file, by the file's suffix."""

from __future__ import annotations

from bnfold.report import Bisection, Report


def document(report: Report, suffix: str) -> str:
    """The report as JSON, HTML or JUnit XML for ``.json``, ``.html``, ``.xml``; a bisection is JSON alone.

    Raises:
        ProviderError: ``.html`` without matplotlib.
    """
    if suffix == ".html" and not isinstance(report, Bisection):
        from bnfold.render.html import page

        return page(report)
    if suffix == ".xml" and not isinstance(report, Bisection):
        from bnfold.render.junit import junit

        return junit(report)
    return report.to_json() + "\n"
