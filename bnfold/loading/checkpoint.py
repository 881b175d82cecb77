"""Files of weights: recognise them, reject what is damaged or foreign, and put the weights into a module.

Nothing in a file is executed unless the user asks for it: pickles go through torch's restricted unpickler
(``weights_only=True``), and an archive is verified before torch sees it, because torch itself neither compares a
member's checksum nor bounds what a compressed member inflates to.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import zipfile
import zlib
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch

from bnfold.errors import InputError, first_line
from bnfold.files import require_file, sha256_of, there
from bnfold.loading import inert

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
    """The kind of a file, from its first bytes and its members; InputError where it is none, which says what it is."""
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
        what = "this exported program was written in the format of torch 2.7 or older"
        raise InputError(what, where=str(path), hint="Load it and torch.export.save it again with a torch of today")
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

    InputError where they differ, members are compressed to more than ``inflated`` bytes (only TorchScript has any, its
    code) or claim more bytes than the file has, or two have one name.
    """
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if sum(m.file_size for m in members if m.compress_type != zipfile.ZIP_STORED) > inflated:
            what = "the archive holds compressed members, which torch.save never writes"
            raise InputError(what, where=str(path), hint="If you trust it, torch.load it and torch.save it again")
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
    """The SHA-256 of a file's bytes, in hexadecimal; of an index of shards, that of the list of theirs."""
    if path.name.endswith(INDEX):
        parts = [f"{sha256(path.parent / name)}  {name}\n" for name in sorted(set(shards_of(path).values()))]
        return hashlib.sha256("".join(parts).encode()).hexdigest()
    return sha256_of(path)


def unpickle(path: Path, kind: Kind, *, unsafe: bool = False) -> Any:
    """What ``torch.save`` put into a file of kind ``TORCH`` or ``LEGACY``, with its tensors on the CPU.

    InputError where it is damaged, or asks for code and ``unsafe`` does not let the pickle import and call anything.
    """
    if kind is Kind.TORCH:
        verify_archive(path)
    try:
        if not unsafe:
            return inert.load(path, mmap=kind is Kind.TORCH)
        return torch.load(path, map_location="cpu", weights_only=False)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        if kind is Kind.LEGACY and not re.search(r"GLOBAL|Can only|unrecognized function", str(error)):
            raise InputError("the file is cut short or damaged", where=str(path), hint=_DAMAGED) from error
        raise needs_code(path, named[1] if named else "") from error
    except (ImportError, AttributeError) as error:
        if not unsafe:
            raise _unreadable(path, error) from error
        what = f"the pickle asks for what is not installed here ({first_line(error)})"
        hint = "Install it; weights alone are read without it, where you leave out --unsafe-pickle"
        raise InputError(what, where=str(path), hint=hint) from error
    except Exception as error:
        raise _unreadable(path, error) from error


def needs_code(path: Path, name: str) -> InputError:
    """What is said of a file whose pickled objects would have to be restored by running their code."""
    return InputError(
        f"the file holds pickled Python objects{f' ({name})' if name else ''}, not only tensors",
        where=str(path),
        hint="Loading such a file can run any code; if you trust where it comes from, pass --unsafe-pickle, "
        "else ask for the weights alone (torch.save(model.state_dict(), ...) or safetensors)",
    )


def _unreadable(path: Path, error: Exception) -> InputError:
    what = f"the file cannot be loaded ({type(error).__name__}: {first_line(error)})"
    return InputError(what, where=str(path), hint=_DAMAGED)


def read(path: Path, *, unsafe: bool = False) -> Any:
    """What a file of weights holds, or all the files that an index of shards names.

    InputError as for ``identify`` and ``unpickle``, and where a shard lacks what the index says that it has.
    """
    if path.name.endswith(INDEX):
        return _read_shards(path, unsafe)
    kind = identify(path)
    if kind is Kind.SCRIPT:
        hint = "Give it as the source itself; torch.jit.load(...).state_dict() has its weights"
        raise InputError("this is a TorchScript archive, a whole model and no weights", where=str(path), hint=hint)
    if kind is Kind.PROGRAM:
        raise InputError("this is an exported program, not weights", where=str(path), hint="Give it as the source")
    if kind is not Kind.SAFETENSORS:
        return unpickle(path, kind, unsafe=unsafe)
    from safetensors.torch import load_file

    try:
        return load_file(path, device="cpu")
    except Exception as error:
        what = f"the safetensors file is cut short or damaged ({first_line(error)})"
        raise InputError(what, where=str(path), hint=_DAMAGED) from error


#: How the name of an index of shards ends.
INDEX = ".index.json"
_IN_FOLDERS = (*(f"model.safetensors{INDEX}", f"pytorch_model.bin{INDEX}"), "model.safetensors", "pytorch_model.bin")


def resolve(path: Path) -> Path:
    """The file that a folder of weights stands for, InputError where there is not one; of a file, itself."""
    if not there(path) or not path.is_dir():
        return path
    found = [path / name for name in _IN_FOLDERS if (path / name).exists()][:1]
    for pattern in (f"*{INDEX}", "*.safetensors", "*.pt", "*.pth", "*.ckpt", "*.bin"):
        found = found or sorted(path.glob(pattern))
    if len(found) != 1:
        names = ", ".join(each.name for each in found[:_SHOWN]) or "none"
        raise InputError(f"the folder holds {names}", where=str(path), hint="Name one file of weights in it")
    return found[0]


def _read_shards(index: Path, unsafe: bool) -> dict[str, Any]:
    content: dict[str, Any] = {}
    shards = shards_of(index)
    for name in dict.fromkeys(shards.values()):
        shard = read(index.parent / name, unsafe=unsafe)
        mine = [key for key, file in shards.items() if file == name]
        lacking = [key for key in mine if key not in shard] if isinstance(shard, Mapping) else mine
        if lacking:
            raise InputError(f"the shard lacks {lacking[0]}", where=str(index.parent / name), hint=_DAMAGED)
        content |= {key: shard[key] for key in mine}
    return content


def shards_of(index: Path) -> dict[str, str]:
    """The file of every key that an index names, beside it; InputError where it is no index, or names others."""
    require_file(index)
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()) or not found:
            raise ValueError("weight_map names no files")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"this is no index of shards ({first_line(error)})", where=str(index)) from error
    for name in found.values():
        if Path(name).name != name or name in ("", "..") or name.endswith(INDEX) or "\\" in name:
            raise InputError(f"the index names {name!r}, which is no file beside it", where=str(index))
    return found
