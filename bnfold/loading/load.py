"""A source that the user names -> a module, its example inputs, and where it came from.

Every kind of source is one row of ``_SOURCES``.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from bnfold.errors import InputError, UsageError
from bnfold.files import require_file, there
from bnfold.graph.copies import copied
from bnfold.graph.wrapped import unwrapped
from bnfold.loading import checkpoint, hubs, inert
from bnfold.loading.checkpoint import Kind
from bnfold.loading.fitting import descend, load_weights
from bnfold.loading.normalize import Normalization, put_in_front
from bnfold.loading.program_file import load_program
from bnfold.loading.script_file import load_script
from bnfold.loading.structure import prepare, stored_ledgers
from bnfold.loading.weights_file import read_notes
from bnfold.user_code import importable, is_inside, user_code


@dataclass(frozen=True)
class Provenance:
    """Where a model came from, fit to be published: no absolute or parent path.

    Attributes:
        source: what the user typed; of a path outside the working directory, the file name alone.
        weights: file name of the weights.
        sha256: of the weights file, or of the file that is the source; None where there is no file.
        parameters: number of parameter elements, a shared one counted once.
        notes: bnfold's own in the weights' file, which say how the model was rebuilt; a file written of it keeps them.
        left_out: keys of the weights that no part of the model has.
    """

    source: str
    weights: str | None
    sha256: str | None
    parameters: int
    notes: Mapping[str, str] = field(default_factory=dict, repr=False)
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Loaded:
    """A model as its source gave it: neither its mode nor any flag is changed.

    Attributes:
        model: the module, exported program or ONNX file.
        args: positional example inputs where the source carries them.
        kwargs: example inputs by name.
        provenance: where it came from.
        normalization: how its images are normalised, where the source knows that; ``args`` are.
    """

    model: Any
    args: tuple[Any, ...] | None
    kwargs: dict[str, Any]
    provenance: Provenance
    normalization: Normalization | None = None


@dataclass(frozen=True)
class _Request:
    source: str
    weights: Path | None = None
    weights_key: str | None = None
    strip_prefix: str | None = None
    factory_args: Mapping[str, Any] = field(default_factory=dict)
    unsafe_pickle: bool = False
    strict: bool = False
    ignore: Sequence[str] = ()


def load(
    source: str,
    *,
    weights: str | Path | None = None,
    weights_key: str | None = None,
    strip_prefix: str | None = None,
    factory_args: Mapping[str, Any] | None = None,
    unsafe_pickle: bool = False,
    strict: bool = False,
    ignore: Sequence[str] = (),
    normalize: bool | Normalization = False,
) -> Loaded:
    """Load the model that ``source`` names.

    Args:
        source: ``net.pt2``, a TorchScript archive, ``pkg.module:factory``, ``path/to/file.py:factory``, ``timm:NAME``,
            ``torchvision:NAME``, ``hf:DIR-or-ID``, or ``net.pt`` with a pickled module.
        weights: checkpoint for what the factory builds (.safetensors, written by ``torch.save``, an index of shards,
            or a folder of one); of a model that bnfold folded in its own class, the class is given the folded
            structure first.
        weights_key: where in the checkpoint the state dict is, with dots for nested keys; of a pickled module as the
            source, where that is.
        strip_prefix: taken off every key of the state dict that begins with it.
        factory_args: keyword arguments of the factory.
        unsafe_pickle: allow pickles that can run any code.
        strict: refuse weights that hold keys which no part of the model has; by default they are left out.
        ignore: patterns of keys to leave out, such as ``criterion.*``.
        normalize: put this normalisation of images in front, or with True that of the model's own configuration.

    Raises:
        UsageError: the source is of no known form, or an option does not apply to it.
        ProviderError: the library that the source names is not installed.
        InputError: a file is missing, damaged or of another kind; the user's code fails; the weights do not fit.
        CaptureError: a model that is there already, or that is to be folded like its weights, cannot be copied.
    """
    file = checkpoint.resolve(Path(weights)) if weights else None
    request = _Request(
        source, file, weights_key, strip_prefix, dict(factory_args or {}), unsafe_pickle, strict, tuple(ignore)
    )
    row = next((row for row in _SOURCES if row.matches(source)), None) if "\0" not in source else None
    if row is None:
        forms = "; ".join(row.form for row in _SOURCES)
        raise UsageError(f"{source!r} is no source of a model", hint=f"A source is one of: {forms}")
    if not row.takes_weights and (weights or factory_args):
        raise UsageError(f"{row.form} takes neither --weights nor --arg: it is a whole model", where=source)
    pickled = row.read is _from_file and unsafe_pickle
    if (strip_prefix or ignore or (weights_key and not pickled)) and not weights:
        hint = "Of several models in one file --weights-key picks one, with --unsafe-pickle"
        raise UsageError("--weights-key, --strip-prefix and --ignore need --weights", where=source, hint=hint)
    loaded = row.read(request)
    return _normalized(loaded, source, normalize) if normalize else loaded


# ---- whole models in a file ------------------------------------------------------------------------------------------


def _from_file(request: _Request) -> Loaded:
    path = Path(request.source)
    if path.suffix == ".py" and there(path):
        raise UsageError("the factory's name is missing", where=request.source, hint=f"Write {request.source}:FACTORY")
    if path.suffix.lower() == ".onnx" and path.is_file():
        return _from_onnx(request, path)
    kind = checkpoint.identify(path)
    if kind is Kind.PROGRAM:
        return _from_program(request, path)
    if kind is Kind.SAFETENSORS:
        raise _only_weights(request.source)
    if kind is Kind.SCRIPT:
        return _loaded(request, load_script(path), None, {}, sha256=checkpoint.sha256(path))
    content = checkpoint.unpickle(path, kind, unsafe=request.unsafe_pickle)
    if request.weights_key:
        content = descend(content, request.weights_key, path)
    if stub := inert.stub_in(content, checkpoint.WRAPPERS):
        raise checkpoint.needs_code(path, stub)
    if isinstance(content, Mapping):
        inner = [key for key in checkpoint.WRAPPERS if isinstance(content.get(key), torch.nn.Module)]
        if len(inner) > 1:
            what = f"the file holds several models: {', '.join(inner)}"
            raise InputError(what, where=request.source, hint=f"Pick one, for example --weights-key {inner[0]}")
        if not inner:
            raise _only_weights(request.source)
        content = content[inner[0]]
    if not isinstance(content, torch.nn.Module):
        raise InputError(f"the file holds a {type(content).__name__}, no module", where=request.source)
    return _loaded(request, content, *_own_example(unwrapped(content)), sha256=checkpoint.sha256(path))


def _from_onnx(request: _Request, path: Path) -> Loaded:
    from bnfold.loading.onnx_file import read_onnx  # onnx is for those who have such a file

    file = read_onnx(path)
    provenance = Provenance(_public(request.source), None, checkpoint.sha256(path), file.elements)
    return Loaded(file, None, {}, provenance)


def _only_weights(source: str) -> InputError:
    hint = f"Give the code that builds the model, path/to/file.py:factory, and --weights {source}"
    return InputError("the file holds weights and no model", where=source, hint=hint)


def _from_program(request: _Request, path: Path) -> Loaded:
    program = load_program(path, unsafe=request.unsafe_pickle)
    args, kwargs = program.example_inputs or (None, {})
    return _loaded(request, program, args, kwargs, sha256=checkpoint.sha256(path))


# ---- factories -------------------------------------------------------------------------------------------------------

#: Modules that earlier sources imported from their own folder: a later source's ``import blocks`` must find its own.
_siblings: set[str] = set()


def _from_python_file(request: _Request) -> Loaded:
    name, _, attribute = request.source.rpartition(":")
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
            return _from_attribute(request, module, attribute)
    except BaseException:
        del sys.modules[spec.name]
        raise
    finally:
        _siblings.update(key for key in set(sys.modules) - before - {spec.name} if is_inside(sys.modules[key], folder))


def _from_python_module(request: _Request) -> Loaded:
    name, _, attribute = request.source.partition(":")
    with importable(Path.cwd()):
        with user_code("importing it", name):
            try:
                module = importlib.import_module(name)
            except ModuleNotFoundError as error:
                if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                    raise
                hint = "Install it, run from the folder that holds it, or give path/to/file.py:factory"
                raise InputError(
                    f"there is no Python module {error.name!r}", where=request.source, hint=hint
                ) from error
        return _from_attribute(request, module, attribute)


def _from_attribute(request: _Request, module: ModuleType, name: str) -> Loaded:
    """Build the model with the module's attribute ``name``, and give it its weights."""
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
        raise InputError(
            f"{name!r} is a {type(factory).__name__} and cannot be called", where=request.source, hint=hint
        )
    model, args, kwargs = _unpack(result, request.source)
    model = unwrapped(model)
    if args is None and not kwargs:
        args, kwargs = _own_example(model)
    if args is None and not kwargs and isinstance(example := getattr(module, "example_inputs", None), tuple):
        args = example
    if request.weights is None:
        return _loaded(request, model, args, kwargs, sha256=None)
    model, left_out = _weighted(request, model)
    return _loaded(request, model, args, kwargs, sha256=checkpoint.sha256(request.weights), left_out=left_out)


def _weighted(request: _Request, model: torch.nn.Module) -> tuple[torch.nn.Module, list[str]]:
    """The model with the weights that the user names, and the keys of these that were left out."""
    assert request.weights is not None
    if stored_ledgers(request.weights):
        model = prepare(model, request.weights)
    left_out = load_weights(
        model, request.weights, key=request.weights_key, strip_prefix=request.strip_prefix,
        unsafe=request.unsafe_pickle, strict=request.strict, ignore=request.ignore,
    )  # fmt: skip
    return model, left_out


def _call(factory: Callable[..., Any], request: _Request) -> Any:
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
        raise InputError(
            f"the factory returned {', '.join(type(part).__name__ for part in parts) or 'nothing'}",
            where=source,
            hint="It must return an nn.Module, (nn.Module, args) or (nn.Module, args, kwargs)",
        )
    return model, None if args is None else tuple(args), dict(kwargs)


def _own_example(model: torch.nn.Module) -> tuple[tuple[Any, ...] | None, dict[str, Any]]:
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


# ---- named models ----------------------------------------------------------------------------------------------------


def _from_hub(request: _Request) -> Loaded:
    hub, _, name = request.source.partition(":")
    named = hubs.open_named(hub, name, request.factory_args, weights=request.weights is not None)
    model, left_out = (named.model, []) if request.weights is None else _weighted(request, named.model)
    file = request.weights or named.file
    sha256 = checkpoint.sha256(file) if file else None
    loaded = _loaded(request, model, named.args, named.kwargs, sha256=sha256, left_out=left_out)
    provenance = loaded.provenance
    if request.weights is None:
        provenance = replace(provenance, weights=named.weights)
    return replace(loaded, normalization=named.normalization, provenance=provenance)


def _normalized(loaded: Loaded, source: str, asked: bool | Normalization) -> Loaded:
    """The model with a normalisation of its images in front, and raw images for an example."""
    if isinstance(loaded.model, torch.export.ExportedProgram):
        raise UsageError(
            "a .pt2 program cannot be normalised", where=source, hint="Give the code that builds the model"
        )
    normalization = loaded.normalization if asked is True else asked
    if not isinstance(normalization, Normalization):
        hint = "Say how: --mean-std 0.485,0.456,0.406/0.229,0.224,0.225"
        raise UsageError("nothing says how this model's images are normalised", where="--normalize", hint=hint)
    put_in_front(loaded.model, normalization, loaded.args, loaded.kwargs, where=source)
    known = loaded.normalization
    if known is None:
        return loaded
    raw: tuple[Any, Any] = torch.utils._pytree.tree_map_only(
        torch.Tensor, lambda t: known.undo(t) if t.is_floating_point() else t, (loaded.args, loaded.kwargs)
    )
    return replace(loaded, args=raw[0], kwargs=raw[1], normalization=None)


# ---- what every source shares ----------------------------------------------------------------------------------------


def _loaded(
    request: _Request,
    model: torch.nn.Module | torch.export.ExportedProgram,
    args: tuple[Any, ...] | None,
    kwargs: dict[str, Any],
    *,
    sha256: str | None,
    left_out: Sequence[str] = (),
) -> Loaded:
    parameters = {id(p): p.numel() for p in model.parameters() if not torch.nn.parameter.is_lazy(p)}
    provenance = Provenance(
        source=_public(request.source),
        weights=request.weights.name if request.weights else None,
        sha256=sha256,
        parameters=sum(parameters.values()),
        notes=read_notes(request.weights) if request.weights else {},
        left_out=tuple(left_out),
    )
    if isinstance(model, torch.nn.Module):
        model = unwrapped(model)
    return Loaded(model, args, dict(kwargs), provenance)


def _public(source: str) -> str:
    hub, colon, name = source.partition(":") if source.startswith("hf:") else ("", "", source)
    path = Path(name)
    hidden = path.is_absolute() or ".." in path.parts or name.startswith("~")
    return hub + colon + (path.name if hidden else name)


# ---- the kinds of source ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """One kind of source: how it is written, which strings are it, who reads it."""

    form: str
    matches: Callable[[str], bool]
    read: Callable[[_Request], Loaded]
    takes_weights: bool


def _written(pattern: str) -> Callable[[str], bool]:
    return lambda source: re.fullmatch(pattern, source) is not None


def _is_file_name(source: str) -> bool:
    # One letter before the colon is a Windows drive, several are a kind of source.
    return bool(source.strip()) and (there(source) or re.match(r"[^\W\d][\w+.-]+:", source) is None)


_NAME = r"[^\W\d]\w*"
_HUB = r"(timm|torchvision|hf):"
#: In this order; the first that matches reads the source.
_SOURCES: tuple[_Source, ...] = (
    _Source("path/to/file.py:factory", _written(rf"(?!{_HUB}).+\.py:{_NAME}"), _from_python_file, True),
    _Source("pkg.module:factory", _written(rf"(?!{_HUB}){_NAME}(\.{_NAME})*:{_NAME}"), _from_python_module, True),
    _Source("timm:NAME; torchvision:NAME; hf:DIR or hf:ID", _written(f"{_HUB}.+"), _from_hub, True),
    _Source("net.pt2, a TorchScript archive, or net.pt with a whole pickled module", _is_file_name, _from_file, False),
)
