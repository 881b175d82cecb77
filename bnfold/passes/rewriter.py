"""What every pass does with a graph: ask what an operator does, edit it, and keep what each value stands for."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from bnfold.affine import Meaning
from bnfold.graph.graph import Graph, Node
from bnfold.semantics import Semantics


class Rewriter:
    """A graph under edit, with the semantics of its operators, read once and anew after an edit."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._semantics: dict[Node, Semantics] = {}

    def at(self, value: Node) -> Semantics:
        """What the operator that makes a value does."""
        if value not in self._semantics:
            self._semantics[value] = self.graph.semantics(value)
        return self._semantics[value]

    def forget(self, *values: Node) -> None:
        """Reads those anew, or all of them where none is named: they were edited."""
        for value in values:
            self._semantics.pop(value, None)
        if not values:
            self._semantics.clear()

    def set_constant(self, value: Node, slot: str, tensor: Tensor) -> None:
        """Gives a slot a constant of its own, float64."""
        self.graph.set_constant(value, slot, tensor)
        self.forget(value)

    def share_constant(self, value: Node, slot: str, constant: Node) -> None:
        """Lets a slot read what another one reads already."""
        self.graph.set_operand(value, slot, constant)
        self.forget(value)

    def add_after(self, value: Node, tensor: Tensor) -> Node:
        """Adds a constant to a value, for all its readers."""
        added = self.graph.add_after(value, tensor)
        self.stands_for(added, self.graph.meaning(value))
        self.stands_for(value, None)
        self.forget(*added.users)
        return added

    def drop(self, by: Mapping[Node, Node]) -> None:
        """Lets every reader of some values read others in their place."""
        readers = [reader for value in by for reader in (*self.graph.readers(value), *value.users)]
        self.graph.bypass(by)
        self.forget(*by, *readers)

    def stands_for(self, value: Node, meaning: Meaning | None) -> None:
        """From now on the value stands for a captured one, or none."""
        self.graph.stands_for[value] = meaning

    def where(self, value: Node) -> str:
        """The module of a value's operator, or the operator where there is none; an input or the output by name."""
        if value.op == "placeholder":
            return f"input '{self.graph.name(value)}'"
        if value.op != "call_function":
            return "the model's output"
        return self.graph.module(value) or self.graph.call(value).operator
