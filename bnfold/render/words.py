"""Numbers, outcomes and results in words: a verdict for one output, what to do next, what to look out for."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from bnfold.report import Accuracy, CheckReport, ExportReport, LayerRange, OutputResult, SiteResult
from bnfold.report.model import SPREAD_LIMIT

#: Where an affine went, by its outcome.
OUTCOMES = {
    "backward": "into the layer before", "forward": "into the layer after", "merged": "with a parallel branch",
    "left": "still there",
}  # fmt: skip
#: Of verdicts: colour is not all that tells.
SIGNS = {"pass": "✓", "fail": "✗", "inconclusive": "?", "not judged": "–", "error": "✗"}


def _scaled(value: float, units: dict[str, float], small: str) -> str:
    """Three digits in the first unit that the value reaches; ``small`` where it reaches none."""
    for unit, size in units.items():
        if value >= size:
            return f"{value / size:{'.3g' if value < 999.5 * size else '.0f'}} {unit}"
    return small


def count(number: int) -> str:
    """A count with its unit, as 61 K."""
    return _scaled(number, {"G": 1e9, "M": 1e6, "K": 1e3}, str(number))


def size(count: int) -> str:
    """Bytes with their unit."""
    return _scaled(count, {"GB": 1e9, "MB": 1e6, "KB": 1e3}, f"{count} bytes")


def seconds(value: float) -> str:
    """A time in the unit that suits it."""
    return _scaled(value, {"s": 1.0, "ms": 1e-3}, f"{value * 1e6:.3g} µs")


def number(value: float) -> str:
    """A ratio in two digits, three where it is large."""
    return f"{value:.2g}" if math.isfinite(value) and value < 100 else f"{value:.3g}"


def error(value: float) -> str:
    """A relative error."""
    return f"{value:.1e}" if value else "0"


def plural(count: int, word: str) -> str:
    """``3 folds``, ``1 fold``."""
    return f"{count} {word}{'s' * (count != 1)}"


def milliseconds(seconds: float) -> str:
    """A time that is compared with others."""
    return f"{seconds * 1e3:.3g} ms"


def known(value: Any, said: Callable[[Any], str], unknown: str = "–") -> str:
    """What ``said`` makes of a value; ``unknown`` where there is none."""
    return unknown if value is None else said(value)


def verdict(outcome: str) -> str:
    """A verdict with its sign."""
    return f"{SIGNS[outcome]} {outcome}"


def judged(output: OutputResult, check: CheckReport) -> str:
    """One output's own verdict. What a problem names is no pass, whatever its ratio: integers have none."""
    if output.ratio > check.limit:
        return "fail"
    if math.isnan(output.ratio):  # nothing finite to compare
        return "inconclusive"
    return check.verdict if check.verdict != "fail" or problem_of(output, check) else "pass"


def site_verdict(site: SiteResult, check: CheckReport) -> str:
    """Whether a fold site is within both limits."""
    return "pass" if site.ratio <= check.limit and site.channel_ratio <= check.site_limit else "fail"


def problem_of(output: OutputResult, check: CheckReport) -> str | None:
    """The first of the problems that names an output of a candidate."""
    where = f"{output.candidate}, output '{output.output}'"
    return next((problem for problem in check.problems if problem.startswith(where)), None)


def chance(known: Accuracy) -> str:
    """What top-1 at the level of guessing means."""
    return (
        f"the unfolded model itself guesses: {known.before:.1%} of {known.classes} classes. The weights, the data, "
        "their labels or their normalisation are not those that it was trained with, and what was compared says little"
    )


def int8_warnings(report: ExportReport) -> Iterator[str]:
    """A line for every layer that folding makes hopeless for per-tensor int8, the worst first."""
    spoiled = [layer for layer in report.layers if layer.spoiled]
    for layer in sorted(spoiled, key=lambda layer: -_spread(layer)[0]):
        (after, before, side), name = _spread(layer), layer.module or layer.value
        folded = [e.module or e.value for e in report.ledger.folded if name in e.into]
        by = f"folding {' and '.join(folded)} into it" if folded else "folding"
        was = "" if before is None else f" ({before:.3g} before)"
        way = "give every output channel a step of its own" if side == "output" else "keep it in float16 or float32"
        yield (
            f"{name}: {by} makes per-tensor int8 hopeless: its widest {side} channel is {after:.3g} times the typical "
            f"one{was}, which is left {127 / after:.2g} of 127 steps; {way}"
        )


def _spread(layer: LayerRange) -> tuple[float, float | None, str]:
    """What is spread too far after folding, the same before, and which channels those are."""
    before, after = layer.before, layer.after
    if after.input_spread > max(SPREAD_LIMIT, after.spread):
        return after.input_spread, None if before is None else before.input_spread, "input"
    return after.spread, None if before is None else before.spread, "output"


def next_steps(report: ExportReport | CheckReport) -> list[tuple[str, str]]:
    """What for, and the command (for a model given in Python, the call); none where nothing is wrong or judged."""
    check = report.check if isinstance(report, ExportReport) else report
    if check is None or check.passed:
        return []
    kind, suffix = report.kind, ".pt2" if report.kind == "fold" else ".onnx"
    asked = Path(report.source.get("given", {}).get("output") or f"net{suffix}")
    if isinstance(report, CheckReport):
        file, kept = report.file or ("" if check.engines else "net.onnx"), True  # a runner needs none
    else:
        kept = report.file is not None
        file = report.file.path if report.file is not None else str(asked.with_stem(f"{asked.stem}.failed"))
    again = _call(report.source, kind, file if kind == "check" else str(asked))
    steps = []
    if check.verdict == "inconclusive":
        more = str(max(64, 2 * check.samples))
        steps.append(("judge it on more samples, and real ones", again(data="samples.npz", samples=more)))
    if not kept:
        steps.append(("keep the file that failed", again(keep_failed="")))
    if _accuracy_alone(check):
        return [("see which samples changed, and by how much", again(verbose=""))]
    file_stands = any(e.verdict == "fail" for e in check.engines[1:]) and check.engines[0].verdict == "pass"
    if suffix == ".onnx" and check.verdict == "fail" and file and not file_stands:
        steps.append(("find the first module that goes wrong", _call(report.source, "bisect", file)()))
    if suffix == ".onnx":
        steps.append(("see every candidate and every output", _call(report.source, "check", file)(verbose="")))
    return steps


def _accuracy_alone(check: CheckReport) -> bool:
    """Whether every value is right and only what was counted on the data is worse: no module is at fault then."""
    numbers = [o.ratio <= check.limit for o in check.outputs]
    numbers += [site_verdict(site, check) == "pass" for site in check.sites]
    worse = check.accuracy is not None and check.accuracy.far_flips > 0
    worse |= check.baseline is not None and bool(check.baseline.regressed)
    return check.verdict == "fail" and worse and all(numbers) and not any(e.verdict == "fail" for e in check.engines)


def _call(source: Mapping[str, Any], kind: str, file: str) -> Callable[..., str]:
    """How a command is run again with more options: on the command line, or in Python where it came from there.

    What the command line was given is kept, as far as ``kind`` takes it; without it only the model is known.
    """
    given = source.get("given", {})
    weights = [["--weights", str(source["weights"])]] if source.get("weights") else []
    known: list[list[str]] = given.get("options", {}).get(kind, weights)

    def command(**options: str) -> str:
        more = {f"--{name.replace('_', '-')}": [value] if value else [] for name, value in options.items()}
        if any(group[0] == "--data" for group in known):
            more.pop("--data", None)  # real samples are there already
        words = [str(given.get("source", source["source"]))]
        words += [word for group in known if group[0] not in more for word in group]
        words = [kind, *filter(None, [file]), *words] if kind in ("check", "bisect") else [kind, *words, "-o", file]
        for name, value in more.items():
            words += [name, *value]
        return "python -m bnfold " + shlex.join(words)

    def python(**options: str) -> str:
        known = {"data": "samples", "samples": options.get("samples", ""), "keep_failed": "True"}
        words = [f"{name}={known[name]}" for name in options if name in known]
        function = "pipeline.save_folded" if kind == "fold" else kind
        given = [repr(file or None), "model"] if kind in ("check", "bisect") else ["model", repr(file)]
        return f"bnfold.{function}({', '.join([*given, 'args', *words])})"

    return command if "weights" in source else python  # which only what was loaded from a file has
