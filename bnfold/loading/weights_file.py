"""Weights in a .safetensors file, with notes of bnfold's beside them: short texts by name in the file's metadata."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from bnfold.errors import InputError
from bnfold.files import there

#: Every note's name begins so, and no other tool's does.
PREFIX = "bnfold."


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
