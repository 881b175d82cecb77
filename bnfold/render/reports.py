"""What ``export``, ``fold``, ``check`` and ``inspect`` print."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.text import Text

from bnfold.render.advice import int8_warnings, next_steps
from bnfold.render.checked import badge, verdict_lines
from bnfold.render.page import Page
from bnfold.render.words import OUTCOMES, count, plural, size
from bnfold.report import REASONS, CheckReport, ExportReport, Ledger, Port

#: Rows of a table, keys of the weights, and inputs or outputs that are shown.
_SHOWN, _LISTED, _PORTS = 20, 12, 6


def export_report(report: ExportReport, page: Page, *, destination: str | None, verbose: bool) -> None:
    """What ``export`` and ``fold`` print; without a destination nothing was to be written."""
    loaded(report.source, report.notes, page)
    _ports(report.interface, page)
    _folded(report, page)
    if verbose:
        _plan(report.ledger, page, bare=True)
    if report.check is None:
        page.line("Checked", "nothing (--no-check)")
    else:
        verdict_lines(report.check, page, verbose=verbose)
    _ending(report, page, destination)
    _next(report, page)
    _left(report.ledger, page, verbose=verbose)
    _int8(report, page, verbose=verbose)


def fold_plan(report: ExportReport, page: Page, *, verbose: bool) -> None:
    """What ``inspect`` prints of the fold plan: where every BatchNorm goes."""
    _folded(report, page)
    _plan(report.ledger, page, bare=verbose)
    _left(report.ledger, page, verbose=verbose)
    _int8(report, page, verbose=verbose)


def check_report(report: CheckReport, page: Page, *, verbose: bool) -> None:
    """What ``check`` prints."""
    loaded(report.source, (), page)
    _ports(report.interface, page)
    page.line("Against", subject=report.file or report.provider)
    verdict_lines(report, page, verbose=verbose)
    page.line("Verdict", badge(report.verdict))
    _next(report, page)


# -- parts -------------------------------------------------------------------------------------------------------------


def loaded(source: dict[str, Any], notes: Sequence[str], page: Page) -> None:
    """The first line of every report: the model."""
    weights = f", weights {source['weights']}" if source.get("weights") else ""
    page.line("Loaded", f"{count(source.get('parameters') or 0)} parameters{weights}", subject=source["source"])
    if left := source.get("left_out"):
        more = f" and {len(left) - _LISTED} more" if len(left) > _LISTED else ""
        what = f"left out of the weights, as no part of the model has them: {', '.join(left[:_LISTED])}{more}"
        notes = (what, *notes)
    for note in notes:
        page.line("", f"note: {note}")


def _ports(interface: Sequence[Port], page: Page) -> None:
    """What goes in and what comes out, a line each."""
    for role, label in (("input", "Takes"), ("output", "Gives")):
        found = [str(port) for port in interface if port.role == role]
        more = [f"and {len(found) - _PORTS} more"] if len(found) > _PORTS else []
        if found:
            page.line(label, *found[:_PORTS], *more)


def _folded(report: ExportReport, page: Page) -> None:
    before, after = report.operators
    ledger = report.ledger
    gone, total = ledger.count()
    operators = f"{before} operators before, {after} after"
    if not ledger.entries:
        page.line("Folded", operators, subject="nothing: no BatchNorm or other affine")
        return
    page.line("Folded", _directions(ledger), subject=f"{gone} of {total} BatchNorm" if total else "no BatchNorm")
    bare = [entry for entry in ledger.entries if not entry.is_batch_norm]
    if bare:
        folded = sum(entry.outcome != "left" for entry in bare)
        page.line("", f"{folded} of {len(bare)} other multiplications and additions by constants")
    page.line("", operators)
    if ledger.merges:
        layers, fewer = sum(len(merge.modules) for merge in ledger.merges), sum(m.operators for m in ledger.merges)
        page.line("Merged", plural(fewer, "operator") + " fewer", subject=f"{layers} layers into {len(ledger.merges)}")
    if ledger.scaled:
        most = max(entry.largest for entry in ledger.scaled)
        page.line(
            "Scaled", f"by powers of two, up to {most:g}", subject=f"{plural(len(ledger.scaled), 'layer')} equalised"
        )


def _directions(ledger: Ledger) -> str:
    counts: Counter[tuple[str, bool]] = Counter()
    passed: dict[tuple[str, bool], dict[str, None]] = {}
    for group in ledger.grouped():
        if any(entry.outcome == "left" for entry in group):
            continue
        through = dict.fromkeys(name for entry in group for name in entry.through)
        key: tuple[str, bool] = (group[0].outcome, bool(through))
        counts[key] += 1
        passed.setdefault(key, {}).update(through)
    parts = []
    for (outcome, carried), times in sorted(counts.items()):
        names = list(passed[outcome, carried])
        through_words = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
        parts.append(f"{times} {OUTCOMES[outcome]}" + (f" through {through_words}" if names else ""))
    return ", ".join(parts)


def _plan(ledger: Ledger, page: Page, *, bare: bool) -> None:
    entries = [entry for entry in ledger.folded if bare or entry.is_batch_norm]
    if entries:
        rows = [(e.module or e.value, e.layer, " and ".join(e.into), ", ".join(e.through)) for e in entries]
        page.table(("folded", "kind", "into", "through"), rows)
    if ledger.merges:
        rows = [(", ".join(merge.modules), merge.kind, merge.into, "") for merge in ledger.merges]
        page.table(("merged", "kind", "into", ""), rows)


def _ending(report: ExportReport, page: Page, destination: str | None) -> None:
    verdict = report.check.verdict if report.check is not None else "pass"
    if verdict == "pass" and report.file is not None:
        file = report.file
        data = [f"weights in {file.data}"] if file.data else []
        facts = [size(file.bytes), *data, *([f"opset {file.opset}"] if file.opset else [])]
        page.line("Wrote", ", ".join([*facts, plural(file.nodes, "operator")]), subject=file.path)
    elif destination is None:
        page.line("Verdict", badge(verdict), "dry run: nothing was written")
    else:
        kept = f"kept as {report.file.path} (--keep-failed)" if report.file else "nothing was written"
        page.line("Verdict", badge(verdict), f"{kept}; {destination} is as it was")


def _int8(report: ExportReport, page: Page, *, verbose: bool) -> None:
    warnings = list(int8_warnings(report))
    for i, warning in enumerate(warnings if verbose else warnings[:1]):
        page.line("" if i else "Warning", warning)
    if len(warnings) > 1 and not verbose:
        page.line("", f"{plural(len(warnings) - 1, 'more layer')} like it: --verbose lists them")
    if verbose and report.layers:
        rows = [
            (layer.module or layer.value, f"{layer.after.largest:.3g}", f"{was.largest:.3g}" if was else "",
             f"{layer.after.spread:.3g}", f"{was.spread:.3g}" if was else "")
            for layer in report.layers
            for was in (layer.before,)
        ]  # fmt: skip
        page.table(("weights", "largest", "before", "spread", "before"), rows)


def _next(report: ExportReport | CheckReport, page: Page) -> None:
    for i, (what, command) in enumerate(next_steps(report)):
        page.line("" if i else "Next", f"{what}:")
        page.whole(f"  {command}")


def _left(ledger: Ledger, page: Page, *, verbose: bool) -> None:
    left = [entry for entry in ledger.left if verbose or entry.is_batch_norm]
    if not left:
        return
    gone, total = ledger.count()
    page.line("Left", f"{total - gone} of {total} BatchNorm" if total - gone else f"{len(left)} affines")
    shown = left if verbose else left[:_SHOWN]
    rows: dict[tuple[str, str, str, str], None] = {}
    for entry in shown:
        for refusal in entry.refusals:
            operator = f"({refusal.operator})" if refusal.operator not in ("", refusal.blocker) else ""
            by = " ".join(filter(None, (refusal.blocker, operator)))
            rows[entry.module or entry.value, entry.layer, refusal.reason, by or "itself"] = None
    page.table(("module", "kind", "reason", "blocked by"), list(rows))
    if len(left) > len(shown):
        page.line("", f"{len(left) - len(shown)} more: --verbose lists them")
    for reason in dict.fromkeys(refusal.reason for entry in shown for refusal in entry.refusals):
        why, way_out = REASONS[reason]
        page.line("", Text.assemble((reason, "bold"), f": {why}"))
        page.line("", f"  what you can do: {way_out}")
