"""A copy of a right file, to be edited."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

Array = np.ndarray[Any, Any]
Generator = np.random.Generator


@dataclass
class File:
    """A copy of the right file, the shapes of its values at one example, and its values there."""

    model: onnx.ModelProto
    values: Mapping[str, Array]
    count: int = 0
    constants: dict[str, onnx.TensorProto] = field(init=False)

    def __post_init__(self) -> None:
        self.constants = {t.name: t for t in self.model.graph.initializer}

    @property
    def nodes(self) -> Any:
        return self.model.graph.node

    def new(self, value: Any) -> str:
        """A constant of a new name."""
        self.count += 1
        name = f"mutant_{self.count}"
        self.model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def behind(self, name: str, make: Callable[[str, str], list[onnx.NodeProto]]) -> None:
        """Puts nodes between a value and all that read it: ``make(before, after)``."""
        raw = f"{name}_raw"
        at = next(i for i, node in enumerate(self.nodes) if name in node.output)
        for node in self.nodes:
            node.output[:] = [raw if o == name else o for o in node.output]
        nodes = list(self.nodes)
        made = make(raw, name)
        del self.nodes[:]
        self.nodes.extend([*nodes[: at + 1], *made, *nodes[at + 1 :]])

    def floats(self) -> list[str]:
        """Floating-point values that nodes compute, in order."""
        return [o for node in self.nodes for o in node.output if o in self.values and self.values[o].dtype.kind == "f"]

    def dtype(self) -> Any:
        """That of the file's floats."""
        kinds = [numpy_helper.to_array(t).dtype for t in self.constants.values() if t.data_type in (1, 10)]
        return np.float16 if np.dtype(np.float16) in kinds else np.float32


def small(rng: Generator) -> float:
    """One plus something between a hundred thousandth and a half, of either sign."""
    return float(1 + rng.choice([-1, 1]) * 10 ** rng.uniform(-4, -0.3))
