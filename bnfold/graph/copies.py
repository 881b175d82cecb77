"""Copies of a model: what bnfold captures and runs is never the caller's own."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.utils import _pytree as pytree

from bnfold.errors import CaptureError, InputError
from bnfold.graph.failures import quiet


def eval_copy(model: nn.Module) -> nn.Module:
    """A structural copy in eval mode that shares ``model``'s parameters and owns its buffers.

    Raises:
        CaptureError: the model cannot be copied, or has lazy layers that have seen no input.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError(
            "a TorchScript module holds no Python code that could be captured",
            where=type(model).__name__,
            hint="Give the nn.Module that it was traced or scripted from",
        )
    if any(
        isinstance(p, (UninitializedParameter, UninitializedBuffer)) for p in (*model.parameters(), *model.buffers())
    ):
        raise CaptureError(
            "the model has lazy layers that have seen no input yet",
            hint="Run it once on an example, or load its weights",
        )
    # What was made under inference_mode cannot be traced, so of that an ordinary copy is taken.
    duplicate = _copied(model, {id(p): _ordinary(p) if p.is_inference() else p for p in model.parameters()})
    try:
        return duplicate.eval()
    except NotImplementedError as error:
        hint = "Of an ExportedProgram give the program itself, not its module()"
        raise CaptureError(f"the model cannot be put into eval mode: {error}".rstrip("."), hint=hint) from error


def copied(model: nn.Module) -> nn.Module:
    """A deep copy that computes what ``model`` does, also where ``copy.deepcopy`` alone fails or forgets hooks.

    Raises:
        CaptureError: the model cannot be copied.
    """
    return _copied(model, {})


def _copied(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """The copy, with what ``memo`` holds in place of what has those ids."""
    memo = {id(b): b.clone() for b in model.buffers() if b.is_inference()} | memo
    # Old-style weight_norm and pruning keep what they computed last as a plain attribute, which deepcopy refuses.
    plain = (v for m in model.modules() for v in vars(m).values() if isinstance(v, Tensor) and not v.is_leaf)
    memo |= {id(tensor): tensor.detach().clone() for tensor in plain}
    try:
        duplicate = copy.deepcopy(model, memo)
    except Exception as error:
        raise CaptureError(
            f"the model cannot be copied: {type(error).__name__}: {error}",
            hint="bnfold works on a copy so that yours stays as it is; give a model that copy.deepcopy accepts",
        ) from error
    for module in model.modules():
        if isinstance(module, GraphModule) and id(vars(module)) in memo:
            # A GraphModule copies all it has, and then builds a new one of its graph alone: no hooks, no attributes.
            twin = memo[id(module)]
            vars(twin).update(memo[id(vars(module))])
            type(twin).__name__ = type(module).__name__  # a class of its own
    _refuse_unlike(model, duplicate)
    return duplicate


def _refuse_unlike(model: nn.Module, duplicate: nn.Module) -> None:
    """Raises CaptureError where a class's own ``__deepcopy__`` made something else than a copy."""
    copies = dict(duplicate.named_modules(remove_duplicate=False))
    for name, module in model.named_modules(remove_duplicate=False):
        twin = copies.pop(name, None)
        if twin is None or twin is module or _make(twin) != _make(module):
            raise CaptureError(
                f"the copy of a {type(module).__name__} that its __deepcopy__ makes is "
                + ("none" if twin is None else "the module itself" if twin is module else "of another class or hooks"),
                where=f"module '{name}'" if name else type(model).__name__,
                hint="bnfold works on a copy so that yours stays as it is; take __deepcopy__ out of that class",
            )


def _make(module: nn.Module) -> tuple[type, int, int]:
    """What a module and its copy have in common; every GraphModule is of a class of its own."""
    kind = GraphModule if isinstance(module, GraphModule) else type(module)
    return kind, len(module._forward_hooks), len(module._forward_pre_hooks)


def twin(module: nn.Module) -> nn.Module:
    """A copy that shares ``module``'s parameters: tracing it leaves what it kept of the trace in nobody else's way."""
    return _copied(module, {id(p): p for p in module.parameters()})


def _ordinary(parameter: Tensor) -> Tensor:
    return nn.Parameter(parameter.clone(), requires_grad=False)


# -- whether a copy is one: a hook or a function that holds the model itself still writes to, or calls, it -------------


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

    What is kept for later and changes nothing, such as anchors of the last size, is none. ``assigned`` are names of
    attributes; the state of ``module`` is of no use to anybody afterwards.
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
