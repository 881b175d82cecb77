"""bnfold: fold every per-channel affine into its neighbours, export ONNX, prove the file equal.

folded = bnfold.fold(model, (x,))                    # .module, .program, .ledger
report = bnfold.export(model, "net.onnx", (x,))      # .passed, .check, .ledger
verdict = bnfold.check("net.onnx", model, (x,))      # the gate alone
diagnosis = bnfold.inspect(model, (x,))              # .findings, .norms, .plan
calibrated = bnfold.calibrate(model, batches)        # running statistics from data
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bnfold._version import __version__
from bnfold.errors import (
    BnfoldError,
    CaptureError,
    FoldError,
    InputError,
    LowerError,
    ProviderError,
    ResourceError,
    UsageError,
)

if TYPE_CHECKING:
    from bnfold.eager.eager import WrittenBack
    from bnfold.loading.structure import prepare
    from bnfold.options import Folded, OptionFields, Options
    from bnfold.pipeline import bisect, check, export, fold, inspect
    from bnfold.report import Bisection, CheckReport, Diagnosis, Entry, ExportReport, Ledger, Refusal
    from bnfold.statistics.calibration import calibrate

_HOMES = {
    "bnfold.eager.eager": "WrittenBack",
    "bnfold.loading.structure": "prepare",
    "bnfold.options": "Folded OptionFields Options",
    "bnfold.pipeline": "bisect check export fold inspect",
    "bnfold.report": "Bisection CheckReport Diagnosis Entry ExportReport Ledger Refusal",
    "bnfold.statistics.calibration": "calibrate",
}

__all__ = [
    "Bisection", "BnfoldError", "CaptureError", "CheckReport", "Diagnosis", "Entry", "ExportReport", "FoldError",
    "Folded", "InputError", "Ledger", "LowerError", "OptionFields", "Options", "ProviderError", "Refusal",
    "ResourceError", "UsageError", "WrittenBack", "__version__", "bisect", "calibrate", "check", "export", "fold",
    "inspect", "prepare",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    # torch takes seconds to import, and ``--help`` must not.
    from importlib import import_module

    for module, names in _HOMES.items():
        if name in names.split():
            return getattr(import_module(module), name)
    raise AttributeError(f"module 'bnfold' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
