"""Folding in regions: graphs of their own inside of a graph, as ``torch.cond`` and autocast have them.

What stands in a region with a contraction beside it folds there; nothing passes its border. The constants that a region
reads are operands of its operator, so a constant that changes is an operand more, for all of its graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from bnfold.errors import CaptureError
from bnfold.graph.functional import make_functional
from bnfold.graph.graph import Graph, Node
from bnfold.graph.program import of_body
from bnfold.graph.regions import bodies
from bnfold.report import Entry, Ledger, Refusal


@dataclass(frozen=True)
class _Body:
    """One graph of a region: what refers to it, the same folded, and the operand of every input, by its name."""

    reference: Node
    program: ExportedProgram
    operands: dict[str, Any]


def fold_regions(graph: Graph, fold: Callable[[Graph], Ledger]) -> tuple[Entry, ...]:
    """Folds in every region of ``graph``; the entries of what stands there."""
    found: list[Entry] = []
    for node in [node for node in graph.graph.nodes if node.op == "call_function"]:
        folded, entries = [], []
        for reference, operands in bodies(node):
            program = _program(graph, reference, operands)
            if program is None or len(reference.users) > 1:
                found += _unread(graph, node, reference)
                break
            inner = Graph(program, graph.masters)
            ledger = fold(inner)
            entries += [_told(entry, node, reference) for entry in ledger.entries]
            names = [n.name for n in program.graph.find_nodes(op="placeholder")]
            folded.append(_Body(reference, inner.finish(), dict(zip(names, operands))))
        else:
            found += entries
            if any(entry.outcome != "left" for entry in entries):
                _put_back(graph, node, folded)
    return tuple(found)


def _program(graph: Graph, reference: Node, operands: list[Any]) -> ExportedProgram | None:
    """A graph of a region as a program without in-place operators; None where it is left alone."""
    body = getattr(graph.program.graph_module, str(reference.target))
    names = [node.name for node in body.graph.find_nodes(op="placeholder")]
    stored = {n: target for n, o in zip(names, operands) if (target := graph.stored_name(o)) is not None}
    program = of_body(graph.program, body, stored)
    try:
        if program is not None:
            make_functional(program.graph, inputs=set(names) - set(stored), constants=stored)
    except CaptureError:
        return None
    return program


def _unread(graph: Graph, node: Node, reference: Node) -> Iterator[Entry]:
    """The BatchNorms of a graph that is left alone."""
    for inner in getattr(graph.program.graph_module, str(reference.target)).graph.nodes:
        if "batch_norm" in str(inner.target):
            refusals = (Refusal("region", f"region '{node.name}'"),) * 2
            layer = graph.module_class(inner)
            yield Entry(
                f"{reference.target}.{inner.name}", graph.module(inner), layer, "batch_norm", "left", (), (), refusals
            )


def _told(entry: Entry, node: Node, reference: Node) -> Entry:
    """As the graph around it tells it: its borders are no input and no output of the model."""

    def refusal(given: Refusal) -> Refusal:
        border = given.reason in ("model-input", "model-output")
        return replace(given, reason="region", blocker=f"region '{node.name}'") if border else given

    refusals = tuple(refusal(each) for each in entry.refusals)
    return replace(entry, value=f"{reference.target}.{entry.value}", refusals=refusals, site=())


def _put_back(graph: Graph, node: Node, folded: list[_Body]) -> None:
    """The folded graphs in place of those that were: all read what any of them reads."""
    operands: dict[Any, Any] = {}
    inputs = [list(_inputs(graph, body)) for body in folded]
    for key, operand, _ in (each for own in inputs for each in own):
        operands.setdefault(key, operand)
    for body, own in zip(folded, inputs):
        made = fx.Graph()
        places: dict[Any, Node] = {}
        for i, (key, operand) in enumerate(operands.items()):
            named = next((inner for k, _, inner in own if k == key), None)
            place = places[key] = made.placeholder(f"unread_{i}" if named is None else named.name)
            place.meta = dict((operand if named is None else named).meta)
        known = {inner: places[key] for key, _, inner in own}
        for inner in body.program.graph.nodes:
            if inner.op != "placeholder":
                known[inner] = made.node_copy(inner, known.__getitem__)
        graph.bodies[str(body.reference.target)] = fx.GraphModule(body.program.graph_module, made)
    first = node.args.index(folded[-1].reference) + 1
    given = tuple(operands.values())
    node.args = (*node.args[:first], given) if isinstance(node.args[first], tuple) else (*node.args[:first], *given)


def _inputs(graph: Graph, body: _Body) -> Iterator[tuple[Any, Any, Node]]:
    """What a folded graph reads: what tells it from others, the operand, and the placeholder."""
    nodes = {node.name: node for node in body.program.graph.find_nodes(op="placeholder")}
    for spec in body.program.graph_signature.input_specs:
        inner = nodes[spec.arg.name]
        if spec.arg.name in body.operands:
            operand = body.operands[spec.arg.name]
        else:
            tensor = body.program.state_dict[str(spec.target)]
            operand = graph.new_constant(tensor, tensor.dtype, str(spec.target))
        key = operand if isinstance(operand, fx.Node) else (inner.name, operand)
        if inner.users or spec.kind is InputKind.USER_INPUT:
            yield key, operand, inner
