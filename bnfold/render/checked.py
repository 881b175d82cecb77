"""What is printed of a verdict: outputs, how the file ran, what the user's data said, and the baseline."""

from __future__ import annotations

import math

from rich.text import Text

from bnfold.render.advice import chance, judged
from bnfold.render.page import STYLES, Page
from bnfold.render.words import error, number, plural
from bnfold.report import Accuracy, Adversarial, BaselineReport, CheckReport, OutputResult

#: Lines of outputs, problems, and flips (the first is the furthest from a tie) that are shown without --verbose.
_SHOWN, _PROBLEMS, _FLIPS = 20, 8, 3


def verdict_lines(check: CheckReport, page: Page, *, verbose: bool) -> None:
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
            f"ratio {number(output.ratio)} (limit {number(check.limit)})", badge(judged(output, check)),
        )  # fmt: skip
    if len(shown) > _SHOWN and not verbose:
        page.line("", f"{len(shown) - _SHOWN} more outputs with smaller ratios: --verbose lists them")
    _engines(check, page)
    if check.adversarial is not None:
        page.line("", _adversarial(check.adversarial))
    if check.accuracy is not None:
        _accuracy(check.accuracy, page, verbose=verbose)
    for note in check.notes:
        page.line("", f"note: {note}")
    problems = check.problems if verbose else check.problems[:_PROBLEMS]
    for problem in problems:
        page.line("", Text(f"problem: {problem}", STYLES[check.verdict]))
    if len(check.problems) > len(problems):
        page.line("", f"{len(check.problems) - len(problems)} more problems: --verbose lists them")
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


def badge(verdict: str) -> Text:
    """A verdict in its colour."""
    return Text(verdict.upper(), STYLES[verdict])


def _engines(check: CheckReport, page: Page) -> None:
    """Where the file ran and in what, where there is more to say than one provider's name."""
    if check.placement is not None and check.placement.elsewhere:
        page.line("", ", ".join(f"{plural(n, 'node')} on {name}" for name, n in check.placement.nodes.items()))
    if len(check.engines) > 1 or any(engine.options for engine in check.engines):
        for engine in check.engines:
            options = "".join(f" {key}={value}" for key, value in engine.options.items())
            rounding = f"computes in {engine.arithmetic} (unit roundoff {engine.unit_roundoff:.1e})"
            ratio = f"ratio {number(engine.ratio)} (limit {number(check.limit)})"
            page.line("", f"{engine.name}{options}", rounding, ratio, badge(engine.verdict))


def _adversarial(found: Adversarial) -> str:
    words = (
        f"adversarial: {plural(found.samples, 'sample')} after {found.steps} steps: worst ratio {number(found.ratio)}"
    )
    if found.peak < 1e-3:  # far from any overflow
        return words
    peak, before = f"{found.peak:.2g}", f"{found.peak_before:.2g}"
    return f"{words}, values up to {peak} of their dtype's range at '{found.peak_module}' (before: {before})"


def _accuracy(known: Accuracy, page: Page, *, verbose: bool) -> None:
    if known.output:
        page.line("", _classes(known), *_top5(known))
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


def _classes(known: Accuracy) -> str:
    flips = plural(known.flips, "flip")
    if known.before is None or known.after is None:
        return f"classes of {known.output} on {plural(known.samples, 'unlabelled sample')}: {flips}"
    what = plural(known.samples, "labelled sample")
    if known.labelled != known.samples:
        what = f"{known.labelled} labels of {plural(known.samples, 'sample')}"
    return f"top-1 on {what}: {known.before:.1%} before, {known.after:.1%} after, {flips}"


def _top5(known: Accuracy) -> list[str]:
    if known.top5_before is None or known.top5_after is None:
        return []
    return [f"top-5 {known.top5_before:.1%} and {known.top5_after:.1%}"]


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
    for note in baseline.notes:
        page.line("", f"note: {note}")
    if baseline.versions and (verbose or baseline.outcome == "regressed"):
        listed = ", ".join(f"{name} {then} -> {now}" for name, (then, now) in baseline.versions.items())
        page.line("", f"versions since: {listed}")
