"""ONNX files as sources: read without their external data, and refused where they are not what they claim to be."""

from __future__ import annotations

import keyword
import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx

from bnfold.errors import InputError
from bnfold.loading.specs import DTYPES, InputSpec
from bnfold.runtime.model_file import is_optional, nodes_of, opsets_of, read_model, tensors_of

_AGAIN = "Export it again, or fetch it again and compare its size with the original's"


@dataclass(frozen=True)
class OnnxFile:
    """An ONNX file as a model: ``model`` is its content without external data, not to be changed."""

    path: Path
    model: onnx.ModelProto

    @property
    def elements(self) -> int:
        """How many numbers its initializers hold."""
        return sum(math.prod(tensor.dims) for tensor in self.model.graph.initializer)

    @property
    def opset(self) -> int:
        """The version of its default operator set."""
        return next((o.version for o in self.model.opset_import if o.domain in ("", "ai.onnx")), 1)

    def copied(self) -> onnx.ModelProto:
        """The content, to change; the external data of its initializers stays where it is."""
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        held = [*model.graph.initializer]
        for tensor in tensors_of(model):
            if onnx.external_data_helper.uses_external_data(tensor) and not any(tensor is each for each in held):
                onnx.external_data_helper.load_external_data_for_tensor(tensor, str(self.path.parent))
                _own(tensor)
        return model

    def raw(self, tensor: onnx.TensorProto) -> bytes | None:
        """The bytes of an initializer of a copy, wherever they are; None where it has numbers in place of bytes.

        InputError where the file that they are in cannot be read.
        """
        if not onnx.external_data_helper.uses_external_data(tensor):
            held: bytes = tensor.raw_data
            return held if tensor.HasField("raw_data") else None
        given = {entry.key: entry.value for entry in tensor.external_data}
        path = self.path.parent / given["location"]
        try:
            with path.open("rb") as data:
                data.seek(int(given.get("offset") or 0))
                found: bytes = data.read(int(given.get("length") or bytes_of(tensor)))
                return found
        except OSError as error:
            raise InputError(f"the external data of '{tensor.name}' cannot be read", where=str(path)) from error

    def loaded(self) -> onnx.ModelProto:
        """The whole content, external data in it, to change."""
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        onnx.external_data_helper.load_external_data_for_model(model, str(self.path.parent))
        return model


def read_onnx(source: OnnxFile | str | Path) -> OnnxFile:
    """Read a file that is not read yet.

    Raises:
        InputError: it is missing, no ONNX file, of an operator set that onnx does not know, claims more weights than it
            holds, has external data outside its folder, or functions that call themselves.
    """
    if isinstance(source, OnnxFile):
        return source
    where, model = str(source), read_model(Path(source), light=True)
    file = OnnxFile(Path(source), model)
    if not model.graph.node or not model.opset_import:
        raise InputError("this is no ONNX file, or one without operators", where=where, hint=_AGAIN)
    newest = onnx.defs.onnx_opset_version()
    if any(o.domain in ("", "ai.onnx") for o in model.opset_import) and not 7 <= file.opset <= newest:
        what = f"its operator set is {file.opset}, and those from 7 to {newest} can be read"
        raise InputError(what, where=where, hint="Convert it: onnx.version_converter.convert_version")
    for tensor in model.graph.initializer:
        if problem := _problem(tensor):
            raise InputError(f"initializer '{tensor.name}' {problem}", where=where, hint=_AGAIN)
    for sparse in model.graph.sparse_initializer:
        if problem := _sparse_problem(sparse):
            raise InputError(f"the sparse initializer '{sparse.values.name}' {problem}", where=where, hint=_AGAIN)
    if name := next(_recursive(model), None):
        raise InputError(f"its function '{name}' calls itself", where=where)
    if problem := next(_miswired(model.graph, set()), None):
        raise InputError(problem, where=where)
    opsets = opsets_of(model)
    if problem := next((said for node in nodes_of(model) for said in _unnamed(node, opsets)), None):
        raise InputError(problem, where=where, hint="ONNX Runtime would end the process on it: name what it needs")
    for function in model.functions:
        if problem := next(_miswired(function, set(function.input)), None):
            raise InputError(f"in its function '{function.name}' {problem}", where=where)
    return file


def _miswired(graph: onnx.GraphProto | onnx.FunctionProto, around: Collection[str]) -> Iterator[str]:
    """What reads a value that nothing computes, or nothing before it, and what is computed twice.

    onnx's inference, in C++, takes for granted that there is no such thing.
    """
    own, outputs = set[str](), list(graph.output)
    if isinstance(graph, onnx.GraphProto):
        own = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
        own |= {tensor.values.name for tensor in graph.sparse_initializer}
        outputs = [value.name for value in graph.output]
    seen = {*around, *own, ""}
    for node in graph.node:
        label = f"{node.op_type} '{node.name or next(iter(node.output), '')}'"
        if missing := [name for name in node.input if name not in seen]:
            yield f"{label} reads '{missing[0]}', which nothing before it computes"
        for attribute in node.attribute:
            if attribute.name == "num_outputs" and attribute.i != len(node.output):
                yield f"{label} makes {attribute.i} outputs and names {len(node.output)}"
            for body in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _miswired(body, seen)
        for name in filter(None, node.output):
            if name in own:
                yield f"{label} computes '{name}', which is there already"
            own.add(name)
        seen.update(node.output)
    if missing := [name for name in outputs if name not in seen]:
        yield f"nothing computes its output '{missing[0]}'"


def _unnamed(node: onnx.NodeProto, opsets: Mapping[str, int]) -> Iterator[str]:
    """What a node leaves out that its operator cannot do without."""
    label = f"{node.op_type} '{node.name or next(filter(None, node.output), '')}'"
    for names, result in ((node.input, False), (node.output, True)):
        # A BatchNormalization that has more than one result normalises by its batch, and writes all of them.
        needs = result and node.op_type == "BatchNormalization" and not node.domain and len(names) > 1
        for at, name in enumerate(names):
            if not name and (needs or not is_optional(node, opsets, at, result=result)):
                yield f"{label} has no name for its {'output' if result else 'input'} {at}, which is not optional"


def specs_of_file(file: onnx.ModelProto) -> list[InputSpec]:
    """What an ONNX file says of its inputs, by name; nothing where it leaves a rank or a dtype open."""
    held = {tensor.name for tensor in file.graph.initializer}
    found = []
    for value in file.graph.input:
        tensor = value.type.tensor_type
        dtype = onnx.TensorProto.DataType.Name(tensor.elem_type).lower()
        name = {"float": "float32", "double": "float64"}.get(dtype, dtype)
        if value.name in held:
            continue
        if not tensor.HasField("shape") or name not in DTYPES:
            return []
        dims = [dim.dim_value if dim.HasField("dim_value") else dim.dim_param for dim in tensor.shape.dim]
        found.append(InputSpec(value.name, name, tuple(_axis(value.name, axis, dim) for axis, dim in enumerate(dims))))
    return found


def put(tensor: onnx.TensorProto, raw: bytes) -> None:
    """Takes the bytes of an initializer into it."""
    tensor.raw_data = raw
    _own(tensor)


def _own(tensor: onnx.TensorProto) -> None:
    tensor.ClearField("data_location")
    del tensor.external_data[:]


def _axis(name: str, axis: int, dim: int | str) -> int | str:
    """A fixed size as it is; a name, or what stands for one, as a letter of ``--input``."""
    if isinstance(dim, int):
        return dim
    return (
        dim if dim.isidentifier() and not keyword.iskeyword(dim) else f"d{axis}_{re.sub(r'[^0-9a-zA-Z_]', '_', name)}"
    )


def bytes_of(tensor: onnx.TensorProto) -> int:
    """What a tensor takes; two numbers of four bits share a byte."""
    count: int = math.prod(tensor.dims)
    try:
        size = int(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)
    except KeyError:
        return count
    narrow = onnx.TensorProto.DataType.Name(tensor.data_type).endswith(("INT4", "E2M1"))
    return -(-count // 2) if narrow else count * size


def _problem(tensor: onnx.TensorProto) -> str | None:
    if any(dim < 0 for dim in tensor.dims):
        return f"is of shape {list(tensor.dims)}"
    size = bytes_of(tensor)
    if onnx.external_data_helper.uses_external_data(tensor):
        lengths = [entry.value for entry in tensor.external_data if entry.key == "length"]
        return next((f"has {n} bytes of external data and claims {size}" for n in lengths if n != str(size)), None)
    if tensor.data_type == onnx.TensorProto.STRING:
        return None
    if tensor.HasField("raw_data"):
        return None if len(tensor.raw_data) == size else f"holds {len(tensor.raw_data)} bytes and claims {size}"
    held = max(len(tensor.float_data), len(tensor.int32_data), len(tensor.int64_data), len(tensor.double_data),
               len(tensor.uint64_data))  # fmt: skip
    return None if held or not size else f"holds nothing and claims {size} bytes"


def _sparse_problem(tensor: onnx.SparseTensorProto) -> str | None:
    count, rank = list(tensor.values.dims), len(tensor.dims)
    if any(dim < 0 for dim in tensor.dims) or len(count) != 1:
        return f"is of shape {list(tensor.dims)}, with values of shape {count}"
    if list(tensor.indices.dims) not in (count, [*count, rank]) or tensor.indices.data_type != onnx.TensorProto.INT64:
        return f"has {count[0]} values and indices of shape {list(tensor.indices.dims)}"
    return _problem(tensor.values) or _problem(tensor.indices)


def _recursive(model: onnx.ModelProto) -> Iterator[str]:
    """The functions that call themselves, through one another too."""
    calls = {(f.domain, f.name): {(n.domain, n.op_type) for n in f.node} for f in model.functions}
    for name in calls:
        seen, waiting = set[tuple[str, str]](), [name]
        while waiting:
            for called in calls.get(waiting.pop(), set()) & calls.keys():
                if called == name:
                    yield name[1]
                if called not in seen:
                    seen.add(called)
                    waiting.append(called)
