"""The gauges of all values of a graph: every operator adds its equations once, and says what its affines would add."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import getitem
from typing import Literal

import numpy as np
import torch

from bnfold.affine import Affine
from bnfold.graph.graph import Node
from bnfold.passes.rewriter import Rewriter
from bnfold.semantics import Contraction, Equations, Gauge, Homogeneous, Opaque, Scaling, Semantics, ShapeOnly
from bnfold.semantics.call import Call
from bnfold.semantics.equations import DEAD, EMPTY, Blocks, pinned
from bnfold.semantics.sizes import UnknownSizeError
from bnfold.semantics.system import Ints

#: What can be asked: of an affine that it goes, its operand emptied where it multiplies by zero, or its readers leaving
#: those channels out ("dead"), or that it stays; of a contraction with no place for a bias that it needs none.
How = Literal["goes", "dead", "stays", "closed"]


@dataclass(frozen=True)
class Equation:
    """``sum val * x[var] = rhs``, which ``node`` adds because of ``reason``."""

    var: tuple[int, ...]
    val: tuple[float, ...]
    rhs: float
    node: Node
    reason: str


@dataclass(frozen=True)
class Contradiction:
    """Equations of one system that cannot all hold."""

    system: str
    equations: tuple[Equation, ...]  #: those that failed first and last, and what they contradict.
    variables: tuple[int, ...] = ()  #: one of every equation that failed.
    #: of an affine that multiplies by zero, why its readers cannot leave those channels out either.
    dead: Contradiction | None = None

    @property
    def nodes(self) -> set[Node]:
        """What adds the equations."""
        return {e.node for why in (self, self.dead) if why is not None for e in why.equations}


class Gauges:
    """The equations of a graph, which is only read; ``fixed``: values that stay as they are, and why."""

    def __init__(self, rewriter: Rewriter, fixed: Mapping[Node, str] | None = None) -> None:
        self.rewriter, self.graph, self._fixed = rewriter, rewriter.graph, fixed or {}
        self.equations = Equations()
        self.of: dict[Node, Gauge] = {}
        #: In the graph's order: the affines, those and what would be one, and contractions with no place for a bias.
        self.affines: list[Node] = []
        self.sites: list[Node] = []
        self.unbiased: list[Node] = []
        #: The affines that are (part of) a BatchNorm.
        self.norms: set[Node] = set()
        self._neutral: dict[Node, Scaling] = {}
        self._calls: dict[Node, Call] = {}
        self._recorded: dict[tuple[Node, How], Blocks] = {}
        self._build()
        wrong = self.equations.commit()
        assert not wrong, "a graph contradicts itself as it is"
        self.start = self.equations.mark()

    # -- equations -------------------------------------------------------------------------------------------------

    def at(self, value: Node) -> Semantics:
        """What an operator does, an affine without what is multiplied by zero afterwards."""
        return self._neutral.get(value) or self.rewriter.at(value)

    def call(self, value: Node) -> Call:
        """The operator application that makes a value."""
        if value not in self._calls:
            self._calls[value] = self.graph.call(value)
        return self._calls[value]

    def operand(self, site: Node) -> Node:
        """What an affine is applied to."""
        semantics = self.at(site)
        assert isinstance(semantics, Scaling)
        found: Node = self.call(site).at(semantics.slot)
        return found

    def _build(self) -> None:
        graph, equations = self.graph, self.equations
        values = list(graph.values())
        self._neutralise(values)
        scalings = [s for s in map(self.at, values) if isinstance(s, Scaling)]
        equations.zeros = any(bool((s.affine.scale == 0).any()) for s in scalings)
        for node in graph.graph.nodes:
            if node.op == "placeholder" and not graph.is_constant(node) and graph.is_float(node):
                self.of[node] = pinned(graph.rank(node))
        for value in values:
            equations.node = value
            self._relate(value)
        for node in graph.graph.nodes:
            whole = graph.is_list(node) and (not node.users or any(u.target is not getitem for u in node.users))
            if whole or node.op == "output":
                equations.node = node
                self._pin(node.all_input_nodes, "nonlinear" if whole else "model-output")

    def _relate(self, value: Node) -> None:
        """Adds the equations of one operator, and notes what can be asked of it."""
        graph, equations, semantics = self.graph, self.equations, self.at(value)
        made = self._made(value, semantics)
        if not graph.is_float(value):
            if made is not None:  # which elements were chosen, among those of a channel that is not stored
                equations.scale.pin(made.scale, "nonlinear", (DEAD, EMPTY))
            return
        gauge = self.of[value] = made or pinned(graph.rank(value))
        if value in self._fixed:
            equations.shift.pin(gauge.base, self._fixed[value])
            if self._fixed[value] != "dtype":
                equations.scale.pin(gauge.scale, self._fixed[value])
        if made is None:
            if isinstance(semantics, Opaque) and semantics.kind == "batch_norm":
                self.sites.append(value)
        elif isinstance(semantics, Contraction) and semantics.bias is None:
            self.unbiased.append(value)
        elif isinstance(semantics, Scaling) and len(semantics.affine.varies()) > 1:
            # A table (a position embedding, an attention bias) is no per-channel affine.
            semantics.remains(self.of[self.operand(value)], made, equations)
        elif isinstance(semantics, Scaling):
            self.sites.append(value)
            self.affines.append(value)
            if semantics.kind == "batch_norm" or "BatchNorm" in graph.module_class(value):
                self.norms.add(value)

    def _made(self, value: Node, semantics: Semantics) -> Gauge | None:
        """The gauge of an operator's result; None where it relates nothing, and what it reads is pinned."""
        graph, call = self.graph, self.call(value)
        read = {s: self.of[node] for s, node in call.slots() if node in self.of and s not in semantics.shape_only}
        reason = semantics.reason
        try:
            relates = graph.is_float(value) or isinstance(semantics, Homogeneous)
            if relates and not isinstance(semantics, Opaque) and self._reads(semantics, call, read):
                return semantics.relate(read, self.equations, self._shape(value))
        except UnknownSizeError:
            reason = "dynamic-size"
        except (RuntimeError, NotImplementedError):  # what cannot be run on indices
            reason = "unknown-operator"
        if not isinstance(semantics, ShapeOnly):
            self._pin(call.node.all_input_nodes, reason)
        return None

    def _shape(self, value: Node) -> tuple[int, ...]:
        """The shape of a value; -1 along an axis whose size depends on data."""
        graph, axes = self.graph, range(self.graph.rank(value)) if self.graph.is_float(value) else ()
        known = graph.is_sized(value)
        sizes = value.meta["val"].shape if axes else ()
        return tuple(graph.size(value, a) if known or isinstance(sizes[a], int) else -1 for a in axes)

    def _reads(self, semantics: Semantics, call: Call, read: Mapping[str, Gauge]) -> bool:
        """Whether every operand whose elements count is a floating-point value, or a constant."""
        slots = getattr(semantics, "slots", None) or [getattr(semantics, "slot", getattr(semantics, "data", None))]
        known = (None, *read, *semantics.shape_only)
        return all(slot in known or call.is_constant(slot) for slot in slots)

    def _pin(self, values: Iterable[Node], reason: str) -> None:
        for value in values:
            if value in self.of:
                self.equations.pin(self.of[value], reason)

    def _neutralise(self, values: Sequence[Node]) -> None:
        """What is multiplied by zero may be anything: there an affine in front does nothing."""
        for value in reversed(values):
            second = self.at(value)
            if not isinstance(second, Scaling) or not bool((second.affine.scale == 0).any()):
                continue
            before = self.call(value).at(second.slot)
            first = self.rewriter.at(before) if before.op == "call_function" else None
            if isinstance(first, Scaling) and len(list(self.graph.readers(before))) == 1:
                zero = second.affine.scale == 0
                scale, shift = torch.where(zero, 1.0, first.affine.scale), torch.where(zero, 0.0, first.affine.shift)
                found = Affine(scale if "scale" in first.free else first.affine.scale, shift)
                if len(found.varies()) <= 1:
                    self._neutral[before] = replace(first, affine=found)

    def mixes(self, value: Node) -> bool:
        """Whether a value's gauge varies along an axis into which a dynamic dimension was mixed."""
        gauge = self.of[value]
        varied = {axis for axis in range(gauge.scale.ndim) if gauge.varies(axis)}
        return bool(varied) and not varied.isdisjoint(self.graph.dynamic_axes(value))

    # -- what is asked ---------------------------------------------------------------------------------------------

    def ask(self, item: Node, how: How) -> None:
        """Adds what holds then; it is worked out once."""
        self.equations.node = item
        if (item, how) not in self._recorded:
            self._recorded[item, how] = self.equations.recorded(lambda: self._ask(item, how))
        self.equations.again(self._recorded[item, how])

    def _ask(self, item: Node, how: How) -> None:
        semantics, y = self.at(item), self.of[item]
        if isinstance(semantics, Contraction):
            data = self.call(item).at(semantics.data)
            if data in self.of:
                semantics.without_bias(self.of[data], y, self.equations)
            return
        assert isinstance(semantics, Scaling)
        x = self.of[self.operand(item)]
        if how == "stays":
            semantics.remains(x, y, self.equations)
        else:
            semantics.goes(x, y, self.equations, dead=how == "dead")

    def latest(self, system: str, *wrong: int) -> set[Node]:
        """What adds the equations of the latest batch that contradict together: with all of these they do."""
        held = self.equations.systems[system]
        return {self._adder(held.equation(number)[3]) for number in held.why(*wrong, latest=True)}

    def alone(self, system: str, wrong: Ints) -> dict[Node, Contradiction]:
        """What contradicts without anything else of the latest batch, and how."""
        origins, mine = self.equations.systems[system].origins(wrong), dict[Node, list[Ints]]()
        for origin in np.unique(origins).tolist():
            mine.setdefault(self._adder(origin), []).append(wrong[origins == origin])
        return {
            node: self.contradiction(system, own)
            for node, own in ((node, np.concatenate(each)) for node, each in mine.items())
            if self.latest(system, int(own[0]), int(own[-1])) == {node}
        }

    def _adder(self, origin: int) -> Node:
        node: Node = self.equations.origins[origin][0]
        return node

    def contradiction(self, system: str, wrong: Ints) -> Contradiction:
        """Why equations of the latest batch contradict."""
        held = self.equations.systems[system]
        found = []
        for number in held.why(int(wrong[0]), int(wrong[-1])):
            var, val, rhs, origin = held.equation(number)
            node, reason = self.equations.origins[origin]
            total = Counter[int]()
            for variable, by in zip(var.tolist(), val.tolist()):
                total[variable] += by
            terms = {v: c for v, c in total.items() if (c % 2 if held.binary else c)}
            found.append(Equation(tuple(terms), tuple(map(float, terms.values())), rhs, node, reason))
        return Contradiction(system, tuple(found), tuple(held.highest(wrong).tolist()))
