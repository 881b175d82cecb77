"""ExportedPrograms written by hand, operator by operator: what torch.export would give, without its time.

torch.export needs 10 ms per operator and a module to look at. Here an operator is one line, metadata is shared between
values that look alike, and ten thousand layers take a second.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils import _pytree as pytree
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges

aten = torch.ops.aten
Node = fx.Node


@cache
def template() -> ExportedProgram:
    """The smallest program, for what every program holds beside its graph."""

    class Clone(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.clone()

    return torch.export.export(Clone(), (torch.zeros(2, 2),), dynamic_shapes=({0: Dim.AUTO},), strict=False)


class Program:
    """A program with one input ``x`` of dynamic batch, in the making.

    ``x`` is its node. ``call`` appends an operator, ``parameter`` a constant; layers on top of them name their
    constants as torch.nn would. ``done`` gives the ExportedProgram.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype = torch.float32, *, dynamic: Sequence[int] = (0,)):
        self.dtype, self.graph = dtype, fx.Graph()
        self.example = torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(7))
        self.mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=False)
        kinds = [DimDynamic.DYNAMIC if axis in dynamic else DimDynamic.STATIC for axis in range(len(shape))]
        fake = self.mode.from_tensor(self.example, symbolic_context=StatelessSymbolicContext(dynamic_sizes=kinds))
        self.log: list[tuple[Node, Callable[..., Any], tuple[Any, ...], dict[str, Any], str, str]] = []
        self.parameters: dict[Node, tuple[str, Tensor]] = {}
        self._fakes: dict[Any, Any] = {}
        self._names: set[str] = {"x"}
        self._modules = 0
        self._input_end = self.x = self.graph.placeholder("x")
        self.x.meta["val"] = fake

    # -- operators and constants -----------------------------------------------------------------------------------

    def shape(self, value: Node) -> tuple[int, ...]:
        """The shape of a value at the example's batch."""
        return tuple(int(n) if isinstance(n, int) else int(n.node.hint) for n in value.meta["val"].shape)

    def parameter(self, name: str, tensor: Tensor) -> Node:
        """A constant by that name, in the program's dtype where it is a floating-point tensor."""
        tensor = tensor.to(self.dtype) if tensor.is_floating_point() else tensor
        key = ("parameter", tuple(tensor.shape), tensor.dtype)
        if key not in self._fakes:
            with self.mode:
                self._fakes[key] = torch.empty(tensor.shape, dtype=tensor.dtype)
        with self.graph.inserting_before(self.x):
            node = self.graph.placeholder("p_" + name.replace(".", "_"))
        node.meta["val"] = self._fakes[key]
        self.parameters[node] = name, tensor
        return node

    def call(
        self, target: Callable[..., Any], *args: Any, module: str = "", layer: str = "Module", **kwargs: Any
    ) -> Node:
        """An operator applied to nodes and plain arguments; ``module`` and ``layer``: whose forward calls it."""
        key = str((target, pytree.tree_map(_looks, (args, sorted(kwargs.items())))))
        if key not in self._fakes:
            with self.mode, torch.no_grad():
                plain = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
                self._fakes[key] = target(*plain[0], **plain[1])
        node = self.graph.call_function(target, args, kwargs)
        node.meta["val"] = self._fakes[key]
        root = {"L__self__": ("", "Net")}
        node.meta["nn_module_stack"] = {**root, f"L__self__{module}": (module, f"torch.nn.{layer}")} if module else root
        self.log.append((node, target, args, kwargs, module, layer))
        return node

    def name(self, kind: str) -> str:
        """A fresh module name."""
        self._modules += 1
        return f"{kind}{self._modules}"

    # -- the end ---------------------------------------------------------------------------------------------------

    def done(self, *outputs: Node) -> ExportedProgram:
        """The program that returns ``outputs``."""
        base = template()
        self.graph.output(tuple(outputs))
        specs, state = [], {}
        for node in self.graph.nodes:
            if node in self.parameters:
                name, tensor = self.parameters[node]
                state[name] = torch.nn.Parameter(tensor, requires_grad=False)
                specs.append(InputSpec(InputKind.PARAMETER, TensorArgument(node.name), name))
        specs.append(InputSpec(InputKind.USER_INPUT, TensorArgument(self.x.name), None))
        returned = [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), None) for node in outputs]
        signature = ExportGraphSignature(specs, returned)
        top = base.module_call_graph[0]
        spec = pytree.tree_structure(tuple(range(len(outputs))))
        call = type(top.signature)(inputs=[], outputs=[], in_spec=top.signature.in_spec, out_spec=spec)
        symbols = [n.node.expr for n in self.x.meta["val"].shape if not isinstance(n, int)]
        return ExportedProgram(
            root=torch.nn.Module(),
            graph=self.graph,
            graph_signature=signature,
            state_dict=state,
            range_constraints={symbol: ValueRanges(2, int_oo) for symbol in symbols},
            module_call_graph=[type(top)(fqn="", signature=call)],
            example_inputs=((self.example,), {}),
            constants={},
            verifiers=base.verifiers,
        )

    def replayed(self, dtype: torch.dtype, *outputs: Node) -> ExportedProgram:
        """The same program in another dtype, its constants rounded from this one's."""
        again = Program(self.example.shape, dtype)
        known = {self.x: again.x}
        known |= {node: again.parameter(name, tensor) for node, (name, tensor) in self.parameters.items()}
        for node, target, args, kwargs, module, layer in self.log:
            args, kwargs = fx.node.map_arg((args, kwargs), known.__getitem__)
            known[node] = again.call(target, *args, module=module, layer=layer, **kwargs)
        return again.done(*(known[node] for node in outputs))


def _looks(value: Any) -> Any:
    """What an operator's result can depend on: values that look alike give results that do."""
    if not isinstance(value, Node):
        return value
    fakes = value.meta["val"] if isinstance(value.meta["val"], (list, tuple)) else [value.meta["val"]]
    return [(fake.shape, fake.dtype) for fake in fakes]
