"""How a model's class computes what was captured: which stored tensor who reads, and which module makes which value."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bnfold.graph.capture import Captured
from bnfold.graph.graph import Graph, Node
from bnfold.graph.interpret import evaluate_constant

#: A value, and the slot of its operator.
Read = tuple[str, str]


@dataclass(frozen=True, eq=False)
class Home:
    """The stored tensor that a slot reads."""

    name: str  #: in the state dict; of one that is not there yet, what it would be.
    readers: tuple[Read, ...]  #: all that read it.
    #: where the slot reads a view of it, for every element of the view its place in the flat tensor.
    index: Tensor | None = None

    def stored(self, constant: Tensor, shape: torch.Size | None) -> Tensor | None:
        """The stored tensor, of ``shape`` where it is there already, for which the slot reads ``constant``."""
        wanted = shape if self.index is None else self.index.shape
        if wanted is not None:
            # Axes of size 1 in front change nothing: the operator would broadcast them.
            if _without_leading_ones(constant.shape) != _without_leading_ones(wanted):
                return None
            constant = constant.reshape(wanted)
        if self.index is None:
            return constant
        found = torch.empty(self.index.numel(), dtype=constant.dtype)
        found[self.index] = constant
        return found if shape is None else found.reshape(shape)


@dataclass(frozen=True)
class Inside:
    """A value that is made while a module runs: in which of its calls, and by which child if not by itself."""

    value: str
    call: str
    child: str | None
    child_call: str | None


class Blueprint:
    """What there is to know about a class before any fold.

    Args:
        captured: the captured model, with the module that it was captured from.

    Attributes:
        model: that module.
        tensors: its parameters and buffers under every name that they have.
        stored: the names in its state dict.
        values: the captured graph's values, what constants alone compute being constants.
        inside: module name -> what is made while it runs.
        reads: stored name -> who reads it, also by way of other constants.
        computing: stored name -> the modules that compute other constants from it.
    """

    def __init__(self, captured: Captured) -> None:
        assert captured.eager is not None
        self.model = captured.eager
        self._names = {id(module): name for name, module in self.model.named_modules()}
        self._modules = dict(self.model.named_modules(remove_duplicate=False))
        self.tensors = dict(_tensors(self.model))
        self.stored = set(self.model.state_dict())
        self._one_tensor = _calls_of_one_tensor(captured)
        self._raw = Graph(captured.program, captured.masters)
        self._raw_values = {value.name: value for value in self._raw.values()}
        self.graph = Graph(captured.program, captured.masters)
        self.graph.materialise()
        self.graph.refresh()
        self.values = {value.name: value for value in self.graph.values()}
        self.reads: dict[str, list[Read]] = defaultdict(list)
        self.computing: dict[str, set[str]] = defaultdict(set)
        for node in self._raw.graph.nodes:
            if (name := self._raw.stored_name(node)) is not None:
                self._find_reads(name, node)
        self.inside: dict[str, list[Inside]] = defaultdict(list)
        for value in self.values.values():
            modules = value.meta.get("nn_module_stack") or {}
            stack = [(key, self._first_name(str(path))) for key, (path, _) in modules.items()]
            for (call, path), below in zip(stack, [*stack[1:], None]):
                child_call, child = below or (None, None)
                self.inside[path].append(Inside(value.name, call, child, child_call))

    def _find_reads(self, name: str, stored: Node) -> None:
        constants = [stored]
        for constant in constants:
            for user in constant.users:
                if self._raw.is_constant(user):
                    constants += [user] if user not in constants else []
                    self.computing[name].add(self._first_name(self._raw.module(user)))
                elif user.name in self._raw_values:
                    call = self._raw.call(user)
                    self.reads[name] += [(user.name, slot) for slot, operand in call.slots() if operand is constant]

    # -- modules ---------------------------------------------------------------------------------------------------

    def module(self, value: str) -> str:
        """The name of the module whose forward makes a value; the first of several."""
        return self._first_name(self.graph.module(self.values[value]))

    def _first_name(self, path: str) -> str:
        """The first of a module's names: its calls under all of them count together."""
        return self._names[id(self._modules[path])] if path in self._modules else path

    def owner(self, path: str) -> nn.Module:
        """The module of that name."""
        return self.model.get_submodule(path)

    def class_of(self, path: str) -> str:
        """The class name of a module."""
        return type(self.owner(path)).__name__

    def is_plain(self, path: str) -> bool:
        """Whether every call of a module takes one tensor and returns one, as an Identity's does."""
        return id(self.owner(path)) in self._one_tensor

    def names_of(self, path: str) -> set[str]:
        """Every name of the tensors that a module itself holds."""
        own = {id(tensor) for _, tensor in _tensors(self.owner(path), recurse=False)}
        return {name for name, tensor in self.tensors.items() if id(tensor) in own}

    def read_elsewhere(self, path: str) -> bool:
        """Whether another module's forward reads a module's tensors, and not as its own that happen to be tied."""
        names = self.names_of(path)
        reading = {self.module(value) for name in names for value, _ in self.reads[name]}
        reading |= {module for name in names for module in self.computing[name]}
        return any(not self.names_of(module) & names for module in reading - {path})

    # -- constants -------------------------------------------------------------------------------------------------

    def home(self, value: str, slot: str) -> Home | str:
        """The stored tensor behind a slot; in words why there is none that can change."""
        operand = self._raw.call(self._raw_values[value]).at(slot)
        if operand is None:
            return self._vacant(value, slot)
        if not isinstance(operand, Node):
            return f"it is a number in the code of {self.class_of(self.module(value))}"
        seen = self._view(operand)
        if seen is None:
            return f"its {slot} is computed and no parameter"
        name, index = seen
        if name not in self.stored:
            return f"'{name}' is no part of the state dict"
        return Home(name, tuple(self.reads[name]), index)

    def _vacant(self, value: str, slot: str) -> Home | str:
        """The same for an empty slot: its module must have a place for the parameter, and read it in this operator."""
        path = self.module(value)
        own = self.names_of(path)
        beside = [self._raw.stored_name(operand) for _, operand in self._raw.call(self._raw_values[value]).slots()]
        anchor = next((name for name in beside if name in own), None)
        if anchor is None or self.owner(path)._parameters.get(slot, ...) is not None:
            return f"{self.class_of(path)} has no place for a {slot}"
        return Home(f"{path}.{slot}", tuple((reader, slot) for reader, _ in self.reads[anchor]))

    def _view(self, operand: Node) -> tuple[str, Tensor | None] | None:
        """The stored tensor that a constant is, or is a view of with which element where; None for any other."""
        name = self._raw.stored_name(operand)
        if name is not None:
            return name, None
        cone = self._raw.cone(operand)
        leaves = [node for node in cone if node.op == "placeholder"]
        name = self._raw.stored_name(leaves[0]) if len(leaves) == 1 else None
        if name is None or not self._raw.is_float(leaves[0]):
            return None

        def evaluate(stored: Tensor) -> Tensor:
            known: dict[Node, Any] = {leaves[0]: stored}
            for node in cone:
                known[node] = known[node] if node in known else evaluate_constant(node, known)
            found: Tensor = known[operand]
            return found

        shape, count = leaves[0].meta["val"].shape, leaves[0].meta["val"].numel()
        index = evaluate(torch.arange(count, dtype=torch.float64).reshape(shape)).long()
        if not torch.equal(index.flatten().sort().values, torch.arange(count)):
            return None
        # Numbers of either sign tell a view from what merely leaves 0, 1, 2, ... as they are.
        probe = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        return (name, index) if torch.equal(evaluate(probe), probe.flatten()[index]) else None


def _without_leading_ones(shape: torch.Size) -> tuple[int, ...]:
    start = next((i for i, size in enumerate(shape) if size != 1), len(shape))
    return tuple(shape[start:])


def _tensors(module: nn.Module, *, recurse: bool = True) -> list[tuple[str, Tensor]]:
    parameters = module.named_parameters(recurse=recurse, remove_duplicate=False)
    return [*parameters, *module.named_buffers(recurse=recurse, remove_duplicate=False)]


def _calls_of_one_tensor(captured: Captured) -> set[int]:
    """Ids of the modules whose every call takes one tensor and returns one, on the example inputs."""
    assert captured.eager is not None
    plain: dict[int, bool] = {}

    def note(child: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object], output: object) -> None:
        one = len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and isinstance(output, Tensor)
        plain[id(child)] = plain.get(id(child), True) and one

    handles = [child.register_forward_hook(note, with_kwargs=True) for child in captured.eager.modules()]
    try:
        with torch.compiler.set_stance("force_eager"):  # torch.cond compiles its branches, hooks and all
            captured.run_eager(captured.flat)
    finally:
        for handle in handles:
            handle.remove()
    return {key for key, one in plain.items() if one}
