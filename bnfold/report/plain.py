"""Results as what JSON knows."""

from __future__ import annotations

import contextlib
import json
import math
import platform
import sys
import tomllib
from dataclasses import fields, is_dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from itertools import repeat
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ClassVar, get_args, get_origin, get_type_hints

from bnfold._version import __version__

#: Of the documents that reports are written as; raised whenever a reader of the old ones could misread a new one.
SCHEMA_VERSION = 1


class Report:
    """A result that is a document of its own; ``schema.json`` says what is in it."""

    kind: ClassVar[Any]

    def to_json(self, indent: int | None = 2) -> str:
        """The report as JSON. NaN and infinities become null; times are in seconds, memory in bytes."""
        head = {"schema": SCHEMA_VERSION, "bnfold": __version__, "kind": self.kind, "versions": versions()}
        document = head | plain(self)
        return json.dumps(document, allow_nan=False) if indent is None else lines(document, indent)


def table(name: str) -> dict[str, Any]:
    """The rows of a table of texts in this folder, by their codes."""
    return tomllib.loads(Path(__file__).with_name(f"{name}.toml").read_text(encoding="utf-8"))


def versions() -> dict[str, str]:
    """What a run rests on: Python and the packages that compute something, with their versions."""
    found = {"python": platform.python_version()}
    loaded = sys.modules.get("onnxruntime.capi.build_and_package_info")  # of several installed, the one that ran
    runtimes = [loaded.package_name] if loaded else ["onnxruntime-gpu", "onnxruntime"]
    for package in ("torch", "numpy", "onnx", "onnxscript", *runtimes):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def plain(value: Any) -> Any:
    """Dataclasses, with the properties named in ``derived``, as what JSON knows; null for NaN and infinities."""
    if is_dataclass(value) and not isinstance(value, type):
        names = (*(field.name for field in fields(value)), *getattr(value, "derived", ()))
        return {name: plain(getattr(value, name)) for name in names}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def revived(hint: Any, value: Any) -> Any:
    """What ``plain`` has made ``value`` of, given its type; what was derived is derived anew.

    TypeError, KeyError or AttributeError where it was made of something else.
    """
    parts = get_args(hint)
    if isinstance(hint, type) and is_dataclass(hint):
        kinds, derived = _hints(hint), getattr(hint, "derived", ())
        return hint(**{name: revived(kinds[name], item) for name, item in value.items() if name not in derived})
    if get_origin(hint) is tuple:
        return tuple(map(revived, repeat(parts[0]) if parts[1:] == (...,) else parts, value))
    if get_origin(hint) is UnionType and value is not None:
        return revived(next(part for part in parts if part is not NoneType), value)
    return value


_hints = cache(get_type_hints)


def lines(value: Any, indent: int = 2, depth: int = 0) -> str:
    """As json.dumps with an indent, but a list of numbers or words on one line: a layer has hundreds of channels."""
    nested = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if not value or not (isinstance(value, dict) or any(isinstance(item, (dict, list)) for item in nested)):
        return json.dumps(value, allow_nan=False)
    begin, end = "\n" + " " * indent * (depth + 1), "\n" + " " * indent * depth
    if isinstance(value, dict):
        rows = (f"{json.dumps(key)}: {lines(item, indent, depth + 1)}" for key, item in value.items())
        return "{" + begin + f",{begin}".join(rows) + end + "}"
    return "[" + begin + f",{begin}".join(lines(item, indent, depth + 1) for item in value) + end + "]"
