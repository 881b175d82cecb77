"""What is said where torch.export fails."""

from __future__ import annotations

import io
import logging
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from bnfold.errors import CaptureError


def explained(error: Exception, module: nn.Module, run: Callable[[], object]) -> CaptureError:
    """The error to raise for one of torch.export's: where in the user's code, and the way out.

    ``module`` is what it was given; ``run`` runs that itself on the same inputs.
    """
    text = str(error)
    message = text.strip().split("\n")[0]
    hint = "torch.export must be able to trace forward: no branches on values of tensors (torch.where, torch.cond)"
    if "constraints violated" in text.lower():
        message = " ".join(text.split("Suggested fixes")[0].split())[:400]
        hint = "The model fixes a dimension that is declared dynamic: fix it with --static or a number in --input"
    elif _packs(error):
        hint = (
            "torch.export cannot trace packed sequences: give the layer the padded input, and mask what comes after a "
            "sequence's end or gather its last step"
        )
    elif "fake tensor in the exported" in text:
        message = "torch.export cannot follow a tensor that forward makes"
        hint = "What it reads or writes as .data is lost: use detach(), and keep what is computed in a variable"
    elif "dynamic_shapes" in text:
        hint = "dynamic_shapes must have the structure of the inputs"
    elif isinstance(error, (TypeError, RuntimeError)) and "data-dependent" not in text.lower():
        hint = "Check the number, names, shapes and dtypes of the inputs (--input)"
    elif fails(run):
        hint = "The model itself fails on this input: give it one that it takes (--input)"
    where = _user_place(error, module)
    return CaptureError(f"{type(error).__name__}: {message}".rstrip(":. "), where=where, hint=hint)


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps away what torch logs and prints beside the exception that it raises: a traceback, and the graph."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def fails(run: Callable[[], object]) -> bool:
    """Whether it raises."""
    try:
        with torch.no_grad(), quiet():
            run()
    except Exception:
        return True
    return False


def _packs(error: BaseException) -> bool:
    """Whether it was raised where sequences of several lengths are packed into one, or unpacked."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        packing = frame.f_code.co_name in ("pack_padded_sequence", "pad_packed_sequence", "pack_sequence")
        if packing or any(isinstance(value, PackedSequence) for value in frame.f_locals.values()):
            return True
    return False


def is_torchs(file: str) -> bool:
    """Whether code is torch's, bnfold's or Python's own plumbing rather than a model's."""
    ours = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]), "<")
    return file.startswith(ours) or "contextlib" in file


def _user_place(error: BaseException, module: nn.Module) -> str | None:
    """File, line and module of the user's code that an exception came from."""
    found = None
    for frame, line in traceback.walk_tb(error.__traceback__):
        name = frame.f_code.co_filename
        if not is_torchs(name):
            owner = frame.f_locals.get("self")
            path = next((n for n, m in module.named_modules() if m is owner), None)
            found = f"{Path(name).name}:{line} in {frame.f_code.co_name}" + (f" (module '{path}')" if path else "")
    return found
