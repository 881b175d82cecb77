"""Baselines: what an earlier run found, kept in a file that is committed, and how far a later one may be from it.

How far follows from the gate's own limits and from what is undecided in the data; there is nothing to choose:

- **Ratios.** A correct file has a ratio of about 1, and the gate fails it beyond its limit (4 at the outputs, 6 at the
  fold sites). Between 1 and the limit, chance moves it: other inputs, another processor or thread count, another
  version of the runtime. The square root of the limit, halfway from 1 to the limit as factors go, is allowed over the
  baseline or 1, whichever is more: a factor of 2, and 2.4 at the fold sites. Eight correct nets, each with 12 seeds of
  inputs, moved by 1.43 at most at the outputs, and by 2.6 at the sites as an earlier gate measured them (largest ratio
  over the smallest or 1).
- **SQNR** in dB is the same thing as a logarithm: ``20 log10 sqrt(limit)`` dB, 6 by default, under the baseline or
  under the unfolded model's own noise, whichever is lower.
- **Top-1 and top-5** may not fall, but for the samples that are undecided: those whose two largest logits are closer
  than the noise that the gate allows, so that each machine may decide them another way. On most data there are none.
- **Flips** may not become more, but for as many as are undecided.
- **RMS errors against targets**: two files that are ``d`` and ``d'`` (RMS) from their unfolded models differ by at most
  ``d + d'`` and by what separates those models, which is rounding too; so the error may grow by ``2 (d + d')``.

Ratios of another provider are shown and not judged. Accuracies on other data (by SHA-256 of the arrays) cannot be
compared, and that is a failure: a test whose data were swapped tests nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bnfold import store
from bnfold.errors import InputError, UsageError
from bnfold.files import require_file, there
from bnfold.report import BaselineReport, BaselineRow, CheckReport
from bnfold.report.plain import plain, versions

#: Of the file's format.
FORMAT = 1
_NUMBER, _NULL, _NOTHING = (int, float), type(None), object()
#: What its fields hold, and, where that is an object, the values in it.
_FIELDS: dict[str, tuple[Any, Any]] = {
    "provider": (str, ()), "versions": (dict, str), "ratios": (dict, (*_NUMBER, _NULL)),
    "site_ratio": ((*_NUMBER, _NULL), ()), "accuracy": ((dict, _NULL), object),
}  # fmt: skip
_ACCURACY: dict[str, tuple[Any, Any]] = {
    "data": ((str, _NULL), ()), "samples": (int, ()), "flips": (int, ()),
    "top1": ((*_NUMBER, _NULL), ()), "top5": ((*_NUMBER, _NULL), ()),
    "sqnr": (dict, (*_NUMBER, _NULL)), "difference": (dict, _NUMBER), "rmse": (dict, _NUMBER),
}  # fmt: skip
_CREATE = "Create it once with --update-baseline (pytest: --bnfold-update), look at it, and commit it"


def expect_baseline(path: Path | None, *, update: bool, sources: Sequence[Path] = ()) -> None:
    """Fails before anything is computed where the baseline could not be read or written in the end.

    Raises:
        InputError: it is missing or damaged, and not to be rewritten: one that a test creates for itself proves
            nothing.
        UsageError: ``update`` and no ``path``, or a path that is no .json file.
        ResourceError: it cannot be written.
    """
    if path is None and update:
        raise UsageError("--update-baseline rewrites a baseline, and none is named", hint="Add --baseline B.json")
    if path is None:
        return
    if path.suffix.lower() != ".json":
        raise UsageError("a baseline is a .json file", where=f"--baseline {path}")
    if update:
        store.check_destination(path, sources=sources)
    else:
        _read(path)


def judge_baseline(check: CheckReport, path: Path, *, update: bool) -> CheckReport:
    """``check`` with its baseline compared; a regression makes it a fail, unless that is to be rewritten (``update``).

    Raises:
        InputError: the baseline is missing or damaged, and not to be rewritten.
    """
    try:
        then = _read(path)
    except InputError:
        if not update:  # what is rewritten need not be readable
            raise
        then = None
    rows, notes, moved = _compare(then, check) if then is not None else ([], [], {})
    bad = [row for row in rows if row.regressed]
    outcome: Any = "regressed" if bad else "held"
    if update:
        outcome = "not written" if not check.passed else "created" if then is None else "updated"
    check = replace(check, baseline=BaselineReport(str(path), outcome, tuple(rows), tuple(notes), moved))
    if update or not bad:
        return check
    said = [
        f"baseline {path}: {row.what} {row.said(row.then)} then, {row.said(row.now)} now"
        + (f" (allowed {row.said(row.allowed)})" if row.allowed is not None else "")
        for row in bad
    ]
    return replace(check, verdict="fail", problems=(*said, *check.problems))


def write_baseline(check: CheckReport, path: Path) -> None:
    """Writes what a pass found as the baseline for later runs.

    Raises:
        ResourceError: it cannot be written.
    """
    accuracy, found = check.accuracy, None
    if accuracy is not None:
        found = {
            "data": accuracy.data, "samples": accuracy.samples, "top1": accuracy.after, "top5": accuracy.top5_after,
            "flips": accuracy.flips,
            "sqnr": {a.output: a.sqnr for a in accuracy.agreement if not math.isnan(a.sqnr)},
            "difference": {a.output: a.difference for a in accuracy.agreement},
            "rmse": {t.output: t.rmse_after for t in accuracy.targets if math.isfinite(t.rmse_after)},
        }  # fmt: skip
    facts = plain({
        "bnfold_baseline": FORMAT, "provider": check.provider, "versions": versions(), "ratios": _ratios(check),
        "site_ratio": check.site_ratio if check.sites else None, "accuracy": found,
    })  # fmt: skip
    with store.atomic(path) as staged:
        staged.write_text(json.dumps(facts, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _ratios(check: CheckReport) -> dict[str, float]:
    """The largest ratio of every output over the candidates; NaN is larger than any."""
    found: dict[str, float] = {}
    for output in check.outputs:
        name, ratio = output.output, output.ratio
        if name not in found or math.isnan(ratio) or ratio > found[name]:
            found[name] = ratio
    return found


def _read(path: Path) -> dict[str, Any]:
    if not there(path):
        raise InputError("there is no baseline yet", where=str(path), hint=_CREATE)
    require_file(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        fault = _fault(found)
    except (OSError, ValueError, RecursionError) as error:
        fault = f"this is no readable baseline ({error})"
    if fault is not None:
        raise InputError(fault, where=str(path), hint=_CREATE)
    read: dict[str, Any] = found
    return read


def _fault(found: Any) -> str | None:
    """How the content of a baseline differs from what ``write_baseline`` writes, in words."""
    version = found.get("bnfold_baseline") if isinstance(found, dict) else None
    if version is None:
        return "this is no baseline of bnfold"
    if version != FORMAT:
        return f"this is a baseline in format {version}, not {FORMAT}"
    if missing := sorted(set(_FIELDS) - set(found)):
        return f"the baseline lacks {', '.join(missing)}"
    accuracy = found["accuracy"]
    parts = [("", found, _FIELDS), ("accuracy.", accuracy, _ACCURACY)]
    for prefix, part, fields in parts if isinstance(accuracy, dict) else parts[:1]:
        for name, (kinds, inside) in fields.items():
            value = part.get(name, _NOTHING)
            held = value.values() if isinstance(value, dict) else ()
            if not isinstance(value, kinds) or not all(isinstance(item, inside) for item in held):
                return f"in the baseline, {prefix}{name} is damaged"
    if accuracy is not None and (lost := sorted(set(accuracy["rmse"]) - set(accuracy["difference"]))):
        return f"in the baseline, accuracy.difference of '{lost[0]}' is damaged"
    return None


def _compare(
    then: Mapping[str, Any], check: CheckReport
) -> tuple[list[BaselineRow], list[str], dict[str, tuple[str, str]]]:
    notes = []
    if then["provider"] != check.provider:
        notes.append(f"the ratios are {check.provider}'s, the baseline's {then['provider']}'s: not judged")
    rows = [*_compare_ratios(then, check, judged=not notes)]
    if then["accuracy"] is not None:
        rows += _compare_accuracy(then["accuracy"], check)
    elif check.accuracy is not None:
        notes.append("the baseline was made without data: accuracies have nothing to be compared with")
    now = versions()
    moved = {
        name: (str(then["versions"].get(name, "none")), now.get(name, "none"))
        for name in {**then["versions"], **now}
        if then["versions"].get(name) != now.get(name)
    }
    return rows, notes, moved


def _compare_ratios(then: Mapping[str, Any], check: CheckReport, *, judged: bool) -> Iterator[BaselineRow]:
    now = _ratios(check)
    for output, before in then["ratios"].items():
        what = f"ratio of '{output}'"
        yield _row(what, "ratio", before, now.get(output), math.sqrt(check.limit) * max(before or 1, 1), judged=judged)
    if then["site_ratio"] is not None and check.sites:
        allowed = math.sqrt(check.site_limit) * max(then["site_ratio"], 1)
        yield _row("ratio at the fold sites", "ratio", then["site_ratio"], check.site_ratio, allowed, judged=judged)


def _compare_accuracy(then: Mapping[str, Any], check: CheckReport) -> Iterator[BaselineRow]:
    now = check.accuracy
    if now is None:
        yield BaselineRow("accuracy: the baseline's run had data, this one has none; samples", "count",
                          then["samples"], None, None, True)  # fmt: skip
        return
    if now.data != then["data"]:
        yield BaselineRow("accuracy: the data are not the baseline's; samples", "count", then["samples"], now.samples,
                          None, True)  # fmt: skip
        return
    undecided = now.undecided / max(now.labelled, 1)
    for what, key, found in (("top-1", "top1", now.after), ("top-5", "top5", now.top5_after)):
        if then[key] is not None:
            yield _row(what, "share", then[key], found, then[key] - undecided, falls=True)
    yield _row("flips", "count", then["flips"], now.flips, max(then["flips"], now.undecided))
    apart = {a.output: a for a in now.agreement}
    for target in now.targets:
        if target.output in then["rmse"]:
            before = then["rmse"][target.output]
            allowed = before + 2 * (then["difference"][target.output] + apart[target.output].difference)
            yield _row(f"RMS error of '{target.output}'", "error", before, target.rmse_after, allowed)
    for output, sqnr in then["sqnr"].items():
        if output in apart:
            before = math.inf if sqnr is None else sqnr
            floor = min(before, -20 * math.log10(apart[output].noise)) - 20 * math.log10(math.sqrt(check.limit))
            yield _row(f"SQNR of '{output}'", "dB", before, apart[output].sqnr, floor, falls=True)


def _row(
    what: str, unit: Any, then: float | None, now: float | None, allowed: float, *, falls: bool = False,
    judged: bool = True,
) -> BaselineRow:  # fmt: skip
    """A row; what is no longer there, and NaN, have regressed."""
    if not judged:
        return BaselineRow(what, unit, then, now, None, False)
    worse = now is None or not (now >= allowed - 1e-12 if falls else now <= allowed)
    return BaselineRow(what, unit, then, now, allowed, worse)
