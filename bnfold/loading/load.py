"""A source that the user names -> a module, its example inputs, and where it came from.

Every kind of source is one row of ``_SOURCES``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bnfold.errors import InputError, UsageError
from bnfold.files import there
from bnfold.graph.wrapped import unwrapped
from bnfold.loading import checkpoint, factory, hubs, inert
from bnfold.loading.checkpoint import Kind
from bnfold.loading.fitting import descend, load_weights
from bnfold.loading.program_file import load_program, load_script
from bnfold.loading.source import Built, Loaded, Normalization, Provenance, Request
from bnfold.loading.structure import prepare, read_notes, stored_ledgers


def load(source: str, **options: Any) -> Loaded:
    """Load the model that ``source`` names; ``options`` are the other fields of ``Request``.

    Raises:
        UsageError: the source is of no known form, or an option does not apply to it.
        ProviderError: the library that the source names is not installed.
        InputError: a file is missing, damaged or of another kind; the user's code fails; the weights do not fit.
        CaptureError: a model that is there already, or that is to be folded like its weights, cannot be copied.
    """
    request = Request(source, **options)
    if request.weights:
        request = replace(request, weights=checkpoint.resolve(Path(request.weights)))
    row = next((row for row in _SOURCES if row.matches(source)), None) if "\0" not in source else None
    if row is None:
        forms = "; ".join(row.form for row in _SOURCES)
        raise UsageError(f"{source!r} is no source of a model", hint=f"A source is one of: {forms}")
    if not row.takes_weights and (request.weights or request.factory_args):
        raise UsageError(f"{row.form} takes neither --weights nor --arg: it is a whole model", where=source)
    pickled = row.read is _from_file and request.unsafe_pickle
    selects = request.strip_prefix or request.ignore or (request.weights_key and not pickled)
    if selects and not request.weights:
        hint = "Of several models in one file --weights-key picks one, with --unsafe-pickle"
        raise UsageError("--weights-key, --strip-prefix and --ignore need --weights", where=source, hint=hint)
    loaded = row.read(request)
    return _normalized(loaded, source, request.normalize) if request.normalize else loaded


# ---- whole models in a file ------------------------------------------------------------------------------------------


def _from_file(request: Request) -> Loaded:
    path = Path(request.source)
    if path.suffix == ".py" and there(path):
        raise UsageError("the factory's name is missing", where=request.source, hint=f"Write {request.source}:FACTORY")
    if path.suffix.lower() == ".onnx" and path.is_file():
        return _from_onnx(request, path)
    kind = checkpoint.identify(path)
    if kind is Kind.PROGRAM:
        program = load_program(path, unsafe=request.unsafe_pickle)
        return _loaded(request, Built(program, *(program.example_inputs or (None, {}))), path)
    if kind is Kind.SAFETENSORS:
        raise _only_weights(request.source)
    if kind is Kind.SCRIPT:
        return _loaded(request, Built(load_script(path)), path)
    content = checkpoint.unpickle(path, kind, unsafe=request.unsafe_pickle)
    if request.weights_key:
        content = descend(content, request.weights_key, path)
    if stub := inert.stub_in(content, checkpoint.WRAPPERS):
        raise checkpoint.needs_code(path, stub)
    if isinstance(content, Mapping):
        inner = [key for key in checkpoint.WRAPPERS if isinstance(content.get(key), nn.Module)]
        if len(inner) > 1:
            what = f"the file holds several models: {', '.join(inner)}"
            raise InputError(what, where=request.source, hint=f"Pick one, for example --weights-key {inner[0]}")
        if not inner:
            raise _only_weights(request.source)
        content = content[inner[0]]
    if not isinstance(content, nn.Module):
        raise InputError(f"the file holds a {type(content).__name__}, no module", where=request.source)
    return _loaded(request, Built(content, *factory.own_example(unwrapped(content))), path)


def _from_onnx(request: Request, path: Path) -> Loaded:
    from bnfold.loading.onnx_file import read_onnx  # onnx is for those who have such a file

    file = read_onnx(path)
    provenance = Provenance(_public(request.source), None, checkpoint.sha256(path), file.elements)
    return Loaded(file, provenance=provenance)


def _only_weights(source: str) -> InputError:
    hint = f"Give the code that builds the model, path/to/file.py:factory, and --weights {source}"
    return InputError("the file holds weights and no model", where=source, hint=hint)


# ---- models that Python code or a library builds ---------------------------------------------------------------------


def _from_code(request: Request) -> Loaded:
    with factory.built(request) as built:
        return _weighted(request, built)


def _from_hub(request: Request) -> Loaded:
    return _weighted(request, hubs.open_named(request))


def _weighted(request: Request, built: Built) -> Loaded:
    """The model with the weights that the user names, if any."""
    if request.weights is None:
        return _loaded(request, built, built.file)
    if stored_ledgers(request.weights):
        built = replace(built, model=prepare(built.model, request.weights))
    return _loaded(request, built, request.weights, load_weights(built.model, request))


def _normalized(loaded: Loaded, source: str, asked: bool | Normalization) -> Loaded:
    """The model with a normalisation of its images in front, and raw images for an example."""
    if isinstance(loaded.model, torch.export.ExportedProgram):
        hint = "Give the code that builds the model"
        raise UsageError("a .pt2 program cannot be normalised", where=source, hint=hint)
    normalization = loaded.normalization if asked is True else asked
    if not isinstance(normalization, Normalization):
        hint = "Say how: --mean-std 0.485,0.456,0.406/0.229,0.224,0.225"
        raise UsageError("nothing says how this model's images are normalised", where="--normalize", hint=hint)
    put_in_front(loaded.model, normalization, loaded.args, loaded.kwargs, where=source)
    known = loaded.normalization
    if known is None:
        return loaded
    raw: tuple[Any, Any] = pytree.tree_map_only(
        Tensor, lambda t: known.undo(t) if t.is_floating_point() else t, (loaded.args, loaded.kwargs)
    )
    return replace(loaded, args=raw[0], kwargs=raw[1], normalization=None)


# ---- what every source shares ----------------------------------------------------------------------------------------


def _loaded(request: Request, built: Built, file: Path | None, left_out: Sequence[str] = ()) -> Loaded:
    """What was built, and that it came from ``file``."""
    model, weights = built.model, request.weights
    parameters = {id(p): p.numel() for p in model.parameters() if not nn.parameter.is_lazy(p)}
    provenance = Provenance(
        _public(request.source), weights.name if weights else built.weights, checkpoint.sha256(file) if file else None,
        sum(parameters.values()), read_notes(weights) if weights else {}, tuple(left_out),
    )  # fmt: skip
    if isinstance(model, nn.Module):
        model = unwrapped(model)
    return Loaded(**vars(built) | {"model": model, "provenance": provenance})


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
    read: Callable[[Request], Loaded]
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
    _Source("path/to/file.py:factory", _written(rf"(?!{_HUB}).+\.py:{_NAME}"), _from_code, True),
    _Source("pkg.module:factory", _written(rf"(?!{_HUB}){_NAME}(\.{_NAME})*:{_NAME}"), _from_code, True),
    _Source("timm:NAME; torchvision:NAME; hf:DIR or hf:ID", _written(f"{_HUB}.+"), _from_hub, True),
    _Source("net.pt2, a TorchScript archive, or net.pt with a whole pickled module", _is_file_name, _from_file, False),
)


# ---- a normalisation of images in front, where the fold can take it into the convolution behind it -------------------

_BUFFER = "normalize"


@dataclass(frozen=True)
class NormalizeFirst:
    """A hook before a model's forward that normalises the first image among its inputs; the rest stays as it is."""

    mean: str  #: name of the model's buffer with the means.
    std: str  #: the same with the standard deviations.

    def __call__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The inputs that the forward is given."""
        mean, std = getattr(model, self.mean), getattr(model, self.std)
        for i, value in enumerate(args):
            if _is_image(value):
                return (*args[:i], (value - mean) / std, *args[i + 1 :]), kwargs
        for name, value in kwargs.items():
            if _is_image(value):
                return args, {**kwargs, name: (value - mean) / std}
        return args, kwargs


def put_in_front(
    model: nn.Module, normalization: Normalization, args: Sequence[Any] | None, kwargs: Mapping[str, Any], *, where: str
) -> None:
    """Lets ``model`` itself normalise its images, by a hook before its ``forward``: its class and its names stay.

    The constants are buffers of the model itself that no state dict holds, and no layer: a forward that iterates over
    the model's children (``nn.Sequential``) would call one more. Example inputs say how many axes the images have, 4
    where ``args`` are None. InputError where the model has no image input, or one of another number of channels.
    """
    given = [leaf for leaf in pytree.tree_leaves((args, dict(kwargs))) if isinstance(leaf, Tensor)]
    image = next((leaf for leaf in given if _is_image(leaf)), None)
    if given and image is None:
        raise InputError("the model takes no images (N, C, ...) that could be normalised", where=where)
    channels = max(len(normalization.mean), len(normalization.std))
    if image is not None and channels not in (1, image.shape[1]):
        hint = "Give as many with --mean-std, or one for all"
        what = f"the model takes {image.shape[1]} channels and is to be normalised by {channels} means"
        raise InputError(what, where=where, hint=hint)
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    mean, std = (part.to(like) for part in normalization.constants(4 if image is None else image.ndim))
    prefixes = (_BUFFER, f"{_BUFFER}_input", f"_bnfold_{_BUFFER}")
    hook = next(
        hook
        for hook in (NormalizeFirst(f"{prefix}_mean", f"{prefix}_std") for prefix in prefixes)
        if not hasattr(model, hook.mean) and not hasattr(model, hook.std)
    )
    model.register_buffer(hook.mean, mean, persistent=False)
    model.register_buffer(hook.std, std, persistent=False)
    model.register_forward_pre_hook(hook, with_kwargs=True)


def _is_image(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim >= 3
