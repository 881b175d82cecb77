"""Models as training code wraps them, without what wraps them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import AveragedModel
from torch.utils import _pytree as pytree

from bnfold.errors import InputError
from bnfold.graph.copies import copied, eval_copy


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of ``torch.compile``, of data parallelism and of weight averaging; ``model`` is not touched.

    Raises:
        CaptureError: a part of it is wrapped, and it cannot be copied.
    """
    while (inner := _inner(model)) is not None:
        model = inner
    if any(_inner(module) is not None for module in model.modules()):
        model = copied(model)
        while wrapped := [(m, name, i) for m in model.modules() for name, c in m._modules.items() if (i := _inner(c))]:
            for owner, name, inner in wrapped:
                owner._modules[name] = inner
    return model


def refuse_mixed(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Refuses weights in half precision that cannot be applied to wider inputs, which capturing does not notice.

    Raises:
        InputError: the model, run once, does not take them.
        CaptureError: it cannot be copied.
    """
    halves = {p.dtype for p in model.parameters() if not is_lazy(p)} & {torch.float16, torch.bfloat16}
    inputs = {leaf.dtype for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
    wide = inputs & {torch.float32, torch.float64}
    if not halves or not wide:
        return
    try:
        with torch.no_grad():
            eval_copy(model)(*args, **kwargs)
    except Exception as error:
        names = [str(min(found, key=str)).removeprefix("torch.") for found in (halves, wide)]
        raise InputError(
            f"the model's weights are {names[0]} and its input is {names[1]}, which it does not take ({error})",
            hint="Add --dtype float32 (in Python dtype=torch.float32), or give the input in the weights' dtype",
        ) from error


def _inner(module: nn.Module | None) -> nn.Module | None:
    if isinstance(module, DataParallel | DistributedDataParallel | AveragedModel):
        return module.module
    # torch._dynamo's OptimizedModule, which takes a second to import.
    compiled = type(module).__name__ == "OptimizedModule" and isinstance(module, nn.Module)
    return module._modules.get("_orig_mod") if compiled and module is not None else None
