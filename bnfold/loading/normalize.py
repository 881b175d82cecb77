"""Input normalisation in front of a model, where the fold can take it into the convolution behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bnfold.errors import InputError, UsageError

_NAME = "normalize"
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
class NormalizeFirst:
    """A hook before a model's forward that normalises the first image among its inputs; the rest stays as it is."""

    mean: str  #: name of the model's buffer with the means.
    std: str  #: the same with the standard deviations.

    def __call__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The inputs that the forward is given."""
        mean, std = getattr(model, self.mean), getattr(model, self.std)
        for i, value in enumerate(args):
            if _is_image(value):
                return (*args[:i], (value - mean) / std, *args[i + 1 :]), kwargs
        for name, value in kwargs.items():
            if _is_image(value):
                return args, {**kwargs, name: (value - mean) / std}
        return args, kwargs


def put_in_front(
    model: nn.Module, normalization: Normalization, args: Sequence[Any] | None, kwargs: Mapping[str, Any], *, where: str
) -> None:
    """Lets ``model`` itself normalise its images, by a hook before its ``forward``: its class and its names stay.

    The constants are buffers of the model itself that no state dict holds, and no layer: a forward that iterates over
    the model's children (``nn.Sequential``) would call one more.

    Args:
        args: example inputs, which say how many axes the images have; None where there are none: images of 4 axes.

    Raises:
        InputError: the model has no image input, or one of another number of channels.
    """
    given = [leaf for leaf in pytree.tree_leaves((args, dict(kwargs))) if isinstance(leaf, Tensor)]
    image = next((leaf for leaf in given if _is_image(leaf)), None)
    if given and image is None:
        raise InputError("the model takes no images (N, C, ...) that could be normalised", where=where)
    channels = max(len(normalization.mean), len(normalization.std))
    if image is not None and channels not in (1, image.shape[1]):
        hint = "Give as many with --mean-std, or one for all"
        what = f"the model takes {image.shape[1]} channels and is to be normalised by {channels} means"
        raise InputError(what, where=where, hint=hint)
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    mean, std = (part.to(like) for part in normalization.constants(4 if image is None else image.ndim))
    prefixes = (_NAME, f"{_NAME}_input", f"_bnfold_{_NAME}")
    hook = next(
        hook
        for hook in (NormalizeFirst(f"{prefix}_mean", f"{prefix}_std") for prefix in prefixes)
        if not hasattr(model, hook.mean) and not hasattr(model, hook.std)
    )
    model.register_buffer(hook.mean, mean, persistent=False)
    model.register_buffer(hook.std, std, persistent=False)
    model.register_forward_pre_hook(hook, with_kwargs=True)


def _is_image(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim >= 3
