"""What the gate judges: programs run by torch, and files run by ONNX Runtime."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx
from torch import Tensor
from torch.export import ExportedProgram

from bnfold.errors import InputError
from bnfold.evaluate.reading import inlined
from bnfold.gate.engines import Setting
from bnfold.gate.values import as_tensor, to_numpy
from bnfold.graph.capture import Captured
from bnfold.graph.interpret import Runner
from bnfold.report import Placement
from bnfold.runtime.inline import apart
from bnfold.runtime.placement import placement
from bnfold.runtime.runtime import Device, Session, has_bfloat16, open_session


class Candidate(Protocol):
    """Something that runs and claims to equal the unfolded model."""

    name: str
    #: How many times more coarsely than the model's own dtype it rounds: 1 but for engines that compute in another.
    coarser: float

    def run(self, flat: Sequence[Any]) -> list[Any]:
        """Flat outputs for flat inputs."""


class EagerCandidate:
    """A module run by torch as its users run it. It shows no values but its outputs."""

    coarser = 1.0

    def __init__(self, name: str, captured: Captured) -> None:
        self.name, self._captured = name, captured

    def run(self, flat: Sequence[Any]) -> list[Any]:
        """Flat outputs for flat inputs."""
        return self._captured.run_eager(tuple(flat))


class FoldedCandidate:
    """The folded program in its own dtypes."""

    name, coarser = "folded torch", 1.0

    def __init__(self, program: ExportedProgram) -> None:
        self._runner = Runner(program)

    def run(self, flat: Sequence[Any]) -> list[Any]:
        """Flat outputs for flat inputs."""
        return self._runner(flat)


class OnnxCandidate:
    """A file run by ONNX Runtime. Opens its session on use; ``close`` frees it."""

    def __init__(
        self, path: Path, *, setting: Setting, optimized: bool, inputs: Sequence[tuple[int, str]], widen: bool = False,
        outputs: Sequence[str] | None = None, wider: bool = False, disabled: Sequence[str] = (),
        session: Session | None = None,
    ) -> None:  # fmt: skip
        self.name = "ONNX Runtime" if optimized else "ONNX Runtime, optimisations off"
        self.name += f", {setting.arithmetic.name}" if setting.coarser > 1 else ""
        self.setting, self.coarser, self._disabled = setting, setting.coarser, disabled
        self._path, self._device, self._optimized, self._as_deployed = path, setting.device, optimized, setting.deployed
        self._inputs, self.widen = list(inputs), widen
        #: ``outputs`` are those of the file that are the model's; ``wider`` lets it return float32 for half floats.
        self._outputs, self.wider = outputs, wider or widen
        self._session, self._takes = session, session.inputs if session is not None else ()
        self._watching: tuple[tuple[str, ...], Session, list[str], int] | None = None

    @property
    def session(self) -> Session:
        """The session, opened on first use."""
        if self._session is None:
            model = widened(self._path) if self.widen else self._path
            self._session = open_session(
                model, device=self._device, optimized=self._optimized, deployed=self._as_deployed,
                disabled_optimizers=self._disabled, beside=self._path,
            )  # fmt: skip
            self._takes = self._session.inputs
        return self._session

    def binding_problem(self, flat: Sequence[Any]) -> str | None:
        """How a run with bound inputs and outputs differs from a plain one; None where they agree."""
        return self.session.binding_problem(self.feeds(flat))

    def placement(self, flat: Sequence[Any]) -> Placement:
        """Where the nodes of the file run, seen in a session of its own."""
        model = widened(self._path) if self.widen else self._path
        return placement(model, self.feeds(flat), device=self._device, optimized=self._optimized, beside=self._path)

    def close(self) -> None:
        """Frees the sessions."""
        self._session = self._watching = None

    def run(self, flat: Sequence[Any]) -> list[Any]:
        """Flat outputs for flat inputs."""
        return [as_tensor(value) for value in self.session.run(self.feeds(flat), self._outputs)]

    def also(self, flat: Sequence[Any], names: Sequence[str]) -> tuple[list[Any], dict[str, Tensor]]:
        """Flat outputs, and values by their names in the file, through a session that returns both.

        With optimisations that is another program than ``session`` runs: a value that is asked for cannot be fused.
        """
        wanted = tuple(names)
        if self._watching is None or self._watching[0] != wanted:
            self._watching = None
            content, present, own = _with_outputs(self._path, wanted, widen=self.widen)
            session = open_session(
                content, device=self._device, optimized=self._optimized, deployed=self._as_deployed, beside=self._path
            )
            self._watching = wanted, session, present, own
        _, session, present, count = self._watching
        values = [as_tensor(array) for array in session.run(self.feeds(flat))]
        named = {value.name: tensor for value, tensor in zip(session.outputs, values)}
        own_outputs = [named[name] for name in self._outputs] if self._outputs else values[:count]
        return own_outputs, {name: named[name] for name in present}

    def feeds(self, flat: Sequence[Any]) -> dict[str, np.ndarray]:
        """What is fed for flat inputs."""
        wanted = {value.name: value for value in self._takes or self.session.inputs}
        feeds = {}
        for index, name in self._inputs:
            if name in wanted:
                value = to_numpy(flat[index])
                # What may differ has been settled: half floats widened, integers of another size.
                feeds[name] = value.astype(wanted[name].dtype, copy=False) if self.wider else value
        return feeds


def probe_session(path: Path, *, device: Device, widen: bool) -> Session:
    """A session without optimisations, to see what a file takes and returns."""
    return open_session(widened(path) if widen else path, device=device, optimized=False, beside=path)


def _with_outputs(path: Path, names: Sequence[str], *, widen: bool) -> tuple[bytes, list[str], int]:
    """The content of a file, changed so that it returns the named values too; nothing is written.

    With it come those of the names that it has, and how many outputs it had before.
    """
    content = widened(path) if widen else apart(path, large=0) or path.read_bytes()  # weights stay in the file
    model = onnx.load_model_from_string(content)
    if model.functions:
        model = inlined(model)
        content = model.SerializeToString()
    # A constant that is sparse ONNX Runtime hands out as no array.
    shown = (node for node in model.graph.node if not any(a.HasField("sparse_tensor") for a in node.attribute))
    made = {name for node in shown for name in node.output}
    already = {value.name for value in model.graph.output}
    present = [name for name in names if name in made]
    more = onnx.ModelProto()
    more.graph.output.extend(onnx.ValueInfoProto(name=name) for name in present if name not in already)
    # Two messages after one another are one with the fields of both: that is how protobuf's encoding is defined.
    return content + more.SerializeToString(), present, len(already)


def needs_widening(model: onnx.ModelProto, device: Device) -> bool:
    """Whether a file holds bfloat16, and ONNX Runtime cannot run that on the device, such as the CPU."""
    half = onnx.TensorProto.BFLOAT16
    holds = any(t.data_type == half for t in model.graph.initializer) or any(
        v.type.tensor_type.elem_type == half for v in model.graph.input
    )
    return holds and not has_bfloat16(device)


def refuse_training(model: onnx.ModelProto, where: str) -> None:
    """Raises InputError where a file was written in training mode, which ONNX Runtime refuses without saying why."""
    for node in model.graph.node:
        mode = any(attribute.name == "training_mode" and attribute.i for attribute in node.attribute)
        more = node.op_type == "BatchNormalization" and len([name for name in node.output if name]) > 1
        if node.op_type in ("BatchNormalization", "Dropout") and (mode or more):
            raise InputError(
                f"the file's {node.op_type} '{node.name or node.output[0]}' is in training mode "
                f"({'training_mode=1' if mode else 'it returns the statistics of the batch'})",
                where=where,
                hint="Call model.eval() and write the file anew",
            )


def half_inside(model: onnx.ModelProto) -> bool:
    """Whether a file computes in float16, whatever its inputs and outputs are."""
    return any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in model.graph.initializer)


def quantised_nodes(model: onnx.ModelProto) -> int:
    """How many of a file's nodes compute with integers in place of floats, or convert to them."""
    kinds = r"[Qq]uantizeLinear|QLinear|Integer$"
    return sum(re.search(kinds, node.op_type) is not None for node in model.graph.node)


def widened(path: Path) -> bytes:
    """The file with every bfloat16 tensor, cast and value type in float32; float32 holds each bfloat16 exactly."""
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
