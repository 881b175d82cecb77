"""An ONNX file of anybody's, read without its weights, which have to lie beside it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnfold.errors import InputError
from bnfold.files import require_file
from bnfold.runtime.inline import apart

if TYPE_CHECKING:
    import onnx


def read_model(path: Path, *, light: bool = False) -> onnx.ModelProto:
    """The ModelProto of a file, its external data excepted, of which none lies anywhere else than it may.

    ``light``: of a large file, the weights in it are its external data too.

    Whoever reads that data afterwards, ONNX Runtime or onnx or onnx_ir, refuses some of what lies outside, in words of
    its own; a pipe they wait for.

    Raises:
        InputError: it is no ONNX file, or external data is not a regular file of the model's own folder (also through a
            link, soft or hard), or an offset or a length lies outside that file.
    """
    import onnx

    require_file(path)
    refused = InputError("this is no ONNX file, or a damaged one", where=str(path), hint="Export it again")
    try:
        content = apart(path) if light else None
        if content is not None:
            model = onnx.load_model_from_string(content)
        else:
            model = onnx.load_model(path, load_external_data=False)
    except OSError as error:
        raise InputError(f"the file cannot be read ({error.strerror})", where=str(path)) from error
    except Exception as error:  # protobuf has an exception of its own, outside of what onnx exports
        raise refused from error
    if not model.HasField("graph"):  # an empty file is a message without any field
        raise refused
    for tensor in tensors_of(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL and (problem := _misplaced(tensor, path.parent)):
            raise InputError(
                f"the external data of '{tensor.name}' {problem}",
                where=str(path),
                hint="Keep the model's own .data file beside it, in the same folder",
            )
    return model


def tensors_of(part: Any) -> Iterator[Any]:
    """Every tensor below a message: of a graph, a function, a node's attributes and the graphs in them."""
    for field, value in part.ListFields():
        if field.message_type is None:
            continue
        for each in value if hasattr(value, "__len__") else (value,):
            if field.message_type.name == "TensorProto":
                yield each
            else:
                yield from tensors_of(each)


def _misplaced(tensor: Any, folder: Path) -> str | None:
    given = {entry.key: entry.value for entry in tensor.external_data}
    location = given.get("location", "")
    try:
        offset, length = (int(given.get(key) or 0) for key in ("offset", "length"))
    except ValueError:
        return "has an offset or a length that is no number"
    if not location or "\0" in location:
        return f"has no location but {location!r}"
    home, data = (Path(os.path.realpath(path)) for path in (folder, folder / location))
    if Path(location).is_absolute() or home not in data.parents:
        return f"lies outside of the model's folder, at {location!r}"
    try:
        require_file(data)
    except InputError as error:
        return f"cannot be read from {location!r}: {error.what}"
    found = data.stat()
    if found.st_nlink > 1:
        return f"has other names than {location!r} (hard links), and may be anybody's"
    if offset < 0 or length < 0 or offset + length > found.st_size:
        return f"would be {length} bytes of {location!r} from {offset} on, which has {found.st_size}"
    return None
