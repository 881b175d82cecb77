"""Results as what JSON knows."""

from __future__ import annotations

import json
import math
from dataclasses import fields, is_dataclass
from typing import Any


def as_json(report: object, indent: int | None) -> str:
    """A report as JSON; NaN and infinities become null."""
    return json.dumps(plain(report), indent=indent, allow_nan=False)


def plain(value: Any) -> Any:
    """Dataclasses and their fields as what JSON knows, with null for NaN and infinities."""
    if is_dataclass(value) and not isinstance(value, type):
        known = {f.name: plain(getattr(value, f.name)) for f in fields(value)}
        extra = {
            name: plain(getattr(value, name)) for name in ("passed", "ratio", "site_ratio") if hasattr(value, name)
        }
        return {**known, **extra}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
