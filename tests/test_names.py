"""Output names come from the structure of what a model returns, and never clash."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bnfold.graph.names import output_names


class Returns(nn.Module):
    def __init__(self, run: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.run = run

    def forward(self, x: Tensor) -> Any:
        return self.run(x)


NAMES: list[tuple[Callable[[Tensor], Any], list[str]]] = [
    (lambda x: x + 1, ["output"]),
    (lambda x: (x + 1,), ["output"]),
    (lambda x: (x + 1, x + 2), ["output_0", "output_1"]),
    (lambda x: {"logits": x + 1}, ["logits"]),
    (lambda x: {"b": x + 1, "a": x + 2}, ["b", "a"]),
    (lambda x: {"a": {"b": x + 1, "c": [x + 2, x + 3]}}, ["a.b", "a.c.0", "a.c.1"]),
    (lambda x: (x + 1, {"aux": x + 2}), ["output_0", "1.aux"]),
    (lambda x: {"x": x + 1, "y": x + 2}, ["x_out", "y"]),  # x is the input
    (lambda x: {"a.b": x + 1, "a": {"b": x + 2}}, ["output_0", "output_1"]),  # both would be a.b
    (lambda x: {0: x + 1, 1: x + 2}, ["output_0", "output_1"]),
]


@pytest.mark.parametrize(("run", "names"), NAMES, ids=[", ".join(n) for _, n in NAMES])
def test_output_names(run: Callable[[Tensor], Any], names: list[str]) -> None:
    program = torch.export.export(Returns(run), (torch.zeros(2),))
    assert output_names(program) == names


def test_an_input_called_like_an_output_keeps_its_name() -> None:
    class Clash(nn.Module):
        def forward(self, x: Tensor, x_out: Tensor) -> dict[str, Tensor]:
            return {"x": x + x_out}

    program = torch.export.export(Clash(), (torch.zeros(2), torch.zeros(2)))
    assert not {"x", "x_out"} & set(output_names(program))


def test_numbered_names_avoid_inputs() -> None:
    class Clash(nn.Module):
        def forward(self, output: Tensor) -> Tensor:
            return output + 1

    assert output_names(torch.export.export(Clash(), (torch.zeros(2),))) == ["output_out"]


class Keyless(OrderedDict[str, Any]):
    """As libraries register output classes of their own: without functions for key paths."""


class Nameless:
    def __init__(self, *parts: Any) -> None:
        self.parts = parts


pytree.register_pytree_node(
    Keyless,
    pytree._dict_flatten,
    lambda values, context: Keyless(pytree._dict_unflatten(values, context)),
    serialized_type_name="tests.Keyless",
)
pytree.register_pytree_node(
    Nameless, lambda v: (list(v.parts), None), lambda parts, _: Nameless(*parts), serialized_type_name="tests.Nameless"
)


@pytest.mark.parametrize(
    ("run", "names"),
    [
        (lambda x: Keyless(sample=x + 1), ["sample"]),
        (lambda x: Keyless(sample=x + 1, more=Keyless(a=x, b=[x - 1])), ["sample", "more.a", "more.b.0"]),
        (lambda x: Nameless(x + 1, x - 1), ["output_0", "output_1"]),
        (lambda x: {"a": Nameless(x + 1, x - 1)}, ["a.0", "a.1"]),
    ],
)
def test_output_classes_that_are_registered_without_keys(run: Callable[[Tensor], Any], names: list[str]) -> None:
    assert output_names(torch.export.export(Returns(run), (torch.zeros(2),))) == names


def test_the_package_lists_its_public_names() -> None:
    import bnfold

    assert set(bnfold.__all__) <= set(dir(bnfold)) and "__version__" in dir(bnfold)
    assert all(getattr(bnfold, name) is not None for name in bnfold.__all__)
