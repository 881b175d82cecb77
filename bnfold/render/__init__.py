"""Typed results -> what a person reads on a terminal."""

from __future__ import annotations

from bnfold.render.files import document
from bnfold.render.fleet import fleet_line, fleet_report
from bnfold.render.page import Page, text
from bnfold.render.plots import require_matplotlib
from bnfold.render.printed import findings, in_a_line, printed
from bnfold.render.progress import Progress
from bnfold.report import Report
