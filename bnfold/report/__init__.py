"""Typed results of every stage, and the closed lists that they speak in. Rendering lives in ``render``."""

from __future__ import annotations

from bnfold.report.accuracy import Accuracy, Agreement, Flip, TargetFit
from bnfold.report.baseline import BaselineReport, BaselineRow
from bnfold.report.bisection import Bisection, Culprit
from bnfold.report.calibration import CalibratedLayer, CalibrationReport
from bnfold.report.drawing import Fate, Operator
from bnfold.report.export import ExportReport, FileReport
from bnfold.report.fleet import FleetReport, ModelRow
from bnfold.report.health import FINDINGS, Diagnosis, Finding, NormHealth, NormKind, Severity, Spread
from bnfold.report.interface import Port, Role
from bnfold.report.latency import Latency, LatencyReport
from bnfold.report.ledger import REASONS, Change, Entry, Ledger, Merge, Outcome, Refusal, Scaled
from bnfold.report.plain import Report
from bnfold.report.ranges import LayerRange, NormRange, WeightRange
from bnfold.report.verdict import Adversarial, CheckReport, Engine, OutputResult, Placement, SiteResult, Verdict
