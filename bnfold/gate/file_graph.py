"""What an ONNX file computes, value by value: names, operators and modules, without its weights."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
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

    operator: str
    node: str
    module: str
    reads: tuple[str, ...]
    depends: bool = True


@dataclass(frozen=True)
class FileGraph:
    """The values of a file by name, in the order of its nodes, its metadata, and what tool it says wrote it."""

    values: Mapping[str, FileValue]
    metadata: Mapping[str, str]
    producer: str = ""

    @classmethod
    def read(cls, path: Path) -> FileGraph:
        """Reads a file, its external data excepted.

        Raises:
            InputError: it is no ONNX file, or its external data lie anywhere else than they may.
        """
        model = read_model(path)
        made = {name for node in model.graph.node for name in node.output if name}
        values: dict[str, FileValue] = {}
        moving = {value.name for value in model.graph.input} - {tensor.name for tensor in model.graph.initializer}
        for node in model.graph.node:
            module = next((entry.value for entry in node.metadata_props if entry.key == "module"), "")
            reads = tuple(name for name in dict.fromkeys(node.input) if name in made)
            # A constant cast to an input's dtype is still one.
            depends = bool(moving & set(node.input[:1] if node.op_type == "CastLike" else node.input))
            moving |= set(node.output) if depends else set()
            value = FileValue(node.op_type, node.name, module, reads, depends)
            values |= {name: value for name in node.output if name}
        return cls(values, {entry.key: entry.value for entry in model.metadata_props}, model.producer_name)

    def behind(self, names: Iterable[str], known: Collection[str]) -> tuple[set[str], set[str]]:
        """What is computed on the way to values from the nearest that are ``known``, and these."""
        region, nearest, stack = set[str](), set[str](), list(names)
        while stack:
            name = stack.pop()
            if name in known:
                nearest.add(name)
            elif name not in region:
                region.add(name)
                stack += self.values[name].reads
        return region, nearest
