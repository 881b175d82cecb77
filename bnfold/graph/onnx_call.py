"""A node of an ONNX file: what it computes, and its application as the table sees it."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import torch
from torch import Tensor, fx

from bnfold.evaluate.reading import outer_names
from bnfold.evaluate.single import node_evaluator
from bnfold.semantics.call import Call

if TYPE_CHECKING:
    from bnfold.graph.onnx_graph import OnnxGraph

Node = fx.Node
_RANDOM = {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli"}


class Operator:
    """What a node computes: called with a tensor, or None, per input; ``slots`` are the schema's names of those."""

    def __init__(self, node: onnx.NodeProto, opsets: Mapping[str, int]) -> None:
        self.node, self._opsets = node, dict(opsets)
        self.domain = "" if node.domain == "ai.onnx" else node.domain
        self.__name__ = f"{self.domain}.{node.op_type}" if self.domain else node.op_type
        self.opset, self.outputs = opsets.get(self.domain, 1), len(node.output)
        self.attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute if not a.ref_attr_name}
        self.attributes = {k: v.decode() if isinstance(v, bytes) else v for k, v in self.attributes.items()}
        self.outer = sorted(outer_names(node))
        self.random = node.op_type in _RANDOM
        self.slots, self.variadic = self._schema()
        self._run: Any = None

    def _schema(self) -> tuple[list[str], bool]:
        with contextlib.suppress(onnx.defs.SchemaError):
            schema = onnx.defs.get_schema(self.node.op_type, self.opset, self.domain)
            last = schema.inputs[-1] if schema.inputs else None
            variadic = last is not None and last.option == onnx.defs.OpSchema.FormalParameterOption.Variadic
            # A MatMul with a bias is a Gemm.
            return [value.name for value in schema.inputs] + ["C"] * (self.__name__ == "MatMul"), variadic
        return [f"input_{i}" for i in range(len(self.node.input))], False

    def bind(self, args: Sequence[Any]) -> dict[str, Any]:
        """The arguments by slot; None where there is none, a list for inputs without number."""
        given = list(args[: len(args) - len(self.outer)])
        single = self.slots[:-1] if self.variadic else self.slots
        found: dict[str, Any] = {name: given[i] if i < len(given) else None for i, name in enumerate(single)}
        if self.variadic:
            found[self.slots[-1]] = given[len(single) :]
        if self.outer:
            found["outer"] = list(args[len(given) :])
        return found

    def position(self, slot: str) -> int:
        """Where the argument of a slot stands."""
        name, _, index = slot.partition(".")
        return self.slots.index(name) + int(index or 0)

    def __call__(self, *tensors: Tensor | None) -> Any:
        """The results, a tuple where there are several; floats in float64."""
        if self._run is None:
            self._run = node_evaluator(self.node, self._opsets)
        given = zip((*self.node.input, *self.outer), tensors)
        found = self._run({name: t.numpy() for name, t in given if name and t is not None})
        results = tuple(None if x is None else torch.from_numpy(np.array(x)) for x in found)
        return results if self.outputs > 1 else results[0]


class OnnxCall(Call):
    """An application; its slots are the names that the operator's schema has for its inputs."""

    graph: OnnxGraph

    def __init__(self, graph: OnnxGraph, value: Node) -> None:
        super().__init__(graph, value)
        self._operator = self.node.target
        self.arguments = self._operator.bind(self.node.args)  # type: ignore[union-attr]

    @property
    def operator(self) -> str:
        """The operator's type; one of another domain has that in front."""
        return str(self._operator.__name__)  # type: ignore[union-attr]

    @property
    def opset(self) -> int:
        """The version of its operator set."""
        return int(self._operator.opset)  # type: ignore[union-attr]

    @property
    def outputs(self) -> int:
        """How many results it is asked for."""
        return int(self._operator.outputs)  # type: ignore[union-attr]

    def attribute(self, name: str, default: Any) -> Any:
        """An attribute of the node, or what the operator takes for one that is not there."""
        return self._operator.attributes.get(name, default)  # type: ignore[union-attr]

    def run(self, tensors: Mapping[str, Tensor]) -> Any:
        """The operator on ``tensors``, by slot; of the others what is known of them, else zeros."""
        filled = []
        for slot, node in self._places():
            given = tensors.get(slot)
            if given is None and node is not None:
                given = self.graph.known(node)
            if given is None and node is not None:
                given = torch.zeros(self.graph.shape(node), dtype=self.graph.dtype(node))
            filled.append(given)
        found = self._operator(*filled)  # type: ignore[operator]
        item: Any = self.item or 0
        return found[item] if isinstance(found, tuple) else found

    def _places(self) -> list[tuple[str, Any]]:
        """Every argument in the node's order, with its slot."""
        found: list[tuple[str, Any]] = []
        for name, value in self.arguments.items():
            found += [(f"{name}.{i}", v) for i, v in enumerate(value)] if isinstance(value, list) else [(name, value)]
        return found[: len(self.node.args)]
