"""One random edit of a right file: ``KINDS[name](file, rng)`` changes the model and says what it did, or gives None."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from mutant_file import Array, File, Generator, small
from mutant_rare import bound, condition, one_channel, one_element, one_pixel, sample
from onnx import AttributeProto, helper, numpy_helper

#: What else a text attribute can be.
WORDS = {
    "mode": ("nearest", "linear", "cubic", "constant", "reflect", "edge"),
    "coordinate_transformation_mode": ("asymmetric", "half_pixel", "align_corners", "pytorch_half_pixel"),
    "nearest_mode": ("floor", "ceil", "round_prefer_floor", "round_prefer_ceil"),
    "auto_pad": ("SAME_UPPER", "SAME_LOWER", "VALID"),
    "direction": ("forward", "reverse", "bidirectional"),
    "approximate": ("none", "tanh"),
    "activations": ("Sigmoid", "Tanh", "Relu", "HardSigmoid"),
}
#: What an operator may be mistaken for.
LIKE = {
    "Relu": ("LeakyRelu", "Identity", "Elu", "Softplus", "Abs"), "Sigmoid": ("HardSigmoid", "Tanh"),
    "Tanh": ("Softsign", "Identity", "Sigmoid"), "HardSwish": ("Relu", "Identity"), "Elu": ("Selu", "Celu", "Relu"),
    "Add": ("Sub", "Mul", "Max"), "Mul": ("Add", "Div"), "Sub": ("Add",), "Div": ("Mul",), "Softplus": ("Relu",),
    "MaxPool": ("AveragePool",), "AveragePool": ("MaxPool",), "GlobalAveragePool": ("GlobalMaxPool",),
    "ReduceMean": ("ReduceMax", "ReduceSum"), "ReduceMax": ("ReduceMean", "ReduceMin"), "ReduceL2": ("ReduceL1",),
    "Softmax": ("LogSoftmax", "Sigmoid"), "LogSoftmax": ("Softmax",), "HardSigmoid": ("Sigmoid",), "Erf": ("Tanh",),
    "Clip": ("Identity",), "Gelu": ("Relu",), "Less": ("LessOrEqual",), "Greater": ("GreaterOrEqual",),
    "Equal": ("Less",),
    "Floor": ("Round",), "Mod": ("Sub",), "Max": ("Min",), "Sqrt": ("Abs",), "Abs": ("Identity",),
}  # fmt: skip


# ---- attribute, axis, operator, wiring -------------------------------------------------------------------------------


def attribute(file: File, rng: Generator) -> str | None:
    found = [(n, a) for n in file.nodes for a in n.attribute if a.name not in ("axis", "axes", "perm", "to", "value")]
    if not found:
        return None
    node, a = found[rng.integers(len(found))]
    before = helper.get_attribute_value(a)
    if a.type == AttributeProto.INT:
        a.i = int(a.i + rng.choice([-1, 1])) if a.name in ("group", "hidden_size") else int(a.i == 0)
    elif a.type == AttributeProto.FLOAT:
        a.f = a.f * small(rng)
    elif a.type == AttributeProto.INTS and len(a.ints):
        i = rng.integers(len(a.ints))
        a.ints[i] = max(0, a.ints[i] + int(rng.choice([-1, 1])))
    elif a.type == AttributeProto.STRING and a.name in WORDS:
        a.s = str(rng.choice([w for w in WORDS[a.name] if w != a.s.decode()])).encode()
    else:
        return None
    return f"{node.op_type}.{a.name} {before} -> {helper.get_attribute_value(a)}"


def axis(file: File, rng: Generator) -> str | None:
    """An axis, a permutation, the order of a concatenation, the entries of a shape or of slices."""
    found: list[tuple[Any, Any]] = [
        (n, a) for n in file.nodes for a in n.attribute if a.name in ("axis", "axes", "perm")
    ]
    found += [(n, None) for n in file.nodes if n.op_type == "Concat" and len(n.input) > 1]
    whole = [t for t in file.constants.values() if t.data_type == 7 and np.prod(t.dims) >= 1]
    found += [(t, None) for t in whole]
    if not found:
        return None
    node, a = found[rng.integers(len(found))]
    if isinstance(node, onnx.TensorProto):
        value = numpy_helper.to_array(node).copy()
        i = rng.integers(value.size)
        before = value.tolist()
        if value.size > 1 and rng.random() < 0.5:
            value.flat[[0, i]] = value.flat[[i, 0]]
        else:
            value.flat[i] += rng.choice([-1, 1])
        node.CopyFrom(numpy_helper.from_array(value, node.name))
        return f"{node.name} {before} -> {value.tolist()}"
    if a is None:
        order = rng.permutation(len(node.input))
        node.input[:] = [node.input[i] for i in order]
        return f"Concat in the order {order.tolist()}"
    if a.type == AttributeProto.INT:
        a.i += int(rng.choice([-1, 1]))
        return f"{node.op_type}.{a.name} -> {a.i}"
    i, j = rng.integers(len(a.ints), size=2)
    if a.name == "perm":
        a.ints[i], a.ints[j] = a.ints[j], a.ints[i]
    else:
        a.ints[i] += int(rng.choice([-1, 1]))
    return f"{node.op_type}.{a.name} -> {list(a.ints)}"


def operator(file: File, rng: Generator) -> str | None:
    found = [n for n in file.nodes if n.op_type in LIKE]
    if not found:
        return None
    node = found[rng.integers(len(found))]
    before, node.op_type = node.op_type, str(rng.choice(LIKE[node.op_type]))
    if node.op_type in ("Identity", "Abs", "Relu", "Max", "Min"):
        del node.attribute[:]
        if node.op_type not in ("Max", "Min"):
            del node.input[1:]
    if node.op_type == "AveragePool":
        kept = [a for a in node.attribute if a.name not in ("dilations", "storage_order")]
        del node.attribute[:]
        node.attribute.extend(kept)
    if node.op_type == "MaxPool":
        kept = [a for a in node.attribute if a.name != "count_include_pad"]
        del node.attribute[:]
        node.attribute.extend(kept)
    return f"{before} -> {node.op_type} at {node.output[0]}"


def wiring(file: File, rng: Generator) -> str | None:
    """A node reads another value of the same shape, its two operands in the other order, or its operand unprocessed."""
    node = file.nodes[rng.integers(len(file.nodes))]
    if (
        rng.random() < 0.3
        and len(node.input) == 2
        and node.op_type in ("Sub", "Div", "MatMul", "Pow", "Less", "Greater")
    ):
        node.input[0], node.input[1] = node.input[1], node.input[0]
        return f"{node.op_type} {node.output[0]} with its operands swapped"
    slots = [i for i, name in enumerate(node.input) if name in file.values or name in file.constants]
    if not slots:
        return None
    slot = slots[rng.integers(len(slots))]
    name = node.input[slot]
    if name in file.constants:
        t = file.constants[name]
        like = [c for c, o in file.constants.items() if c != name and o.dims == t.dims and o.data_type == t.data_type]
    else:
        at = list(file.nodes).index(node)
        before = {o for n in list(file.nodes)[:at] for o in n.output} | {v.name for v in file.model.graph.input}
        shape, kind = file.values[name].shape, file.values[name].dtype.kind
        like = [v for v in before if v != name and v in file.values and file.values[v].shape == shape]
        like = [v for v in like if file.values[v].dtype.kind == kind]
    if not like:
        return None
    node.input[slot] = sorted(like)[rng.integers(len(like))]
    return f"{node.op_type} {node.output[0]} reads {node.input[slot]} for {name}"


# ---- constants -------------------------------------------------------------------------------------------------------


def _constant(file: File, rng: Generator) -> tuple[onnx.TensorProto, Array] | None:
    found = [t for t in file.constants.values() if t.data_type in (1, 10) and np.prod(t.dims) >= 1]
    if not found:
        return None
    tensor = found[rng.integers(len(found))]
    return tensor, numpy_helper.to_array(tensor).copy()


def _edited(value: Array, rng: Generator) -> tuple[Array, str]:
    kind = rng.choice(["scaled", "scaled", "zero", "negated", "moved"])
    if kind == "zero":
        return value * 0, "zero"
    if kind == "negated":
        return -value, "negated"
    if kind == "moved":
        step = value.dtype.type(10 ** rng.uniform(-4, 0))
        return value + step, f"plus {step:.3g}"
    factor = small(rng)
    return value * value.dtype.type(factor), f"times {factor:.6g}"


def element(file: File, rng: Generator) -> str | None:
    """One number of a constant."""
    if (found := _constant(file, rng)) is None:
        return None
    tensor, value = found
    i = rng.integers(value.size)
    new, words = _edited(value.flat[i], rng)
    value.flat[i] = new
    tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    return f"{tensor.name}[{i}] {words}"


def channel(file: File, rng: Generator) -> str | None:
    """One slice of a constant, along its first or second axis, or two of them swapped."""
    if (found := _constant(file, rng)) is None or found[1].ndim == 0:
        return None
    tensor, value = found
    along = int(rng.integers(min(value.ndim, 2)))
    rows = np.moveaxis(value, along, 0)
    i, j = rng.integers(len(rows), size=2)
    if rng.random() < 0.25 and i != j:
        rows[[i, j]] = rows[[j, i]]
        words = f"swapped with {j}"
    else:
        rows[i], words = _edited(rows[i], rng)
    tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    return f"{tensor.name}, {i} of axis {along}, {words}"


def bit(file: File, rng: Generator) -> str | None:
    """One bit of one number of a constant."""
    if (found := _constant(file, rng)) is None:
        return None
    tensor, value = found
    i, width = rng.integers(value.size), value.dtype.itemsize * 8
    place = int(rng.integers(width))
    bits = value.view(f"u{value.dtype.itemsize}").reshape(-1)
    bits[i] ^= bits.dtype.type(1 << place)
    tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    return f"{tensor.name}[{i}] bit {place}: {value.reshape(-1)[i]:.6g}"


Kind = Callable[[File, Generator], str | None]
#: By the words of the table.
KINDS: dict[str, Kind] = {
    "attribute": attribute, "axis": axis, "operator": operator, "wiring": wiring, "element of a constant": element,
    "channel of a constant": channel, "bit of a constant": bit, "one element": one_element, "one pixel": one_pixel,
    "one channel": one_channel, "one sample in twenty": sample, "bound": bound, "condition": condition,
}  # fmt: skip
