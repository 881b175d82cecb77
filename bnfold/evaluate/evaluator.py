"""An ONNX file in float64: onnx's own reference evaluator, on float64 constants and inputs, torch for what is heavy.

Nothing of the file is rounded on the way but what it stores: its constants and attributes are what they are, casts to
narrower floats keep float64. Values go as soon as nobody reads them any more, weights are raised where they are read.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from onnx.reference.ops._op_list import load_op
from torch import Tensor

from bnfold.aten.deciding import Deciding
from bnfold.errors import BnfoldError, InputError, ResourceError
from bnfold.evaluate.attributes import Attributes
from bnfold.evaluate.deciding import deciding
from bnfold.evaluate.limits import MAX_ELEMENTS, asked
from bnfold.evaluate.nodes import OPERATORS, tensor
from bnfold.evaluate.reading import inlined, outer_names, qualified, raised
from bnfold.evaluate.subject import Array, Run, Turn, ValueInfo
from bnfold.evaluate.weights import Weight, spread_out, weights_of
from bnfold.rounding import disturb
from bnfold.runtime.model_file import read_model

#: By the name of the dtype.
EPSILONS = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}
_FLOATS = {onnx.TensorProto.DataType.Value(n) for n in ("FLOAT16", "BFLOAT16", "FLOAT", "DOUBLE")}
#: Operators whose operands beside the first say how large a result is.
_SIZING = {"Resize", "Upsample", "Range"}
#: Operators that move elements alone: their weights are raised after the move, not before it.
_PICKING = {"Gather", "GatherElements", "GatherND", "Slice", "Constant", "Identity", "Shape", "Size"}


#: A node, what it reads by name, and its results -> the results that take their place.
After = Callable[[onnx.NodeProto, Mapping[str, Any], Sequence[Any]], Sequence[Any]]


class MissingOperatorError(InputError):
    """The file holds an operator that cannot be computed in float64; ``operator`` is its name with its domain."""

    def __init__(self, operator: str, node: str, where: str) -> None:
        super().__init__(
            f"its operator {operator} (node '{node}') cannot be computed in float64: onnx has no reference for it",
            where=where,
            hint="Check the file without it, or write it as a function of standard operators",
        )
        self.operator = operator


@dataclass
class _Watch:
    """What one run is asked for beyond its outputs."""

    keep: Collection[str] = ()
    follow: Mapping[str, Array] = field(default_factory=dict)
    decide: bool = False
    jitter: tuple[float | None, int] | None = None
    rounds: Collection[str] = ()
    after: After | None = None
    kept: dict[str, Array] = field(default_factory=dict)
    decided: dict[str, Array] = field(default_factory=dict)
    turns: list[Turn] = field(default_factory=list)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)


class File64:
    """A file as a witness: flat inputs by name -> outputs, every float of them float64.

    Args:
        model: path of an ONNX file, or a model; it is not changed.
        beside: the folder of a model's external data.
        weights: its initializers, where they have been read already.
        where: what errors call a model.

    Attributes:
        rounds: names of dtypes to which casts round; to all others they let a float64 be.
        inputs: those that a run needs; an initializer that is an input as well has its own value unless one is given.
        outputs: in the file's order.

    Raises:
        InputError: it is no ONNX file, or its external data are missing or outside its folder.
        MissingOperatorError: an operator has no implementation.
    """

    def __init__(
        self,
        model: onnx.ModelProto | str | os.PathLike[str],
        *,
        beside: Path | None = None,
        weights: Mapping[str, Weight] | None = None,
        where: str = "the model",
    ) -> None:
        self.name = "the file in float64"
        self.rounds: Collection[str] = ()
        self._where = where if isinstance(model, onnx.ModelProto) else os.fspath(model)
        if not isinstance(model, onnx.ModelProto):
            path, beside = Path(model), Path(model).parent
            model = read_model(path, light=True)
        weights = weights_of(model, beside) if weights is None else weights
        self.inputs = tuple(_value_info(v) for v in model.graph.input if v.name not in weights)
        self.outputs = tuple(_value_info(v) for v in model.graph.output)
        #: Whether the inputs are all that rounding can disturb.
        self._bare = not any(
            t.data_type in _FLOATS and math.prod(t.dims) > 1
            for t in (
                *model.graph.initializer,
                *(t.values for t in model.graph.sparse_initializer),
                *(a.t for n in model.graph.node for a in n.attribute if a.HasField("t")),
            )
        )
        self._evaluator = Evaluator(_weightless(model), where=self._where)
        self._evaluator.rt_inits_.update(weights)  # type: ignore[arg-type]

    def run(
        self,
        inputs: Mapping[str, Array],
        keep: Collection[str] = (),
        *,
        follow: Mapping[str, Array] | None = None,
        decide: bool = False,
        jitter: tuple[float | None, int] | None = None,
        after: After | None = None,
    ) -> Run:
        """One run.

        Args:
            inputs: arrays by name; floats of any width.
            keep: names of values, of the main graph, to return as well.
            follow: what somebody else's run decided, by the names of the values that hold decisions (indices, truth
                values, rounded numbers): forced into this run where its shape fits, and told in ``turns`` where this
                run would have decided otherwise.
            decide: return every decision on floats in ``decided``.
            jitter: disturbs every floating-point constant and attribute by up to half of this epsilon, relative, or
                where it is None by half of that of its own dtype: what rounding it once does. With the seed of that.
            after: makes of every node's results, from it and what it reads by name, those that are gone on with.
                The inputs of a file without weights are disturbed as weights are.

        Raises:
            InputError: an input is missing, or an operator fails on these, which is named.
            ResourceError: the memory does not suffice.
        """
        if missing := [value.name for value in self.inputs if value.name not in inputs]:
            raise InputError(f"nothing is given for input {', '.join(missing)}", where=self._where)
        if jitter is not None and self._bare:
            inputs = {name: _disturbed(name, x, *jitter) for name, x in inputs.items()}
        watch = _Watch(set(keep), follow or {}, decide, jitter, rounds=self.rounds, after=after)
        with np.errstate(all="ignore"), torch.no_grad():
            outputs = self._evaluator.run(None, {n: raised(x) for n, x in inputs.items()}, watch=watch)
        return Run(tuple(raised(x) for x in outputs), watch.kept, watch.decided, tuple(watch.turns), watch.shapes)

    def epsilon(self) -> float:
        """The epsilon of the finest dtype that an initializer is stored in; that of float32 where there is none."""
        dtypes = [weight.dtype for weight in self.weights().values()]
        return min((EPSILONS[dtype] for dtype in dtypes if dtype in EPSILONS), default=EPSILONS["float32"])

    def halves(self) -> set[str]:
        """The dtypes of half the width that it has values of: as constants, or as what a cast makes."""
        casts: set[int] = {node.to for node in self._evaluator.rt_nodes_ if node.op_type == "Cast"}
        made = {onnx.helper.tensor_dtype_to_np_dtype(to).name for to in casts}
        return {"float16", "bfloat16"} & (made | {weight.dtype for weight in self.weights().values()})

    def weights(self) -> dict[str, Weight]:
        """Its initializers by name."""
        held: Mapping[str, Any] = self._evaluator.rt_inits_
        return {name: w for name, w in held.items() if isinstance(w, Weight)}

    def nodes(self) -> list[onnx.NodeProto]:
        """The nodes of its main graph."""
        return [node.onnx_node for node in self._evaluator.rt_nodes_]

    def shapes(self, inputs: Mapping[str, Array]) -> dict[str, tuple[int, ...]]:
        """The shape of every value that nodes of the main graph compute, from one run.

        Raises:
            BnfoldError: as for ``run``.
        """
        return dict(self.run(inputs).shapes)


def _rounded(value: Any, to: int, dtypes: Collection[str]) -> Any:
    """A value as a cast leaves it where that rounds, in float64."""
    dtype = onnx.helper.tensor_dtype_to_np_dtype(to)
    halved = dtype.name in dtypes and isinstance(value, np.ndarray) and value.dtype == np.float64
    return value.astype(dtype).astype(np.float64) if halved else value


def _weightless(model: onnx.ModelProto) -> onnx.ModelProto:
    light = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    if model.functions:
        # Functions in any order, and their values visible by name.
        light.functions.extend(model.functions)
    graph = light.graph
    graph.node.extend(model.graph.node)
    graph.input.extend(model.graph.input)
    graph.output.extend(model.graph.output)
    for part in (*light.opset_import, *graph.node):
        part.domain = "" if part.domain == "ai.onnx" else part.domain  # two names of one domain
    spread_out(graph, *light.functions)
    return inlined(light)


def _value_info(value: onnx.ValueInfoProto) -> ValueInfo:
    kind = value.type.tensor_type
    dims = kind.shape.dim
    shape = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in dims)
    known = kind.elem_type in onnx.TensorProto.DataType.values()[1:] and kind.elem_type != onnx.TensorProto.STRING
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type) if known else np.dtype(object)
    return ValueInfo(value.name, dtype, shape)


# ---- the evaluator ---------------------------------------------------------------------------------------------------


class Evaluator(ReferenceEvaluator):
    """A graph, the body of a control flow operator or a function."""

    def __init__(self, proto: Any, *, new_ops: Any = None, where: str = "", **options: Any) -> None:
        self._where = where
        try:
            super().__init__(proto, **options)
        except BnfoldError:
            raise
        except Exception as error:  # attributes of other names and kinds than the operators'
            text = " ".join(str(error).split())[:200] or type(error).__name__
            raise InputError(f"an operator's attributes cannot be read: {text}", where=where) from error
        reads = [(*node.input, *outer_names(node)) for node in self.nodes_]
        last = {name: i for i, names in enumerate(reads) for name in names}
        outputs = set(self.output_names)
        self._dead: list[list[str]] = [[] for _ in reads]
        for name, i in last.items():
            if name and name not in outputs:
                self._dead[i].append(name)
        self._read = set(last) | outputs
        #: Numbers that sizes are computed from.
        sizing = [node for node in self.nodes_ if node.op_type in _SIZING]
        self._exact = {n for node in sizing for n in node.input[node.op_type != "Range" :]}

    def _init(self) -> None:
        self.new_ops_ = OPERATORS  # which the base would go through once for every node
        super()._init()

    def _load_impl(self, node: onnx.NodeProto, input_types: Any = None) -> Any:
        try:
            if node.op_type == "DequantizeLinear" and not node.domain and self.opsets[""] < 19:
                return load_op("", node.op_type, 19)  # which takes more types; onnx has none from before
            return super()._load_impl(node, input_types)
        except (NotImplementedError, RuntimeError) as error:
            if type(error).__name__ == "RuntimeContextError":
                raise
            operator = qualified(node)
            raise MissingOperatorError(operator, node.name or next(iter(node.output), ""), self._where) from error

    def run(  # type: ignore[override]
        self, output_names: Any, feed_inputs: Mapping[str, Any], attributes: Any = None, *, watch: _Watch | None = None,
        **_: Any,
    ) -> Any:  # fmt: skip
        """The outputs; values that enclosing graphs have computed are among the inputs."""
        watch = watch or _Watch()
        values: dict[str, Any] = {"": None}
        values.update(feed_inputs)
        own = set(self.input_names)
        values.update((name, value) for name, value in self.rt_inits_.items() if name not in own or name not in values)
        for node, dead in zip(self.rt_nodes_, self._dead):
            results = (
                self._drawn(node, values, attributes, *watch.jitter)
                if watch.jitter
                else self._compute(node, values, attributes)
            )
            if watch.rounds and node.op_type == "Cast":
                results = [_rounded(x, node.to, watch.rounds) for x in results]
            if watch.after is not None:
                read = {n: _stored(values[n]) for n in node.input if n}
                results = watch.after(node.onnx_node, read, results)
            if watch.follow or watch.decide:
                results = _decided(node, values, results, watch)
            for name, value in zip(node.output, results):
                if isinstance(value, np.ndarray):
                    watch.shapes[name] = value.shape
                if name in self._read or name in watch.keep:
                    values[name] = value
                if name in watch.keep:
                    watch.kept[name] = value
            for name in dead:
                values.pop(name, None)
        return [_stored(values[name]) for name in output_names or self.output_names]

    def _drawn(
        self, node: OpRun, values: Mapping[str, Any], attributes: Any, epsilon: float | None, seed: int
    ) -> Sequence[Any]:
        """The results of a node whose constants and attributes are disturbed."""
        weights = [n for n in node.input if isinstance(values.get(n), Weight) and n not in self._exact]
        drawn = {n: _disturbed(n, values[n], epsilon, seed) for n in weights}
        label = next(iter(node.output), "")
        plain = {n: x for n in node.attributes_names_ if isinstance(x := getattr(node, n, None), float)}
        for name, x in plain.items():
            setattr(node, name, float(_disturbed(f"{label} {name}", np.float32(x), epsilon, seed)))
        try:
            results = self._compute(node, {**values, **drawn} if drawn else values, attributes)
        finally:
            for name, x in plain.items():
                setattr(node, name, x)
        if node.op_type == "Constant" and label not in self._exact:
            return [_disturbed(label, results[0], epsilon or EPSILONS["float32"], seed)]
        return results

    def _compute(self, node: OpRun, values: Mapping[str, Any], attributes: Any) -> Sequence[Any]:
        more = {"linked_attributes": attributes} if node.has_linked_attribute and attributes else {}
        if node.need_context():
            more["context"] = values
        label = f"{node.op_type} '{node.onnx_node.name or next(iter(node.output), '')}'"
        try:
            read = [_stored(values[name]) for name in node.input]
            if node.op_type not in _PICKING:
                read = [raised(x) for x in read]
            if not node.domain and asked(node.op_type, read) > MAX_ELEMENTS:
                raise MemoryError
            results: Sequence[Any] = [raised(x) for x in node.run(*read, **more)]  # type: ignore[no-untyped-call]
        except BnfoldError:
            raise
        except MemoryError as error:
            raise ResourceError(f"the memory does not suffice for {label}", where=self._where) from error
        except KeyError as error:
            raise InputError(f"{label} reads {error}, which nothing computes", where=self._where) from error
        except Exception as error:
            # The reference wraps what really happened.
            inner = error.__cause__ or error
            text = " ".join(str(inner).split())[:200]
            if "can't allocate memory" in text:
                raise ResourceError(f"the memory does not suffice for {label}", where=self._where) from error
            raise InputError(f"{label} fails in float64: {text or type(inner).__name__}", where=self._where) from error
        return results


def _disturbed(name: str, weight: Any, epsilon: float | None, seed: int) -> Any:
    """A constant, each element off by up to half an epsilon. A short number alone is none that was rounded."""
    array: Any = _stored(weight)
    dtype = getattr(getattr(array, "dtype", None), "name", "")
    if dtype not in EPSILONS or (np.size(array) == 1 and _is_short(float(array.reshape(())))):
        return array
    moved = np.array(array, np.float64, order="C")
    disturb(moved, EPSILONS[dtype] if epsilon is None else epsilon, name, seed)
    return moved


def _is_short(number: float) -> bool:
    """Whether five bits of mantissa hold it: 2, 0.5, 6, an exponent, a limit."""
    return not np.isfinite(number) or float(np.frexp(number)[0] * 32).is_integer()


def _stored(value: Any) -> Any:
    return value.array() if isinstance(value, Weight) else value


def _decided(node: OpRun, values: Mapping[str, Any], results: Sequence[Any], watch: _Watch) -> Sequence[Any]:
    """The results of a node that decides on floats, after somebody else's decision where one is to be followed."""
    explicit = {a.name: getattr(node, a.name) for a in node.onnx_node.attribute if hasattr(node, a.name)}
    attributes = Attributes(explicit, 0, len(node.output))
    read = [raised(_stored(values[name])) for name in node.input]
    found = deciding(qualified(node.onnx_node), attributes, read)
    if found is None:
        return results
    rule, at = found
    item = rule.item or 0
    if item >= len(node.output) or not node.output[item]:
        return results
    name, own = node.output[item], [tensor(x) for x in results]
    theirs = watch.follow.get(name)
    if theirs is not None and theirs.shape == own[item].shape:
        results = _followed(node, name, rule, at, own, tensor(theirs), watch)
    if watch.decide:
        watch.decided[name] = results[item]
    return results


def _followed(
    node: OpRun, name: str, rule: Deciding, at: Mapping[str, Any], own: list[Tensor], theirs: Tensor, watch: _Watch
) -> Sequence[Any]:
    mine = own[rule.item or 0]
    differs = rule.differs(mine, theirs)
    compared = rule.compared(at).numpy()
    if not bool(differs.any()):
        watch.turns.append(Turn(name, node.op_type, np.zeros(1), 0, compared))
        return [x.numpy() for x in own]
    gap = rule.gap(at, mine, theirs)
    watch.turns.append(Turn(name, node.op_type, gap.numpy(), int(differs.sum()), compared))
    result = rule.result(at, own[0] if rule.item is None else own, theirs)
    return [x.numpy() for x in (result if isinstance(result, tuple) else (result,))]
