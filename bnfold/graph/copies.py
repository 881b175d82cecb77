"""Copies of a model: what bnfold captures and runs is never the caller's own."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from bnfold.errors import CaptureError, InputError


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
