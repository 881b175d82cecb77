"""TorchScript archives: read without running code of the file's."""

from __future__ import annotations

import re
import warnings
import zipfile
from pathlib import Path

import torch

from bnfold.errors import InputError
from bnfold.graph.scripted import refuse_effects
from bnfold.loading import checkpoint

#: What ``torch.jit.load`` itself runs: the ``__setstate__`` of every class in the archive, and that of C++ classes.
_RUN_AT_LOAD = re.compile(rb"__setstate__|torch\W+classes")

#: Code is compressed; so much of it has no model.
CODE_BYTES = 64 << 20


def load_script(path: Path) -> torch.jit.ScriptModule:
    """Read what ``torch.jit.save`` wrote. Its ``forward`` is compiled, looked through, and not run.

    Raises:
        InputError: damaged, written by a newer torch, or holding code that loading it would run; or its ``forward``
            holds an operator that is not allowed.
    """
    checkpoint.verify_archive(path, inflated=CODE_BYTES)
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            # Weights are what no code is in; every other member is looked at, whatever its name.
            if re.search(r"/(data|constants)/[^/]+$", member.filename):
                continue
            if found := _RUN_AT_LOAD.search(archive.read(member)):
                what = f"the archive holds code that loading it would run ({found[0].decode()} in {member.filename})"
                hint = "Quantised and custom classes cannot be taken: give the Python class that it was made from"
                raise InputError(what, where=str(path), hint=hint)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            script: torch.jit.ScriptModule = torch.jit.load(path, map_location="cpu")  # type: ignore[no-untyped-call]
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        what = f"the TorchScript archive cannot be loaded ({(lines or [type(error).__name__])[0][:200]})"
        hint = "Save it again with the installed torch, or give the Python class that it was made from"
        raise InputError(what, where=str(path), hint=hint) from error
    try:
        refuse_effects(script)
    except InputError as error:
        error.where = str(path)
        raise
    return script
