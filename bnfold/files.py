"""What may be opened for reading at all, and what it is told apart by."""

from __future__ import annotations

import hashlib
import os
import stat
from contextlib import suppress
from pathlib import Path

from bnfold.errors import InputError


def there(path: str | os.PathLike[str]) -> bool:
    """Whether there is anything of this name, which may be one that no file can have."""
    with suppress(OSError, ValueError):
        return Path(path).exists()
    return False


def require_file(path: str | os.PathLike[str], *, hint: str | None = None) -> None:
    """Refuses what is no regular file before it is opened: a pipe that nobody writes to would be waited for.

    InputError, with ``hint`` where there is no such file; it cannot be looked at, or is a folder, a pipe or a device.
    Symbolic links are followed.
    """
    where = os.fspath(path)
    try:
        mode = Path(path).stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError("there is no such file", where=where, hint=hint) from error
    except (OSError, ValueError) as error:  # a loop of links, a name too long, a NUL in it
        raise InputError(f"the file cannot be read ({getattr(error, 'strerror', error)})", where=where) from error
    if stat.S_ISDIR(mode):
        raise InputError("this is a folder, not a file", where=where, hint="Name a file in it")
    if not stat.S_ISREG(mode):
        what = f"this is {'a pipe' if stat.S_ISFIFO(mode) else 'a device or a socket'}, not a file"
        raise InputError(what, where=where, hint="Save what comes out of it and name that file")


def sha256_of(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file's bytes, in hex; OSError where it cannot be read."""
    with Path(path).open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
