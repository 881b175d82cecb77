"""Calibrated weights in a .safetensors file, and a model that is to load them.

A BatchNorm of ``track_running_stats=False`` has no buffers, so its class would refuse the statistics that it was given.
A note in the file names such layers, and the loader gives them buffers first.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from bnfold.loading.weights_file import read_notes, save_weights
from bnfold.statistics.batchnorms import keep_statistics, lacks_statistics

#: The note that names the BatchNorms which have running statistics here, and none as their class builds them.
NOTE = "running_statistics"


def save_calibrated(model: nn.Module, path: Path, gained: Iterable[str]) -> None:
    """Writes all weights and buffers of ``model``; ``gained`` are the BatchNorms whose class builds them without.

    Raises:
        InputError: the state dict holds something that is no tensor.
    """
    save_weights(model.state_dict(), path, {NOTE: json.dumps(list(gained))})


def switch_on(model: nn.Module, path: Path) -> None:
    """Gives the BatchNorms of ``model`` that a calibrated file has new statistics for room for them, in place."""
    text = read_notes(path).get(NOTE)
    try:
        names = json.loads(text) if text is not None else []
    except ValueError:
        names = []  # then the keys of the weights do not fit, and the error says so
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in names if isinstance(names, list) else []:
        norm = modules.get(name) if isinstance(name, str) else None
        if norm is not None and lacks_statistics(norm):
            keep_statistics(norm, next(norm.parameters(recurse=False), torch.zeros(())))
