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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import torch

from bnfold.errors import BnfoldError
from bnfold.evaluate.attributes import Attributes
from bnfold.evaluate.deciding import Quantisation, deciding
from bnfold.evaluate.operators import TABLE
from bnfold.evaluate.quantised import LEVELS
from bnfold.evaluate.reading import outer_names, qualified, raised
from bnfold.evaluate.single import node_evaluator
from bnfold.evaluate.subject import Array
from bnfold.gate.evidence import typical
from bnfold.gate.operator_bounds import SMALLEST, UNITS, bound
from bnfold.gate.thinning import thinned

#: λ of the bound on sums. Over seven nets the largest was 1.3, and 10 in a mean that is bounded by its magnitudes.
SUMS = 8.0
#: Roundings of a result that the standard rounds once: some kernels multiply by a reciprocal.
ROUNDINGS = 2.0
#: Multiples of what rounding an operator's operands does.
UNKNOWN = 64.0
#: Roundings of what is rounded to a level, relative to the largest number that it is computed from.
TIES = 8.0
#: Draws of rounded operands.
DRAWS = 4
#: How many times less than their bound kernels are taken to be off in the RMS: all bounds here have as much room.
ROOM = 8.0

_SUMS = {
    "Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum", "AveragePool", "GlobalAveragePool", "ReduceMean", "ReduceSum",
    "ReduceSumSquare", "ReduceL1", "CumSum", "FusedMatMul", "Sum", "Mean",
}  # fmt: skip
_PRODUCTS = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
_ONCE = {
    "Add",
    "Sub",
    "Mul",
    "Div",
    "Sqrt",
    "Reciprocal",
    "PRelu",
    "LeakyRelu",
    "ThresholdedRelu",
    "Mod",
    "DequantizeLinear",
}
_EXACT = {
    "Relu", "Max", "Min", "Clip", "Neg", "Abs", "Sign", "Floor", "Ceil", "Round", "MaxPool", "GlobalMaxPool",
    "ReduceMax", "ReduceMin", "Identity", "Dropout", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose",
    "Concat", "Split", "Slice", "Gather", "GatherElements", "GatherND", "Expand", "Tile", "Pad", "DepthToSpace",
    "SpaceToDepth", "Where", "Compress", "Trilu", "TopK", "ArgMax", "ArgMin", "Constant", "ConstantOfShape", "Shape",
    "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Equal", "Hardmax", "IsNaN", "IsInf", "Size", "NonZero",
    "ReverseSequence", "Cast", "CastLike", "ScatterND", "ScatterElements",
}  # fmt: skip
#: Sums of cosines of angles that are computed in the dtype: up to 2πN in a transform of N terms, 4π in a window.
_TRANSFORMS, _COSINES = {"DFT", "STFT"}, {"HannWindow", "HammingWindow", "BlackmanWindow"}
_STEPS = {"LSTM", "GRU", "RNN"}
#: What decides by itself what comes out, and random numbers.
SKIPPED = {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli"}


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


def ask(
    nodes: Sequence[onnx.NodeProto], opsets: Mapping[str, int], given: Mapping[str, Array | None],
    constants: frozenset[str] = frozenset(),
) -> Asked:  # fmt: skip
    """Holds every node's results in ``given``, as the runtime computed them, against float64 on its operands there.

    Of products with ``constants`` a part of the channels.
    """
    faults, unbounded, missing, count = list[Fault](), dict[str, None](), dict[str, None](), 0
    for node in nodes:
        names = [*node.input, *outer_names(node)]
        if node.op_type in SKIPPED or any(name and given.get(name) is None for name in names):
            continue
        values = {name: given.get(name) for name in (*names, *node.output) if name}
        if all(values.get(name) is None for name in node.output):
            continue
        thin, few = thinned(node, values, constants)
        try:
            known, fault = _judged(thin, opsets, few)
            if fault is not None and few is not values:
                known, fault = _judged(node, opsets, values)  # to be told with all channels
        except BnfoldError as error:
            missing[f"{node.op_type} ({error.what[:120]})"] = None
            continue
        count += 1
        if not known:
            unbounded[node.op_type] = None
        if fault is not None:
            faults.append(fault)
    return Asked(tuple(faults), count, tuple(unbounded), tuple(missing))


def _judged(node: onnx.NodeProto, opsets: Mapping[str, int], values: Mapping[str, Any]) -> tuple[bool, Fault | None]:
    """Whether a bound is known beforehand, and the fault where a result is beyond it."""
    results = [values.get(name) for name in node.output]
    operands = {name: x for name, x in values.items() if name not in node.output}
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
            if (
                result.dtype.kind in "iub"
                and not np.array_equal(true, result)
                and not _beside_a_tie(node, opsets, operands, true, result)
            ):
                worst, why = math.inf, f"{int((true != result).sum())} of {true.size} elements differ"
            continue
        if not true.size or (_is_exact(node) and np.array_equal(result, _as_stored(true, result.dtype))):
            continue
        limit, sure = _bound(node, opsets, operands, true, result.dtype.name, evaluate, i)
        if result.dtype.name == "float16" and not _is_exact(node):
            # Computed in float32, with operands that another operator may not have rounded in between.
            limit = limit + _drawn(operands, true, evaluate, i, "float16") / 2
        known &= sure
        multiple = _multiple(result, true, limit)
        if multiple > worst:
            worst, why = multiple, f"its error is {multiple:.3g} times the bound"
    if worst <= 1:
        return known, None
    label = node.name or next(iter(node.output), "")
    return known, Fault(node.op_type, label, worst, script(node, opsets, operands), why)


def _beside_a_tie(
    node: onnx.NodeProto, opsets: Mapping[str, int], operands: Mapping[str, Any], true: Array, result: Array
) -> bool:
    """Whether quantised levels differ only where what is rounded lies as near to a tie as a few roundings move it."""
    read = [raised(operands[name]) if name else None for name in node.input]
    found = deciding(qualified(node), _attributes(node, opsets), read)
    if found is None or not isinstance(found[0], Quantisation):
        return False
    rule, at = found
    unit = max((UNITS[x.dtype.name] for x in operands.values() if x is not None and x.dtype.name in UNITS), default=0.0)
    gap = rule.gap(at, torch.from_numpy(true), torch.from_numpy(result))
    return bool((gap <= TIES * unit * (rule.compared(at).abs() + at.get("size", LEVELS))).all())


def _as_stored(true: Array, dtype: Any) -> Array:
    with np.errstate(all="ignore"):
        return true.astype(dtype)


def rounded_once(dtype: str, node: onnx.NodeProto, read: Mapping[str, Any], results: Sequence[Any]) -> Sequence[Any]:
    """Results of a node in float64, rounded to a dtype: what the most exact kernel returns."""
    del node, read
    with np.errstate(all="ignore"):
        return [x.astype(dtype).astype(x.dtype) if getattr(x, "dtype", None) == np.float64 else x for x in results]


def as_kernels_round(
    node: onnx.NodeProto, read: Mapping[str, Any], results: Sequence[Any], *, opsets: Mapping[str, int], dtype: str,
    rng: np.random.Generator,
) -> Sequence[Any]:  # fmt: skip
    """Results of a node in float64, each element off as kernels of a dtype may be: its RMS is a part of its bound."""
    if _is_exact(node) or node.op_type in SKIPPED or not any(getattr(x, "dtype", None) == np.float64 for x in results):
        return results
    with np.errstate(all="ignore"):
        operands = {n: x.astype(np.float32) if getattr(x, "dtype", None) == np.float64 else x for n, x in read.items()}
    evaluate = node_evaluator(node, opsets)
    found = list(results)
    for i, true in enumerate(results):
        if getattr(true, "dtype", None) == np.float64 and true.size:
            limit, _ = _bound(node, opsets, operands, true, dtype, evaluate, i)
            drawn = rng.uniform(-(3**0.5), 3**0.5, true.shape) / ROOM
            found[i] = true + np.nan_to_num(limit * drawn, nan=0.0, posinf=0.0, neginf=0.0)
    return found


def _multiple(result: Array, true: Array, limit: Array) -> float:
    """The largest error over its bound; infinite where one is not finite and the other is."""
    with np.errstate(all="ignore"):
        if bool((np.abs(result - true) <= limit).all()):
            return 0.0
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


def _is_exact(node: onnx.NodeProto) -> bool:
    """Whether it moves, selects or compares; a scatter that adds up what meets does not."""
    return node.op_type in _EXACT and not any(a.name == "reduction" and a.s in (b"add", b"mul") for a in node.attribute)


def _bound(
    node: onnx.NodeProto, opsets: Mapping[str, int], operands: Mapping[str, Any], true: Array, dtype: str,
    evaluate: Callable[[Mapping[str, Array]], list[Any]], item: int,
) -> tuple[Array, bool]:  # fmt: skip
    """What a result may be off by, and whether that was known beforehand."""
    unit, smallest = UNITS[dtype], SMALLEST[dtype]
    op, read = node.op_type, [operands.get(name) if name else None for name in node.input]
    if _is_exact(node):
        return np.full(true.shape, 1e-300), True
    with np.errstate(all="ignore"):
        if op in _ONCE:
            return ROUNDINGS * unit * np.abs(true) + smallest, True
        if op in _SUMS:
            limit, terms = _magnitude(node, opsets, operands), max(_terms(op, read, true), 1)
            # Equal terms are all rounded the same way: there the error grows with how many a lane adds up.
            limit *= (SUMS * math.sqrt(terms) + terms / 16) * unit
            limit += unit * np.abs(true)
            limit += smallest
            return limit, True
        if op in _TRANSFORMS:
            size = _magnitude(node, opsets, operands).sum(-1, keepdims=True)
            size = size.max(tuple(range(1, size.ndim)), keepdims=True)  # at frequency 0 stands the sum of all
            terms = max(read[0].shape)  # type: ignore[union-attr]
            return np.broadcast_to(SUMS * math.sqrt(terms) * (1 + math.tau * terms) * unit * size, true.shape), True
        if op in _COSINES:
            return np.full(true.shape, SUMS * (1 + 2 * math.tau) * unit), True
        if (item == 0 or op in _STEPS) and not node.domain.startswith("unknown"):
            attributes = _attributes(node, opsets)
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
                return found * steps * kept + _drawn(operands, true, evaluate, item, dtype), True
            if found is not None:
                return np.broadcast_to(found, true.shape), True
        return _drawn(operands, true, evaluate, item, dtype) + smallest, False


def _magnitude(node: onnx.NodeProto, opsets: Mapping[str, int], operands: Mapping[str, Any]) -> Array:
    """The same sum of the magnitudes of its terms; as positive terms lose nothing, in float32 where that is faster."""
    size = {n: np.abs(x) if isinstance(x, np.ndarray) and x.dtype.name in UNITS else x for n, x in operands.items()}
    row, found = TABLE.get((node.domain, node.op_type)), None
    if node.op_type in _PRODUCTS and row is not None:
        attributes = _attributes(node, opsets)
        sizes = {n: abs(x) if n in ("alpha", "beta") else x for n, x in attributes.values.items()}
        read = [size[n].astype(np.float32, copy=False) if n else None for n in node.input]
        with torch.no_grad():
            made = row(
                replace(attributes, values=sizes),
                *(None if x is None else torch.from_numpy(np.asarray(x)) for x in read),
            )
        found = made.numpy() if bool(made.isfinite().all()) else None
    if found is None:
        positive = onnx.NodeProto()
        positive.CopyFrom(node)
        for attribute in positive.attribute:
            if attribute.name in ("alpha", "beta"):
                attribute.f = abs(attribute.f)
        found = node_evaluator(positive, opsets)(size)[0]
    wide: Array = np.abs(found).astype(np.float64)
    return wide


def _attributes(node: onnx.NodeProto, opsets: Mapping[str, int]) -> Attributes:
    held = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute if a.type != a.GRAPH}
    named = {n: v.decode() if isinstance(v, bytes) else v for n, v in held.items()}
    return Attributes(named, opsets.get(node.domain, 1), len(node.output))


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
    dtype: str,
) -> Array:  # fmt: skip
    """A multiple of what rounding the operands does, next to zero in steps of the smallest number, and the result."""
    rng, squares = np.random.default_rng(0), np.zeros(true.shape)
    unit, least = UNITS[dtype], SMALLEST[dtype] / 2

    def rounded(x: Array) -> Array:
        wide, drawn = x.astype(np.float64), 2 * rng.random(x.shape) - 1
        moved: Array = wide + drawn * np.maximum(unit * np.abs(wide), least)
        return moved

    for _ in range(DRAWS):
        moved = {
            n: rounded(x) if isinstance(x, np.ndarray) and x.dtype.name in UNITS else x for n, x in operands.items()
        }
        found = evaluate(moved)[item]
        if found.shape == true.shape:
            squares += np.square(np.nan_to_num(found - true, nan=0.0, posinf=0.0, neginf=0.0))
    noise = torch.from_numpy(np.asarray(np.sqrt(squares / DRAWS)))
    size = torch.from_numpy(np.asarray(np.abs(np.nan_to_num(true, nan=0.0, posinf=0.0, neginf=0.0))))
    smooth: Array = typical(noise, size).numpy()
    return UNKNOWN * (smooth + unit * np.abs(true))


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
