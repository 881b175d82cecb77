"""Models that the user's Python code builds: ``path/to/file.py:factory`` and ``pkg.module:factory``."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from bnfold.errors import InputError, UsageError
from bnfold.files import require_file
from bnfold.graph.copies import copied
from bnfold.graph.wrapped import unwrapped
from bnfold.loading.source import Built, Request
from bnfold.user_code import importable, is_inside, user_code

#: Modules that earlier sources imported from their own folder: a later source's ``import blocks`` must find its own.
_siblings: set[str] = set()


@contextmanager
def built(request: Request) -> Iterator[Built]:
    """The model; while it lasts, modules are found where the code is, of which pickled weights may name some.

    InputError where there is no such file, module or factory, or the user's code fails; UsageError for arguments of
    what is no factory; CaptureError where a model that is there already cannot be copied.
    """
    name, _, attribute = request.source.rpartition(":")
    if not name.endswith(".py"):
        with importable(Path.cwd()):
            yield _build(request, _imported(request, name), attribute)
        return
    path = Path(name)
    require_file(path)
    folder = path.resolve().parent
    for stale in _siblings:
        sys.modules.pop(stale, None)
    _siblings.clear()
    spec = importlib.util.spec_from_file_location(f"bnfold_source_{path.stem}", path.resolve())
    assert spec is not None and spec.loader is not None  # a .py file always has a loader
    module = importlib.util.module_from_spec(spec)
    before = set(sys.modules)
    sys.modules[spec.name] = module
    try:
        with importable(folder):
            with user_code("importing it", name):
                spec.loader.exec_module(module)
            yield _build(request, module, attribute)
    except BaseException:
        del sys.modules[spec.name]
        raise
    finally:
        _siblings.update(key for key in set(sys.modules) - before - {spec.name} if is_inside(sys.modules[key], folder))


def _imported(request: Request, name: str) -> ModuleType:
    with user_code("importing it", name):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise
            what = f"there is no Python module {error.name!r}"
            hint = "Install it, run from the folder that holds it, or give path/to/file.py:factory"
            raise InputError(what, where=request.source, hint=hint) from error


def _build(request: Request, module: ModuleType, name: str) -> Built:
    """Builds the model with the module's attribute ``name``."""
    if not hasattr(module, name):
        there = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        own = [key for key in there if getattr(getattr(module, key), "__module__", None) == module.__name__]
        near = difflib.get_close_matches(name, there, n=3) or own[:5]
        hint = f"Did you mean {' or '.join(near)}?" if near else "Nothing in it can be called"
        raise InputError(f"there is no {name!r} in it", where=request.source, hint=hint)
    factory = getattr(module, name)
    if isinstance(factory, torch.nn.Module):
        if request.factory_args:
            raise UsageError("this is a module and no factory: it takes no --arg", where=request.source)
        # The importing code goes on to own its instance; weights go into a copy.
        result: Any = copied(factory)
    elif callable(factory):
        result = _call(factory, request)
    else:
        hint = "Name a function that returns an nn.Module, an nn.Module class, or an instance of one"
        what = f"{name!r} is a {type(factory).__name__} and cannot be called"
        raise InputError(what, where=request.source, hint=hint)
    model, args, kwargs = _unpack(result, request.source)
    if args is None and not kwargs:
        args, kwargs = own_example(model)
    if args is None and not kwargs and isinstance(example := getattr(module, "example_inputs", None), tuple):
        args = example
    return Built(model, args, kwargs)


def _call(factory: Callable[..., Any], request: Request) -> Any:
    try:
        signature = inspect.signature(factory)
    except ValueError:  # a builtin without one
        signature = None
    try:
        if signature is not None:
            signature.bind(**request.factory_args)
    except TypeError as error:
        hint = f"Its signature is {signature}; arguments are given as --arg name=value"
        raise InputError(f"the factory cannot be called: {error}", where=request.source, hint=hint) from error
    with user_code("the factory", request.source):
        return factory(**request.factory_args)


def _unpack(result: Any, source: str) -> tuple[torch.nn.Module, tuple[Any, ...] | None, dict[str, Any]]:
    parts = result if isinstance(result, tuple) else (result,)
    # What a shorter tuple leaves out: no example, no keywords.
    model, args, kwargs = (*parts, *(None, {})[len(parts) - 1 :]) if 1 <= len(parts) <= 3 else (None, None, {})
    args = (args,) if isinstance(args, torch.Tensor) else args
    well_formed = isinstance(args, tuple | list | None) and isinstance(kwargs, Mapping)
    if not isinstance(model, torch.nn.Module) or not well_formed:
        what = f"the factory returned {', '.join(type(part).__name__ for part in parts) or 'nothing'}"
        hint = "It must return an nn.Module, (nn.Module, args) or (nn.Module, args, kwargs)"
        raise InputError(what, where=source, hint=hint)
    return unwrapped(model), None if args is None else tuple(args), dict(kwargs)


def own_example(model: torch.nn.Module) -> tuple[tuple[Any, ...] | None, dict[str, Any]]:
    """The example that a module carries, as Lightning's ``example_input_array`` or as ``example_inputs``."""
    for name in ("example_input_array", "example_inputs"):
        with user_code(f"reading its {name}", type(model).__name__):
            value = getattr(model, name, None)
        if isinstance(value, torch.Tensor):
            return (value,), {}
        if isinstance(value, tuple):
            return value, {}
        if isinstance(value, Mapping):
            return (), dict(value)
    return None, {}
