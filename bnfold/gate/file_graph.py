"""What an ONNX file computes, value by value: names, operators and modules, without its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bnfold.runtime.model_file import read_model


@dataclass(frozen=True)
class FileValue:
    """A value that a node of the file computes.

    Attributes:
        operator, node: operator type and name of the node; that may be empty.
        module: the module that the node's metadata name.
        reads: the values that the node reads and that are computed themselves.
        depends: whether it depends on an input of the file.
    """

    name: str
    operator: str
    node: str
    module: str
    reads: tuple[str, ...]
    depends: bool = True


@dataclass(frozen=True)
class FileGraph:
    """The values of a file in the order of its nodes, the names of its outputs and its metadata."""

    values: tuple[FileValue, ...]
    outputs: tuple[str, ...]
    metadata: Mapping[str, str]

    @classmethod
    def read(cls, path: Path) -> FileGraph:
        """Reads a file, its external data excepted.

        Raises:
            InputError: it is no ONNX file, or its external data lie anywhere else than they may.
        """
        model = read_model(path)
        made = {name for node in model.graph.node for name in node.output if name}
        values: list[FileValue] = []
        moving = {value.name for value in model.graph.input} - {tensor.name for tensor in model.graph.initializer}
        for node in model.graph.node:
            module = next((entry.value for entry in node.metadata_props if entry.key == "module"), "")
            reads = tuple(name for name in dict.fromkeys(node.input) if name in made)
            # A constant cast to an input's dtype is still one.
            depends = bool(moving & set(node.input[:1] if node.op_type == "CastLike" else node.input))
            moving |= set(node.output) if depends else set()
            values += [FileValue(name, node.op_type, node.name, module, reads, depends) for name in node.output if name]
        metadata = {entry.key: entry.value for entry in model.metadata_props}
        return cls(tuple(values), tuple(value.name for value in model.graph.output), metadata)

    def before(self, name: str, known: Mapping[str, float]) -> Sequence[str]:
        """The nearest values among ``known`` that a value is computed from."""
        by_name = {value.name: value for value in self.values}
        found: dict[str, None] = {}
        seen, stack = {name}, list(by_name[name].reads)
        while stack:
            each = stack.pop()
            if each in seen:
                continue
            seen.add(each)
            if each in known:
                found[each] = None
            else:
                stack += by_name[each].reads
        return list(found)
