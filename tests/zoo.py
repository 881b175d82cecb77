"""Small nets with randomised statistics, in the shapes of published ones, for tests of whole models.

``NETS[name]()`` gives a module in eval mode and an example batch of two; the same name gives the same numbers every
time. ``KEYWORD_NETS`` adds keyword inputs. torch.export captures every one of them with a dynamic batch.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

import torch
import zoo_attention
import zoo_convnets
import zoo_corners
import zoo_reparam
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from zoo_parts import Factory

LAYER_SCALES = ("gamma", "layer_scale", "lambda")


def is_frozen_norm(module: nn.Module) -> bool:
    """Whether ``module`` is a FrozenBatchNorm: BatchNorm's four tensors as buffers."""
    buffers = dict(module.named_buffers(recurse=False))
    return {"weight", "bias", "running_mean", "running_var"} <= buffers.keys()


def count_batchnorms(module: nn.Module) -> int:
    """BatchNorm modules in ``module``, frozen ones too; one that is called twice counts once."""
    return sum(isinstance(m, _BatchNorm) or is_frozen_norm(m) for m in module.modules())


@torch.no_grad()
def randomize(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give every norm of ``module`` statistics that no fold can ignore; in place, and returned in eval mode.

    BatchNorm (frozen ones and InstanceNorm with running statistics too): weight in +-[0.5, 1.5], a quarter negative,
    one channel of eight or more exactly 0; bias ~ N(0, 0.5); running_mean ~ N(0, 0.5); running_var in [0.2, 2].
    LayerNorm and GroupNorm: weight in [0.5, 1.5], bias ~ N(0, 0.2). LayerScale: +-[0.3, 1].
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(tensor: Tensor, low: float, high: float, negative: float = 0.0) -> None:
        size = low + (high - low) * torch.rand(tensor.shape, generator=generator)
        sign = 1 - 2 * (torch.rand(tensor.shape, generator=generator) < negative).float()
        tensor.copy_(size * sign)

    def normal(tensor: Tensor, std: float) -> None:
        tensor.copy_(std * torch.randn(tensor.shape, generator=generator))

    for child in module.modules():
        for name, parameter in child.named_parameters(recurse=False):
            if any(word in name for word in LAYER_SCALES):
                uniform(parameter, 0.3, 1.0, negative=0.5)
        running = getattr(child, "running_var", None) is not None
        if not (running or isinstance(child, (_BatchNorm, nn.LayerNorm, nn.GroupNorm))):
            continue
        batchnorm = running or isinstance(child, _BatchNorm)
        weight, bias = getattr(child, "weight", None), getattr(child, "bias", None)
        if weight is not None:
            uniform(weight, 0.5, 1.5, negative=0.25 if batchnorm else 0.0)
            if batchnorm and len(weight) >= 8:
                weight[int(torch.randint(len(weight), (), generator=generator))] = 0
        if bias is not None:
            normal(bias, 0.5 if batchnorm else 0.2)
        if running:
            normal(child.running_mean, 0.5)
            uniform(child.running_var, 0.2, 2.0)
    return module.eval()


@torch.no_grad()
def he_init(module: nn.Module, seed: int = 0) -> nn.Module:
    """He-normal weights for the contractions of ``module``, in place: default ones shrink what the input says.

    Without this a net of random statistics answers every input with nearly the same constants, and hides faults.
    """
    generator = torch.Generator().manual_seed(seed)
    contractions = (nn.modules.conv._ConvNd, nn.Linear)
    for child in module.modules():
        if isinstance(child, contractions) and isinstance(child._parameters.get("weight"), nn.Parameter):
            nn.init.kaiming_normal_(child.weight, nonlinearity="relu", generator=generator)
    return module


def prepared(name: str, factory: Factory) -> Factory:
    """``factory`` with its random numbers fixed by ``name``, and weights and statistics that a fold must get right."""

    def build() -> tuple[nn.Module, tuple[Tensor, ...]]:
        seed = zlib.crc32(name.encode())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module, args = factory()
        randomize(he_init(module, seed), seed)
        # Statistics that are the very point of a net are set last.
        if hasattr(module, "settle"):
            module.settle()
        return module, args

    return build


_FACTORIES = zoo_convnets.NETS | zoo_reparam.NETS | zoo_attention.NETS | zoo_corners.NETS

NETS: dict[str, Factory] = {name: prepared(name, factory) for name, factory in _FACTORIES.items()}


def _keyword_inputs() -> tuple[nn.Module, tuple[Tensor, ...], dict[str, Tensor]]:
    build = prepared("keyword_inputs", lambda: (zoo_corners.KeywordInputs(), (torch.randn(2, 3, 8, 8),)))
    module, args = build()
    return module, args, {"style": torch.linspace(-1, 1, 8).reshape(2, 4)}


#: Nets that also take keyword inputs: module, args, kwargs.
KEYWORD_NETS: dict[str, Callable[[], tuple[nn.Module, tuple[Tensor, ...], dict[str, Tensor]]]] = {
    "keyword_inputs": _keyword_inputs,
}

#: BatchNorm modules of each net, as it is built.
BATCHNORMS: dict[str, int] = {name: count_batchnorms(build()[0]) for name, build in NETS.items()}
