"""Whether a model's code lets a module go: it may read its attributes, ask for its class, hold it twice, or hook it.

In a copy each new module takes the old one's place, with the new one's class and attributes, and computes what the old
one did. Code that only calls the module then computes the same; other code fails, differs, or goes past the new one.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bnfold.graph.capture import Captured
from bnfold.graph.copies import eval_copy
from bnfold.loading.structure import restructure
from bnfold.report import Change


def held_in_place(captured: Captured, changes: Sequence[Change]) -> dict[str, str]:
    """The modules among ``changes`` that must stay, by name, and why in words."""
    swaps = [change for change in changes if change.kind != "parameter"]
    if not swaps:
        return {}
    expected = captured.run_eager(captured.flat)
    why = _objection(captured, swaps, expected)
    if why is None:
        return {}
    found = {change.module: _objection(captured, [change], expected) for change in swaps}
    # Where each alone can go and all together cannot, none does.
    return {name: one for name, one in found.items() if one} or {change.module: why for change in swaps}


def _objection(captured: Captured, changes: Sequence[Change], expected: Sequence[Any]) -> str | None:
    """What the model's code has against ``changes``, on the example inputs; None where it is nothing."""
    assert captured.eager is not None
    model = eval_copy(captured.eager)
    through: set[int] = set()
    past: list[nn.Module] = []
    kinds: set[str] = set()

    def probe(old: nn.Module, new: nn.Module) -> nn.Module:
        def forward(*args: Any, **kwargs: Any) -> Any:
            through.add(id(old))
            return old.forward(*args, **kwargs)  # its hooks go with it

        old.register_forward_pre_hook(lambda module, args: past.append(old))
        kinds.add(type(new).__name__)
        return _computing(new, forward)

    restructure(model, changes, probe)
    instead = f"with {' and '.join(sorted(kinds))} in its place the model"
    try:
        with torch.compiler.set_stance("force_eager"):
            found = replace(captured, eager=model).run_eager(captured.flat)
    except Exception as error:
        lines = str(error).splitlines() or [""]
        return f"{instead} fails: {type(error).__name__}: {lines[0]}"
    if past:
        return "the model's code also holds it elsewhere than under its name"
    if len(through) < len(changes) or not all(map(_equal, found, expected)):
        return f"{instead} computes something else"
    copies, themselves = (_left_behind(captured, changes, copied) for copied in (True, False))
    if not all(map(_equal, copies, themselves)):
        return f"{instead} writes to a value in place that it had a new one of"
    return None


def _left_behind(captured: Captured, changes: Sequence[Change], copied: bool) -> list[Any]:
    """Outputs, and inputs as they are afterwards, with ``changes``: each new module acts on its argument or a copy.

    What it returns may be its argument, where the old one made a new tensor.
    """

    def probe(old: nn.Module, new: nn.Module) -> nn.Module:
        return _computing(new, lambda x: new.forward(x.clone() if copied else x))

    assert captured.eager is not None
    model = eval_copy(captured.eager)
    restructure(model, changes, probe)
    flat = tuple(value.clone() if isinstance(value, Tensor) else value for value in captured.flat)
    return [*replace(captured, eager=model).run_eager(flat), *flat]


def _computing(module: nn.Module, forward: Callable[..., Any]) -> nn.Module:
    """A copy of a module without its hooks and with another forward."""
    made = copy.copy(module)
    made._forward_hooks, made._forward_pre_hooks, made.forward = OrderedDict(), OrderedDict(), forward
    return made


def _equal(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return type(one) is type(other) and bool(one == other)
    return one.shape == other.shape and bool(((one == other) | (torch.isnan(one) & torch.isnan(other))).all())
