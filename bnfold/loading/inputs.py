"""What a model is fed: example tensors for capture, of the user's specifications or the model's own.

Where nothing says what it takes, that is read off its first layer, and assumed only where the model then runs so.
"""

from __future__ import annotations

import contextlib
import difflib
import inspect
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bnfold.errors import InputError, UsageError
from bnfold.graph.copies import eval_copy
from bnfold.graph.scripted import signature
from bnfold.loading.specs import DTYPES, RANGE_SYNTAX, InputSpec, Range

_ANY: Range = (1, None)
#: Example sizes of dynamic dimensions other than the batch: networks that halve images five times need these.
_SPATIAL_START, _SPATIAL_STEP = 64, 32
#: The layers that know how many channels an input has: what they call that, and the axes behind it to propose.
_LAYERS: dict[type[nn.Module], tuple[str, tuple[int, ...]]] = {
    nn.Conv1d: ("in_channels", (1000,)),
    nn.Conv2d: ("in_channels", (224, 224)),
    nn.Conv3d: ("in_channels", (32, 64, 64)),
    nn.Linear: ("in_features", ()),
}
#: Edges of images, the likeliest first: a model that takes any size takes the first, another only its own.
_EDGES = (224, 32, 28, 64, 96, 128, 256, 299, 384, 512)


def model_inputs(
    model: nn.Module | torch.export.ExportedProgram,
    args: tuple[Any, ...] | None,
    kwargs: Mapping[str, Any],
    specs: Sequence[InputSpec],
    ranges: Mapping[str, Range],
    *,
    seed: int = 0,
) -> tuple[tuple[Any, ...] | None, dict[str, Any], Any]:
    """Example inputs of a loaded source: those that the user specified, else its own ``args`` and ``kwargs``, if any.

    The third is ``dynamic_shapes``, None for the default of a dynamic batch. InputError as for ``example``; UsageError
    for ranges without specifications, and for specifications of a program, whose inputs are fixed.
    """
    if specs:
        if isinstance(model, torch.export.ExportedProgram):
            raise UsageError("--input does not apply to a .pt2 program", hint="Its inputs are fixed in the file")
        parameters = signature(model).parameters.values()
        keywords = [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
        return example(specs, [p.name for p in parameters], ranges=ranges, seed=seed, keywords=keywords)
    if ranges:
        raise UsageError("--dynamic names a dimension of --input, and there is no --input")
    return args, dict(kwargs), None


def specs_of_arrays(arrays: Mapping[str, Any]) -> list[InputSpec]:
    """What arrays say of the inputs that they are samples of: the first axis is the batch, the others are fixed."""
    found = []
    for name, rows in arrays.items():
        dtype = "float32" if rows.dtype.kind == "f" else rows.dtype.name
        if dtype in DTYPES and len(rows.shape):
            found.append(InputSpec(name, dtype, ("N", *map(int, rows.shape[1:]))))
    return found


def specs_for(model: nn.Module, found: Sequence[InputSpec], *, extra: bool) -> list[InputSpec]:
    """Those of ``found`` that ``model`` takes, each by the name of a parameter or, where none has its name, in order.

    Floating-point inputs get the dtype of its weights. ``extra``: there may be more than inputs, such as labels, and
    what has no parameter's name is left out.
    """
    parameters = list(signature(model).parameters)
    if extra and not (len(found) == 1 and found[0].name not in parameters):
        found = [spec for spec in found if spec.name in parameters]
    own = own_dtype(model)
    return [
        InputSpec(
            spec.name if spec.name in parameters else None,
            own if spec.dtype.startswith(("float", "bfloat")) else spec.dtype, spec.dims,
        )
        for spec in found
    ]  # fmt: skip


def own_dtype(model: nn.Module) -> str:
    """The floating-point dtype of a model's weights, by name."""
    own = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return str(own).removeprefix("torch.")


def example(
    specs: Sequence[InputSpec],
    parameters: Sequence[str],
    *,
    ranges: Mapping[str, Range],
    seed: int = 0,
    keywords: Collection[str] = (),
) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, dict[int, Any]]]:
    """Example inputs for ``torch.export``.

    Float tensors are standard normal. Integers are 0 and 1, which every embedding has; so are booleans.
    Sizes of dynamic dimensions are at least 2 and differ from one another where their ranges allow it, because
    ``torch.export`` specialises a size of 1.

    Args:
        specs: one per input, named or in order.
        parameters: names of the parameters of ``forward``, in order.
        ranges: of dynamic dimensions; one that is absent is 1 or more.

    Returns:
        ``args``, ``kwargs`` and ``dynamic_shapes`` as ``torch.export.export`` takes them. Inputs are positional as far
        as the leading parameters are covered.

    Raises:
        InputError: the model has no such input, too few of them, or one is given twice.
        UsageError: a range names a dimension that no input has, or holds no size of 2 or more.
    """
    named = _match(specs, parameters)
    sizes = _sizes(list(named.values()), ranges)
    bounds = {letter: ranges.get(letter, _ANY) for letter in sizes}
    dims = {letter: torch.export.Dim(letter, min=low, max=high) for letter, (low, high) in bounds.items()}
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: _random(spec, sizes, generator) for name, spec in named.items()}
    shapes = {
        name: {axis: dims[dim] for axis, dim in enumerate(spec.dims) if isinstance(dim, str)}
        for name, spec in named.items()
    }
    leading = list(itertools.takewhile(lambda name: name in tensors and name not in keywords, parameters))
    args = tuple(tensors.pop(name) for name in leading)
    return args, tensors, shapes


def _match(specs: Sequence[InputSpec], parameters: Sequence[str]) -> dict[str, InputSpec]:
    """Specifications by parameter, in the order of the parameters."""
    found: dict[str, InputSpec] = {}
    for spec in specs:
        if spec.name is None:
            continue
        if spec.name in found:
            raise InputError("this input is given twice", where=f"--input {spec.name}")
        if spec.name not in parameters:
            near = difflib.get_close_matches(spec.name, parameters, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"It has {', '.join(parameters) or 'none'}"
            raise InputError(f"the model has no input {spec.name!r}", where=f"--input {spec.name}", hint=hint)
        found[spec.name] = spec
    unnamed = [spec for spec in specs if spec.name is None]
    free = [name for name in parameters if name not in found]
    if len(unnamed) > len(free):
        what = f"{len(specs)} inputs are given and the model has {len(parameters)}"
        hint = f"They are {', '.join(parameters)}" if parameters else "Its forward takes none"
        raise InputError(what, where="--input", hint=hint)
    found |= dict(zip(free, unnamed))
    return {name: found[name] for name in parameters if name in found}


def _sizes(specs: Sequence[InputSpec], ranges: Mapping[str, Range]) -> dict[str, int]:
    """An example size for every dynamic dimension."""
    letters = dict.fromkeys(dim for spec in specs for dim in spec.dims if isinstance(dim, str))
    batches = {spec.dims[0] for spec in specs if spec.dims}
    if unused := next((letter for letter in ranges if letter not in letters), None):
        there = f"They have {', '.join(letters)}" if letters else "All their sizes are fixed"
        raise UsageError("no input has this dimension", where=f"--dynamic {unused}", hint=there)
    sizes: dict[str, int] = {}
    # The narrowest first: it has the least choice.
    for letter in sorted(letters, key=lambda letter: ranges.get(letter, _ANY)[1] or float("inf")):
        low, high = ranges.get(letter, _ANY)
        if high is not None and high < 2:
            raise UsageError("the range holds no size of 2 or more", where=f"--dynamic {letter}", hint=RANGE_SYNTAX)
        choices = _choices(low, high, batch=letter in batches)
        sizes[letter] = next((size for size in choices if size not in sizes.values()), max(2, low))
    return {letter: sizes[letter] for letter in letters}


def _choices(low: int, high: int | None, *, batch: bool) -> Iterator[int]:
    small = itertools.count(max(2, low))
    spatial = itertools.count(max(_SPATIAL_START, low), _SPATIAL_STEP)
    for sizes in (small,) if batch else (spatial, small):
        yield from sizes if high is None else itertools.takewhile(high.__ge__, sizes)


def _random(spec: InputSpec, sizes: Mapping[str, int], generator: torch.Generator) -> Tensor:
    shape = tuple(sizes[dim] if isinstance(dim, str) else dim for dim in spec.dims)
    try:
        dtype: torch.dtype = getattr(torch, spec.dtype)
        if dtype.is_floating_point:
            return torch.randn(shape, generator=generator).to(dtype)
        return torch.randint(0, 2, shape, generator=generator).to(dtype)
    except RuntimeError as error:
        what = f"an input of shape {list(shape)} does not fit into memory"
        raise InputError(what, where=f"--input {spec.name or ''}".strip()) from error


# -- where nothing says what it takes ----------------------------------------------------------------------------------


def proposed(model: nn.Module) -> str:
    """The option that says what the model takes, to be copied: its own names, the channels of its first layer."""
    names = _required(model)
    likely = _likely(model)
    if likely is None:
        return " ".join(f"--input {name}:float32[N,...]" for name in names or ["NAME"])
    return f'--input "{likely}" (with your sizes)'


def assumed(model: nn.Module) -> InputSpec | None:
    """The one input of a model that begins with a convolution of images or a linear layer; None where that is a guess.

    Channels are those of the first layer, the size of an image is the first of ``_EDGES`` with which the model runs.
    It must hand out a row per sample, each of that sample alone, and must not take features in another shape as well:
    then they are flattened from something else. What runs is a copy, in eval mode; CaptureError where there is none.
    """
    spec = _likely(model)
    if spec is None or len(spec.dims) not in (2, 4):
        return None
    runs, channels = partial(_runs, eval_copy(model), spec), int(spec.dims[1])
    if len(spec.dims) == 2:
        return spec if runs(channels) and (channels == 1 or not runs(channels, 1)) else None
    edge = next((edge for edge in _EDGES if runs(channels, edge, edge)), None)
    return replace(spec, dims=("N", channels, edge, edge)) if edge else None


def _required(model: nn.Module) -> list[str]:
    """The parameters of ``forward`` that must be given."""
    return [name for name, each in signature(model).parameters.items() if each.default is inspect.Parameter.empty]


def _likely(model: nn.Module) -> InputSpec | None:
    """What the first layer says of the only input, with sizes that are usual; None where it says nothing."""
    parameters, names = signature(model).parameters, _required(model)
    first = next((layer for layer in model.modules() if type(layer) in _LAYERS), None)
    gathers = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    if first is None or len(names) != 1 or parameters[names[0]].kind in gathers:
        return None
    channels, sizes = _LAYERS[type(first)]
    return InputSpec(names[0], own_dtype(model), ("N", getattr(first, channels), *sizes))


@torch.no_grad()
def _runs(model: nn.Module, spec: InputSpec, *shape: int) -> bool:
    """Whether two samples of ``shape`` get a row each, of which none depends on the other: not by one bit."""
    draw, dtype, name = torch.Generator().manual_seed(0), getattr(torch, spec.dtype), spec.name or ""
    one, two, other = (torch.randn((1, *shape), generator=draw).to(dtype) for _ in range(3))
    by_name = signature(model).parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
    with contextlib.suppress(Exception):  # whatever the model's own code raises on what it does not take
        inputs = [torch.cat((one, each)) for each in (two, other)]
        found = [pytree.tree_leaves(model(**{name: x}) if by_name else model(x)) for x in inputs]
        tensors = [[value for value in values if isinstance(value, Tensor)] for values in found]
        rows = all(value.ndim and len(value) == 2 for values in tensors for value in values)
        return bool(tensors[0]) and rows and all(
            torch.allclose(a[:1], b[:1], rtol=0, atol=0, equal_nan=True) for a, b in zip(*tensors, strict=True)
        )  # fmt: skip
    return False
