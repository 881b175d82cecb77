"""A contradiction in words: on either side of an affine what wants something else, and the operators between."""

from __future__ import annotations

from math import prod

import numpy as np

from bnfold.graph.graph import Node
from bnfold.passes.gauges import Contradiction, Equation, Gauges
from bnfold.report import Refusal
from bnfold.semantics import Average, Homogeneous, Movement, Opaque, Product, Same, Scaling, Sum
from bnfold.semantics.equations import SHIFT, SIGN
from bnfold.semantics.system import Ints

#: Operators that a chain names, and values that are looked through for one.
NAMED, LOOKED = 6, 2000


def reasons(gauges: Gauges, site: Node, why: Contradiction) -> tuple[Refusal, ...]:
    """The two things that want something different: what the affine reads, and what reads it."""
    found = _Reader(gauges, site, why).refusals()
    if why.dead is not None:  # emptied by what makes it, or left out by what reads it: neither can be
        found = (found[0], _Reader(gauges, site, why.dead).refusals()[-1])
    return found


class _Reader:
    def __init__(self, gauges: Gauges, site: Node, why: Contradiction) -> None:
        self._gauges, self._site, self._why = gauges, site, why
        self._graph = gauges.graph
        self._operand: Node = gauges.operand(site)
        self._own = [e for e in why.equations if e.node is site and e.reason == "goes"]
        self._others = [e for e in why.equations if e.node is not site or e.reason != "goes"]

    def refusals(self) -> tuple[Refusal, ...]:
        """One per side that is held, at least one."""
        result, operand = (self._indices(v) for v in (self._site, self._operand))
        mine = [v for e in self._own for v, c in zip(e.var, e.val) if c]
        before, behind = ([v for v in mine if v in side] for side in (operand, result - operand))
        found = []
        if not before and self._is_pinned(self._operand):
            found.append(self._pinned(self._operand))
        for variables in (before, behind):
            path = self._path(variables[0], set(mine) - {variables[0]}) if variables else []
            if path:
                found.append(self._ended(path, variables is before))
            elif len(set(variables)) < len(variables):
                found.append(self._shared())
        return tuple(dict.fromkeys(found)) or (self._refusal(self._site, "nonlinear"),)

    def _gauge(self, value: Node) -> Ints:
        """What contradicts of a value's gauge."""
        gauge = self._gauges.of[value]
        return gauge.shift if self._why.system == SHIFT else gauge.scale

    def _indices(self, value: Node) -> set[int]:
        return set(self._gauge(value).ravel().tolist()) - {0}

    def _is_pinned(self, value: Node) -> bool:
        gauge = self._gauges.of[value]
        if self._why.system == SHIFT:  # what was made up has none
            return gauge.made is not None or not gauge.base.all()
        return not gauge.scale.all()

    # -- along equations -------------------------------------------------------------------------------------------

    def _path(self, start: int, ends: set[int]) -> list[Equation]:
        """The equations from one variable to another, or to one that is pinned; none where there is no way."""
        came: dict[int, tuple[int, Equation] | None] = {start: None}
        waiting = [start]
        by_variable: dict[int, list[Equation]] = {}
        for equation in self._others:
            for var, val in zip(equation.var, equation.val):
                if val:
                    by_variable.setdefault(var, []).append(equation)
        for variable in waiting:
            for equation in by_variable.get(variable, ()):
                others = [v for v, c in zip(equation.var, equation.val) if c and v != variable]
                if not others or ends.intersection(others):
                    path, at = [equation], variable
                    while (step := came[at]) is not None:
                        at, through = step
                        path.append(through)
                    return path[::-1]
                for other in others:
                    if other not in came:
                        came[other] = (variable, equation)
                        waiting.append(other)
        return []

    def _ended(self, path: list[Equation], before: bool) -> Refusal:
        end = path[-1]
        other = next((e.node for e in path if e.reason == "goes"), None)
        if other is not None:
            joined = "unequal-scales" if not before and any(e.reason == "unequal-scales" for e in path) else ""
            return self._refusal(other, "sign" if self._why.system == SIGN else joined or "several-readers", path)
        reader = self._other_reader(end.node) if before else None
        reason = "broadcast" if end.reason == "unequal-scales" and self._broadcasts(end.node) else end.reason
        return self._refusal(reader or end.node, "several-readers" if reader else reason, path)

    def _broadcasts(self, node: Node) -> bool:
        """Whether an operator copies the elements of an operand."""
        values = [node, *(n for n in node.all_input_nodes if n in self._gauges.of)]
        return all(map(self._graph.is_sized, values)) and len(set(map(self._graph.shape, values))) > 1

    def _other_reader(self, node: Node) -> Node | None:
        """The reader of what the affine reads, or of what that is made of, behind which ``node`` lies."""
        makers, waiting = {self._operand: None, self._site: None}, [self._operand]
        for value in waiting:
            if value.op == "call_function" and len(makers) < LOOKED and not self._gauges.at(value).absorbs:
                new = [n for n in value.all_input_nodes if n not in makers and n in self._gauges.of]
                makers |= dict.fromkeys(new)
                waiting += new
        if node in makers:
            return None
        for value in waiting:
            for reader in self._graph.readers(value):
                if reader not in makers and self._leads(reader, node):
                    return reader
        return None

    def _leads(self, reader: Node, node: Node) -> bool:
        seen, waiting = {reader}, [reader]
        for value in waiting:
            if value is node:
                return True
            if len(seen) < LOOKED and self._graph.order[value] < self._graph.order[node]:
                new = [n for n in self._graph.readers(value) if n not in seen and n is not self._site]
                seen.update(new)
                waiting += new
        return False

    # -- along values ----------------------------------------------------------------------------------------------

    def _pinned(self, value: Node) -> Refusal:
        """What a value has in common with one that is stored as it is."""
        chain: list[Node] = []
        while True:
            semantics = self._gauges.at(value) if value.op == "call_function" else None
            if value.op == "placeholder":
                return self._refusal(value, "model-input", chain=chain)
            if self._why.system == SHIFT:
                if isinstance(semantics, Homogeneous) and not semantics.shifts:
                    return self._refusal(value, "shift-through-activation", chain=chain)
                if isinstance(semantics, Product):
                    return self._refusal(value, "shift-through-product", chain=chain)
                if isinstance(semantics, Average) and semantics.no_shift:
                    return self._refusal(value, semantics.no_shift, chain=chain)
            operands = [n for n in value.all_input_nodes if n in self._gauges.of and self._is_pinned(n)]
            shares = isinstance(semantics, (Movement, Same, Average, Homogeneous, Sum, Product, Scaling))
            if isinstance(semantics, Movement) and not operands:
                return self._refusal(value, "zero-padding", chain=chain)
            if not shares or not operands:
                reason = semantics.reason if isinstance(semantics, Opaque) else "nonlinear"
                return self._refusal(value, reason, chain=chain)
            chain.append(value)
            value = operands[0]

    def _shared(self) -> Refusal:
        """Where elements that the affine treats differently came to have one gauge."""
        value = self._operand
        while value.op == "call_function":
            semantics = self._gauges.at(value)
            operands = [n for n in value.all_input_nodes if n in self._gauges.of]
            if not operands or semantics.absorbs or isinstance(semantics, (Opaque, Average)):
                break
            loose = isinstance(semantics, Movement) and semantics.loose
            if loose or any(self._gauge(value).shape[axis] > 1 for axis in self._graph.dynamic_axes(value)):
                return self._refusal(value, "dynamic-size")
            if isinstance(semantics, (Sum, Product)) and self._broadcasts(value):
                return self._refusal(value, "broadcast")
            if isinstance(semantics, Sum) and len(self._indices(value)) < len(self._indices(operands[0])):
                return self._refusal(value, "unequal-scales")
            if isinstance(semantics, Movement) and self._copies(value) > 1.01 * max(map(self._copies, operands)):
                return self._refusal(value, "copies-differ")
            value = operands[0]
        return self._refusal(value, "other-axis")

    def _copies(self, value: Node) -> float:
        """How many elements of a value have one gauge."""
        return prod(self._graph.shape(value)) / len(np.unique(self._gauge(value)))

    # -- words -----------------------------------------------------------------------------------------------------

    def _refusal(
        self, node: Node, reason: str, path: list[Equation] | None = None, chain: list[Node] | None = None
    ) -> Refusal:
        names = {"placeholder": "input", "output": "output"}
        operator = names.get(node.op) or self._gauges.call(node).operator
        operator = "" if reason in ("model-input", "model-output") else operator
        nodes = chain if chain is not None else [e.node for e in path or ()]
        between = tuple(dict.fromkeys(self._gauges.rewriter.where(n) for n in nodes if n is not node))
        if len(between) > NAMED:
            between = (*between[: NAMED // 2], "...", *between[-(NAMED // 2) :])
        return Refusal(reason, self._gauges.rewriter.where(node), operator, self._detail(reason), between)

    def _detail(self, reason: str) -> str:
        channels = self._channels()
        where = f"in channels {', '.join(map(str, channels[:5]))}{', ...' if len(channels) > 5 else ''}: "
        if self._why.system == SIGN and any(e.reason == "sign" for e in self._why.equations):
            return where + "scales of both signs meet, and only positive ones pass an activation or a maximum"
        return ""

    def _channels(self) -> list[int]:
        place = {v: i for i, v in enumerate(self._gauge(self._site).ravel().tolist())}
        return sorted({place[v] for v in self._why.variables if v in place})
