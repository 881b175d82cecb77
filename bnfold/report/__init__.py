"""Typed results of every stage, and the closed lists that they speak in. Rendering lives in ``render``."""

from __future__ import annotations

from bnfold.report.export import ExportReport, FileReport
from bnfold.report.ledger import REASONS, Entry, Ledger, Merge, Outcome, Refusal
from bnfold.report.verdict import Accuracy, CheckReport, OutputResult, SiteResult, Verdict

__all__ = [
    "REASONS",
    "Accuracy",
    "CheckReport",
    "Entry",
    "ExportReport",
    "FileReport",
    "Ledger",
    "Merge",
    "Outcome",
    "OutputResult",
    "Refusal",
    "SiteResult",
    "Verdict",
]
