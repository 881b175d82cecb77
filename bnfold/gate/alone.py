"""Every kind of operator of a file by itself in ONNX Runtime, with operands that its place may never show it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx

from bnfold.errors import BnfoldError
from bnfold.evaluate.reading import outer_names
from bnfold.evaluate.subject import Array
from bnfold.gate.by_operator import SKIPPED, Asked, Fault, ask
from bnfold.runtime.runtime import Session, open_session

#: Batches beyond one, and powers of two that operands are scaled by.
BATCHES, SCALES = (2, 3, 33), (-12, 12)
#: Spatial sizes of what windows walk over, beyond the window itself: a few places, all channels; fewer of many samples.
PLACES, FEW = 5, 1
#: Rows of a matrix, of a stack of such: more than kernels take at a time, and no multiple of that.
LINES = 37
_WINDOWS = {"Conv", "ConvTranspose", "MaxPool", "AveragePool", "LpPool"}
_ROWS = {"Conv", "ConvTranspose", "MaxPool", "AveragePool", "GlobalAveragePool", "Gemm", "MatMul", "BatchNormalization"}
#: What takes every row of the last axis by itself, where its constants do and ``axis``, if it has one, is the last.
_LINES = {
    "MatMul", "Add", "Sub", "Mul", "Div", "Relu", "Clip", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Erf", "Gelu",
    "Exp", "Sqrt", "LeakyRelu", "Softmax", "LayerNormalization",
}  # fmt: skip
#: What moves elements, whatever these are: on those of a run it is asked as well as on any.
_MOVES = {
    "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Split", "Slice", "Gather", "Expand", "Tile", "Identity",
    "Pad", "DepthToSpace", "SpaceToDepth", "Concat",
}  # fmt: skip
#: Elements of an operand that is asked for in several ways.
MOST = 200_000
#: The kinds of operators that this process has asked by themselves and found right.
_right: set[bytes] = set()


def alone(
    nodes: Sequence[onnx.NodeProto], opsets: Mapping[str, int], given: Mapping[str, Array | None],
    constants: frozenset[str], device: Any,
) -> Asked:  # fmt: skip
    """Asks every kind of operator by itself, once a process, with operands that provoke, on the device."""
    faults, seen, count, unbounded = list[Fault](), set[bytes](), 0, dict[str, None]()
    for node in nodes:
        first = node.input[0] if node.input else ""
        x = given.get(first)
        fixed = all(not n or n in constants for n in node.input[1:])
        if not isinstance(x, np.ndarray) or x.dtype.name not in ("float32", "float16") or first in constants:
            continue
        if not fixed or outer_names(node) or node.op_type in SKIPPED | _MOVES or not x.size or not x.ndim:
            continue
        held = {n: given.get(n) for n in node.input[1:] if n}
        shapes = [getattr(held.get(n), "shape", ()) for n in node.input[1:]]
        kind = onnx.NodeProto()
        kind.CopyFrom(node)
        kind.name = kind.doc_string = ""
        del kind.input[:], kind.output[:], kind.metadata_props[:]
        of = shapes, x.ndim, x.dtype.name, sorted(opsets.items()), str(device)
        key = kind.SerializeToString(deterministic=True) + repr(of).encode()
        if key in seen or key in _right:
            continue
        seen.add(key)
        try:
            session = open_session(one_node(node, opsets, x, held), device=device, optimized=False)
        except BnfoldError:
            continue  # what it cannot stand alone with
        before = count
        for operand, results in _ran(session, first, _provoking(node, x, held)):
            named = zip([n for n in node.output if n], results)  # of a file's values ``given`` has those that are read
            made = {n: x for n, x in named if n in given}
            found = ask([node], opsets, {**held, first: operand, **made}, frozenset(held))
            count += found.count
            unbounded |= dict.fromkeys(found.unbounded)
            faults += found.faults
            if found.faults:
                break
        else:
            if count > before:  # with operands too large for this nothing was asked
                _right.add(key)
    return Asked(tuple(faults), count, tuple(unbounded))


def _ran(
    session: Session, name: str, operands: Iterable[tuple[list[Array], bool]]
) -> Iterator[tuple[Array, list[Array]]]:
    """Operands with what the session makes of them; batches together, and each row with its results once."""
    for batches, independent in operands:
        ran: list[tuple[Array, list[Array]]] = []
        for operand in batches:
            with contextlib.suppress(BnfoldError):  # a size that it does not take
                ran.append((operand, session.run({name: operand})))
        if not ran or not independent or any(len(y) != len(x) for x, results in ran for y in results):
            yield from ran
            continue
        parts = [np.concatenate(each) for each in zip(*((x, *results) for x, results in ran))]
        rows = {b"".join(part[i].tobytes() for part in parts): i for i in range(len(parts[0]))}
        x, *results = (part[sorted(rows.values())] for part in parts)
        yield x, results


def _provoking(node: onnx.NodeProto, x: Array, held: Mapping[str, Any]) -> Iterator[tuple[list[Array], bool]]:
    """Operands that an operator's place in the net may never show it.

    Where rows are independent, which is told, they are the rows of a few batches, else one after another.
    """
    # A second result says where in all of the batch the largest stand.
    rng, rows = np.random.default_rng(0), node.op_type in _ROWS and len(node.output) == 1
    small = _part(node, x, held, PLACES) if rows or node.op_type in _LINES else x
    if small.size > MOST:
        return
    kinds = _kinds(node, small, held, rng)
    if not rows or small.shape[0] != 1:
        yield from (([kind], False) for kind in kinds)
        return
    few = _kinds(node, _part(node, x, held, FEW), held, rng)
    for some, counts in ((kinds, (1, *BATCHES[:-1])), (few, BATCHES[-1:])):
        taken = [n for n in counts if n == 1 or some[0].size * n <= 4 * MOST]
        yield [np.concatenate([some[(n - 1 + i) % len(some)] for i in range(n)]) for n in taken], True


def _part(node: onnx.NodeProto, x: Array, held: Mapping[str, Any], places: int) -> Array:
    """One sample, all channels, as much of its space as windows need to stand at a few places."""
    axis = next((a.i for a in node.attribute if a.name == "axis"), -1)
    alike = node.op_type == "MatMul" or all(getattr(y, "shape", ())[-2:-1] in ((), (1,)) for y in held.values())
    if node.op_type in _LINES and x.ndim > 2 and alike and axis in (-1, x.ndim - 1):
        return x[:1, ..., :LINES, :] if node.op_type == "MatMul" else x[..., :LINES, :]
    if node.op_type not in _WINDOWS or x.ndim <= 2:
        return x[:1] if x.size > MOST else x
    window = next((a.ints for a in node.attribute if a.name == "kernel_shape"), None)
    weight = held.get(node.input[1]) if len(node.input) > 1 else None
    sizes = list(window) if window else list(weight.shape[2:]) if weight is not None else [1] * (x.ndim - 2)
    apart = next((a.ints for a in node.attribute if a.name == "dilations"), [1] * len(sizes))
    spans = [min(n, (k - 1) * d + 1 + places) for n, k, d in zip(x.shape[2:], sizes, apart)]
    return x[(slice(0, 1), slice(None), *(slice(0, n) for n in spans))]


def _kinds(node: onnx.NodeProto, small: Array, held: Mapping[str, Any], rng: np.random.Generator) -> list[Array]:
    powers = SCALES if small.dtype.name == "float32" else (-4, 4)
    found = [np.abs(small), -np.abs(small), np.where(rng.random(small.shape) < 0.5, 0, small).astype(small.dtype)]
    found += [np.ldexp(small, power).astype(small.dtype) for power in powers]
    for limit in _limits(node, held):
        near = np.asarray(limit, small.dtype)
        steps = [np.nextafter(near, -np.inf, dtype=near.dtype), near, np.nextafter(near, np.inf, dtype=near.dtype)]
        found.append(rng.choice(np.array(steps), small.shape).astype(small.dtype))
    return found


def _limits(node: onnx.NodeProto, held: Mapping[str, Any]) -> list[float]:
    """The numbers that an operator's attributes and constants name as bounds."""
    found = [float(a.f) for a in node.attribute if a.name in ("min", "max", "threshold", "lambd")]
    if node.op_type == "Clip":
        found += [float(x.reshape(())) for x in held.values() if isinstance(x, np.ndarray) and x.size == 1]
    return [x for x in found if math.isfinite(x)]


def one_node(node: onnx.NodeProto, opsets: Mapping[str, int], x: Array, held: Mapping[str, Any]) -> bytes:
    """A model of one node, its first operand as the input and the rest as constants."""
    helper = onnx.helper
    kind = helper.np_dtype_to_tensor_dtype(x.dtype)
    inputs = [helper.make_tensor_value_info(node.input[0], kind, [None] * x.ndim)]
    outputs = [onnx.ValueInfoProto(name=name) for name in node.output if name]
    constants = [onnx.numpy_helper.from_array(np.asarray(array, order="C"), name) for name, array in held.items()]
    graph = helper.make_graph([node], "one", inputs, outputs, constants)
    wanted = [helper.make_opsetid(domain, version) for domain, version in opsets.items()]
    return bytes(helper.make_model(graph, opset_imports=wanted, ir_version=10).SerializeToString())
