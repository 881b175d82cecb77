"""One operator application, as the table sees it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from operator import getitem
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from bnfold.semantics import Shape

if TYPE_CHECKING:
    from bnfold.graph.graph import Graph

Node = fx.Node


def bound(target: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of one application by their names in the operator's schema, defaults included."""
    found = {}
    for i, argument in enumerate(target._schema.arguments):
        default = argument.default_value if argument.has_default_value() else None
        positional = i < len(args) and not argument.kwarg_only
        found[argument.name] = args[i] if positional else kwargs.get(argument.name, default)
    return found


class Call:
    """One operator application, its arguments by their names in the operator's schema."""

    def __init__(self, graph: Graph, value: Node) -> None:
        self.graph, self.value = graph, value
        # One item of an operator that returns several stands for that operator.
        self.item = value.args[1] if value.target is getitem and graph.is_list(value.args[0]) else None
        self.node: Node = value.args[0] if self.item is not None else value  # type: ignore[assignment]
        target = self.node.target
        found = bound(target, self.node.args, self.node.kwargs) if isinstance(target, OpOverload) else {}
        self.arguments: dict[str, Any] = found

    @property
    def operator(self) -> str:
        """``"aten.conv2d"``: the overload packet's name; another callable's own name."""
        target = self.node.target
        if isinstance(target, OpOverload):
            return f"{target.namespace}.{target._opname}"
        return getattr(target, "__name__", str(target))

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def __contains__(self, name: str) -> bool:
        return name in self.arguments

    def at(self, slot: str) -> Any:
        """The argument in a slot: a name, or ``name.i`` for an item of a list."""
        name, _, index = slot.partition(".")
        return self.arguments[name][int(index)] if index else self.arguments[name]

    def slots(self) -> Iterator[tuple[str, Node]]:
        """Every slot that holds a value."""
        for name, value in self.arguments.items():
            if isinstance(value, Node):
                yield name, value
            elif isinstance(value, (list, tuple)):
                yield from ((f"{name}.{i}", item) for i, item in enumerate(value) if isinstance(item, Node))

    def shape(self, slot: str) -> Shape:
        """The concrete shape of a slot's tensor; ``()`` for a number."""
        value = self.at(slot)
        return self.graph.shape(value) if isinstance(value, Node) else ()

    @property
    def out_shape(self) -> Shape:
        """The concrete shape of the output."""
        return self.graph.shape(self.value)

    @property
    def rank(self) -> int:
        """The number of axes of the output, whatever their sizes depend on."""
        return self.graph.rank(self.value)

    def size(self, axis: int) -> int:
        """The concrete size of the output along one axis."""
        return self.graph.size(self.value, axis)

    def is_open(self, value: Any) -> bool:
        """Whether a value is a symbolic number that is not the same at every size: it can be anything."""
        return self.graph.is_number(value) and self.graph.settled(value) is None

    def takes_number(self) -> list[str]:
        """The slots of tensors and factors that hold a symbolic number."""
        assert isinstance(self.node.target, OpOverload)
        numbers = [slot for slot, value in self.slots() if self.graph.is_number(value)]
        if not numbers:
            return []
        kinds = {argument.name: str(argument.type) for argument in self.node.target._schema.arguments}
        return [slot for slot in numbers if any(kind in kinds[slot.split(".")[0]] for kind in ("Tensor", "number"))]

    def is_constant(self, slot: str) -> bool:
        """Whether a slot is empty, or holds what depends on no input."""
        return self.graph.is_constant(self.at(slot))

    def constant(self, slot: str) -> Tensor | None:
        """The float64 value of a slot that depends on no input, a number included; else None."""
        value = self.at(slot)
        if isinstance(value, Node):
            return self.graph.constant(value)
        return torch.tensor(value, dtype=torch.float64) if isinstance(value, (int, float)) else None

    def run(self, tensors: Mapping[str, Tensor]) -> Any:
        """The operator at concrete sizes on ``tensors``, by slot; of the others constant integers are as they
        are, and the rest is zeros."""

        def fill(name: str, value: Any, index: int | None = None) -> Any:
            slot = name if index is None else f"{name}.{index}"
            if slot in tensors:
                return tensors[slot]
            if isinstance(value, (list, tuple)):
                return [fill(name, item, i) for i, item in enumerate(value)]
            if isinstance(value, Node):
                number = self.graph.number(value)
                if number is not None:
                    return number
                fixed = None if self.graph.is_float(value) else self.graph.constant(value)
                if fixed is not None:
                    return fixed.to(self.graph.dtype(value))
                return torch.zeros(()).expand(self.graph.shape(value))
            return value

        assert isinstance(self.node.target, OpOverload)
        positional = [a.name for a in self.node.target._schema.arguments if not a.kwarg_only]
        filled = {name: fill(name, value) for name, value in self.arguments.items()}
        with torch.no_grad():
            out = self.node.target(
                *(filled[name] for name in positional),
                **{name: value for name, value in filled.items() if name not in positional},
            )
        return out if self.item is None else out[self.item]
