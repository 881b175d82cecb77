"""Regions of a captured graph: what stands inside of ``with torch.enable_grad()`` or ``torch.autocast(...)``.

torch.export keeps each as an operator with a graph of its own, which hides what is in it from every pass. Gradients
change no value, and neither does autocast that is off or for another device, so the operators of such a region go into
the graph around it. Autocast that is on rounds, and stays.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

#: Operators of regions by name: which argument is the graph; those behind it are its operands.
_BODY = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}


def inline_regions(graph: fx.Graph, owner: fx.GraphModule) -> None:
    """Puts the operators of regions that change no value into ``graph``, itself; ``owner`` holds their graphs."""
    for node in [node for node in graph.nodes if node.op == "call_function"]:
        inside = _inside(node, owner)
        if inside is None:
            continue
        body, operands = inside
        with graph.inserting_before(node):
            results = _copied(graph, body, operands)
        for user in list(node.users):
            user.replace_all_uses_with(results[user.args[1]])
            graph.erase_node(user)
        reference = next(operand for operand in node.all_input_nodes if operand.op == "get_attr")
        graph.erase_node(node)
        if not reference.users:
            graph.erase_node(reference)


def bodies(node: fx.Node) -> list[tuple[fx.Node, list[Any]]]:
    """The graphs that an operator runs on its operands, as what refers to them; none of an operator of another kind."""
    name = getattr(node.target, "__name__", "")
    if name == "cond":
        return [(reference, list(node.args[3])) for reference in node.args[1:3]]  # type: ignore[arg-type, misc]
    at = _BODY.get(name)
    return [] if at is None else [(node.args[at], list(node.args[at + 1 :]))]  # type: ignore[list-item]


def hidden_batch_norms(owner: fx.GraphModule) -> int:
    """How many BatchNorms stand in regions whose graphs no pass looks into."""
    found = 0
    for node in owner.graph.nodes:
        if node.op == "get_attr" and isinstance(body := getattr(owner, str(node.target), None), fx.GraphModule):
            seen = any(node in [reference for reference, _ in bodies(user)] for user in node.users)
            found += hidden_batch_norms(body) if seen else batch_norms(body)
    return found


def batch_norms(body: fx.GraphModule) -> int:
    """How many BatchNorms stand in a graph and in the graphs of its regions."""
    graphs = [module.graph for module in body.modules() if isinstance(module, fx.GraphModule)]
    return sum("batch_norm" in str(node.target) for graph in graphs for node in graph.nodes)


def _inside(node: fx.Node, owner: fx.GraphModule) -> tuple[fx.GraphModule, list[Any]] | None:
    """The graph and the operands of a region that changes no value."""
    name = getattr(node.target, "__name__", "")
    at = _BODY.get(name)
    if at is None or any(getattr(user, "op", "") != "call_function" or len(user.args) != 2 for user in node.users):
        return None
    reference = node.args[at]
    assert isinstance(reference, fx.Node)
    body = getattr(owner, str(reference.target))
    if any(_inside(inner, body) is None for inner in body.graph.nodes if "wrap_with" in str(inner.target)):
        return None
    if any(inner.op == "get_attr" and not _is_region(inner) for inner in body.graph.nodes):
        return None
    if name == "wrap_with_autocast" and node.args[2] is True and _reaches(body, str(node.args[0])):
        return None
    return body, list(node.args[at + 1 :])


def _is_region(reference: fx.Node) -> bool:
    return all("wrap_with" in str(user.target) for user in reference.users)


def _reaches(body: fx.GraphModule, device: str) -> bool:
    values = [node.meta.get("val") for node in body.graph.nodes]
    return any(isinstance(value, Tensor) and value.device.type == device for value in values)


def _copied(graph: fx.Graph, body: fx.GraphModule, operands: list[Any]) -> Any:
    """What the graph of ``body`` returns, computed in ``graph`` from ``operands``."""
    known: dict[fx.Node, Any] = {}
    given = iter(operands)
    regions: dict[fx.Node, Any] = {}
    for node in body.graph.nodes:
        inside = _inside(node, body) if node.op == "call_function" else None
        if node.op == "placeholder":
            known[node] = next(given)
        elif node.op == "output":
            return fx.node.map_arg(node.args[0], known.__getitem__)
        elif inside is not None:
            regions[node] = _copied(graph, inside[0], [fx.node.map_arg(x, known.__getitem__) for x in inside[1]])
        elif node.args and node.args[0] in regions:
            known[node] = regions[node.args[0]][node.args[1]]
        elif node.op != "get_attr":
            known[node] = graph.node_copy(node, known.__getitem__)
    raise AssertionError("a graph without an output")
