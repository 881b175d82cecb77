"""An ONNX file under edit: a mirror of its nodes that the passes read and change, and the way back into the file.

Only what a pass has changed is written: names, the order of inputs and outputs, operator sets, metadata, functions,
bodies and all other nodes and initializers stay what they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, MutableMapping
from dataclasses import replace
from operator import getitem
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, fx

from bnfold.affine import Meaning
from bnfold.errors import InputError
from bnfold.evaluate.weights import SparseWeight, weights_of
from bnfold.graph.graph import Graph, Node
from bnfold.graph.names import free_name
from bnfold.graph.onnx_call import OnnxCall, Operator
from bnfold.graph.onnx_shapes import Known, Shapes
from bnfold.graph.onnx_writing import DTYPES, written
from bnfold.graph.spill import Spill
from bnfold.onnx_ops import TABLE, semantics
from bnfold.report import Entry, Ledger, Refusal
from bnfold.semantics import Semantics, Shape
from bnfold.semantics.build import OPAQUE
from bnfold.semantics.call import Call

#: Constants of more elements are not computed: a file can ask for any number of them.
MAX_ELEMENTS = 1 << 27
#: A value of more elements is taken for one of unknown size: no machine holds it.
MAX_SIZE = 1 << 48
#: Operators of floats whose results are integers, and let gauges pass or do not ask for them.
_ON_FLOATS = {"Shape", "Size", "MaxPool"}


class OnnxGraph(Graph):
    """A file under edit.

    Args:
        model: the file's content without its external data, as ``read_onnx`` lets through; changed by ``finish`` alone.
        beside: the folder of its external data.
    """

    def __init__(self, model: onnx.ModelProto, beside: Path | None) -> None:
        self.model = model
        self.opsets = {o.domain if o.domain != "ai.onnx" else "": o.version for o in model.opset_import}
        self._begin(fx.Graph())
        self._names: dict[Node, str] = {}
        self._weights = weights_of(model, beside)
        self._way, self._inference = 0, Shapes(model, self._weights)
        #: The bytes of constants that the finished file has and does not hold, by name: made when they are asked for.
        self.beside: dict[str, Callable[[], bytes]] = {}
        self._build()
        self.refresh()

    def _build(self) -> None:
        """Mirrors the file: a placeholder per input and initializer, a call per node, an item of several results."""
        graph, known = self.model.graph, self._inference.at(0)
        values: dict[str, Node] = {}
        # Up to IR version 3 every initializer has to be an input, so that being one means nothing.
        fed = {v.name for v in graph.input} if self.model.ir_version >= 4 else set[str]()
        inputs = [v.name for v in graph.input if v.name not in self._weights or v.name in fed]
        for name in dict.fromkeys([*self._weights, *inputs]):
            node = values[name] = self.graph.placeholder(f"v{len(values)}")
            self._note(node, name, known)
            weight = self._weights.get(name)  # a sparse one is read, and never changed: it would not be sparse
            if weight is not None and name not in fed and not isinstance(weight, SparseWeight):
                self._targets[node] = name
        for proto in graph.node:
            operator = Operator(proto, self.opsets)
            reads = [*proto.input, *(n for n in operator.outer if n in values)]
            operator.outer = reads[len(proto.input) :]
            node = self.graph.call_function(operator, tuple(values[n] if n else None for n in reads))
            if len(proto.output) == 1:
                self._note(node, proto.output[0], known)
                values[proto.output[0]] = node
                continue
            node.meta["val"] = []
            for i, name in enumerate(proto.output):
                if name:
                    values[name] = item = self.graph.call_function(getitem, (node, i))
                    self._note(item, name, known)
        self.graph.output(tuple(values[v.name] for v in graph.output))
        self._read_before = {name for node, name in self._targets.items() if node.users}
        self._unread = {node for node in self.graph.nodes if not node.users}

    def _note(self, node: Node, name: str, known: Known) -> None:
        self._names[node] = name
        kind = known.types.get(name)
        dtype, shape = None if kind is None else DTYPES.get(kind), known.shapes.get(name)
        known_size = (
            dtype is not None and shape is not None and min(shape, default=0) >= 0 and math.prod(shape) < MAX_SIZE
        )
        node.meta["val"] = torch.empty(shape, dtype=dtype, device="meta") if known_size else None  # type: ignore[arg-type]

    def _having(self, value: Node) -> Known:
        return self._inference.having(self._names.get(value, ""), self._way)

    # -- reading ---------------------------------------------------------------------------------------------------

    def _is_stored(self, node: Node) -> bool:
        return True

    def _may_be_constant(self, node: Node) -> bool:
        value, own = node.meta.get("val"), node.target
        small = isinstance(value, list) or (value is not None and value.numel() <= MAX_ELEMENTS)
        # Quantised weights stay what they are: floats in their place would be four times as large.
        kept = isinstance(own, Operator) and (own.random or own.domain or own.__name__ == "DequantizeLinear")
        return bool(small and not kept)

    def call(self, value: Node) -> Call:
        """The operator application that makes a value."""
        return OnnxCall(self, value)

    def semantics(self, value: Node) -> Semantics:
        """What the operator of a value does, by the table of ONNX."""
        call = OnnxCall(self, value)
        counts = self.is_float(value) or (call.operator in _ON_FLOATS and value.meta.get("val") is not None)
        if not counts or any(n.meta.get("val") is None for _, n in call.slots() if call.operator not in _ON_FLOATS):
            return OPAQUE
        try:
            return semantics(call)
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            # Rows take operands and attributes for what the operator's page says; a file may hold anything.
            text = " ".join(str(error).split())[:200] or type(error).__name__
            raise InputError(f"{call.operator} '{self.module(value)}' does not fit its operands: {text}") from error

    def maker(self, value: Any) -> OnnxCall | None:
        """The application that makes a value; None of an input."""
        return OnnxCall(self, value) if isinstance(value, Node) and value.op == "call_function" else None

    def known(self, value: Node) -> Tensor | None:
        """The value of a node that follows from constants and from shapes; None where it depends on data."""
        if value in self._fixed:
            return self.constant(value)
        array = self._having(value).values.get(self._names.get(value, ""))
        return None if array is None else torch.from_numpy(np.array(array))

    def table(self) -> MutableMapping[Any, Tensor]:
        """Most of it is on disk where a file is large."""
        return Spill()

    def _stored(self, node: Node) -> Tensor:
        if node in self._pending:
            return self._pending[node]
        array = self._weights[self._targets[node]].array()
        if array.dtype.kind not in "iub":
            return torch.from_numpy(array.astype(np.float64))
        return torch.from_numpy(
            array.astype(np.int64) if array.dtype.kind == "u" and array.itemsize > 1 else array.copy()
        )

    def shape(self, value: Node) -> Shape:
        """The shape of a value at the current sizes."""
        found = self._having(value).shapes.get(self._names.get(value, ""))
        return found if found is not None else tuple(value.meta["val"].shape)

    def size(self, value: Node, axis: int) -> int:
        """The size of a value along one axis at the current sizes."""
        return self.shape(value)[axis]

    def is_sized(self, value: Node) -> bool:
        """Whether the sizes of a value are known."""
        return value.meta.get("val") is not None

    def dynamic_axes(self, value: Node) -> tuple[int, ...]:
        """The axes whose size differs from call to call."""
        name, first = self._names.get(value, ""), self.shape(value)
        now, other = self._way, set[int]()
        for way in (1, 2):
            self._way = way
            found = self._having(value).shapes.get(name, first)
            other |= {axis for axis, (a, b) in enumerate(zip(first, found)) if a != b}
        self._way = now
        return tuple(sorted(other))

    def resize(self, way: int) -> None:
        """Takes other sizes for the dynamic dimensions."""
        self._way = way

    def module(self, value: Node) -> str:
        """The module that a node's metadata name, else the node's own name, else that of its first result."""
        operator = OnnxCall(self, value).node.target
        if not isinstance(operator, Operator):
            return self.name(value)
        noted = next((entry.value for entry in operator.node.metadata_props if entry.key == "module"), "")
        return noted or operator.node.name or next(iter(operator.node.output), "")

    def module_class(self, value: Node) -> str:
        """The operator's type."""
        return OnnxCall(self, value).operator

    def name(self, value: Node) -> str:
        """A value's name in the file."""
        return self._names.get(value, value.name)

    def meanings(self) -> dict[str, Meaning | None]:
        """What values stand for, by name, where a pass has said so."""
        alive = set(self.graph.nodes)
        return {self.name(node): meaning for node, meaning in self.stands_for.items() if node in alive}

    def materialise(self) -> None:
        """Nothing: constants that a file computes stay computed where no fold changes them."""

    # -- editing ---------------------------------------------------------------------------------------------------

    def _sum(self, value: Node, constant: Node) -> Node:
        name = free_name(f"{self.name(value)}_added", set(self._names.values()), {})
        proto = onnx.helper.make_node("Add", [self.name(value), ""], [name], name=name)
        added = self.graph.call_function(Operator(proto, self.opsets), (value, constant))
        self._names[added] = name
        self.take_shape(added, value)
        return added

    def take_shape(self, value: Node, of: Node) -> None:
        """Gives ``value``, whose constants are about to change, the shape of another value."""
        value.meta["val"] = of.meta["val"]
        for known in self._inference.known.values():
            if (shape := known.shapes.get(self.name(of))) is not None:
                known.shapes[self.name(value)] = shape

    def _set(self, call: Call, slot: str, new: Node) -> None:
        operator = call.node.target
        assert isinstance(operator, Operator)
        if operator.__name__ == "MatMul" and slot == "C":
            proto = onnx.NodeProto()
            proto.CopyFrom(operator.node)
            proto.op_type = "Gemm"
            call.node.target = operator = Operator(proto, self.opsets)
        args, at = list(call.node.args), operator.position(slot)
        own = len(args) - len(operator.outer)
        args[own:own] = [None] * max(at + 1 - own, 0)
        args[at] = new
        call.node.args = tuple(args)

    def _slot_dtype(self, call: Call, slot: str) -> torch.dtype:
        old = call.at(slot)
        if isinstance(old, Node) and self.is_float(old):
            return self.dtype(old)
        weight = next((call.arguments[n] for n in ("W", "B", "A") if isinstance(call.arguments.get(n), Node)), None)
        return self.dtype(weight if isinstance(weight, Node) and self.is_float(weight) else call.value)

    def _invent(self, call: Call, slot: str) -> str:
        if slot == "bias" and slot not in call:  # which is added behind a value
            return f"{self.name(call.value)}_bias"
        return f"{self.module(call.value)}.{slot.replace('.', '_')}"

    def _empty(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def with_unseen(self, ledger: Ledger) -> Ledger:
        """The ledger with the BatchNormalizations of whose shape nothing is known, because nobody knows what computes
        their operand or they do not fit it.
        """
        seen = {entry.value for entry in ledger.entries}
        found = []
        for node in self.graph.nodes:
            operator = node.target
            if not isinstance(operator, Operator) or operator.node.op_type != (own := "BatchNormalization"):
                continue
            name = operator.node.output[0]
            if name in seen or self.is_float(node) or isinstance(node.meta.get("val"), list):
                continue
            before, why = (
                self.maker(next(iter(node.all_input_nodes), None)),
                Refusal("channels", self.module(node), own),
            )
            if before is not None and before.operator not in TABLE:
                why = Refusal("unknown-operator", self.module(before.value), before.operator)
            found.append(Entry(name, self.module(node), own, "batch_norm", "left", refusals=(why,)))
        return replace(ledger, entries=(*ledger.entries, *found))

    def finish(self) -> onnx.ModelProto:
        """The file with the edits in it; large constants are ``beside`` it, and say so without a location."""
        return written(self)
