"""Whether a copy of a model is one: a hook or a function that holds the model itself still writes to, or calls, it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bnfold.errors import CaptureError
from bnfold.graph.failures import quiet


def refuse_stale(model: nn.Module, duplicate: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raises CaptureError where ``model`` has hooks or functions of its own and the copy computes something else.

    Such a function is shared by both. A hook that keeps activations in a dictionary of the model writes to the model's,
    and the copy reads what was in its own when it was made.
    """
    if not any(_has_functions(module) for module in model.modules()):
        return
    given = pytree.tree_map_only(Tensor, lambda x: x * 0.5 if x.is_floating_point() else x, (args, kwargs))
    try:
        with torch.no_grad(), _evaluating(model):
            own, theirs = (pytree.tree_leaves(each(*given[0], **given[1])) for each in (model, duplicate))
    except Exception:  # whoever captures it says why
        return
    if len(own) != len(theirs) or not all(map(_alike, own, theirs)):
        raise CaptureError(
            "a copy of the model computes something else than the model: a hook or a function that was put into it "
            "holds the model itself",
            where=type(model).__name__,
            hint="bnfold works on a copy so that yours stays as it is; keep what hooks collect in attributes that they "
            "find through their module argument, or use methods",
        )


def refuse_state(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], assigned: Sequence[str]) -> None:
    """Raises CaptureError where what ``module`` assigns to its attributes changes what comes out the next time.

    What is kept for later and changes nothing, such as anchors of the last size, is none.

    Args:
        module: whose state is of no use to anybody.
        args: positional inputs.
        kwargs: keyword inputs.
        assigned: names of the attributes.
    """
    other = pytree.tree_map_only(Tensor, lambda x: x * 0.5 if x.is_floating_point() else x.flip(-1), (args, kwargs))
    answers = []
    for given in ((args, kwargs), other, (args, kwargs)):
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=()), quiet():
                torch.manual_seed(0)
                answers.append(pytree.tree_leaves(module(*given[0], **given[1])))
        except Exception:  # whoever runs it next says why
            return
    tensors = [[leaf for leaf in answer if isinstance(leaf, Tensor)] for answer in answers[::2]]
    if not all(a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(*tensors)):
        raise CaptureError(
            "the model keeps state from call to call: the same input gives another result the next time",
            where=", ".join(f"attribute '{name}'" for name in assigned[:3]),
            hint="A file keeps nothing. Take the state as an input and return it, or set it anew where forward begins",
        )


def _has_functions(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _alike(own: Any, theirs: Any) -> bool:
    if not isinstance(own, Tensor) or not isinstance(theirs, Tensor) or not own.is_floating_point():
        return True
    if own.shape != theirs.shape:
        return False
    off, size = (own - theirs).nan_to_num().double().norm(), own.nan_to_num().double().norm()
    return bool(off <= 1e-3 * size)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for a moment; every module has its own flag back afterwards."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in flags:
            module.training = False
        yield
    finally:
        for module, flag in flags:
            module.training = flag
