"""Giving an instance of a model's class the structure by which it expresses a fold.

What a fold took away becomes an ``nn.Identity`` (or, of a BatchNorm with its activation in one module, the activation),
and a layer that needs a bias and has none gains one. The class stays, and with it the names of the state dict. A
BatchNorm that was calibrated before the fold, and stays, has the running statistics that its class may not give it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path

import torch
from torch import Tensor, nn

from bnfold.errors import InputError
from bnfold.files import there
from bnfold.graph.copies import copied
from bnfold.report import Change, Ledger

#: Every note's name begins so, and no other tool's does.
PREFIX = "bnfold."
#: The note that names the BatchNorms which have running statistics here, and none as their class builds them.
GAINED = "running_statistics"
#: The note that holds the ledger in a .safetensors file; of a model that was folded again, those after it are numbered.
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
        CaptureError: the model cannot be copied.
    """
    prepared = copied(model)
    if isinstance(ledger, Ledger):
        _restructure_by(prepared, ledger)
        return prepared
    path = Path(ledger)
    ledgers = stored_ledgers(path)
    if not ledgers:
        hint = "bnfold fold SOURCE --eager -o net.safetensors writes such a file"
        raise InputError("the file holds no ledger of a folded model", where=str(path), hint=hint)
    for stored in ledgers:
        _restructure_by(prepared, stored)
    switch_on(prepared, path)
    return prepared


def save_written(module: nn.Module, ledger: Ledger, path: Path, notes: Mapping[str, str] | None = None) -> None:
    """Writes the state dict of a model that a fold was written into, with the ledger that ``prepare`` needs.

    ``notes`` of the file that the model's weights came from say how it was built before this fold, and stay. InputError
    as for ``save_weights``.
    """
    notes = dict(notes or {})
    save_weights(module.state_dict(), path, {**notes, _names(len(_names_in(notes)) + 1)[-1]: ledger.to_json()})


def stored_ledgers(path: Path) -> tuple[Ledger, ...]:
    """The ledgers in a .safetensors file, one for each time that its model was folded, in that order.

    InputError where there is one that cannot be read.
    """
    notes = read_notes(path)
    try:
        return tuple(Ledger.from_json(notes[name]) for name in _names_in(notes))
    except ValueError as error:
        hint = "Write the file again with the installed bnfold"
        raise InputError(f"the ledger in the file cannot be read: {error}", where=str(path), hint=hint) from error


def _names(count: int) -> list[str]:
    """ledger, ledger.2, ledger.3, ..."""
    return [NOTE, *(f"{NOTE}.{i}" for i in range(2, count + 1))]


def _names_in(notes: Mapping[str, str]) -> list[str]:
    return list(takewhile(notes.__contains__, _names(len(notes))))


def _restructure_by(model: nn.Module, ledger: Ledger) -> None:
    if ledger.changes is None:
        hint = "Take the ledger of folded.write_back(model)"
        raise InputError("this ledger does not say how a class expresses the fold", hint=hint)
    restructure(model, ledger.changes)


def restructure(
    model: nn.Module,
    changes: Sequence[Change],
    dress: Callable[[nn.Module, nn.Module], nn.Module] = lambda old, new: new,
) -> None:
    """Makes ``changes`` in ``model`` itself.

    ``dress`` makes of an old module and the new one what takes the old one's place, by default the new one. InputError
    where the model has no such module, or is not built as the changes expect; it may then be half changed.
    """
    owners = [(change, _module(model, change)) for change in changes]
    # The innermost first, so that a child that takes its parent's place is the changed one.
    for change, owner in sorted(owners, key=lambda pair: -pair[0].module.count(".")):
        if change.kind == "parameter":
            _gain(owner, change)
        elif change.kind == "statistics":
            gain_statistics(model, owner)
        else:
            identity = change.kind == "identity"
            by = nn.Identity().train(owner.training) if identity else owner.get_submodule(change.name)
            _replace(model, owner, dress(owner, by))


def _module(model: nn.Module, change: Change) -> nn.Module:
    names = [change.module, *([f"{change.module}.{change.name}"] if change.kind == "child" else [])]
    try:
        found, *_ = [model.get_submodule(name) for name in names]
    except AttributeError as error:
        hint = "Build it as it was built when it was folded (--arg name=value)"
        raise InputError(f"the model has no module '{names[-1]}'", where=type(model).__name__, hint=hint) from error
    if change.kind in ("identity", "child") and isinstance(found, nn.Identity):
        hint = "Give a model as its class builds it"
        raise InputError("this module has been folded away already", where=f"module '{change.module}'", hint=hint)
    return found


def _gain(owner: nn.Module, change: Change) -> None:
    if getattr(owner, change.name, None) is not None or change.name not in owner._parameters:
        what = f"the module cannot gain a parameter '{change.name}'"
        hint = "Build the model as it was built when it was folded (--arg name=value)"
        raise InputError(what, where=f"module '{change.module}'", hint=hint)
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


# -- weights in a .safetensors file, with notes of bnfold's beside them: short texts by name in the file's metadata ----


def save_weights(state: Mapping[str, Tensor], path: Path, notes: Mapping[str, str] | None = None) -> None:
    """Writes a state dict, each tensor whole, with ``notes``: texts by name (without the prefix) for ``read_notes``.

    Tensors that share memory are written once each, so that ``load_state_dict(strict=True)`` finds every key.
    InputError where an entry is no tensor, which safetensors cannot hold.
    """
    from safetensors.torch import save

    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise InputError(
                f"entry '{name}' of the state dict is a {type(value).__name__}, which no .safetensors file can hold",
                hint="Fold to .pt2 instead",
            )
    owned = {name: torch.empty_like(v, memory_format=torch.contiguous_format).copy_(v) for name, v in state.items()}
    metadata = {"format": "pt", **{PREFIX + name: text for name, text in (notes or {}).items()}}
    path.write_bytes(save({name: tensor.detach() for name, tensor in owned.items()}, metadata))


def read_notes(path: Path) -> dict[str, str]:
    """The notes of a file, by name; none where it is no .safetensors file or has none."""
    from safetensors import SafetensorError, safe_open

    if path.suffix.lower() != ".safetensors" or not (there(path) and path.is_file()):
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            found = file.metadata() or {}
    except (SafetensorError, OSError, ValueError):  # whoever reads the weights says what is wrong with the file
        return {}
    return {name.removeprefix(PREFIX): text for name, text in found.items() if name.startswith(PREFIX)}


def save_calibrated(
    model: nn.Module, path: Path, gained: Iterable[str], notes: Mapping[str, str] | None = None
) -> None:
    """Writes all weights and buffers of ``model``, of which the BatchNorms ``gained`` had no statistics before.

    ``notes`` as for ``save_written``, InputError as for ``save_weights``.
    """
    notes = notes or {}
    names = list(dict.fromkeys((*_named(notes), *gained)))
    save_weights(model.state_dict(), path, {**notes, GAINED: json.dumps(names)})


def switch_on(model: nn.Module, path: Path) -> None:
    """Gives the BatchNorms of ``model`` that a calibrated file has new statistics for room for them, in place."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in _named(read_notes(path)):
        if name in modules:
            gain_statistics(model, modules[name])


def gain_statistics(model: nn.Module, norm: nn.Module) -> None:
    """Gives a module of ``model`` room for running statistics, where it is a BatchNorm that has none."""
    from bnfold.statistics.batchnorms import keep_statistics, lacks_statistics, statistics_like  # with it comes onnx

    if lacks_statistics(norm):
        keep_statistics(norm, statistics_like(norm, model))


def _named(notes: Mapping[str, str]) -> list[str]:
    try:
        names = json.loads(notes.get(GAINED, "[]"))
    except ValueError:
        return []  # then the keys of the weights do not fit, and the error says so
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
