"""Where a file ran, how it runs as deployed, and what the search for bad inputs found."""

from __future__ import annotations

from rich.text import Text

from bnfold.render.page import STYLES, Page
from bnfold.render.words import number, plural
from bnfold.report import Adversarial, CheckReport


def running_lines(check: CheckReport, page: Page) -> None:
    """Lines of a verdict; none where there is nothing to say."""
    if check.placement is not None and check.placement.elsewhere:
        page.line("", ", ".join(f"{plural(n, 'node')} on {name}" for name, n in check.placement.nodes.items()))
    if len(check.engines) > 1 or any(engine.options for engine in check.engines):
        for engine in check.engines:
            options = "".join(f" {key}={value}" for key, value in engine.options.items())
            rounding = f"computes in {engine.arithmetic} (unit roundoff {engine.unit_roundoff:.1e})"
            ratio = f"ratio {number(engine.ratio)} (limit {number(check.limit)})"
            page.line(
                "", f"{engine.name}{options}", rounding, ratio, Text(engine.verdict.upper(), STYLES[engine.verdict])
            )
    if check.adversarial is not None:
        page.line("", _adversarial(check.adversarial))


def _adversarial(found: Adversarial) -> str:
    words = (
        f"adversarial: {plural(found.samples, 'sample')} after {found.steps} steps: worst ratio {number(found.ratio)}"
    )
    if found.peak < 1e-3:  # far from any overflow
        return words
    peak, before = f"{found.peak:.2g}", f"{found.peak_before:.2g}"
    return f"{words}, values up to {peak} of their dtype's range at '{found.peak_module}' (before: {before})"
