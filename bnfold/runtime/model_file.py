"""An ONNX file of anybody's, read without its weights, which have to lie beside it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnfold.errors import InputError
from bnfold.files import require_file
from bnfold.runtime.inline import apart, may_leave_out

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

    ``light``: of a large file without the weights in it too.

    Raises:
        InputError: as for ``read_model``.
    """
    import onnx

    if not may_leave_out(model):
        return apart(model) if light and isinstance(model, Path) else None
    found = onnx.load_model_from_string(model) if isinstance(model, bytes) else read_model(model, light=True)
    return found.SerializeToString() if _shorten(found) or not isinstance(model, bytes) else None


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
