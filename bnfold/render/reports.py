"""What ``export``, ``fold`` and ``check`` print: where every affine went, what was judged, and what to do next."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import Any

from rich.text import Text

from bnfold.render.page import STYLES, Page
from bnfold.render.words import OUTCOMES, chance, count, error, int8_warnings, judged, next_steps, number, plural, size
from bnfold.report import REASONS, Accuracy, BaselineReport, CheckReport, ExportReport, Ledger, OutputResult, Port

#: Rows of a table or outputs, problems, and flips (the first is the furthest from a tie) shown without --verbose.
_SHOWN, _PROBLEMS, _FLIPS = 20, 8, 3
#: Keys of the weights, and inputs or outputs that are shown.
_LISTED, _PORTS = 12, 6


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
        _verdict(report.check, page, verbose=verbose)
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
    _verdict(report, page, verbose=verbose)
    page.line("Verdict", _badge(report.verdict))
    _next(report, page)


# -- parts -------------------------------------------------------------------------------------------------------------


def _badge(verdict: str) -> Text:
    return Text(verdict.upper(), STYLES[verdict])


def loaded(source: dict[str, Any], notes: Sequence[str], page: Page) -> None:
    """The first line of every report: the model."""
    weights = f", weights {source['weights']}" if source.get("weights") else ""
    page.line("Loaded", f"{count(source.get('parameters') or 0)} parameters{weights}", subject=source["source"])
    if left := source.get("left_out"):
        more = f" and {len(left) - _LISTED} more" if len(left) > _LISTED else ""
        what = f"left out of the weights, as no part of the model has them: {', '.join(left[:_LISTED])}{more}"
        notes = (what, *notes)
    page.notes(notes)


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
    operators, kept = f"{before} operators before, {after} after", len(ledger.merges)
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
        page.line("Merged", plural(fewer, "operator") + " fewer", subject=f"{layers} layers into {kept}")
    if ledger.scaled:
        most, scaled = max(entry.largest for entry in ledger.scaled), plural(len(ledger.scaled), "layer")
        page.line("Scaled", f"by powers of two, up to {most:g}", subject=f"{scaled} equalised")


def _directions(ledger: Ledger) -> str:
    passed: dict[tuple[str, bool], list[list[str]]] = {}
    for group in ledger.grouped():
        if all(entry.outcome != "left" for entry in group):
            through = [name for entry in group for name in entry.through]
            passed.setdefault((group[0].outcome, bool(through)), []).append(through)
    parts = []
    for (outcome, _), each in sorted(passed.items()):
        names = list(dict.fromkeys(chain(*each)))
        through_words = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
        parts.append(f"{len(each)} {OUTCOMES[outcome]}" + (f" through {through_words}" if names else ""))
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
        page.line("Verdict", _badge(verdict), "dry run: nothing was written")
    else:
        kept = f"kept as {report.file.path} (--keep-failed)" if report.file else "nothing was written"
        page.line("Verdict", _badge(verdict), f"{kept}; {destination} is as it was")


def _int8(report: ExportReport, page: Page, *, verbose: bool) -> None:
    warnings = list(int8_warnings(report))
    for i, warning in enumerate(warnings if verbose else warnings[:1]):
        page.line("" if i else "Warning", warning)
    if not verbose:
        page.more(len(warnings) - 1, f" layer{'s' * (len(warnings) > 2)} like it")
    if verbose and report.layers:
        rows = [
            (layer.module or layer.value, f"{layer.after.largest:.3g}", f"{was.largest:.3g}" if was else "",
             f"{layer.after.spread:.3g}", f"{was.spread:.3g}" if was else "")
            for layer, was in ((layer, layer.before) for layer in report.layers)
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
    page.more(len(left) - len(shown))
    for reason in dict.fromkeys(refusal.reason for entry in shown for refusal in entry.refusals):
        why, way_out = REASONS[reason]
        page.line("", Text.assemble((reason, "bold"), f": {why}"))
        page.line("", f"  what you can do: {way_out}")


def _verdict(check: CheckReport, page: Page, *, verbose: bool) -> None:
    """What was judged, and what speaks against it."""
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
            f"ratio {number(output.ratio)} (limit {number(check.limit)})", _badge(judged(output, check)),
        )  # fmt: skip
    if not verbose:
        page.more(len(shown) - _SHOWN, " outputs with smaller ratios")
    _engines(check, page)
    if (found := check.adversarial) is not None:
        searched = f"adversarial: {plural(found.samples, 'sample')} after {found.steps} steps"
        # Below a thousandth it is far from any overflow.
        reach = f", values up to {found.peak:.2g} of their dtype's range at '{found.peak_module}' (before: "
        reach = "" if found.peak < 1e-3 else f"{reach}{found.peak_before:.2g})"
        page.line("", f"{searched}: worst ratio {number(found.ratio)}{reach}")
    if check.accuracy is not None:
        _accuracy(check.accuracy, page, verbose=verbose)
    page.notes(check.notes)
    problems = check.problems if verbose else check.problems[:_PROBLEMS]
    for problem in problems:
        page.line("", Text(f"problem: {problem}", STYLES[check.verdict]))
    page.more(len(check.problems) - len(problems), " problems")
    if check.baseline is not None:
        _baseline(check.baseline, page, verbose=verbose)


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


def _engines(check: CheckReport, page: Page) -> None:
    """Where the file ran and in what, where there is more to say than one provider's name."""
    if check.placement is not None and check.placement.elsewhere:
        page.line("", ", ".join(f"{plural(n, 'node')} on {name}" for name, n in check.placement.nodes.items()))
    if len(check.engines) > 1 or any(engine.options for engine in check.engines):
        for engine in check.engines:
            options = "".join(f" {key}={value}" for key, value in engine.options.items())
            rounding = f"computes in {engine.arithmetic} (unit roundoff {engine.unit_roundoff:.1e})"
            ratio = f"ratio {number(engine.ratio)} (limit {number(check.limit)})"
            page.line("", f"{engine.name}{options}", rounding, ratio, _badge(engine.verdict))


def _accuracy(known: Accuracy, page: Page, *, verbose: bool) -> None:
    if known.output:
        flips, said = plural(known.flips, "flip"), plural(known.samples, "labelled sample")
        if known.before is None:
            said = f"classes of {known.output} on {plural(known.samples, 'unlabelled sample')}: {flips}"
        else:
            if known.labelled != known.samples:
                said = f"{known.labelled} labels of {plural(known.samples, 'sample')}"
            said = f"top-1 on {said}: {known.before:.1%} before, {known.after:.1%} after, {flips}"
        top5 = "" if known.top5_before is None else f"top-5 {known.top5_before:.1%} and {known.top5_after:.1%}"
        page.line("", said, top5)
        if known.at_chance:
            page.line("Warning", Text(chance(known), STYLES["fail"]))
    for target in known.targets:
        page.line(
            "", f"{target.output} against its targets: RMS error {target.rmse_before:.4g} before, "
            f"{target.rmse_after:.4g} after", f"mean absolute {target.mae_before:.4g} and {target.mae_after:.4g}",
        )  # fmt: skip
    for found in known.agreement:
        if found.max == 0:
            page.line("", f"{found.output}: {plural(found.samples, 'sample')} bitwise equal to the unfolded model's")
            continue
        ratio = "" if math.isnan(found.worst_ratio) else f", {number(found.worst_ratio)} times the noise"
        page.line(
            "", f"{found.output} on {plural(found.samples, 'sample')}: SQNR {found.sqnr:.1f} dB",
            f"half are off by {error(found.p50)}, 90 % by {error(found.p90)}, 99 % by {error(found.p99)}",
            f"sample {found.worst} by {error(found.max)}{ratio}",
        )  # fmt: skip
    for flip in known.flipped if verbose else known.flipped[:_FLIPS]:
        page.line(
            "", f"flip: sample {flip.sample} from class {flip.before} to {flip.after}",
            f"{flip.margin:.2g} apart, {number(flip.units)} times the noise",
        )  # fmt: skip
    if known.undecided:
        page.line("", f"{known.undecided} undecided: their two largest logits are closer than the noise allowed")


def _baseline(baseline: BaselineReport, page: Page, *, verbose: bool) -> None:
    """What became of the baseline, and a table where something went too far or everything is asked for."""
    words = {
        "held": f"{plural(len(baseline.rows), 'figure')} held",
        "regressed": f"{plural(len(baseline.regressed), 'figure')} worse than allowed",
        "created": "created: look at it and commit it",
        "updated": "updated",
        "not written": "not written: the verdict is no pass",
    }[baseline.outcome]
    styles = {"regressed": STYLES["fail"], "not written": STYLES["note"]}
    page.line("Baseline", Text(words, styles.get(baseline.outcome, "")), subject=baseline.path)
    rows = [row for row in baseline.rows if verbose or row.regressed or baseline.outcome == "regressed"]
    if rows:
        page.table(
            ("what", "baseline", "now", "allowed", ""),
            [
                (row.what, row.said(row.then), row.said(row.now),
                 "" if row.allowed is None else row.said(row.allowed), "WORSE" if row.regressed else "")
                for row in rows
            ],
        )  # fmt: skip
    page.notes(baseline.notes)
    if baseline.versions and (verbose or baseline.outcome == "regressed"):
        listed = ", ".join(f"{name} {then} -> {now}" for name, (then, now) in baseline.versions.items())
        page.line("", f"versions since: {listed}")
