"""One random edit of a right file: ``KINDS[name](file, rng)`` changes the model and says what it did, or gives None."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, helper, numpy_helper

Array = np.ndarray[Any, Any]
Generator = np.random.Generator

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


# ---- where few see it ------------------------------------------------------------------------------------------------


def _times(file: File, name: str, factor: Array) -> None:
    """The value times a constant of few places that are not 1."""
    constant = file.new(factor.astype(file.dtype()))
    file.behind(name, lambda a, b: [helper.make_node("Mul", [a, constant], [b])])


def _static(file: File, rank: int) -> list[str]:
    """Values whose sizes are the same for every input, but for the batch."""
    dims = file.model.graph.input[0].type.tensor_type.shape.dim
    if not all(d.HasField("dim_value") for d in dims[1:]):
        return []
    return [n for n in file.floats() if file.values[n].ndim >= rank and min(file.values[n].shape) > 0]


def one_element(file: File, rng: Generator) -> str | None:
    """One element of a value, in every sample."""
    if not (names := _static(file, 2)):
        return None
    name = names[rng.integers(len(names))]
    factor = np.ones(file.values[name].shape[1:])
    place, size = rng.integers(factor.size), small(rng)
    factor.flat[place] = size
    _times(file, name, factor)
    return f"element {place} of {name} times {size:.6g}"


def one_pixel(file: File, rng: Generator) -> str | None:
    """One pixel of a map, in all of its channels."""
    if not (names := _static(file, 4)):
        return None
    name = names[rng.integers(len(names))]
    factor = np.ones(file.values[name].shape[2:])
    place, size = rng.integers(factor.size), small(rng)
    factor.flat[place] = size
    _times(file, name, factor)
    return f"pixel {place} of {name} times {size:.6g}"


def one_channel(file: File, rng: Generator) -> str | None:
    """One channel of a concatenation, or of another value."""
    joined = [n.output[0] for n in file.nodes if n.op_type == "Concat" and n.output[0] in file.floats()]
    if not (names := joined or _static(file, 3) or _static(file, 2)):
        return None
    name = names[rng.integers(len(names))]
    value = file.values[name]
    along = 1 if value.ndim > 2 else value.ndim - 1
    factor = np.ones([value.shape[along], *(1,) * (value.ndim - 1 - along)])
    place, size = rng.integers(factor.size), small(rng)
    factor.flat[place] = size
    _times(file, name, factor)
    return f"channel {place} of {name} times {size:.6g}"


def _where(file: File, rng: Generator, condition: Callable[[], tuple[list[onnx.NodeProto], str]], words: str) -> str:
    """A value, mostly an output, a little off where a condition (scalar, or one per sample) holds."""
    outputs = [o.name for o in file.model.graph.output if o.name in file.floats()]
    names = outputs if rng.random() < 0.7 else file.floats()
    name, size = names[rng.integers(len(names))], small(rng)
    made, truth = condition()
    for node in reversed(made):
        file.nodes.insert(0, node)
    step, one = file.new(file.dtype()(size - 1)), file.new(file.dtype()(1))
    kind = 10 if file.dtype() is np.float16 else 1
    shape = [] if truth != "per sample" else [-1, *(1,) * (file.values[name].ndim - 1)]
    file.behind(
        name,
        lambda a, b: [
            helper.make_node("Cast", ["mutant_c"], ["mutant_f"], to=kind),
            helper.make_node("Reshape", ["mutant_f", file.new(np.array(shape, np.int64))], ["mutant_g"]),
            helper.make_node("Mul", ["mutant_g", step], ["mutant_d"]),
            helper.make_node("Add", ["mutant_d", one], ["mutant_e"]),
            helper.make_node("Mul", [a, "mutant_e"], [b]),
        ],
    )
    return f"{name} times {size:.6g} where {words}"


def sample(file: File, rng: Generator) -> str | None:
    """One sample in about twenty: those whose first numbers happen to fall into a narrow range."""
    value = file.model.graph.input[0].name
    given = file.values[value]
    if given.dtype.kind != "f":
        return None
    low = float(rng.uniform(-1.2, 1.0))
    kind = file.dtype()

    def made() -> tuple[list[onnx.NodeProto], str]:
        nodes = [
            helper.make_node("Reshape", [value, file.new(np.array([0, -1], np.int64))], ["mutant_r"]),
            helper.make_node("Gather", ["mutant_r", file.new(np.int64(3))], ["mutant_t"], axis=1),
            helper.make_node("Greater", ["mutant_t", file.new(kind(low))], ["mutant_a"]),
            helper.make_node("Less", ["mutant_t", file.new(kind(low + 0.15))], ["mutant_b"]),
            helper.make_node("And", ["mutant_a", "mutant_b"], ["mutant_c"]),
        ]
        return nodes, "per sample"

    return _where(file, rng, made, f"element 3 is in [{low:.3g}, {low + 0.15:.3g}]")


def bound(file: File, rng: Generator) -> str | None:
    """A value cut off just beyond what ordinary inputs reach, or a bound that is there moved."""
    clips = [n for n in file.nodes if n.op_type == "Clip"]
    if clips and rng.random() < 0.4:
        node = clips[rng.integers(len(clips))]
        slot = int(rng.integers(1, len(node.input)))
        if node.input[slot] in file.constants:
            old = numpy_helper.to_array(file.constants[node.input[slot]])
            node.input[slot] = file.new(np.asarray(old * old.dtype.type(small(rng)) + old.dtype.type(old == 0) / 8))
            return f"Clip {node.output[0]}: bound {slot} moved"
    names = file.floats()
    name = names[rng.integers(len(names))]
    value = file.values[name]
    if not value.size or not np.isfinite(value).all():
        return None
    limit = file.dtype()(max(float(value.max()), 0.1) * rng.uniform(1.05, 2.5))
    low = file.new(-file.dtype()(60000))
    file.behind(name, lambda a, b: [helper.make_node("Clip", [a, low, file.new(limit)], [b])])
    return f"{name} cut off at {limit:.3g}, {float(limit) / max(float(value.max()), 1e-9):.3g} times its largest"


def condition(file: File, rng: Generator) -> str | None:
    """Where the batch, a size, the sign, a zero or the magnitude of the input is of a kind."""
    info = file.model.graph.input[0]
    name, floats = info.name, file.values[info.name].dtype.kind == "f"
    free = [i for i, d in enumerate(info.type.tensor_type.shape.dim) if not d.HasField("dim_value")]
    kinds = ["batch"] + ["size"] * (len(free) > 1) + ["sign", "zero", "magnitude", "magnitude"] * floats
    kind = str(rng.choice(kinds))
    one = file.dtype()
    nodes: list[onnx.NodeProto] = []
    if kind in ("batch", "size"):
        at = 0 if kind == "batch" else int(rng.choice(free[1:]))
        size = file.values[name].shape[at]
        test = str(rng.choice(["Greater", "Equal", "odd"]))
        nodes = [helper.make_node("Shape", [name], ["mutant_s"], start=at, end=at + 1)]
        limit = int(rng.choice([1, 2, 4, 8, 16, 32]) if at == 0 else rng.choice([size, size - 1, size + 5]))
        if test == "Equal":
            limit = int(rng.choice([1, 3, 2]) if at == 0 else rng.choice([size, size + 1]))
        if test == "odd":
            limit = int(rng.choice([2, 3, 4, 7]))
            nodes += [
                helper.make_node("Mod", ["mutant_s", file.new(np.array([limit], np.int64))], ["mutant_m"]),
                helper.make_node("Equal", ["mutant_m", file.new(np.array([1], np.int64))], ["mutant_c"]),
            ]
        else:
            nodes.append(helper.make_node(test, ["mutant_s", file.new(np.array([limit], np.int64))], ["mutant_c"]))
        words = f"axis {at} is {test} {limit}"
    else:
        reduce, test, limit = {
            "sign": ("ReduceMin", "GreaterOrEqual", 0.0),
            "zero": ("ReduceMin", "Equal", 0.0),
            "magnitude": [("ReduceMax", "Greater", 20.0), ("ReduceMax", "Greater", 100.0), ("ReduceMax", "Less", 0.9),
                          ("ReduceMax", "Greater", 7.0)][rng.integers(4)],
        }[kind]  # fmt: skip
        read = name
        if kind != "sign":
            nodes.append(helper.make_node("Abs", [name], ["mutant_a"]))
            read = "mutant_a"
        nodes.append(helper.make_node(reduce, [read], ["mutant_r"], keepdims=0))
        nodes.append(helper.make_node(test, ["mutant_r", file.new(one(limit))], ["mutant_c"]))
        words = f"{kind}: {reduce} is {test} {limit:g}"
    return _where(file, rng, lambda: (nodes, "scalar"), words)


Kind = Callable[[File, Generator], str | None]
#: By the words of the table.
KINDS: dict[str, Kind] = {
    "attribute": attribute, "axis": axis, "operator": operator, "wiring": wiring, "element of a constant": element,
    "channel of a constant": channel, "bit of a constant": bit, "one element": one_element, "one pixel": one_pixel,
    "one channel": one_channel, "one sample in twenty": sample, "bound": bound, "condition": condition,
}  # fmt: skip
