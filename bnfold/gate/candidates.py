"""What the gate judges: programs run by torch, and files run by ONNX Runtime."""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.export import ExportedProgram

from bnfold.errors import InputError
from bnfold.gate.engines import Setting
from bnfold.graph.capture import Captured
from bnfold.graph.copies import copied
from bnfold.graph.interpret import Runner, raise_tensor
from bnfold.report import Placement
from bnfold.runtime.model_file import read_model
from bnfold.runtime.placement import placement
from bnfold.runtime.runtime import Device, Session, has_bfloat16, open_session


class Candidate(Protocol):
    """Something that claims to equal the unfolded model."""

    name: str
    #: Whether asking it for more than its outputs makes another program of it.
    deployed: bool
    #: How many times more coarsely than the model's own dtype it rounds: 1 but for engines that compute in another.
    coarser: float

    def run(self, flat: Sequence[Any]) -> list[Any]:
        """Flat outputs for flat inputs."""

    def knows(self, names: Sequence[str]) -> bool:
        """Whether it is told what the values are called, or has to guess."""

    def values(self, flat: Sequence[Any], names: Sequence[str]) -> dict[str, Tensor]:
        """Intermediate values by name, those that it has."""

    def decide(self, flat: Sequence[Any], names: Sequence[str]) -> tuple[list[Any], dict[str, Tensor]]:
        """Flat outputs, and the values in ``names`` that it has, from one run."""


class TorchCandidate:
    """A program run by torch, in its own dtypes or in float64."""

    coarser = 1.0

    def __init__(self, name: str, program: ExportedProgram, *, precise: bool = False) -> None:
        self.name, self.deployed, self._program = name, False, program
        self._runner = Runner(program, precise=precise)

    def precise(self) -> TorchCandidate:
        """The same program, constants rounded as they are, run in float64."""
        return TorchCandidate(f"{self.name} in float64", self._program, precise=True)

    def knows(self, names: Sequence[str]) -> bool:
        """It does: the names are its own."""
        return True

    def run(self, flat: Sequence[Any]) -> list[Any]:
        """Flat outputs for flat inputs."""
        return self.decide(flat, ())[0]

    def values(self, flat: Sequence[Any], names: Sequence[str]) -> dict[str, Tensor]:
        """Intermediate values by name."""
        return self.decide(flat, names)[1]

    def decide(self, flat: Sequence[Any], names: Sequence[str]) -> tuple[list[Any], dict[str, Tensor]]:
        """Flat outputs and intermediate values."""
        outputs = self._runner(flat, keep=set(names))
        return _lowered(outputs, self._program) if self._runner.precise else outputs, self._runner.kept


def _lowered(outputs: Sequence[Any], program: ExportedProgram) -> list[Any]:
    """What was computed in float64, in the dtypes that a program returns."""
    returned: Any = program.graph.output_node().args[0]
    dtypes = [getattr(getattr(node, "meta", {}).get("val"), "dtype", None) for node in returned]
    return [x.to(dtype) if isinstance(x, Tensor) and dtype else x for x, dtype in zip(outputs, dtypes)]


class OutputsAlone:
    """What is known of a candidate by its outputs alone: none of the values that they are made of."""

    def run(self, flat: Sequence[Any]) -> list[Any]:
        """Flat outputs for flat inputs."""
        raise NotImplementedError

    def values(self, flat: Sequence[Any], names: Sequence[str]) -> dict[str, Tensor]:
        """There are none that can be seen."""
        return {}

    def decide(self, flat: Sequence[Any], names: Sequence[str]) -> tuple[list[Any], dict[str, Tensor]]:
        """Flat outputs, and no decision of those asked for."""
        return self.run(flat), {}

    def knows(self, names: Sequence[str]) -> bool:
        """Whether nothing is asked for."""
        return not names


class EagerCandidate(OutputsAlone):
    """A module run by torch as its users run it. It shows no values but its outputs."""

    coarser = 1.0

    def __init__(self, name: str, captured: Captured, *, precise: bool = False) -> None:
        self.name, self.deployed, self._captured, self._precise = name, True, captured, precise

    def precise(self) -> EagerCandidate:
        """The same module in float64, but for what its code says to be of another dtype."""
        assert self._captured.eager is not None
        module = copied(self._captured.eager)
        return EagerCandidate(f"{self.name} in float64", replace(self._captured, eager=module.double()), precise=True)

    def run(self, flat: Sequence[Any]) -> list[Any]:
        """Flat outputs for flat inputs."""
        if not self._precise:
            return self._captured.run_eager(tuple(flat))
        return _lowered(self._captured.run_eager(tuple(raise_tensor(x) for x in flat)), self._captured.program)


class OnnxCandidate:
    """A file run by ONNX Runtime. Opens its session on use; ``close`` frees it."""

    def __init__(
        self, path: Path, *, setting: Setting, optimized: bool, inputs: Sequence[tuple[int, str]], widen: bool = False,
        names: Mapping[str, str] | None = None, outputs: Sequence[str] | None = None, wider: bool = False,
        disabled: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.name = "ONNX Runtime" if optimized else "ONNX Runtime, optimisations off"
        self.name += f", {setting.arithmetic.name}" if setting.coarser > 1 else ""
        self.setting, self.deployed, self.coarser, self._disabled = setting, optimized, setting.coarser, disabled
        self._path, self._device, self._optimized, self._as_deployed = path, setting.device, optimized, setting.deployed
        self._inputs, self.widen, self._names = list(inputs), widen, names or {}
        #: ``outputs`` are those of the file that are the model's; ``wider`` lets it return float32 for half floats.
        self._outputs, self.wider = outputs, wider or widen
        self._session: Session | None = None
        self._deciding: tuple[Session, dict[str, str]] | None = None

    @property
    def session(self) -> Session:
        """The session, opened on first use."""
        if self._session is None:
            model = widened(self._path) if self.widen else self._path
            self._session = open_session(
                model, device=self._device, optimized=self._optimized, deployed=self._as_deployed,
                disabled_optimizers=self._disabled, beside=self._path,
            )  # fmt: skip
        return self._session

    def binding_problem(self, flat: Sequence[Any]) -> str | None:
        """How a run with bound inputs and outputs differs from a plain one; None where they agree."""
        return self.session.binding_problem(self._feeds(self.session, flat))

    def placement(self, flat: Sequence[Any]) -> Placement:
        """Where the nodes of the file run, seen in a session of its own."""
        model = widened(self._path) if self.widen else self._path
        return placement(
            model, self._feeds(self.session, flat), device=self._device, optimized=self._optimized, beside=self._path
        )

    def knows(self, names: Sequence[str]) -> bool:
        """Whether ``lower`` said what the values are called in the file."""
        return all(name in self._names for name in names)

    def close(self) -> None:
        """Frees the sessions."""
        self._session = self._deciding = None

    def run(self, flat: Sequence[Any]) -> list[Any]:
        """Flat outputs for flat inputs."""
        return [from_numpy(value) for value in self.session.run(self._feeds(self.session, flat), self._outputs)]

    def values(self, flat: Sequence[Any], names: Sequence[str]) -> dict[str, Tensor]:
        """Intermediate values by the program's names, through a session of its own that returns them."""
        mine = {self._names[name]: name for name in names if name in self._names}
        content, present, _ = _with_outputs(self._path, list(mine), widen=self.widen)
        session = open_session(content, device=self._device, optimized=False, beside=self._path)
        del content
        found = session.run(self._feeds(session, flat), outputs=present) if present else []
        return {mine[name]: from_numpy(value) for name, value in zip(present, found)}

    def decide(self, flat: Sequence[Any], names: Sequence[str]) -> tuple[list[Any], dict[str, Tensor]]:
        """Flat outputs and the values of decisions, through a session that returns both; another than ``session``.

        Where it is not known what the file calls a value, the names that ``lower`` gives are tried.
        """
        if self._deciding is None:
            guesses = {
                name: [self._names[name]] if name in self._names else [name, f"{name}_value", f"{name}:0"]
                for name in names
            }
            content, present, self._own_outputs = _with_outputs(
                self._path, [g for both in guesses.values() for g in both], widen=self.widen
            )
            session = open_session(
                content, device=self._device, optimized=self._optimized, deployed=self._as_deployed, beside=self._path
            )
            del content
            found = ((name, next((g for g in guesses[name] if g in present), None)) for name in names)
            self._deciding = session, {name: guess for name, guess in found if guess is not None}
        session, mine = self._deciding
        values = [from_numpy(array) for array in session.run(self._feeds(session, flat))]
        named = {value.name: tensor for value, tensor in zip(session.outputs, values)}
        own = [named[name] for name in self._outputs] if self._outputs else values[: self._own_outputs]
        return own, {name: named[called] for name, called in mine.items()}

    def _feeds(self, session: Session, flat: Sequence[Any]) -> dict[str, np.ndarray]:
        wanted = {value.name: value for value in session.inputs}
        feeds = {}
        for index, name in self._inputs:
            if name in wanted:
                value = to_numpy(flat[index])
                # What may differ has been settled: half floats widened, integers of another size.
                feeds[name] = value.astype(wanted[name].dtype, copy=False) if self.wider else value
        return feeds


def to_numpy(value: Tensor) -> np.ndarray:
    """The tensor as an array; bfloat16 as ``ml_dtypes.bfloat16``, complex numbers as pairs of reals like in ONNX."""
    value = value.detach()
    value = torch.view_as_real(value.resolve_conj()).contiguous() if value.is_complex() else value.contiguous()
    if value.dtype == torch.bfloat16:
        import ml_dtypes

        return value.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return value.numpy()


def from_numpy(value: np.ndarray) -> Tensor:
    """The array as a tensor; ``ml_dtypes.bfloat16`` as bfloat16."""
    if value.dtype.name == "bfloat16":
        return torch.from_numpy(value.view(np.uint16).copy()).view(torch.bfloat16)
    return torch.from_numpy(value if value.flags.writeable and value.ndim else value.copy())


def probe_session(path: Path, *, device: Device, widen: bool) -> Session:
    """A session without optimisations, to see what a file takes and returns."""
    return open_session(widened(path) if widen else path, device=device, optimized=False, beside=path)


def _with_outputs(path: Path, names: Sequence[str], *, widen: bool) -> tuple[bytes, list[str], int]:
    """The content of a file, changed so that it returns the named values too; nothing is written.

    With it come those of the names that it has, and how many outputs it had before.
    """
    import onnx

    content = io.BytesIO()  # hands out its bytes without a copy of them
    if widen:
        content.write(widened(path))
    else:
        with path.open("rb") as file:
            shutil.copyfileobj(file, content)
    graph = onnx.load_model_from_string(content.getvalue()).graph
    made = {name for node in graph.node for name in node.output}
    already = {value.name for value in graph.output}
    del graph  # the weights are in it
    present = [name for name in names if name in made]
    more = onnx.ModelProto()
    more.graph.output.extend(onnx.ValueInfoProto(name=name) for name in present if name not in already)
    # Two messages after one another are one with the fields of both: that is how protobuf's encoding is defined.
    content.write(more.SerializeToString())
    return content.getvalue(), present, len(already)


def needs_widening(path: Path, device: Device) -> bool:
    """Whether the file holds bfloat16, and ONNX Runtime cannot run that on the device, such as the CPU."""
    import onnx

    model = read_model(path)
    half = onnx.TensorProto.BFLOAT16
    holds = any(t.data_type == half for t in model.graph.initializer) or any(
        v.type.tensor_type.elem_type == half for v in model.graph.input
    )
    return holds and not has_bfloat16(device)


def refuse_training(path: Path) -> None:
    """Raises InputError where a file was written in training mode, which ONNX Runtime refuses without saying why."""
    for node in read_model(path).graph.node:
        mode = any(attribute.name == "training_mode" and attribute.i for attribute in node.attribute)
        more = node.op_type == "BatchNormalization" and len([name for name in node.output if name]) > 1
        if node.op_type in ("BatchNormalization", "Dropout") and (mode or more):
            raise InputError(
                f"the file's {node.op_type} '{node.name or node.output[0]}' is in training mode "
                f"({'training_mode=1' if mode else 'it returns the statistics of the batch'})",
                where=str(path),
                hint="Call model.eval() and write the file anew",
            )


def half_inside(path: Path) -> bool:
    """Whether a file computes in float16, whatever its inputs and outputs are."""
    import onnx

    graph = read_model(path).graph
    return any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in graph.initializer)


def quantised_nodes(path: Path) -> int:
    """How many of a file's nodes compute with integers in place of floats, or convert to them."""
    graph = read_model(path).graph
    return sum(re.search(r"[Qq]uantizeLinear|QLinear|Integer$", node.op_type) is not None for node in graph.node)


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
