"""Building one ExportedProgram from another. Whatever leans on how torch.export builds a program stands here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram, ModuleCallEntry
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    SymIntArgument,
    TensorArgument,
)
from torch.nn import Parameter
from torch.utils import _pytree as pytree

from bnfold.affine import Meaning
from bnfold.errors import FoldError
from bnfold.graph.names import free_name, with_modules

#: The key of what an edited value stands for in a node's metadata.
MEANING = "bnfold.meaning"


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy whose nodes keep their names and have metadata of their own."""
    new = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        copied = mapping[node] = new.node_copy(node, mapping.__getitem__)
        copied.name = node.name  # fx would rename an input called ``input``
    return new


def meanings(program: ExportedProgram) -> dict[str, Meaning | None]:
    """What edited values stand for, by name; None: for none of the captured ones. All others are themselves."""
    return {node.name: node.meta[MEANING] for node in program.graph.nodes if MEANING in node.meta}


def output_specs(program: ExportedProgram, graph: fx.Graph) -> list[OutputSpec]:
    """The program's output specs, naming the values that ``graph``, its edited copy, returns."""
    returned = next(n for n in graph.nodes if n.op == "output").args[0]
    return [
        replace(spec, arg=replace(spec.arg, name=node.name)) if isinstance(node, fx.Node) else spec
        for spec, node in zip(program.graph_signature.output_specs, returned)
    ]


def rebuild(
    old: ExportedProgram,
    graph: fx.Graph,
    signature: ExportGraphSignature,
    state: dict[str, Any],
    constants: dict[str, Any],
    module_call_graph: list[ModuleCallEntry] | None = None,
    bodies: Mapping[str, fx.GraphModule] | None = None,
) -> ExportedProgram:
    """An ExportedProgram like ``old`` around another graph. Its constructor validates.

    ``bodies`` take the place of the graphs of regions, by the names under which the graph refers to them.
    """
    named = {str(node.target) for node in graph.find_nodes(op="get_attr")} if bodies else ()
    root = {name: (bodies or {}).get(name) or getattr(old.graph_module, name) for name in named}
    new = ExportedProgram(
        root=root or old.graph_module,
        graph=graph,
        graph_signature=signature,
        state_dict=state,
        range_constraints=dict(old.range_constraints),
        module_call_graph=module_call_graph or old.module_call_graph,
        example_inputs=old.example_inputs,
        constants=constants,
        verifiers=old.verifiers,
    )
    new._guards_code = old._guards_code  # of a program out of a file no constructor finds them again
    return new


def with_outputs(program: ExportedProgram, values: Iterable[str]) -> ExportedProgram:
    """``program`` with more values returned, after its own outputs and as one flat tuple."""
    graph = copy_graph(program.graph)
    output = next(n for n in graph.nodes if n.op == "output")
    wanted = list(values)
    nodes = {n.name: n for n in graph.nodes if n.name in set(wanted)}
    more = [nodes[name] for name in wanted]
    output.args = ((*output.args[0], *more),)
    old = program.graph_signature
    added = [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), None) for node in more]
    signature = ExportGraphSignature(list(old.input_specs), [*old.output_specs, *added])
    top, *rest = program.module_call_graph
    assert top.signature is not None
    spec = pytree.tree_structure(tuple(output.args[0]), is_leaf=lambda leaf: leaf is not output.args[0])
    # The names of what is added stay out: a decomposition renames one of several results, and misses the old name.
    flat = replace(top.signature, out_spec=spec)
    return rebuild(
        program,
        graph,
        signature,
        dict(program.state_dict),
        dict(program.constants),
        [replace(top, signature=flat), *rest],
    )


def with_constants(
    old: ExportedProgram,
    graph: fx.Graph,
    new: Mapping[fx.Node, tuple[Tensor, str]],
    bodies: Mapping[str, fx.GraphModule],
) -> ExportedProgram:
    """``old`` around ``graph``, its edited copy, without the constants that nobody reads any more.

    ``new``: placeholders of constants of its own, what they hold before it is rounded to their dtype, and a name.

    Raises:
        FoldError: torch rejects the edited program; a defect of bnfold.
    """
    specs = {spec.arg.name: spec for spec in old.graph_signature.input_specs}
    state, constants = dict[str, Tensor](), dict(old.constants)
    live = graph.find_nodes(op="placeholder")
    for node in live:
        if node in new:
            continue
        spec = specs[node.name]
        if spec.kind is not InputKind.USER_INPUT and not node.users:
            graph.erase_node(node)
            constants.pop(spec.target or "", None)
        elif spec.target in old.state_dict:
            state[spec.target] = old.state_dict[spec.target]
    taken, numbers = with_modules([*state, *constants]), dict[str, int]()
    for node in [node for node in live if node in new]:
        if not node.users:
            graph.erase_node(node)
            continue
        tensor, origin = new[node]
        name = free_name(origin, taken, numbers)
        taken.add(name)
        state[name] = Parameter(tensor.to(node.meta["val"].dtype).contiguous(), requires_grad=False)
        specs[node.name] = InputSpec(InputKind.PARAMETER, TensorArgument(node.name), name)
    keep = [specs[node.name] for node in graph.find_nodes(op="placeholder")]
    try:
        signature = ExportGraphSignature(keep, output_specs(old, graph))
        return rebuild(old, graph, signature, state, constants, bodies=bodies)
    except Exception as error:
        raise FoldError(f"the folded program is not valid: {error}", hint="Please report this model.") from error


def of_body(old: ExportedProgram, body: fx.GraphModule, stored: Mapping[str, str]) -> ExportedProgram | None:
    """The graph of a region of ``old`` as a program of its own; None where it takes or returns anything but tensors.

    ``stored``: names of its placeholders that hold a parameter or buffer of ``old``, and the name of that.
    """
    graph = copy_graph(body.graph)
    known = {spec.target: spec for spec in old.graph_signature.input_specs}
    specs = []
    for node in graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        if node.name in stored:
            specs.append(replace(known[stored[node.name]], arg=TensorArgument(node.name)))
        elif isinstance(value, Tensor):
            specs.append(InputSpec(InputKind.USER_INPUT, TensorArgument(node.name), None))
        elif hasattr(value, "node"):
            specs.append(InputSpec(InputKind.USER_INPUT, SymIntArgument(node.name), None))
        else:
            return None
    (returned,) = graph.output_node().args
    if not isinstance(returned, (tuple, list)) or not all(isinstance(node, fx.Node) for node in returned):
        return None
    outputs = [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), None) for node in returned]  # type: ignore
    state = {name: old.state_dict[name] for name in stored.values() if name in old.state_dict}
    constants = {name: old.constants[name] for name in stored.values() if name in old.constants}
    inner = {str(node.target): getattr(body, str(node.target)) for node in graph.find_nodes(op="get_attr")}
    return rebuild(old, graph, ExportGraphSignature(specs, outputs), state, constants, bodies=inner)


@dataclass(frozen=True)
class Overflow:
    """A constant that does not fit its dtype: one magnitude too large, or the largest of those that are too small."""

    largest: float
    index: tuple[int, ...]


def overflow(tensor: Tensor, dtype: torch.dtype) -> Overflow | None:
    """The first element that would not be finite, rounded to ``dtype``; the largest of weights that lose digits there.

    Below the normal numbers these are fewer and fewer. A vector is added to something, and may be as small as it is.
    """
    if tensor.numel() and dtype.is_floating_point:
        # One look at all of it: nearly every tensor fits, and a NaN fails every comparison.
        low, high = tensor.aminmax()
        largest, known = max(-float(low), float(high)), torch.finfo(dtype)
        if tensor.ndim > 1 and 0 < largest < known.tiny:
            return Overflow(largest, tuple(int(i) for i in (tensor.abs() == largest).nonzero()[0]))
        if -known.max <= float(low) and float(high) <= known.max:
            return None
    rounded = tensor.to(dtype)
    bad = ~rounded.isfinite()
    if not bool(bad.any()):
        return None
    index = tuple(int(i) for i in bad.nonzero()[0])
    return Overflow(float(tensor[index].abs()), index)
