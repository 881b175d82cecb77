"""Giving an instance of a model's class the structure by which it expresses a fold.

What a fold took away becomes an ``nn.Identity`` (or, of a BatchNorm with its activation in one module, the activation),
and a layer that needs a bias and has none gains one. The class stays, and with it the names of the state dict.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from bnfold.errors import InputError
from bnfold.loading.weights_file import read_notes, save_weights
from bnfold.report import Change, Ledger

#: The note that holds a ledger in a .safetensors file.
NOTE = "ledger"


def prepare(model: nn.Module, ledger: Ledger | str | Path) -> nn.Module:
    """A copy of ``model`` with the structure of a folded one, ready for ``load_state_dict(..., strict=True)``.

    Args:
        model: an instance of the class that was folded, built as it was then; not touched.
        ledger: of ``Folded.write_back``, or the .safetensors file that ``fold --eager`` wrote.

    Returns:
        The copy. Its parameters are still ``model``'s own, new ones are zero, until the folded weights are loaded.

    Raises:
        InputError: the ledger is not of a fold that was written back, or the model is not built like that one.
    """
    if not isinstance(ledger, Ledger):
        path, found = Path(ledger), stored_ledger(Path(ledger))
        if found is None:
            hint = "bnfold fold SOURCE --eager -o net.safetensors writes such a file"
            raise InputError("the file holds no ledger of a folded model", where=str(path), hint=hint)
        ledger = found
    if ledger.changes is None:
        hint = "Take the ledger of folded.write_back(model)"
        raise InputError("this ledger does not say how a class expresses the fold", hint=hint)
    prepared = copy.deepcopy(model)
    restructure(prepared, ledger.changes)
    return prepared


def save_written(module: nn.Module, ledger: Ledger, path: Path) -> None:
    """Writes the state dict of a model that a fold was written into, with the ledger that ``prepare`` needs.

    Raises:
        InputError: the state dict holds something that is no tensor.
    """
    save_weights(module.state_dict(), path, {NOTE: ledger.to_json()})


def stored_ledger(path: Path) -> Ledger | None:
    """The ledger in a .safetensors file, if there is one.

    Raises:
        InputError: there is one, and it cannot be read.
    """
    text = read_notes(path).get(NOTE)
    if text is None:
        return None
    try:
        return Ledger.from_json(text)
    except ValueError as error:
        hint = "Write the file again with the installed bnfold"
        raise InputError(f"the ledger in the file cannot be read: {error}", where=str(path), hint=hint) from error


def restructure(model: nn.Module, changes: Sequence[Change]) -> None:
    """Makes ``changes`` in ``model`` itself.

    Raises:
        InputError: the model has no such module, or is not built as the changes expect; it may then be half changed.
    """
    owners = [(change, _module(model, change)) for change in changes]
    # The innermost first, so that a child that takes its parent's place is the changed one.
    for change, owner in sorted(owners, key=lambda pair: -pair[0].module.count(".")):
        if change.kind == "parameter":
            _gain(owner, change)
        else:
            by = nn.Identity() if change.kind == "identity" else owner.get_submodule(change.name)
            _replace(model, owner, by)


def _module(model: nn.Module, change: Change) -> nn.Module:
    names = [change.module, *([f"{change.module}.{change.name}"] if change.kind == "child" else [])]
    try:
        found, *_ = [model.get_submodule(name) for name in names]
    except AttributeError as error:
        raise InputError(
            f"the model has no module '{names[-1]}'",
            where=type(model).__name__,
            hint="Build it as it was built when it was folded (--arg name=value)",
        ) from error
    if change.kind != "parameter" and isinstance(found, nn.Identity):
        hint = "Give a model as its class builds it"
        raise InputError("this module has been folded away already", where=f"module '{change.module}'", hint=hint)
    return found


def _gain(owner: nn.Module, change: Change) -> None:
    if getattr(owner, change.name, None) is not None or change.name not in owner._parameters:
        raise InputError(
            f"the module cannot gain a parameter '{change.name}'",
            where=f"module '{change.module}'",
            hint="Build the model as it was built when it was folded (--arg name=value)",
        )
    like = next((t for t in (*owner.parameters(recurse=False), *owner.buffers(recurse=False))), torch.empty(0))
    device, dtype = like.device, like.dtype if like.is_floating_point() else torch.get_default_dtype()
    zeros = torch.zeros(change.shape, device=device, dtype=dtype)
    owner.register_parameter(change.name, nn.Parameter(zeros, requires_grad=like.requires_grad))


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Everywhere: a module may be registered under several names."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:
                parent.add_module(name, new)
