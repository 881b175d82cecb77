"""What is asked of loading, and what comes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bnfold.loading.normalize import Normalization


@dataclass(frozen=True)
class Request:
    """What is to be loaded.

    Attributes:
        source: ``net.pt2``, a TorchScript archive, ``pkg.module:factory``, ``path/to/file.py:factory``, ``timm:NAME``,
            ``torchvision:NAME``, ``hf:DIR-or-ID``, or ``net.pt`` with a pickled module.
        weights: checkpoint for what the factory builds (.safetensors, written by ``torch.save``, an index of shards,
            or a folder of one); of a model that bnfold folded in its own class, the class is given the folded
            structure first.
        weights_key: where in the checkpoint the state dict is, with dots for nested keys; of a pickled module as the
            source, where that is.
        strip_prefix: taken off every key of the state dict that begins with it.
        factory_args: keyword arguments of the factory.
        unsafe_pickle: allow pickles that can run any code.
        strict: refuse weights that hold keys which no part of the model has; by default they are left out.
        ignore: patterns of keys to leave out, such as ``criterion.*``.
        normalize: put this normalisation of images in front, or with True that of the model's own configuration.
    """

    source: str
    weights: Path | None = None
    weights_key: str | None = None
    strip_prefix: str | None = None
    factory_args: Mapping[str, Any] = field(default_factory=dict)
    unsafe_pickle: bool = False
    strict: bool = False
    ignore: Sequence[str] = ()
    normalize: bool | Normalization = False


@dataclass(frozen=True)
class Provenance:
    """Where a model came from, fit to be published: no absolute or parent path.

    Attributes:
        source: what the user typed; of a path outside the working directory, the file name alone.
        weights: file name of the weights.
        sha256: of the weights file, or of the file that is the source; None where there is no file.
        parameters: number of parameter elements, a shared one counted once.
        notes: bnfold's own in the weights' file, which say how the model was rebuilt; a file written of it keeps them.
        left_out: keys of the weights that no part of the model has.
    """

    source: str
    weights: str | None
    sha256: str | None
    parameters: int
    notes: Mapping[str, str] = field(default_factory=dict, repr=False)
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Built:
    """A model as code of the user's or a library's built it, or as it was in a file.

    Attributes:
        model: the module, exported program or ONNX file.
        args: example inputs, normalised; of a library's model two samples; None where nothing says what it takes.
        kwargs: the same by name.
        normalization: how its images are normalised, where the source knows that.
        weights: what the weights are called that its library gave it; None for fresh ones.
        file: where those came from, if that is a file of the user's.
    """

    model: Any
    args: tuple[Any, ...] | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    normalization: Normalization | None = None
    weights: str | None = None
    file: Path | None = None


@dataclass(frozen=True)
class Loaded(Built):
    """A model as its source gave it, and where it came from: neither its mode nor any flag is changed."""

    provenance: Provenance = field(kw_only=True)
