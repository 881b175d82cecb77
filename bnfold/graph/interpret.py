"""Running a captured graph node by node: in its own dtypes, or in float64 as the truth of every comparison.

``deepcopy(model).double()`` is no truth: it keeps ``x.float()`` regions and factories in float32, and a ``.pt2`` has
no eager model. Here every floating-point tensor is float64 from the stored constants on, dtype arguments and factories
are raised with them, and autocast regions run without autocast.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from bnfold.evaluate.blocks import convolve
from bnfold.rounding import disturb

#: What takes the place of a node's value: called with its arguments and with the value that it has by itself.
Steering = Callable[[tuple[Any, ...], dict[str, Any], Any], Any]

#: A dtype -> the one that stands for it in a run in float64.
_RAISED = {
    torch.float16: torch.float64, torch.bfloat16: torch.float64, torch.float32: torch.float64,
    torch.complex32: torch.complex128, torch.complex64: torch.complex128,
}  # fmt: skip
_FACTORIES = {
    "arange", "full", "zeros", "ones", "empty", "linspace", "scalar_tensor", "eye", "new_full", "rand", "randn",
}  # fmt: skip
_BITS = torch.ops.aten.view.dtype
#: It has a table in it that is computed from sizes.
_AFFINE_GRID = torch.ops.aten.affine_grid_generator.default
#: Its slope is a number here, and an attribute in float32 of a file.
_LEAKY_RELU = torch.ops.aten.leaky_relu.default


def raise_tensor(value: Any) -> Any:
    """``value`` in float64, or in complex128, where it is a floating-point tensor of fewer bits."""
    return value.to(_RAISED[value.dtype]) if isinstance(value, Tensor) and value.dtype in _RAISED else value


def call_precise(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Calls an operator with every dtype argument, and every result, raised to float64."""

    def raise_dtype(arg: Any) -> Any:
        return _RAISED.get(arg, arg) if isinstance(arg, torch.dtype) else arg

    args = tuple(raise_dtype(arg) for arg in args)
    kwargs = {name: raise_dtype(arg) for name, arg in kwargs.items()}
    if (name := getattr(target, "_opname", "")).startswith("conv"):
        args = (args[0].contiguous(), *args[1:])  # channels-last kernels are for float32: four times slower
        if name in ("conv1d", "conv2d", "conv3d") and target._overloadname == "default":
            return convolve(target, *args, **kwargs)
    if kwargs.get("dtype") is None and getattr(target, "_opname", "").split(".")[0] in _FACTORIES:
        floats = any(isinstance(arg, float) for arg in args)
        if floats or target._opname not in ("arange", "full", "scalar_tensor"):
            kwargs["dtype"] = torch.float64
    result = target(*args, **kwargs)
    if isinstance(result, Tensor) and result.dtype in _RAISED and torch.Tag.pointwise in getattr(target, "tags", ()):
        # No operand was a floating-point tensor: torch computes 1 / n of integers in its default dtype.
        args, kwargs = pytree.tree_map(_of_integers, (args, kwargs))
        result = target(*args, **kwargs)
    return pytree.tree_map(raise_tensor, result)


def _of_integers(value: Any) -> Any:
    whole = isinstance(value, Tensor) and not value.is_floating_point() and value.dtype != torch.bool
    return value.double() if whole else value


def _bits(node: Any, value: Any) -> Any:
    """``view(dtype)`` of a value that is in float64: the bits are those of its own dtype."""
    return raise_tensor(value.to(node.args[0].meta["val"].dtype).view(node.args[1]))


class Runner(fx.Interpreter):
    """Runs a program's graph on flat user inputs.

    Args:
        program: the captured program; its guards and range constraints are not enforced.
        precise: in float64 instead of the graph's own dtypes.
        masters: constants, by their name in the program, that take the place of the stored ones; lets a float16
            program be judged against the float32 weights that it was rounded from.
        jitter: disturbs every floating-point constant by up to half of the epsilon of its own dtype, relative: what
            rounding the constants once does; so is what is computed from constants alone, which a file may hold
            ready-made. Constants that integers or booleans are computed from, and no input with them, stay: 3.0 as an
            index is no rounded number.
        seed: of that disturbance.
        louder: how many times larger it is.
    """

    def __init__(
        self,
        program: ExportedProgram,
        *,
        precise: bool = False,
        masters: Mapping[str, Tensor] | None = None,
        jitter: bool = False,
        seed: int = 0,
        louder: float = 1.0,
    ) -> None:
        super().__init__(program.graph_module, garbage_collect_values=True)
        self.extra_traceback = False
        self.precise = precise
        self._constants: dict[str, Any] = {}
        self._keep: Collection[str] = ()
        self._steering: Mapping[str, Steering] = {}
        self.kept: dict[str, Tensor] = {}
        self._jitter, self.seed, self._louder = jitter, seed, louder
        self._epsilon: dict[str, float] = {}
        for spec in program.graph_signature.input_specs:
            if spec.kind is InputKind.USER_INPUT:
                continue
            value = constant_of(program, spec.target or "")
            self._epsilon[spec.arg.name] = _epsilon(value)
            if masters is not None and spec.target in masters:
                value = masters[spec.target]
            self._constants[spec.arg.name] = value
        self._exact = _deciding_constants(program, set(self._constants)) if jitter else frozenset()
        self._computed = _of_constants(program, set(self._constants), self._exact) if jitter else frozenset()
        self._user = [
            spec.arg.name for spec in program.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT
        ]

    def __call__(
        self, inputs: Sequence[Any], *, keep: Collection[str] = (), steering: Mapping[str, Steering] | None = None
    ) -> list[Any]:
        """The flat outputs for the flat ``inputs``; the values of the nodes named in ``keep`` are left in ``kept``.

        ``steering`` gives nodes, by name, other values than they compute.
        """
        if len(inputs) != len(self._user):
            raise ValueError(f"the program takes {len(self._user)} flat inputs, {len(inputs)} were given")
        given = dict(self._constants)
        given.update(zip(self._user, (raise_tensor(x) for x in inputs) if self.precise else inputs))
        self._keep, self.kept, self._steering = keep, {}, steering or {}
        names = [node.name for node in self.graph.nodes if node.op == "placeholder"]
        with torch.no_grad():
            result = self.run(*[given[name] for name in names])
        return list(result) if isinstance(result, (tuple, list)) else [result]

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A node's arguments; a constant is raised where it is used: there is never a second model in memory."""
        if not self.precise and not self._jitter:
            return super().fetch_args_kwargs_from_env(n)

        def load(node: fx.Node) -> Any:
            value = self.env[node]
            return self._raised(node.name, value) if node.name in self._constants else value

        return fx.node.map_arg(n.args, load), fx.node.map_arg(n.kwargs, load)

    def _raised(self, name: str, constant: Any) -> Any:
        value = raise_tensor(constant) if self.precise else constant
        rounded = self._jitter and name not in self._exact
        if rounded and isinstance(value, Tensor) and value.is_floating_point():
            return self._rounded(name, value if value is not constant else value.clone(), self._epsilon[name])
        return value

    def _rounded(self, name: str, value: Tensor, epsilon: float) -> Tensor:
        """A value of its own, disturbed."""
        found = value.detach().contiguous()
        disturb(found.numpy(), self._louder * epsilon, name, self.seed)
        return found

    def taken(self) -> dict[str, Tensor]:
        """What the last run kept, which is not held here any longer: of a large model it is as much as its weights."""
        kept, self.kept = self.kept, {}
        return kept

    def run_node(self, n: fx.Node) -> Any:
        """Runs one node; steers it, and keeps its value, where asked to."""
        if self.precise and n.target is _BITS:
            value = _bits(n, self.fetch_args_kwargs_from_env(n)[0][0])
        elif self._jitter and n.target is _LEAKY_RELU:
            x, slope = (*self.fetch_args_kwargs_from_env(n)[0], 0.01)[:2]
            held = self._rounded(n.name, torch.tensor([slope], dtype=torch.float64), torch.finfo(torch.float32).eps)
            value = torch.ops.aten.leaky_relu(x, float(held))
        else:
            value = super().run_node(n)
        tabled = self._jitter and n.target is _AFFINE_GRID
        if (n.name in self._computed or tabled) and isinstance(value, Tensor) and value.is_floating_point():
            terms = _terms(n.target, self.fetch_args_kwargs_from_env(n)[0], value)
            value = value + (self._rounded(n.name, terms.clone(), _epsilon(n.meta.get("val"))) - terms)
        if n.name in self._steering:
            value = self._steering[n.name](*self.fetch_args_kwargs_from_env(n), value)
        if n.name in self._keep:
            # A clone: an operator that is still in place may write to it later.
            self.kept[n.name] = value.clone() if isinstance(value, Tensor) else value
        return value

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs one operator, raised to float64 where that is asked for."""
        if not self.precise:
            return super().call_function(target, args, kwargs)
        name = getattr(target, "__name__", "")
        if name == "wrap_with_autocast":
            return self._inner(args[4])(*args[5:])
        if name == "wrap_with_set_grad_enabled":
            return self._inner(args[1])(*args[2:])
        if isinstance(target, torch._ops.OpOverload):
            return call_precise(target, args, kwargs)
        return super().call_function(target, args, kwargs)

    def _inner(self, module: Any) -> Callable[..., Any]:
        outer = self

        class Inner(fx.Interpreter):
            def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                return outer.call_function(target, args, kwargs)

        return Inner(module).run


def _deciding_constants(program: ExportedProgram, constants: Collection[str]) -> frozenset[str]:
    """The constants that integers and booleans are computed from, without any input."""
    sources: dict[fx.Node, frozenset[str]] = {}
    found: frozenset[str] = frozenset()
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in constants:
            sources[node] = frozenset([node.name])
        elif node.op == "call_function" and all(operand in sources for operand in node.all_input_nodes):
            sources[node] = frozenset().union(*(sources[operand] for operand in node.all_input_nodes))
            value = node.meta.get("val")
            if isinstance(value, Tensor) and not (value.is_floating_point() or value.is_complex()):
                found |= sources[node]
    return found


def _of_constants(program: ExportedProgram, constants: Collection[str], exact: Collection[str]) -> frozenset[str]:
    """The floats that are computed from constants and numbers, and of which no integer is computed."""
    found: dict[fx.Node, bool] = {}
    for node in program.graph.nodes:
        known = node.name in constants if node.op == "placeholder" else node.op in ("call_function", "get_attr")
        if known and all(operand in found for operand in node.all_input_nodes):
            value = node.meta.get("val")
            found[node] = isinstance(value, Tensor) and value.is_floating_point() and node.op == "call_function"
    deciding = set()
    for node in reversed(list(found)):
        users = [user for user in node.users if user in found]
        if node.name in exact or any(user in deciding or not found[user] for user in users):
            deciding.add(node)
    return frozenset(node.name for node, floats in found.items() if floats and node not in deciding)


def _terms(target: Any, args: Sequence[Any], value: Tensor) -> Tensor:
    """What is added up to a value, in magnitudes: as that is rounded, so is the value, zero in between or not."""
    name, terms = getattr(target, "_opname", ""), value
    if target is _AFFINE_GRID:
        terms = args[0].abs().sum(-1)
        terms = terms.reshape(len(terms), *[1] * (value.ndim - 2), terms.shape[1])
    elif name in ("add", "sub"):
        one, other = (torch.as_tensor(x, dtype=value.dtype).abs() for x in args[:2])
        terms = one + other
    elif name == "linspace" or (name == "arange" and target._overloadname != "default"):
        terms = (value - args[0]).abs() + abs(args[0])
    return terms.expand_as(value)


def constant_of(program: ExportedProgram, target: str) -> Any:
    """The parameter, buffer or lifted constant with that name."""
    return program.state_dict[target] if target in program.state_dict else program.constants.get(target)


def _epsilon(value: Any) -> float:
    return float(torch.finfo(value.dtype).eps) if isinstance(value, Tensor) and value.is_floating_point() else 0.0


def coarsest_epsilon(program: ExportedProgram) -> float:
    """The largest epsilon among the dtypes of a program's floating-point constants; float32's where it has none."""
    found = max(map(_epsilon, [*program.state_dict.values(), *program.constants.values()]), default=0.0)
    return found or float(torch.finfo(torch.float32).eps)


def evaluate_constant(node: fx.Node, known: Mapping[fx.Node, Any], *, precise: bool = True) -> Any:
    """The value of a node whose inputs are all ``known``."""
    args = fx.node.map_arg(node.args, lambda n: known[n])
    kwargs = fx.node.map_arg(node.kwargs, lambda n: known[n])
    if precise and node.target is _BITS:
        return _bits(node, args[0])
    if precise and isinstance(node.target, torch._ops.OpOverload):
        return call_precise(node.target, args, kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]
