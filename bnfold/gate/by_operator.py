"""Every operator of a file as ONNX Runtime computes it, against float64 on the operands that it was given.

Nothing of what came before an operator is in this, so a bound can be known beforehand:

- what moves, selects or compares is exact, and so is ReLU;
- what the standard rounds once is within one rounding of the truth;
- a sum of K products is, in whatever order it is taken, within ``λ √K u (|W| |x| + |b|)`` but for negligible
  probability (Higham and Mary, "A new approach to probabilistic rounding error analysis", 2019), elementwise;
- what kernels approximate is within what was measured (``operator_bounds``);
- anything else is within a multiple of what rounding its operands does, and a note says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch

from bnfold.errors import BnfoldError
from bnfold.evaluate.attributes import Attributes
from bnfold.evaluate.evaluator import node_evaluator, outer_names
from bnfold.evaluate.subject import Array
from bnfold.gate.evidence import typical
from bnfold.gate.operator_bounds import SMALLEST, UNITS, bound
from bnfold.runtime.runtime import open_session

#: λ of the bound on sums. Over seven nets the largest was 1.3, and 10 in a mean that is bounded by its magnitudes.
SUMS = 8.0
#: Roundings of a result that the standard rounds once: some kernels multiply by a reciprocal.
ROUNDINGS = 2.0
#: Multiples of what rounding an operator's operands does.
UNKNOWN = 64.0
#: Draws of rounded operands.
DRAWS = 4

_SUMS = {
    "Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum", "AveragePool", "GlobalAveragePool", "ReduceMean", "ReduceSum",
    "ReduceSumSquare", "ReduceL1", "CumSum", "FusedMatMul", "Sum", "Mean",
}  # fmt: skip
_ONCE = {"Add", "Sub", "Mul", "Div", "Sqrt", "Reciprocal", "PRelu", "LeakyRelu", "ThresholdedRelu", "Mod"}
_EXACT = {
    "Relu", "Max", "Min", "Clip", "Neg", "Abs", "Sign", "Floor", "Ceil", "Round", "MaxPool", "GlobalMaxPool",
    "ReduceMax", "ReduceMin", "Identity", "Dropout", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose",
    "Concat", "Split", "Slice", "Gather", "GatherElements", "GatherND", "Expand", "Tile", "Pad", "DepthToSpace",
    "SpaceToDepth", "Where", "Compress", "Trilu", "TopK", "ArgMax", "ArgMin", "Constant", "ConstantOfShape", "Shape",
    "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Equal", "Hardmax", "IsNaN", "IsInf", "Size", "NonZero",
    "ReverseSequence", "Cast", "CastLike",
}  # fmt: skip
#: Sums of cosines of angles that are computed in the dtype: up to 2πN in a transform of N terms, 4π in a window.
_TRANSFORMS, _COSINES = {"DFT", "STFT"}, {"HannWindow", "HammingWindow", "BlackmanWindow"}
_STEPS = {"LSTM", "GRU", "RNN"}
#: What decides by itself what comes out, and random numbers.
_SKIPPED = {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli"}


@dataclass(frozen=True)
class Fault:
    """An operator that the runtime computes wrongly.

    Attributes:
        operator, node: its type and the name of its node or first result.
        multiple: its error over its bound; infinite where it is not finite, or of another shape.
        script: a few lines of Python that show it.
    """

    operator: str
    node: str
    multiple: float
    script: str = ""
    why: str = ""


@dataclass(frozen=True)
class Asked:
    """What was found: faults, how many operators were asked, and those for which no bound is known beforehand."""

    faults: tuple[Fault, ...] = ()
    count: int = 0
    unbounded: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()


def ask(nodes: Sequence[onnx.NodeProto], opsets: Mapping[str, int], given: Mapping[str, Array | None]) -> Asked:
    """Holds every node's results in ``given``, as the runtime computed them, against float64 on its operands there."""
    faults, unbounded, missing, count = list[Fault](), dict[str, None](), dict[str, None](), 0
    for node in nodes:
        names = [*node.input, *outer_names(node)]
        if node.op_type in _SKIPPED or any(name and given.get(name) is None for name in names):
            continue
        results = [given.get(name) if name else None for name in node.output]
        if all(result is None for result in results):
            continue
        try:
            known, fault = _judged(node, opsets, {n: given[n] for n in names if n}, results)
        except BnfoldError as error:
            missing[f"{node.op_type} ({error.what[:120]})"] = None
            continue
        count += 1
        if not known:
            unbounded[node.op_type] = None
        if fault is not None:
            faults.append(fault)
    return Asked(tuple(faults), count, tuple(unbounded), tuple(missing))


def _judged(
    node: onnx.NodeProto, opsets: Mapping[str, int], operands: Mapping[str, Any], results: Sequence[Any]
) -> tuple[bool, Fault | None]:
    """Whether a bound is known beforehand, and the fault where a result is beyond it."""
    evaluate = node_evaluator(node, opsets)
    exact = evaluate(operands)
    known, worst, why = True, 0.0, ""
    for i, (true, result) in enumerate(zip(exact, results)):
        if result is None or not isinstance(true, np.ndarray) or not isinstance(result, np.ndarray):
            continue
        if true.shape != result.shape:
            worst, why = math.inf, f"its shape is {list(result.shape)} and not {list(true.shape)}"
            break
        if result.dtype.name not in UNITS:
            if result.dtype.kind in "iub" and not np.array_equal(true, result):
                worst, why = math.inf, f"{int((true != result).sum())} of {true.size} elements differ"
            continue
        if not true.size:
            continue
        limit, sure = _bound(node, opsets, operands, true, result.dtype.name, evaluate, i)
        if result.dtype.name == "float16" and node.op_type not in _EXACT:
            # Computed in float32, with operands that another operator may not have rounded in between.
            limit = limit + _drawn(operands, true, evaluate, i, UNITS["float16"]) / 2
        known &= sure
        multiple = _multiple(result, true, limit)
        if multiple > worst:
            worst, why = multiple, f"its error is {multiple:.3g} times the bound"
    if worst <= 1:
        return known, None
    label = node.name or next(iter(node.output), "")
    return known, Fault(node.op_type, label, worst, script(node, opsets, operands), why)


def _multiple(result: Array, true: Array, limit: Array) -> float:
    """The largest error over its bound; infinite where one is not finite and the other is."""
    with np.errstate(all="ignore"):
        rounded = true.astype(result.dtype).astype(np.float64)
        wide = result.astype(np.float64)
        same = (wide == rounded) | (np.isnan(wide) & np.isnan(rounded))
        off = np.where(same, 0.0, np.abs(wide - true))
        ratio = np.where(off == 0, 0.0, off / np.maximum(limit, 1e-300))
    # Next to the end of the range a rounding decides between a number and infinity.
    largest = float(np.finfo(np.float32).max) if result.dtype.name == "bfloat16" else float(np.finfo(result.dtype).max)
    edge = ~np.isfinite(wide) & (np.abs(true) > 0.99 * largest)
    ratio = np.where(np.isnan(ratio), np.inf, ratio)
    return float(np.where(edge, 0.0, ratio).max())


def _bound(
    node: onnx.NodeProto, opsets: Mapping[str, int], operands: Mapping[str, Any], true: Array, dtype: str,
    evaluate: Callable[[Mapping[str, Array]], list[Any]], item: int,
) -> tuple[Array, bool]:  # fmt: skip
    """What a result may be off by, and whether that was known beforehand."""
    unit, smallest = UNITS[dtype], SMALLEST[dtype]
    op, read = node.op_type, [operands.get(name) if name else None for name in node.input]
    if op in _EXACT:
        return np.full(true.shape, 1e-300), True
    with np.errstate(all="ignore"):
        if op in _ONCE:
            return ROUNDINGS * unit * np.abs(true) + smallest, True
        if op in _SUMS:
            size = np.abs(_magnitude(node, opsets, operands))
            terms = max(_terms(op, read, true), 1)
            # Equal terms are all rounded the same way: there the error grows with how many a lane adds up.
            grown = SUMS * math.sqrt(terms) + terms / 16
            return grown * unit * size + unit * np.abs(true) + smallest, True
        if op in _TRANSFORMS:
            size = np.abs(_magnitude(node, opsets, operands)).sum(-1, keepdims=True)
            size = size.max(tuple(range(1, size.ndim)), keepdims=True)  # at frequency 0 stands the sum of all
            terms = max(read[0].shape)  # type: ignore[union-attr]
            return np.broadcast_to(SUMS * math.sqrt(terms) * (1 + math.tau * terms) * unit * size, true.shape), True
        if op in _COSINES:
            return np.full(true.shape, SUMS * (1 + 2 * math.tau) * unit), True
        if (item == 0 or op in _STEPS) and not node.domain.startswith("unknown"):
            attributes = Attributes(
                {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute if a.type != a.GRAPH},
                opsets.get(node.domain, 1), len(node.output),
            )  # fmt: skip
            attributes = Attributes(
                {n: v.decode() if isinstance(v, bytes) else v for n, v in attributes.values.items()},
                attributes.opset, attributes.outputs,
            )  # fmt: skip
            wide = tuple(x.astype(np.float64) if isinstance(x, np.ndarray) and x.dtype.name in UNITS else x
                         for x in read)  # fmt: skip
            try:
                found = bound(op, dtype, attributes, wide, true)
            except Exception:  # a form of the operator that the table has no magnitude for
                found = None
            if found is not None and op in _STEPS:
                # The table has one step of what is answered, and those before it move the next; what an LSTM keeps is
                # a sum over the steps, of products with what it kept.
                steps = max(wide[0].shape[:2])  # type: ignore[union-attr]  # whichever of the two is time
                kept = 2 + np.abs(true).max(initial=0.0) if item == 2 else 1.0
                return found * steps * kept + _drawn(operands, true, evaluate, item, unit), True
            if found is not None:
                return np.broadcast_to(found, true.shape), True
        return _drawn(operands, true, evaluate, item, unit) + smallest, False


def _magnitude(node: onnx.NodeProto, opsets: Mapping[str, int], operands: Mapping[str, Any]) -> Array:
    """The same sum of the magnitudes of its terms."""
    positive = onnx.NodeProto()
    positive.CopyFrom(node)
    for attribute in positive.attribute:
        if attribute.name in ("alpha", "beta"):
            attribute.f = abs(attribute.f)
    wide = {n: np.abs(x) if isinstance(x, np.ndarray) and x.dtype.name in UNITS else x for n, x in operands.items()}
    found: Array = node_evaluator(positive, opsets)(wide)[0]
    return found


def _terms(op: str, read: Sequence[Any], true: Array) -> float:
    """How many products a result sums."""
    x = read[0]
    if op in ("Conv", "ConvTranspose"):
        weight = read[1]
        return float(weight.size / weight.shape[0 if op == "Conv" else 1]) + 1
    if op in ("Gemm", "MatMul", "FusedMatMul", "Einsum"):
        product = math.prod(float(part.size) for part in read[:2] if part is not None)
        return math.sqrt(product / max(true.size, 1)) + 1
    if op in ("Sum", "Mean"):
        return float(len(read))
    return float(x.size) / max(true.size, 1) + (x.shape[-1] if op == "CumSum" else 0) + 8.0


def _drawn(
    operands: Mapping[str, Any], true: Array, evaluate: Callable[[Mapping[str, Array]], list[Any]], item: int,
    unit: float,
) -> Array:  # fmt: skip
    """A multiple of what rounding the operands does, and of a rounding of the result."""
    rng, squares = np.random.default_rng(0), np.zeros(true.shape)
    for _ in range(DRAWS):
        moved = {
            n: x.astype(np.float64) * (1 + unit * (2 * rng.random(x.shape) - 1))
            if isinstance(x, np.ndarray) and x.dtype.name in UNITS else x for n, x in operands.items()
        }  # fmt: skip
        found = evaluate(moved)[item]
        if found.shape == true.shape:
            squares += np.square(np.nan_to_num(found - true, nan=0.0, posinf=0.0, neginf=0.0))
    noise = torch.from_numpy(np.asarray(np.sqrt(squares / DRAWS)))
    size = torch.from_numpy(np.asarray(np.abs(np.nan_to_num(true, nan=0.0, posinf=0.0, neginf=0.0))))
    smooth: Array = typical(noise, size).numpy()
    return UNKNOWN * (smooth + unit * np.abs(true))


# ---- operators by themselves -----------------------------------------------------------------------------------------

#: Batches, and powers of two that operands are scaled by.
BATCHES, SCALES = (1, 2, 3, 33), (-12, 12)
#: Spatial sizes of what windows walk over, beyond the window itself: a few places, all channels.
PLACES = 5
_WINDOWS = {"Conv", "ConvTranspose", "MaxPool", "AveragePool", "LpPool"}
_ROWS = {"Conv", "ConvTranspose", "MaxPool", "AveragePool", "GlobalAveragePool", "Gemm", "MatMul", "BatchNormalization"}
#: Elements of an operand that is asked for in several ways.
MOST = 200_000


def alone(
    nodes: Sequence[onnx.NodeProto], opsets: Mapping[str, int], given: Mapping[str, Array | None],
    constants: frozenset[str], device: Any,
) -> Asked:  # fmt: skip
    """Asks every kind of operator by itself, with operands that provoke, on the device."""
    faults, seen, count, unbounded = list[Fault](), set[bytes](), 0, dict[str, None]()
    for node in nodes:
        first = node.input[0] if node.input else ""
        x = given.get(first)
        fixed = all(not n or n in constants for n in node.input[1:])
        if not isinstance(x, np.ndarray) or x.dtype.name not in ("float32", "float16") or first in constants:
            continue
        if not fixed or outer_names(node) or node.op_type in _SKIPPED or not x.size or not x.ndim:
            continue
        shapes = [given[n].shape if n and given.get(n) is not None else () for n in node.input[1:]]  # type: ignore[union-attr]
        kind = onnx.NodeProto()
        kind.CopyFrom(node)
        kind.name = kind.doc_string = ""
        del kind.input[:], kind.output[:], kind.metadata_props[:]
        key = kind.SerializeToString(deterministic=True) + repr((shapes, x.dtype.name)).encode()
        if key in seen:
            continue
        seen.add(key)
        held = {n: given[n] for n in node.input[1:] if n}
        try:
            session = open_session(one_node(node, opsets, x, held), device=device, optimized=False)
        except BnfoldError:
            continue  # what it cannot stand alone with
        for operand in _provoking(node, x, held):
            feeds = {first: operand}
            try:
                results = session.run(feeds)
            except BnfoldError:
                continue  # a size that it does not take
            named = zip([n for n in node.output if n], results)  # of a file's values ``given`` has those that are read
            found = ask([node], opsets, {**held, **feeds, **{n: x for n, x in named if n in given}})
            count += found.count
            unbounded |= dict.fromkeys(found.unbounded)
            faults += found.faults
            if found.faults:
                break
    return Asked(tuple(faults), count, tuple(unbounded))


def _provoking(node: onnx.NodeProto, x: Array, held: Mapping[str, Any]) -> Iterator[Array]:
    """Operands that an operator's place in the net may never show it."""
    rng = np.random.default_rng(0)
    small = x
    if node.op_type in _WINDOWS and x.ndim > 2:
        window = next((a.ints for a in node.attribute if a.name == "kernel_shape"), None)
        weight = held.get(node.input[1]) if len(node.input) > 1 else None
        sizes = list(window) if window else list(weight.shape[2:]) if weight is not None else [1] * (x.ndim - 2)
        spans = [min(n, 2 * k + PLACES) for n, k in zip(x.shape[2:], sizes)]
        small = x[(slice(0, 1), slice(None), *(slice(0, n) for n in spans))]
    elif x.size > MOST and node.op_type in _ROWS:
        small = x[:1]
    if small.size > MOST:
        return
    yield np.abs(small)
    yield -np.abs(small)
    yield np.where(rng.random(small.shape) < 0.5, 0, small).astype(x.dtype)
    for power in SCALES if x.dtype.name == "float32" else (-4, 4):
        yield np.ldexp(small, power).astype(x.dtype)
    for limit in _limits(node, held):
        near = np.asarray(limit, x.dtype)
        steps = np.array([np.nextafter(near, -np.inf, dtype=x.dtype), near, np.nextafter(near, np.inf, dtype=x.dtype)])
        yield rng.choice(steps, small.shape).astype(x.dtype)
    if node.op_type in _ROWS and small.shape[0] == 1:
        for count in BATCHES[1:]:
            if small.size * count <= 4 * MOST:
                yield np.concatenate([np.roll(small, i, -1) for i in range(count)])


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


def script(node: onnx.NodeProto, opsets: Mapping[str, int], operands: Mapping[str, Any]) -> str:
    """A few lines of Python that run the node in ONNX Runtime, for its tracker."""
    attributes = {
        a.name: onnx.helper.get_attribute_value(a) for a in node.attribute if a.type not in (a.GRAPH, a.GRAPHS)
    }
    drawn = ", ".join(
        f"{name!r}: rng.standard_normal({list(x.shape)}).astype('{x.dtype.name}')"
        for name, x in operands.items() if isinstance(x, np.ndarray)
    )  # fmt: skip
    domain = f", domain={node.domain!r}" if node.domain else ""
    return "\n".join([
        "import numpy as np, onnx, onnxruntime as ort; from onnx import helper as h; rng = np.random.default_rng(0)",
        f"feeds = {{{drawn}}}",
        f"node = h.make_node({node.op_type!r}, {list(node.input)}, {list(node.output)}{domain}, **{attributes!r})",
        "ins = [h.make_tensor_value_info(n, h.np_dtype_to_tensor_dtype(x.dtype), x.shape) for n, x in feeds.items()]",
        "graph = h.make_graph([node], 'g', ins, [onnx.ValueInfoProto(name=n) for n in node.output if n])",
        f"model = h.make_model(graph, opset_imports=[h.make_opsetid(d, v) for d, v in {dict(opsets)!r}.items()])",
        "print(ort.InferenceSession(model.SerializeToString()).run(None, feeds))",
    ])  # fmt: skip
