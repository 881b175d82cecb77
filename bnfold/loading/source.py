"""What is asked of loading, and what comes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bnfold.errors import InputError, UsageError

_SYNTAX = "Write --mean-std 0.485,0.456,0.406/0.229,0.224,0.225, or one number for all channels each"


@dataclass(frozen=True)
class Normalization:
    """``(x - mean) / std`` per channel, of images (N, C, ...) in [0, 1]; one number holds for all channels."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if len({len(self.mean), len(self.std)} - {1}) > 1:
            raise InputError(f"{len(self.mean)} means and {len(self.std)} standard deviations do not go together")
        if not all(0 < value < float("inf") for value in self.std) or not all(abs(m) < float("inf") for m in self.mean):
            raise InputError("the means must be finite and the standard deviations positive")

    def constants(self, ndim: int) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, to be broadcast to images of so many axes."""
        mean, std = (torch.tensor(part).reshape(-1, *(1,) * (ndim - 2)) for part in (self.mean, self.std))
        return mean, std

    def apply(self, images: Tensor) -> Tensor:
        """Images (N, C, ...) normalised."""
        mean, std = self.constants(images.ndim)
        return (images - mean) / std

    def undo(self, images: Tensor) -> Tensor:
        """The images that ``apply`` makes these of."""
        mean, std = self.constants(images.ndim)
        return images * std + mean

    @classmethod
    def parse(cls, text: str) -> Normalization:
        """``"0.5,0.5,0.5/0.25"`` -> the means and the standard deviations; UsageError where the text is not that."""
        mean, slash, std = text.partition("/")
        try:
            if not slash:
                raise ValueError("there is no slash")
            return cls(tuple(map(float, mean.split(","))), tuple(map(float, std.split(","))))
        except (ValueError, InputError) as error:
            what = f"this is no mean and standard deviation ({error})"
            raise UsageError(what, where=f"--mean-std {text}", hint=_SYNTAX) from error


@dataclass(frozen=True)
class Request:
    """What is to be loaded."""

    #: ``net.pt2``, a TorchScript archive, ``pkg.module:factory``, ``path/to/file.py:factory``, ``timm:NAME``,
    #: ``torchvision:NAME``, ``hf:DIR-or-ID``, or ``net.pt`` with a pickled module.
    source: str
    #: checkpoint for what the factory builds (.safetensors, written by ``torch.save``, an index of shards, or a folder
    #: of one); of a model that bnfold folded in its own class, the class is given the folded structure first.
    weights: Path | None = None
    #: where in the checkpoint the state dict is, with dots for nested keys; of a pickled module as the source, where
    #: that is.
    weights_key: str | None = None
    strip_prefix: str | None = None  #: taken off every key of the state dict that begins with it.
    factory_args: Mapping[str, Any] = field(default_factory=dict)  #: keyword arguments of the factory.
    unsafe_pickle: bool = False  #: allow pickles that can run any code.
    strict: bool = False  #: refuse weights that hold keys which no part of the model has; by default they are left out.
    ignore: Sequence[str] = ()  #: patterns of keys to leave out, such as ``criterion.*``.
    #: put this normalisation of images in front, or with True that of the model's own configuration.
    normalize: bool | Normalization = False


@dataclass(frozen=True)
class Provenance:
    """Where a model came from, fit to be published: no absolute or parent path."""

    source: str  #: what the user typed; of a path outside the working directory, the file name alone.
    weights: str | None  #: file name of the weights.
    sha256: str | None  #: of the weights file, or of the file that is the source; None where there is no file.
    parameters: int  #: number of parameter elements, a shared one counted once.
    #: bnfold's own in the weights' file, which say how the model was rebuilt; a file written of it keeps them.
    notes: Mapping[str, str] = field(default_factory=dict, repr=False)
    left_out: tuple[str, ...] = ()  #: keys of the weights that no part of the model has.


@dataclass(frozen=True)
class Built:
    """A model as code of the user's or a library's built it, or as it was in a file."""

    model: Any  #: the module, exported program or ONNX file.
    #: example inputs, normalised; of a library's model two samples; None where nothing says what it takes.
    args: tuple[Any, ...] | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)  #: the same by name.
    normalization: Normalization | None = None  #: how its images are normalised, where the source knows that.
    weights: str | None = None  #: what the weights are called that its library gave it; None for fresh ones.
    file: Path | None = None  #: where those came from, if that is a file of the user's.


@dataclass(frozen=True)
class Loaded(Built):
    """A model as its source gave it, and where it came from: neither its mode nor any flag is changed."""

    provenance: Provenance = field(kw_only=True)
