"""Labelled lines and tables, wherever the terminal wraps, and which stage runs."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import IO, Any

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from bnfold.errors import printable

_LABEL, _SUBJECT = 9, 28
#: Width where nobody looks: a pipe or a file, which would not be wrapped more narrowly than this on a screen.
_PIPE_WIDTH = 120
STYLES = {
    "pass": "bold green", "fail": "bold red", "inconclusive": "bold yellow",
    "ok": "green", "note": "yellow", "problem": "bold red",
}  # fmt: skip


def console(stream: IO[str], **how: Any) -> Console:
    """A console that takes text as it is: a bracket in a path or a module name is no markup."""
    found = Console(file=stream, markup=False, emoji=False, highlight=False, **how)
    if not found.is_terminal and "COLUMNS" not in os.environ:
        found.width = _PIPE_WIDTH
    return found


def text(render: Callable[[Page], None], stream: IO[str]) -> str:
    """What ``render`` prints, in the width and the colours of ``stream``, to which nothing is written."""
    like = console(stream)
    target = console(
        io.StringIO(), width=like.width, no_color=like.no_color, force_terminal=like.is_terminal,
        color_system=like.color_system,
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
        parts = [chunk if isinstance(chunk, Text) else Text(printable(chunk)) for chunk in chunks if len(chunk)]
        if subject:
            subject = printable(subject)
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

    def notes(self, notes: Sequence[str]) -> None:
        """Prints a line for each."""
        for note in notes:
            self.line("", f"note: {note}")

    def more(self, count: int, what: str = "") -> None:
        """Says how many are not shown, if any."""
        if count > 0:
            self.line("", f"{count} more{what}: --verbose lists them")

    def whole(self, text: str) -> None:
        """Prints what is to be copied, in one line however wide it is."""
        self._console.print(Text(" " * _LABEL + printable(text)), soft_wrap=True)

    def table(self, titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Prints a table under the last line; where it would not fit, a line per row."""
        rows = [[printable(cell) for cell in row] for row in rows]
        widths = [max(map(cell_len, column)) for column in zip(titles, *rows)]
        if _LABEL + sum(widths) + 3 * (len(widths) - 1) > self._console.width:
            for row in rows:
                self.line("", *(f"{title}: {cell}" for title, cell in zip(titles, row) if cell))
            return
        for row, style in ((titles, "dim"), *((row, "") for row in rows)):
            cells = (cell + " " * (width - cell_len(cell)) for cell, width in zip(row, widths))
            self._console.print(Text(" " * _LABEL + "   ".join(cells).rstrip(), style))


#: Steps that a stage reports under a name of their own.
_PART_OF = {"data": "capture", "truth": "check", "search": "check", "accuracy": "check"}


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
        if ": " in stage:  # what a user should know while it takes long
            stage = stage.partition(": ")[0]
            if self._bar is None and not self._quiet:
                self._console.print(part)
        if stage != self._stage:
            self._finish()
            self._stage, self._began = stage, time.perf_counter()
        if self._bar is not None:
            words = part if part.startswith(stage) else f"{stage}: {part}"
            self._bar.update(0, description=words, completed=done, total=total if total > 1 else None)

    def _finish(self) -> None:
        if self._stage and self._bar is None and not self._quiet:
            self._console.print(f"{self._stage} ... {time.perf_counter() - self._began:.1f} s")
        self._stage = ""
