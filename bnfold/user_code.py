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

from bnfold.errors import BnfoldError, CaptureError, InputError


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
    except (BnfoldError, KeyboardInterrupt):
        raise
    except BaseException as error:
        hint = f"It happened at {place(error)}"
        if "relative import" in str(error):
            hint += "; a file inside a package is given as pkg.module:factory"
        raise InputError(f"{what} failed with {type(error).__name__}: {error}", where=where, hint=hint) from error


@contextmanager
def unended() -> Iterator[None]:
    """Fails a run where the model's code would end it: ``sys.exit()`` in a forward is no verdict, whatever it says.

    CaptureError where an exception that is none of Python's errors came out, an interruption excepted.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt):
        raise
    except BaseException as error:
        what = f"the model's code ended the run with {type(error).__name__}: {error}".rstrip(": ")
        raise CaptureError(what, hint=f"It happened at {place(error)}") from error


def place(error: BaseException) -> str:
    """file:line of the user's code, of the innermost frame that is neither Python's nor an installed package's."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{Path(error.filename).name}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    ours = f"{Path(__file__).parent}{os.sep}"
    foreign = (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), "<frozen", ours)
    own = [frame for frame in frames if not frame.filename.startswith(foreign)]
    frame = (own or list(frames))[-1]
    return f"{Path(frame.filename).name}:{frame.lineno}"


def is_inside(module: ModuleType, folder: Path) -> bool:
    """Whether a module was imported from ``folder``, and is no installed package there."""
    # Not by getattr: a lazy module may import, and fail, whatever it is asked for.
    file = vars(module).get("__file__") if isinstance(module, ModuleType) else None
    return isinstance(file, str) and Path(file).is_relative_to(folder) and "site-packages" not in Path(file).parts
