"""Calibrated weights in a .safetensors file, and a model that is to load them.

A BatchNorm of ``track_running_stats=False`` has no buffers, so its class would refuse the statistics that it was given.
A note in the file names such layers, and the loader gives them buffers first.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import nn

from bnfold.loading.weights_file import read_notes, save_weights
from bnfold.statistics.batchnorms import keep_statistics, lacks_statistics, statistics_like

#: The note that names the BatchNorms which have running statistics here, and none as their class builds them.
NOTE = "running_statistics"


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
    save_weights(model.state_dict(), path, {**notes, NOTE: json.dumps(names)})


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
        names = json.loads(notes.get(NOTE, "[]"))
    except ValueError:
        return []  # then the keys of the weights do not fit, and the error says so
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
