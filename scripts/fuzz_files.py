"""Random ONNX files and files with random damage: folded they compute the same, or are refused in one line.

    python scripts/fuzz_files.py [--seeds 0:2000] [--from folder-of-files] [--seconds 120]

A seed makes a net of the operators of the table (float64, or float32 beside it), with what files of others hold: bodies
that read outside, functions, initializers that are inputs too, constants in nodes, sparse ones, other domains, training
outputs. Half of them, and the files of ``--from``, are then damaged: a field of the file takes another value. Folding
ends in ``BnfoldError`` or in a file whose outputs equal the original's in float64 wherever that runs.
Prints every seed that does neither, and what the others came to.
"""

from __future__ import annotations

import argparse
import collections
import faulthandler
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from bnfold.errors import BnfoldError
from bnfold.evaluate.evaluator import File64
from bnfold.loading.onnx_file import read_onnx
from bnfold.onnx_flow import fold_file
from bnfold.options import Options

node = helper.make_node
#: Relative to the largest output; constants are rounded to float64, or to float32.
CLOSE = {TensorProto.DOUBLE: 1e-9, TensorProto.FLOAT: 1e-3}


class Maker:
    """A random net over values of shape (N, C, H, W)."""

    def __init__(self, rng: random.Random) -> None:
        self.rng, self.nodes, self.weights = rng, list[Any](), dict[str, np.ndarray[Any, Any]]()
        self.numbers = np.random.default_rng(rng.randrange(2**32))
        self.count = 0
        self.values: list[tuple[str, int]] = []  # at the current size, with their channels
        self.functions: list[onnx.FunctionProto] = []
        self.opset = rng.choice((9, 12, 13, 15, 17, 19, 21))

    def name(self) -> str:
        self.count += 1
        return f"v{self.count}"

    def weight(self, *shape: int, positive: bool = False) -> str:
        name, value = f"w{len(self.weights)}", self.numbers.standard_normal(shape)
        self.weights[name] = np.abs(value) + 0.3 if positive or self.rng.random() < 0.2 else value
        return name

    def put(self, op: str, inputs: list[str], channels: int, outputs: int = 1, **attributes: Any) -> str:
        names = [self.name() for _ in range(outputs)]
        self.nodes.append(node(op, inputs, names, name=f"n{len(self.nodes)}", **attributes))
        self.values.append((names[0], channels))
        return names[0]

    def pick(self) -> tuple[str, int]:
        return self.rng.choice(self.values[-4:])

    def step(self) -> None:
        rng, (x, c) = self.rng, self.pick()
        kind = rng.choice(STEPS)
        if kind == "conv":
            groups = rng.choice([g for g in (1, 1, 2, c) if c % g == 0])
            k, out = rng.choice((1, 3)), groups * rng.randint(1, 4)
            bias = [self.weight(out)] if rng.random() < 0.6 else []
            pad = {"pads": [k // 2] * 4} if k == 1 or rng.random() < 0.5 else {"auto_pad": "SAME_LOWER"}
            self.put("Conv", [x, self.weight(out, c // groups, k, k), *bias], out, group=groups, **pad)
        elif kind == "transpose":
            out = rng.randint(1, 4)
            self.put("ConvTranspose", [x, self.weight(c, out, 3, 3)], out, pads=[1] * 4)
        elif kind == "norm":
            training = rng.random() < 0.05
            more = {"training_mode": int(training)} if self.opset >= 14 and training else {}
            outputs = 3 if more else 1
            constants = [self.weight(c), self.weight(c), self.weight(c), self.weight(c, positive=True)]
            self.put("BatchNormalization", [x, *constants], c, outputs, epsilon=rng.choice((1e-5, 1e-3)), **more)
        elif kind == "affine":
            shape = rng.choice(((c, 1, 1), (1, c, 1, 1), (), (1,), (1, 1, 1, 1)))
            operands = [x, self.weight(*shape)]
            rng.shuffle(operands)
            self.put(rng.choice(("Mul", "Add", "Sub", "Div")), operands, c)
        elif kind == "layout":
            y = self.put("Transpose", [x], c, perm=[0, 2, 3, 1])
            y = self.put(rng.choice(("Mul", "Add")), [y, self.weight(c)], c)
            y = self.put("Transpose", [y], c, perm=[0, 3, 1, 2])
            del self.values[-3:-1]
        elif kind == "activation":
            self.put(rng.choice(("Relu", "LeakyRelu", "Sigmoid", "Identity", "Abs", "Neg", "Tanh")), [x], c)
        elif kind == "sum":
            other = next((v for v, d in reversed(self.values) if d == c and v != x), x)
            self.put(rng.choice(("Add", "Mul", "Sum", "Max")), [x, other], c)
        elif kind == "concat":
            y, d = self.pick()
            self.put("Concat", [x, y], c + d, axis=1)
        elif kind == "pool":
            op = rng.choice(("AveragePool", "MaxPool"))
            more = {"count_include_pad": rng.randrange(2)} if op == "AveragePool" else {}
            self.put(op, [x], c, kernel_shape=[3, 3], pads=[1] * 4, **more)
        elif kind == "gather" and c > 1:
            index = self.rng.sample(range(c), rng.randint(1, c))
            self.weights[name := f"w{len(self.weights)}"] = np.array(index, np.int64)
            self.put("Gather", [x, name], len(index), axis=1)
        elif kind == "constant":
            value = numpy_helper.from_array(self.numbers.standard_normal((1, c, 1, 1)).astype(self.dtype()))
            y = self.put("Constant", [], c, value=value)
            self.values.pop()
            self.put("Mul", [x, y], c)
        elif kind == "branch":
            bodies = {}
            for key, op in (("then_branch", "Relu"), ("else_branch", "Neg")):
                made = f"{x}.{key}.{self.count}"
                bodies[key] = helper.make_graph([node(op, [x], [made])], key, [], [onnx.ValueInfoProto(name=made)])
            for body in bodies.values():
                body.output[0].type.tensor_type.elem_type = self.kind
            self.weights[name := f"w{len(self.weights)}"] = np.array(rng.random() < 0.5)
            self.put("If", [name], c, **bodies)
        elif kind == "function":
            domain, sets = "of.mine", [helper.make_opsetid("", self.opset)]
            body = [node("Mul", ["a", "a"], ["t"]), node("Tanh", ["t"], ["b"])]
            if not self.functions:
                self.functions.append(helper.make_function(domain, "Squared", ["a"], ["b"], body, sets))
            self.put("Squared", [x], c, domain=domain)

    kind = TensorProto.DOUBLE

    def dtype(self) -> Any:
        return helper.tensor_dtype_to_np_dtype(self.kind)

    def model(self) -> onnx.ModelProto:
        rng = self.rng
        self.kind = rng.choice((TensorProto.DOUBLE, TensorProto.DOUBLE, TensorProto.FLOAT))
        channels = rng.randint(1, 4)
        self.values.append(("x", channels))
        for _ in range(rng.randint(2, 12)):
            self.step()
        made = {name for n in self.nodes for name in n.output}
        read = {name for n in self.nodes for name in n.input}
        ends = [name for name, _ in self.values if name in made and (name not in read or rng.random() < 0.1)]
        dtype = self.dtype()
        arrays = {k: v.astype(dtype) if v.dtype.kind == "f" else v for k, v in self.weights.items()}
        given = [helper.make_tensor_value_info("x", self.kind, ["N", channels, "H", "W"])]
        given += [
            helper.make_tensor_value_info(k, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape)
            for k, v in arrays.items()
            if rng.random() < 0.03
        ]
        graph = helper.make_graph(
            self.nodes, "net", given, [onnx.ValueInfoProto(name=name) for name in dict.fromkeys(ends or ["x"])],
            [numpy_helper.from_array(v, k) for k, v in arrays.items()],
        )  # fmt: skip
        for value in graph.output:
            value.type.tensor_type.elem_type = self.kind
        sets = [helper.make_opsetid("", self.opset), helper.make_opsetid("of.mine", 1)]
        return helper.make_model(graph, opset_imports=sets, functions=self.functions, ir_version=8)


_OFTEN = {"conv": 3, "norm": 4, "affine": 3, "activation": 2, "sum": 2}
_ONCE = "transpose layout concat pool gather constant branch function"
STEPS = [kind for kind in (*_OFTEN, *_ONCE.split()) for _ in range(_OFTEN.get(kind, 1))]
_NUMBERS = (-(2**63), -1, 0, 1, 2, 3, 7, 2**31, 2**40, 2**63 - 1)


def messages(part: Any, depth: int = 0) -> Any:
    """Every message below one, itself too, weights excepted."""
    yield part
    for field, value in part.ListFields():
        if field.message_type is not None and depth < 20:
            for each in value if hasattr(value, "__len__") else (value,):
                yield from messages(each, depth + 1)


def damage(model: onnx.ModelProto, rng: random.Random) -> str:
    """Gives one field of a file another value."""
    part = rng.choice(list(messages(model.graph if rng.random() < 0.9 else model)))
    fields = [(f, v) for f, v in part.ListFields()]
    if not fields:
        return "nothing"
    field, value = rng.choice(fields)
    where = f"{part.DESCRIPTOR.name}.{field.name}"
    many = hasattr(value, "__len__") and not isinstance(value, (str, bytes))
    names = [name for n in model.graph.node for name in (*n.input, *n.output)] or ["x"]
    if many and len(value):
        at = rng.randrange(len(value))
        if field.message_type is not None:
            how = rng.choice(("remove", "twice", "swap"))
            if how == "remove":
                del value[at]
            elif how == "twice":
                value.add().CopyFrom(value[at])
            else:
                other = rng.randrange(len(value))
                copy = type(value[at])()
                copy.CopyFrom(value[at])
                value[at].CopyFrom(value[other])
                value[other].CopyFrom(copy)
            return f"{where} {how}"
        old = value[at]
        if rng.random() < 0.2:
            del value[at]
            return f"{where} remove"
        if isinstance(old, str):
            value[at] = rng.choice((*names, "", "nobody"))
        elif isinstance(old, float):
            value[at] = rng.choice((0.0, -1.0, 1e30, float("nan"), float("inf")))
        elif isinstance(old, int):
            _set(lambda n: value.__setitem__(at, n), rng)
        return where
    if field.message_type is not None or (isinstance(value, bytes) and rng.random() < 0.3):
        part.ClearField(field.name)
        return f"{where} cleared"
    if isinstance(value, str):
        setattr(part, field.name, rng.choice((*names, "", "Conv", "BatchNormalization", "Loop", "Add", "nobody")))
    elif isinstance(value, bytes):
        setattr(part, field.name, value[: rng.randrange(len(value) + 1)])
    elif isinstance(value, float):
        setattr(part, field.name, rng.choice((0.0, -1.0, 1e30, float("nan"))))
    else:
        _set(lambda n: setattr(part, field.name, n), rng)
    return where


def _set(put: Any, rng: random.Random) -> None:
    for number in rng.sample(_NUMBERS, len(_NUMBERS)):
        try:
            put(number)
        except ValueError:  # out of the field's range
            continue
        return


def outcome(model: onnx.ModelProto, folder: Path) -> str:
    """What folding comes to: "same", "refused", "the original fails", or what is wrong."""
    path = folder / "net.onnx"
    path.write_bytes(model.SerializeToString())
    try:
        source = read_onnx(path)
        folded = fold_file(source, Options(allow_nonfinite=True))
    except BnfoldError as error:
        return "refused" if "\n" not in str(error) else f"several lines: {error}"
    try:
        before = File64(path)
        rng = np.random.default_rng(0)
        feeds = {}
        for value in before.inputs:
            shape = [n if isinstance(n, int) and 0 < n < 100 else 5 for n in value.shape]
            feeds[value.name] = rng.standard_normal(shape).astype(value.dtype)
        wanted = before.run(feeds).outputs
    except (BnfoldError, TypeError):
        return "the original fails"
    try:
        given = File64(folded.model).run(feeds).outputs
    except BnfoldError as error:
        return f"FAILS {error}"
    kind = model.graph.output[0].type.tensor_type.elem_type if model.graph.output else 0
    for mine, theirs in zip(given, wanted):
        if isinstance(mine, list) or mine.dtype.kind != "f":
            continue
        if mine.shape != theirs.shape:
            return f"WRONG shape {mine.shape} for {theirs.shape}"
        ok = np.isfinite(theirs)
        scale = np.abs(theirs[ok]).max(initial=0.0)
        if not np.isfinite(mine[ok]).all() or np.abs(mine[ok] - theirs[ok]).max(initial=0.0) > (
            CLOSE.get(kind, 1e-3) * scale
        ):
            return f"WRONG by {np.abs(mine[ok] - theirs[ok]).max(initial=0.0) / max(scale, 1e-300):.2g}"
    return "same, fewer" if folded.ledger.count()[0] else "same"


def main() -> None:
    """Prints what is wrong and the counts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="0:1000")
    parser.add_argument("--from", dest="files", type=Path)
    parser.add_argument("--seconds", type=float, default=120.0)
    given = parser.parse_args()
    first, last = map(int, given.seeds.split(":"))
    files = sorted(given.files.rglob("*.onnx")) if given.files else []
    counts: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(first, last):
            rng, harm = random.Random(seed), ""
            model = onnx.load(rng.choice(files)) if files else Maker(rng).model()
            if files or seed % 2:
                harm = ", ".join(damage(model, rng) for _ in range(rng.choice((1, 1, 2, 5))))
            faulthandler.dump_traceback_later(given.seconds, exit=True)
            print(f"seed {seed} {harm}", file=sys.stderr)
            start = time.process_time()
            try:
                found = outcome(model, Path(folder))
            except Exception as error:
                found = f"CRASH {type(error).__name__}: {error}"[:200]
            faulthandler.cancel_dump_traceback_later()
            counts[found.split()[0] if found[0].isupper() else found] += 1
            if found[0].isupper() or time.process_time() - start > 5:
                print(f"seed {seed}: {found} ({time.process_time() - start:.1f} s; {harm or 'no damage'})", flush=True)
    print(dict(counts))


if __name__ == "__main__":
    main()
