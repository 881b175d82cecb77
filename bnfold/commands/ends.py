"""How a run ends: one line for every failure, and one of the documented exit codes."""

from __future__ import annotations

import errno
import re
import signal
import sys
import traceback
from collections.abc import Callable
from types import FrameType
from typing import Any

import click

from bnfold.commands.terminal import fail, write
from bnfold.errors import BnfoldError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EFBIG}


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP: unwinds like Ctrl-C, so that nothing half-written stays behind."""


def heed_signals() -> None:
    """Lets SIGTERM and SIGHUP raise ``Terminated``, once; where they are ignored they stay so."""
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
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
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is _terminate:
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
