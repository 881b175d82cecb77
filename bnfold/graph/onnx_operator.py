"""What one node of an ONNX file computes."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor

from bnfold.evaluate.reading import outer_names
from bnfold.evaluate.single import node_evaluator

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
