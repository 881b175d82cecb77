"""The weights that a large ONNX file holds, left where they are: read as external data of the file itself.

protobuf reads a file whole before it parses it, and hands out copies. A file of 2 GB takes 6 so, and next to nothing if
the bytes of its initializers are passed over.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

#: Files of more bytes are read so, and initializers of more bytes stay in them.
LARGE, HELD = 64 << 20, 1024
#: Numbers of fields in onnx.proto: ModelProto.graph, GraphProto.initializer, and those of a TensorProto.
_GRAPH, _INITIALIZER, _DATA_TYPE, _RAW, _EXTERNAL, _LOCATION = 7, 5, 2, 9, 13, 14
_NO_DATA = (_RAW, _EXTERNAL, _LOCATION)
#: ModelProto.functions, GraphProto.node; an empty string among NodeProto.input and NodeProto.output, as it is stored.
_FUNCTIONS, _NODE, _EMPTY = 25, 1, (b"\n\0", b"\x12\0")
_BYTES = 2
Data = mmap.mmap | bytes


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
    with path.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            return _rebuilt(data, 0, len(data), path.name, (_GRAPH, _INITIALIZER))
        except (ValueError, IndexError):
            return None


def filled(content: bytes, sizes: Mapping[int, int], raw: Callable[[int], bytes]) -> Iterator[bytes]:
    """The content of a model with bytes in place of what some initializers say of theirs, piece by piece.

    As protobuf would write it, but for one initializer in memory at a time.

    Args:
        content: the model without those bytes.
        sizes: how many they are, by the index of the initializer.
        raw: the bytes themselves.
    """
    pieces = list(_filled(content, sizes))
    for piece in pieces:
        yield piece if isinstance(piece, bytes) else raw(piece)


def _filled(content: bytes, sizes: Mapping[int, int]) -> Iterator[bytes | int]:
    """Pieces, and the indices of initializers whose bytes come there."""
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
        yield from inside


def may_leave_out(model: Path | bytes) -> bool:
    """Whether the bytes of a node are such that an operand or a result of it may have an empty name."""
    if isinstance(model, bytes):
        return _may_leave_out(model)
    if not model.stat().st_size:
        return False
    with model.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _may_leave_out(data)


def _may_leave_out(data: Data) -> bool:
    try:
        top = [field for field in _fields(data, 0, len(data)) if field.number in (_GRAPH, _FUNCTIONS)]
        nodes = (
            part for graph in top for part in _fields(data, graph.value, graph.end)
            if graph.number == _FUNCTIONS or part.number == _NODE
        )  # fmt: skip
        return any(empty in data[node.value : node.end] for node in nodes for empty in _EMPTY)
    except (ValueError, IndexError):
        return False


def has_initializer_of(path: Path, dtypes: Collection[int]) -> bool:
    """Whether an initializer of the main graph is of one of some TensorProto.DataTypes; not of a damaged file."""
    if not path.stat().st_size:
        return False
    with path.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _has_initializer_of(data, dtypes)


def _has_initializer_of(data: Data, dtypes: Collection[int]) -> bool:
    try:
        return any(
            field.number == _DATA_TYPE and field.wire == 0 and _read(data, field.value)[0] in dtypes
            for graph in _fields(data, 0, len(data)) if graph.number == _GRAPH
            for tensor in _fields(data, graph.value, graph.end) if tensor.number == _INITIALIZER
            for field in _fields(data, tensor.value, tensor.end)
        )  # fmt: skip
    except (ValueError, IndexError):
        return False


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
