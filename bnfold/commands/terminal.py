"""What goes to the terminal, whatever becomes of it."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Callable
from typing import IO, TYPE_CHECKING, Any

from bnfold.errors import ResourceError, printable

if TYPE_CHECKING:
    from bnfold.render import Page


def fail(message: str, code: int, prefix: str = "error: ") -> int:
    """Writes the one line of a failure to stderr, if that takes it, and returns its exit code."""
    write(f"{prefix}{printable(message)}\n", sys.stderr, must=False)
    return code


def write(text: str, stream: Any, *, must: bool = True) -> None:
    """Writes at once. A reader that has left (``| head``) is no failure: the verdict stays what it is.

    Args:
        stream: where to; None where there is none.
        must: whether it is a failure if nothing can be written, for another reason.

    Raises:
        ResourceError: it is, and nothing could.
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
