"""The vocabulary by itself: what every kind answers, checked against what it stands for on numbers.

Every answer is checked in the one way that counts: an operand that becomes ``affine(operand)`` makes the output
``affine(output)`` (pull), and an output differs by the answered affine where operands arrive without theirs (push).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from checker import noise
from torch import Tensor

from bnfold.affine import Affine
from bnfold.report import REASONS
from bnfold.semantics import (
    Average,
    Contraction,
    Homogeneous,
    Lookup,
    Movement,
    No,
    Opaque,
    Product,
    Refused,
    Same,
    Scaling,
    Semantics,
    ShapeOnly,
    Sum,
    Unknown,
    Yes,
)


def affine(axis: int = 1, ndim: int = 3, size: int = 4, shift: bool = True, positive: bool = False) -> Affine:
    scale = noise(size, seed=1).abs() + 0.1
    if not positive:
        scale[1] *= -1
    return Affine.per_channel(scale, noise(size, seed=2) if shift else 0.0, ndim, axis)


@dataclass
class Kind:
    """``semantics`` says what ``run`` does to operands of ``shapes``."""

    semantics: Semantics
    run: Callable[..., Tensor]
    shapes: dict[str, tuple[int, ...]]
    shift: bool = True
    positive: bool = False
    axis: int = 1


A, B = (2, 4, 3), (2, 4, 3)
KINDS = {
    "Movement": Kind(
        Movement(("self",), (A,), lambda parts: parts[0].transpose(1, 2)), lambda x: x.transpose(1, 2), {"self": A},
        axis=2),
    "Movement of two": Kind(
        Movement(("tensors.0", "tensors.1"), ((2, 1, 3), (2, 3, 3)), lambda parts: torch.cat([*parts], 1)),
        lambda *parts: torch.cat(parts, 1), {"tensors.0": (2, 1, 3), "tensors.1": (2, 3, 3)}),
    "Same": Kind(Same("input"), lambda x: x.clone(), {"input": A}),
    "Average": Kind(Average("self", (2,), 3), lambda x: x.mean(2, keepdim=True), {"self": A}),
    "Average that drops": Kind(Average("self", (1,), 4, drops=True), lambda x: x.mean(1), {"self": (2, 5, 4, 3)}),
    "Average that counts what is no number": Kind(
        Average("self", (2,), 3, no_shift="dynamic-size"), lambda x: x.mean(2, keepdim=True), {"self": A}, shift=False),
    "Average, a sum": Kind(
        Average("self", (2,), 3, total=float(A[2])), lambda x: x.sum(2, keepdim=True), {"self": A}),
    "Sum": Kind(Sum(("self", "other"), (A, B), 3, -2.0), lambda a, b: a - 2 * b, {"self": A, "other": B}),
    "Sum, home": Kind(Sum(("self", "other"), (A, B), 3, -2.0, home="other"), lambda a, b: a - 2 * b,
                      {"self": A, "other": B}),
    "Sum, broadcast": Kind(Sum(("self", "other"), (A, (4, 1)), 3), lambda a, b: a + b, {"self": A, "other": (4, 1)}),
    "Product": Kind(Product(("self", "other"), (A, B), 3), lambda a, b: a * b, {"self": A, "other": B}, shift=False),
    "Product, home": Kind(Product(("self", "other"), (A, (4, 1)), 3, home="other"), lambda a, b: a * b,
                          {"self": A, "other": (4, 1)}, shift=False),
    "Homogeneous": Kind(Homogeneous(("self",)), F.relu, {"self": A}, shift=False, positive=True),
    "Homogeneous with shifts": Kind(Homogeneous(("self", "other"), (2,), shifts=True), torch.maximum,
                                    {"self": A, "other": B}, positive=True),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_pull_says_what_the_operands_must_become(name):
    kind = KINDS[name]
    values = [noise(*shape, seed=5 + i) for i, shape in enumerate(kind.shapes.values())]
    out = kind.run(*values)
    wanted = affine(kind.axis, out.ndim, shift=kind.shift, positive=kind.positive)
    answer = kind.semantics.pull(wanted)
    assert isinstance(answer, Yes) and not answer.constants and answer.add is None and answer.bypass is None
    changed = [answer.operands[s].settled()(v) if s in answer.operands else v for s, v in zip(kind.shapes, values)]
    assert torch.allclose(kind.run(*changed), wanted(out), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", KINDS)
def test_push_says_by_what_the_output_differs(name):
    kind = KINDS[name]
    values = [noise(*shape, seed=5 + i) for i, shape in enumerate(kind.shapes.values())]
    # What must come out is what comes of pulling it: the two directions are each other's inverse.
    out = kind.run(*values)
    wanted = affine(kind.axis, out.ndim, shift=kind.shift, positive=kind.positive)
    given = {slot: part.settled() for slot, part in kind.semantics.pull(wanted).operands.items()}
    answer = kind.semantics.push(given)
    assert isinstance(answer, Yes) and answer.out is not None
    meant = kind.run(*(given[s](v) if s in given else v for s, v in zip(kind.shapes, values)))
    assert torch.allclose(answer.out(out), meant, rtol=1e-12, atol=1e-12)


def contraction(no_shift: str | None = None, bias: bool = True) -> Contraction:
    weight = noise(2, 3, 2)  # groups, outputs, inputs
    return Contraction(
        "input", "weight", (2, 3, 2), "goi", ("", "go"), ("", "gi"), lambda: weight, lambda w: w.reshape(6, 2),
        (lambda: noise(1, 6, seed=3)) if bias else lambda: None, lambda b: {"bias": b.flatten()} if bias else None,
        no_shift,
    )  # fmt: skip


def grouped(x: Tensor, weight: Tensor, bias: Tensor | float) -> Tensor:
    return torch.einsum("ngi,goi->ngo", x.unflatten(1, (2, 2)), weight.reshape(2, 3, 2)).flatten(1) + bias


def test_contraction_absorbs_both_ways():
    kind, x, b = contraction(), noise(5, 4, seed=8), noise(1, 6, seed=3)
    after, before = affine(1, 2, size=6), affine(1, 2, size=4)
    answer = kind.pull(after)
    assert isinstance(answer, Yes) and not answer.operands
    made = grouped(x, answer.constants["weight"], answer.constants["bias"])
    assert torch.allclose(made, after(grouped(x, kind.get_weight(), b)), rtol=1e-12)
    answer = kind.push({"input": before})
    assert isinstance(answer, Yes) and answer.out is None
    made = grouped(x, answer.constants["weight"], answer.constants["bias"])
    assert torch.allclose(made, grouped(before(x), kind.get_weight(), b), rtol=1e-12)


def test_contraction_without_a_bias_adds_one():
    kind, x = contraction(bias=False), noise(5, 4, seed=8)
    after, before = affine(1, 2, size=6), affine(1, 2, size=4)
    answer = kind.pull(after)
    assert isinstance(answer, Yes) and answer.add is not None
    assert torch.allclose(grouped(x, answer.constants["weight"], answer.add), after(grouped(x, kind.get_weight(), 0)))
    assert kind.pull(after.only_scale()).add is None
    answer = kind.push({"input": before})
    assert torch.allclose(grouped(x, answer.constants["weight"], answer.add), grouped(before(x), kind.get_weight(), 0))


def test_lookup_turns_an_affine_of_the_rows_into_one_of_the_table():
    answer = Lookup("weight").pull(affine(2, 3))
    table, indices = noise(7, 4), torch.tensor([[1, 2], [6, 0]])
    made = F.embedding(indices, answer.operands["weight"](table))
    assert torch.allclose(made, affine(2, 3)(F.embedding(indices, table)))


def scaling(write: Callable[[Affine], dict[str, Tensor] | None]) -> Scaling:
    return Scaling("self", affine(1, 3), "mul", write)


def test_scaling_takes_an_affine_into_its_constants_or_goes():
    own, other = affine(1, 3), Affine.per_channel(noise(4, seed=8), noise(4, seed=9), 3)
    written = scaling(lambda new: {"c": new.scale}).pull(other)
    assert torch.equal(written.constants["c"], other.after(own).scale) and not written.operands
    written = scaling(lambda new: {"c": new.shift}).push({"self": other})
    assert torch.equal(written.constants["c"], own.after(other).shift) and written.out is None
    gone = scaling(lambda new: None).pull(other)
    assert gone.bypass == "self" and torch.equal(gone.operands["self"].shift, other.after(own).shift)
    gone = scaling(lambda new: None).push({"self": other})
    assert gone.bypass == "self" and gone.out is not None and torch.equal(gone.out.shift, own.after(other).shift)


def test_an_addition_keeps_its_shift_and_lets_the_scale_travel_on():
    def write(new: Affine) -> dict[str, Tensor] | None:
        return None if new.has_scale else {"other": new.shift}

    shift = Affine.per_channel(1.0, noise(4), 3)
    answer = Scaling("self", shift, "add", write).pull(affine(1, 3))
    assert answer.bypass is None and answer.operands["self"].has_shift is False
    x = noise(2, 4, 3, seed=9)
    assert torch.allclose(answer.operands["self"](x) + answer.constants["other"], affine(1, 3)(shift(x)))


S, P, H = Sum(("a", "b"), (A, B), 3), Product(("a", "b"), (A, B), 3), Homogeneous(("a", "b"), (2,), shifts=True)
ONE_CHANNEL = (2, 1, 3)
REPEATED = Movement(("self",), ((2, 1, 3),), lambda parts: parts[0].expand(2, 4, 3))
PADDED = Movement(("self",), ((2, 4, 2),), lambda parts: F.pad(parts[0], (0, 1)))
NO: dict[str, tuple[Callable[[], object], str]] = {
    "Opaque pull": (lambda: Opaque().pull(affine()), "nonlinear"),
    "Opaque push": (lambda: Opaque().push({"self": affine()}), "nonlinear"),
    "ShapeOnly": (lambda: ShapeOnly("self").pull(affine()), "nonlinear"),
    "Unknown": (lambda: Unknown().push({"self": affine()}), "unknown-operator"),
    "Refused": (lambda: Refused("batch-statistics").pull(affine()), "batch-statistics"),
    "Refused push": (lambda: Refused("not-constant").push({"self": affine()}), "not-constant"),
    "Contraction along another axis": (lambda: contraction().pull(affine(0, 2)), "other-axis"),
    "Contraction along another axis, push": (lambda: contraction().push({"input": affine(0, 2)}), "other-axis"),
    "Contraction with padding": (
        lambda: contraction("zero-padding").push({"input": affine(1, 2)}), "zero-padding"),
    "Contraction whose weight depends on it": (
        lambda: contraction().push({"input": affine(1, 2), "weight": affine(1, 2)}), "nonlinear"),
    "Lookup along the positions": (lambda: Lookup("weight").pull(affine(1, 3)), "other-axis"),
    "Movement of copies": (lambda: REPEATED.pull(affine()), "copies-differ"),
    "Movement into zeros": (lambda: PADDED.pull(affine()), "zero-padding"),
    "Average along the axis": (lambda: Average("self", (1,), 3).pull(affine()), "other-axis"),
    "Average along the axis, push": (lambda: Average("self", (1,), 3).push({"self": affine()}), "other-axis"),
    "Average that counts zeros": (
        lambda: Average("self", (2,), 3, no_shift="zero-padding").pull(affine()), "zero-padding"),
    "Average whose weights depend on it": (
        lambda: Average("value", (1,), 3).push({"value": affine(2), "query": affine(2)}), "nonlinear"),
    "Sum of two scales": (lambda: S.push({"a": affine()}), "unequal-scales"),
    "Sum with a broadcast operand": (lambda: Sum(("a", "b"), (A, ONE_CHANNEL), 3).pull(affine()), "broadcast"),
    "Sum whose second operand counts nothing": (
        lambda: Sum(("a", "b"), (ONE_CHANNEL, A), 3, 0.0).pull(Affine.per_channel(1.0, noise(4), 3)), "broadcast"),
    "Product and a shift": (lambda: P.pull(affine()), "shift-through-product"),
    "Product and a shift, push": (lambda: P.push({"a": affine()}), "shift-through-product"),
    "Product, two broadcast factors": (
        lambda: Product(("a", "b"), (ONE_CHANNEL, ONE_CHANNEL), 3).pull(affine(shift=False)), "broadcast"),
    "Product of one value": (lambda: Product(("a", "b"), (A, A), 3, square=True).pull(affine(shift=False)),
                             "several-readers"),
    "Product, the divisor": (lambda: Product(("a",), (A,), 3).push({"b": affine(shift=False)}), "nonlinear"),
    "Homogeneous and a shift": (
        lambda: Homogeneous(("a",)).pull(affine(positive=True)), "shift-through-activation"),
    "Homogeneous and a negative scale": (lambda: Homogeneous(("a",)).pull(affine(shift=False)), "sign"),
    "Homogeneous along its axis": (lambda: H.pull(affine(2, 3, 3, positive=True)), "other-axis"),
    "Homogeneous, one operand alone": (lambda: H.push({"a": affine(positive=True)}), "unequal-scales"),
    "Homogeneous, two affines": (
        lambda: H.push({"a": affine(positive=True), "b": Affine.identity(3)}), "unequal-scales"),
}  # fmt: skip


@pytest.mark.parametrize("case", NO)
def test_no(case):
    ask, reason = NO[case]
    answer = ask()
    assert isinstance(answer, No) and answer.reason == reason
    assert reason in REASONS


def test_a_scale_passes_a_padding_and_a_shift_of_what_is_not_padded_is_free():
    assert isinstance(PADDED.pull(affine(shift=False)), Yes)
    pushed = PADDED.push({"self": affine()})
    assert pushed.out is not None and pushed.out.shift.shape == (1, 4, 3)  # zero in the padding, so it varies there


#: takes(shift) of a kind whose operands a and b do (not) take it
TAKES = [
    (contraction(), True, {}, True),
    (Lookup("w"), True, {}, True),
    (Opaque(), False, {"a": True}, False),
    (S, True, {"a": False, "b": True}, True),
    (S, False, {"a": False, "b": True}, False),
    (P, True, {"a": True, "b": True}, False),
    (P, False, {"a": False, "b": True}, True),
    (H, True, {"a": True, "b": True}, True),
    (Homogeneous(("a",)), True, {"a": True}, False),
    (Average("a", (2,), 3), True, {"a": True}, True),
    (Average("a", (2,), 3, no_shift="zero-padding"), True, {"a": True}, False),
    (REPEATED, True, {"self": True}, True),
    (Same("a"), False, {"a": False}, False),
]


@pytest.mark.parametrize(("kind", "shift", "operands", "wanted"), TAKES)
def test_where_a_shift_is_likely_to_find_a_home(kind, shift, operands, wanted):
    assert kind.takes(shift, operands) is wanted
