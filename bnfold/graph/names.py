"""Names: for a program's outputs, from the structure of what the model returns; for constants, from the model's own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec
from torch.utils import _pytree as pytree


def output_names(program: ExportedProgram) -> list[str]:
    """A name per output: dictionary keys and fields where there are any, else ``output``, ``output_0``, ..."""
    spec = program.call_spec.out_spec
    count = len(program.graph_signature.output_specs)
    names = ["output"] if count == 1 else [f"output_{i}" for i in range(count)]
    fallback = list(names)
    structured = spec is not None and spec.num_leaves == count
    tree = pytree.tree_unflatten(list(range(count)), spec) if structured else []
    for keys, index in _leaves(tree):
        if any(not key.isdigit() for key in keys):
            names[index] = ".".join(keys)
    inputs = {spec.arg.name for spec in program.graph_signature.input_specs}
    for clashing in (names, fallback):
        for i in range(count):
            while clashing[i] in inputs:
                clashing[i] += "_out"
    return names if len(set(names)) == count else fallback


def _leaves(tree: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every leaf with the keys on the way to it; a class may be registered without, and often keeps them all the same.

    torch's own ``tree_flatten_with_path`` raises for such a class.
    """
    kind = pytree.SUPPORTED_NODES.get(pytree._get_node_type(tree))
    if kind is None:
        yield (), tree
        return
    children: list[tuple[Any, Any]]
    if kind.flatten_with_keys_fn is not None:
        children = list(kind.flatten_with_keys_fn(tree)[0])
    else:
        values, context = kind.flatten_fn(tree)
        named = isinstance(context, (list, tuple)) and len(context) == len(values)
        children = list(zip(context if named else range(len(values)), values))
    for key, child in children:
        word = str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))))
        yield from (((word, *keys), leaf) for keys, leaf in _leaves(child))


def number_names(program: ExportedProgram) -> list[str]:
    """The names of the outputs that hold numbers: None has a name in the structure, and no value."""
    (values,) = program.graph.output_node().args
    kept = [isinstance(value, (fx.Node, int, float)) for value in cast("Sequence[Any]", values)]
    return [name for name, number in zip(output_names(program), kept) if number]


def common_name(names: list[str]) -> str | None:
    """The parameter that is computed from these: ``conv.parametrizations.weight.original0`` -> ``conv.weight``."""
    for name in names:
        module, mark, rest = name.rpartition("parametrizations.")
        if mark:
            return module + rest.split(".")[0]
        if name.endswith("_g"):
            return name[:-2]
    return names[0] if len(names) == 1 else None


def free_name(wanted: str, taken: set[str], numbers: dict[str, int]) -> str:
    """``wanted``, or with a number after it, such that it names neither a tensor nor a module that holds one.

    ``numbers`` keeps how far every name has been counted, for the weight that a thousand layers share.
    """
    name = wanted
    while name in taken:
        numbers[wanted] = numbers.get(wanted, 0) + 1
        name = f"{wanted}_{numbers[wanted]}"
    return name


def with_modules(names: Iterable[str]) -> set[str]:
    """The names, and those of the modules that they stand in."""
    found = set(names)
    for name in list(found):
        while "." in name:
            name = name.rpartition(".")[0]
            found.add(name)
    return found


def read_by_name(graph: fx.Graph, program: ExportedProgram) -> None:
    """Lets ``graph``, of ``program``, read the parameters and buffers that it knows under a name under that name.

    Code that reads one from elsewhere than its module, such as a list, gives torch.export a constant without a name.
    """
    nodes = {node.name: node for node in graph.find_nodes(op="placeholder")}
    named: dict[tuple[object, ...], fx.Node] = {}
    for spec in sorted(program.graph_signature.input_specs, key=_named_first):
        constant = spec.kind is InputKind.CONSTANT_TENSOR
        tensor = (program.constants if constant else program.state_dict).get(spec.target or "")
        if not isinstance(tensor, Tensor) or not tensor.numel() or tensor.layout is not torch.strided:
            continue
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        node = nodes[spec.arg.name]
        if not constant:
            named.setdefault(place, node)
        elif place in named:
            node.replace_all_uses_with(named[place])


def _named_first(spec: InputSpec) -> tuple[bool, int]:
    return spec.kind is InputKind.CONSTANT_TENSOR, len(spec.target or "")
