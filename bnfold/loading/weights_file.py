"""Weights in a .safetensors file, with notes of bnfold's beside them: short texts by name in the file's metadata.

A BatchNorm of ``track_running_stats=False`` has no buffers, so its class would refuse the statistics that calibration
has given it. A note in the file names such layers, and the loader gives them buffers first.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from bnfold.errors import InputError
from bnfold.files import there
from bnfold.statistics.batchnorms import keep_statistics, lacks_statistics, statistics_like

#: Every note's name begins so, and no other tool's does.
PREFIX = "bnfold."
#: The note that names the BatchNorms which have running statistics here, and none as their class builds them.
GAINED = "running_statistics"


def save_weights(state: Mapping[str, Tensor], path: Path, notes: Mapping[str, str] | None = None) -> None:
    """Writes a state dict, each tensor whole.

    Tensors that share memory are written once each, so that ``load_state_dict(strict=True)`` finds every key.

    Args:
        notes: texts by name (without the prefix) for ``read_notes``.

    Raises:
        InputError: an entry is no tensor, which safetensors cannot hold.
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
    """Writes all weights and buffers of ``model``.

    Args:
        gained: the BatchNorms which had no running statistics before.
        notes: of the file that the model's weights came from. They say how it was built before, and stay.

    Raises:
        InputError: the state dict holds something that is no tensor.
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
    if lacks_statistics(norm):
        keep_statistics(norm, statistics_like(norm, model))


def _named(notes: Mapping[str, str]) -> list[str]:
    try:
        names = json.loads(notes.get(GAINED, "[]"))
    except ValueError:
        return []  # then the keys of the weights do not fit, and the error says so
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
