"""What the sweeps say of an export, in words for a table."""

from __future__ import annotations

from collections import Counter
from typing import Any


def verdict(check: Any) -> str:
    """Of a ``bnfold.CheckReport``: pass, or what it is and the first problem."""
    return "pass" if check.passed else f"{check.verdict}: {check.problems[0][:160]}"


def why_left(ledger: Any) -> str:
    """Of a ``bnfold.Ledger``: the reasons for which BatchNorms stay, and for how many each."""
    left = (entry for entry in ledger.left if entry.is_batch_norm)
    reasons = Counter(" / ".join(dict.fromkeys(r.reason for r in entry.refusals)) for entry in left)
    return "; ".join(f"{count} × {reason}" for reason, count in reasons.items())
