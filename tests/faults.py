"""Faults to inject into an exported ONNX file: what a wrong fold, translation or optimiser could do to it.

``FAULTS[name](model)`` changes an ``onnx.ModelProto`` of ``Victim`` in place. Every one must turn the verdict.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import torch
import zoo
from onnx import helper, numpy_helper
from torch import Tensor, nn

#: What the residual branch is multiplied with: nothing in it can be seen at the outputs.
HIDDEN = 1e-9


class Victim(nn.Module):
    """Three convolutions with BatchNorm, one of them behind a LayerScale of next to nothing, and two outputs."""

    def __init__(self, scale: float = 1.0, eps: float = 1e-5) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8, eps=eps)
        self.body, self.body_norm = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8, eps=eps)
        self.branch, self.branch_norm = nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8, eps=eps)
        self.tail, self.head = nn.Tanh(), nn.Linear(8, 5)
        self.scale = scale

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 5) and (N, 5) of images (N, 3, 8, 8)."""
        x = self.stem_norm(self.stem(x)).relu()
        x = self.body_norm(self.body(x)).relu()
        x = x + HIDDEN * self.tail(self.branch_norm(self.branch(x)))
        features = self.head(x.mean((2, 3)))
        return features * self.scale, features.sin() * self.scale


def victim(scale: float = 1.0, eps: float = 1e-5) -> tuple[Victim, tuple[Tensor]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = Victim(scale, eps)
    zoo.randomize(zoo.he_init(module))
    with torch.no_grad():  # a channel of weight 0 hides what is done to it
        for norm in (module.stem_norm, module.body_norm, module.branch_norm):
            norm.weight[norm.weight == 0] = 0.7
    return module, (torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)),)


def on_weight(
    layer: str, change: Callable[[np.ndarray], np.ndarray], slot: int = 1
) -> Callable[[onnx.ModelProto], None]:
    def inject(model: onnx.ModelProto) -> None:
        node = next(n for n in model.graph.node if n.name == layer)
        tensor = next(t for t in model.graph.initializer if t.name == node.input[slot])
        changed = change(numpy_helper.to_array(tensor).copy()).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(changed), tensor.name))

    return inject


def on_channel(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    def inject(weight: np.ndarray) -> np.ndarray:
        weight[3] = change(weight[3])
        return weight

    return inject


def bf16(weight: np.ndarray) -> np.ndarray:
    return torch.from_numpy(weight).bfloat16().float().numpy()


def on_node(operator: str, change: Callable[[onnx.NodeProto], None]) -> Callable[[onnx.ModelProto], None]:
    def inject(model: onnx.ModelProto) -> None:
        change(next(n for n in model.graph.node if n.op_type == operator))

    return inject


def replace_by(operator: str, **attributes: object) -> Callable[[onnx.NodeProto], None]:
    def change(node: onnx.NodeProto) -> None:
        node.op_type = operator
        node.attribute.extend(helper.make_attribute(k, v) for k, v in attributes.items())

    return change


def set_pads(node: onnx.NodeProto) -> None:
    for attribute in node.attribute:
        if attribute.name == "pads":
            del attribute.ints[:]
            attribute.ints.extend([0, 0, 2, 2])


def swap_outputs(model: onnx.ModelProto) -> None:
    first, second = list(model.graph.output)
    del model.graph.output[:]
    model.graph.output.extend([second, first])


def drop_output(model: onnx.ModelProto) -> None:
    del model.graph.output[1:]


def behind(*nodes: tuple[str, list[str], str], constants: dict[str, np.ndarray] | None = None, dtype: int = 1):
    """Nodes between the first output and what the file returns as it: ``y`` in, ``z`` out, ``x`` the model's input."""

    def inject(model: onnx.ModelProto) -> None:
        graph = model.graph
        name, x = graph.output[0].name, graph.input[0].name
        for node in graph.node:
            node.output[:] = ["y" if v == name else v for v in node.output]
            node.input[:] = ["y" if v == name else v for v in node.input]
        names = {"z": name, "x": x}
        for operator, inputs, output in nodes:
            attributes = {"to": dtype} if operator == "Cast" and output == "z" else {}
            attributes |= {"to": 7} if operator == "Cast" and output != "z" else {}
            graph.node.append(
                helper.make_node(operator, [names.get(i, i) for i in inputs], [names.get(output, output)], **attributes)
            )
        for key, value in (constants or {}).items():
            graph.initializer.append(numpy_helper.from_array(np.asarray(value), key))
        graph.output[0].type.tensor_type.elem_type = dtype

    return inject


def only_row(index: int) -> Callable[[onnx.ModelProto], None]:
    """Doubles the result of one row of the batch: right for every batch that is too small to have it."""
    return behind(
        *(("Shape", ["y"], "s"), ("Gather", ["s", "c0"], "n"), ("Range", ["c0", "n", "c1"], "r")),
        *(("Equal", ["r", "row"], "hit"), ("Unsqueeze", ["hit", "axis"], "column")),
        *(("Add", ["y", "y"], "twice"), ("Where", ["column", "twice", "y"], "z")),
        constants={"c0": np.int64(0), "c1": np.int64(1), "row": np.int64(index), "axis": np.array([1], np.int64)},
    )


FAULTS: dict[str, Callable[[onnx.ModelProto], None]] = {
    "one channel off by 1 %": on_weight("body/Conv", on_channel(lambda w: w * 1.01)),
    "one channel off by 0.1 %": on_weight("body/Conv", on_channel(lambda w: w * 1.001)),
    "zeroed channel": on_weight("body/Conv", on_channel(np.zeros_like)),
    "negated channel": on_weight("body/Conv", on_channel(np.negative)),
    "swapped channels": on_weight("body/Conv", lambda w: w[[1, 0, *range(2, len(w))]]),
    "reversed input channels": on_weight("body/Conv", lambda w: w[:, ::-1]),
    "transposed kernel": on_weight("body/Conv", lambda w: w.swapaxes(2, 3)),
    "flipped kernel": on_weight("stem/Conv", lambda w: w[:, :, ::-1, ::-1]),
    "one layer in bfloat16": on_weight("body/Conv", bf16),
    "dropped bias": on_weight("stem/Conv", np.zeros_like, slot=2),
    "one bias off by 0.1 %": on_weight("stem/Conv", on_channel(lambda b: b * 1.001), slot=2),
    "dead channel behind a LayerScale": on_weight("branch/Conv", on_channel(np.zeros_like)),
    "one weight off behind a LayerScale": on_weight("branch/Conv", on_channel(lambda w: w * 1.001)),
    "shift of padding": on_node("Conv", set_pads),
    "missing activation": on_node("Relu", replace_by("Identity")),
    "wrong activation": on_node("Relu", replace_by("LeakyRelu", alpha=1e-3)),
    "outputs swapped": swap_outputs,
    "an output too few": drop_output,
    "float64 output": behind(("Cast", ["y"], "z"), dtype=onnx.TensorProto.DOUBLE),
    "constant output": behind(
        ("Sub", ["y", "y"], "zero"), ("Add", ["zero", "one"], "z"), constants={"one": np.float32(1)}
    ),
    "negated output": behind(("Neg", ["y"], "z")),
    "wrong in one row of a batch": only_row(5),
    "wrong in the first row": only_row(0),
    "output of two samples": behind(
        ("Slice", ["y", "from", "to"], "z"), constants={"from": np.array([0]), "to": np.array([2])}
    ),
    "NaN where an input is large": behind(
        ("ReduceMax", ["x"], "m"), ("Greater", ["m", "top"], "hit"), ("Where", ["hit", "nan", "y"], "z"),
        constants={"top": np.float32(4), "nan": np.float32("nan")},
    ),
    "infinite where an input is large": behind(
        ("ReduceMax", ["x"], "m"), ("Greater", ["m", "top"], "hit"), ("Where", ["hit", "inf", "y"], "z"),
        constants={"top": np.float32(4), "inf": np.float32("inf")},
    ),
}  # fmt: skip

#: Faults in the hidden branch leave the outputs within the noise and are seen at the fold sites alone.
AT_SITES = {"dead channel behind a LayerScale", "one weight off behind a LayerScale"}
