"""Names for a program's outputs, taken from the structure of what the model returns."""

from __future__ import annotations

from torch.export import ExportedProgram
from torch.utils import _pytree as pytree


def output_names(program: ExportedProgram) -> list[str]:
    """A name per output: dictionary keys and fields where there are any, else ``output``, ``output_0``, ..."""
    spec = program.call_spec.out_spec
    count = len(program.graph_signature.output_specs)
    names = ["output"] if count == 1 else [f"output_{i}" for i in range(count)]
    fallback = list(names)
    structured = spec is not None and spec.num_leaves == count
    tree = pytree.tree_unflatten(list(range(count)), spec) if structured else []
    for path, index in pytree.tree_flatten_with_path(tree)[0]:
        keys = [str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path]
        if any(not key.isdigit() for key in keys):
            names[index] = ".".join(keys)
    inputs = {spec.arg.name for spec in program.graph_signature.input_specs}
    for clashing in (names, fallback):
        for i in range(count):
            while clashing[i] in inputs:
                clashing[i] += "_out"
    return names if len(set(names)) == count else fallback
