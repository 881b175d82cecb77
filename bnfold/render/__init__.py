"""Typed results -> what a person reads on a terminal."""

from __future__ import annotations

from bnfold.render.findings import findings
from bnfold.render.page import Page, text
from bnfold.render.progress import Progress
from bnfold.render.reports import check_report, export_report, plan_report, problems

__all__ = ["Page", "Progress", "check_report", "export_report", "findings", "plan_report", "problems", "text"]
