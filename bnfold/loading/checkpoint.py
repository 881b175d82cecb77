"""Files of weights: recognise them, reject what is damaged or foreign, and put the weights into a module.

Nothing in a file is executed unless the user asks for it: pickles go through torch's restricted unpickler
(``weights_only=True``), and an archive is verified before torch sees it, because torch itself neither compares a
member's checksum nor bounds what a compressed member inflates to.
"""

from __future__ import annotations

import argparse
import hashlib
import pickle
import re
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from bnfold.errors import InputError
from bnfold.files import require_file, there
from bnfold.loading.calibrated_file import switch_on

Shapes = Mapping[str, "tuple[int, ...] | None"]

#: Keys under which training code puts its weights. Others are reached with ``--weights-key`` only: an optimizer's
#: moments carry the names and shapes of the weights too.
WRAPPERS = (
    *("state_dict", "model", "model_state_dict", "model_state", "net", "network", "module", "weights", "params"),
    *("ema", "ema_state_dict", "state_dict_ema", "model_ema", "ema_model", "params_ema", "student", "teacher"),
)
_SHOWN = 3


class Kind(StrEnum):
    """The kinds of file that bnfold reads, by content and not by name."""

    TORCH = "a torch.save archive"
    LEGACY = "a torch.save file of before torch 1.6"
    SAFETENSORS = "a safetensors file"
    PROGRAM = "an exported program (.pt2)"
    SCRIPT = "a TorchScript archive"


#: First bytes -> what the file is. Checked in order.
_FOREIGN: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "a git-lfs pointer, not the file itself"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file (Keras or TensorFlow weights)"),
    (b"GGUF", "a GGUF file"),
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"GIF8", "a GIF image"),
    (b"%PDF", "a PDF document"),
    (b"\x1f\x8b", "a gzip file"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x7fELF", "a compiled program"),
)
_FOREIGN_SUFFIXES = {
    ".onnx": "an ONNX file",
    ".tflite": "a TensorFlow Lite file",
    ".pb": "a TensorFlow file",
    ".h5": "an HDF5 file (Keras or TensorFlow weights)",
    ".keras": "a Keras file",
    ".gguf": "a GGUF file",
}
_LEGACY_MAGIC = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
_DAMAGED = "Fetch or copy the file again and compare its size and checksum with the original's"
_GIVE_PYTORCH = "Give the PyTorch model that this file was made from"


def identify(path: Path) -> Kind:
    """The kind of a file, from its first bytes and its members.

    Raises:
        InputError: missing, a folder, empty, unreadable, or not one of the four kinds (the message says what it is).
    """
    if there(path) and path.is_dir():
        what = "a TensorFlow SavedModel" if (path / "saved_model.pb").exists() else "a folder, not a file"
        raise InputError(f"this is {what}", where=str(path), hint=_GIVE_PYTORCH)
    require_file(path)
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise InputError(f"the file cannot be read ({error.strerror or error})", where=str(path)) from error
    if not head:
        raise InputError("the file is empty", where=str(path), hint=_DAMAGED)
    if head.startswith(b"PK\x03\x04") and path.suffix.lower() not in _FOREIGN_SUFFIXES:
        return _identify_archive(path)
    if head[0] == 0x80 and _LEGACY_MAGIC in head[:20]:
        return Kind.LEGACY
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size:
        return Kind.SAFETENSORS
    if path.suffix.lower() == ".safetensors" and head[8:9] == b"{":
        raise InputError("the safetensors header is cut short or damaged", where=str(path), hint=_DAMAGED)
    what = _describe(head, path.suffix.lower())
    hint = "Fetch it with git lfs pull" if "git-lfs" in what else _GIVE_PYTORCH
    raise InputError(f"this is {what}, not a PyTorch model or checkpoint", where=str(path), hint=hint)


def _describe(head: bytes, suffix: str) -> str:
    for magic, what in _FOREIGN:
        if head.startswith(magic):
            return what
    if suffix in _FOREIGN_SUFFIXES:
        return _FOREIGN_SUFFIXES[suffix]
    if re.match(rb"\s*<(!doctype|html|\?xml)", head, re.IGNORECASE):
        return "a web page (HTML), often what a failed download leaves"
    if head[0] == 0x80 and head[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        return "a plain pickle that torch.save did not write"
    # Cut in the middle of a character, an otherwise valid text ends in up to three stray bytes.
    text = head.decode("utf-8", errors="ignore")
    if len(text.encode()) >= len(head) - 3 and all(c.isprintable() or c.isspace() for c in text):
        return "a text file"
    return "an unknown or damaged binary file"


def _identify_archive(path: Path) -> Kind:
    names = _members(path)
    inner = {name.partition("/")[2] for name in names}
    if "constants.pkl" in inner and any(name.startswith("code/") for name in inner):
        return Kind.SCRIPT
    if "serialized_exported_program.json" in names:
        raise InputError(
            "this exported program was written in the format of torch 2.7 or older",
            where=str(path),
            hint="Load it and torch.export.save it again with a torch of today",
        )
    if "archive_format" in inner or any(name.startswith("models/") and name.endswith(".json") for name in inner):
        return Kind.PROGRAM
    if "data.pkl" in inner:
        return Kind.TORCH
    what = "a NumPy archive" if any(name.endswith(".npy") for name in names) else "a zip archive of something else"
    raise InputError(f"this is {what}, not a PyTorch model or checkpoint", where=str(path), hint=_GIVE_PYTORCH)


def _members(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            # A file cut short may end in a whole archive that was one of its members.
            if min((member.header_offset for member in archive.infolist()), default=0) > 0:
                raise zipfile.BadZipFile("its directory is not its own")
            return archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise InputError(f"the archive is cut short or damaged ({error})", where=str(path), hint=_DAMAGED) from error


def verify_archive(path: Path, *, inflated: int = 0) -> None:
    """Compare the checksum of every member, having refused what would inflate: torch does neither.

    Args:
        path: an archive.
        inflated: what its compressed members may inflate to, in bytes; only TorchScript has any, its code.

    Raises:
        InputError: compressed members, members that claim more bytes than the file has, a duplicate name, or a
            checksum that differs.
    """
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if sum(m.file_size for m in members if m.compress_type != zipfile.ZIP_STORED) > inflated:
            raise InputError(
                "the archive holds compressed members, which torch.save never writes",
                where=str(path),
                hint="If you trust it, torch.load it and torch.save it again",
            )
        if sum(m.file_size for m in members) > path.stat().st_size + inflated:
            raise InputError("the archive's members claim more bytes than the file has", where=str(path), hint=_DAMAGED)
        if len({member.filename for member in members}) < len(members):
            raise InputError("the archive holds two members of one name", where=str(path), hint=_DAMAGED)
        try:
            damaged = archive.testzip()
        except (zipfile.BadZipFile, OSError, EOFError, RuntimeError, ValueError, zlib.error) as error:
            raise InputError(f"the archive is damaged ({error})", where=str(path), hint=_DAMAGED) from error
    if damaged:
        raise InputError(f"the checksum of {damaged} is wrong: the file is damaged", where=str(path), hint=_DAMAGED)


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unpickle(path: Path, kind: Kind, *, unsafe: bool = False, mmap: bool = True) -> Any:
    """What ``torch.save`` put into a file, with its tensors on the CPU.

    Args:
        path: a file of kind ``TORCH`` or ``LEGACY``.
        kind: as ``identify`` gave it.
        unsafe: let the pickle import and call anything.
        mmap: leave an archive's tensors on the disk until they are read.

    Raises:
        InputError: damaged, or the file asks for code and ``unsafe`` is off.
    """
    if kind is Kind.TORCH:
        verify_archive(path)
    try:
        # A Namespace of options sits in many checkpoints and can do nothing but hold attributes.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(
                path, map_location="cpu", weights_only=not unsafe, mmap=mmap and kind is Kind.TORCH and not unsafe
            )
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        if kind is Kind.LEGACY and named is None:
            raise InputError("the file is cut short or damaged", where=str(path), hint=_DAMAGED) from error
        raise InputError(
            f"the file holds pickled Python objects{f' ({named[1]})' if named else ''}, not only tensors",
            where=str(path),
            hint="Loading such a file can run any code; if you trust where it comes from, pass --unsafe-pickle, "
            "else ask for the weights alone (torch.save(model.state_dict(), ...) or safetensors)",
        ) from error
    except Exception as error:
        raise InputError(
            f"the file cannot be loaded ({type(error).__name__}: {_first_line(error)})", where=str(path), hint=_DAMAGED
        ) from error


def load_weights(
    model: torch.nn.Module, path: Path, *, key: str | None = None, strip_prefix: str | None = None, unsafe: bool = False
) -> None:
    """Copy a checkpoint's weights into ``model``, strictly, as ``load_state_dict`` does.

    Args:
        model: changed in place; its dtypes and flags stay.
        path: .safetensors, or what ``torch.save`` wrote.
        key: where in the checkpoint the state dict is, with dots for nested keys ("ema.module").
        strip_prefix: taken off every key that begins with it.
        unsafe: let a pickle import and call anything.

    A file of bnfold calibrate may hold running statistics that the model's class builds without: the model gets them.

    Raises:
        InputError: see ``identify`` and ``unpickle``; several state dicts fit or none is there; keys or shapes differ.
    """
    switch_on(model, path)
    expected = {name: _shape(value) for name, value in model.state_dict().items()}
    state = _select(_read(path, unsafe), expected, path, key, strip_prefix)
    try:
        model.load_state_dict(state, strict=True)
    except Exception as error:
        difference = _difference(expected, state)
        # A module's own loading hook may object to weights whose keys and shapes fit.
        what = str(difference or error)[:400]
        prefix = _fitting_prefix(expected, state)
        hint = (
            f"--strip-prefix {prefix} makes it fit"
            if prefix
            else "Check that the model is built as it was trained (--arg name=value) and that these are its weights"
        )
        raise InputError(f"the weights do not fit the model: {what}", where=str(path), hint=hint) from error


def _read(path: Path, unsafe: bool) -> Any:
    kind = identify(path)
    if kind is Kind.SCRIPT:
        raise InputError(
            "this is a TorchScript archive, a whole model and no weights",
            where=str(path),
            hint="Give it as the source itself; torch.jit.load(...).state_dict() has its weights",
        )
    if kind is Kind.PROGRAM:
        raise InputError("this is an exported program, not weights", where=str(path), hint="Give it as the source")
    if kind is not Kind.SAFETENSORS:
        return unpickle(path, kind, unsafe=unsafe)
    from safetensors.torch import load_file

    try:
        return load_file(path, device="cpu")
    except Exception as error:
        what = f"the safetensors file is cut short or damaged ({_first_line(error)})"
        raise InputError(what, where=str(path), hint=_DAMAGED) from error


def _select(
    content: Any, expected: Shapes, path: Path, key: str | None, strip_prefix: str | None
) -> Mapping[str, torch.Tensor]:
    """The one state dict in a checkpoint that is meant."""
    if key is not None:
        content = _descend(content, key, path)
    found = dict(_candidates(content)) if isinstance(content, Mapping) else {}
    if not found:
        holds = f"holds {', '.join(map(repr, list(content)[:8]))}" if isinstance(content, Mapping) else "is no mapping"
        raise InputError(
            f"there is no state dict here: the content {holds} ({type(content).__name__})",
            where=str(path),
            hint="--weights-key says where it is",
        )
    stripped = {name: _strip(_checked(state, path), strip_prefix, path) for name, state in found.items()}
    if len(stripped) == 1:
        return next(iter(stripped.values()))
    fitting = [
        name
        for name, state in stripped.items()
        if not _difference(expected, state) or _fitting_prefix(expected, state) is not None
    ]
    if len(fitting) == 1:
        return stripped[fitting[0]]
    outer = f"{key}." if key else ""
    names = [f"{outer}{name}" for name in fitting or stripped]
    raise InputError(
        f"{'several' if fitting else 'none'} of the state dicts in it {'fit' if fitting else 'fits'} the model: "
        + ", ".join(names),
        where=str(path),
        hint=f"Pick one, for example --weights-key {names[0]}",
    )


def _descend(content: Any, key: str, path: Path) -> Any:
    if isinstance(content, Mapping):
        if key in content:
            return content[key]
        for name, inner in content.items():
            if isinstance(name, str) and key.startswith(f"{name}."):
                return _descend(inner, key[len(name) + 1 :], path)
        raise InputError(
            f"there is no key {key!r} in the checkpoint", where=str(path), hint=f"It has {', '.join(map(str, content))}"
        )
    raise InputError(f"there is no key {key!r}: the entry is a {type(content).__name__}", where=str(path))


def _candidates(
    content: Mapping[Any, Any], path: str = "", depth: int = 2
) -> Iterator[tuple[str, Mapping[str, torch.Tensor]]]:
    inner = {key: content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)} if depth else {}
    found = [pair for key, value in inner.items() for pair in _candidates(value, f"{path}.{key}".strip("."), depth - 1)]
    if found:
        yield from found
    elif any(isinstance(value, torch.Tensor) for value in content.values()) and all(
        isinstance(k, str) for k in content
    ):
        yield path, content


def _checked(state: Mapping[str, Any], path: Path) -> Mapping[str, torch.Tensor]:
    for key, value in state.items():
        # get_extra_state() of a module may return anything; its key ends so.
        if not isinstance(value, torch.Tensor) and not str(key).endswith("_extra_state"):
            raise InputError(f"entry {key!r} of the state dict is a {type(value).__name__}, no tensor", where=str(path))
    return state


def _strip(state: Mapping[str, torch.Tensor], prefix: str | None, path: Path) -> Mapping[str, torch.Tensor]:
    if not prefix:
        return state
    stripped = OrderedDict((key.removeprefix(prefix), value) for key, value in state.items())
    if len(stripped) < len(state):
        raise InputError(f"without the prefix {prefix!r} two keys become one", where=str(path))
    if stripped.keys() == state.keys():
        hint = f"The first key is {next(iter(state))!r}"
        raise InputError(f"no key of the weights begins with {prefix!r}", where=str(path), hint=hint)
    # The versions of the modules that wrote the weights: load_state_dict translates old ones.
    if metadata := getattr(state, "_metadata", None):
        renamed = {f"{name}.".removeprefix(prefix).removesuffix("."): value for name, value in metadata.items()}
        stripped._metadata = renamed  # type: ignore[attr-defined]
    return stripped


def _fitting_prefix(expected: Shapes, state: Mapping[str, torch.Tensor]) -> str | None:
    """The prefix without which the keys of ``state`` are those of the model, if there is one."""
    anchor = max((name for name in expected if not name.endswith("num_batches_tracked")), key=len, default=None)
    prefixes = {key.removesuffix(anchor) for key in state if anchor and key.endswith(f".{anchor}")}
    for prefix in sorted(prefixes, key=len):
        stripped = {key.removeprefix(prefix): value for key, value in state.items()}
        if len(stripped) == len(state) and not _difference(expected, stripped):
            return prefix
    return None


@dataclass(frozen=True)
class _Difference:
    """Keys of the model that the weights lack, keys that the model lacks, and shapes that differ."""

    missing: list[str]
    unexpected: list[str]
    shaped: list[str]

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.shaped)

    def __str__(self) -> str:
        parts = {"missing": self.missing, "unexpected": self.unexpected, "of another shape": self.shaped}
        return "; ".join(f"{len(keys)} {label}: {_shorten(keys)}" for label, keys in parts.items() if keys)


def _difference(expected: Shapes, state: Mapping[str, torch.Tensor]) -> _Difference:
    shapes = {key: _shape(value) for key, value in state.items()}
    return _Difference(
        # Old BatchNorm layers had no counter; load_state_dict then starts one.
        [f"{k} {v}" for k, v in expected.items() if k not in shapes and not k.endswith("num_batches_tracked")],
        [f"{k} {v}" for k, v in shapes.items() if k not in expected],
        [
            f"{k} {shapes[k]} instead of {v}"
            for k, v in expected.items()
            if v is not None and shapes.get(k) is not None and shapes[k] != v
        ],
    )


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(value.shape) if isinstance(value, torch.Tensor) and not is_lazy(value) else None


def _shorten(items: list[str]) -> str:
    return ", ".join(items[:_SHOWN]) + (", ..." if len(items) > _SHOWN else "")


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
