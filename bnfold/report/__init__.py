"""Typed results of every stage, and the closed lists that they speak in. Rendering lives in ``render``."""

from __future__ import annotations

from bnfold.report.accuracy import Accuracy, Agreement, BaselineReport, BaselineRow, Flip, TargetFit
from bnfold.report.bisection import Bisection, Culprit
from bnfold.report.export import ExportReport, FileReport
from bnfold.report.fleet import FleetReport, ModelRow
from bnfold.report.health import (
    FINDINGS,
    CalibratedLayer,
    CalibrationReport,
    Diagnosis,
    Finding,
    NormHealth,
    NormKind,
    Severity,
    Spread,
)
from bnfold.report.latency import Latency, LatencyReport
from bnfold.report.ledger import REASONS, Change, Entry, Ledger, Merge, Outcome, Refusal, Scaled
from bnfold.report.model import Fate, LayerRange, NormRange, Operator, Port, Role, WeightRange
from bnfold.report.plain import Report
from bnfold.report.verdict import Adversarial, CheckReport, Engine, OutputResult, Placement, SiteResult, Verdict
