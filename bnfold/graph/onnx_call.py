"""One operator application of an ONNX file, as the table sees it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from bnfold.semantics.call import Call

if TYPE_CHECKING:
    from bnfold.graph.onnx_graph import OnnxGraph

Node = fx.Node


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
