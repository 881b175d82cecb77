"""What goes into a file and what comes out of it, and the names that these have there."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, fx
from torch.export import ExportedProgram

from bnfold.errors import UsageError
from bnfold.graph.capture import Captured, tensor_inputs
from bnfold.graph.names import number_names
from bnfold.options import Options
from bnfold.report import Port, Role


def interface(captured: Captured, options: Options | None = None) -> tuple[Port, ...]:
    """What goes into the model and what comes out, by the names that ``options`` give it in the file."""
    program, names = captured.program, renamed(options, captured) if options is not None else {}
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    new: Mapping[str, str] = names.get("inputs", {})
    found: list[tuple[Role, str, Any]] = [
        ("input", new.get(name, name), values[name]) for name in tensor_inputs(program)
    ]
    wanted = names.get("outputs") or number_names(program)
    found += [("output", name, value) for name, value in zip(wanted, returned(program))]
    return tuple(
        Port(role, name, str(value.dtype).removeprefix("torch."), tuple(_named(n, captured.dims) for n in value.shape))
        for role, name, value in found
        if isinstance(value, Tensor)
    )


def returned(program: ExportedProgram) -> list[Any]:
    """What stands for every output that holds numbers, in the order of their names: a fake tensor, or None."""
    (values,) = program.graph.output_node().args
    kept = [value for value in cast("tuple[Any, ...]", values) if isinstance(value, fx.Node | int | float)]
    return [getattr(value, "meta", {}).get("val") for value in kept]


def _named(size: Any, dims: Mapping[str, str]) -> int | str:
    if isinstance(size, int):
        return size
    return re.sub(r"\w+", lambda found: dims.get(found.group(), found.group()), str(size.node.expr))


def renamed(options: Options, captured: Captured) -> dict[str, Any]:
    """The names that the user wants in the file, as ``lower`` takes them.

    UsageError where they are too many or too few, one is there twice, or is that of another of the model's.
    """
    found: dict[str, Any] = {}
    for option, own in (
        ("input_names", tensor_inputs(captured.program)), ("output_names", number_names(captured.program)),
    ):  # fmt: skip
        wanted, where = list(getattr(options, option)), f"--{option.replace('_', '-')}"
        if not wanted:
            continue
        if len(wanted) != len(own):
            what = f"{len(wanted)} names are given and the model has {len(own)}"
            raise UsageError(what, where=where, hint=f"Of its own they are {', '.join(own)}")
        if len(set(wanted)) < len(wanted) or not all(wanted):
            raise UsageError("a name is empty or given twice", where=where)
        if moved := [name for name, old in zip(wanted, own) if name != old and name in own]:
            what = f"'{moved[0]}' is what the model calls another of them"
            raise UsageError(what, where=where, hint="Choose another name, or change the order in the model")
        if option == "input_names":
            found["inputs"] = dict(zip(own, wanted))
        else:
            found["outputs"] = wanted
    return found
