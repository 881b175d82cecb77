"""What is asked of loading, and what comes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bnfold.loading.normalize import Normalization


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
