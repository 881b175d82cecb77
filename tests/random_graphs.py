"""Random programs out of the table: what a fold may meet, in any order.

``grow(pick)`` makes one, asking ``pick(options)`` for every choice, so that Hypothesis can shrink it and a seed can
reproduce it. Every program has a dynamic batch and returns all its loose ends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from operator import getitem
from typing import Any

import torch
from programs import Node, Program, aten
from torch import Tensor
from torch.export import ExportedProgram

Pick = Callable[[Sequence[Any]], Any]


@dataclass(frozen=True)
class RandomGraph:
    """A program in float64, and the same in another dtype."""

    program: ExportedProgram
    source: Program
    outputs: tuple[Node, ...]

    def rounded(self, dtype: torch.dtype) -> ExportedProgram:
        """The program with its constants rounded to ``dtype``."""
        return self.source.replayed(dtype, *self.outputs)

    def __repr__(self) -> str:
        return "\n".join(n.format_node() or "" for n in self.program.graph.nodes if n.op != "placeholder")


class Grower:
    """A program in the making; every method but ``grow`` appends a layer to the value it is given."""

    def __init__(self, pick: Pick) -> None:
        self.pick = pick
        self.generator = torch.Generator().manual_seed(pick(range(1000)))
        self.p = Program(pick([(2, 4, 4, 4), (2, 4, 6, 5), (2, 6, 4), (2, 8)]), torch.float64)
        self.made = [self.p.x]
        self.convs: list[tuple[Node, int]] = []
        self.norms: list[tuple[Node | None, ...]] = []

    # -- numbers ---------------------------------------------------------------------------------------------------

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.float64) + 0.5

    def channels(self, count: int) -> Tensor:
        """Scales of one kind: all positive, of both signs, with a zero among them."""
        kind, values = self.pick(["positive", "signed", "zero"]), self.uniform(count)
        if kind != "positive":
            values = values * (torch.rand(count, generator=self.generator) < 0.5).double().mul(2).sub(1)
        if kind == "zero":
            values[0] = 0
        return values

    def constant(self, name: str, tensor: Tensor) -> Node:
        return self.p.parameter(self.p.name(name), tensor)

    def maybe(self, *make: Any) -> Node | None:
        return self.constant(*make) if self.pick([True, False]) else None

    # -- layers ----------------------------------------------------------------------------------------------------

    def norm(self, x: Node) -> Node:
        count = self.p.shape(x)[1]
        shared = [s for s in self.norms if self.p.shape(s[2])[0] == count]  # type: ignore[arg-type]
        if shared and self.pick([False, False, True]):
            stats = shared[0]
        else:
            variance = self.uniform(count)
            if self.pick([False, False, True]):
                variance[-1] = 1e-12
            affine = self.pick([True, True, False])
            stats = (
                self.constant("bn_weight", self.channels(count)) if affine else None,
                self.constant("bn_bias", self.normal(count)) if affine else None,
                self.constant("bn_mean", self.normal(count)),
                self.constant("bn_var", variance),
            )
            self.norms.append(stats)
        module = self.p.name("bn")
        return self.p.call(
            aten.batch_norm.default, x, *stats, False, 0.1, 1e-5, False, module=module, layer="BatchNorm"
        )

    def conv(self, x: Node) -> Node:
        _, c, *size = self.p.shape(x)
        target = {1: aten.conv1d.default, 2: aten.conv2d.default}[len(size)]
        shared = [w for w, groups in self.convs if groups == 1 and self.p.shape(w)[1:] == (c, *[1] * len(size))]
        if shared and self.pick([False, True]):
            return self.p.call(target, x, shared[0], module=self.p.name("conv"), layer="Conv2d")
        k = self.pick([1, 3]) if min(size) >= 3 else 1
        groups = self.pick([g for g in (1, 2, c) if c % g == 0])
        out = self.pick([c, 2 * groups, 4 * groups])
        out -= out % groups
        padding = self.pick(["none", "zero", "reflect", "replicate", "circular"]) if k == 3 else "none"
        if padding in ("reflect", "replicate", "circular"):
            x = self.p.call(aten.pad.default, x, [1] * 2 * len(size), padding)
        weight = self.constant("weight", self.normal(out, c // groups, *[k] * len(size)) / (c * k) ** 0.5)
        self.convs.append((weight, groups))
        stride = self.pick([1, 1, 2])
        many = [1] * len(size)
        return self.p.call(
            target, x, weight, self.maybe("bias", self.normal(out)), [stride * n for n in many],
            [int(padding == "zero") * n for n in many], many, groups, module=self.p.name("conv"), layer="Conv2d",
        )  # fmt: skip

    def conv_transpose(self, x: Node) -> Node:
        c = self.p.shape(x)[1]
        groups = self.pick([g for g in (1, 2) if c % g == 0])
        weight = self.constant("weight", self.normal(c, self.pick([1, 2]), 2, 2) / c**0.5)
        out = groups * self.p.shape(weight)[1]
        return self.p.call(
            aten.conv_transpose2d.input, x, weight, self.maybe("bias", self.normal(out)), [2, 2], [0, 0], [0, 0],
            groups, module=self.p.name("up"), layer="ConvTranspose2d",
        )  # fmt: skip

    def linear(self, x: Node) -> Node:
        c = self.p.shape(x)[-1]
        out = self.pick([c, 4, 8])
        return self.p.call(
            aten.linear.default, x, self.constant("weight", self.normal(out, c) / c**0.5),
            self.maybe("bias", self.normal(out)), module=self.p.name("fc"), layer="Linear",
        )  # fmt: skip

    def scaling(self, x: Node) -> Node:
        """A multiply or an add by a constant along one axis, or by a number."""
        shape = self.p.shape(x)
        axis = self.pick([1, *range(1, len(shape)), None])
        count = [1] * len(shape) if axis is None else [n if a == axis else 1 for a, n in enumerate(shape)]
        target = self.pick([aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.div.Tensor])
        values = self.channels(prod(count)) if target is aten.mul.Tensor else self.uniform(prod(count))
        constant = self.constant("constant", values.reshape(count))
        operands = (
            (constant, x) if target in (aten.mul.Tensor, aten.sub.Tensor) and self.pick([0, 1]) else (x, constant)
        )
        return self.p.call(target, *operands)

    def activation(self, x: Node) -> Node:
        relu, others = aten.relu.default, [aten.leaky_relu.default, aten.sigmoid.default, aten.abs.default]
        return self.p.call(self.pick([relu, relu, *others]), x)

    def own_norm(self, x: Node) -> Node:
        """A norm with the statistics of each sample; with a bias, or of a constant it would leave nothing but noise."""
        shape = self.p.shape(x)
        over_groups = len(shape) > 2 and shape[1] % 2 == 0 and self.pick([True, False])
        count = shape[1] if over_groups else shape[-1]
        weight, bias = self.maybe("weight", self.channels(count)), self.constant("bias", self.normal(count))
        if over_groups:
            return self.p.call(aten.group_norm.default, x, 2, weight, bias, 0.1)
        return self.p.call(aten.layer_norm.default, x, [count], weight, bias, 0.1)

    def pool(self, x: Node) -> Node:
        kind = self.pick(["max", "avg", "avg_padded", "avg_uncounted", "adaptive"])
        if kind == "max":
            return self.p.call(aten.max_pool2d.default, x, [2, 2], [2, 2], [self.pick([0, 1])] * 2)
        if kind == "adaptive":
            return self.p.call(aten.adaptive_avg_pool2d.default, x, [2, 2])
        padding = 0 if kind == "avg" else 1
        return self.p.call(
            aten.avg_pool2d.default, x, [2, 2], [1, 1], [padding] * 2, self.pick([False, True]), kind == "avg_padded"
        )

    def upsample(self, x: Node) -> Node:
        if self.pick([True, False]):
            return self.p.call(aten.upsample_nearest2d.vec, x, None, [2.0, 2.0])
        return self.p.call(aten.upsample_bilinear2d.vec, x, None, False, [2.0, 2.0])

    def movement(self, x: Node) -> Node:
        shape = self.p.shape(x)
        kind = self.pick(["flip", "roll", "half", "clone", "shuffle", "zero_pad", "chunks", "repeat", "order"])
        if kind == "order":
            some = torch.randint(shape[1], (shape[1],), generator=self.generator)
            order = self.pick([torch.randperm(shape[1], generator=self.generator), some])
            return self.p.call(aten.index_select.default, x, 1, self.constant("order", order))
        if kind == "half":
            low = self.pick([0, shape[1] // 2])
            return self.p.call(aten.slice.Tensor, x, 1, low, low + shape[1] // 2)
        if kind == "chunks":
            both = self.p.call(aten.split.Tensor, x, shape[1] // 2, 1)
            parts = [self.p.call(getitem, both, i) for i in range(2)]
            self.made.append(parts[1])
            return parts[0]
        if kind == "shuffle" and shape[1] % 2 == 0:
            x = self.p.call(aten.unflatten.int, x, 1, [2, shape[1] // 2])
            return self.p.call(aten.flatten.using_ints, self.p.call(aten.transpose.int, x, 1, 2), 1, 2)
        if kind == "zero_pad" and len(shape) > 2:
            return self.p.call(aten.pad.default, x, [1, 1])
        if kind == "repeat" and shape[1] < 8:
            return self.p.call(aten.cat.default, [x, x], 1)
        if kind == "roll":
            return self.p.call(aten.roll.default, x, [1], [len(shape) - 1])
        if kind == "clone":
            return self.p.call(aten.clone.default, x)
        return self.p.call(aten.flip.default, x, [self.pick(range(1, len(shape)))])

    def reshape(self, x: Node) -> Node:
        """To another number of axes."""
        shape = self.p.shape(x)
        if len(shape) == 4:
            kind = self.pick(["tokens", "flatten", "mean", "rows", "amax"])
            if kind == "amax":
                return self.p.call(aten.amax.default, x, [2, 3])
            if kind == "tokens":
                return self.p.call(aten.transpose.int, self.p.call(aten.flatten.using_ints, x, 2), 1, 2)
            if kind == "mean":
                return self.p.call(aten.mean.dim, x, [2, 3])
            if kind == "rows":
                return self.p.call(aten.flatten.using_ints, x, 2)
            return self.p.call(aten.flatten.using_ints, x, 1)
        if len(shape) == 3:
            kind = self.pick(["transpose", "flatten", "merge"])
            if kind == "transpose":
                return self.p.call(aten.transpose.int, x, 1, 2)
            return self.p.call(aten.flatten.using_ints, x, *([1] if kind == "flatten" else [0, 1]))
        return self.p.call(aten.unflatten.int, x, 1, [-1, *self.pick([(1,), (2, 1)])]) if shape[1] % 2 == 0 else x

    def join(self, x: Node) -> Node:
        """A sum, product, maximum, choice or concatenation with an earlier value of the same shape."""
        shape = self.p.shape(x)
        same = [
            v for v in self.made if self.p.shape(v) == shape and str(v.meta["val"].shape) == str(x.meta["val"].shape)
        ]
        other = self.pick(same)
        kind = self.pick(["add", "add", "add", "sub", "mul", "maximum", "cat", "where", "mask"])
        if kind in ("where", "mask"):
            mask = self.constant("mask", torch.rand(shape[1:], generator=self.generator) < 0.5)
            if kind == "mask":
                return self.p.call(aten.masked_fill.Scalar, x, mask, 0.0)
            return self.p.call(aten.where.self, mask, x, other)
        if kind == "cat":
            return self.p.call(aten.cat.default, [x, other], 1) if shape[1] < 17 else x
        if kind in ("add", "sub"):
            target = aten.add.Tensor if kind == "add" else aten.sub.Tensor
            alpha = self.pick([None, None, 2])
            return self.p.call(target, other, x) if alpha is None else self.p.call(target, other, x, alpha=alpha)
        return self.p.call(aten.mul.Tensor if kind == "mul" else aten.maximum.default, x, other)

    # -- the whole -------------------------------------------------------------------------------------------------

    def layers(self, x: Node) -> list[Callable[[Node], Node]]:
        """What can be appended to ``x``, the common ones more than once."""
        shape = self.p.shape(x)
        wide = len(shape) == 4 and min(shape[2:]) >= 2
        found = [self.norm, self.norm, self.norm, self.scaling, self.activation, self.reshape, self.join, self.join]
        found += [self.movement, self.own_norm] if shape[1] >= 2 else []
        found += [self.conv, self.conv] if len(shape) > 2 else [self.linear]
        found += [self.linear] if len(shape) == 3 else []
        found += [self.pool] if wide else []
        found += [self.upsample, self.conv_transpose] if len(shape) == 4 and max(shape[2:]) < 8 else []
        return found

    def grow(self) -> RandomGraph:
        for _ in range(self.pick(range(2, 12))):
            x = self.pick([self.made[-1]] * 3 + self.made[-4:])
            self.made.append(self.pick(self.layers(x))(x))
        outputs = tuple(dict.fromkeys(v for v in self.made if not v.users)) or (self.made[-1],)
        return RandomGraph(self.p.done(*outputs), self.p, outputs)


def grow(pick: Pick) -> RandomGraph:
    """A random program; ``pick(options)`` makes every choice."""
    return Grower(pick).grow()
