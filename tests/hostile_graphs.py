"""Random programs that are hostile to folding: what is legal at the example's size, dtype and moment only.

``grow(seed)`` makes one: values that are written to after they were read, through views and copies; symbolic numbers as
arguments and operands; constants and casts of several dtypes; weights and statistics that layers share. ``check`` folds
and merges it and compares with the program as it was, at batches of 1, 2 and 3 and sizes that are multiples of nothing.
"""

from __future__ import annotations

import operator
import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import sympy
import torch
from programs import Node, Program, aten
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch.export import ExportedProgram

from bnfold.graph.functional import make_functional
from bnfold.graph.graph import Graph
from bnfold.graph.interpret import Runner
from bnfold.graph.program import copy_graph, output_specs, rebuild
from bnfold.passes.folding import fold
from bnfold.passes.merge import merge
from bnfold.report import Ledger

half, single, double = torch.float16, torch.float32, torch.float64
#: Sizes to compare at: batch, height, width.
SIZES = ((1, 13, 17), (2, 11, 9), (3, 16, 23), (2, 22, 14), (3, 5, 7))
#: In float64 nothing is rounded that counts; else an error may be so many times the one that the program itself has.
RELATIVE, NOISES = 1e-9, 16.0
LONGEST = 9


#: Operators whose result looks like their operand.
_LIKE = {aten.batch_norm.default, aten.relu.default, aten.sigmoid.default, aten.abs.default, aten.softmax.int}

_PAIRWISE = {aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor}


class Hostile(Program):
    """A program whose constants keep their dtype, and whose calls may take and give numbers and write to values."""

    def parameter(self, name: str, tensor: Tensor) -> Node:
        """A constant as it is."""
        with self.graph.inserting_before(self.x):
            node = self.graph.placeholder("p_" + name.replace(".", "_"))
        with self.mode:
            node.meta["val"] = torch.empty(tensor.shape, dtype=tensor.dtype)
        self.parameters[node] = name, tensor
        return node

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        """An operator, of tensors or of numbers, in place or not."""
        dispatcher = enable_python_dispatcher() if target is aten.pad.default else nullcontext()
        with self.mode, dispatcher, torch.no_grad():
            plain = torch.fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
            shape = self._known_shape(target, plain[0])
            if shape is None:
                value = target(*plain[0], **plain[1])
            else:
                pair = plain[0] if target in _PAIRWISE else (plain[0][0], 1.0)
                value = torch.empty(shape, dtype=torch.result_type(*pair))
        node = self.graph.call_function(target, args, kwargs)
        node.meta["val"] = value
        node.meta["nn_module_stack"] = {"L__self__": ("", "Net")}
        return node

    @staticmethod
    def _known_shape(target: Callable[..., Any], args: Sequence[Any]) -> Sequence[Any] | None:
        """The shape of a result that torch would take a tenth of a second to find."""
        if target in _LIKE or (target in _PAIRWISE and getattr(args[1], "ndim", 0) < 4 and args[0].ndim == 4):
            return args[0].shape
        if target is aten.permute.default:
            return [args[0].shape[axis] for axis in args[1]]
        if target in (aten.linear.default, aten.matmul.default):
            return [*args[0].shape[:-1], args[1].shape[0 if target is aten.linear.default else -1]]
        if target is aten.transpose.int:
            shape = list(args[0].shape)
            shape[args[1]], shape[args[2]] = shape[args[2]], shape[args[1]]
            return shape
        if target is not aten.conv2d.default:
            return None
        x, weight, _, stride, padding = (*args, *[None, [1, 1], [0, 0]][len(args) - 2 :])[:5]
        sizes = [(n + 2 * p - k) // s + 1 for n, k, s, p in zip(x.shape[2:], weight.shape[2:], stride, padding)]
        return [x.shape[0], weight.shape[0], *sizes]


class Grower:
    """A program in the making; every method that ``layers`` names makes a value of one that it is given."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.pick = self.random.choice
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = self.pick([double, double, double, single])
        self.size = self.pick([(2, 4, 8, 8), (2, 4, 12, 8), (3, 2, 8, 6), (2, 4, 16, 16)])
        self.dynamic = self.pick([(0,), (0,), (0, 2), (0, 2), (0, 2, 3)])  # every symbol costs torch its time
        self.p = Hostile(self.size, self.dtype, dynamic=self.dynamic)
        self.made: list[Node] = [self.p.x]
        #: Values that may be written to: neither the input nor a view of it.
        self.owned: set[Node] = set()
        self.kept: dict[tuple[Any, ...], list[Any]] = {}

    # -- values ----------------------------------------------------------------------------------------------------

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=double)

    def constant(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Node:
        tensor = tensor.to(dtype or self.dtype) if tensor.is_floating_point() else tensor
        return self.p.parameter(self.p.name("c"), tensor)

    def shared(self, *key: Any, make: Callable[[], Any]) -> Any:
        """A constant of that kind, often one that is there already."""
        known = self.kept.setdefault(key, [])
        if not known or self.pick([True, True, False]):
            known.append(make())
        return self.pick(known)

    def channels(self, x: Node) -> int:
        return int(x.meta["val"].shape[1])

    def dtype_of(self, x: Node) -> torch.dtype:
        return x.meta["val"].dtype

    def gains(self, count: int) -> Tensor:
        values = self.normal(count).abs() + 0.3
        return values if self.pick([True, True, False]) else values * self.normal(count).sign()

    def number(self, x: Node) -> Node:
        """A number that depends on the size of a value."""
        n = self.p.call(aten.sym_size.int, x, self.pick([axis for axis in (0, 2, 3) if axis in self.dynamic][-2:]))
        by = self.pick([2, 3, 4])
        remainder = self.p.call(operator.mod, n, by)
        kind = self.pick(["rest", "rest", "half", "to multiple", "large", "nothing"])
        if kind == "half":
            return self.p.call(operator.floordiv, n, 2)
        if kind == "to multiple":
            return self.p.call(operator.mod, self.p.call(operator.neg, n), by)
        if kind == "large":
            return self.p.call(operator.floordiv, n, 20)
        return self.p.call(operator.sub, n, n) if kind == "nothing" else remainder

    # -- layers ----------------------------------------------------------------------------------------------------

    def norm(self, x: Node) -> Node:
        count = self.channels(x)
        dtype = self.dtype_of(x)
        stats = self.shared("norm", count, dtype, make=lambda: [
            self.constant(t, dtype)
            for t in (self.gains(count), self.normal(count), self.normal(count), self.normal(count).abs() + 0.5)
        ])  # fmt: skip
        return self.p.call(aten.batch_norm.default, x, *stats, False, 0.1, 1e-5, False)

    def conv(self, x: Node) -> Node:
        count, dtype, k = self.channels(x), self.dtype_of(x), self.pick([1, 1, 1, 2, 3])
        out, groups = self.pick([2, 4]), self.pick([1, 1, 2])
        weight = self.shared("conv", count, dtype, k, out, groups, make=lambda: self.constant(
            self.normal(out, count // groups, k, k) / (count * k), dtype))  # fmt: skip
        bias = self.constant(self.normal(out), dtype) if self.pick([True, False]) else None
        padding: list[Any] = [0, 0]
        if k > 1:
            padding = self.pick([[0, 0], [1, 1], [self.number(x), 0], [0, self.number(x)]])
        stride = self.pick([[1, 1], [1, 1], [2, 1]])
        return self.p.call(aten.conv2d.default, x, weight, bias, stride, padding, [1, 1], groups)

    def linear(self, x: Node) -> Node:
        count, dtype = self.channels(x), self.dtype_of(x)
        weight = self.shared("linear", count, dtype, make=lambda: self.constant(self.normal(4, count) / 2, dtype))
        moved = self.p.call(aten.permute.default, x, [0, 2, 3, 1])
        made = self.p.call(aten.linear.default, moved, weight, self.constant(self.normal(4), dtype))
        return self.p.call(aten.permute.default, made, [0, 3, 1, 2])

    def scaling(self, x: Node) -> Node:
        count, other = self.channels(x), self.pick([self.dtype_of(x)] * 4 + [single, double, half])
        target = self.pick([aten.mul.Tensor, aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor])
        kind = self.pick(["channels", "channels", "number", "plain", "integers"])
        if kind == "plain":
            constant: Any = self.pick([2.0, 0.5, -1.0, 1])
        elif kind == "integers":
            constant = self.constant(torch.randint(1, 4, (count, 1, 1), generator=self.generator))
        else:
            values = self.gains(count).reshape(count, 1, 1) if kind == "channels" else self.gains(1).reshape(())
            constant = self.constant(values, other)
        if target is aten.sub.Tensor and kind != "plain" and self.pick([True, False]):
            return self.p.call(target, constant, x)
        return self.p.call(target, x, constant)

    def by_size(self, x: Node) -> Node:
        n, target = self.number(x), self.pick([aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor])
        if self.pick([True, False]):
            same = [v for v in self.made if str(v.meta["val"].shape) == str(x.meta["val"].shape)]
            return self.p.call(aten.add.Tensor, x, self.pick(same), alpha=n)
        return self.p.call(target, x, n)

    def activation(self, x: Node) -> Node:
        return self.p.call(self.pick([aten.relu.default, aten.relu.default, aten.sigmoid.default, aten.abs.default]), x)

    def same(self, x: Node) -> Node:
        return self.p.call(self.pick([aten.clone.default, aten.contiguous.default, aten.alias.default]), x)

    def cast(self, x: Node) -> Node:
        return self.p.call(aten.to.dtype, x, self.pick([single, double, double, half]))

    def pad(self, x: Node) -> Node:
        n = self.pick([self.number(x), self.number(x), 1])
        amounts = self.pick([[0, n, 0, 0], [0, 0, n, 0], [n, 0, 0, 1]])
        return self.p.call(aten.pad.default, x, amounts, self.pick(["constant", "constant", "replicate"]))

    def moved(self, x: Node) -> Node:
        """By a number: channels or rows."""
        axis, n, count = self.pick([1, 2, 3]), self.number(x), self.channels(x)
        kind = self.pick(["roll", "narrow", "slice", "select", "repeat", "flip", "shuffle", "halves"])
        if kind == "roll":
            return self.p.call(aten.roll.default, x, [n], [axis])
        if kind == "narrow" and count == 4:
            start = self.p.call(operator.mod, n, 2)
            return self.p.call(aten.narrow.default, x, 1, start, 2)
        if kind == "slice":
            return self.p.call(aten.slice.Tensor, x, self.pick([2, 3]), self.pick([0, n]), self.pick([2**63 - 1, -1]))
        if kind == "select":
            at = self.p.call(operator.mod, n, count)
            return self.p.call(aten.unsqueeze.default, self.p.call(aten.select.int, x, 1, at), 1)
        if kind == "repeat":
            times = self.p.call(operator.add, self.p.call(operator.mod, n, 2), 1)
            return self.p.call(aten.repeat.default, x, [1, 1, times, 1])
        if kind == "shuffle" and count == 4:
            y = self.p.call(aten.transpose.int, self.p.call(aten.unflatten.int, x, 1, [2, 2]), 1, 2)
            return self.p.call(aten.flatten.using_ints, y, 1, 2)
        if kind == "halves" and count == 4:
            parts = self.p.call(aten.split.Tensor, x, 2, 1)
            one, two = (self.p.call(operator.getitem, parts, i) for i in (0, 1))
            self.made.append(two)
            return one
        return self.p.call(aten.flip.default, x, [axis])

    def reshaped(self, x: Node) -> Node:
        """Through a view and back, in other words for the same sizes."""
        batch, height, width = (self.p.call(aten.sym_size.int, x, axis) for axis in (0, 2, 3))
        count = self.channels(x)
        kind = self.pick(["flat", "heads", "swapped", "batch"])
        if kind == "flat":
            y = self.p.call(aten.flatten.using_ints, x, 2)
            return self.p.call(aten.reshape.default, y, [batch, count, height, width])
        if kind == "swapped":
            return self.p.call(aten.reshape.default, x, [batch, count, width, height])
        if kind == "batch":
            y = self.p.call(aten.reshape.default, x, [count, batch, height, width])
            return self.p.call(aten.transpose.int, y, 0, 1)
        y = self.p.call(aten.flatten.using_ints, self.p.call(aten.unflatten.int, x, 1, [2, count // 2]), 0, 1)
        y = self.activation(y) if self.pick([True, False]) else y
        return self.p.call(aten.reshape.default, y, [batch, count, height, width])

    def average(self, x: Node) -> Node:
        kind = self.pick(["mean", "avg", "padded", "max", "up", "adaptive", "sum", "amax"])
        if kind in ("mean", "sum"):
            return self.p.call(getattr(aten, kind).dim if kind == "mean" else aten.sum.dim_IntList, x, [2, 3], True)
        if kind == "amax":
            return self.p.call(aten.amax.default, x, [2], True)
        if kind == "up":
            height, width = (self.p.call(aten.sym_size.int, x, axis) for axis in (2, 3))
            return self.p.call(aten.upsample_nearest2d.vec, x, [height, self.p.call(operator.add, width, 1)], None)
        if kind == "adaptive":
            return self.p.call(aten.adaptive_avg_pool2d.default, x, [2, self.p.call(operator.add, self.number(x), 1)])
        if kind == "max":
            return self.p.call(aten.max_pool2d.default, x, [2, 2], [1, 1], [self.pick([0, 1])] * 2)
        return self.p.call(aten.avg_pool2d.default, x, [2, 2], [1, 1], [int(kind == "padded")] * 2)

    def attention(self, x: Node) -> Node:
        """Averages rows of a value with the rows of a softmax, which may have been written to."""
        if self.p.shape(x)[2] * self.p.shape(x)[3] > 300:
            return self.norm(x)  # the matrix of weights is the square of that
        rows = self.p.call(aten.transpose.int, self.p.call(aten.flatten.using_ints, x, 2), 1, 2)
        weights = self.p.call(aten.matmul.default, rows, self.p.call(aten.transpose.int, rows, 1, 2))
        weights = self.p.call(aten.softmax.int, weights, -1)
        if self.pick([True, False]):
            self.p.call(aten.fill_.Scalar, self.p.call(aten.select.int, weights, 1, 0), 0.5)
        made = self.p.call(aten.transpose.int, self.p.call(aten.matmul.default, weights, rows), 1, 2)
        return self.p.call(aten.unsqueeze.default, made, 2)

    def join(self, x: Node) -> Node:
        shape = str(x.meta["val"].shape)
        same = [v for v in self.made if str(v.meta["val"].shape) == shape]
        other, kind = self.pick(same), self.pick(["add", "add", "add", "sub", "mul", "cat", "maximum", "where"])
        if kind == "cat":
            return self.p.call(aten.cat.default, [x, other], 1) if self.channels(x) == 2 else self.norm(x)
        if kind == "where":
            mask = self.constant(torch.rand(self.channels(x), 1, 1, generator=self.generator) < 0.5)
            return self.p.call(aten.where.self, mask, x, other)
        target = {"add": aten.add.Tensor, "sub": aten.sub.Tensor, "mul": aten.mul.Tensor}
        return self.p.call(target.get(kind, aten.maximum.default), other, x)

    def write(self, x: Node) -> Node | None:
        """Writes to a value that somebody may have read, or to a part of it; what is made of it later is another."""
        targets = [v for v in self.made if v in self.owned]
        if not targets:
            return None
        y = self.pick(targets[-3:])
        kind = self.pick(["relu", "mul", "add", "part", "part", "rows", "view"])
        if kind == "relu":
            return self.p.call(aten.relu_.default, y)
        if kind in ("mul", "add"):
            target = aten.mul_.Tensor if kind == "mul" else aten.add_.Tensor
            return self.p.call(
                target, y, self.constant(self.gains(self.channels(y)).reshape(-1, 1, 1), self.dtype_of(y))
            )
        if kind == "view":
            return self.p.call(aten.mul_.Tensor, self.p.call(aten.flatten.using_ints, y, 2), 2.0) and None
        part = self.p.call(aten.select.int, y, 1 if kind == "part" else 2, 0)
        self.p.call(aten.fill_.Scalar, part, 0.75)
        return None

    # -- what meets a fold ------------------------------------------------------------------------------------------

    def around(self, x: Node) -> Node:
        """Something hostile between an affine and a contraction that would take it."""
        hostile = self.pick([self.pad, self.moved, self.moved, self.reshaped, self.average, self.by_size, self.cast,
                             self.same, self.attention, self.scaling, self.conv])  # fmt: skip
        if self.pick([True, False]):
            return self.linear(hostile(self.norm(self.activation(x))))
        affine = self.pick([self.norm, self.scaling])
        return self.activation(affine(hostile(self.pick([self.conv, self.linear])(x))))

    def rewritten(self, x: Node) -> Node:
        """Reads a value, writes to it, and then makes of both what would be merged or composed."""
        y = self.activation(x)
        linear = [self.pointwise, self.pointwise, self.linear, self.scaling, self.same]
        first = self.pick(linear)(self.same(y) if self.pick([True, False, False]) else y)
        self.p.call(aten.fill_.Scalar, self.p.call(aten.select.int, y, 1, 0), 0.75)
        self.made.append(y)
        kind = self.pick(["chain", "sum", "cat"])
        if kind == "chain":
            return self.pick(linear)(first)
        second = self.pick(linear[:-1] if self.channels(first) == 2 else linear)(y)
        if str(second.meta["val"].shape) != str(first.meta["val"].shape):
            self.made.append(first)
            return second
        if kind == "cat":
            return self.p.call(aten.cat.default, [first, second], 1)
        return self.p.call(aten.add.Tensor, first, second)

    def pointwise(self, x: Node) -> Node:
        count, dtype = self.channels(x), self.dtype_of(x)
        weight = self.constant(self.normal(2, count, 1, 1) / count, dtype)
        return self.p.call(aten.conv2d.default, x, weight, self.constant(self.normal(2), dtype))

    # -- the whole -------------------------------------------------------------------------------------------------

    def layers(self) -> list[Callable[[Node], Node | None]]:
        common = [self.norm, self.conv, self.scaling, self.activation, self.join, self.around, self.around, self.around]
        common += [self.rewritten]
        rare = [self.linear, self.same, self.cast, self.pad, self.moved, self.reshaped, self.average, self.by_size]
        return [*common, *common, *rare, self.write, self.write, self.attention]

    def fits(self, value: Node) -> bool:
        shape = value.meta["val"].shape
        return len(shape) == 4 and shape[1] in (2, 4) and value.meta["val"].is_floating_point()

    def grow(self) -> ExportedProgram:
        for _ in range(self.random.randrange(2, LONGEST)):
            x = self.pick([self.made[-1]] * 3 + self.made[-4:])
            before = len(self.made), list(self.p.graph.nodes)
            try:
                made = self.pick(self.layers())(x)
            except Exception:  # a size or dtype that the operator does not take: the graph is as it was
                del self.made[before[0] :]
                known = set(before[1])
                for node in reversed(list(self.p.graph.nodes)):
                    if node not in known and not node.users:
                        self.p.graph.erase_node(node)
                        self.p.parameters.pop(node, None)
                gone = set(self.p.graph.nodes)
                self.kept = {key: [v for v in values if _alive(v, gone)] for key, values in self.kept.items()}
                continue
            if made is not None and self.fits(made):
                self.made.append(made)
                if made.target not in _VIEWS or made.args[0] in self.owned:
                    self.owned.add(made)
        loose = [v for v in self.made if not v.users or self.random.random() < 0.1]
        outputs = tuple(dict.fromkeys(v for v in loose if v is not self.p.x)) or (self.norm(self.p.x),)
        return self.p.done(*outputs)


_VIEWS = {
    *(aten.alias.default, aten.contiguous.default, aten.slice.Tensor, aten.narrow.default, aten.select.int),
    *(aten.permute.default, aten.transpose.int, aten.reshape.default, aten.flatten.using_ints, aten.unsqueeze.default),
    *(aten.to.dtype, operator.getitem, aten.pad.default, aten.relu_.default),
}


def _alive(kept: Any, nodes: set[Node]) -> bool:
    return all(node in nodes for node in (kept if isinstance(kept, list) else [kept]))


def grow(seed: int) -> ExportedProgram:
    """The program of that seed, its in-place operators still in place."""
    return Grower(seed).grow()


def functional(program: ExportedProgram) -> ExportedProgram:
    """What capturing it gives."""
    graph = copy_graph(program.graph)
    specs = program.graph_signature.input_specs
    constants = {spec.arg.name: spec.target or "" for spec in specs if spec.target is not None}
    make_functional(graph, inputs={"x"}, constants=constants)
    signature = type(program.graph_signature)(list(specs), output_specs(program, graph))
    return rebuild(program, graph, signature, dict(program.state_dict), dict(program.constants))


def folded(program: ExportedProgram, *, merged: bool) -> tuple[ExportedProgram, Ledger]:
    """The program folded, and with its linear maps merged."""
    graph = Graph(program)
    ledger = fold(graph)
    ledger = merge(graph, ledger) if merged else ledger
    return graph.finish(), ledger


def legal(program: ExportedProgram, sizes: Sequence[int]) -> bool:
    """Whether the guards hold there; of one sample nothing is asked, as no file asks it."""
    value = next(node for node in program.graph.nodes if node.name == "x").meta["val"]
    symbols = [value.shape[axis] for axis in (0, 2, 3)]
    now = {s.node.expr: sympy.Integer(max(n, 2)) for s, n in zip(symbols, sizes) if not isinstance(s, int)}
    free = all(symbol.is_symbol for symbol in now)
    return free and all(guard.expr.xreplace(now) != sympy.false for guard in symbols_of(value).guards)


def symbols_of(value: Tensor) -> Any:
    """The environment of symbols that a fake tensor is of."""
    return value.fake_mode.shape_env  # type: ignore[attr-defined]


def check(program: ExportedProgram) -> tuple[str | None, Ledger]:
    """What is wrong with the program once folded, or merged; None where nothing is."""
    clean, result = functional(program), Ledger()
    value = next(node for node in program.graph.nodes if node.name == "x").meta["val"]
    all_double = all(
        tensor.dtype == double
        for node in program.graph.nodes
        if isinstance(tensor := node.meta.get("val"), Tensor) and tensor.is_floating_point()
    )
    runs = [found for sizes in SIZES if (found := _run(program, value, sizes, all_double)) is not None]
    after, result = folded(clean, merged=True)
    fault = _compared(after, runs, all_double)
    if fault is None:
        return None, result
    alone = _compared(folded(clean, merged=False)[0], runs, all_double)
    return f"merged, {fault}" if alone is None else f"folded, {alone}", result


#: An input, and what a program makes of it in its own dtypes and in float64.
Run = tuple[Tensor, list[Tensor], list[Tensor]]


def _compared(after: ExportedProgram, runs: Sequence[Run], exact: bool) -> str | None:
    for x, own, truth in runs:
        found = Runner(after)([x.clone()])
        for i, (a, b, c) in enumerate(zip(found, own, truth, strict=True)):
            if wrong := _wrong(a, b, c.double(), exact):
                return f"output {i} of {tuple(x.shape)}: {wrong}"
    return None


def _run(program: ExportedProgram, value: Tensor, sizes: Sequence[int], exact: bool) -> Run | None:
    """What the program makes of an input of those sizes; None where it takes none."""
    if not legal(program, sizes):
        return None
    batch, height, width = (s if isinstance(s := value.shape[a], int) else n for a, n in zip((0, 2, 3), sizes))
    generator = torch.Generator().manual_seed(height)
    x = torch.randn(batch, value.shape[1], height, width, dtype=double, generator=generator).to(value.dtype)
    try:
        own = Runner(program)([x.clone()])
        return x, own, own if exact else Runner(program, precise=True)([x.clone()])
    except RuntimeError:
        return None  # a size that the program does not take


def _wrong(found: Tensor, own: Tensor, truth: Tensor, exact: bool) -> str | None:
    if (found.dtype, found.shape) != (own.dtype, own.shape):
        return f"{own.dtype} of {tuple(own.shape)} became {found.dtype} of {tuple(found.shape)}"
    good = truth.isfinite() & own.isfinite()
    if not bool(good.any()):
        return None
    error, mine = (found.double() - truth)[good].abs().max(), (own.double() - truth)[good].abs().max()
    size = truth[good].abs().max()
    noise = RELATIVE * size if exact else NOISES * mine + max(RELATIVE, 16 * torch.finfo(own.dtype).eps) * size
    return None if error <= noise else f"off by {error / size:.1e} where the program itself is off by {mine / size:.1e}"
