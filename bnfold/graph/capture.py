"""Capture: a module in eval mode -> a functional graph in torch.export's training IR.

The caller's model is never touched: a structural copy that shares its parameters, and owns its buffers, is put into
eval mode and captured. Buffers are copied because an operator may update them in eval mode too
(``F.batch_norm(..., training=True)`` moves the running statistics without saying so).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind, TensorArgument
from torch.utils import _pytree as pytree

from bnfold.errors import CaptureError, InputError
from bnfold.graph.asking import Asked, ask
from bnfold.graph.copies import copied, eval_copy, refuse_stale, refuse_state, twin
from bnfold.graph.dimensions import Sizes, name_of, number
from bnfold.graph.functional import make_functional
from bnfold.graph.names import read_by_name
from bnfold.graph.program import copy_graph, output_specs, rebuild
from bnfold.graph.regions import hidden_batch_norms, inline_regions
from bnfold.graph.scripted import converted, in_eval_mode, name_modules, positional
from bnfold.graph.tracing import Say, trace


@dataclass(frozen=True)
class Captured:
    """A captured model."""

    program: ExportedProgram  #: functional program in training IR.
    #: the module that was captured, in eval mode; an ExportedProgram's own module, which checks its guards.
    eager: nn.Module | None
    spec: Any  #: how flat inputs make up ``(args, kwargs)``.
    flat: tuple[Any, ...]  #: the example inputs, flat.
    names: tuple[str, ...]  #: for every flat input its name in the graph.
    dims: dict[str, str]  #: symbolic dimension -> the name that the user knows it by.
    #: float32 (or wider) constants by name that a lower-precision program was rounded from.
    masters: Mapping[str, Tensor] | None = None
    notes: tuple[str, ...] = ()  #: what a user should know, such as a batch that the model turned out to fix.
    in_place: int = 0  #: how many in-place operators are left.
    sizes: Sizes = field(default_factory=Sizes)  #: those for which the program holds.

    @property
    def ranges(self) -> Mapping[str, tuple[int, int | None]]:
        """Lowest and highest size by symbol; None where there is no highest."""
        return self.sizes.ranges

    def run_eager(self, flat: tuple[Any, ...]) -> list[Any]:
        """The eager module's flat outputs for flat inputs, in the order torch.export gives them."""
        assert self.eager is not None
        args, kwargs = pytree.tree_unflatten(list(flat), self.spec)
        with torch.no_grad():
            return list(pytree.tree_leaves(self.eager(*args, **kwargs)))


def capture(
    model: nn.Module | ExportedProgram,
    args: tuple[Any, ...] | None = None,
    kwargs: dict[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    dtype: torch.dtype | None = None,
    static: bool = False,
    say: Say = lambda words: None,
) -> Captured:
    """Captures ``model`` in eval mode.

    Args:
        model: a module, or a program that torch.export captured before.
        args: positional example inputs. An axis that is to be dynamic and of size 1 is repeated, for torch.export takes
            a size of 1 for a constant; the example stays as it is where the model takes no other size.
        kwargs: keyword example inputs.
        dynamic_shapes: as for ``torch.onnx.export``: strings, ``Dim``, or hints. By default the first axis of every
            tensor whose size equals the first tensor's is the batch and dynamic.
        dtype: the floating-point dtype to convert parameters, buffers and inputs to first.
        static: no dimension is dynamic, unless ``dynamic_shapes`` says so.
        say: called with what a user should know while it takes long.

    Raises:
        CaptureError: torch.export cannot capture the model, the model writes to its inputs or buffers or keeps state
            from call to call, or its code fixes a dimension that was given a name.
        InputError: no example inputs.
    """
    if isinstance(model, ExportedProgram):
        if dtype is not None:
            raise InputError("a .pt2 program keeps the dtype it was captured in", hint="Give the module instead")
        if not args and not kwargs:
            if model.example_inputs is None:
                raise InputError("the program holds no example inputs", hint="Give them as args")
            args, kwargs = model.example_inputs
        return _captured(model, model.module(), Asked(tuple(args or ()), dict(kwargs or {})), None)
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
    found = ask(partial(trace, module, say), module, args, kwargs, dynamic_shapes, static=static)
    if found.traced.assigned:
        refuse_state(twin(module), found.args, found.kwargs, found.traced.assigned)
    return _captured(found.traced.program, module, found, masters)


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


def _distinct(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs with a tensor given twice as two tensors: torch.export would read one input for both."""
    seen: set[int] = set()

    def own(tensor: Tensor) -> Tensor:
        again = id(tensor) in seen
        seen.add(id(tensor))
        return tensor.clone() if again else tensor

    distinct: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map_only(Tensor, own, (args, kwargs))
    return distinct


def _captured(
    program: ExportedProgram, eager: nn.Module, found: Asked, masters: Mapping[str, Tensor] | None
) -> Captured:
    args, kwargs = found.args, found.kwargs
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
    read_by_name(graph, program)
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
    dims, alike = _dimensions(functional, user, found)
    sizes, notes = replace(Sizes.of(functional), alike=alike), list(found.notes)
    if found.declared or len(dims) - len(alike) > 1:
        notes += [f"sizes that it takes: {words}"] if (words := sizes.words(dims)) else []
    if hidden := hidden_batch_norms(functional.graph_module):
        notes.append(
            f"{hidden} BatchNorms stay unseen in regions of their own (a loop): take them out of the region to have "
            "them folded"
        )
    return Captured(
        functional, eager, spec, tuple(flat), tuple(user), dims, masters, tuple(notes), in_place, sizes
    )  # fmt: skip


def _dimensions(program: ExportedProgram, user: list[str], found: Asked) -> tuple[dict[str, str], dict[str, str]]:
    """Names for the symbolic dimensions, and which always have the size of another.

    The names are the user's own, ``batch`` for a first axis, ``dim`` for the rest. What has one name, and the first
    axes of which nobody said that they differ, are alike.
    """
    dims: dict[str, str] = {}
    alike: dict[str, str] = {}
    values = {node.name: node.meta.get("val") for node in program.graph.find_nodes(op="placeholder")}
    for name, axes in zip(user, found.axes(len(user))):
        shape: Any = values[name].shape if isinstance(values[name], Tensor) else ()
        for axis, size in enumerate(shape):
            if number(size) is not None:
                continue
            own, expression = name_of(axes.get(axis)), size.node.expr
            if not expression.is_symbol:  # such as 8*h
                root = getattr(getattr(axes.get(axis), "root", None), "__name__", own)
                for symbol in sorted(map(str, expression.free_symbols)):
                    dims.setdefault(symbol, root or f"{name}_dim{axis}_{len(dims)}")
                continue
            symbol, fresh = str(expression), own or ("batch" if axis == 0 else f"{name}_dim{axis}")
            same = next((s for s, known in dims.items() if known == fresh), None)
            if symbol not in dims and same is not None and (own or (axis == 0 and not found.declared)):
                alike[symbol] = same
            if symbol not in dims:
                dims[symbol] = fresh if own or same is None else f"{name}_{fresh}"
    return dims, alike


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
