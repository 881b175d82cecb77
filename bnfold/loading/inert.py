"""Pickled checkpoints read inertly: tensors and numbers as data, objects of any class as stubs, nothing as code.

torch's restricted unpickler runs only what it is given by name. What it does not know it is given as a stub: a class
that takes whatever the pickle says of an object, and does nothing. Arrays of NumPy are built here of their bytes. A
file that names ``eval`` or ``subprocess.Popen`` could do no harm here either, and is refused all the same: whoever
wrote it meant to run something.
"""

from __future__ import annotations

import re
from _compat_pickle import IMPORT_MAPPING
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch

#: Classes that a file may name; each is found by reading the file once more.
_CLASSES = 500
#: Modules of Python's own that no data is made of.
_CODE = {
    "_io", "_pickle", "_posixsubprocess", "_socket", "asyncio", "code", "codeop", "ctypes", "imp", "importlib", "io",
    "marshal", "multiprocessing", "nt", "os", "pdb", "pickle", "posix", "pty", "runpy", "shutil", "signal", "socket",
    "subprocess", "sys", "tempfile", "timeit", "trace", "urllib", "webbrowser", "zipimport",
}  # fmt: skip
_RUNNING = {"__import__", "breakpoint", "compile", "eval", "exec", "execfile", "exit", "input", "open", "quit"}


class Stub:
    """Stands for an object of a class that is not imported. ``state`` is what the pickle restores it from."""

    state: Any = None

    def __new__(cls, *args: Any) -> Any:
        """Whatever the class would have been called with is let go."""
        return object.__new__(cls)

    def __init__(self, *args: Any) -> None:
        """Nothing."""

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Dtype(Stub):
    """``numpy.dtype``, of numbers alone."""

    dtype: np.dtype[Any] | None = None

    def __init__(self, name: Any = None, *args: Any) -> None:
        if isinstance(name, str) and re.fullmatch(r"[<>|=]?([iu][1248]|f[248]|c8|c16|b1)", name, re.ASCII):
            self.dtype = np.dtype(name)

    def __setstate__(self, state: Any) -> None:
        if self.dtype is not None and isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class _Array(Stub):
    """``numpy.ndarray``; ``array`` is None where its elements are no numbers."""

    array: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, fortran, raw = state
        if isinstance(kind, _Dtype) and kind.dtype is not None and isinstance(raw, bytes):
            flat = np.frombuffer(raw, kind.dtype)
            self.array = flat.reshape(shape, order="F" if fortran else "C").astype(kind.dtype.newbyteorder("="))


def _array(*args: Any) -> _Array:
    return _Array()


def _scalar(kind: Any, raw: Any = b"") -> Any:
    known = isinstance(kind, _Dtype) and kind.dtype is not None and isinstance(raw, bytes)
    return np.frombuffer(raw, kind.dtype)[0] if known else Stub()


def _attribute(*args: Any) -> type[Stub]:
    """``getattr``, by which inner classes and methods are named."""
    return Stub


_KNOWN: dict[str, Any] = {
    "builtins.getattr": _attribute,
    "builtins.object": Stub,
    "numpy.dtype": _Dtype,
    "numpy.ndarray": _Array,
    **{f"numpy.{core}.multiarray._reconstruct": _array for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": _scalar for core in ("core", "_core")},
}


def load(path: Path, *, mmap: bool) -> Any:
    """What ``torch.save`` put into a file, its tensors on the CPU, and stubs for what is neither tensor nor number.

    Raises:
        pickle.UnpicklingError: it asks for modules that torch blocks, or does what only code does.
        Exception: whatever a damaged file makes torch raise.
    """
    known: dict[str, Any] = dict(_KNOWN)
    for _ in range(_CLASSES):
        try:
            with torch.serialization.safe_globals([(found, name) for name, found in known.items()]):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        except UnpicklingError as error:
            text = str(error)
            unknown = re.search(r"GLOBAL (.+?) was not an allowed global", text, re.DOTALL)
            built = re.search(r"Can only (SETITEMS?|append|extend) .* but got <class '(.+?)'>", text, re.DOTALL)
            if unknown is not None:
                name = unknown[1] if "." in unknown[1] else f"builtins.{unknown[1]}"
                if name in known or not _is_data(name):
                    raise
                known[name] = _stub(name)
            elif built is not None and known.get(built[2]) not in (None, _mapping, _sequence):
                known[built[2]] = _mapping if built[1].startswith("SET") else _sequence
            else:
                raise
    raise UnpicklingError(f"it names more than {_CLASSES} classes")


def _is_data(name: str) -> bool:
    """Whether a file of data may name this: no module that runs things, and no builtin that does."""
    old, _, own = name.partition(".")
    module = IMPORT_MAPPING.get(old, old)  # old protocols write Python 2's names
    return own not in _RUNNING if module == "builtins" else module not in _CODE


def _stub(name: str) -> type[Stub]:
    module, _, own = name.rpartition(".")
    return type(own, (Stub,), {"__module__": module, "__qualname__": own})


class _mapping:  # noqa: N801
    """A class derived from dict: its objects are plain ones."""

    def __new__(cls, *args: Any) -> Any:
        return OrderedDict()


class _sequence:  # noqa: N801
    """A class derived from list."""

    def __new__(cls, *args: Any) -> Any:
        return []


def stub_in(content: Any, keys: tuple[str, ...] = ()) -> str | None:
    """The class of the object that a file holds in place of weights, itself or under one of ``keys``."""
    inner = [content, *(content.get(key) for key in keys)] if isinstance(content, Mapping) else [content]
    kinds = (value if isinstance(value, type) else type(value) for value in inner)
    found = next((kind for kind in kinds if issubclass(kind, Stub)), None)
    return None if found is None else f"{found.__module__}.{found.__qualname__}"


def as_tensor(value: Any) -> Any:
    """A tensor of an array, a stub's or NumPy's own; anything else as it is."""
    array = value.array if isinstance(value, _Array) else value
    return torch.from_numpy(np.array(array)) if isinstance(array, np.ndarray | np.generic) else value


def as_state(value: Any) -> Any:
    """The state dict of a module, or of the stub of one, which holds its parts by torch's own names."""
    if isinstance(value, torch.nn.Module):
        return value.state_dict()
    return OrderedDict(_weights(value, "", set())) if isinstance(value, Stub) else value


def _weights(stub: Stub, prefix: str, seen: set[int]) -> Iterator[tuple[str, torch.Tensor]]:
    state = stub.state if isinstance(stub.state, Mapping) else {}
    hidden = state.get("_non_persistent_buffers_set") or ()
    if id(stub) in seen:
        return
    seen.add(id(stub))
    for part in ("_parameters", "_buffers", "_modules"):
        inner = state.get(part)
        for name, value in inner.items() if isinstance(inner, Mapping) else ():
            if isinstance(value, torch.Tensor) and name not in hidden:
                yield f"{prefix}{name}", value
            elif part == "_modules" and isinstance(value, Stub):
                yield from _weights(value, f"{prefix}{name}.", seen)
