"""What the rows of the table share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import fx

from bnfold.semantics import Geometry, Semantics
from bnfold.semantics.build import OPAQUE as OPAQUE

if TYPE_CHECKING:
    from bnfold.semantics.call import Call

Row = Callable[["Call"], Semantics]
#: A number per spatial axis, None for one that differs with the size of the input.
PerAxis = tuple[int | None, ...]


def per_axis(call: Call, name: str, axes: int) -> PerAxis:
    """An argument that gives one number per spatial axis, or one for all; None for one that no size settles."""
    given = call.arguments.get(name)
    values = [] if given is None else list(given) if isinstance(given, (list, tuple)) else [given]
    settled = [call.graph.settled(value) if isinstance(value, fx.Node) else value for value in values]
    return tuple(settled * axes if len(settled) == 1 else settled)


def geometry(
    stride: PerAxis, padding: PerAxis, dilation: PerAxis, *, transposed: bool = False, output_padding: PerAxis = ()
) -> Geometry | None:
    """How a convolution walks; None where one of the numbers is not the same at every size."""
    given = [stride, padding, dilation, output_padding]
    known = [tuple(n for n in each if n is not None) for each in given]
    walk, padding_of, spread, more = known
    return Geometry(walk, padding_of, spread, transposed, more) if known == given else None


def constant_operands(call: Call, *slots: str) -> bool:
    """Whether every one of the slots is empty or depends on no input."""
    return all(call.is_constant(slot) for slot in slots)
