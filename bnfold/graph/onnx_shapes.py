"""Concrete shapes of all values of an ONNX file, at generic sizes of its dynamic dimensions.

onnx infers what it can, in a process of its own: what its C++ asserts of a file ends that process and not this one. The
rest is read off a run. What a file computes from shapes alone (the targets of its
reshapes) is known then too.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import signal
import struct
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from bnfold.errors import BnfoldError, InputError
from bnfold.evaluate.reading import outer_names
from bnfold.evaluate.single import node_evaluator
from bnfold.evaluate.subject import Array
from bnfold.evaluate.weights import Weight
from bnfold.semantics.sizes import WAYS

#: What computes a node: values by name -> one result per output.
Evaluator = Callable[[Mapping[str, Array]], list[Any]]
_BATCHES, _PRIMES = (2, 3, 5), (37, 41, 53)
#: First axes, and others: multiples of nothing first, then what strides of 32 take, long first axes that are no batch.
_SIZES = (
    (_BATCHES, _PRIMES),
    (_BATCHES, (96, 160, 128)),
    (_PRIMES, _PRIMES),
    (_BATCHES, (224, 256, 288)),
    (_BATCHES, (1, 2, 3)),
)
#: A value of more elements is no shape, and one of floats no scales of axes.
_SMALL, _SCALES = 1024, 8
#: What inferring shapes may take beyond what is in use already.
MEMORY, SECONDS = 1 << 30, 60
#: Before an answer: whether it is an error, and how many bytes it is.
_HEAD = struct.Struct("?Q")
#: Types of sizes.
_WHOLE = {onnx.TensorProto.INT64, onnx.TensorProto.INT32}
#: Operators on sizes.
_ON_SIZES = (
    "Gather Slice Concat Unsqueeze Squeeze Cast Add Sub Mul Div Mod Reshape Identity Equal Where Floor Ceil Neg Min "
    "Max ReduceProd ReduceMin Range ConstantOfShape Constant Expand Transpose Sqrt Pow Greater Less And Or Not Split "
    "Flatten Tile"
)
_SIZED = frozenset(_ON_SIZES.split())


@dataclass
class Known:
    """What is known of values by name: element types, shapes, and values that follow from shapes."""

    types: dict[str, int] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    values: dict[str, Array] = field(default_factory=dict)

    def tensor(self, name: str) -> onnx.TensorProto:
        """A value, of the type that it has in the file."""
        dtype = onnx.helper.tensor_dtype_to_np_dtype(self.types[name])
        return onnx.numpy_helper.from_array(self.values[name].astype(dtype), name)


class Shapes:
    """What is known of a file's values, at ``WAYS`` ways of sizes where any is dynamic."""

    def __init__(self, model: onnx.ModelProto, weights: Mapping[str, Weight]) -> None:
        self._model, self._weights = model, weights
        dims = [d for v in model.graph.input if v.name not in weights for d in v.type.tensor_type.shape.dim]
        self._ways = WAYS if any(dim.dim_value <= 0 for dim in dims) else 1
        read = {name for node in model.graph.node for name in (*node.input, *outer_names(node))}
        read |= {value.name for value in model.graph.output}
        read.discard("")
        self._made = [name for node in model.graph.node for name in node.output if name in read]
        #: By way, where all of it was asked for.
        self.known: dict[int, Known] = {}
        self._choices = [*((each, True) for each in range(len(_SIZES))), (0, False)]
        self._inferences: dict[tuple[int, bool], list[Known | ValueError]] = {}
        self._runs: dict[str, Evaluator] = {}

    def at(self, way: int) -> Known:
        """What is known at one way of sizes.

        Raises:
            InputError: onnx finds the file inconsistent at every size.
        """
        way = min(way, self._ways - 1)
        if way not in self.known:
            self.known[way] = self._found(way)
        return self.known[way]

    def having(self, name: str, way: int) -> Known:
        """What is known at a way, the shape of one value at least, and no run made for it that it does not take."""
        way = min(way, self._ways - 1)
        inferred = self._inferred(*self._choices[0])[way] if way and way not in self.known else None
        enough = isinstance(inferred, Known) and (name in inferred.shapes or name not in self.at(0).shapes)
        return inferred if enough else self.at(way)  # type: ignore[return-value]

    def _found(self, way: int) -> Known:
        error, best = None, None
        for choice in self._choices:
            if best is not None and not choice[1]:
                break
            known = self._inferred(*choice)[way]
            if isinstance(known, ValueError):
                error = error or known
                continue
            whole = self._run_for_missing(known, choice, way)
            if best is None or len(known.shapes) > len(best[0].shapes):
                best = known, choice
            if whole:
                break
        if best is None:
            raise InputError(f"onnx cannot infer its shapes: {' '.join(str(error).split())[:200]}")
        if not way:  # what goes at first goes best at the others
            self._choices = [best[1], *(choice for choice in self._choices if choice != best[1])]
        return best[0]

    def _inferred(self, sizes: int, strict: bool) -> list[Known | ValueError]:
        """What is known of all ways without a run: inferred again, once more sizes are known, as long as that helps."""
        if (sizes, strict) not in self._inferences:
            batches, others = _SIZES[sizes]
            found: list[Known | ValueError] = [Known() for _ in range(self._ways)]
            helped = True
            while helped:
                lights = [
                    _light(self._model, self._weights, batch, size, known)
                    for batch, size, known in zip(batches, others, found)
                    if isinstance(known, Known)
                ]
                answers, helped = iter(infer(lights, strict=strict)), False
                for way, before in enumerate(found):
                    if isinstance(before, ValueError):
                        continue
                    answer = next(answers)
                    now = answer if isinstance(answer, ValueError) else self._with_sizes(_read(answer))
                    more = isinstance(now, Known) and len(now.values) > len(before.values) and self._missing(now)
                    found[way], helped = now, helped or more
            self._inferences[sizes, strict] = found
        return self._inferences[sizes, strict]

    def _missing(self, known: Known) -> bool:
        """Whether the shape of a value that somebody reads is not known."""
        return any(name not in known.shapes for name in self._made)

    def _run_for_missing(self, known: Known, choice: tuple[int, bool], way: int) -> bool:
        """Adds the shapes that only a run shows; False where other sizes may show more."""
        if not self._missing(known):
            return True
        from bnfold.evaluate.evaluator import MissingOperatorError  # onnx's reference takes long to import

        (batches, others), model, weights = _SIZES[choice[0]], self._model, self._weights
        try:
            found = _run(model, weights, _light(model, weights, batches[way], others[way], Known()))
        except MissingOperatorError:
            return True
        except BnfoldError:
            return False
        known.shapes |= {name: shape for name, shape in found.items() if name not in known.shapes}
        self._with_sizes(known)
        return True

    def _with_sizes(self, known: Known) -> Known:
        return _with_sizes(known, self._model, self._weights, self._runs)


def _light(
    model: onnx.ModelProto, weights: Mapping[str, Weight], batch: int, size: int, known: Known
) -> onnx.ModelProto:
    """The file without its weights, at those sizes, with values that are ``known`` in place of what computes them."""
    light = onnx.ModelProto(ir_version=max(model.ir_version, 4), opset_import=model.opset_import)
    light.functions.extend(model.functions)
    graph = light.graph
    graph.name = model.graph.name
    for node in model.graph.node:
        if node.op_type != "Constant" and all(name in known.values and name in known.types for name in node.output):
            graph.initializer.extend(map(known.tensor, node.output))
            continue
        held = node.attribute[0].t if node.op_type == "Constant" and node.attribute else onnx.TensorProto()
        if math.prod(held.dims) > _SMALL:
            graph.input.append(onnx.helper.make_tensor_value_info(node.output[0], held.data_type, list(held.dims)))
        else:
            graph.node.append(node)
    graph.output.extend(onnx.ValueInfoProto(name=v.name, type=_rankless(v.type)) for v in model.graph.output)
    sizes: dict[str, int] = {}
    for value in model.graph.input:
        if value.name in weights:
            continue
        mine = graph.input.add()
        mine.CopyFrom(value)
        for axis, dim in enumerate(mine.type.tensor_type.shape.dim):
            if not dim.HasField("dim_value") or dim.dim_value <= 0:
                key = dim.dim_param or f"{value.name}.{axis}"
                dim.dim_value = sizes.setdefault(key, batch if axis == 0 else size + len(sizes) * (size % 32 != 0))
    for tensor in model.graph.initializer:
        if math.prod(tensor.dims) <= (_SMALL if tensor.data_type in _WHOLE else _SCALES):
            graph.initializer.append(onnx.numpy_helper.from_array(np.array(weights[tensor.name].array()), tensor.name))
        else:
            graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    for sparse in model.graph.sparse_initializer:
        held = sparse.values
        graph.input.append(onnx.helper.make_tensor_value_info(held.name, held.data_type, list(sparse.dims)))
    return light


def _rankless(kind: onnx.TypeProto) -> onnx.TypeProto:
    """A type without its shape, which may be of other sizes."""
    found = onnx.TypeProto()
    found.CopyFrom(kind)
    if found.HasField("tensor_type"):
        found.tensor_type.ClearField("shape")
    return found


def _read(model: onnx.ModelProto) -> Known:
    known = Known()
    for value in (*model.graph.input, *model.graph.value_info, *model.graph.output):
        kind = value.type.tensor_type
        if not value.type.HasField("tensor_type"):
            continue
        known.types[value.name] = kind.elem_type
        dims = kind.shape.dim
        if kind.HasField("shape") and all(dim.HasField("dim_value") for dim in dims):
            known.shapes[value.name] = tuple(dim.dim_value for dim in dims)
    for tensor in model.graph.initializer:
        known.types[tensor.name], known.shapes[tensor.name] = tensor.data_type, tuple(tensor.dims)
    return known


def _with_sizes(
    known: Known, model: onnx.ModelProto, weights: Mapping[str, Weight], runs: dict[str, Evaluator]
) -> Known:
    """With the values that follow from shapes."""
    opsets = {"" if o.domain == "ai.onnx" else o.domain: o.version for o in model.opset_import}
    for node in model.graph.node:
        if node.op_type in ("Shape", "Size") and node.input[0] in known.shapes:
            shape = known.shapes[node.input[0]]
            bounds = {a.name: a.i for a in node.attribute}
            part = shape[bounds.get("start", 0) : bounds.get("end", len(shape))]
            value = part if node.op_type == "Shape" else int(np.prod(shape))
            known.values[node.output[0]] = np.array(value, np.int64)
        elif node.op_type in _SIZED and not node.domain and len(node.output) <= 8:
            given = {name: _small(name, known, weights) for name in node.input if name}
            sized = any(name in known.values for name in node.input) or known.types.get(node.output[0]) in _WHOLE
            small = all(math.prod(known.shapes.get(name, (_SMALL + 1,))) <= _SMALL for name in node.output)
            if (sized or node.op_type == "Constant") and small and all(x is not None for x in given.values()):
                run = runs.get(node.output[0])
                if run is None:
                    run = runs[node.output[0]] = node_evaluator(node, opsets)
                known.values |= dict(zip(node.output, run(given)))  # type: ignore[arg-type]
    return known


def _small(name: str, known: Known, weights: Mapping[str, Weight]) -> Array | None:
    if name in known.values:
        return known.values[name]
    weight = weights.get(name)
    return weight.array() if weight is not None and math.prod(known.shapes.get(name, (_SMALL + 1,))) <= _SMALL else None


def _run(model: onnx.ModelProto, weights: Mapping[str, Weight], light: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """The shapes of a run on noise.

    Raises:
        BnfoldError: it fails at these sizes.
    """
    from bnfold.evaluate.evaluator import File64

    rng, feeds = np.random.default_rng(0), dict[str, Any]()
    wanted = {value.name for value in model.graph.input} - weights.keys()
    for value in light.graph.input:
        if value.name not in wanted:
            continue
        if value.type.tensor_type.elem_type not in onnx.TensorProto.DataType.values()[1:]:
            return {}
        dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        if np.prod(shape, dtype=np.float64) > 1 << 27:
            return {}
        feeds[value.name] = (rng.random(shape) > 0.5 if dtype.kind in "iub" else rng.random(shape)).astype(dtype)
    return File64(model, weights=weights).shapes(feeds)


def infer(models: Sequence[onnx.ModelProto], *, strict: bool) -> list[onnx.ModelProto | ValueError]:
    """The models, without weights, with the types and shapes of their values; an error in place of one onnx fails on.

    All in one process: to begin it takes longer than they do. ``strict``: a value that does not fit its operator is an
    error; else it is left out.
    """
    if sys.platform == "win32":
        return [_inferred(model, strict) for model in models]
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads: none of them is needed below
        child = os.fork()
    if not child:
        # Nothing of the parent's is collected here: a session would wait for threads that this process has not.
        gc.disable()
        with contextlib.suppress(BaseException):
            os.close(reading)
            _limit()
            with os.fdopen(writing, "wb") as pipe:
                for model in models:
                    found = _inferred(model, strict)
                    failed = isinstance(found, ValueError)
                    content = str(found).encode(errors="replace") if failed else found.SerializeToString()  # type: ignore
                    pipe.write(_HEAD.pack(failed, len(content)) + content)
                    pipe.flush()
        os._exit(0)
    os.close(writing)
    answers: list[onnx.ModelProto | ValueError] = []
    try:
        with os.fdopen(reading, "rb") as pipe:
            while len(head := pipe.read(_HEAD.size)) == _HEAD.size:
                failed, size = _HEAD.unpack(head)
                content = pipe.read(size)
                if len(content) == size:
                    answers.append(ValueError(content.decode()) if failed else onnx.ModelProto.FromString(content))
    finally:
        os.waitpid(child, 0)
    return answers + [ValueError("its shape inference fails on the file") for _ in models[len(answers) :]]


def _inferred(model: onnx.ModelProto, strict: bool) -> onnx.ModelProto | ValueError:
    try:
        found: onnx.ModelProto = onnx.shape_inference.infer_shapes(model, strict_mode=strict, data_prop=strict)
    except Exception as error:  # of onnx's own, which it does not export
        return ValueError(str(error))
    return found


def _limit() -> None:
    """No more memory and time than shapes can need, no core and no word of a failed assertion."""
    import resource

    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(SECONDS)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    with contextlib.suppress(OSError, ValueError, IndexError):
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        if hard == resource.RLIM_INFINITY or used + MEMORY < hard:
            resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
