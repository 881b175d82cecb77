"""How much a model costs to run, and how many runs say enough of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import onnx
import torch
from torch import fx

from bnfold.gate.samples import MIN_SAMPLES
from bnfold.graph.capture import Captured


def has_summaries(captured: Captured) -> bool:
    """Whether an output is a handful of numbers for a whole batch, so that a run of many samples says as little as one.

    Ten runs are then made, as ten samples are of other outputs.
    """
    (outputs,) = captured.program.graph.output_node().args
    values = [getattr(node, "meta", {}).get("val") for node in cast("Sequence[Any]", outputs)]
    floats = [value for value in values if isinstance(value, torch.Tensor) and value.is_floating_point()]
    fixed = [value for value in floats if not any(isinstance(size, torch.SymInt) for size in value.shape)]
    return any(value.numel() < MIN_SAMPLES for value in fixed)


#: Operations of one sample beyond which the gate runs few of them, on all threads.
DEAR = 300_000_000
#: What an element that is computed costs, in operations: memory is slower than arithmetic, and the gate compares many.
ELEMENT = 100


def effort(captured: Captured) -> float:
    """What one sample of the example costs, in operations: of convolutions and products, and for every element."""
    elements = sum(math.prod(_shape(node)) for node in captured.program.graph.nodes if node.op == "call_function")
    return operations(captured) + ELEMENT * elements / _rows(captured)


def operations(captured: Captured) -> float:
    """Floating-point operations of convolutions and products, for one sample of the example, read off its shapes."""
    return sum(map(_products, captured.program.graph.nodes)) * 2 / _rows(captured)


def _rows(captured: Captured) -> int:
    return max((x.shape[0] for x in captured.flat if isinstance(x, torch.Tensor) and x.ndim and len(x)), default=1)


def file_effort(nodes: Iterable[onnx.NodeProto], shapes: Mapping[str, Sequence[int]], rows: int) -> float:
    """What one sample costs a file, in operations, as ``effort``.

    Args:
        nodes: of its main graph; what others hold is not counted.
        shapes: of its inputs, its constants and what its nodes compute, in a run of ``rows`` samples.
    """
    products = elements = 0.0
    for node in nodes:
        elements += sum(math.prod(shapes.get(name, [0])) for name in node.output)
        one, other, third, out = (shapes.get(name, [0]) for name in (*(*node.input, "", "", "")[:3], node.output[0]))
        if node.op_type in ("Conv", "ConvTranspose"):
            products += math.prod(out if node.op_type == "Conv" else one) * math.prod(other[1:])
        elif node.op_type in ("MatMul", "Gemm"):  # whatever is transposed, the second is of so many columns
            products += math.prod(one) * (out[-1] if out else 1)
        elif node.op_type in ("LSTM", "GRU", "RNN"):
            products += math.prod(one[:2]) * (math.prod(other) + math.prod(third))
    return (2 * products + ELEMENT * elements) / max(rows, 1)


def _products(node: fx.Node) -> float:
    """How many products a convolution, a linear or a matrix product sums in all; 0 of anything else."""
    name = getattr(node.target, "_opname", "")
    convolves, transposed = name.startswith("conv"), "transpose" in name
    if not convolves and name not in ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum"):
        return 0.0
    shapes = [_shape(x) for x in (node, *node.args[: 3 if "add" in name else 2])]
    out, one, other = (shapes[0], *shapes[-2:])
    if convolves:  # every element of what the weights are read for, with all of one channel's weights
        return math.prod(one if transposed else out) * math.prod(other[1:])
    return math.prod(out) * float(one[-1] if one else 1)


def _shape(value: Any) -> list[int]:
    known = value.meta.get("val") if isinstance(value, fx.Node) else None
    if not isinstance(known, torch.Tensor):
        return [0]
    return [size if isinstance(size, int) else int(size.node.hint or 1) for size in known.shape]
