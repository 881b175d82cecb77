"""Tables and lists of facts for a page, made of results whatever fields they have."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

#: Fields whose bare name would say too little.
_LABELS = {"before": "top-1 before", "after": "top-1 after", "data": "SHA-256 of the data", "sqnr": "SQNR, dB"}


class Link(str):
    """A cell that leads to another page."""

    href: str

    def __new__(cls, text: str, href: str) -> Link:
        """The text, and where it leads."""
        link = super().__new__(cls, text)
        link.href = href
        return link


@dataclass(frozen=True)
class Table:
    """A table of the page; the first cell of a row names it. Cells of ``code`` columns are names, the rest text."""

    caption: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    code: Sequence[int] = (0,)


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it: pairs of a kind that the template knows and what it shows."""

    name: str
    title: str
    parts: Sequence[tuple[str, Any]]


def section(name: str, title: str, *parts: tuple[str, Any]) -> Section:
    """A section without its empty parts."""
    return Section(name, title, [(kind, value) for kind, value in parts if value])


def of_result(name: str, title: str, result: Any, *before: tuple[str, Any]) -> Section:
    """A section for a result: its plain fields as facts, its lists of results as tables."""
    return section(name, title, *before, ("facts", facts(result)), *tables(result))


def facts(result: Any) -> list[tuple[str, str]]:
    """The plain fields of a result by their names: what a later version measures is shown as well."""
    found = []
    for field in fields(result):
        value = getattr(result, field.name)
        named = label(field.name)
        if is_dataclass(value):
            found += [(f"{named}: {name}", text) for name, text in facts(value)]
        elif isinstance(value, dict):
            found += [(f"{named}: {name}", _value(field.name, item)) for name, item in value.items()]
        elif value is not None and not (isinstance(value, (list, tuple)) and any(map(is_dataclass, value))):
            found.append((named, _value(field.name, value)))
    return found


def tables(result: Any) -> list[tuple[str, Table]]:
    """Its lists of results, each as a table."""
    found = []
    for field in fields(result):
        items = getattr(result, field.name)
        if isinstance(items, (list, tuple)) and items and all(map(is_dataclass, items)):
            found.append(("table", table(label(field.name), items)))
    return found


def table(caption: str, items: Sequence[Any]) -> Table:
    """Results of one kind, a row each."""
    heads = [label(field.name) for field in fields(items[0])]
    return Table(caption, heads, [[_value(f.name, getattr(item, f.name)) for f in fields(item)] for item in items])


def label(name: str) -> str:
    """A field's name as people read it."""
    return _LABELS.get(name, name.replace("_", " "))


def _value(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        share = 0 <= value <= 1 and name.removeprefix("top5_") in ("before", "after")
        return "not known" if math.isnan(value) else f"{value:.2%}" if share else f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(_value("", item) for item in value) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{key}={_value('', item)}" for key, item in value.items()) or "none"
    return str(value)
