"""The graph editor: the few verbs by which ``fold`` and ``merge`` read and change a program.

Works on a copy of an ExportedProgram's lifted graph. Constants are held in float64 from the first edit on and rounded
once, in ``finish``; an existing tensor is never written to, so whoever shares it (another layer, the caller's model)
keeps what it had.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from bnfold import aten
from bnfold.affine import Meaning
from bnfold.graph.functional import FROZEN, module_of
from bnfold.graph.interpret import constant_of, evaluate_constant
from bnfold.graph.names import common_name
from bnfold.graph.program import MEANING, Overflow, copy_graph, overflow, with_constants
from bnfold.semantics import Semantics, Shape
from bnfold.semantics.call import Call
from bnfold.semantics.sizes import Sizes

Node = fx.Node
_NUMBERS = (int, float, torch.SymInt, torch.SymFloat, torch.SymBool)


class Graph:
    """A program under edit.

    Args:
        program: a functional program in training IR; it is copied, not changed.
        masters: constants of higher precision, by name, that edits start from in place of the stored ones.
    """

    def __init__(self, program: ExportedProgram, masters: Mapping[str, Tensor] | None = None) -> None:
        self.program, self.masters = program, dict(masters or {})
        graph = copy_graph(program.graph)
        for node in graph.find_nodes(op="call_function", target=torch.ops.aten._assert_tensor_metadata.default):
            graph.erase_node(node)  # of a dtype and a device that the tensor has in the graph anyhow
        graph.eliminate_dead_code()  # a layer whose result nobody uses has no affine worth a word
        self._begin(graph)
        placeholders = {n.name: n for n in graph.find_nodes(op="placeholder")}
        self._targets = {
            placeholders[spec.arg.name]: spec.target or ""
            for spec in program.graph_signature.input_specs
            if spec.kind is not InputKind.USER_INPUT
        }
        #: Graphs of regions that take the place of the program's, by the names that refer to them.
        self.bodies: dict[str, fx.GraphModule] = {}
        self.refresh()

    def _begin(self, graph: fx.Graph) -> None:
        self.graph = graph
        self._pending: MutableMapping[Node, Tensor] = self.table()
        self._origin: dict[Node, str] = {}
        self._constants: dict[Node, Tensor | None] = {}
        self._targets = {}
        self._sizes = Sizes(graph)
        self._shapes: dict[Node, Shape] = {}
        #: What each edited value stands for; None for one that stands for no captured value.
        self.stands_for: dict[Node, Meaning | None] = {}
        self._gone: set[Node] = set()
        #: How many constants edits have added, and how many operators they have dropped.
        self.added, self.dropped = 0, 0

    # -- reading ---------------------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Numbers the nodes anew, and finds those that depend on no input."""
        self.order: dict[Node, float] = {node: i for i, node in enumerate(self.graph.nodes)}
        self._fixed: set[Node] = set()
        for node in self.graph.nodes:
            stored = node in self._pending or (node in self._targets and self._is_stored(node))
            computed = node.op == "call_function" and self._may_be_constant(node)
            if stored or (computed and all(operand in self._fixed for operand in node.all_input_nodes)):
                self._fixed.add(node)

    def _is_stored(self, node: Node) -> bool:
        return isinstance(node.meta.get("val"), Tensor)

    def _may_be_constant(self, node: Node) -> bool:
        """Whether an operator computes a constant where its operands are."""
        random = isinstance(node.target, OpOverload) and (
            torch.Tag.nondeterministic_seeded in node.target.tags or node.target._schema.is_mutable
        )
        higher = isinstance(node.target, torch._ops.HigherOrderOperator)
        return not (random or higher or node.meta.get(FROZEN))

    def values(self) -> Iterator[Node]:
        """The values computed from inputs, in topological order; several results of one operator one by one."""
        for node in self.graph.nodes:
            if node.op == "call_function" and node not in self._fixed and not self.is_list(node):
                yield node

    def call(self, value: Node) -> Call:
        """The operator application that makes a value."""
        return Call(self, value)

    def semantics(self, value: Node) -> Semantics:
        """What the operator of a value does, by the table of its dialect."""
        return aten.semantics(self.call(value))

    def is_constant(self, value: Any) -> bool:
        """Whether the value depends on no input."""
        return not isinstance(value, Node) or value in self._fixed

    def is_list(self, value: Any) -> bool:
        """Whether the node stands for several tensors."""
        return isinstance(value, Node) and isinstance(value.meta.get("val"), (list, tuple))

    def is_frozen(self, value: Node) -> bool:
        """Whether an in-place operator that could not be removed shares the value's storage."""
        return bool(value.meta.get(FROZEN))

    def readers(self, value: Node) -> Iterator[Node]:
        """The values computed directly from ``value``; the graph's output node where it is returned."""
        for user in value.users:
            if self.is_list(user):
                yield from (u for u in user.users if u.target is getitem)
                if any(u.target is not getitem for u in user.users) or not user.users:
                    yield user
            else:
                yield user

    def constant(self, value: Node) -> Tensor | None:
        """The float64 value of a node that depends on no input, evaluated from the stored constants; else None."""
        if value not in self._fixed:
            return None
        if value.op == "placeholder":
            return self._stored(value)  # not kept: a float64 copy of every weight would be the model twice over
        if value not in self._constants:
            known: dict[Node, Any] = {}
            for node in self.cone(value):
                known[node] = self._stored(node) if node.op == "placeholder" else evaluate_constant(node, known)
            self._constants[value] = known[value]
        return self._constants[value]

    def table(self) -> MutableMapping[Any, Tensor]:
        """An empty table of constants in float64, to be planned with."""
        return {}

    def cone(self, value: Node) -> list[Node]:
        """What a node is computed from, the node included, in topological order."""
        cone, stack = set(), [value]
        while stack:
            node = stack.pop()
            if node not in cone:
                cone.add(node)
                stack += node.all_input_nodes
        return sorted(cone, key=self.order.__getitem__)

    def _stored(self, node: Node) -> Tensor:
        if node in self._pending:
            return self._pending[node]
        target = self._targets[node]
        value: Tensor = self.masters.get(target, constant_of(self.program, target))
        return value.detach().to(torch.float64) if value.is_floating_point() else value

    def dtype(self, value: Node) -> torch.dtype:
        """The dtype of a value."""
        dtype: torch.dtype = value.meta["val"].dtype
        return dtype

    def is_float(self, value: Any) -> bool:
        """Whether the value is a floating-point tensor."""
        val = value.meta.get("val") if isinstance(value, Node) else None
        return isinstance(val, Tensor) and val.dtype.is_floating_point

    def shape(self, value: Node) -> Shape:
        """The shape of a value at the current sizes, which are generic ones and not the example's."""
        if value not in self._shapes:
            self._shapes[value] = tuple(self._sizes(n) for n in value.meta["val"].shape)
        return self._shapes[value]

    def size(self, value: Node, axis: int) -> int:
        """The size of a value along one axis at the current sizes; the others may depend on data."""
        return self._sizes(value.meta["val"].shape[axis])

    def is_sized(self, value: Node) -> bool:
        """Whether no size of a value depends on data."""
        sizes = getattr(value.meta.get("val"), "shape", ())
        return all(isinstance(size, int) or size.node.has_hint() for size in sizes)

    def rank(self, value: Node) -> int:
        """The number of axes of a value, whatever its sizes depend on."""
        return len(value.meta["val"].shape)

    def dynamic_axes(self, value: Node) -> tuple[int, ...]:
        """The axes whose size differs from call to call."""
        return tuple(a for a, n in enumerate(value.meta["val"].shape) if not isinstance(n, int))

    def is_number(self, value: Any) -> bool:
        """Whether the node stands for a number, such as a size, and not for a tensor."""
        return isinstance(value, Node) and isinstance(value.meta.get("val"), _NUMBERS)

    def number(self, value: Node) -> int | None:
        """The number that a symbolic size stands for at the current sizes; None for a tensor."""
        val = value.meta.get("val")
        return self._sizes(val) if isinstance(val, (int, torch.SymInt)) else None

    def settled(self, value: Node) -> Any:
        """The number that a node stands for at every size in its range; None where it is not always the same."""
        return self._sizes.settled(value.meta["val"]) if self.is_number(value) else None

    def example_shape(self, value: Node) -> Shape:
        """The shape of a value in the example: to count with, and to conclude nothing from."""
        return tuple(self._sizes.at_example(n) for n in value.meta["val"].shape)

    def resize(self, way: int) -> None:
        """Takes other generic sizes for the dynamic dimensions: one of ``sizes.WAYS``; at first they are of 0."""
        self._sizes.take(way)
        self._shapes = {}

    def module(self, value: Node) -> str:
        """The qualified name of the module that made a value."""
        return module_of(value)

    def module_class(self, value: Node) -> str:
        """The class name of the module that made a value."""
        stack = value.meta.get("nn_module_stack") or {}
        name = next(reversed(stack.values()))[1] if stack else ""
        return (name if isinstance(name, str) else getattr(name, "__name__", "")).rsplit(".", 1)[-1]

    def name(self, value: Node) -> str:
        """A value's name, unique in the graph and kept by edits."""
        return value.name

    def materialise(self) -> None:
        """Replaces floating-point subgraphs of constants alone (weight_norm, spectral_norm, weight standardisation,
        FrozenBatchNorm's arithmetic) by their value, where that is no larger than what it is computed from."""
        for node in list(self.graph.nodes):
            computed = node.op == "call_function" and node in self._fixed and self.is_float(node)
            if not computed or all(user in self._fixed for user in node.users):
                continue
            leaves = [n for n in self.cone(node) if n.op == "placeholder" and self.is_float(n)]
            value = self.constant(node)
            assert value is not None
            if leaves and value.numel() <= sum(n.meta["val"].numel() for n in leaves):
                names = [self._targets[n] for n in leaves if n in self._targets]
                new = self.new_constant(
                    value, self.dtype(node), common_name(names) or self._invent(self.call(node), "constant")
                )
                self.bypass({node: new})

    def stored_name(self, value: Any) -> str | None:
        """The parameter or buffer that a value is, as the captured model calls it; None for any other."""
        return self._targets.get(value)

    def holds(self, value: Node) -> bool:
        """Whether the value is still there."""
        return value not in self._gone

    def meaning(self, value: Node) -> Meaning | None:
        """The captured value that ``value`` stands for; its own where no edit has changed it."""
        return self.stands_for[value] if value in self.stands_for else Meaning(self.name(value))

    # -- editing ---------------------------------------------------------------------------------------------------

    def overflow(self, value: Node, slot: str, tensor: Tensor) -> Overflow | None:
        """Where ``tensor`` would not fit the dtype it is rounded to in that slot."""
        return overflow(tensor, self._slot_dtype(self.call(value), slot))

    def set_constant(self, value: Node, slot: str, tensor: Tensor) -> None:
        """Gives a slot a constant of its own; ``tensor`` is float64 and rounded to the slot's dtype at the end."""
        call = self.call(value)
        old = call.at(slot)
        origin = self._origin.get(old) or self._targets.get(old) if isinstance(old, Node) else None
        new = self.new_constant(tensor, self._slot_dtype(call, slot), origin or self._invent(call, slot))
        self._set(call, slot, new)

    def set_operand(self, value: Node, slot: str, operand: Node) -> None:
        """Lets a slot read another value; what nobody reads any more goes."""
        call = self.call(value)
        old = call.at(slot)
        self._set(call, slot, operand)
        self._sweep(old)

    def become(self, value: Node, target: OpOverload, *args: Any) -> None:
        """Lets another operator make a value, which stays what it is; what nobody reads any more goes."""
        old = value.all_input_nodes
        value.target, value.args, value.kwargs = target, args, {}
        for node in old:
            self._sweep(node)

    def take_shape(self, value: Node, of: Node) -> None:
        """Gives ``value``, whose constants are about to change, the shape of another value."""
        value.meta["val"] = of.meta["val"]
        self._shapes.pop(value, None)

    def add_after(self, value: Node, tensor: Tensor) -> Node:
        """Adds a constant to a value, for all its readers."""
        new = self.new_constant(tensor, self.dtype(value), self._invent(self.call(value), "bias"))
        with self.graph.inserting_after(value):
            added = self._sum(value, new)
        self.order[added] = self.order[value] + 0.5
        value.replace_all_uses_with(added, delete_user_cb=lambda user: user is not added)
        return added

    def _sum(self, value: Node, constant: Node) -> Node:
        added = self.graph.call_function(torch.ops.aten.add.Tensor, (value, constant))
        added.meta = {k: v for k, v in value.meta.items() if k != "from_node"}
        return added

    def bypass(self, by: Mapping[Node, Node]) -> None:
        """Lets every reader of some values read others in their place, and drops what nobody reads any more.

        All at once: a concatenation of ten thousand values is written anew once, not for every one of them.
        """
        for reader in dict.fromkeys(user for value in by for user in value.users):
            reader.args, reader.kwargs = fx.map_arg((reader.args, dict(reader.kwargs)), lambda n: by.get(n, n))
        for value in by:
            self._sweep(value)

    def _sweep(self, value: Node) -> None:
        dead = [value]
        while dead:
            node = dead.pop()
            if not node.users and node.op == "call_function" and node not in self._gone:
                dead += node.all_input_nodes
                self.graph.erase_node(node)
                self._gone.add(node)
                self.dropped += not self.is_list(node) and node not in self._fixed

    def _set(self, call: Call, slot: str, new: Node) -> None:
        name, _, index = slot.partition(".")
        assert isinstance(call.node.target, OpOverload)
        schema = call.node.target._schema.arguments
        value: Any = new
        if index:
            value = [*call.arguments[name]]
            value[int(index)] = new
        position = next(i for i, a in enumerate(schema) if a.name == name)
        if isinstance(schema[position].type, torch.NumberType):  # which is one for all channels no more
            given = {**call.arguments, name: value}
            call.node.target = twin = call.node.target.overloadpacket.Tensor
            schema = twin._schema.arguments
            call.node.args = tuple(given[a.name] for a in schema if not a.kwarg_only)
            call.node.kwargs = {a.name: given[a.name] for a in schema if a.kwarg_only}
            return
        if schema[position].kwarg_only or name in call.node.kwargs:
            call.node.update_kwarg(name, value)
            return
        args = [call.arguments[a.name] for a in schema[: max(position + 1, len(call.node.args))]]
        args[position] = value
        call.node.args = tuple(args)

    def _slot_dtype(self, call: Call, slot: str) -> torch.dtype:
        old = call.at(slot)
        if slot in ("self", "other"):  # of an operator that promotes: its result must stay of the dtype that it is
            return self.dtype(call.value)
        if self.is_float(old):
            return self.dtype(old)
        sibling = call.arguments.get("weight")  # a new bias takes the dtype of the weight beside it
        return self.dtype(sibling if isinstance(sibling, Node) and self.is_float(sibling) else call.value)

    def _invent(self, call: Call, slot: str) -> str:
        weight = call.arguments.get("weight")
        known = self._origin.get(weight) or self._targets.get(weight) if isinstance(weight, Node) else None
        if slot == "bias" and known is not None and known.endswith("weight"):
            return known[: -len("weight")] + "bias"
        module = self.module(call.value)
        name = {"self": "constant", "other": "constant", "mat2": "weight"}.get(slot, slot.replace(".", "_"))
        return f"{module}.{name}" if module else name

    def new_constant(self, tensor: Tensor, dtype: torch.dtype, origin: str) -> Node:
        """A constant, float64 until ``finish`` rounds it; it gets the name ``origin`` or one like it."""
        self.added += 1
        empty = self._empty(tensor.shape, dtype)
        with self.graph.inserting_before(next(iter(self.graph.nodes))):
            node = self.graph.placeholder(f"p_folded_{self.added}")
        node.meta["val"] = empty
        self._pending[node], self._origin[node] = tensor, origin
        self._fixed.add(node)
        self.order[node] = -self.added
        return node

    def _empty(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        values = (node.meta.get("val") for node in self.graph.nodes)
        with next(value.fake_mode for value in values if isinstance(value, torch._subclasses.FakeTensor)):
            return torch.empty(shape, dtype=dtype)

    # -- finishing -------------------------------------------------------------------------------------------------

    def finish(self) -> ExportedProgram:
        """The edited program: dead constants gone, new ones rounded once and named after those they replace.

        Raises:
            FoldError: torch rejects the edited program; a defect of bnfold.
        """
        self.graph.eliminate_dead_code()
        for node, meaning in self.stands_for.items():
            node.meta[MEANING] = meaning
        new = {node: (tensor, self._origin[node]) for node, tensor in self._pending.items()}
        return with_constants(self.program, self.graph, new, self.bodies)
