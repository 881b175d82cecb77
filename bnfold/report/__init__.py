"""Typed results of every stage, and the closed lists that they speak in. Rendering lives in ``render``."""

from __future__ import annotations

# isort: off
# fmt: off
from bnfold.report.model import (
    REASONS, Change, Entry, Fate, LayerRange, Ledger, Merge, NormRange, Operator, Outcome, Port, Refusal, Role, Scaled,
    WeightRange,
)
from bnfold.report.plain import Report
from bnfold.report.results import (
    FINDINGS, Bisection, CalibratedLayer, CalibrationReport, Culprit, Diagnosis, Finding, FleetReport, Latency,
    LatencyReport, ModelRow, NormHealth, NormKind, Severity, Spread,
)
from bnfold.report.verdict import (
    Accuracy, Adversarial, Agreement, BaselineReport, BaselineRow, CheckReport, Engine, ExportReport, FileReport, Flip,
    OutputResult, Placement, SiteResult, TargetFit, Verdict,
)
