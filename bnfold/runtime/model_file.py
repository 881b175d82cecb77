"""An ONNX file of anybody's, read without its weights, which have to lie beside it."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bnfold.errors import InputError
from bnfold.files import require_file

if TYPE_CHECKING:
    import onnx

#: Files of more bytes are read so, and initializers of more bytes stay in them.
LARGE, HELD = 64 << 20, 1024
#: Numbers of fields in onnx.proto: ModelProto.graph, GraphProto.initializer, and those of a TensorProto.
_GRAPH, _INITIALIZER, _RAW, _EXTERNAL, _LOCATION = 7, 5, 9, 13, 14
_NO_DATA = (_RAW, _EXTERNAL, _LOCATION)
_BYTES = 2
Data = mmap.mmap | bytes


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
    _shorten(model)
    for tensor in tensors_of(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL and (problem := misplaced(tensor, path.parent)):
            hint = "Keep the model's own .data file beside it, in the same folder"
            raise InputError(f"the external data of '{tensor.name}' {problem}", where=str(path), hint=hint)
    return model


def opsets_of(model: onnx.ModelProto) -> dict[str, int]:
    """The version of every operator set, by domain."""
    return {"" if o.domain == "ai.onnx" else o.domain: o.version for o in model.opset_import}


def nodes_of(part: Any) -> Iterator[Any]:
    """Every node of a model, of its functions and of the bodies of nodes."""
    if hasattr(part, "graph"):
        yield from nodes_of(part.graph)
        for function in part.functions:
            yield from nodes_of(function)
        return
    for node in part.node:
        yield node
        for attribute in node.attribute:
            for body in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from nodes_of(body)


def is_optional(node: onnx.NodeProto, opsets: Mapping[str, int], at: int, *, result: bool) -> bool:
    """Whether an operand, or a result, of a node may be left out; True of an operator that nobody knows."""
    import onnx

    domain = "" if node.domain == "ai.onnx" else node.domain
    try:
        schema = onnx.defs.get_schema(node.op_type, opsets.get(domain, 1), domain)
    except onnx.defs.SchemaError:
        return True
    formal, kinds = schema.outputs if result else schema.inputs, onnx.defs.OpSchema.FormalParameterOption
    if at >= len(formal):  # of those without number none, and of others the runtime says that there are too many
        return not formal or formal[-1].option != kinds.Variadic
    return bool(formal[at].option == kinds.Optional)


def shortened(model: Path | bytes, *, light: bool) -> bytes | None:
    """The content of a file, or content, without empty names behind all others; None where it has none.

    ``light``: of a large file without the weights in it too. InputError as for ``read_model``.
    """
    found = _structure(model)
    if found is None or not _shorten(found):
        return apart(model) if light and isinstance(model, Path) else None
    found = found if isinstance(model, bytes) else read_model(model, light=True)
    content: bytes = found.SerializeToString()
    return content


def has_initializer_of(path: Path, dtypes: Collection[int]) -> bool:
    """Whether an initializer of the main graph is of one of some TensorProto.DataTypes; not of a damaged file."""
    found = _structure(path)
    return found is not None and any(tensor.data_type in dtypes for tensor in found.graph.initializer)


def _structure(model: Path | bytes) -> onnx.ModelProto | None:
    """A model, of a file without its weights; None where it is damaged, of which the runtime says how."""
    import onnx

    content = model if isinstance(model, bytes) else _without_weights(model)
    try:
        return None if content is None else onnx.load_model_from_string(content)
    except Exception:  # protobuf has an exception of its own, outside of what onnx exports
        return None


def _shorten(model: onnx.ModelProto) -> bool:
    """Takes away empty names behind the last operand and the last result of a node; whether there were any.

    They say nothing, and ONNX Runtime ends the process on some: a BatchNormalization of which four are left out, a
    LayerNormalization with an empty bias.
    """
    opsets, there = opsets_of(model), False
    for node in nodes_of(model):
        for names, result in ((node.input, False), (node.output, True)):
            while names and not names[-1] and is_optional(node, opsets, len(names) - 1, result=result):
                del names[-1]
                there = True
    return there


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


def misplaced(tensor: Any, folder: Path) -> str | None:
    """What is wrong with where a tensor's external data lie; None where they may be read."""
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


# -- the weights that a large file holds, left where they are: read as external data of the file itself ----------------
#
# protobuf reads a file whole before it parses it, and hands out copies. A file of 2 GB takes 6 so, and next to nothing
# if the bytes of its initializers are passed over.


class _Field(NamedTuple):
    number: int
    wire: int
    start: int
    value: int
    end: int


def apart(path: Path, *, large: int | None = None) -> bytes | None:
    """The model without the bytes of its large initializers, which say where in the file those are.

    None where the file has no more than so many bytes, or other names (which readers of external data refuse), or is
    damaged.
    """
    if path.is_symlink() or path.stat().st_nlink > 1 or path.stat().st_size <= (LARGE if large is None else large):
        return None
    return _without_weights(path)


def _without_weights(path: Path) -> bytes | None:
    """The same of a file of any size and any number of names."""
    try:
        with path.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _rebuilt(data, 0, len(data), path.name, (_GRAPH, _INITIALIZER))
    except (ValueError, IndexError):  # an empty file cannot be mapped
        return None


def filled(content: bytes, sizes: Mapping[int, int], raw: Callable[[int], bytes]) -> Iterator[bytes]:
    """The content of a model with bytes in place of what some initializers say of theirs, piece by piece.

    As protobuf would write it, but for one initializer in memory at a time. ``sizes``: how many bytes they are, by the
    index of the initializer; ``raw``: the bytes themselves.
    """
    for top in _fields(content, 0, len(content)):
        if top.number != _GRAPH:
            yield content[top.start : top.end]
            continue
        inside, index, length = list[bytes | int](), 0, 0
        for field in _fields(content, top.value, top.end):
            if field.number == _INITIALIZER and index in sizes:
                parts = [part for part in _fields(content, field.value, field.end) if part.number not in _NO_DATA]
                before, behind = (
                    b"".join(content[part.start : part.end] for part in parts if (part.number < _RAW) == first)
                    for first in (True, False)
                )
                head = before + _varint(_RAW << 3 | _BYTES) + _varint(sizes[index])
                whole = len(head) + sizes[index] + len(behind)
                inside += [_varint(_INITIALIZER << 3 | _BYTES) + _varint(whole) + head, index, behind]
                length += sizes[index]
            else:
                inside.append(content[field.start : field.end])
            index += field.number == _INITIALIZER
        length += sum(len(piece) for piece in inside if isinstance(piece, bytes))
        yield _varint(_GRAPH << 3 | _BYTES) + _varint(length)
        yield from (piece if isinstance(piece, bytes) else raw(piece) for piece in inside)


def _rebuilt(data: Data, start: int, end: int, name: str, below: tuple[int, ...]) -> bytes:
    """A message, in which the fields ``below`` one another are gone through, down to tensors."""
    found = bytearray()
    for field in _fields(data, start, end):
        if field.number == below[0] and field.wire == _BYTES:
            inner = _rebuilt(data, field.value, field.end, name, below[1:]) if below[1:] else _tensor(data, field, name)
            found += _bytes(field.number, inner)
        else:
            found += data[field.start : field.end]
    return bytes(found)


def _tensor(data: Data, tensor: _Field, name: str) -> bytes:
    fields = list(_fields(data, tensor.value, tensor.end))
    raw = [field for field in fields if field.number == _RAW]
    elsewhere = any(field.number in (_EXTERNAL, _LOCATION) for field in fields)
    if elsewhere or len(raw) != 1 or raw[0].wire != _BYTES or raw[0].end - raw[0].value <= HELD:
        return data[tensor.value : tensor.end]
    found = b"".join(data[field.start : field.end] for field in fields if field is not raw[0])
    place = {"location": name, "offset": str(raw[0].value), "length": str(raw[0].end - raw[0].value)}
    for key, value in place.items():
        found += _bytes(_EXTERNAL, _bytes(1, key.encode()) + _bytes(2, value.encode()))
    return found + _varint(_LOCATION << 3) + _varint(1)


def _fields(data: Data, at: int, end: int) -> Iterator[_Field]:
    """The fields of a message. Raises ValueError: it is none."""
    while at < end:
        start = at
        tag, value = _read(data, at)
        size, wire = 0, tag & 7
        if wire == 0:
            _, at = _read(data, value)
        elif wire == _BYTES:
            size, value = _read(data, value)
            at = value + size
        elif wire in (1, 5):
            at = value + (8 if wire == 1 else 4)
        else:
            raise ValueError("a group, or no field")
        if at > end:
            raise ValueError("a field that is longer than its message")
        yield _Field(tag >> 3, wire, start, value, at)


def _read(data: Data, at: int) -> tuple[int, int]:
    """A number, and where it ends."""
    number = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, at
    raise ValueError("a number of more than 64 bits")


def _varint(number: int) -> bytes:
    found = bytearray()
    while number >= 0x80:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*found, number])


def _bytes(number: int, value: bytes) -> bytes:
    return _varint(number << 3 | _BYTES) + _varint(len(value)) + value
