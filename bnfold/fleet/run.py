"""A whole fleet: rows -> workers -> a report, and what is stored of it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from bnfold.errors import BnfoldError
from bnfold.fleet.cluster import SchedulerGoneError, Where, connected, spread
from bnfold.fleet.places import Folder, is_url
from bnfold.fleet.rows import Row
from bnfold.fleet.work import Order, export_model
from bnfold.report import FleetReport, ModelRow
from bnfold.report.plain import revived

#: Called with a row as it ends, and how many have ended of how many.
Tell = Callable[[ModelRow, int, int], None]


def run(
    rows: list[Row], source: str, folder: Path, out: str, where: Where, *, timeout: float = 3600.0, anew: bool = False,
    tell: Tell = lambda row, done, total: None, work: Callable[[Order], ModelRow] = export_model,
) -> FleetReport:  # fmt: skip
    """Exports every model, on the workers, unless its result is there already.

    Args:
        source: what the list of them is called.
        folder: in which every export runs.
        out: a folder, or a URL of one.
        timeout: seconds for a model that says nothing else.
        anew: export again what failed in an earlier run.

    Raises:
        ProviderError: there are no workers.
        ResourceError: the folder cannot be made.
    """
    results = Folder(out if is_url(out) else str(Path(out).absolute()))
    results.make()
    before = _earlier(results)
    orders = [Order(row, str(folder.resolve()), results.place, timeout, where.memory, anew) for row in rows]
    found: dict[int, ModelRow] = {}
    with connected(where, tasks=len(rows), gpus=any(dict(row.resources).get("GPU") for row in rows)) as client:
        began = time.monotonic()
        try:
            for i, result in spread(client, work, orders, lambda order: dict(order.row.resources)):
                row = _failed(rows[i], result) if isinstance(result, BnfoldError) else result
                found[i] = replace(row, changed=changes(before.get(row.name), row))
                tell(found[i], len(found), len(rows))
        except SchedulerGoneError as error:
            gone = error
            for i in sorted(set(range(len(rows))) - set(found)):
                found[i] = _failed(rows[i], gone)
                tell(found[i], len(found), len(rows))
        seconds = time.monotonic() - began
    return FleetReport(source, tuple(found[i] for i in range(len(rows))), round(seconds, 3))


def _failed(row: Row, error: BnfoldError) -> ModelRow:
    return ModelRow(row.name, row.source, "error", error.exit_code, str(error))


def _earlier(results: Folder) -> dict[str, ModelRow]:
    """The rows of the run before, by name."""
    with suppress(ValueError, KeyError, TypeError):
        return {row["name"]: revived(ModelRow, row) for row in json.loads(results.read("index.json") or b"")["rows"]}
    return {}


def changes(old: ModelRow | None, new: ModelRow) -> tuple[str, ...]:
    """What differs from the run before, in words."""
    if old is None:
        return ("new",)
    found = []
    if old.outcome != new.outcome:
        found.append(f"was {old.outcome}")
    if (old.folded, old.batch_norms) != (new.folded, new.batch_norms) and new.report and old.report:
        found.append(f"folded {old.folded} of {old.batch_norms} before")
    if new.sha256 and old.sha256 and old.sha256 != new.sha256:
        found.append("another file")
    if new.bytes and old.bytes and old.bytes != new.bytes:
        found.append(f"{new.bytes - old.bytes:+,} bytes")
    return tuple(found)
