"""Regions of a captured graph: what stands inside of ``with torch.enable_grad()`` or ``torch.autocast(...)``.

torch.export keeps each as an operator with a graph of its own, which hides what is in it from every pass. Gradients
change no value, and neither does autocast that is off or for another device, so the operators of such a region go into
the graph around it. Autocast that is on rounds, and stays.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx


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


def hidden_batch_norms(program_module: fx.GraphModule) -> int:
    """How many BatchNorms stand in regions that are left, where no pass sees them."""
    bodies = {node.target for node in program_module.graph.nodes if node.op == "get_attr"}
    inner = [module for name, module in program_module.named_modules() if name.split(".")[0] in bodies]
    nodes = (node for module in inner if isinstance(module, fx.GraphModule) for node in module.graph.nodes)
    return sum("batch_norm" in str(node.target) for node in nodes if node.op == "call_function")


def _inside(node: fx.Node, owner: fx.GraphModule) -> tuple[fx.GraphModule, list[Any]] | None:
    """The graph and the operands of a region that changes no value."""
    name = getattr(node.target, "__name__", "")
    at = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}.get(name)
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
