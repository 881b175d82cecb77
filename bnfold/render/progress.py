"""Which stage runs, told on stderr."""

from __future__ import annotations

import time
from types import TracebackType
from typing import IO, Any

from bnfold.render.page import console

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
