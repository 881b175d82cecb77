"""Models by name: of timm, of torchvision, and of transformers from a folder or a hub.

Each library is imported when it is named, and nothing is fetched unless the name asks for it: timm's and torchvision's
models have fresh weights without ``pretrained=True``, and a folder of transformers' is read from the disk alone.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bnfold.errors import BnfoldError, InputError, ProviderError, UsageError
from bnfold.files import require_file, there
from bnfold.loading.source import Built, Normalization, Request

#: What clips of a video model hold where nothing says how many frames.
_FRAMES = 16
_TOKENS = 16


def open_named(request: Request) -> Built:
    """The model that a library knows by a name, in eval mode, without the weights that a request names.

    The source is ``timm:NAME``, ``torchvision:NAME``, or ``hf:`` and a folder that ``save_pretrained`` wrote or the id
    of a repository; the factory's arguments are those of the library's own function, and ``pretrained`` for all three.
    ProviderError where the library is not installed, UsageError where an option does not apply, InputError where it
    knows no such model, or cannot build or load it.
    """
    hub, _, name = request.source.partition(":")
    options, weights = dict(request.factory_args), request.weights is not None
    pretrained = options.pop("pretrained", None)
    if pretrained is not None and not isinstance(pretrained, bool):
        # Python's literals, and what people write in their place.
        pretrained = {"true": True, "false": False}.get(str(pretrained).lower(), pretrained)
    if pretrained and weights:
        raise UsageError("pretrained=true and --weights contradict each other", hint="Leave one of them out")
    with _library_errors(request.source):
        return _HUBS[hub](name, options, False if weights else pretrained)


# ---- timm ------------------------------------------------------------------------------------------------------------


def _timm(name: str, options: dict[str, Any], pretrained: Any) -> Built:
    timm = _package("timm", "timm")
    if ":" not in name:
        _refuse_unknown(name.partition(".")[0], timm.list_models(), f"timm:{name}")
    model = timm.create_model(name, pretrained=bool(pretrained), **options)
    config = importlib.import_module("timm.data").resolve_model_data_config(model)
    channels, height, width = config["input_size"]
    channels = options.get("in_chans", channels)
    size = options.get("img_size", (height, width))
    height, width = (size, size) if isinstance(size, int) else size
    norm = _normalization(config.get("mean"), config.get("std"), channels)
    tag = (getattr(model, "pretrained_cfg", None) or {}).get("tag") or "pretrained"
    return Built(model.eval(), (_images((channels, height, width), norm),), {}, norm, tag if pretrained else None)


# ---- torchvision -----------------------------------------------------------------------------------------------------


def _torchvision(name: str, options: dict[str, Any], pretrained: Any) -> Built:
    models = _package("torchvision.models", "torchvision")
    _refuse_unknown(name.lower(), models.list_models(), f"torchvision:{name}")
    if pretrained and "weights" in options:
        raise UsageError("pretrained and weights contradict each other", where="--arg", hint="Leave one of them out")
    known = models.get_model_weights(name)
    wanted = options.pop("weights", "DEFAULT" if pretrained else None)
    entry = getattr(known, str(wanted).rpartition(".")[-1], None) if wanted else None
    if wanted and entry is None:
        hint = f"It has {', '.join(weights.name for weights in known) or 'none'}"
        raise InputError(f"there are no weights {wanted!r}", where=f"torchvision:{name}", hint=hint)
    builder = getattr(models, "get_model_builder", None)
    if builder is not None and "weights_backbone" in inspect.signature(builder(name)).parameters:
        options.setdefault("weights_backbone", None)  # by default it would be fetched
    model = models.get_model(name, weights=entry, **options)
    example, norm = _torchvision_example(entry or getattr(known, "DEFAULT", None))
    return Built(model.eval(), example, {}, norm, None if entry is None else entry.name)


def _torchvision_example(weights: Any) -> tuple[tuple[Any, ...] | None, Normalization | None]:
    """What a model of these weights takes, as their transforms say."""
    if weights is None:
        return None, None
    transforms = weights.transforms()
    mean = getattr(transforms, "mean", None)
    size = getattr(transforms, "crop_size", None) or getattr(transforms, "resize_size", None)
    if mean is None or not size:
        return None, None
    norm = _normalization(mean, transforms.std, len(mean))
    # Images have one size and are square; videos have two.
    height, width = (size[0], size[0]) if len(size) == 1 else size
    frames = (weights.meta.get("min_temporal_size", _FRAMES),) if len(size) == 2 else ()
    return (_images((len(mean), *frames, height, width), norm),), norm


# ---- transformers ----------------------------------------------------------------------------------------------------


def _hf(name: str, options: dict[str, Any], pretrained: Any) -> Built:
    folder = Path(name).expanduser()
    local = there(folder) and folder.is_dir()
    if local and not (folder / "config.json").is_file():
        hint = "It must be what save_pretrained writes"
        raise InputError("there is no config.json in the folder", where=f"hf:{name}", hint=hint)
    for entry in folder.iterdir() if local else ():
        if not entry.is_dir():
            require_file(entry)  # transformers would wait for a pipe
    if not local and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise InputError("there is no such folder", where=f"hf:{name}")
    transformers = _package("transformers", "hf")
    place = str(folder) if local else name
    # Code from a repository is never run.
    reading = {"local_files_only": local, "trust_remote_code": False}
    config, unused = transformers.AutoConfig.from_pretrained(place, return_unused_kwargs=True, **reading, **options)
    if unused:
        raise UsageError(f"its configuration has no {', '.join(map(repr, unused))}", where="--arg")
    model_class = next((getattr(transformers, n) for n in config.architectures or () if hasattr(transformers, n)), None)
    if pretrained is False:
        model = model_class(config) if model_class else transformers.AutoModel.from_config(config)
    else:
        loader = model_class or transformers.AutoModel
        # What does not fit is refused below, with names.
        lenient = {"ignore_mismatched_sizes": True, "output_loading_info": True}
        model, found = loader.from_pretrained(place, config=config, **lenient, **reading)
        _refuse_incomplete(found, f"hf:{name}")
    model = model.eval().float()  # half floats are widened without loss; --dtype goes the other way
    model.register_forward_hook(_tensors_of)
    preprocessor = _read_json(place, "preprocessor_config.json", local)
    norm = _hf_normalization(preprocessor, config)
    example = _hf_example(model, config, preprocessor, norm)
    main = model.main_input_name if isinstance(model.main_input_name, str) else model.main_input_name[0]
    file = folder / "model.safetensors"
    kwargs = {} if example is None else {main: example}
    stored = file if local and file.is_file() and pretrained is not False else None
    weights = None if pretrained is False else file.name
    return Built(model, None if example is None else (), kwargs, norm, weights, stored)


def _tensors_of(model: nn.Module, args: Any, output: Any) -> Any:
    """A ModelOutput as a dictionary of what holds tensors: no None, no caches."""
    if not isinstance(output, Mapping):
        return output

    def holds_tensors(value: Any) -> bool:
        leaves = pytree.tree_leaves(value)
        return bool(leaves) and all(isinstance(leaf, Tensor) for leaf in leaves)

    return {name: value for name, value in output.items() if holds_tensors(value)}


def _refuse_incomplete(found: Mapping[str, Any], where: str) -> None:
    """Weights that are not in the file would be random, and transformers only warns."""
    for key, what in (("missing_keys", "are missing"), ("mismatched_keys", "have another shape")):
        names = sorted(str(name[0] if isinstance(name, tuple) else name) for name in found.get(key) or ())
        if names:
            shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            raise InputError(f"{len(names)} of its weights {what}: {shown}", where=where)


def _read_json(place: str, file: str, local: bool) -> dict[str, Any]:
    """A JSON file of a model; empty where it has none."""
    path = Path(place) / file
    if not local:
        hub = importlib.import_module("huggingface_hub")
        try:
            path = Path(hub.hf_hub_download(place, file))
        except hub.errors.EntryNotFoundError:
            return {}
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"the file is no JSON ({error})", where=str(path)) from error
    return found if isinstance(found, dict) else {}


def _hf_normalization(preprocessor: Mapping[str, Any], config: Any) -> Normalization | None:
    mean, std = preprocessor.get("image_mean"), preprocessor.get("image_std")
    if not preprocessor.get("do_normalize", mean is not None):
        return None
    return _normalization(mean, std, getattr(config, "num_channels", 3))


def _hf_example(
    model: nn.Module, config: Any, preprocessor: Mapping[str, Any], norm: Normalization | None
) -> Tensor | None:
    """Two samples of a model's main input, sized by its preprocessor, else by its configuration."""
    kind, generator = model.main_input_name, torch.Generator().manual_seed(0)
    if kind == "pixel_values":
        crop = preprocessor.get("crop_size") if preprocessor.get("do_center_crop") else None
        size = _pair(crop) or _pair(preprocessor.get("size")) or _pair(getattr(config, "image_size", None))
        return None if size is None else _images((getattr(config, "num_channels", 3), *size), norm)
    if kind == "input_ids" and isinstance(getattr(config, "vocab_size", None), int):
        return torch.randint(config.vocab_size, (2, _TOKENS), generator=generator)
    # Spectrograms of a fixed length, else one second of sound.
    shape: tuple[Any, ...] = (preprocessor.get("sampling_rate") if kind == "input_values" else None,)
    if preprocessor.get("num_mel_bins") and preprocessor.get("max_length"):
        shape = (preprocessor["max_length"], preprocessor["num_mel_bins"])
    elif kind == "input_features" and preprocessor.get("nb_max_frames"):
        shape = (preprocessor.get("feature_size"), preprocessor["nb_max_frames"])
    if kind not in ("input_values", "input_features") or not all(isinstance(n, int) for n in shape):
        return None
    return torch.randn((2, *shape), generator=generator)


def _pair(size: Any) -> tuple[int, int] | None:
    """``224``, ``[224, 224]``, ``{"height": ..., "width": ...}`` or ``{"shortest_edge": ...}`` as height and width."""
    if isinstance(size, Mapping):
        edge = size.get("shortest_edge")
        size = (size.get("height", edge), size.get("width", edge))
    if isinstance(size, int):
        size = (size, size)
    if isinstance(size, (list, tuple)) and len(size) == 2 and all(isinstance(n, int) and n > 0 for n in size):
        return size[0], size[1]
    return None


# ---- what they share -------------------------------------------------------------------------------------------------


def _package(name: str, extra: str) -> ModuleType:
    library = name.partition(".")[0]
    try:
        return importlib.import_module(name)
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] == library
        what = f"{library} is not installed" if missing else f"{library} cannot be imported ({error})"
        raise ProviderError(what, hint=f"pip install 'bnfold[{extra}]'") from error


@contextmanager
def _library_errors(where: str) -> Iterator[None]:
    try:
        yield
    except BnfoldError:
        raise
    except Exception as error:
        if "trust_remote_code" in str(error):
            hint = "Build the model in a function of your own, path/to/file.py:factory"
            raise InputError("it comes with code of its own, which is never run", where=where, hint=hint) from error
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        what = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
        raise InputError(what.rstrip(". "), where=where) from error


def _refuse_unknown(name: str, known: list[str], where: str) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"Did you mean {' or '.join(near)}?" if near else None
        raise InputError("there is no such model", where=where, hint=hint)


def _normalization(mean: Any, std: Any, channels: int) -> Normalization | None:
    """What a configuration says, where it fits the model's channels."""
    if mean is None or std is None:
        return None
    mean, std = (tuple(v) if isinstance(v, (list, tuple)) else (v,) for v in (mean, std))
    return Normalization(mean, std) if {len(mean), len(std)} <= {1, channels} else None


def _images(shape: tuple[int, ...], norm: Normalization | None) -> Tensor:
    """Two random images in [0, 1], normalised."""
    images = torch.rand((2, *shape), generator=torch.Generator().manual_seed(0))
    return images if norm is None else norm.apply(images)


_HUBS: dict[str, Callable[[str, dict[str, Any], Any], Built]] = {"timm": _timm, "torchvision": _torchvision, "hf": _hf}
