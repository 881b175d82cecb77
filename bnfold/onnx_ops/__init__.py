"""THE table of ONNX: what every operator does to an affine. Only this package knows ONNX operators by name.

A row is the operator's name and a function from a call to its semantics, whose slots are the names of the inputs in the
operator's own schema. To add an operator, add a row (and a case to ``tests/test_onnx_ops.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from bnfold.onnx_ops.moving import (
    average_pool,
    cast,
    extremum,
    gather,
    mean,
    move,
    pad,
    resize,
    spatial_extremum,
    spatial_mean,
    total,
)
from bnfold.onnx_ops.scaling import (
    batch_norm,
    conv,
    einsum,
    gemm,
    group_norm,
    instance_norm,
    layer_norm,
    matmul,
    prelu,
    recurrent,
    scaler,
)
from bnfold.semantics import Homogeneous, Opaque, Same, Semantics, ShapeOnly, build

if TYPE_CHECKING:
    from bnfold.graph.onnx_call import OnnxCall

Row = Callable[["OnnxCall"], Semantics]


def _first(call: OnnxCall) -> str:
    return next(iter(call.arguments))


def _same(call: OnnxCall) -> Semantics:
    return Same(_first(call)) if call.item in (None, 0) else build.OPAQUE


def _dropout(call: OnnxCall) -> Semantics:
    training = call.arguments.get("training_mode") is not None and not call.is_constant("training_mode")
    mode = call.constant("training_mode") if call.arguments.get("training_mode") is not None else None
    return build.OPAQUE if training or (mode is not None and bool(mode.any())) else _same(call)


def _relu(call: OnnxCall) -> Semantics:
    return Homogeneous((_first(call),), clips=call.operator == "Relu")


def _opaque(call: OnnxCall) -> Semantics:
    return build.OPAQUE


def _sum(call: OnnxCall) -> Semantics:
    operands = call.arguments["data_0"]
    return build.added(call, "data_0.0", "data_0.1") if len(operands) == 2 else build.OPAQUE


def _greatest(call: OnnxCall) -> Semantics:
    return build.greatest(call, [f"data_0.{i}" for i in range(len(call["data_0"]))])


def _shape_only(call: OnnxCall) -> Semantics:
    return ShapeOnly((_first(call),))


_MOVES = "Reshape Flatten Transpose Squeeze Unsqueeze Concat Slice Split Expand Tile DepthToSpace SpaceToDepth"
_NONLINEAR = (
    "Sigmoid Tanh Exp Log Sqrt Reciprocal Pow Erf Sin Cos Softmax LogSoftmax Hardmax Softplus Softsign Gelu Mish Elu "
    "Selu Celu HardSigmoid HardSwish Swish ThresholdedRelu Clip Floor Ceil Round Sign LRN LpNormalization LpPool "
    "MeanVarianceNormalization RMSNormalization"
)
TABLE: dict[str, Row] = {
    # Affines
    "BatchNormalization": batch_norm,
    "Mul": lambda call: build.multiplied(call, "A", "B"),
    "Div": lambda call: build.divided(call, "A", "B"),
    "Add": lambda call: build.added(call, "A", "B"),
    "Sub": lambda call: build.added(call, "A", "B", -1.0),
    "Sum": _sum,
    "Neg": lambda call: build.negated(call, "X"),
    "ai.onnx.ml.Scaler": scaler,
    # Contractions
    "Conv": conv,
    "ConvTranspose": conv,
    "Gemm": gemm,
    "MatMul": matmul,
    "Einsum": einsum,
    "LSTM": recurrent,
    "GRU": recurrent,
    "RNN": recurrent,
    "Gather": gather,
    # Normalised
    "InstanceNormalization": instance_norm,
    "LayerNormalization": layer_norm,
    "GroupNormalization": group_norm,
    # Movements
    **dict.fromkeys([*_MOVES.split(), "GatherElements", "GatherND"], move),
    "Pad": pad,
    "Identity": _same,
    "Dropout": _dropout,
    "Cast": cast,
    "CastLike": cast,
    # Averages
    "AveragePool": average_pool,
    "GlobalAveragePool": spatial_mean,
    "ReduceMean": mean,
    "ReduceSum": total,
    "Resize": resize,
    "Upsample": resize,
    # Homogeneous
    **dict.fromkeys(["Relu", "LeakyRelu", "Abs"], _relu),
    "PRelu": prelu,
    "MaxPool": spatial_extremum,
    "GlobalMaxPool": spatial_extremum,
    "ReduceMax": extremum,
    "ReduceMin": extremum,
    **dict.fromkeys(["Max", "Min"], _greatest),
    "Where": lambda call: build.chosen(call, "X", "Y"),
    # Read for their shape alone
    **dict.fromkeys(["Shape", "Size"], _shape_only),
    # Known to let nothing pass
    **dict.fromkeys(_NONLINEAR.split(), _opaque),
}


def semantics(call: OnnxCall) -> Semantics:
    """What the operator of a call does to an affine."""
    row = TABLE.get(call.operator)
    return Opaque("unknown-operator") if row is None else row(call)
