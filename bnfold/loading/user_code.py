"""Running what the user wrote: where it is found, and what is said when it fails."""

from __future__ import annotations

import importlib
import os
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from bnfold.errors import BnfoldError, InputError


@contextmanager
def importable(folder: Path) -> Iterator[None]:
    """While it runs, modules are found in ``folder`` too."""
    saved = list(sys.path)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:] = saved


@contextmanager
def user_code(what: str, where: str) -> Iterator[None]:
    """Turn whatever the user's code raises into one line with the place in that code."""
    try:
        yield
    except BnfoldError:
        raise
    except (Exception, SystemExit) as error:
        hint = f"It happened at {_place(error)}"
        if "relative import" in str(error):
            hint += "; a file inside a package is given as pkg.module:factory"
        raise InputError(f"{what} failed with {type(error).__name__}: {error}", where=where, hint=hint) from error


def _place(error: BaseException) -> str:
    """file:line of the user's code, of the innermost frame that is neither Python's nor an installed package's."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{Path(error.filename).name}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    ours = f"{Path(__file__).parents[1]}{os.sep}"
    foreign = (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), "<frozen", ours)
    own = [frame for frame in frames if not frame.filename.startswith(foreign)]
    frame = (own or list(frames))[-1]
    return f"{Path(frame.filename).name}:{frame.lineno}"


def is_inside(module: ModuleType, folder: Path) -> bool:
    """Whether a module was imported from ``folder``, and is no installed package there."""
    file = getattr(module, "__file__", None)
    return file is not None and Path(file).is_relative_to(folder) and "site-packages" not in Path(file).parts
