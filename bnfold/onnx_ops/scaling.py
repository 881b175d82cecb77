"""Rows for operators with constants of their own: contractions and normalisations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from bnfold.affine import Affine
from bnfold.onnx_ops.moving import attention, geometry
from bnfold.semantics import Bilinear, Homogeneous, Opaque, Recurrent, Scaling, Semantics, build
from bnfold.semantics.base import Rewritten

if TYPE_CHECKING:
    from bnfold.graph.onnx_call import OnnxCall


def conv(call: OnnxCall) -> Semantics:
    """Conv, or ConvTranspose."""
    if not call.is_constant("W"):
        return build.OPAQUE
    transposed = call.operator == "ConvTranspose"
    walk, padded = geometry(call, call.shape("W")[2:], transposed=transposed)
    return build.convolution(
        call, "X", "W", "B", call.attribute("group", 1), walk, transposed=transposed, padded=padded or transposed
    )


def gemm(call: OnnxCall) -> Semantics:
    """``alpha*A'@B' + beta*C`` with a constant A or B, transposed or not."""
    alpha, beta = (float(call.attribute(name, 1.0)) for name in ("alpha", "beta"))
    if alpha == 0.0 or beta == 0.0:
        return build.OPAQUE
    left, right = bool(call.attribute("transA", 0)), bool(call.attribute("transB", 0))
    if call.is_constant("B"):
        data, weight, letters = "A", "B", "oi" if right else "io"
        out, inp = ("", "o"), ("i", "") if left else ("", "i")
    else:
        data, weight, letters = "B", "A", "io" if left else "oi"
        out, inp = ("o", ""), ("", "i") if right else ("i", "")
    return build.contraction(
        call, data, weight, view=call.shape(weight), letters=letters, out=out, inp=inp,
        bias="C", bias_scale=beta, weight_scale=alpha,
    )  # fmt: skip


def matmul(call: OnnxCall) -> Semantics:
    """``A @ B`` with a constant operand; a mean of values weighted by a softmax; else a product of two values.

    Of a matrix times a constant one it has place for a bias: with one it is a Gemm (``OnnxGraph`` makes it one).
    """
    if call.rank == len(call.shape("A")) == 2 and call.is_constant("B"):
        view = call.shape("B")
        return build.contraction(call, "A", "B", view=view, letters="io", out=("", "o"), inp=("", "i"), bias="C")
    if call.is_constant("A") or call.is_constant("B"):
        return build.matmul(call, "A", "B")
    matrices = len(call.shape("A")) == call.rank and len(call.shape("B")) == call.rank >= 2
    return attention(call, "A", "B") or Bilinear(("A", "B"), summed=(-1, -2) if matrices else None)


def einsum(call: OnnxCall) -> Semantics:
    """One constant operand; else a product of two values."""
    return build.einsum(call, call.attribute("equation", ""), [f"Inputs.{i}" for i in range(len(call["Inputs"]))])


def batch_norm(call: OnnxCall) -> Semantics:
    """BatchNormalization with stored statistics, per channel or (``spatial=0``) per element."""
    if call.item not in (None, 0):
        return build.OPAQUE
    slots = list(call.arguments)[1:5]
    channels = call.shape("X")[1:2] if call.attribute("spatial", 1) else call.shape("X")[1:]
    if others := [f"{list(call.shape(slot))} of {slot}" for slot in slots if call.shape(slot) != channels]:
        known = "a number that differs" if 1 in call.graph.dynamic_axes(call["X"]) else f"{list(channels)}"
        return Opaque("channels", f"its operand has {known}, and not the {', '.join(others)}", "batch_norm")
    eps = float(call.attribute("epsilon", 1e-5))
    return build.normalisation(call, "X", slots, eps, batch_statistics=trains(call))


def trains(call: OnnxCall) -> bool:
    """Whether a BatchNormalization normalises with the statistics of its batch."""
    if call.opset < 7:
        return not call.attribute("is_test", 0)
    return bool(call.attribute("training_mode", 0)) if call.opset >= 14 else call.outputs > 1


def scaler(call: OnnxCall) -> Semantics:
    """Scaler of ai.onnx.ml, as scikit-learn's StandardScaler becomes: ``(x - offset)*scale`` along the last axis."""
    given = (call.attribute("offset", [0.0]), call.attribute("scale", [1.0]))
    offset, scale = (torch.tensor(each, dtype=torch.float64) for each in given)
    axis = call.rank - 1
    return Scaling("X", Affine.per_channel(scale, -offset * scale, call.rank, axis), "mul", lambda new: {})


def instance_norm(call: OnnxCall) -> Semantics:
    """A scale and a bias per channel."""
    return build.normalised(call, (1,), "scale", "B")


def group_norm(call: OnnxCall) -> Semantics:
    """A scale and a bias per channel; before opset 21 per group, and then no place for others."""
    return build.normalised(call, (1,), "scale", "bias") if call.opset >= 21 else build.OPAQUE


def layer_norm(call: OnnxCall) -> Semantics:
    """A scale and a bias along the last axes; the mean and deviation that it may return are no affine's."""
    if call.item not in (None, 0):
        return build.OPAQUE
    return build.normalised(call, range(call.attribute("axis", -1) % call.rank, call.rank), "Scale", "B")


def prelu(call: OnnxCall) -> Semantics:
    """PRelu with a constant slope."""
    return Homogeneous(("X",)) if call.is_constant("slope") else build.OPAQUE


@dataclass(frozen=True)
class _Recurrent(Recurrent):
    """Weight (D, rows, features) and bias (D, 2*rows), that of the input in its first half."""

    def rewritten(self, given: Mapping[str, Affine], after: Affine) -> Rewritten:
        """``W' = W*a``, ``c' = c + W*b``."""
        if self.data not in given:
            return Rewritten()
        before, ((weight, bias),) = given[self.data], self.weights
        old = self.get(weight)
        assert old is not None and bias is not None
        constants = {weight: old * before.scale.flatten()}
        if before.has_shift:
            moved = old @ before.shift.flatten().expand(old.shape[2])
            own = self.get(bias)
            whole = torch.cat([moved, torch.zeros_like(moved)], 1)
            constants[bias] = whole if own is None else own + whole
        return Rewritten(constants)


def recurrent(call: OnnxCall) -> Semantics:
    """LSTM, GRU, RNN: they read their input through W and the first half of B, in every direction."""
    if not call.is_constant("W") or not call.is_constant("B"):
        return build.OPAQUE
    return _Recurrent("X", (("W", "B"),), lambda slot: None if call[slot] is None else call.constant(slot))
