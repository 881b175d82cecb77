"""What goes into a file and what comes out of it, the names that these have there, and its operators before and after
folding as one list: those that go among those that stay.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import onnx
from torch import Tensor, fx
from torch.export import ExportedProgram

from bnfold.errors import UsageError
from bnfold.graph.capture import Captured, tensor_inputs
from bnfold.graph.functional import module_of
from bnfold.graph.names import number_names
from bnfold.options import Options
from bnfold.report import Fate, Ledger, Operator, Port, Role


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
    named = {"input_names": tensor_inputs(captured.program), "output_names": number_names(captured.program)}
    for option, own in named.items():
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


@dataclass(frozen=True)
class _Row:
    """A value by its name: what makes it, the values that that reads, and whether it has constants of its own."""

    name: str
    kind: str
    module: str
    reads: tuple[str, ...]
    weighted: bool = False


def program_operators(captured: Captured, folded: ExportedProgram, ledger: Ledger) -> tuple[Operator, ...]:
    """The operators of a captured program and of the folded one, whose edits keep the names of values."""
    inputs = set(captured.names)
    return _drawn([*_of_program(captured.program, inputs)], [*_of_program(folded, inputs)], ledger)


def file_operators(before: onnx.ModelProto, after: onnx.ModelProto, ledger: Ledger) -> tuple[Operator, ...]:
    """The operators of an ONNX file and of the folded one, by the names of what they give; bodies are not entered."""
    return _drawn([*_of_file(before)], [*_of_file(after)], ledger)


def _of_program(program: ExportedProgram, inputs: set[str]) -> Iterator[_Row]:
    """What depends on the inputs; sizes and parts of lists stand for what they are taken from."""
    stands: dict[fx.Node, tuple[str, ...]] = {}
    for node in program.graph.nodes:
        reads = tuple(dict.fromkeys(name for source in node.all_input_nodes for name in stands.get(source, ())))
        if node.op == "placeholder" and node.name in inputs:
            yield _Row(node.name, "input", node.name, ())
        elif node.op == "output":
            yield _Row("output", "output", "", reads)
        elif node.op != "call_function" or not reads:
            continue
        elif not isinstance(node.meta.get("val"), Tensor | list | tuple) or "getitem" in str(node.target):
            stands[node] = reads
            continue
        else:
            kind = str(node.target).removeprefix("aten.").partition(".")[0]
            weighted = any(source not in stands for source in node.all_input_nodes)
            yield _Row(node.name, kind, module_of(node), reads, weighted)
        stands[node] = (node.name,)


def _of_file(model: onnx.ModelProto) -> Iterator[_Row]:
    made: dict[str, str] = {}
    held = {tensor.name for tensor in model.graph.initializer}
    for value in model.graph.input:
        if value.name not in held:
            made[value.name] = value.name
            yield _Row(value.name, "input", value.name, ())
    for node in model.graph.node:
        reads = tuple(dict.fromkeys(made[name] for name in node.input if name in made))
        if reads and node.output:
            made |= dict.fromkeys(node.output, node.output[0])
            module = node.name.rpartition("/")[0].replace("/", ".")
            yield _Row(node.output[0], node.op_type, module, reads, any(name in held for name in node.input))
    reads = tuple(made[value.name] for value in model.graph.output if value.name in made)
    yield _Row("output", "output", "", tuple(dict.fromkeys(reads)))


def _drawn(before: list[_Row], after: list[_Row], ledger: Ledger) -> tuple[Operator, ...]:
    had, has = {row.name for row in before}, {row.name: row for row in after}
    new = [row for row in after if row.name not in had]
    rows = [*before[:-1], *new, before[-1]] if before else new
    place = {row.name: i for i, row in enumerate(rows)}
    took = {name for entry in ledger.folded for name in entry.into} | {merge.into for merge in ledger.merges}
    left = {entry.value for entry in ledger.left}
    merged = {name for merge in ledger.merges for name in merge.values}

    def fate(row: _Row) -> Fate:
        if row.name not in had:
            return "new"
        if row.name not in has:
            return "merged" if row.name in merged else "folded"
        if row.name in left:
            return "left"
        return "changed" if row.weighted and {row.module, row.kind, row.name} & took - {""} else "kept"

    def reads(row: _Row) -> tuple[int, ...]:
        # What only reads something new now is drawn as it was, and as it is.
        names = (*row.reads, *(name for name in getattr(has.get(row.name), "reads", ()) if name not in had))
        return tuple(sorted({place[name] for name in names if name in place}))

    return tuple(Operator(row.kind, row.module, reads(row), fate(row)) for row in rows)
