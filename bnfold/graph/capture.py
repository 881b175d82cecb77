"""Capture: a module in eval mode -> a functional graph in torch.export's training IR.

The caller's model is never touched: a structural copy that shares its parameters, and owns its buffers, is put into
eval mode and captured. Buffers are copied because an operator may update them in eval mode too
(``F.batch_norm(..., training=True)`` moves the running statistics without saying so).
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export._unlift import _check_input_constraints_pre_hook
from torch.export.graph_signature import ExportGraphSignature, InputKind, TensorArgument
from torch.fx import GraphModule
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.utils import _pytree as pytree

from bnfold.errors import CaptureError, InputError
from bnfold.graph.failures import explained, quiet
from bnfold.graph.functional import make_functional
from bnfold.graph.program import copy_graph, output_specs, rebuild
from bnfold.graph.regions import hidden_batch_norms, inline_regions
from bnfold.graph.scripted import converted, in_eval_mode, name_modules, positional
from bnfold.graph.stale import refuse_stale


@dataclass(frozen=True)
class Captured:
    """A captured model.

    Attributes:
        program: functional program in training IR.
        eager: the module that was captured, in eval mode; an ExportedProgram's own module, which checks its guards.
        declared: whether somebody said which axes are dynamic; else the first axis of every input is the batch.
        masters: float32 (or wider) constants by name that a lower-precision program was rounded from.
        spec: how flat inputs make up ``(args, kwargs)``.
        flat: the example inputs, flat.
        names: for every flat input its name in the graph.
        dims: symbolic dimension -> the name that the user knows it by.
        notes: what a user should know, such as a batch that the model turned out to fix.
    """

    program: ExportedProgram
    eager: nn.Module | None
    spec: Any
    flat: tuple[Any, ...]
    names: tuple[str, ...]
    dims: dict[str, str]
    masters: Mapping[str, Tensor] | None = None
    notes: tuple[str, ...] = ()
    in_place: int = 0
    ranges: dict[str, tuple[int, int | None]] = field(default_factory=dict)
    declared: bool = True

    @property
    def batches_alike(self) -> set[str]:
        """The symbols of first axes that torch.export keeps apart and of which nobody said that they may differ."""
        return {symbol for symbol, name in self.dims.items() if name.endswith("_batch") and not self.declared}

    def run_eager(self, flat: tuple[Any, ...]) -> list[Any]:
        """The eager module's flat outputs for flat inputs."""
        assert self.eager is not None
        args, kwargs = pytree.tree_unflatten(list(flat), self.spec)
        with torch.no_grad():
            return flatten_output(self.eager(*args, **kwargs))


def flatten_output(output: Any) -> list[Any]:
    """The leaves of a model's output, in the order torch.export gives them."""
    return list(pytree.tree_leaves(output))


def capture(
    model: nn.Module | ExportedProgram,
    args: tuple[Any, ...] | None = None,
    kwargs: dict[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    dtype: torch.dtype | None = None,
    static: bool = False,
) -> Captured:
    """Captures ``model`` in eval mode.

    Args:
        model: a module, or a program that torch.export captured before.
        args: positional example inputs; for a dynamic batch their batch is 2 or more.
        kwargs: keyword example inputs.
        dynamic_shapes: as for ``torch.export.export``; by default the first axis of every tensor whose size equals
            the first tensor's is the batch and dynamic.
        dtype: the floating-point dtype to convert parameters, buffers and inputs to first.
        static: no dimension is dynamic, unless ``dynamic_shapes`` says so.

    Raises:
        CaptureError: torch.export cannot capture the model, or the model writes to its inputs or buffers.
        InputError: no example inputs.
    """
    if isinstance(model, ExportedProgram):
        if dtype is not None:
            raise InputError("a .pt2 program keeps the dtype it was captured in", hint="Give the module instead")
        if not args and not kwargs:
            if model.example_inputs is None:
                raise InputError("the program holds no example inputs", hint="Give them as args")
            args, kwargs = model.example_inputs
        return _captured(model, model.module(), tuple(args or ()), dict(kwargs or {}), None, None)
    if args is None and not kwargs:
        raise InputError("no example inputs", hint="Give them with --input NAME:DTYPE[N,...]")
    args, kwargs = _distinct(tuple(args or ()), dict(kwargs or {}))
    masters: dict[str, Tensor] | None = None
    if isinstance(model, torch.jit.ScriptModule):
        return _capture_script(model, args, kwargs, dynamic_shapes, dtype, static)
    module = eval_copy(model)
    refuse_stale(model, module, args, kwargs)
    if dtype is not None:
        stored = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
        masters = {name: tensor.detach() for name, tensor in stored if tensor.is_floating_point()}
        module = copied(module).to(dtype)
        args, kwargs = pytree.tree_map_only(
            Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, (args, kwargs)
        )
    asked = _dynamic_batch(module, args, kwargs) if dynamic_shapes is None and not static else dynamic_shapes
    program = _export(module, args, kwargs, asked)
    bounded = None if asked is dynamic_shapes else _bounded_batch(program)
    if bounded is None:
        captured = _captured(program, module, args, kwargs, asked, masters)
        return replace(captured, declared=dynamic_shapes is not None)
    # ONNX cannot say "up to 4": a batch that holds for some sizes only must not look like one that holds for all.
    captured = _captured(_export(module, args, kwargs, None), module, args, kwargs, None, masters)
    return replace(captured, notes=(*captured.notes, f"the batch is fixed: the model's code takes {bounded} only"))


def _capture_script(
    script: torch.jit.ScriptModule, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any,
    dtype: torch.dtype | None, static: bool,
) -> Captured:  # fmt: skip
    """What torch's converter makes of TorchScript, captured as a module; what users run is the script itself."""
    args = positional(script, args, kwargs)
    eager = in_eval_mode(script)
    captured = capture(converted(eager, args), args, dynamic_shapes=dynamic_shapes, dtype=dtype, static=static)
    name_modules(captured.program)
    return replace(captured, eager=eager if dtype is None else eager.to(dtype))


def eval_copy(model: nn.Module) -> nn.Module:
    """A structural copy in eval mode that shares ``model``'s parameters and owns its buffers.

    Raises:
        CaptureError: the model cannot be copied, or has lazy layers that have seen no input.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError(
            "a TorchScript module holds no Python code that could be captured",
            where=type(model).__name__,
            hint="Give the nn.Module that it was traced or scripted from",
        )
    if any(
        isinstance(p, (UninitializedParameter, UninitializedBuffer)) for p in (*model.parameters(), *model.buffers())
    ):
        raise CaptureError(
            "the model has lazy layers that have seen no input yet",
            hint="Run it once on an example, or load its weights",
        )
    # What was made under inference_mode cannot be traced, so of that an ordinary copy is taken.
    duplicate = _copied(model, {id(p): _ordinary(p) if p.is_inference() else p for p in model.parameters()})
    try:
        return duplicate.eval()
    except NotImplementedError as error:
        hint = "Of an ExportedProgram give the program itself, not its module()"
        raise CaptureError(f"the model cannot be put into eval mode: {error}".rstrip("."), hint=hint) from error


def copied(model: nn.Module) -> nn.Module:
    """A deep copy that computes what ``model`` does, also where ``copy.deepcopy`` alone fails or forgets hooks.

    Raises:
        CaptureError: the model cannot be copied.
    """
    return _copied(model, {})


def _copied(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """The copy, with what ``memo`` holds in place of what has those ids."""
    memo = {id(b): b.clone() for b in model.buffers() if b.is_inference()} | memo
    # Old-style weight_norm and pruning keep what they computed last as a plain attribute, which deepcopy refuses.
    plain = (v for m in model.modules() for v in vars(m).values() if isinstance(v, Tensor) and not v.is_leaf)
    memo |= {id(tensor): tensor.detach().clone() for tensor in plain}
    try:
        duplicate = copy.deepcopy(model, memo)
    except Exception as error:
        raise CaptureError(
            f"the model cannot be copied: {type(error).__name__}: {error}",
            hint="bnfold works on a copy so that yours stays as it is; give a model that copy.deepcopy accepts",
        ) from error
    for module in model.modules():
        if isinstance(module, GraphModule) and id(vars(module)) in memo:
            # A GraphModule copies all it has, and then builds a new one of its graph alone: no hooks, no attributes.
            twin = memo[id(module)]
            vars(twin).update(memo[id(vars(module))])
            type(twin).__name__ = type(module).__name__  # a class of its own
    _refuse_unlike(model, duplicate)
    return duplicate


def _refuse_unlike(model: nn.Module, duplicate: nn.Module) -> None:
    """Raises CaptureError where a class's own ``__deepcopy__`` made something else than a copy."""
    copies = dict(duplicate.named_modules(remove_duplicate=False))
    for name, module in model.named_modules(remove_duplicate=False):
        twin = copies.pop(name, None)
        if twin is None or twin is module or _make(twin) != _make(module):
            raise CaptureError(
                f"the copy of a {type(module).__name__} that its __deepcopy__ makes is "
                + ("none" if twin is None else "the module itself" if twin is module else "of another class or hooks"),
                where=f"module '{name}'" if name else type(model).__name__,
                hint="bnfold works on a copy so that yours stays as it is; take __deepcopy__ out of that class",
            )


def _make(module: nn.Module) -> tuple[type, int, int]:
    """What a module and its copy have in common; every GraphModule is of a class of its own."""
    kind = GraphModule if isinstance(module, GraphModule) else type(module)
    return kind, len(module._forward_hooks), len(module._forward_pre_hooks)


def _distinct(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs with a tensor given twice as two tensors: torch.export would read one input for both."""
    seen: set[int] = set()

    def own(tensor: Tensor) -> Tensor:
        again = id(tensor) in seen
        seen.add(id(tensor))
        return tensor.clone() if again else tensor

    distinct: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map_only(Tensor, own, (args, kwargs))
    return distinct


def _ordinary(parameter: Tensor) -> Tensor:
    return nn.Parameter(parameter.clone(), requires_grad=False)


def _dynamic_batch(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.ndim]
    if not leaves or leaves[0].shape[0] < 2:
        return None
    batch = leaves[0].shape[0]

    def spec(leaf: Any) -> Any:
        return {0: Dim.AUTO} if isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == batch else None

    try:
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise InputError(
            f"the inputs do not fit forward: {error}", hint=f"Its signature is {inspect.signature(module.forward)}"
        ) from error
    if any(
        parameter.kind is parameter.VAR_KEYWORD
        for parameter in bound.signature.parameters.values()
        if parameter.name in bound.arguments
    ):
        raise CaptureError(
            "torch.export takes no dynamic batch through **kwargs",
            hint="Name them in forward's signature, or use --static",
        )
    return pytree.tree_map(spec, dict(bound.arguments))


def _bounded_batch(program: ExportedProgram) -> str | None:
    """The sizes of a first axis for which the capture holds, where the model's code sets an upper limit."""
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" and isinstance(value, Tensor) and value.ndim:
            size: Any = value.shape[0]
            limits = None if isinstance(size, int) else program.range_constraints.get(size.node.expr)
            if limits is not None and limits.upper.is_Integer:
                return f"batches of {max(int(limits.lower), 1)} to {int(limits.upper)}"
    return None


def _export(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any) -> ExportedProgram:
    try:
        with torch.no_grad(), quiet():
            return torch.export.export(_called(module), args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
    except Exception as error:
        raise explained(error, module, lambda: _called(module)(*args, **kwargs)) from error


def _called(module: nn.Module) -> nn.Module:
    """The module as torch.export must be given it: the graph of a GraphModule it runs without the module's hooks."""
    hooks = {*module._forward_pre_hooks.values(), *module._forward_hooks.values()} - {_check_input_constraints_pre_hook}
    if not isinstance(module, GraphModule) or not hooks:
        return module
    plain: nn.Module = type(type(module).__name__, (nn.Module,), {"forward": type(module).forward})()
    vars(plain).update(vars(module))
    return plain


def _captured(
    program: ExportedProgram,
    eager: nn.Module | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic_shapes: Any,
    masters: Mapping[str, Tensor] | None,
) -> Captured:
    signature = program.graph_signature
    user = [spec.arg.name for spec in signature.input_specs if spec.kind is InputKind.USER_INPUT]
    constants = {s.arg.name: s.target or "" for s in signature.input_specs if s.kind is not InputKind.USER_INPUT}
    written = [s.target for s in signature.output_specs if "MUTATION" in s.kind.name]
    if written:
        raise CaptureError(
            f"the model writes to '{written[0]}' in eval mode", hint="An exported model has no side effects"
        )
    graph = copy_graph(program.graph)
    inline_regions(graph, program.graph_module)
    in_place = make_functional(graph, inputs=set(user), constants=constants)
    outputs = ExportGraphSignature(list(signature.input_specs), output_specs(program, graph))
    functional = rebuild(program, graph, outputs, dict(program.state_dict), dict(program.constants))
    # torch.export orders keyword inputs as forward declares them.
    order = program.call_spec.in_spec
    if kwargs and order is not None:
        names = order.child(1).context if hasattr(order, "child") else list(kwargs)
        kwargs = {name: kwargs[name] for name in names} if set(names) == set(kwargs) else kwargs
    flat, spec = pytree.tree_flatten((args, kwargs))
    if len(flat) != len(user):
        raise InputError(f"the program takes {len(user)} inputs, {len(flat)} were given", hint=f"They are {user}")
    dims, notes = _dimensions(functional, flat, user, dynamic_shapes)
    if hidden := hidden_batch_norms(functional.graph_module):
        notes.append(
            f"{hidden} BatchNorms stay unseen in regions of their own (autocast that is on, torch.cond): take them out "
            "of the region to have them folded"
        )
    ranges = {
        str(symbol): (int(r.lower), int(r.upper) if r.upper.is_Integer else None)
        for symbol, r in program.range_constraints.items()
        if r.lower.is_Integer
    }
    return Captured(functional, eager, spec, tuple(flat), tuple(user), dims, masters, tuple(notes), in_place, ranges)


def _dimensions(
    program: ExportedProgram, flat: list[Any], user: list[str], dynamic_shapes: Any
) -> tuple[dict[str, str], list[str]]:
    """Names for the symbolic dimensions: the user's own, ``batch`` for a first axis, ``dim`` for the rest."""
    asked = dict(_asked(dynamic_shapes, user))
    dims: dict[str, str] = {}
    notes: list[str] = []
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op != "placeholder" or node.name not in user or not isinstance(value, Tensor):
            continue
        sizes: Any = value.shape
        for axis, size in enumerate(sizes):
            wanted = asked.get(node.name, {}).get(axis) if isinstance(asked.get(node.name), dict) else None
            expression = None if isinstance(size, int) else size.node.expr
            if expression is not None and expression.is_symbol:
                symbol = str(expression)
                name = getattr(wanted, "__name__", None)
                fresh = name or ("batch" if axis == 0 else f"{node.name}_dim{axis}")
                if symbol not in dims:
                    dims[symbol] = fresh if fresh not in dims.values() else f"{node.name}_{fresh}"
            elif expression is not None and not expression.is_number:  # such as 8*h
                root = getattr(getattr(wanted, "root", None), "__name__", None)
                for symbol in sorted(map(str, expression.free_symbols)):
                    dims.setdefault(symbol, root or f"{node.name}_dim{axis}_{len(dims)}")
            elif wanted is not None:
                notes.append(f"axis {axis} of input '{node.name}' is fixed at {size}: the model's code specialises it")
    return dims, notes


def _asked(dynamic_shapes: Any, user: list[str]) -> Iterator[tuple[str, Any]]:
    if dynamic_shapes is None:
        return
    leaves = pytree.tree_leaves(
        dynamic_shapes, is_leaf=lambda x: x is None or (isinstance(x, dict) and all(isinstance(k, int) for k in x))
    )
    if len(leaves) == len(user):
        yield from zip(user, leaves)


def input_shapes(captured: Captured) -> dict[str, tuple[Any, ...]]:
    """The shape of every tensor among the inputs, by name: sizes, and ``sympy`` expressions where they are dynamic."""
    values = {node.name: node.meta["val"] for node in captured.program.graph.nodes if node.op == "placeholder"}
    return {name: _sizes(values[name]) for name in tensor_inputs(captured.program)}


def _sizes(value: Tensor) -> tuple[Any, ...]:
    return tuple(size if isinstance(size, int) else size.node.expr for size in value.shape)


def tensor_inputs(program: ExportedProgram) -> list[str]:
    """Names of the user inputs that are tensors, in order."""
    return [
        spec.arg.name
        for spec in program.graph_signature.input_specs
        if spec.kind is InputKind.USER_INPUT and isinstance(spec.arg, TensorArgument)
    ]
