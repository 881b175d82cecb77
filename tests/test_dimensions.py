"""Which sizes a program takes: guards read as arithmetic alone, the nearest size that is taken, and words for it."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import Dim

from bnfold.graph.dimensions import Sizes, _guard, as_hint, asked_axes, is_dynamic, name_of

H, W = "s1", "s2"
VALUES: dict[tuple[str, int], Any] = {("x", 0): "s0", ("x", 2): H, ("x", 3): W, ("y_a_0", 1): H, ("x", 1): 3}
X = "L['x'].size()"


def sizes(*guards: str, **ranges: tuple[int, int | None]) -> Sizes:
    found = [_guard(text, VALUES) for text in guards]
    return Sizes(ranges, tuple(guard for guard in found if guard is not None))


WORDS: list[tuple[Sizes, str]] = [
    (sizes(s1=(2, None)), "H: any"),
    (sizes(s1=(0, None)), "H: any"),
    (sizes(s1=(2, 64)), "H: up to 64"),
    (sizes(s1=(9, None)), "H: from 9 up"),
    (sizes(s1=(9, 20)), "H: 9 to 20"),
    (sizes(f"{X}[2] == 4*({X}[2] // 4)", f"({X}[2] // 4) != 1", s1=(4, None)), "H: multiples of 4 from 8 up"),
    (sizes(f"{X}[2] % 4 == 0", s1=(4, 32)), "H: multiples of 4 from 4 to 32"),
    (sizes(f"({X}[2] - 1) % 8 == 0", s1=(9, None)), "H: 9, 17 and so on by 8"),
    (sizes(f"{X}[2] % 8 != 3", s1=(9, None)), "H: 9, 10, 12, 13 and others"),
    (sizes(f"{X}[2] == 7", s1=(2, None)), "H: 7 alone"),
    (sizes(f"{X}[2] < 0", s1=(2, None)), "H: none that could be found"),
]


@pytest.mark.parametrize(("known", "words"), WORDS, ids=[words for _, words in WORDS])
def test_words(known: Sizes, words: str) -> None:
    assert known.words({H: "H"}) == words


def test_what_is_taken_alike_is_said_once() -> None:
    known = sizes(f"{X}[2] % 4 == 0", f"{X}[3] % 4 == 0", s0=(2, None), s1=(4, None), s2=(4, None))
    names = {"s0": "N", H: "H", W: "W"}
    assert known.words(names) == "N: any; H, W: multiples of 4 from 4 up"


@pytest.mark.parametrize(("wanted", "near"), [(1, 8), (8, 8), (9, 8), (11, 12), (99, 100), (4, 8)])
def test_the_nearest_size_that_is_taken(wanted: int, near: int) -> None:
    assert sizes(f"{X}[2] % 4 == 0", s1=(8, None)).near(H, wanted) == near


def test_guards_over_several_symbols_and_nested_inputs() -> None:
    known = sizes(f"max(1, {X}[2])*{X}[3] >= 20 and {X}[2] < {X}[3]", "L['y']['a'][0].size()[1] % 2 == 0")
    assert known.takes({H: 4, W: 5}) and not known.takes({H: 5, W: 4}) and not known.takes({H: 3, W: 7})
    assert known.takes({W: 1})  # the others are not known, so nothing is said of them
    assert not sizes(f"4 // ({X}[2] - 3) >= 0").takes({H: 3})  # divides by nothing


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true') == 0", "open('/etc/passwd') != 1", "L['x'].size()[2].bit_length() == 3",
        "9**9**9**9 > 1", "L['z'].size()[0] == 1", "L['x'].device == 'cpu'", "exec('1')", "((", "'a' * 9 == 1",
        "max(*range(9)) == 1", "[1 for _ in (1,)] != 1", "getattr(L, 'x') == 1", "(" * 500 + "1" + ")" * 500 + " == 1",
    ],
)  # fmt: skip
def test_what_is_no_arithmetic_over_sizes_is_not_computed(text: str) -> None:
    assert sizes(text).guards == ()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(0, 11), st.integers(1, 40))
def test_words_are_true(step: int, rest: int, low: int) -> None:
    known = sizes(f"{X}[2] % {step} == {rest % step}", s1=(low, None))
    said = known.words({H: "H"}).removeprefix("H: ")
    first = next(n for n in range(low, low + step) if n % step == rest % step)
    numbers = [int(word) for word in said.replace(",", "").split() if word.isdecimal()]
    assert (said == "any" and (step, first <= 2) == (1, True)) or (
        first in numbers and (step == 1 or step in numbers or first + step in numbers)
    )


class Half(nn.Module):
    """Takes multiples of 4 alone."""

    def forward(self, x: Tensor) -> Tensor:
        small = nn.functional.max_pool2d(x, 4)
        return torch.cat([nn.functional.interpolate(small, scale_factor=4.0), x], 1)


@pytest.mark.parametrize("loaded", [False, True])
def test_sizes_of_a_program_are_those_it_runs_at(loaded: bool, tmp_path: Any) -> None:
    spec = ({0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO},)
    program = torch.export.export(Half(), (torch.randn(2, 3, 32, 48),), dynamic_shapes=spec)
    if loaded:
        torch.export.save(program, tmp_path / "net.pt2")
        program = torch.export.load(tmp_path / "net.pt2")
    known, module = Sizes.of(program), program.module()
    (x,) = (node for node in program.graph.find_nodes(op="placeholder") if node.name == "x")
    batch, height, width = (str(x.meta["val"].shape[axis]) for axis in (0, 2, 3))
    for high in range(5, 26):
        try:
            module(torch.zeros(2, 3, high, 32))
            runs = True
        except Exception:
            runs = False
        assert runs == known.takes({batch: 2, height: high, width: 32}), high


# -- what is asked -----------------------------------------------------------------------------------------------------

A, B, C = torch.zeros(1, 2), torch.zeros(3, 4), torch.zeros(5)
ASKED: list[tuple[Any, Mapping[int, Any]]] = [
    (({0: "N"}, None), {id(A): {0: "N"}}),
    ({"x": {0: "N"}, "more": {"b": {1: "T"}, "c": [None]}}, {id(A): {0: "N"}, id(B): {1: "T"}}),
    ({"more": {"b": None, "c": ({0: "L"},)}}, {id(C): {0: "L"}}),
    ((("N", None), {"b": [None, "T"], "c": None}), {id(A): {0: "N", 1: None}, id(B): {0: None, 1: "T"}}),
    (None, {}),
]


@pytest.mark.parametrize(("asked", "found"), ASKED)
def test_axes_by_tensor(asked: Any, found: Mapping[int, Any]) -> None:
    assert asked_axes({"x": A, "more": {"b": B, "c": [C]}}, asked) == found


def test_hints() -> None:
    h = Dim("h", min=4, max=64)
    assert (as_hint(h).min, as_hint(h).max, as_hint(Dim("n")).max) == (4, 64, None)
    assert as_hint("N") is Dim.AUTO and as_hint(4 * h) is Dim.AUTO and as_hint(Dim.STATIC) is Dim.STATIC
    assert [is_dynamic(w) for w in ("N", h, Dim.AUTO, Dim.DYNAMIC, Dim.STATIC, None, 3)] == [True] * 4 + [False] * 3
    assert [name_of(w) for w in ("N", h, Dim.AUTO, 3)] == ["N", "h", None, None]
    assert isinstance(ast.parse("1", mode="eval").body, ast.Constant)
