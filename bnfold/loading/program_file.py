"""Whole models in a file: read without running code of the file's, written without the user's paths."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bnfold.errors import InputError, first_line
from bnfold.graph.allowed import is_allowed
from bnfold.graph.program import copy_graph, rebuild
from bnfold.graph.scripted import refuse_effects
from bnfold.loading import checkpoint


def load_program(path: Path, *, unsafe: bool = False) -> torch.export.ExportedProgram:
    """Read what ``torch.export.save`` wrote.

    ``unsafe`` allows what can run any code: pickled objects, compiled libraries, Python in shapes and guards.
    InputError where the file is damaged, written by another torch, or holds such and ``unsafe`` is off.
    """
    checkpoint.verify_archive(path)
    try:
        if not unsafe:
            _refuse_code(path)
        with _quiet_loader(restricted=not unsafe):
            return torch.export.load(path)
    except InputError:
        raise
    except Exception as error:
        text = re.split(r"\.\s|\n", str(error))[0]
        what = f"the exported program cannot be loaded ({type(error).__name__}: {text})"
        hint = "Export it again with the installed torch, or install the torch that wrote it"
        raise InputError(what, where=str(path), hint=hint) from error


def save_program(program: torch.export.ExportedProgram, path: Path) -> None:
    """Write ``program`` for ``torch.export.load``, without the stack traces, which show paths and lines of source."""
    graph = copy_graph(program.graph)
    for node in graph.nodes:
        node.meta.pop("stack_trace", None)
    bare = rebuild(program, graph, program.graph_signature, dict(program.state_dict), dict(program.constants))
    # torch's own writer aborts the process when the disk is full.
    buffer = io.BytesIO()
    torch.export.save(bare, buffer)
    path.write_bytes(buffer.getbuffer())


@contextmanager
def _quiet_loader(*, restricted: bool) -> Iterator[None]:
    """torch.export.load asks for the full unpickler, which only the environment can overrule; it logs tracebacks."""
    names = ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
    saved = {name: os.environ.pop(name) for name in names if name in os.environ}
    logger = logging.getLogger("torch.export")
    disabled, logger.disabled = logger.disabled, True
    try:
        if restricted:
            os.environ[names[0]] = "1"
        yield
    finally:
        logger.disabled = disabled
        os.environ.pop(names[0], None)
        os.environ.update(saved)


#: What may stand before an opening parenthesis in an expression or a guard, besides torch's own sympy functions.
_CALLS = {
    "Symbol", "Integer", "Rational", "Float", "Add", "Mul", "Pow", "Abs", "Min", "Max", "Piecewise", "And", "Or", "Not",
    "Eq", "Ne", "Lt", "Le", "Gt", "Ge", "Equality", "Unequality", "StrictGreaterThan", "StrictLessThan", "GreaterThan",
    "LessThan", "L.size", "and", "or", "not", "max", "min", "abs",
}  # fmt: skip
_FREE_TEXT = {"as_string", "as_strings", "metadata"}


def _refuse_code(path: Path) -> None:
    """Refuse an exported program that would run code of its own.

    ``torch.export.load`` unpickles objects, opens compiled libraries and evaluates the expressions of dynamic
    shapes as Python; the program's guards and names end up in Python source that ``ExportedProgram.module`` executes.
    """
    from torch.export.pt2_archive import PT2ArchiveReader

    with PT2ArchiveReader(str(path)) as archive:
        names = archive.get_file_names()
        programs = [json.loads(archive.read_bytes(name)) for name in names if name.startswith("models/")]
        configs = [json.loads(archive.read_bytes(name)) for name in names if name.endswith("constants_config.json")]
    found = [name for name in names if name.startswith("data/aotinductor/")]
    objects = [entry["path_name"] for config in configs for entry in config["config"].values()]
    found += [name for name in objects if not name.startswith("tensor_")]
    found += [text for program in programs for text in _suspicious(program)]
    if found:
        what = f"the exported program holds what can run any code ({found[0][:60]!r})"
        raise InputError(what, where=str(path), hint="If you trust where it comes from, pass --unsafe-pickle")


def _suspicious(value: Any, key: str = "") -> Iterator[str]:
    """The strings of a serialised program that are more than names, operators and arithmetic over sizes."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _suspicious(name)
            if name not in _FREE_TEXT:
                yield from _suspicious(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from _suspicious(inner, key)
    elif isinstance(value, str) and not _harmless(value, key):
        yield value


def _harmless(text: str, key: str) -> bool:
    from torch.utils._sympy import functions

    if key in ("target", "as_operator"):
        return is_allowed(text)
    if key in ("in_spec", "out_spec"):
        # Both make pytree import a module; an escape could hide them.
        return re.search(r"__enum__|default_factory|\\u", text) is None
    calls = set(re.findall(r"([\w.)\]}]+)\s*\(", re.sub(r"\[(\d+|'\w*')\]|'\w*'", "", text)))
    unknown = {call for call in calls - _CALLS if not (call[0].isupper() and hasattr(functions, call))}
    return not unknown and re.search(r"[\"`\\;\r\n]", text) is None


# ---- TorchScript archives --------------------------------------------------------------------------------------------

#: What ``torch.jit.load`` itself runs: the ``__setstate__`` of every class in the archive, and that of C++ classes.
_RUN_AT_LOAD = re.compile(rb"__setstate__|torch\W+classes")

#: Code is compressed; so much of it has no model.
CODE_BYTES = 64 << 20


def load_script(path: Path) -> torch.jit.ScriptModule:
    """Read what ``torch.jit.save`` wrote. Its ``forward`` is compiled, looked through, and not run.

    InputError where it is damaged, written by a newer torch, or holds code that loading it would run, or its
    ``forward`` an operator that is not allowed.
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
        what = f"the TorchScript archive cannot be loaded ({first_line(error)[:200]})"
        hint = "Save it again with the installed torch, or give the Python class that it was made from"
        raise InputError(what, where=str(path), hint=hint) from error
    try:
        refuse_effects(script)
    except InputError as error:
        error.where = str(path)
        raise
    return script
