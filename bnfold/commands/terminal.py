"""What goes to the terminal, whatever becomes of it."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from bnfold.errors import ResourceError

if TYPE_CHECKING:
    from bnfold.render import Page


def fail(message: str, code: int, prefix: str = "error: ") -> int:
    """Writes the one line of a failure to stderr and returns its exit code."""
    write(f"{prefix}{message}\n", sys.stderr)
    return code


def write(text: str, stream: Any) -> None:
    """Writes at once. A reader that has left (``| head``) is no failure: the verdict stays what it is."""
    if stream is None:
        return
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        stream.flush()
    except OSError as error:
        # What is still buffered would fail again when the interpreter ends.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if error.errno not in (errno.EPIPE, errno.EINVAL):
            raise ResourceError(f"the report could not be printed: {error.strerror}") from error


def show(render: Callable[[Page], None]) -> None:
    """Prints a report on stdout."""
    from bnfold.render import text

    write(text(render, sys.stdout), sys.stdout)
