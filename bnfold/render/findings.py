"""What ``doctor`` prints."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.text import Text

from bnfold.render.page import STYLES, Page

if TYPE_CHECKING:
    from bnfold.runtime.doctor import Finding


def findings(found: Iterable[Finding], page: Page) -> None:
    """What ``doctor`` prints."""
    for finding in found:
        page.line(finding.level, Text(finding.what, STYLES[finding.level] if finding.level == "problem" else ""))
        if finding.hint:
            page.line("", finding.hint)
