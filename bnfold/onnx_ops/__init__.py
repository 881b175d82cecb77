"""THE table of ONNX: what every operator does to an affine. Only this package knows ONNX operators by name.

A row is the operator's name and a function from a call to its semantics, whose slots are the names of the inputs in the
operator's own schema. To add an operator, add a row (and a case to ``tests/test_onnx_ops.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from bnfold.onnx_ops import rows
from bnfold.semantics import Homogeneous, Opaque, Semantics, ShapeOnly, build
from bnfold.semantics.build import OPAQUE

if TYPE_CHECKING:
    from bnfold.graph.onnx_call import OnnxCall

Row = Callable[["OnnxCall"], Semantics]


def _first(call: OnnxCall) -> str:
    return next(iter(call.arguments))


def _each(call: OnnxCall, name: str) -> list[str]:
    """The slots of operands without number."""
    return [f"{name}.{i}" for i in range(len(call[name]))]


def _sum(call: OnnxCall) -> Semantics:
    return build.added(call, "data_0.0", "data_0.1") if len(call["data_0"]) == 2 else OPAQUE


_MOVES = "Reshape Flatten Transpose Squeeze Unsqueeze Concat Slice Split Expand Tile DepthToSpace SpaceToDepth"
_NONLINEAR = (
    "Sigmoid Tanh Exp Log Sqrt Reciprocal Pow Erf Sin Cos Softmax LogSoftmax Hardmax Softplus Softsign Gelu Mish Elu "
    "Selu Celu HardSigmoid HardSwish Swish ThresholdedRelu Clip Floor Ceil Round Sign LRN LpNormalization LpPool "
    "MeanVarianceNormalization RMSNormalization"
)
TABLE: dict[str, Row] = {
    # Affines
    "BatchNormalization": rows.batch_norm,
    "Mul": lambda call: build.multiplied(call, "A", "B"),
    "Div": lambda call: build.divided(call, "A", "B"),
    "Add": lambda call: build.added(call, "A", "B"),
    "Sub": lambda call: build.added(call, "A", "B", -1.0),
    "Sum": _sum,
    "Neg": lambda call: build.negated(call, "X"),
    "ai.onnx.ml.Scaler": rows.scaler,
    # Contractions
    **dict.fromkeys(["Conv", "ConvTranspose"], rows.conv),
    "Gemm": rows.gemm,
    "MatMul": rows.matmul,
    "Einsum": lambda call: build.einsum(call, call.attribute("equation", ""), _each(call, "Inputs")),
    **dict.fromkeys(["LSTM", "GRU", "RNN"], rows.recurrent),
    "Gather": rows.gather,
    # Normalised: a scale and a bias per channel; before opset 21 GroupNormalization has one per group
    "InstanceNormalization": lambda call: build.normalised(call, (1,), "scale", "B"),
    "LayerNormalization": rows.layer_norm,
    "GroupNormalization": lambda c: build.normalised(c, (1,), "scale", "bias") if c.opset >= 21 else OPAQUE,
    # Movements
    **dict.fromkeys([*_MOVES.split(), "GatherElements", "GatherND"], rows.move),
    "Pad": rows.pad,
    "Identity": rows.same,
    "Dropout": rows.dropout,
    **dict.fromkeys(["Cast", "CastLike"], lambda call: build.cast(call, "input")),
    # Averages
    "AveragePool": rows.average_pool,
    "GlobalAveragePool": rows.spatial_mean,
    "ReduceMean": lambda call: rows.reduced(call, "mean"),
    "ReduceSum": lambda call: rows.reduced(call, "sum"),
    **dict.fromkeys(["Resize", "Upsample"], rows.resize),
    # Homogeneous
    "Relu": lambda call: Homogeneous(("X",), clips=True),
    **dict.fromkeys(["LeakyRelu", "Abs"], lambda call: Homogeneous(("X",))),
    "PRelu": lambda call: Homogeneous(("X",)) if call.is_constant("slope") else OPAQUE,
    **dict.fromkeys(["MaxPool", "GlobalMaxPool"], rows.spatial_extremum),
    **dict.fromkeys(["ReduceMax", "ReduceMin"], lambda call: rows.reduced(call, "extremum")),
    **dict.fromkeys(["Max", "Min"], lambda call: build.greatest(call, _each(call, "data_0"))),
    "Where": lambda call: build.chosen(call, "X", "Y"),
    # Read for their shape alone
    **dict.fromkeys(["Shape", "Size"], lambda call: ShapeOnly((_first(call),))),
    # Known to let nothing pass
    **dict.fromkeys(_NONLINEAR.split(), lambda call: OPAQUE),
}


def semantics(call: OnnxCall) -> Semantics:
    """What the operator of a call does to an affine."""
    row = TABLE.get(call.operator)
    return Opaque("unknown-operator") if row is None else row(call)
