"""Faults for any exported file: what a wrong fold, translation or optimiser could do to it.

``KINDS[name](subject)`` gives the faulty file, or None where the net has nothing that this fault could hit. Wrong folds
are made by folding with wrong constants, everything else by editing the file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import torch
import zoo
from faults import bf16
from onnx import helper, numpy_helper
from torch import Tensor, nn

from bnfold.affine import Meaning
from bnfold.graph.capture import Captured, capture
from bnfold.graph.program import meanings
from bnfold.lowering.lower import Lowered, lower
from bnfold.report import Ledger
from bnfold.stages import fold_captured

CONTRACTIONS = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
ACTIVATIONS = {"Relu", "HardSwish", "Clip", "PRelu", "LeakyRelu", "Gelu", "Sigmoid", "HardSigmoid", "Tanh", "Erf"}
MOMENTS = ("weight", "bias", "running_mean", "running_var")


class Scaled(nn.Module):
    """A net whose floating-point outputs are ``scale`` times its own."""

    def __init__(self, net: nn.Module, scale: float) -> None:
        super().__init__()
        self.net, self.scale = net, scale

    def forward(self, *inputs: Tensor) -> object:
        return torch.utils._pytree.tree_map_only(Tensor, lambda value: value * self.scale, self.net(*inputs))


@dataclass
class Subject:
    """A net that was captured, folded and lowered once, and the layer in its file that faults are injected into.

    ``site`` is the fold behind that layer: the value in the file and the module whose output it must equal.
    """

    module: nn.Module
    args: tuple[Tensor, ...]
    captured: Captured
    ledger: Ledger
    constants: dict[str, Tensor]
    lowered: Lowered
    file: onnx.ModelProto
    layer: str
    norm: str
    site: tuple[str, str] | None
    meanings: Mapping[str, Meaning | None]

    @classmethod
    def of(cls, module: nn.Module, args: tuple[Tensor, ...], norm: str = "") -> Subject:
        """Faults go into the layer that took ``norm`` in, or else into one halfway through the net."""
        captured = capture(module, args)
        folded = fold_captured(captured, merge=True)
        meaning = meanings(folded.program)
        lowered = lower(folded.program, dims=captured.dims, sites=folded.ledger.sites)
        file = lowered_file(lowered)
        made = {name: node for node in file.graph.node for name in node.output}
        weights = {tensor.name for tensor in file.graph.initializer}
        sites, layers = [], []
        for entry in folded.ledger.entries:
            for value in (v for v, _ in entry.site if (stored := meaning.get(v)) is None or stored.after is None):
                node = made.get(lowered.sites.get(value, ""))
                known = all(f"{entry.module}.{name}" in captured.program.state_dict for name in MOMENTS)
                if node is not None and entry.is_batch_norm and known and has_weight(node, weights):
                    sites.append((node.name, entry.module, lowered.sites[value]))
        layers = [node.name for node in file.graph.node if has_weight(node, weights)]
        norms = [e.module for e in folded.ledger.folded if e.is_batch_norm]
        norms = [n for n in norms if all(f"{n}.{name}" in captured.program.state_dict for name in MOMENTS)]
        constants = {name: value.detach().clone() for name, value in folded.program.state_dict.items()}
        if sites:
            layer, norm, value = next((site for site in sites if site[1] == norm), sites[len(sites) // 2])
            return cls(
                module, args, captured, folded.ledger, constants, lowered, file, layer, norm, (value, norm), meaning
            )
        return cls(
            module, args, captured, folded.ledger, constants, lowered, file, layers[len(layers) // 2],
            norms[len(norms) // 2], None, meaning,
        )  # fmt: skip

    def copy(self) -> onnx.ModelProto:
        """The right file, to be changed."""
        model = onnx.ModelProto()
        model.CopyFrom(self.file)
        return model

    def refolded(self, wrong: Mapping[str, Tensor]) -> onnx.ModelProto:
        """The file of a fold that took ``wrong`` for some of the unfolded model's constants."""
        stored = self.captured.program.state_dict
        right = {name: stored[name] for name in wrong}
        try:
            stored.update(wrong)
            folded = fold_captured(self.captured, merge=True)
        finally:
            stored.update(right)
        model = self.copy()
        initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        changed = {
            name: value
            for name, value in folded.program.state_dict.items()
            if name not in self.constants or not torch.equal(value, self.constants[name])
        }
        same = set(folded.program.state_dict) == set(self.constants)
        dims = {name: list(tensor.dims) for name, tensor in initializers.items()}
        if not same or any(dims.get(name) != list(value.shape) for name, value in changed.items()):
            lowered = lower(folded.program, dims=self.captured.dims, sites=folded.ledger.sites)
            return lowered_file(lowered)
        for name, value in changed.items():
            initializers[name].CopyFrom(numpy_helper.from_array(value.detach().numpy(), name))
        return model


def lowered_file(lowered: Lowered) -> onnx.ModelProto:
    import tempfile
    from pathlib import Path

    from bnfold.lowering.lower import save

    with tempfile.TemporaryDirectory() as folder:
        save(lowered, Path(folder) / "net.onnx")
        return onnx.load(Path(folder) / "net.onnx")


def has_weight(node: onnx.NodeProto, initializers: set[str]) -> bool:
    return node.op_type in CONTRACTIONS and len(node.input) > 1 and node.input[1] in initializers


Kind = Callable[[Subject], "onnx.ModelProto | None"]

# -- wrong folds -------------------------------------------------------------------------------------------------------


def folding(change: Callable[..., Mapping[str, Tensor]], *, every: bool = False) -> Kind:
    """Folds with other moments: ``change(weight=, bias=, running_mean=, running_var=)`` gives those that differ."""

    def make(subject: Subject) -> onnx.ModelProto:
        stored = subject.captured.program.state_dict
        names = [subject.norm]
        if every:
            names = [n.removesuffix(".running_var") for n in stored if n.endswith(".running_var")]
        wrong = {}
        for norm in names:
            moments = {key: stored[f"{norm}.{key}"].detach() for key in MOMENTS if f"{norm}.{key}" in stored}
            if len(moments) == len(MOMENTS):
                wrong |= {f"{norm}.{key}": value for key, value in change(**moments).items()}
        return subject.refolded(wrong)

    return make


def ulp(value: Tensor) -> Tensor:
    return torch.nextafter(value, torch.full_like(value, torch.inf))


def third(value: Tensor, factor: float) -> Tensor:
    """One channel, the third or the last, times ``factor``."""
    value = value.clone()
    value[min(3, len(value) - 1)] *= factor
    return value


WRONG_FOLDS: dict[str, Kind] = {
    "wrong eps in one BatchNorm": folding(lambda running_var, **_: {"running_var": running_var + 1e-3}),
    "wrong eps in every BatchNorm": folding(lambda running_var, **_: {"running_var": running_var + 1e-3}, every=True),
    "eps forgotten in every BatchNorm": folding(
        lambda running_var, **_: {"running_var": running_var - 1e-5}, every=True
    ),
    "gamma and beta swapped": folding(lambda weight, bias, **_: {"weight": bias, "bias": weight}),
    "mean and variance swapped": folding(
        lambda running_mean, running_var, **_: {"running_mean": running_var, "running_var": running_mean.abs() + 1e-3}
    ),
    "beta dropped": folding(lambda bias, **_: {"bias": torch.zeros_like(bias)}),
    "mean dropped": folding(lambda running_mean, **_: {"running_mean": torch.zeros_like(running_mean)}),
    "mean added": folding(lambda running_mean, **_: {"running_mean": -running_mean}),
    "variance for its root": folding(lambda running_var, **_: {"running_var": running_var.square()}),
    "sign of gamma lost": folding(lambda weight, **_: {"weight": weight.abs()}),
    "channels of the BatchNorm reversed": folding(lambda **all_: {k: v.flip(0) for k, v in all_.items()}),
    "gamma off by 1 %": folding(lambda weight, **_: {"weight": weight * 1.01}),
    "gamma off by 0.01 %": folding(lambda weight, **_: {"weight": weight * 1.0001}),
    "gamma off by 1e-5": folding(lambda weight, **_: {"weight": weight * (1 + 1e-5)}),
    "gamma off by 1e-6": folding(lambda weight, **_: {"weight": weight * (1 + 1e-6)}),
    "gamma off by one ulp": folding(lambda weight, **_: {"weight": ulp(weight)}),
    "beta off by 1 %": folding(lambda bias, **_: {"bias": bias * 1.01}),
    "mean off by 0.1 %": folding(lambda running_mean, **_: {"running_mean": running_mean * 1.001}),
    "variance off by 0.1 %": folding(lambda running_var, **_: {"running_var": running_var * 1.001}),
    "variance off by one ulp": folding(lambda running_var, **_: {"running_var": ulp(running_var)}),
    "gamma of one channel off by 0.1 %": folding(lambda weight, **_: {"weight": third(weight, 1.001)}),
    "moments in float16": folding(lambda **all_: {k: v.half().float() for k, v in all_.items()}),
}


# -- the folded layer's own constants ----------------------------------------------------------------------------------


def weights(change: Callable[[np.ndarray], np.ndarray | None], slot: int = 1) -> Kind:
    """Changes the layer's weight, with output channels on axis 0, or its bias (``slot`` 2)."""

    def make(subject: Subject) -> onnx.ModelProto | None:
        model = subject.copy()
        node = next(n for n in model.graph.node if n.name == subject.layer)
        if len(node.input) <= slot:
            return None
        tensor = next(t for t in model.graph.initializer if t.name == node.input[slot])
        value = numpy_helper.to_array(tensor).copy()
        turned = slot == 1 and (node.op_type in ("ConvTranspose", "MatMul"))
        value = value.swapaxes(0, 1) if turned else value
        changed = change(value.copy())
        if changed is None or np.array_equal(changed, value):
            return None
        changed = changed.swapaxes(0, 1) if turned else changed
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(changed, dtype=np.float32), tensor.name))
        return model

    return make


def channel(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    """Changes the output channel with the largest weights, so that none is hit that a gamma of 0 has emptied."""

    def apply(weight: np.ndarray) -> np.ndarray:
        index = int(np.abs(weight).reshape(len(weight), -1).sum(1).argmax())
        weight[index] = change(weight[index])
        return weight

    return apply


def flip_bit(bit: int) -> Callable[[np.ndarray], np.ndarray]:
    def apply(weight: np.ndarray) -> np.ndarray:
        weight = np.ascontiguousarray(weight)
        flat = weight.reshape(-1).view(np.uint32)
        flat[np.abs(weight).argmax()] ^= np.uint32(1 << bit)
        return weight

    return apply


def kernels(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray | None]:
    """For layers with kernels of more than one element."""
    return lambda w: change(w) if w.ndim > 2 and w.shape[-1] > 1 else None


def transposed(weight: np.ndarray) -> np.ndarray:
    return weight.swapaxes(2, 3) if weight.ndim == 4 and weight.shape[2] == weight.shape[3] else weight[..., ::-1]


def rolled(weight: np.ndarray) -> np.ndarray:
    return np.roll(weight, 1, axis=0)


def first_swapped(weight: np.ndarray) -> np.ndarray:
    return weight[[1, 0, *range(2, len(weight))]]


def group_order(subject: Subject) -> onnx.ModelProto | None:
    """The first grouped convolution computes its groups in reverse."""
    model = subject.copy()
    tensors = {t.name: t for t in model.graph.initializer}
    for node in model.graph.node:
        groups = next((a.i for a in node.attribute if a.name == "group"), 1)
        if node.op_type == "Conv" and groups > 1 and node.input[1] in tensors:
            for name in node.input[1:]:
                value = numpy_helper.to_array(tensors[name])
                value = value.reshape(groups, -1, *value.shape[1:])[::-1].reshape(value.shape)
                tensors[name].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(value), name))
            return model
    return None


WRONG_WEIGHTS: dict[str, Kind] = {
    "zeroed channel": weights(channel(np.zeros_like)),
    "negated channel": weights(channel(np.negative)),
    "one channel off by 1 %": weights(channel(lambda w: w * np.float32(1.01))),
    "one channel off by 0.1 %": weights(channel(lambda w: w * np.float32(1.001))),
    "swapped channels": weights(first_swapped),
    "channels off by one": weights(rolled),
    "reversed input channels": weights(lambda w: w[:, ::-1] if w.shape[1] > 1 else None),
    "one layer in bfloat16": weights(bf16),
    "one layer in float16": weights(lambda w: w.astype(np.float16).astype(np.float32)),
    "high mantissa bit flipped in the largest weight": weights(flip_bit(21)),
    "middle mantissa bit flipped in the largest weight": weights(flip_bit(13)),
    "low mantissa bit flipped in the largest weight": weights(flip_bit(7)),
    "sign flipped in the largest weight": weights(flip_bit(31)),
    "transposed kernel": weights(kernels(transposed)),
    "flipped kernel": weights(kernels(lambda w: w[..., ::-1])),
    "wrong order of groups": group_order,
    "dropped bias": weights(np.zeros_like, slot=2),
    "bias swapped in two channels": weights(first_swapped, slot=2),
    "one bias off by 0.1 %": weights(channel(lambda b: b * np.float32(1.001)), slot=2),
}


# -- the graph ---------------------------------------------------------------------------------------------------------


def attribute(node: onnx.NodeProto, name: str) -> onnx.AttributeProto | None:
    return next((a for a in node.attribute if a.name == name), None)


def padded_layer(model: onnx.ModelProto) -> onnx.NodeProto | None:
    """The last padded convolution: its border is the largest part of what it makes."""
    found = [n for n in model.graph.node if n.op_type == "Conv" and (p := attribute(n, "pads")) and any(p.ints)]
    return found[-1] if found else None


def padding_moved(subject: Subject) -> onnx.ModelProto | None:
    model = subject.copy()
    node = padded_layer(model)
    if node is None:
        return None
    pads = attribute(node, "pads")
    half = len(pads.ints) // 2
    pads.ints[:] = [0] * half + [a + b for a, b in zip(pads.ints[:half], pads.ints[half:])]
    return model


def padding_filled(subject: Subject) -> onnx.ModelProto | None:
    """Pads with 0.01 instead of 0: a shift that was folded as if it reached into the padding."""
    model = subject.copy()
    node = padded_layer(model)
    if node is None:
        return None
    pads = attribute(node, "pads")
    half = len(pads.ints) // 2
    rim = [0, 0, *pads.ints[:half], 0, 0, *pads.ints[half:]]
    pads.ints[:] = [0] * (2 * half)
    model.graph.initializer.append(numpy_helper.from_array(np.array(rim, np.int64), "fault_rim"))
    model.graph.initializer.append(numpy_helper.from_array(np.array(0.01, np.float32), "fault_fill"))
    pad = helper.make_node("Pad", [node.input[0], "fault_rim", "fault_fill"], ["fault_padded"], mode="constant")
    model.graph.node.insert(list(model.graph.node).index(node), pad)
    node.input[0] = "fault_padded"
    return model


def activation(operator: str, **attributes: float) -> Kind:
    def make(subject: Subject) -> onnx.ModelProto | None:
        model = subject.copy()
        behind_layer = next(n for n in model.graph.node if n.name == subject.layer).output[0]
        found = [n for n in model.graph.node if n.op_type in ACTIVATIONS]
        node = next((n for n in found if n.input[0] == behind_layer), found[0] if found else None)
        if node is None:
            return None
        node.op_type, node.domain = operator, ""
        del node.input[1:], node.attribute[:]
        node.attribute.extend(helper.make_attribute(key, value) for key, value in attributes.items())
        return model

    return make


def branch_dropped(subject: Subject) -> onnx.ModelProto | None:
    """The last sum of two values loses one of them."""
    model = subject.copy()
    constant = {t.name for t in model.graph.initializer}
    sums = [n for n in model.graph.node if n.op_type == "Add" and not set(n.input) & constant]
    if not sums:
        return None
    sums[-1].op_type = "Identity"
    del sums[-1].input[1:]
    return model


def before(*nodes: tuple[str, list[str], str, dict[str, int]]) -> Kind:
    """Nodes between the first input ``x`` and all its readers, which get ``z``."""

    def make(subject: Subject) -> onnx.ModelProto:
        model = subject.copy()
        name = model.graph.input[0].name
        for node in model.graph.node:
            node.input[:] = ["fault_z" if v == name else v for v in node.input]
        for at, (operator, inputs, output, attributes) in enumerate(nodes):
            named = [{"x": name, "z": "fault_z"}.get(v, f"fault_{v}") for v in (*inputs, output)]
            model.graph.node.insert(at, helper.make_node(operator, named[:-1], named[-1:], **attributes))
        return model

    return make


GRAPH: dict[str, Kind] = {
    "padding moved to one side": padding_moved,
    "shift folded into the padding": padding_filled,
    "missing activation": activation("Identity"),
    "leaking activation": activation("LeakyRelu", alpha=1e-3),
    "branch of a sum dropped": branch_dropped,
    "input through float16": before(("Cast", ["x"], "half", {"to": 10}), ("Cast", ["half"], "z", {"to": 1})),
    "input through bfloat16": before(("Cast", ["x"], "half", {"to": 16}), ("Cast", ["half"], "z", {"to": 1})),
}


# -- the outputs -------------------------------------------------------------------------------------------------------


def behind(*nodes: tuple[str, list[str], str], dtype: int = 1, **constants: object) -> Kind:
    """Nodes between the first output ``y`` and what the file returns as it, ``z``; ``x`` is the first input.

    ``axes`` are all of the output's axes but the first.
    """

    def make(subject: Subject) -> onnx.ModelProto:
        model = subject.copy()
        output, x = model.graph.output[0], model.graph.input[0].name
        name = output.name
        for node in model.graph.node:
            node.output[:] = ["fault_y" if v == name else v for v in node.output]
            node.input[:] = ["fault_y" if v == name else v for v in node.input]
        named = {"z": name, "x": x}
        for operator, inputs, result in nodes:
            to = {"to": dtype if result == "z" else 10} if operator == "Cast" else {}
            at = [named.get(v, f"fault_{v}") for v in (*inputs, result)]
            model.graph.node.append(helper.make_node(operator, at[:-1], at[-1:], **to))
        rank = len(output.type.tensor_type.shape.dim)
        for key, value in (constants | {"axes": np.arange(1, rank)}).items():
            model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), f"fault_{key}"))
        output.type.tensor_type.elem_type = dtype
        return model

    return make


def where(*condition: tuple[str, list[str], str], value: float | None = None, **constants: object) -> Kind:
    """``value``, or else twice the right output, where ``condition`` makes ``hit`` true."""
    other = ("Add", ["y", "y"], "other") if value is None else ("Identity", ["value"], "other")
    more = {} if value is None else {"value": np.float32(value)}
    return behind(*condition, other, ("Where", ["hit", "other", "y"], "z"), **constants, **more)


def row(index: int) -> Kind:
    """Doubles the result of one row of the batch: right for every batch that is too small to have it."""
    return where(
        ("Shape", ["y"], "s"), ("Gather", ["s", "c0"], "n"), ("Range", ["c0", "n", "c1"], "r"),
        ("Equal", ["r", "row"], "flat"), ("Unsqueeze", ["flat", "axes"], "hit"),
        c0=np.int64(0), c1=np.int64(1), row=np.int64(index),
    )  # fmt: skip


SIZE_IS = (("Shape", ["y"], "s"), ("Gather", ["s", "c0"], "n"), ("Equal", ["n", "wanted"], "hit"))
LARGE = (("ReduceMax", ["x"], "m"), ("Greater", ["m", "top"], "hit"))


def where_large(value: float | None = None) -> Kind:
    """Wrong where an input is 4.5 standard deviations from its mean, which data like the example hardly ever is."""

    def make(subject: Subject) -> onnx.ModelProto | None:
        x = subject.args[0]
        return where(*LARGE, value=value, top=np.float32(x.mean() + 4.5 * x.std()))(subject)

    return make


def swap_outputs(subject: Subject) -> onnx.ModelProto | None:
    model = subject.copy()
    outputs = list(model.graph.output)
    if len(outputs) < 2:
        return None
    del model.graph.output[:]
    model.graph.output.extend([outputs[1], outputs[0], *outputs[2:]])
    return model


def drop_output(subject: Subject) -> onnx.ModelProto | None:
    model = subject.copy()
    if len(model.graph.output) < 2:
        return None
    del model.graph.output[-1]
    return model


BATCH_2 = {"from": np.array([0]), "to": np.array([2]), "batch": np.array([0])}

OUTPUTS: dict[str, Kind] = {
    "wrong at batch 1 only": where(*SIZE_IS, c0=np.int64(0), wanted=np.int64(1)),
    "wrong at batch 7 only": where(*SIZE_IS, c0=np.int64(0), wanted=np.int64(7)),
    "wrong in the sixth row of a batch": row(5),
    "wrong in the first row of a batch": row(0),
    "wrong where an input is large": where_large(),
    "NaN where an input is large": where_large(float("nan")),
    "infinite where an input is large": where_large(float("inf")),
    "batch specialised to 2": behind(
        ("Slice", ["y", "from", "to", "batch"], "z"), **BATCH_2
    ),
    "outputs swapped": swap_outputs,
    "an output too few": drop_output,
    "float64 output": behind(("Cast", ["y"], "z"), dtype=onnx.TensorProto.DOUBLE),
    "output through float16": behind(("Cast", ["y"], "half"), ("Cast", ["half"], "z")),
    "negated output": behind(("Neg", ["y"], "z")),
    "output off by 1e-5": behind(("Mul", ["y", "factor"], "z"), factor=np.float32(1.00001)),
}  # fmt: skip

#: Of an output's rows, batches or inputs these hit a few: a median over samples need not see them.
SPARSE = {
    "wrong at batch 1 only", "wrong at batch 7 only", "wrong in the sixth row of a batch",
    "wrong in the first row of a batch", "wrong where an input is large", "NaN where an input is large",
    "infinite where an input is large",
}  # fmt: skip

KINDS: dict[str, Kind] = WRONG_FOLDS | WRONG_WEIGHTS | GRAPH | OUTPUTS


def subject_of(name: str, scale: float = 1.0) -> Subject:
    """A net of the zoo, or the victim of ``faults``, with outputs times ``scale``."""
    from faults import victim

    module, args = victim() if name == "hidden_branch" else zoo.NETS[name]()
    norm = "net.branch_norm" if name == "hidden_branch" else ""
    return Subject.of(Scaled(module, scale).eval(), args, norm)
