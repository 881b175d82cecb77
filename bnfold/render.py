"""Typed results -> what a person reads on a terminal, wherever it wraps."""

from __future__ import annotations

import io
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from bnfold.report import REASONS, CheckReport, Entry, ExportReport, Ledger, OutputResult

if TYPE_CHECKING:
    from bnfold.doctor import Finding

_LABEL, _SUBJECT = 9, 28
#: Width where nobody looks: a pipe or a file, which would not be wrapped more narrowly than this on a screen.
_PIPE_WIDTH = 120
#: Rows of a table, or lines of outputs, that are shown without --verbose.
_SHOWN, _PROBLEMS = 20, 8
_STYLES = {
    "pass": "bold green", "fail": "bold red", "inconclusive": "bold yellow",
    "ok": "green", "note": "yellow", "problem": "bold red",
}  # fmt: skip


def console(stream: IO[str]) -> Console:
    """A console that takes text as it is: a bracket in a path or a module name is no markup."""
    found = Console(file=stream, markup=False, emoji=False, highlight=False)
    if not found.is_terminal and "COLUMNS" not in os.environ:
        found.width = _PIPE_WIDTH
    return found


def text(render: Callable[[Page], None], stream: IO[str]) -> str:
    """What ``render`` prints, in the width and the colours of ``stream``, to which nothing is written."""
    like = console(stream)
    target = Console(
        file=io.StringIO(), markup=False, emoji=False, highlight=False, width=like.width, no_color=like.no_color,
        force_terminal=like.is_terminal, color_system=like.color_system,  # type: ignore[arg-type]
    )  # fmt: skip
    with target.capture() as captured:
        render(Page(target))
    return "".join(f"{line.rstrip()}\n" for line in captured.get().splitlines())


class Page:
    """Labelled lines of chunks: a chunk moves to the next line as a whole, and is split only where it is wider."""

    def __init__(self, target: Console) -> None:
        self._console = target

    def line(self, label: str, *chunks: str | Text, subject: str = "") -> None:
        """Prints ``chunks`` after a label, an empty one for a line that belongs to the last."""
        width = max(self._console.width - _LABEL, 24)
        parts = [chunk if isinstance(chunk, Text) else Text(chunk) for chunk in chunks if len(chunk)]
        if subject:
            parts.insert(0, Text(subject.ljust(_SUBJECT) if parts else subject))
        rows: list[Text] = []
        for part in parts:
            if rows and rows[-1].cell_len + 3 + part.cell_len <= width:
                rows[-1] = Text("   ").join([rows[-1], part])
            else:
                rows += list(part.wrap(self._console, width)) or [part]
        for i, row in enumerate(rows):
            row.rstrip()
            self._console.print(Text.assemble((label.ljust(_LABEL) if i == 0 else " " * _LABEL, "bold"), row))

    def table(self, titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Prints a table under the last line; where it would not fit, a line per row."""
        widths = [max(map(cell_len, column)) for column in zip(titles, *rows)]
        if _LABEL + sum(widths) + 3 * (len(widths) - 1) > self._console.width:
            for row in rows:
                self.line("", *(f"{title}: {cell}" for title, cell in zip(titles, row) if cell))
            return
        for row, style in ((titles, "dim"), *((row, "") for row in rows)):
            cells = (cell + " " * (width - cell_len(cell)) for cell, width in zip(row, widths))
            self._console.print(Text(" " * _LABEL + "   ".join(cells).rstrip(), style))


# -- commands ----------------------------------------------------------------------------------------------------------


def export_report(report: ExportReport, page: Page, *, destination: str, dry_run: bool, verbose: bool) -> None:
    """What ``export`` and ``fold`` print."""
    _loaded(report, page)
    _folded(report, page)
    if verbose:
        _plan(report.ledger, page, bare=True)
    if report.check is None:
        page.line("Checked", "nothing (--no-check)")
    else:
        _checked(report.check, page, verbose=verbose)
    _ending(report, page, destination, dry_run)
    _left(report.ledger, page, verbose=verbose)


def plan_report(report: ExportReport, page: Page, *, verbose: bool) -> None:
    """What ``inspect`` prints: where every BatchNorm goes."""
    _loaded(report, page)
    _folded(report, page)
    _plan(report.ledger, page, bare=verbose)
    _left(report.ledger, page, verbose=verbose)


def check_report(source: dict[str, Any], path: str, report: CheckReport, page: Page, *, verbose: bool) -> None:
    """What ``check`` prints."""
    page.line("Loaded", _model(source), subject=source["source"])
    page.line("Against", subject=path)
    _checked(report, page, verbose=verbose)
    page.line("Verdict", _verdict(report.verdict))


def findings(found: Iterable[Finding], page: Page) -> None:
    """What ``doctor`` prints."""
    for finding in found:
        page.line(finding.level, Text(finding.what, _STYLES[finding.level] if finding.level == "problem" else ""))
        if finding.hint:
            page.line("", finding.hint)


def problems(report: CheckReport) -> str:
    """The verdict that is no pass in one line, for those who see nothing else."""
    word = "the gate failed" if report.verdict == "fail" else "no verdict"
    return f"{word}: {'; '.join(report.problems[:3])}" + ("; ..." if len(report.problems) > 3 else "")


# -- parts -------------------------------------------------------------------------------------------------------------


def _loaded(report: ExportReport, page: Page) -> None:
    page.line("Loaded", _model(report.source), subject=report.source["source"])
    for note in report.notes:
        page.line("", f"note: {note}")


def _model(source: dict[str, Any]) -> str:
    parts = [f"{_count(source.get('parameters') or 0)} parameters"]
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
        page.line("Merged", _plural(fewer, "operator") + " fewer", subject=f"{layers} layers into {len(ledger.merges)}")


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
    for (outcome, carried), count in sorted(counts.items()):
        names = list(passed[outcome, carried])
        through_words = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
        parts.append(f"{count} {words[outcome]}" + (f" through {through_words}" if names else ""))
    return ", ".join(parts)


def _plan(ledger: Ledger, page: Page, *, bare: bool) -> None:
    entries = [entry for entry in ledger.folded if bare or entry.is_batch_norm]
    if entries:
        rows = [(_where(entry), entry.layer, " and ".join(entry.into), ", ".join(entry.through)) for entry in entries]
        page.table(("folded", "kind", "into", "through"), rows)
    if ledger.merges:
        rows = [(", ".join(merge.modules), merge.kind, merge.into, "") for merge in ledger.merges]
        page.table(("merged", "kind", "into", ""), rows)


def _plural(count: int, word: str) -> str:
    return f"{count} {word}{'s' * (count != 1)}"


def _where(entry: Entry) -> str:
    return entry.module or entry.value


def _checked(check: CheckReport, page: Page, *, verbose: bool) -> None:
    batches = " ".join(map(str, check.batches))
    page.line("Checked", check.provider, f"{check.samples} samples", f"batches {batches}")
    if check.sites:
        worst = max(check.sites, key=lambda site: max(site.ratio, site.channel_ratio))
        count = len({site.value for site in check.sites})
        ratio, limit = _number(check.site_ratio), _number(check.site_limit)
        page.line("", f"{_plural(count, 'fold site')}: worst ratio {ratio} (limit {limit}) at '{worst.module}'")
    shown = list(check.outputs) if verbose else _worst_candidates(check.outputs)
    for output in shown if verbose else shown[:_SHOWN]:
        candidate = f" [{output.candidate}]" if verbose else ""
        page.line(
            "", f"{output.output}{candidate}: noise {_error(output.noise)}", f"error {_error(output.error)}",
            f"ratio {_number(output.ratio)} (limit {_number(check.limit)})", _verdict(_judged(output, check)),
        )  # fmt: skip
    if len(shown) > _SHOWN and not verbose:
        page.line("", f"{len(shown) - _SHOWN} more outputs with smaller ratios: --verbose lists them")
    if check.accuracy is not None:
        known = check.accuracy
        page.line(
            "", f"top-1 on {known.samples} labelled samples: {known.before:.1%} before, {known.after:.1%} after, "
            f"{_plural(known.flips, 'flip')}"
        )  # fmt: skip
    for note in check.notes:
        page.line("", f"note: {note}")
    problems = check.problems if verbose else check.problems[:_PROBLEMS]
    for problem in problems:
        page.line("", Text(f"problem: {problem}", _STYLES[check.verdict]))
    if len(check.problems) > len(problems):
        page.line("", f"{len(check.problems) - len(problems)} more problems: --verbose lists them")


def _worst_candidates(outputs: Sequence[OutputResult]) -> list[OutputResult]:
    """For every output the candidate that is furthest off; the furthest output first where there are too many."""
    worst: dict[str, OutputResult] = {}
    for output in outputs:
        if output.output not in worst or not output.ratio <= worst[output.output].ratio:
            worst[output.output] = output
    found = list(worst.values())
    return found if len(found) <= _SHOWN else sorted(found, key=lambda output: -output.ratio)


def _judged(output: OutputResult, check: CheckReport) -> str:
    """One output's own verdict; a run of one batch size may have failed although the median did not."""
    if output.ratio > check.limit:
        return "fail"
    if math.isnan(output.ratio):  # nothing finite to compare
        return "inconclusive"
    return check.verdict if check.verdict != "fail" else "pass"


def _verdict(verdict: str) -> Text:
    return Text(verdict.upper(), _STYLES[verdict])


def _ending(report: ExportReport, page: Page, destination: str, dry_run: bool) -> None:
    verdict = report.check.verdict if report.check is not None else "pass"
    if verdict == "pass" and report.file is not None:
        file = report.file
        data = [f"weights in {file.data}"] if file.data else []
        facts = [_size(file.bytes), *data, *([f"opset {file.opset}"] if file.opset else [])]
        page.line("Wrote", ", ".join([*facts, _plural(file.nodes, "operator")]), subject=file.path)
    elif dry_run:
        page.line("Verdict", _verdict(verdict), "dry run: nothing was written")
    else:
        kept = f"kept as {report.file.path} (--keep-failed)" if report.file else "nothing was written"
        page.line("Verdict", _verdict(verdict), f"{kept}; {destination} is as it was")


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


# -- words -------------------------------------------------------------------------------------------------------------


def _count(number: int) -> str:
    for unit, size in (("G", 10**9), ("M", 10**6), ("K", 10**3)):
        if number >= size:
            return f"{number / size:.3g} {unit}" if number < 999.5 * size else f"{number / size:.0f} {unit}"
    return str(number)


def _size(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}" if count < 999.5 * size else f"{count / size:.0f} {unit}"
    return f"{count} bytes"


def _number(value: float) -> str:
    return f"{value:.2g}" if math.isfinite(value) and value < 100 else f"{value:.3g}"


def _error(value: float) -> str:
    return f"{value:.1e}" if value else "0"


# -- progress ----------------------------------------------------------------------------------------------------------

#: Steps that a stage reports under a name of their own.
_PART_OF = {"truth": "check"}


class Progress:
    """Tells on stderr which stage runs: a bar on a terminal, a line per finished stage elsewhere."""

    def __init__(self, file: IO[str], *, quiet: bool) -> None:
        self._console, self._quiet = console(file), quiet
        self._stage, self._began = "", 0.0
        self._bar: Any = None

    def __enter__(self) -> Progress:
        if not self._quiet and self._console.is_terminal and not self._console.is_dumb_terminal:
            from rich import progress as bars

            self._bar = bars.Progress(
                bars.SpinnerColumn(), bars.TextColumn("{task.description}", markup=False), bars.BarColumn(),
                bars.TimeElapsedColumn(), console=self._console, transient=True,
                redirect_stdout=False, redirect_stderr=False,
            )  # fmt: skip
            self._bar.add_task("start", total=None)
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is None:
            self._finish()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """A stage has done so much of its work."""
        part, stage = stage, _PART_OF.get(stage, stage)
        if stage != self._stage:
            self._finish()
            self._stage, self._began = stage, time.perf_counter()
        if self._bar is not None:
            words = stage if part == stage else f"{stage}: {part}"
            self._bar.update(0, description=words, completed=done, total=total if total > 1 else None)

    def _finish(self) -> None:
        if self._stage and self._bar is None and not self._quiet:
            self._console.print(f"{self._stage} ... {time.perf_counter() - self._began:.1f} s")
        self._stage = ""
