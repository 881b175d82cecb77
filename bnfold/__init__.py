"""bnfold: fold every per-channel affine into its neighbours, export ONNX, prove the file equal.

folded = bnfold.fold(model, (x,))                    # .module, .program, .ledger
report = bnfold.export(model, "net.onnx", (x,))      # .passed, .check, .ledger
verdict = bnfold.check("net.onnx", model, (x,))      # the gate alone
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bnfold._version import __version__

if TYPE_CHECKING:
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
    from bnfold.options import Folded, Options
    from bnfold.pipeline import check, export, fold
    from bnfold.report import CheckReport, Entry, ExportReport, Ledger, Refusal

_ERRORS = "BnfoldError CaptureError FoldError InputError LowerError ProviderError ResourceError UsageError"
_HOMES = {
    "bnfold.errors": _ERRORS.split(),
    "bnfold.options": ["Folded", "Options"],
    "bnfold.pipeline": ["check", "export", "fold"],
    "bnfold.report": ["CheckReport", "Entry", "ExportReport", "Ledger", "Refusal"],
}

__all__ = [
    "BnfoldError",
    "CaptureError",
    "CheckReport",
    "Entry",
    "ExportReport",
    "FoldError",
    "Folded",
    "InputError",
    "Ledger",
    "LowerError",
    "Options",
    "ProviderError",
    "Refusal",
    "ResourceError",
    "UsageError",
    "__version__",
    "check",
    "export",
    "fold",
]


def __getattr__(name: str) -> Any:
    # torch takes seconds to import, and ``--help`` must not.
    from importlib import import_module

    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module 'bnfold' has no attribute {name!r}")
