"""Edits that few inputs, elements, pixels, channels or samples show."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from mutant_file import Array, File, Generator, small
from onnx import helper, numpy_helper


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
    return _one_place(file, rng, 1, "element")


def one_pixel(file: File, rng: Generator) -> str | None:
    """One pixel of a map, in all of its channels."""
    return _one_place(file, rng, 2, "pixel")


def _one_place(file: File, rng: Generator, axis: int, kind: str) -> str | None:
    """One place along ``axis`` and those behind it."""
    if not (names := _static(file, 2 * axis)):
        return None
    name = names[rng.integers(len(names))]
    factor = np.ones(file.values[name].shape[axis:])
    place, size = rng.integers(factor.size), small(rng)
    factor.flat[place] = size
    _times(file, name, factor)
    return f"{kind} {place} of {name} times {size:.6g}"


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
