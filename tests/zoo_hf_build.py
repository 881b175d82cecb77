"""How the zoo builds a net of transformers: from a small configuration, without importing it before it is needed."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from zoo_parts import Factory


class Outputs(nn.Module):
    """``model`` called with one tensor under the name it wants; every tensor of its answer, as a tuple."""

    def __init__(self, model: nn.Module, name: str | None, index: int | None = None, **options: Any) -> None:
        super().__init__()
        self.model, self.name, self.index, self.options = model, name, index, options

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        out = self.model(x, **self.options) if self.name is None else self.model(**{self.name: x}, **self.options)
        out = out.to_tuple() if hasattr(out, "to_tuple") else out
        return tuple(leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor))


def submodule(family: str, name: str) -> Any:
    """Class ``name`` of transformers' modeling file of ``family`` (``folder`` or ``folder.file``), or its config's."""
    folder, _, file = family.partition(".")
    kind = "configuration" if name.endswith("Config") else "modeling"
    return getattr(importlib.import_module(f"transformers.models.{folder}.{kind}_{file or folder}"), name)


def vision(family: str, model: str, config: str, size: int = 32, channels: int = 3, **options: Any) -> Factory:
    """A model over ``pixel_values`` (2, channels, size, size)."""

    def build() -> tuple[nn.Module, tuple[Tensor, ...]]:
        net = submodule(family, model)(submodule(family, config)(**options))
        pixels = torch.randn(2, channels, size, size) + torch.randn(2, channels, 1, 1)
        return Outputs(net, "pixel_values"), (pixels,)

    return build


def part(family: str, name: str, config: str, shape: tuple[int, ...], *extra: Any, **options: Any) -> Factory:
    """A layer of a model, built from its configuration, over one tensor of ``shape``."""

    def build() -> tuple[nn.Module, tuple[Tensor, ...]]:
        return submodule(family, name)(submodule(family, config)(**options), *extra), (torch.randn(shape),)

    return build
