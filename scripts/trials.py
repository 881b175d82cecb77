"""Trials in processes of their own, forked so that nothing is imported again, perhaps struck, and how they ended."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bnfold.cli import main as command_line
from bnfold.errors import EXIT_CODES

SECONDS = 120.0  # for one trial; what takes longer hangs


@dataclass(frozen=True)
class Ended:
    """How a child ended: its exit code, or the signal that ended it; what it said on stderr; its peak in KB."""

    code: int | None
    struck: int | None
    said: str
    seconds: float
    peak: int

    @property
    def words(self) -> str:
        return f"exit {self.code}" if self.struck is None else signal.Signals(self.struck).name


def child(call: Callable[[], Any], *, after: float | None = None, by: int = signal.SIGKILL) -> Ended:
    """Runs ``call`` in a fork, which is struck by a signal ``after`` so many seconds, and killed when it hangs."""
    with tempfile.TemporaryFile() as said:
        begun = time.perf_counter()
        pid = os.fork()
        if pid == 0:
            code = 99
            try:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                os.dup2(said.fileno(), 2)
                code = call() or 0
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 99
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(code)
        while True:
            done, status, used = os.wait4(pid, os.WNOHANG)
            now = time.perf_counter() - begun
            if done:
                break
            if now > SECONDS:
                os.kill(pid, signal.SIGKILL)
            elif after is not None and now >= after:
                os.kill(pid, by)
                after = None
            time.sleep(0.0005)
        said.seek(0)
        text = said.read().decode(errors="replace")
    struck = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
    return Ended(os.WEXITSTATUS(status) if struck is None else None, struck, text, now, used.ru_maxrss)


def command(*arguments: object) -> Callable[[], None]:
    """The command line, for ``child``."""

    def call() -> None:
        sys.argv = ["bnfold", *map(str, arguments)]
        command_line()

    return call


def unruly(ended: Ended) -> str | None:
    """What is wrong with how a command ended; None where it is one documented code, and one line for a refusal."""
    if ended.code not in EXIT_CODES:
        return f"ends with {ended.words} after {ended.seconds:.0f} s: {ended.said[-300:]}"
    errors = [line for line in ended.said.splitlines() if line.startswith("error:")]
    if "Traceback" in ended.said or "internal:" in ended.said:
        return f"{ended.words}: {ended.said[-300:]}"
    if ended.code in (2, 3, 4, 5, 6) and len(errors) != 1:
        return f"{ended.words} with {len(errors)} error lines: {ended.said[-300:]}"
    if any(not c.isprintable() and c != "\n" for c in ended.said):
        return f"{ended.words}, and control characters on stderr: {ended.said[-300:]!r}"
    return None
