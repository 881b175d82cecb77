"""Which sizes are to be dynamic, and what becomes of that: the example is made fit for it, and where the model's code
fixes a size, that is found out and said."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from bnfold.errors import CaptureError, InputError
from bnfold.graph.dimensions import Axes, as_hint, asked_axes, is_derived, is_dynamic, name_of, number
from bnfold.graph.failures import quiet
from bnfold.graph.tracing import Traced

#: Traces the module on positional and keyword inputs, with ``dynamic_shapes`` as torch.export takes them.
Trace = Callable[[tuple[Any, ...], dict[str, Any], Any], Traced]


@dataclass(frozen=True)
class Asked:
    """Example inputs, which of their axes are dynamic, and the trace that came of it."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: Mapping[str, Any] = field(default_factory=dict)  #: both by the parameters of ``forward``.
    wanted: Mapping[int, Axes] = field(default_factory=dict)  #: the dynamic axes of every tensor, by its id.
    #: whether somebody said which axes are dynamic; else the first axis of every input is the batch.
    declared: bool = True
    widened: bool = False  #: whether an axis of size 1 was repeated.
    traced: Traced = field(default=None)  # type: ignore[assignment]
    notes: tuple[str, ...] = ()  #: what a user should know.

    def axes(self, count: int) -> list[Axes]:
        """The dynamic axes of each of ``count`` flat inputs, in the order of the program's."""
        found = [self.wanted.get(id(leaf), {}) for leaf in pytree.tree_leaves(dict(self.inputs))]
        return found if len(found) == count else [{}] * count

    def fixed(self) -> Iterator[tuple[str, int, Any, int]]:
        """Input, axis, what was asked of it, and size of every axis that was to be dynamic and is not."""
        program = self.traced.program
        user = program.graph_signature.user_inputs
        values = {node.name: node.meta.get("val") for node in program.graph.find_nodes(op="placeholder")}
        for name, axes in zip(user, self.axes(len(user))):
            for axis, wanted in axes.items():
                size = number(values[str(name)].shape[axis])
                if is_dynamic(wanted) and size is not None:
                    yield str(name), axis, wanted, size

    def shapes(self, *, hints: bool) -> Any:
        """``dynamic_shapes`` for torch.export; with ``hints``, every named dimension as dynamic as the model allows."""

        def each(leaf: Any) -> Any:
            axes = self.wanted.get(id(leaf), {}).items()
            return {a: as_hint(w) if hints or isinstance(w, str) else w for a, w in axes} or None

        return pytree.tree_map(each, dict(self.inputs)) if any(self.wanted.values()) else None


def ask(
    trace: Trace, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any, *, static: bool
) -> Asked:
    """Traces the module with the sizes dynamic that are asked to be, or by default with a dynamic batch.

    Raises:
        CaptureError: it cannot be traced, or its code fixes a dimension that was given a name.
        InputError: the inputs do not fit ``forward``.
    """
    inputs, declared = _bound(module, args, kwargs), dynamic_shapes is not None
    wanted = asked_axes(inputs, dynamic_shapes) if declared else {} if static else _batch_axes(module, inputs)
    given = Asked(args, kwargs, inputs, wanted, declared)
    wide = _widened(module, given)
    try:
        found = _traced(trace, wide)
    except CaptureError as error:
        if not wide.widened or any(name_of(w) for axes in wanted.values() for w in axes.values()):
            raise
        return _narrowed(trace, given, f"with two samples it cannot be captured ({error})", error)
    lost = list(found.fixed())
    for name, axis, asked, size in lost:
        if name_of(asked):
            raise CaptureError(
                f"'{name_of(asked)}' (axis {axis} of input '{name}') cannot be dynamic: the model's code fixes it at "
                f"{size}",
                where=_place(found.traced, name, axis),
                hint=f"Give the number {size} in its place (--input, dynamic_shapes), or change that line",
            )
    said = tuple(
        f"axis {axis} of input '{name}' is fixed at {size}: the model's code specialises it"
        + (f" ({place})" if (place := _place(found.traced, name, axis)) else "")
        for name, axis, _, size in lost
    )
    if lost and wide.widened:
        return _narrowed(trace, given, said[0].partition(": ")[2])
    if not declared and (limit := _limit(found.traced.program)):
        # ONNX cannot say "up to 4": a batch that holds for some sizes only must not look like one that holds for all.
        return _narrowed(trace, given, f"the model's code takes {limit} only")
    if not declared and wide.widened and (other := _otherwise(found, given, module)):
        return _narrowed(trace, given, other)
    return replace(found, notes=said)


def _traced(trace: Trace, asked: Asked) -> Asked:
    """As it is asked, and where that is too strict or multiples are asked for in vain, as far as the model allows."""
    if any(is_derived(w) for axes in asked.wanted.values() for w in axes.values()):
        try:
            return replace(asked, traced=trace(asked.args, asked.kwargs, asked.shapes(hints=False)))
        except CaptureError:
            pass
    return replace(asked, traced=trace(asked.args, asked.kwargs, asked.shapes(hints=True)))


def _narrowed(trace: Trace, given: Asked, reason: str, cause: CaptureError | None = None) -> Asked:
    """The example as it was given, its batch fixed."""

    def kept(axes: Axes, tensor: Any) -> Axes:
        return {a: w for a, w in axes.items() if given.declared and tensor.shape[a] != 1}

    tensors = {id(leaf): leaf for leaf in pytree.tree_leaves(dict(given.inputs))}
    left = replace(given, wanted={key: kept(axes, tensors[key]) for key, axes in given.wanted.items()})
    try:
        found = _traced(trace, left)
    except CaptureError:
        if cause is None:
            raise
        raise cause from None
    return replace(found, notes=(f"the batch is fixed: {reason}",))


def _bound(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The inputs by the parameters of ``forward``, in its order."""
    try:
        return dict(inspect.signature(module.forward).bind(*args, **kwargs).arguments)
    except TypeError as error:
        raise InputError(
            f"the inputs do not fit forward: {error}", hint=f"Its signature is {inspect.signature(module.forward)}"
        ) from error


def _batch_axes(module: nn.Module, inputs: Mapping[str, Any]) -> dict[int, Axes]:
    """The first axis of every tensor that has as many rows as the first."""
    tensors = [leaf for leaf in pytree.tree_leaves(dict(inputs)) if isinstance(leaf, Tensor) and leaf.ndim]
    parameters = inspect.signature(module.forward).parameters.values()
    if tensors and any(p.kind is p.VAR_KEYWORD and p.name in inputs for p in parameters):
        raise CaptureError(
            "torch.export takes no dynamic batch through **kwargs",
            hint="Name them in forward's signature, or use --static",
        )
    return {id(tensor): {0: Dim.AUTO} for tensor in tensors if tensor.shape[0] == tensors[0].shape[0]}


def _widened(module: nn.Module, given: Asked) -> Asked:
    """With every axis of size 1 that is to be dynamic repeated, which torch.export would take for a constant."""
    wanted: dict[int, Axes] = {}
    widened = False

    def wide(leaf: Any) -> Any:
        nonlocal widened
        axes = given.wanted.get(id(leaf), {})
        ones = {axis for axis, w in axes.items() if is_dynamic(w) and leaf.shape[axis] == 1}
        made = leaf.repeat([2 if axis in ones else 1 for axis in range(leaf.ndim)]) if ones else leaf
        wanted[id(made)] = axes
        widened = widened or bool(ones)
        return made

    args, kwargs = pytree.tree_map(wide, (given.args, given.kwargs))
    return replace(
        given, args=args, kwargs=kwargs, inputs=_bound(module, args, kwargs), wanted=wanted, widened=widened
    )  # fmt: skip


def _place(traced: Traced, name: str, axis: int) -> str | None:
    """The line of the user's code that fixed an axis, where it is known."""
    for source, place in traced.places.items():
        keys = "_".join(part.strip("'") for part in source.partition("].")[0].removeprefix("L[").split("]["))
        if keys == name and source.endswith(f".size()[{axis}]"):
            return place
    return None


def _limit(program: ExportedProgram) -> str:
    """The sizes of a first axis for which the trace holds, where the model's code sets an upper limit."""
    for node in program.graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        size: Any = value.shape[0] if isinstance(value, Tensor) and value.ndim else 0
        limits = None if isinstance(size, int) else program.range_constraints.get(size.node.expr)
        if limits is not None and limits.upper.is_Integer:
            return f"batches of {max(int(limits.lower), 1)} to {int(limits.upper)}"
    return ""


def _otherwise(found: Asked, given: Asked, module: nn.Module) -> str:
    """What the model does otherwise for one sample than for two, such as dropping the batch's axis; else ``""``."""
    try:
        with torch.no_grad(), quiet():
            own = [leaf for leaf in pytree.tree_leaves(module(*given.args, **given.kwargs)) if isinstance(leaf, Tensor)]
    except Exception:  # whoever judges it says why
        return ""
    returned: Sequence[Any] = found.traced.program.graph.output_node().args[0]
    metas = [getattr(node, "meta", {}).get("val") for node in returned]
    values = [meta for meta in metas if isinstance(meta, Tensor)]

    def differs(size: Any, one: int) -> bool:
        if isinstance(size, int):
            return size != one
        at_one = size.node.expr.subs({s: 1 for s in size.node.expr.free_symbols if str(s).startswith("s")})
        return bool(at_one.is_number and at_one != one)  # what depends on data may be anything

    same = len(own) == len(values) and all(a.ndim == b.ndim for a, b in zip(own, values))
    if same and not any(differs(size, one) for a, b in zip(own, values) for one, size in zip(a.shape, b.shape)):
        return ""
    return "for one sample the model returns other shapes than for two"
