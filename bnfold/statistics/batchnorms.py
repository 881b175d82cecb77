"""The BatchNorms of an eager module, whatever their class: torch's, lazy, frozen look-alikes, a user's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.parameter import is_lazy

from bnfold.report import NormKind

STATISTICS = ("running_mean", "running_var")
#: torch's default, which the frozen BatchNorms that have no attribute for it use too.
EPS = 1e-5


def batch_norms(model: nn.Module) -> dict[str, nn.Module]:
    """The BatchNorms of ``model`` by qualified name, in its own order; one under two names has the first.

    They are: every subclass of torch's BatchNorm; InstanceNorm that keeps running statistics, which in eval mode is a
    BatchNorm; and any other module that itself holds tensors ``running_mean`` and ``running_var``.
    """
    return {name: module for name, module in model.named_modules() if norm_kind(module) is not None}


def norm_kind(module: nn.Module) -> NormKind | None:
    """What kind of BatchNorm a module is; None where it is none."""
    if isinstance(module, _BatchNorm):
        return "batch_norm"
    if any(not isinstance(getattr(module, name, None), Tensor) for name in STATISTICS):
        return None
    if isinstance(module, _NormBase):
        return "instance_norm"
    return "custom" if any(True for _ in module.parameters(recurse=False)) else "frozen"


def sharers(norms: Mapping[str, nn.Module]) -> dict[str, str]:
    """For every BatchNorm the first that has its running_mean or its running_var: itself where none shares them."""
    first: dict[str, str] = {}
    # The tensors are kept while their ids count: a computed one is another at every look.
    owner: dict[int, tuple[str, Tensor]] = {}
    for name, norm in norms.items():
        own = [tensor for key, tensor in own_tensors(norm).items() if key in STATISTICS]
        first[name] = next((owner[id(tensor)][0] for tensor in own if id(tensor) in owner), name)
        for tensor in own:
            owner.setdefault(id(tensor), (first[name], tensor))
    return first


def without_numbers(module: nn.Module) -> str | None:
    """Why a BatchNorm's tensors cannot be reckoned with; None where they can."""
    for tensor in own_tensors(module).values():
        if tensor.is_complex():
            return "complex"
        if tensor.is_meta:
            return "on the meta device, without values"
    return None


def is_unshaped(module: nn.Module) -> bool:
    """Whether a lazy layer has seen no input yet, so that it has no channels."""
    return any(is_lazy(tensor) for tensor in own_tensors(module).values())


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """weight, bias, running_mean and running_var, as far as they are there."""
    found = ((name, getattr(module, name, None)) for name in ("weight", "bias", *STATISTICS))
    return {name: value for name, value in found if isinstance(value, Tensor)}


def channels_of(module: nn.Module) -> int | None:
    """How many channels a BatchNorm has; None for a lazy one that has seen no input."""
    if is_unshaped(module):
        return None
    for tensor in own_tensors(module).values():
        return tensor.numel()
    return int(getattr(module, "num_features", 0)) or None


def eps_of(module: nn.Module) -> float | None:
    """The eps that a BatchNorm says it has; a frozen one may have it in its code alone."""
    value: Any = getattr(module, "eps", getattr(module, "epsilon", None))
    return float(value) if isinstance(value, (int, float)) else None


def lacks_statistics(module: nn.Module) -> bool:
    """Whether a BatchNorm has no running statistics, so that it uses the batch's in eval mode too."""
    return isinstance(module, _BatchNorm) and module.running_mean is None and module.running_var is None


def keep_statistics(module: nn.Module, like: Tensor) -> None:
    """Gives a BatchNorm that has none running statistics of mean 0 and variance 1, in place.

    Args:
        module: of ``track_running_stats=False``; afterwards as if built with True.
        like: of the dtype and on the device that they are to have.
    """
    channels = int(module.num_features)  # type: ignore[arg-type]
    module.register_buffer("running_mean", torch.zeros(channels, dtype=like.dtype, device=like.device))
    module.register_buffer("running_var", torch.ones(channels, dtype=like.dtype, device=like.device))
    module.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long, device=like.device))
    module.track_running_stats = True  # type: ignore[assignment]


def statistics_like(module: nn.Module, model: nn.Module) -> Tensor:
    """A tensor of the dtype and device for new statistics of a module of ``model``: its gamma, else any weight."""
    weights = (p for owner in (module, model) for p in owner.parameters() if p.is_floating_point())
    return next(weights, torch.zeros(()))


@contextmanager
def watching_inputs(
    norms: Iterable[tuple[str, nn.Module]], watch: Callable[[str, nn.Module, Tensor], None]
) -> Iterator[None]:
    """While it lasts, ``watch`` is called with the name and the input of every one of ``norms`` before it runs."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def entering(norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            watch(name, norm, next(tensors_in([args, kwargs])))

        return entering

    handles = [norm.register_forward_pre_hook(hook(name), with_kwargs=True) for name, norm in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested lists, tuples and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
