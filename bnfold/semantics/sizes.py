"""Numbers for the symbolic sizes of a graph: generic ones, and whether a number is the same at every size.

What an operator does is read off it at concrete sizes, and the example's prove nothing: at 32 x 32 padding to a
multiple of 4 adds nothing, ``view(n, w, 4, h)`` of ``(n, h, 4, w)`` moves nothing, and three times 32 is a multiple of
4 too. So a graph is read at sizes that are multiples of nothing in it, differ from each other and from every fixed
size, and are legal by all that torch.export noted when it captured. A symbolic number that an operator takes as an
argument is more than its value at some sizes: ``settled`` says what it is where its range leaves it no choice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

#: Ways to choose sizes: one to plan at, and two to compare with, larger and as small as may be, where a dynamic axis
#: was mixed into one that an affine varies along.
WAYS = 3
_SMALLEST = 7  # up to where a batch of 2 may grow
_KEEP_COUNT = {"view", "reshape", "_unsafe_view", "unflatten"}


class UnknownSizeError(ValueError):
    """A size that depends on the data that runs through the graph."""


class Sizes:
    """The numbers that stand for a graph's symbols at the moment; ``example`` are those in the example inputs."""

    def __init__(self, graph: fx.Graph) -> None:
        self._graph = graph
        self._environment: Any = None
        self.example = dict(self._examples())
        self._chosen: list[dict[Any, int]] = []
        self._numbers: dict[Any, int] = {}
        self._now = self.example
        self.take(0)

    def take(self, way: int) -> None:
        """From now on sizes are those of that way, below ``WAYS``."""
        while len(self._chosen) <= way:
            self._chosen.append(self._choose(len(self._chosen)))
        self._now, self._numbers = self._chosen[way], {}

    def __call__(self, size: Any) -> int:
        """The number that a size is at the moment.

        Raises:
            UnknownSizeError: it depends on data.
        """
        if isinstance(size, int):
            return size
        expression = size.node.expr
        if expression not in self._numbers:
            self._numbers[expression] = _number(expression, self._now)
        return self._numbers[expression]

    def at_example(self, size: Any) -> int:
        """The number that a size is in the example."""
        return size if isinstance(size, int) else _number(size.node.expr, self.example)

    def settled(self, value: Any) -> Any:
        """The number that a symbolic number is at every size in its range; None where there are several."""
        if not isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
            return value
        expression = value.node.expr
        try:
            bounds = value.node.shape_env.bound_sympy(expression)
        except Exception:  # whatever an analysis of ranges may raise: then nothing is shown
            return None
        number = bounds.lower if bounds.lower == bounds.upper and expression.is_integer else None
        return None if number is None else int(number)

    # -- choosing --------------------------------------------------------------------------------------------------

    def _examples(self) -> Iterator[tuple[Any, int]]:
        for node in self._graph.nodes:
            if node.op != "placeholder":
                break
            value = node.meta.get("val")
            for size in [*value.shape] if isinstance(value, Tensor) else [value]:
                if isinstance(size, torch.SymInt) and size.node.has_hint():
                    # A guard may have made of the size of an axis an expression of its symbol.
                    self._environment = size.node.shape_env
                    known = self._environment.backed_var_to_val
                    yield from ((s, int(known[s])) for s in sorted(size.node.expr.free_symbols, key=str) if s in known)

    def _choose(self, way: int) -> dict[Any, int]:
        """A number for every symbol: legal together, and a multiple of nothing as far as there is one."""
        now = dict(self.example)
        fixed, rules = (self._fixed(), self._rules()) if now else (set[int](), [])
        taken = {number for chosen in self._chosen for number in chosen.values()}
        for symbol, size in self.example.items():
            low, high = self._range(symbol)
            near: Sequence[int] = range(low, min(high, max(2 * size + 2, _SMALLEST)) + 1)
            if way < 2:
                rank = {n: (n in taken, _coincidences(n, fixed), abs(n - (1 + way) * size)) for n in near}
                near = sorted(near[max(low, size // 2) - low :], key=rank.__getitem__)
            rules.sort(key=lambda rule: -rule.failed)  # what forbids most is asked first
            now[symbol] = next((n for n in near if all(rule.holds(now | {symbol: n}) for rule in rules)), size)
            taken.add(now[symbol])
        return now

    def _fixed(self) -> set[int]:
        shapes = (v.shape for n in self._graph.nodes if isinstance(v := n.meta.get("val"), Tensor))
        return {size for shape in shapes for size in shape if isinstance(size, int) and size > 1}

    def _range(self, symbol: Any) -> tuple[int, int]:
        bounds = self._environment.var_to_range.get(symbol)
        low = int(bounds.lower) if bounds is not None and bounds.lower.is_Integer else 2
        high = int(bounds.upper) if bounds is not None and bounds.upper.is_Integer else 2**31
        return max(low, 2), high  # 0 and 1 are special to torch.export

    def _rules(self) -> list[_Rule]:
        """What legal sizes keep: the guards, that no size vanishes, and that a view has as many elements as before."""
        import sympy  # here and below: it takes long, and a graph without symbols needs none of it

        rules: dict[Any, None] = dict.fromkeys(guard.expr for guard in self._environment.guards)
        sizes = dict[Any, None]()
        for node in self._graph.nodes:
            value = node.meta.get("val")
            if isinstance(value, Tensor) and any(not isinstance(size, int) for size in value.shape):
                shape = [_expression(size) for size in value.shape]
                sizes |= dict.fromkeys(shape)
                if getattr(node.target, "_opname", "") in _KEEP_COUNT:
                    before = [_expression(size) for size in node.args[0].meta["val"].shape]
                    rules[sympy.Eq(prod(shape), prod(before), evaluate=False)] = None
        rules |= dict.fromkeys(sympy.Ge(size, 1) for size in sizes if _at(size, self.example) != 0)
        return [_Rule(rule) for rule in rules if rule not in (sympy.true, True)]


class _Rule:
    """Something that legal sizes keep, and how often it was not."""

    def __init__(self, expression: Any) -> None:
        self._expression, self.failed = expression, 0

    def holds(self, sizes: dict[Any, int]) -> bool:
        import sympy

        broken = bool(_at(self._expression, sizes) == sympy.false)
        self.failed += broken
        return not broken


def _expression(size: Any) -> Any:
    import sympy

    return sympy.Integer(size) if isinstance(size, int) else size.node.expr


def _at(expression: Any, sizes: dict[Any, int]) -> Any:
    import sympy

    return expression.xreplace({symbol: sympy.Integer(number) for symbol, number in sizes.items()}).doit()


def _number(expression: Any, sizes: dict[Any, int]) -> int:
    found = _at(expression, sizes)
    if not found.is_number:
        raise UnknownSizeError(f"the size {expression} depends on data")
    return int(found)


def _coincidences(number: int, fixed: set[int]) -> int:
    """How much of a fixed size a number is: equal to one, a multiple or a divisor of one."""
    return 2 * (number in fixed) + any(number % size == 0 or size % number == 0 for size in fixed)
