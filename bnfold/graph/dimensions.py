"""Sizes: what is asked to be dynamic, and for which sizes what was captured holds."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from torch import Tensor
from torch.export import Dim, ExportedProgram
from torch.export.dynamic_shapes import _DerivedDim, _DimHint, _DimHintType
from torch.utils import _pytree as pytree

#: How many sizes are tried to find those that a program takes.
REACH = 512
#: The axes of a tensor that are asked to be dynamic, and how: a string, a ``Dim``, or a hint.
Axes = Mapping[int, Any]

_OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod, ast.USub: operator.neg, ast.Not: operator.not_, ast.Eq: operator.eq, ast.NotEq: operator.ne,
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
}  # fmt: skip
_FUNCTIONS: dict[str, Callable[..., Any]] = {"max": max, "min": min, "abs": abs}


# -- what is asked -----------------------------------------------------------------------------------------------------


def asked_axes(inputs: Mapping[str, Any], dynamic_shapes: Any) -> dict[int, Axes]:
    """The dynamic axes of every tensor, by its id.

    ``inputs`` are by the parameters of ``forward``, ``dynamic_shapes`` as for ``torch.onnx.export``: by name or in
    order, nested as the inputs are.
    """
    if isinstance(dynamic_shapes, (tuple, list)):
        dynamic_shapes = dict(zip(inputs, dynamic_shapes))
    return {id(tensor): axes for tensor, axes in _axes(dict(inputs), dynamic_shapes)}


def _axes(value: Any, asked: Any) -> Iterator[tuple[Tensor, Axes]]:
    kind = pytree.SUPPORTED_NODES.get(pytree._get_node_type(value))
    if isinstance(value, Tensor) and asked is not None:
        yield value, dict(asked if isinstance(asked, Mapping) else enumerate(asked))
    elif kind is not None and asked is not None:
        children, names = kind.flatten_fn(value)
        if isinstance(asked, Mapping) and isinstance(names, (list, tuple)):
            wanted: Iterable[Any] = [asked.get(name) for name in names]
        else:
            wanted = asked if isinstance(asked, (tuple, list)) else kind.flatten_fn(asked)[0]
        for child, axes in zip(children, wanted):
            yield from _axes(child, axes)


def is_dynamic(wanted: Any) -> bool:
    """Whether an axis is asked to be dynamic."""
    static = isinstance(wanted, _DimHint) and wanted.type is _DimHintType.STATIC
    return wanted is not None and not isinstance(wanted, int) and not static


def name_of(wanted: Any) -> str | None:
    """What the user calls a dynamic dimension: a string, or a ``Dim``'s name; None for a hint."""
    return wanted if isinstance(wanted, str) else wanted.__name__ if isinstance(wanted, Dim) else None


def number(size: Any) -> int | None:
    """A size that no call changes; None for one that is dynamic. torch.export leaves some as expressions."""
    if isinstance(size, int):
        return size
    return int(size.node.expr) if size.node.expr.is_number else None


def as_hint(wanted: Any) -> Any:
    """A named dimension as ``Dim.AUTO`` in its range: as dynamic as the model allows, not all or nothing."""
    if isinstance(wanted, (str, _DerivedDim)):
        return Dim.AUTO
    if not isinstance(wanted, Dim):
        return wanted
    high = wanted.max if isinstance(wanted.max, int) else None
    return Dim.AUTO(min=int(wanted.min) or None, max=high)


def is_derived(wanted: Any) -> bool:
    """Whether it is a multiple of another dimension, such as ``4 * Dim("h")``."""
    return isinstance(wanted, _DerivedDim)


# -- what a program takes ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Guard:
    """A condition on sizes that torch.export found while it traced, as Python, and the symbols in it."""

    condition: ast.expr
    symbols: frozenset[str]
    values: Mapping[tuple[str, int], Any]

    def holds(self, sizes: Mapping[str, int]) -> bool:
        """Whether it holds at these sizes of the symbols."""
        try:
            return bool(self._value(self.condition, sizes))
        except ZeroDivisionError:
            return False

    def _value(self, node: ast.expr, sizes: Mapping[str, int]) -> Any:
        """The value of an expression. Only arithmetic is known: a guard may come out of a stranger's file."""
        match node:
            case ast.Constant(value=int() as number):
                return number
            case ast.BinOp(left=left, op=op, right=right):
                return _OPERATORS[type(op)](self._value(left, sizes), self._value(right, sizes))
            case ast.UnaryOp(op=op, operand=operand):
                return _OPERATORS[type(op)](self._value(operand, sizes))
            case ast.BoolOp(op=op, values=values):
                return (all if isinstance(op, ast.And) else any)(self._value(each, sizes) for each in values)
            case ast.Compare(left=left, ops=ops, comparators=right):
                chain = [self._value(each, sizes) for each in (left, *right)]
                return all(_OPERATORS[type(op)](a, b) for op, (a, b) in zip(ops, pairwise(chain)))
            case ast.Call(func=ast.Name(id=name), args=args):
                return _FUNCTIONS[name](*(self._value(each, sizes) for each in args))
        size = self.values[_place(node)]
        return sizes[size] if isinstance(size, str) else size if isinstance(size, int) else int(size.subs(sizes))


def _place(node: ast.AST) -> tuple[str, int]:
    """``L['x'].size()[2]`` -> the input ``x`` and axis 2; ``L['x'][0].size()[2]`` -> ``x_0`` and 2."""
    match node:
        case ast.Subscript(
            value=ast.Call(func=ast.Attribute(value=source, attr="size")), slice=ast.Constant(value=int() as axis)
        ):
            keys: list[str] = []
            while isinstance(source, ast.Subscript) and isinstance(source.slice, ast.Constant):
                keys.append(str(source.slice.value))
                source = source.value
            return "_".join(reversed(keys)), axis
    raise KeyError(ast.dump(node))


@dataclass(frozen=True)
class Sizes:
    """The sizes that a captured program takes."""

    #: symbol -> its lowest and highest size; None where there is no highest.
    ranges: Mapping[str, tuple[int, int | None]] = field(default_factory=dict)
    guards: tuple[Guard, ...] = ()  #: what holds beyond that.
    #: symbol -> another that always has its size: what has one name, and first axes.
    alike: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, program: ExportedProgram) -> Sizes:
        """Those of a program; guards that cannot be read are left to the program."""
        ranges = {
            str(symbol): (int(limits.lower), int(limits.upper) if limits.upper.is_Integer else None)
            for symbol, limits in program.range_constraints.items()
            if limits.lower.is_Integer
        }
        values = {}
        for node in program.graph.find_nodes(op="placeholder"):
            shape = node.meta["val"].shape if isinstance(node.meta.get("val"), Tensor) else ()
            for axis, size in enumerate(shape):
                expression = size if isinstance(size, int) else size.node.expr
                plain = isinstance(expression, int) or not expression.is_symbol
                values[node.name, axis] = expression if plain else str(expression)
        guards = (_guard(text, values) for text in getattr(program, "_guards_code", None) or ())
        return cls(ranges, tuple(guard for guard in guards if guard is not None and guard.symbols))

    def takes(self, sizes: Mapping[str, int]) -> bool:
        """Whether the program takes these sizes of some or all of its symbols together."""
        ends = [(sizes[symbol], *self.ranges.get(symbol, (0, None))) for symbol in sizes]
        inside = all(low <= size and (high is None or size <= high) for size, low, high in ends)
        return inside and all(guard.holds(sizes) for guard in self.guards if guard.symbols <= sizes.keys())

    def near(self, symbol: str, wanted: int) -> int | None:
        """The size nearest to the wanted one that is taken for the symbol, whatever the others are."""
        for off in range(REACH):
            for size in (wanted + off, wanted - off):
                if size > 0 and self.takes({symbol: size}):
                    return size
        return None

    def words(self, names: Mapping[str, str]) -> str:
        """What a user should know of them: ``H, W: multiples of 4 from 8 up``; ``""`` where nothing limits them."""
        said: dict[str, list[str]] = {}
        for symbol, name in names.items():
            if symbol in self.alike:
                continue
            said.setdefault(self._words(symbol), []).append(name)
        return "; ".join(f"{', '.join(dict.fromkeys(names))}: {words}" for words, names in said.items())

    def _words(self, symbol: str) -> str:
        low, high = self.ranges.get(symbol, (0, None))
        end = low + REACH if high is None else min(high, low + REACH)
        taken = [size for size in range(max(low, 1), end + 1) if self.takes({symbol: size})]
        if len(taken) < 2:
            return f"{taken[0]} alone" if taken else "none that could be found"
        first, step = taken[0], math.gcd(*(b - a for a, b in pairwise(taken)))
        last = "" if high is None else f" to {high}"
        if taken != list(range(first, taken[-1] + 1, step)):
            return f"{', '.join(map(str, taken[:4]))} and others{last and ' up' + last}"
        if step == 1 and first <= 2:  # torch.export says 2 where it could not tell 1 apart
            return f"up{last}" if last else "any"
        if step == 1:
            return f"{first}{last}" if last else f"from {first} up"
        if first % step == 0:
            return f"multiples of {step} from {first}{last or ' up'}"
        return f"{first}, {first + step} and so on by {step}{last and ' up' + last}"


def _guard(text: str, values: Mapping[tuple[str, int], Any]) -> Guard | None:
    """A guard that can be computed; None for one about something else than sizes."""
    symbols: set[str] = set()
    try:
        condition = ast.parse(text, mode="eval").body
        for node in ast.walk(condition):
            if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Call):
                size = values[_place(node)]
                symbols |= {size} if isinstance(size, str) else {str(s) for s in getattr(size, "free_symbols", ())}
        guard = Guard(condition, frozenset(symbols), values)
        guard.holds(dict.fromkeys(symbols, 64))
    except (SyntaxError, KeyError, RecursionError, TypeError, MemoryError):
        return None
    return guard
