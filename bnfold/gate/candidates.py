"""A file run by ONNX Runtime: what of it has to be known first, on which device and in which arithmetic it runs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor
from torch.export import ExportedProgram

from bnfold.errors import InputError
from bnfold.evaluate.reading import inlined
from bnfold.gate.findings import Findings, first_line
from bnfold.gate.values import as_tensor, to_numpy
from bnfold.graph.interpret import coarsest_epsilon
from bnfold.report import Engine, Placement, Verdict
from bnfold.runtime.model_file import apart
from bnfold.runtime.placement import placement, placement_finding
from bnfold.runtime.runtime import (
    FLOAT32,
    Arithmetic,
    Device,
    Session,
    arithmetic,
    device_of,
    has_bfloat16,
    open_session,
)

#: What reports call a file as it is deployed, and without optimisations.
DEPLOYED, PLAIN = "ONNX Runtime", "ONNX Runtime, optimisations off"
#: Operators that compute with integers in place of floats, or convert to them.
_INTEGERS = r"[Qq]uantizeLinear|QLinear|Integer$"


@dataclass(frozen=True)
class Setting:
    """A device, with the options that its row adds or as ``deployed`` without, and what it computes in there.

    ``coarser`` is how many times more coarsely than the model's own dtype that rounds; the noise that its errors are
    measured in is so many times larger, because to first order every error of rounding is proportional to the unit
    roundoff (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., chapter 3).
    """

    device: Device
    arithmetic: Arithmetic = FLOAT32
    coarser: float = 1.0
    deployed: bool = False

    def result(self, ratio: float, verdict: Verdict) -> Engine:
        """What the report says of it."""
        options = self.device.provider_options(deployed=self.deployed)
        found = self.arithmetic
        return Engine(self.device.provider.ort_name, options, found.name, found.unit_roundoff, ratio, verdict)


def settings(device: Device, program: ExportedProgram) -> list[Setting]:
    """How a file is run that is for ``device``: first for its own verdict, then as each engine that rounds coarser.

    Where the device itself does, its rounding would hide what is wrong with the file, and that is judged on the CPU.
    """

    def setting(device: Device, *, deployed: bool = False) -> Setting:
        double = coarsest_epsilon(program) / 2 < FLOAT32.unit_roundoff
        found = arithmetic(device, deployed=deployed, double=double)
        return Setting(device, found, coarser(found, program), deployed)

    strict = setting(device)
    found = [strict] if strict.coarser == 1 else [setting(device_of("cpu")), strict]
    if device.provider.options:
        default = setting(device, deployed=True)
        found += [default] if default.coarser > 1 and default.arithmetic != strict.arithmetic else []
    return found


def coarser(found: Arithmetic, program: ExportedProgram) -> float:
    """How many times more coarsely than a program's own dtype an arithmetic rounds; at least 1."""
    return max(1.0, found.unit_roundoff / (coarsest_epsilon(program) / 2))


class OnnxCandidate:
    """A file run by ONNX Runtime. Opens its session on use; ``close`` frees it.

    ``outputs`` are those of the file that are the model's; ``widen`` runs its bfloat16 values in float32, ``wider``
    lets it return float32 for half floats; ``disabled`` are optimisations to leave out.
    """

    def __init__(
        self, path: Path, *, setting: Setting, optimized: bool, inputs: Sequence[tuple[int, str]], widen: bool = False,
        outputs: Sequence[str] | None = None, wider: bool = False, disabled: Sequence[str] = (),
        session: Session | None = None,
    ) -> None:  # fmt: skip
        self.name = DEPLOYED if optimized else PLAIN
        self.name += f", {setting.arithmetic.name}" if setting.coarser > 1 else ""
        self.setting, self.coarser, self.wider = setting, setting.coarser, wider or widen
        self._path, self._inputs, self._outputs, self._widen = path, inputs, outputs, widen
        self._optimized, self._disabled = optimized, disabled
        self._session, self._takes = session, session.inputs if session is not None else ()
        self._watching: tuple[tuple[str, ...], Session, list[str], int] | None = None

    def _open(self, model: Path | bytes, disabled: Sequence[str] = ()) -> Session:
        return open_session(
            model, device=self.setting.device, optimized=self._optimized, deployed=self.setting.deployed,
            disabled_optimizers=disabled, beside=self._path,
        )  # fmt: skip

    @property
    def _model(self) -> Path | bytes:
        return widened(self._path) if self._widen else self._path

    @property
    def session(self) -> Session:
        """The session, opened on first use."""
        if self._session is None:
            self._session = self._open(self._model, self._disabled)
            self._takes = self._session.inputs
        return self._session

    def binding_problem(self, flat: Sequence[Any]) -> str | None:
        """How a run with bound inputs and outputs differs from a plain one; None where they agree."""
        return self.session.binding_problem(self.feeds(flat))

    def placement(self, flat: Sequence[Any]) -> Placement:
        """Where the nodes of the file run, seen in a session of its own."""
        device, feeds = self.setting.device, self.feeds(flat)
        return placement(self._model, feeds, device=device, optimized=self._optimized, beside=self._path)

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
            content, present, own = _with_outputs(self._path, wanted, widen=self._widen)
            self._watching = wanted, self._open(content), present, own
        _, session, present, count = self._watching
        values = [as_tensor(array) for array in session.run(self.feeds(flat))]
        named = {value.name: tensor for value, tensor in zip(session.outputs, values)}
        own_outputs = [named[name] for name in self._outputs] if self._outputs else values[:count]
        return own_outputs, {name: named[name] for name in present}

    def feeds(self, flat: Sequence[Any]) -> dict[str, np.ndarray]:
        """What is fed for flat inputs."""
        wanted = {value.name: value for value in self._takes or self.session.inputs}
        feeds = {name: to_numpy(flat[index]) for index, name in self._inputs if name in wanted}
        # What may differ has been settled: half floats widened, integers of another size.
        return {n: x.astype(wanted[n].dtype, copy=False) for n, x in feeds.items()} if self.wider else feeds


def judge_device(
    candidate: OnnxCandidate, flat: Sequence[Any], findings: Findings, *, whole: bool = False
) -> Placement | None:
    """Where the file's nodes ran; a file that ran nowhere as asked, or runs otherwise when bound, is a problem.

    So is, where the ``whole`` is asked for, one of which a node ran elsewhere.
    """
    try:
        if problem := candidate.binding_problem(flat):
            findings.problems.append(f"{candidate.name}: {problem}")
        found = candidate.placement(flat)
    except Exception as error:
        findings.doubts.append(f"{candidate.name}: where its nodes run cannot be seen: {first_line(error)}")
        return None
    problem, note = placement_finding(found, candidate.session.provider)
    if whole and problem is None:
        problem, note = note, None
    findings.problems += [f"{candidate.name}: {problem}"] if problem else []
    findings.notes += [note] if note else []
    return found


# ---- what a file holds -----------------------------------------------------------------------------------------------


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
    held = [tensor.data_type for tensor in model.graph.initializer]
    held += [value.type.tensor_type.elem_type for value in model.graph.input]
    return onnx.TensorProto.BFLOAT16 in held and not has_bfloat16(device)


def foreign(model: onnx.ModelProto, program: ExportedProgram, where: str) -> list[str]:
    """What a user should know of a file that was not made from the program here and now.

    Raises:
        InputError: it was written in training mode, which ONNX Runtime refuses without saying why.
    """
    for node in model.graph.node:
        mode = any(attribute.name == "training_mode" and attribute.i for attribute in node.attribute)
        more = node.op_type == "BatchNormalization" and len([name for name in node.output if name]) > 1
        if node.op_type in ("BatchNormalization", "Dropout") and (mode or more):
            said = "training_mode=1" if mode else "it returns the statistics of the batch"
            raise InputError(
                f"the file's {node.op_type} '{node.name or node.output[0]}' is in training mode ({said})", where=where,
                hint="Call model.eval() and write the file anew",
            )  # fmt: skip
    notes, half = [], onnx.TensorProto.FLOAT16
    own = any(weight.dtype == torch.float16 for weight in program.state_dict.values())
    if not own and any(tensor.data_type == half for tensor in model.graph.initializer):
        notes.append(
            "the file computes in float16 and the model does not: judge it against the model in that dtype "
            "(--dtype float16, dtype=torch.float16)"
        )
    if count := sum(re.search(_INTEGERS, node.op_type) is not None for node in model.graph.node):
        notes.append(
            f"the file is quantised ({count} nodes): no such file equals a float model; what that costs is seen on "
            "data (--data)"
        )
    return notes


def widened(path: Path) -> bytes:
    """The file with every bfloat16 tensor, cast and value type in float32; float32 holds each bfloat16 exactly."""
    import onnx_ir as ir

    model = ir.load(path)

    def widen(tensor: Any) -> Any:
        return ir.tensor(tensor.numpy().astype(np.float32), name=tensor.name)

    values = [*model.graph.inputs, *model.graph.initializers.values()]
    for value in model.graph.initializers.values():
        if value.const_value is not None and value.const_value.dtype == ir.DataType.BFLOAT16:
            value.const_value, value.dtype = widen(value.const_value), ir.DataType.FLOAT
    for node in model.graph:
        values += node.outputs
        for name, attribute in list(node.attributes.items()):
            if name in ("to", "dtype") and attribute.value == onnx.TensorProto.BFLOAT16:
                node.attributes[name] = ir.AttrInt64(name, onnx.TensorProto.FLOAT)
            elif attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype == ir.DataType.BFLOAT16:
                node.attributes[name] = ir.AttrTensor(name, widen(attribute.value))
    for value in values:
        if value.dtype == ir.DataType.BFLOAT16:
            value.dtype = ir.DataType.FLOAT
    return bytes(ir.to_proto(model).SerializeToString())
