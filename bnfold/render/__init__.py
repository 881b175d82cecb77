"""Typed results -> what a person reads on a terminal."""

from __future__ import annotations

from bnfold.render.bisection import bisection, found
from bnfold.render.files import document
from bnfold.render.findings import findings
from bnfold.render.fleet import fleet_line, fleet_report
from bnfold.render.health import calibration, diagnosis
from bnfold.render.latency import latency_report
from bnfold.render.page import Page, text
from bnfold.render.plots import require_matplotlib
from bnfold.render.progress import Progress
from bnfold.render.reports import check_report, export_report, problems

__all__ = [
    "Page",
    "Progress",
    "bisection",
    "calibration",
    "check_report",
    "diagnosis",
    "document",
    "export_report",
    "findings",
    "fleet_line",
    "fleet_report",
    "found",
    "latency_report",
    "problems",
    "require_matplotlib",
    "text",
]
