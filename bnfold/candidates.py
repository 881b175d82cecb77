"""What the gate judges: programs run by torch, and files run by ONNX Runtime."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.export import ExportedProgram

from bnfold.capture import Captured, tensor_inputs
from bnfold.errors import InputError
from bnfold.interpret import Runner
from bnfold.runtime import Session, open_session


class Candidate(Protocol):
    """Something that claims to equal the unfolded model."""

    name: str

    def run(self, flat: Sequence[Any]) -> list[Any]:
        """Flat outputs for flat inputs."""

    def values(self, flat: Sequence[Any], names: Sequence[str]) -> dict[str, Tensor]:
        """Intermediate values by name, those that it has."""


class TorchCandidate:
    """A program run by torch."""

    def __init__(self, name: str, program: ExportedProgram) -> None:
        self.name, self._runner = name, Runner(program)

    def run(self, flat: Sequence[Any]) -> list[Any]:
        """Flat outputs for flat inputs."""
        return self._runner(flat)

    def values(self, flat: Sequence[Any], names: Sequence[str]) -> dict[str, Tensor]:
        """Intermediate values by name."""
        self._runner(flat, keep=set(names))
        return self._runner.kept


class OnnxCandidate:
    """A file run by ONNX Runtime. Opens its session on use; ``close`` frees it."""

    def __init__(
        self, path: Path, *, device: Literal["cpu", "cuda"], optimized: bool, inputs: Sequence[tuple[int, str]],
        widen: bool = False, tf32: bool = False, names: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        self.name = "ONNX Runtime" if optimized else "ONNX Runtime, optimisations off"
        self._path, self._device, self._optimized, self._tf32 = path, device, optimized, tf32
        self._inputs, self.widen, self._names = list(inputs), widen, names or {}
        self._session: Session | None = None

    @property
    def session(self) -> Session:
        """The session, opened on first use."""
        if self._session is None:
            model = widened(self._path) if self.widen else self._path
            self._session = open_session(model, device=self._device, optimized=self._optimized, tf32=self._tf32)
        return self._session

    def close(self) -> None:
        """Frees the session."""
        self._session = None

    def run(self, flat: Sequence[Any]) -> list[Any]:
        """Flat outputs for flat inputs."""
        return [from_numpy(value) for value in self.session.run(self._feeds(self.session, flat))]

    def values(self, flat: Sequence[Any], names: Sequence[str]) -> dict[str, Tensor]:
        """Intermediate values by the program's names, through a session of its own that returns them."""
        mine = {self._names[name]: name for name in names if name in self._names}
        with _with_outputs(self._path, list(mine), widen=self.widen) as (path, present):
            session = open_session(path, device=self._device, optimized=False)
            found = session.run(self._feeds(session, flat), outputs=present) if present else []
        return {mine[name]: from_numpy(value) for name, value in zip(present, found)}

    def _feeds(self, session: Session, flat: Sequence[Any]) -> dict[str, np.ndarray]:
        wanted = {value.name: value for value in session.inputs}
        feeds = {}
        for index, name in self._inputs:
            if name in wanted:
                value = flat[index]
                feeds[name] = to_numpy(value.float() if self.widen and value.dtype == torch.bfloat16 else value)
        return feeds


def to_numpy(value: Tensor) -> np.ndarray:
    """The tensor as an array; bfloat16 as ``ml_dtypes.bfloat16``."""
    value = value.detach().contiguous()
    if value.dtype == torch.bfloat16:
        import ml_dtypes

        return value.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return value.numpy()


def from_numpy(value: np.ndarray) -> Tensor:
    """The array as a tensor; ``ml_dtypes.bfloat16`` as bfloat16."""
    if value.dtype.name == "bfloat16":
        return torch.from_numpy(value.view(np.uint16).copy()).view(torch.bfloat16)
    return torch.from_numpy(value if value.flags.writeable and value.ndim else value.copy())


def match_inputs(captured: Captured, session: Session) -> list[tuple[int, str]]:
    """Which flat input feeds which of the file's inputs: by name, else by position where the shapes fit.

    Raises:
        InputError: they do not fit.
    """
    tensors = [(captured.names.index(name), name) for name in tensor_inputs(captured.program)]
    theirs = [value.name for value in session.inputs]
    if set(theirs) <= {name for _, name in tensors}:
        return [(index, name) for index, name in tensors if name in theirs]
    if len(theirs) != len(tensors):
        raise InputError(
            f"the file's inputs {theirs} do not match the model's {[name for _, name in tensors]}",
            hint="Name them alike, or give the model that the file was made from",
        )
    for (index, name), value in zip(tensors, session.inputs):
        shape = tuple(captured.flat[index].shape)
        fits = len(shape) == len(value.shape) and all(
            not isinstance(n, int) or n == m for n, m in zip(value.shape, shape)
        )
        if not fits:
            raise InputError(f"the file's input '{value.name}' {list(value.shape)} does not fit '{name}' {list(shape)}")
    return [(index, value.name) for (index, _), value in zip(tensors, session.inputs)]


@contextlib.contextmanager
def _with_outputs(path: Path, names: Sequence[str], *, widen: bool) -> Iterator[tuple[Path, list[str]]]:
    """A copy of the model beside ``path`` (external data is found by folder) that returns the named values too."""
    import onnx

    model = onnx.load_model(path, load_external_data=False)
    if widen:
        model = onnx.load_model_from_string(widened(path))
    made = {name for node in model.graph.node for name in node.output}
    already = {value.name for value in model.graph.output}
    present = [name for name in names if name in made]
    for name in present:
        if name not in already:
            model.graph.output.append(onnx.ValueInfoProto(name=name))
    copy = path.with_name(f"{path.stem}.sites.onnx")
    try:
        copy.write_bytes(model.SerializeToString())
        yield copy, present
    finally:
        copy.unlink(missing_ok=True)


def needs_widening(path: Path, device: str) -> bool:
    """Whether the file holds bfloat16, which ONNX Runtime cannot run on the CPU."""
    import onnx

    if device == "cuda":
        return False
    try:
        model = onnx.load_model(path, load_external_data=False)
    except Exception as error:  # protobuf has an exception of its own, outside of what onnx exports
        raise InputError("this is no ONNX file, or a damaged one", where=str(path), hint="Export it again") from error
    return any(t.data_type == onnx.TensorProto.BFLOAT16 for t in model.graph.initializer) or any(
        v.type.tensor_type.elem_type == onnx.TensorProto.BFLOAT16 for v in model.graph.input
    )


def widened(path: Path) -> bytes:
    """The file with every bfloat16 tensor, cast and value type in float32; float32 holds each bfloat16 exactly."""
    import onnx
    import onnx_ir as ir

    model = ir.load(path)

    def widen(tensor: Any) -> Any:
        return ir.tensor(tensor.numpy().astype(np.float32), name=tensor.name)

    for value in model.graph.initializers.values():
        if value.const_value is not None and value.const_value.dtype == ir.DataType.BFLOAT16:
            value.const_value = widen(value.const_value)
            value.dtype = ir.DataType.FLOAT
    for node in model.graph:
        for name, attribute in list(node.attributes.items()):
            if name in ("to", "dtype") and attribute.value == onnx.TensorProto.BFLOAT16:
                node.attributes[name] = ir.AttrInt64(name, onnx.TensorProto.FLOAT)
            elif attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype == ir.DataType.BFLOAT16:
                node.attributes[name] = ir.AttrTensor(name, widen(attribute.value))
        for value in node.outputs:
            if value.dtype == ir.DataType.BFLOAT16:
                value.dtype = ir.DataType.FLOAT
    for value in model.graph.inputs:
        if value.dtype == ir.DataType.BFLOAT16:
            value.dtype = ir.DataType.FLOAT
    return bytes(ir.to_proto(model).SerializeToString())
