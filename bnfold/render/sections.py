"""The sections of a page: text, tables and lists of facts, made of results whatever fields they have."""

from __future__ import annotations

import math
import platform
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from statistics import median, quantiles
from typing import Any

from bnfold._version import __version__
from bnfold.render import words
from bnfold.render.graph import MISSING, OPERATORS, legend, operator_types, picture
from bnfold.render.plots import ROWS, NormRow, histogram_plot, norm_plot, site_plot, weight_plot
from bnfold.render.words import chance, int8_warnings, judged, next_steps, site_verdict
from bnfold.report import REASONS, CalibrationReport, CheckReport, Diagnosis, ExportReport, LayerRange, Port
from bnfold.report.plain import versions

#: What a check says in places of its own; whatever else a later version finds out has a section under its name.
_PLACED = {"outputs", "sites", "accuracy", "source", "problems", "notes", "interface"}
#: Problems that are shown at once.
_SHOWN = 8
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
    lists = ((label(each.name), getattr(result, each.name)) for each in fields(result))
    tables = [("table", table(named, items)) for named, items in lists if _is_list(items)]
    return section(name, title, *before, ("facts", facts(result)), *tables)


def _is_list(value: Any) -> bool:
    """Whether it holds results."""
    return isinstance(value, (list, tuple)) and bool(value) and is_dataclass(value[0])


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
        elif value is not None and not _is_list(value):
            found.append((named, _value(field.name, value)))
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


# -- what a model that was judged or folded has ------------------------------------------------------------------------


def problem_section(report: ExportReport | CheckReport, check: CheckReport) -> Iterator[Section]:
    """What is wrong, and what to do next; nothing where the verdict is a pass."""
    if not check.passed:
        steps = [(f"To {what}:", command) for what, command in next_steps(report)]
        shown, more = list(check.problems[:_SHOWN]), list(check.problems[_SHOWN:])
        drawn = histogram_plot(check)
        yield section(
            "problems", "Problems", ("alert", shown), ("more", more), ("steps", steps),
            ("text", drawn and "How many elements are off by how many times their noise, on all inputs:"),
            ("plot", drawn),
        )  # fmt: skip


def judged_sections(check: CheckReport) -> Iterator[Section]:
    """What was judged and the outputs, accuracy, and whatever else the check found out."""
    rows = [
        (o.output, words.verdict(judged(o, check)), words.number(o.ratio), o.candidate, words.error(o.noise),
         words.error(o.error))
        for o in check.outputs
    ]  # fmt: skip
    facts = [
        ("runs on", check.provider), ("samples", f"{check.samples}"),
        ("batch sizes", ", ".join(map(str, check.batches))), ("fold sites", f"{len({s.value for s in check.sites})}"),
        ("limits", f"{check.limit:g} times the noise at outputs, {check.site_limit:g} at fold sites"),
    ]  # fmt: skip
    text = (
        "Truth is the unfolded model in float64. Noise is what rounding every constant once does to an element, and "
        "for what runs in its own dtype what the unfolded model's own arithmetic is off by. Ratio is error over noise, "
        "in RMS over the worst sample. Noise and error are relative, medians over the elements."
    )
    heads = ("output", "verdict", "ratio", "candidate", "noise", "error")
    yield section(
        "judged", "What was judged", ("text", text), ("facts", facts),
        ("table", Table("Outputs", heads, rows)), ("notes", list(check.notes)),
    )  # fmt: skip
    if check.accuracy is not None:
        warning = [chance(check.accuracy)] if check.accuracy.at_chance else []
        yield of_result("accuracy", "Accuracy on real data", check.accuracy, ("alert", warning))
    for field in fields(check):
        found, title = getattr(check, field.name), label(field.name).capitalize()
        if field.name not in _PLACED and is_dataclass(found):
            yield of_result(field.name, title, found)
        elif field.name not in _PLACED and _is_list(found):
            yield section(field.name, title, ("table", table(title, found)))


def fold_sections(report: ExportReport) -> Iterator[Section]:
    """Where every affine went, what stays and why, and what became one."""
    ledger = report.ledger
    counts = Counter(words.OUTCOMES[entry.outcome] for entry in ledger.batch_norms)
    facts = [(f"BatchNorms: {where}", str(count)) for where, count in counts.items()]
    rows = [
        (e.module or e.value, ", ".join(e.into) or "nothing: it is the identity", ", ".join(e.through),
         words.OUTCOMES[e.outcome], e.layer)
        for e in ledger.folded
    ]  # fmt: skip
    merges = [
        (m.into, m.kind, ", ".join(m.modules), str(m.operators), words.count(m.multiply_adds)) for m in ledger.merges
    ]
    yield section(
        "folds", "Folds by module", ("facts", facts), ("notes", list(report.notes)),
        ("table", Table("Where each affine went", ("module", "into", "through", "direction", "kind"), rows, (0, 1, 2))),
        ("text", "" if ledger.entries else "The model has no BatchNorm and no other per-channel affine."),
    )  # fmt: skip
    if ledger.left:
        left = [(entry, refusal) for entry in ledger.left for refusal in entry.refusals]
        rows = [(e.module or e.value, r.reason, r.blocker or "itself", r.operator, e.layer) for e, r in left]
        heads = ("module", "reason", "blocked by", "operator", "kind")
        caption = "Why each stays, a row per direction"
        yield section(
            "left", "What stays, and why", ("table", Table(caption, heads, [*dict.fromkeys(rows)], (0, 1, 2, 3))),
            ("reasons", [(reason, *REASONS[reason]) for reason in dict.fromkeys(r.reason for _, r in left)]),
        )  # fmt: skip
    if merges:
        heads = ("into", "kind", "layers", "operators fewer", "multiply-adds fewer")
        yield section("merges", "Merges", ("table", Table("Layers that became one", heads, merges, (0, 2))))


def graph_sections(report: ExportReport) -> Iterator[Section]:
    """The operators in a picture, and of which kinds there are how many."""
    if not report.graph:
        return
    check, count = report.check, sum(operator.before for operator in report.graph)
    wrong = {s.module for s in check.sites if s.module and site_verdict(s, check) == "fail"} if check else set[str]()
    drawn = picture(report.graph, wrong)
    boxes = f" Of {count} operators, a box is a module; the page can be made larger." if count > OPERATORS else ""
    text = f"Each operator over its module's name; {legend(report.graph, wrong)}.{boxes}" if drawn else MISSING
    rows = operator_types(report.graph)
    yield section(
        "graph", "Operators before and after",
        ("table", Table("Kinds of operators", ("operator", "before", "after"), rows)), ("text", text), ("graph", drawn),
    )  # fmt: skip


def site_sections(check: CheckReport | None) -> Iterator[Section]:
    """The errors at the fold sites, where there are any."""
    if check is None or not check.sites:
        return
    rows = [
        (s.module or s.value, words.verdict(site_verdict(s, check)),
         words.number(s.ratio), words.number(s.channel_ratio), s.candidate)
        for s in check.sites
    ]  # fmt: skip
    text = "At every fold and merge the folded value against the value it replaces, over all and for the worst element."
    yield section(
        "sites", "Error per layer against the noise", ("text", text + _capped(len({s.value for s in check.sites}))),
        ("plot", site_plot(check)),
        ("table", Table("Fold sites", ("module", "verdict", "ratio", "worst element", "candidate"), rows)),
    )  # fmt: skip


def range_sections(report: ExportReport, *, norms: bool = True) -> Iterator[Section]:
    """Weights before and after folding; scale and shift of the BatchNorms."""
    if report.layers:
        text = (
            "Per-tensor int8 has one step for a whole weight: a channel much narrower than the widest is left few "
            "steps. The spread is the widest channel over the median one; above 16 a typical channel keeps fewer than "
            "8 of 127 steps. What a layer reads is estimated from the BatchNorm in front: beta, and six gamma to "
            "either side."
        )
        heads = ("layer", "channels", "dead", "largest before", "after", "spread before", "after", "of inputs", "reads")
        yield section(
            "ranges", "Weight ranges before and after folding", ("text", text + _capped(len(report.layers))),
            ("alert", [*int8_warnings(report)]), ("plot", weight_plot(report.layers)),
            ("table", Table("Largest weights of the channels", heads, [_range(layer) for layer in report.layers])),
        )  # fmt: skip
    if report.norms and norms:
        rows = [(norm.module or norm.value, _five(norm.scale), _five(norm.shift)) for norm in report.norms]
        yield norm_section(rows)


def norm_section(rows: Sequence[NormRow]) -> Section:
    """Scale and shift of every BatchNorm in a picture."""
    text = (
        "What each BatchNorm multiplies its channels with and what it adds: the line is the range over the "
        "channels, the bar the middle half, the tick the median."
    )
    title = "Scale and shift of every BatchNorm"
    return section("norms", title, ("text", text + _capped(len(rows))), ("plot", norm_plot(rows)))


def _five(values: Sequence[float]) -> tuple[float, ...]:
    """Minimum, quartiles and maximum of the finite values."""
    finite = [value for value in values if math.isfinite(value)]
    if len(finite) < 2:
        return tuple(finite or [0.0]) * 5
    low, _, high = quantiles(finite, n=4, method="inclusive")
    return min(finite), low, median(finite), high, max(finite)


def _range(layer: LayerRange) -> tuple[str, ...]:
    before, after = layer.before, layer.after
    reads = f"{layer.reads[0]:.3g} to {layer.reads[1]:.3g}" if layer.reads else "not known"
    return (
        layer.module or layer.value, str(after.channels), str(after.dead),
        f"{before.largest:.3g}" if before else "new", f"{after.largest:.3g}",
        f"{before.spread:.3g}" if before else "new", f"{after.spread:.3g}", f"{after.input_spread:.3g}", reads,
    )  # fmt: skip


def origin_section(report: ExportReport | CheckReport | Diagnosis | CalibrationReport) -> Section:
    """The model, the file, and the versions of what ran."""
    source = report.source
    facts = [
        ("made at", source.get("date")), ("by", source.get("command")),
        ("model", source.get("source")), ("weights", source.get("weights")),
        ("SHA-256 of the model", source.get("sha256")),
        ("parameters", words.count(source["parameters"]) if source.get("parameters") else None),
    ]  # fmt: skip
    if isinstance(report, CheckReport):
        facts.append(("file judged", report.file))
    elif isinstance(report, CalibrationReport):
        facts.append(("file", report.path))
    elif isinstance(report, ExportReport) and report.file is not None:
        file = report.file
        facts += [
            ("file", file.path), ("weights beside it", file.data), ("SHA-256 of the file", file.sha256),
            ("operator set", file.opset), ("operators in the file", file.nodes),
        ]  # fmt: skip
    if isinstance(report, ExportReport):
        facts.append(("seconds", ", ".join(f"{stage} {spent:.1f}" for stage, spent in report.timings.items())))
    known = [(name, str(value)) for name, value in facts if value not in (None, "")]
    return section("origin", "Where it comes from", ("facts", [*known, *ran_on()]))


def ran_on() -> list[tuple[str, str]]:
    """The versions of what ran, and on what."""
    return [("bnfold", __version__), *versions().items(), ("platform", platform.platform())]


def interface_section(interface: Sequence[Port]) -> Iterator[Section]:
    """What goes in and what comes out."""
    rows = [(port.name, port.role, port.dtype, ", ".join(map(str, port.shape)) or "a number") for port in interface]
    if rows:
        listed = Table("Words in a shape are dynamic sizes", ("name", "", "dtype", "shape"), rows)
        yield section("interface", "Inputs and outputs", ("table", listed))


def _capped(count: int) -> str:
    return f" The {ROWS} of {count} that stand out most are drawn." if count > ROWS else ""
