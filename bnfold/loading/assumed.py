"""What a model takes where nothing says it: read off its first layer, and assumed only where it then runs so."""

from __future__ import annotations

import contextlib
import inspect
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bnfold.graph.copies import eval_copy
from bnfold.graph.scripted import signature
from bnfold.loading.inputs import own_dtype
from bnfold.loading.specs import InputSpec

#: The layers that know how many channels an input has: what they call that, and the axes behind it to propose.
_LAYERS: dict[type[nn.Module], tuple[str, tuple[int, ...]]] = {
    nn.Conv1d: ("in_channels", (1000,)),
    nn.Conv2d: ("in_channels", (224, 224)),
    nn.Conv3d: ("in_channels", (32, 64, 64)),
    nn.Linear: ("in_features", ()),
}
#: Edges of images, the likeliest first: a model that takes any size takes the first, another only its own.
_EDGES = (224, 32, 28, 64, 96, 128, 256, 299, 384, 512)


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
    then they are flattened from something else.

    Args:
        model: not touched; a copy runs, in eval mode.

    Raises:
        CaptureError: the model cannot be copied.
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
