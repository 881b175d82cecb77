"""What ``export``, ``fold``, ``check`` and ``inspect`` print."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.text import Text

from bnfold.render.accuracy import accuracy_lines, baseline_lines
from bnfold.render.advice import int8_warnings, judged, next_steps
from bnfold.render.page import STYLES, Page
from bnfold.render.running import running_lines
from bnfold.render.words import count, error, number, plural, size
from bnfold.report import REASONS, CheckReport, Entry, ExportReport, LayerRange, Ledger, OutputResult, Port

#: Rows of a table, or lines of outputs, that are shown without --verbose.
_SHOWN, _PROBLEMS = 20, 8
_LISTED = 12
_PORTS = 6


def export_report(report: ExportReport, page: Page, *, destination: str, dry_run: bool, verbose: bool) -> None:
    """What ``export`` and ``fold`` print."""
    loaded(report.source, report.notes, page)
    _ports(report.interface, page)
    _folded(report, page)
    if verbose:
        _plan(report.ledger, page, bare=True)
    if report.check is None:
        page.line("Checked", "nothing (--no-check)")
    else:
        _checked(report.check, page, verbose=verbose)
    _ending(report, page, destination, dry_run)
    _next(report, page)
    _left(report.ledger, page, verbose=verbose)
    _int8(report, page, verbose=verbose)


def fold_plan(report: ExportReport, page: Page, *, verbose: bool) -> None:
    """What ``inspect`` prints of the fold plan: where every BatchNorm goes."""
    _folded(report, page)
    _plan(report.ledger, page, bare=verbose)
    _left(report.ledger, page, verbose=verbose)
    _int8(report, page, verbose=verbose)


def check_report(source: dict[str, Any], path: str, report: CheckReport, page: Page, *, verbose: bool) -> None:
    """What ``check`` prints."""
    loaded(source, (), page)
    _ports(report.interface, page)
    page.line("Against", subject=path)
    _checked(report, page, verbose=verbose)
    page.line("Verdict", _verdict(report.verdict))
    _next(report, page)


def problems(report: CheckReport) -> str:
    """The verdict that is no pass in one line, for those who see nothing else."""
    word = "the gate failed" if report.verdict == "fail" else "no verdict"
    return f"{word}: {'; '.join(report.problems[:3])}" + ("; ..." if len(report.problems) > 3 else "")


# -- parts -------------------------------------------------------------------------------------------------------------


def loaded(source: dict[str, Any], notes: Sequence[str], page: Page) -> None:
    """The first line of every report: the model."""
    page.line("Loaded", _model(source), subject=source["source"])
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


def _model(source: dict[str, Any]) -> str:
    parts = [f"{count(source.get('parameters') or 0)} parameters"]
    return ", ".join([*parts, *([f"weights {source['weights']}"] if source.get("weights") else [])])


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
    words = {
        "backward": "into the layer before", "forward": "into the layer after", "merged": "with a parallel branch",
    }  # fmt: skip
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
        parts.append(f"{times} {words[outcome]}" + (f" through {through_words}" if names else ""))
    return ", ".join(parts)


def _plan(ledger: Ledger, page: Page, *, bare: bool) -> None:
    entries = [entry for entry in ledger.folded if bare or entry.is_batch_norm]
    if entries:
        rows = [(_where(entry), entry.layer, " and ".join(entry.into), ", ".join(entry.through)) for entry in entries]
        page.table(("folded", "kind", "into", "through"), rows)
    if ledger.merges:
        rows = [(", ".join(merge.modules), merge.kind, merge.into, "") for merge in ledger.merges]
        page.table(("merged", "kind", "into", ""), rows)


def _where(entry: Entry) -> str:
    return entry.module or entry.value


def _checked(check: CheckReport, page: Page, *, verbose: bool) -> None:
    batches = " ".join(str(size) for size in check.batches if size)  # 0: the inputs have no axis of samples
    page.line("Checked", check.provider, f"{check.samples} samples", f"batches {batches}" if batches else "fixed sizes")
    if check.sites:
        worst = max(check.sites, key=lambda site: max(site.ratio, site.channel_ratio))
        count = len({site.value for site in check.sites})
        ratio, limit = number(check.site_ratio), number(check.site_limit)
        page.line("", f"{plural(count, 'fold site')}: worst ratio {ratio} (limit {limit}) at '{worst.module}'")
    shown = list(check.outputs) if verbose else _worst_candidates(check)
    for output in shown if verbose else shown[:_SHOWN]:
        candidate = f" [{output.candidate}]" if verbose else ""
        page.line(
            "", f"{output.output}{candidate}: noise {error(output.noise)}", f"error {error(output.error)}",
            f"ratio {number(output.ratio)} (limit {number(check.limit)})", _verdict(judged(output, check)),
        )  # fmt: skip
    if len(shown) > _SHOWN and not verbose:
        page.line("", f"{len(shown) - _SHOWN} more outputs with smaller ratios: --verbose lists them")
    running_lines(check, page)
    accuracy_lines(check, page, verbose=verbose)
    for note in check.notes:
        page.line("", f"note: {note}")
    problems = check.problems if verbose else check.problems[:_PROBLEMS]
    for problem in problems:
        page.line("", Text(f"problem: {problem}", STYLES[check.verdict]))
    if len(check.problems) > len(problems):
        page.line("", f"{len(check.problems) - len(problems)} more problems: --verbose lists them")
    baseline_lines(check.baseline, page, verbose=verbose)


def _worst_candidates(check: CheckReport) -> list[OutputResult]:
    """For every output the candidate that is furthest off; the furthest output first where there are too many."""

    def badness(output: OutputResult) -> tuple[bool, float]:
        return judged(output, check) != "pass", math.inf if math.isnan(output.ratio) else output.ratio

    worst: dict[str, OutputResult] = {}
    for output in check.outputs:
        if output.output not in worst or badness(output) > badness(worst[output.output]):
            worst[output.output] = output
    found = list(worst.values())
    return found if len(found) <= _SHOWN else sorted(found, key=badness, reverse=True)


def _verdict(verdict: str) -> Text:
    return Text(verdict.upper(), STYLES[verdict])


def _ending(report: ExportReport, page: Page, destination: str, dry_run: bool) -> None:
    verdict = report.check.verdict if report.check is not None else "pass"
    if verdict == "pass" and report.file is not None:
        file = report.file
        data = [f"weights in {file.data}"] if file.data else []
        facts = [size(file.bytes), *data, *([f"opset {file.opset}"] if file.opset else [])]
        page.line("Wrote", ", ".join([*facts, plural(file.nodes, "operator")]), subject=file.path)
    elif dry_run:
        page.line("Verdict", _verdict(verdict), "dry run: nothing was written")
    else:
        kept = f"kept as {report.file.path} (--keep-failed)" if report.file else "nothing was written"
        page.line("Verdict", _verdict(verdict), f"{kept}; {destination} is as it was")


def _int8(report: ExportReport, page: Page, *, verbose: bool) -> None:
    warnings = list(int8_warnings(report))
    for i, warning in enumerate(warnings if verbose else warnings[:1]):
        page.line("" if i else "Warning", warning)
    if len(warnings) > 1 and not verbose:
        page.line("", f"{plural(len(warnings) - 1, 'more layer')} like it: --verbose lists them")
    if verbose and report.layers:
        rows = [(layer.module or layer.value, *_spreads(layer)) for layer in report.layers]
        page.table(("weights", "largest", "before", "spread", "before"), rows)


def _spreads(layer: LayerRange) -> tuple[str, str, str, str]:
    before, after = layer.before, layer.after
    was = (f"{before.largest:.3g}", f"{before.spread:.3g}") if before else ("", "")
    return f"{after.largest:.3g}", was[0], f"{after.spread:.3g}", was[1]


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
            rows[_where(entry), entry.layer, refusal.reason, by or "itself"] = None
    page.table(("module", "kind", "reason", "blocked by"), list(rows))
    if len(left) > len(shown):
        page.line("", f"{len(left) - len(shown)} more: --verbose lists them")
    for reason in dict.fromkeys(refusal.reason for entry in shown for refusal in entry.refusals):
        why, way_out = REASONS[reason]
        page.line("", Text.assemble((reason, "bold"), f": {why}"))
        page.line("", f"  what you can do: {way_out}")
