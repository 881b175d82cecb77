"""The constants of an ONNX file."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

import numpy as np
import onnx

from bnfold.errors import InputError, ResourceError
from bnfold.evaluate.limits import MAX_ELEMENTS
from bnfold.evaluate.subject import Array
from bnfold.runtime.model_file import misplaced

#: Types whose bytes are the elements, on a machine that begins with the low byte.
_PLAIN = {"float32", "float64", "float16", "int8", "uint8", "int32", "int64"} if sys.byteorder == "little" else set()


class Weight:
    """An initializer, read and raised where it is used: there is never a second model in memory."""

    def __init__(self, tensor: onnx.TensorProto, beside: Path | None) -> None:
        self._beside, self._tensor, self._array = beside, None, None
        if onnx.external_data_helper.uses_external_data(tensor):
            self._tensor = tensor
        else:
            self._array = onnx.numpy_helper.to_array(tensor)

    @property
    def dtype(self) -> str:
        """The name of its dtype."""
        if self._array is not None:
            return self._array.dtype.name
        assert self._tensor is not None
        return str(onnx.helper.tensor_dtype_to_np_dtype(self._tensor.data_type).name)

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""
        if self._array is not None:
            return self._array.shape
        assert self._tensor is not None
        return tuple(self._tensor.dims)

    def array(self) -> Array:
        """Its value, as it is stored; of external data a view of the file."""
        if self._array is not None:
            return self._array
        assert self._tensor is not None
        if self.dtype in _PLAIN and self._beside is not None and misplaced(self._tensor, self._beside) is None:
            held = {entry.key: entry.value for entry in self._tensor.external_data}
            shape, at = tuple(self._tensor.dims), int(held.get("offset") or 0)
            size = int(math.prod(shape) * np.dtype(self.dtype).itemsize)
            if 0 < size == int(held.get("length") or 0):
                return np.asarray(np.memmap(self._beside / held["location"], self.dtype, "r", at, shape))
        tensor = onnx.TensorProto()
        tensor.CopyFrom(self._tensor)
        try:  # refuses what lies outside of the folder
            onnx.external_data_helper.load_external_data_for_tensor(tensor, os.fspath(self._beside or os.devnull))
            return onnx.numpy_helper.to_array(tensor)
        except Exception as error:
            raise InputError(
                f"the external data of '{tensor.name}' cannot be read: {' '.join(str(error).split())[:200]}",
                hint="Keep the model's own .data file beside it, in the same folder",
            ) from error


class SparseWeight(Weight):
    """A sparse initializer, spread out where it is used."""

    def __init__(self, tensor: onnx.SparseTensorProto, beside: Path | None) -> None:
        super().__init__(tensor.values, beside)
        self._label, self._shape = tensor.values.name, tuple(tensor.dims)
        self._indices = Weight(tensor.indices, beside)

    def array(self) -> Array:
        """Its value, zeros in it."""
        if math.prod(self._shape) > MAX_ELEMENTS:
            raise ResourceError(f"the memory does not suffice for the sparse '{self._label}'")
        values, at = super().array(), self._indices.array()
        found = np.zeros(self._shape, values.dtype)
        try:
            found[np.unravel_index(at, self._shape) if at.ndim == 1 else tuple(at.T)] = values
        except (IndexError, ValueError) as error:
            raise InputError(f"the sparse '{self._label}' holds an element outside of {list(self._shape)}") from error
        return found


def weights_of(model: onnx.ModelProto, beside: Path | None) -> dict[str, Weight]:
    """The initializers of a model by name.

    Args:
        beside: the folder of its external data.
    """
    plain = {tensor.name: Weight(tensor, beside) for tensor in model.graph.initializer}
    return plain | {t.values.name: SparseWeight(t, beside) for t in model.graph.sparse_initializer}


def spread_out(*graphs: onnx.GraphProto | onnx.FunctionProto) -> None:
    """Makes dense what is sparse in the nodes of graphs: initializers of bodies, and constants."""
    stack = list(graphs)
    while stack:
        graph = stack.pop()
        for attribute in (a for node in graph.node for a in node.attribute):
            bodies = [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]
            for body in bodies:
                body.initializer.extend(_dense(t) for t in body.sparse_initializer)
                del body.sparse_initializer[:]
            stack += bodies
            if attribute.HasField("sparse_tensor"):
                attribute.t.CopyFrom(_dense(attribute.sparse_tensor))
                attribute.ClearField("sparse_tensor")
                attribute.name, attribute.type = "value", onnx.AttributeProto.TENSOR


def _dense(tensor: onnx.SparseTensorProto) -> onnx.TensorProto:
    return onnx.numpy_helper.from_array(SparseWeight(tensor, None).array(), tensor.values.name)
