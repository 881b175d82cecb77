"""What the user's data said, and how a run compares with its baseline."""

from __future__ import annotations

import math

from rich.text import Text

from bnfold.render.page import STYLES, Page
from bnfold.render.words import error, number, plural
from bnfold.report import Accuracy, BaselineReport, CheckReport

#: Flips that are listed without --verbose; the first is the furthest from a tie.
_FLIPS = 3


def accuracy_lines(check: CheckReport, page: Page, *, verbose: bool) -> None:
    """Classes, targets and agreement on the user's data."""
    known = check.accuracy
    if known is None:
        return
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


def chance(known: Accuracy) -> str:
    """What top-1 at the level of guessing means."""
    return (
        f"the unfolded model itself guesses: {known.before:.1%} of {known.classes} classes. The weights, the data, "
        "their labels or their normalisation are not those that it was trained with, and what was compared says little"
    )


def baseline_lines(baseline: BaselineReport | None, page: Page, *, verbose: bool) -> None:
    """What became of the baseline, and a table where something went too far or everything is asked for."""
    if baseline is None:
        return
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
