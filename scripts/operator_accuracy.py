"""Measures how far ONNX Runtime's CPU kernels are off where they approximate: bnfold/gate/operator_accuracy.json.

    python scripts/operator_accuracy.py                                   # prints the table of this processor
    python scripts/operator_accuracy.py --write                           # and joins it to the committed one
    python scripts/operator_accuracy.py --processor "AVX2 (emulated)"     # the name that it is told under

ONNX Runtime chooses its kernels by what the processor has (SSE4.1, AVX2 with FMA, AVX-512), so one machine shows one of
three. The committed table is the largest over all three; the two older ones run under an emulator of instructions:

    qemu-x86_64 -cpu Nehalem python scripts/operator_accuracy.py --write --processor "SSE4.1 (emulated)"
    qemu-x86_64 -cpu Haswell python scripts/operator_accuracy.py --write --processor "AVX2 (emulated)"

Every operator runs alone, without optimisations, over the domain of its dtype (float16 and bfloat16: every number that
there is; float32: every power of two, both signs, and the places where kernels change their formula), against torch in
float64, with which bnfold's own evaluation must agree. ``relative`` is the worst error over the result where results
are as large as the magnitude (``bnfold/gate/operator_bounds.py``) or larger; ``absolute`` what is left elsewhere, over
the magnitude; both in units of the roundoff.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import torch
from onnx import helper, numpy_helper
from torch.nn import functional as F

from bnfold.evaluate.attributes import Attributes
from bnfold.evaluate.single import node_evaluator
from bnfold.gate.operator_bounds import MAGNITUDES, SMALLEST, UNITS, _one, _operand, magnitude
from bnfold.runtime.session import _from_ort, _to_ort

PATH = Path(__file__).resolve().parents[1] / "bnfold/gate/operator_accuracy.json"
#: What a measured number is multiplied with: another processor, another version, a place that no sweep met.
SAFETY = 4
#: Up to this an error relative to the result alone describes an operator.
RELATIVE = 4.0
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
ONNX_TYPES = {"float32": 1, "float16": 10, "bfloat16": 16}
OPSETS = {"": 22, "com.microsoft": 1}

Array = np.ndarray[Any, Any]
Inputs = Callable[[str, np.random.Generator, int], Iterator[tuple[Array | None, ...]]]


def everywhere(low: float = -np.inf, high: float = np.inf) -> Inputs:
    """Numbers of the whole range between two bounds, in lengths that fill vectors and that do not."""

    def make(dtype: str, rng: np.random.Generator, points: int) -> Iterator[tuple[Array | None, ...]]:
        if dtype == "float32":
            mantissas = 1 + rng.random((points // 550, 277))
            powers = np.ldexp(mantissas, np.arange(-149, 128)).ravel()
            edges = np.array(
                [0.0, 1.0, 2.5, 3.0, 6.0, 7.9, 9.0, 10.0, 17.33, 18.0, 20.0, 87.34, 88.376, 88.723, 103.97]
            )
            near = (edges[:, None] * (1 + np.arange(-99, 100) * 2.0**-23)).ravel()
            spread = np.concatenate([rng.uniform(-s, s, points // 8) for s in (0.1, 1.0, 4.0, 10.0, 30.0, 110.0)])
            x = np.concatenate([powers, -powers, near, -near, spread])
        else:
            with np.errstate(invalid="ignore"):
                x = np.arange(2**16, dtype=np.uint16).view(DTYPES[dtype]).astype(np.float64)
        x = x[np.isfinite(x) & (x >= low) & (x <= high)].astype(DTYPES[dtype])
        yield (rng.permutation(x[np.isfinite(x.astype(np.float64))]),)
        for length in range(1, 36):
            yield (rng.choice(x, length),)

    return make


def rows(*more: Callable[[np.random.Generator, tuple[int, ...]], Array | None], channels: bool = False) -> Inputs:
    """Rows of 1 to 10,000 numbers at many scales and offsets, with constants of further inputs."""

    def make(dtype: str, rng: np.random.Generator, points: int) -> Iterator[tuple[Array | None, ...]]:
        for k in (1, 2, 3, 7, 17, 64, 257, 1000, 10_000):
            for scale in (1e-4, 0.1, 1.0, 10.0, 100.0):
                for offset in (0.0, 1.0, 30.0):
                    x = scale * (rng.standard_normal((max(2, points // 60_000), 4, k)) + offset)
                    x[0, 0] *= rng.random(k) < 0.1  # exact zeros
                    x[0, 1, 0] *= 30.0  # one element far out
                    x = np.clip(x, -6e4, 6e4).reshape(x.shape if channels else (-1, k))
                    made = [f(rng, x.shape) for f in more]
                    yield tuple(a if a is None or a.dtype == np.int64 else a.astype(DTYPES[dtype]) for a in (x, *made))

    return make


def images(dtype: str, rng: np.random.Generator, points: int) -> Iterator[tuple[Array | None, ...]]:
    """Small images, to be resized to sizes that are no multiples."""
    for (h, w), (a, b) in (
        ((5, 7), (10, 14)),
        ((8, 8), (13, 5)),
        ((16, 9), (7, 31)),
        ((64, 3), (100, 11)),
        ((3, 3), (3, 200)),
    ):
        for scale in (0.01, 1.0, 300.0):
            x = (scale * rng.standard_normal((2, 3, h, w))).astype(DTYPES[dtype])
            yield x, None, None, np.array([2, 3, a, b], np.int64)


@dataclass(frozen=True)
class Case:
    """An operator with its attributes, its operands, and what it computes, in torch."""

    op: str
    inputs: Inputs
    exact: Callable[..., Any]
    attributes: dict[str, Any] = field(default_factory=dict)
    domain: str = ""
    opset: int = 22
    outputs: int = 1


def _resized(mode: str, **options: Any) -> Callable[..., Any]:
    return lambda x, _roi, _scales, size: F.interpolate(x, size=size.tolist()[2:], mode=mode, **options)


def _lstm(x: torch.Tensor, *_: Any) -> torch.Tensor:
    """The sweep's LSTM: its output gate is sigmoid(x), its candidate tanh(x), its input gate nearly open."""
    cell = torch.sigmoid(torch.tensor(30.0, dtype=x.dtype)) * torch.tanh(x)
    return (torch.sigmoid(x) * torch.tanh(cell)).unsqueeze(1)


def _gru(x: torch.Tensor, *_: Any) -> torch.Tensor:
    """Update gate sigmoid(x), candidate tanh(x)."""
    return ((1 - torch.sigmoid(x)) * torch.tanh(x)).unsqueeze(1)


def steps(weights: Sequence[float], biases: Sequence[float]) -> Inputs:
    """One step of a recurrent layer of one number, whose gates are given the number itself."""

    def make(dtype: str, rng: np.random.Generator, points: int) -> Iterator[tuple[Array | None, ...]]:
        one = DTYPES[dtype]
        for (x,) in everywhere()(dtype, rng, points // 8):  # type: ignore[misc]
            bias = np.array([[*biases, *(0.0,) * len(biases)]], one)
            recurrent = np.zeros((1, len(weights), 1), one)
            yield x.reshape(1, -1, 1), np.array(weights, one).reshape(1, -1, 1), recurrent, bias

    return make


def constants(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return rng.standard_normal(shape[1])


def variances(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return rng.random(shape[1]) * 4 + 1e-3


def of_row(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return rng.standard_normal(shape[-1])


def last_axis(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return np.array([len(shape) - 1], np.int64)


def powers(dtype: str, rng: np.random.Generator, points: int) -> Iterator[tuple[Array | None, ...]]:
    for (x,) in everywhere(0.0)(dtype, rng, points // 4):  # type: ignore[misc]
        for exponent in (0.5, 2.0, 3.0, -0.5, -1.0, 0.75, 2.2):
            yield x, np.asarray(exponent, DTYPES[dtype])


def _keep(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, axes: function(x, -1, keepdim=True)


#: As the standard has them, in float32.
_SELU = float(np.float32(1.05070102214813232421875)), float(np.float32(1.67326319217681884765625))
_QUICK, e = float(np.float32(1.702)), everywhere
CASES = [
    Case("Sigmoid", e(), torch.sigmoid),
    Case("HardSigmoid", e(), lambda x: (0.2 * x + 0.5).clamp(0, 1)),
    Case("HardSigmoid", e(), lambda x: (float(np.float32(1 / 6)) * x + 0.5).clamp(0, 1), {"alpha": 1 / 6, "beta": 0.5}),
    Case("HardSwish", e(), lambda x: x * (x / 6 + 0.5).clamp(0, 1)),
    Case("Tanh", e(), torch.tanh),
    Case("Erf", e(), torch.special.erf),
    Case("Exp", e(), torch.exp),
    Case("Log", e(0.0), torch.log),
    Case("Sqrt", e(0.0), torch.sqrt),
    Case("Reciprocal", e(), torch.reciprocal),
    Case("Pow", powers, torch.pow),
    Case("Gelu", e(), lambda x: F.gelu(x)),
    Case("Gelu", e(), lambda x: F.gelu(x, approximate="tanh"), {"approximate": "tanh"}),
    Case("QuickGelu", e(), lambda x: x * torch.sigmoid(_QUICK * x), {"alpha": 1.702}, "com.microsoft"),
    Case("FastGelu", e(), lambda x: F.gelu(x, approximate="tanh"), {}, "com.microsoft"),
    Case("Swish", e(), lambda x: x * torch.sigmoid(x), opset=24),
    Case("Softplus", e(), lambda x: torch.logaddexp(x, torch.zeros_like(x))),
    Case("Softsign", e(), lambda x: x / (1 + x.abs())),
    Case("Mish", e(), lambda x: x * torch.tanh(torch.logaddexp(x, torch.zeros_like(x)))),
    Case("Elu", e(), F.elu),
    Case("Elu", e(), lambda x: F.elu(x, 0.5), {"alpha": 0.5}),
    Case("Selu", e(), lambda x: _SELU[0] * torch.where(x > 0, x, _SELU[1] * torch.expm1(x.clamp(max=0)))),
    Case("Celu", e(), F.celu),
    Case("Celu", e(), lambda x: F.celu(x, 2.0), {"alpha": 2.0}),
    Case("Sin", e(), torch.sin),
    Case("Cos", e(), torch.cos),
    Case("Tan", e(), torch.tan),
    Case("Asin", e(-1.0, 1.0), torch.asin),
    Case("Acos", e(-1.0, 1.0), torch.acos),
    Case("Atan", e(), torch.atan),
    Case("Sinh", e(), torch.sinh),
    Case("Cosh", e(), torch.cosh),
    Case("Asinh", e(), torch.asinh),
    Case("Acosh", e(1.0), torch.acosh),
    Case("Atanh", e(-1.0, 1.0), torch.atanh),
    Case("Softmax", rows(), lambda x: torch.softmax(x, -1)),
    Case("Softmax", rows(channels=True), lambda x: torch.softmax(x, 1), {"axis": 1}),
    Case("LogSoftmax", rows(), lambda x: torch.log_softmax(x, -1)),
    Case("LayerNormalization", rows(of_row, of_row), lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b, 1e-5)),
    Case("RMSNormalization", rows(of_row), lambda x, w: F.rms_norm(x, x.shape[-1:], w, 1e-5), opset=23),
    Case("InstanceNormalization", rows(constants, constants, channels=True), lambda x, w, b: F.group_norm(x, 4, w, b)),
    Case("GroupNormalization", rows(constants, constants, channels=True),
        lambda x, w, b: F.group_norm(x, 2, w, b), {"num_groups": 2}),
    Case("BatchNormalization", rows(constants, constants, constants, variances, channels=True),
        lambda x, w, b, m, v: F.batch_norm(x, m, v, w, b)),
    Case("LpNormalization", rows(), lambda x: torch.nan_to_num(x / x.norm(dim=-1, keepdim=True)), {"axis": -1, "p": 2}),
    Case("LRN", lambda *of: ((x,) for x, *_ in images(*of)),
        lambda x: F.local_response_norm(x, 3, 1e-4, 0.75, 1.0), {"size": 3}),
    Case("ReduceL2", rows(last_axis), _keep(lambda x, d, keepdim: torch.linalg.vector_norm(x, 2, d, keepdim))),
    Case("ReduceLogSumExp", rows(last_axis), _keep(torch.logsumexp)),
    Case("ReduceLogSum", rows(last_axis), lambda x, axes: x.abs().sum(-1, keepdim=True).log()),
    Case("Resize", images, _resized("bilinear"), {"mode": "linear"}),
    Case("Resize", images, _resized("bilinear", align_corners=True),
        {"mode": "linear", "coordinate_transformation_mode": "align_corners"}),
    Case("Resize", images, _resized("bicubic"), {"mode": "cubic", "cubic_coeff_a": -0.75}),
    Case("Resize", images, _resized("bilinear", antialias=True),
        {"mode": "linear", "antialias": 1, "exclude_outside": 1}),
    Case("LSTM", steps([0, 1, 0, 1], [30, 0, -30, 0]), _lstm, {"hidden_size": 1}),
    Case("GRU", steps([1, 0, 1], [0, 30, 0]), _gru, {"hidden_size": 1, "linear_before_reset": 1}),
    Case("RNN", steps([1], [0]), lambda x, *_: torch.tanh(x).unsqueeze(1), {"hidden_size": 1}),
]  # fmt: skip


def session(case: Case, node: onnx.NodeProto, dtype: str, operands: Sequence[Array | None]) -> Any:
    """The operator alone, sizes dynamic, unoptimised, one thread; None where the runtime has no kernel."""
    named = [(n, a) for n, a in zip(node.input, operands) if a is not None]
    fixed = [numpy_helper.from_array(a, n) for n, a in named if a.dtype == np.int64]
    inputs = [
        helper.make_tensor_value_info(n, ONNX_TYPES[dtype], [None] * a.ndim) for n, a in named if a.dtype != np.int64
    ]
    output = helper.make_tensor_value_info("y", ONNX_TYPES[dtype], None)
    graph = helper.make_graph([node], "one", inputs, [output], fixed)
    opsets = [helper.make_opsetid(domain, case.opset if not domain else version) for domain, version in OPSETS.items()]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=11)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    try:
        return onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    except Exception as error:
        if "NOT_IMPLEMENTED" in str(error) or "Type Error" in str(error):
            return None
        raise


def runs(case: Case, dtype: str, points: int) -> Iterator[tuple[Attributes, tuple[Array | None, ...], Array, Array]]:
    """(attributes, operands, what the runtime computes, what is exact), in float64, of every set of operands."""
    rng, opened = np.random.default_rng(0), {}
    for given in case.inputs(dtype, rng, points):
        if case.op == "ReduceLogSum":
            given = np.abs(given[0]), given[1]  # type: ignore[arg-type]
        names = [f"x{i}" if a is not None else "" for i, a in enumerate(given)]
        node = helper.make_node(case.op, names, ["y"], domain=case.domain, **case.attributes)
        sizes = tuple(a.tobytes() for a in given if a is not None and a.dtype == np.int64)
        if sizes not in opened:
            opened[sizes] = session(case, node, dtype, given)
        if opened[sizes] is None:
            return
        feeds = {n: a for n, a in zip(names, given) if a is not None and a.dtype != np.int64}
        (got,) = opened[sizes].run_with_ort_values(["y"], {n: _to_ort(a) for n, a in feeds.items()})
        wide = [None if a is None else a if a.dtype == np.int64 else a.astype(np.float64) for a in given]
        with torch.no_grad():
            exact = case.exact(*(None if a is None else torch.from_numpy(a) for a in wide)).numpy()
        held = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        at = Attributes({n: v.decode() if isinstance(v, bytes) else v for n, v in held.items()}, case.opset, 1)
        (own,) = node_evaluator(node, {"": case.opset, "com.microsoft": 1})(dict(zip(names, wide)))
        size = magnitude(case.op, at, tuple(wide), exact)
        with np.errstate(all="ignore"):
            if (np.abs(own - exact) > 1e-12 * (size + np.abs(exact))).any():
                raise AssertionError(f"{case.op}: bnfold's evaluation is not torch's")
        yield at, tuple(wide), _from_ort(got).astype(np.float64), exact


def errors(case: Case, dtype: str, points: int) -> Iterator[tuple[Array, Array, Array]]:
    """(error in units of the roundoff, |exact|, magnitude) of every element where the exact result is finite."""
    for at, operands, got, exact in runs(case, dtype, points):
        size = np.broadcast_to(magnitude(case.op, at, operands, exact), exact.shape)
        finite = np.abs(exact) < float(ml_dtypes.finfo(DTYPES[dtype]).max) * (1 - 2 * UNITS[dtype])
        with np.errstate(all="ignore"):
            off = np.maximum(np.abs(got - exact) - SMALLEST[dtype], 0) / UNITS[dtype]
        yield off[finite], np.abs(exact[finite]), size[finite]


def measure(dtype: str, points: int, wanted: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """A row per operator that the runtime has a kernel for, its cases together."""
    for op in dict.fromkeys(case.op for case in CASES if not wanted or case.op in wanted):
        parts = [part for case in CASES if case.op == op for part in errors(case, dtype, points)]
        if not parts:
            continue
        off, exact, size = (np.concatenate([p[i].ravel() for p in parts]) for i in range(3))
        if not np.isfinite(off).all():
            print(f"{op} {dtype}: {np.count_nonzero(~np.isfinite(off))} not finite", file=sys.stderr)
        with np.errstate(all="ignore"):
            ratio = np.where(off > 0, off / exact, 0.0)
            relative = float(ratio.max())
            absolute = 0.0
            if not relative <= RELATIVE:
                simple = MAGNITUDES.get(op, _one) in (_one, _operand)
                relative = max(float(ratio[exact >= size].max(initial=0.0)) if simple else 0.0, 1.0)
                absolute = float(np.where(off > 0, np.maximum(off - relative * exact, 0) / size, 0.0).max())
        yield {"op": op, "dtype": dtype, "absolute": _up(absolute), "relative": _up(relative), "numbers": off.size}


def _up(number: float) -> float:
    """To two digits, never down."""
    return float(f"{number * 1.05:.2g}") if np.isfinite(number) else number


def joined(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The larger of two tables' numbers, row by row."""
    rows = {(row["op"], row["dtype"]): row for row in old}
    for row in new:
        known = rows.get((row["op"], row["dtype"]), row)
        rows[row["op"], row["dtype"]] = {
            k: max(known[k], v) if isinstance(v, int | float) else v for k, v in row.items()
        }
    return [rows[key] for key in sorted(rows)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="join what is measured to the committed table")
    parser.add_argument("--processor", default="AVX-512", help="whose instructions these kernels use")
    parser.add_argument("--points", type=int, default=400_000, help="numbers per operator in float32")
    parser.add_argument("--only", nargs="*", default=[], metavar="OPERATOR")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    for dtype in DTYPES:
        for row in measure(dtype, options.points, options.only):
            numbers = f"absolute {row['absolute']:<8g}relative {row['relative']:<8g}{row['numbers']:>10}"
            print(f"{row['op']:28}{dtype:10}{numbers}", flush=True)
            found.append(row)
    if not options.write:
        return
    old = json.loads(PATH.read_text()) if PATH.exists() else {"processors": [], "entries": []}
    whole = {
        "about": "scripts/operator_accuracy.py; what the numbers multiply: bnfold/gate/operator_bounds.py",
        "onnxruntime": onnxruntime.__version__,
        "onnx": onnx.__version__,
        "torch": torch.__version__,
        "provider": "CPUExecutionProvider",
        "processors": sorted({*old["processors"], options.processor}),
        "date": datetime.date.today().isoformat(),
        "safety": SAFETY,
    }
    rows = ",\n  ".join(json.dumps(row) for row in joined(old["entries"], found))
    head = json.dumps(whole, indent=1)
    PATH.write_text(f'{head[:-2]},\n "entries": [\n  {rows}\n ]\n}}\n')


if __name__ == "__main__":
    main()
