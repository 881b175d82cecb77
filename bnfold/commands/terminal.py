"""How a run ends and what goes to the terminal, whatever becomes of it: one line for every failure, and one of the
documented exit codes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable
from types import FrameType
from typing import IO, TYPE_CHECKING, Any

import click

from bnfold.errors import BnfoldError, ResourceError, printable

if TYPE_CHECKING:
    from bnfold.render import Page


def fail(message: str, code: int, prefix: str = "error: ") -> int:
    """Writes the one line of a failure to stderr, if that takes it, and returns its exit code."""
    write(f"{prefix}{printable(message)}\n", sys.stderr, must=False)
    return code


def write(text: str, stream: Any, *, must: bool = True) -> None:
    """Writes at once. A reader that has left (``| head``) is no failure: the verdict stays what it is.

    ResourceError where nothing can be written for another reason, and something ``must``.
    """
    if stream is None:
        return
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        stream.flush()
    except (OSError, ValueError) as error:  # full, gone, or closed by the model's code
        hush(stream)
        if must and getattr(error, "errno", None) not in (errno.EPIPE, errno.EINVAL):
            raise ResourceError(f"the report could not be printed: {getattr(error, 'strerror', error)}") from error


def hush(stream: Any) -> None:
    """Sends what is still buffered nowhere: it would fail again when the interpreter ends, and change the exit code."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class Unfailing:
    """A stream whose writes cannot fail: a full disk behind the progress does not end a run."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes at once, if the stream takes it."""
        write(text, self._stream, must=False)
        return len(text)

    def flush(self) -> None:
        """Every write has been flushed."""


def show(render: Callable[[Page], None]) -> None:
    """Prints a report on stdout."""
    from bnfold.render import text

    write(text(render, sys.stdout), sys.stdout)


_ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EFBIG}


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP: unwinds like Ctrl-C, so that nothing half-written stays behind."""


def heed_signals() -> None:
    """Lets SIGTERM and SIGHUP raise ``Terminated``, once; where they are ignored they stay so."""
    for number in _ENDING:
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _terminate)
    sys.unraisablehook = _once_more


def _once_more(swallowed: sys.UnraisableHookArgs) -> None:
    """An interrupt that strikes in a destructor or a callback of a weak reference is lost there: it comes again."""
    interrupt = swallowed.exc_value
    if not isinstance(interrupt, KeyboardInterrupt) or not hasattr(signal, "setitimer"):
        sys.__unraisablehook__(swallowed)
        return

    def strike(number: int, frame: FrameType | None) -> None:
        raise interrupt

    signal.signal(signal.SIGALRM, strike)
    signal.setitimer(signal.ITIMER_REAL, 0.01)


def ignore_signals() -> None:
    """The run is over: whatever comes now does not change how it ended."""
    for number in _ENDING:
        if signal.getsignal(number) is _terminate:
            signal.signal(number, signal.SIG_IGN)


def _terminate(number: int, frame: FrameType | None) -> None:
    ignore_signals()  # a second one must not interrupt the clearing up
    raise Terminated


def exit_code(ctx: click.Context, run: Callable[[], Any]) -> int:
    """What ``run`` returns, or the exit code of its failure, which has been printed.

    Nothing that a model's own code raises gets past: ``SystemExit(0)`` is no verdict, nor is any exception of click's.
    """
    debug = bool(ctx.meta.get("debug"))
    try:
        code = run()
        return code if isinstance(code, int) else 0
    except Terminated:
        return fail("terminated", 143)
    except KeyboardInterrupt:
        return fail("interrupted", 130)
    except BaseException as error:
        if debug:
            write(traceback.format_exc(), sys.stderr, must=False)
        if isinstance(error, BnfoldError):
            return fail(str(error), 6 if _exhausted(error) else error.exit_code)
        if _exhausted(error):
            return fail(f"the memory or the disk gave out: {_one_line(error)}", 6)
        if not isinstance(error, Exception):
            return fail(f"the model's code ended the run: {_one_line(error)}", 4)
        hint = "" if debug else ". Run it again with --debug for the traceback, and report it"
        return fail(f"internal: {_one_line(error)}{hint}", 4)


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:400].rstrip(": .")


def _exhausted(error: BaseException | None) -> bool:
    """Whether the memory or the disk is what was really missing."""
    while error is not None:
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in _FULL):
            return True
        if isinstance(error, RuntimeError) and re.search(r"can't allocate memory|out of memory", str(error)):
            return True
        error = error.__cause__
    return False
