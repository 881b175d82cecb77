"""The vocabulary by itself: what every kind relates, checked against what it stands for on numbers.

Every relation is checked in the one way that counts. Operands get a variable of its own for every element; whatever
solves the equations then makes the operator, on what is stored, give what is stored of its result. What has constants
is checked with those that it is rewritten to.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
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
    Equations,
    Gauge,
    Homogeneous,
    Movement,
    Normalised,
    Opaque,
    Product,
    Recurrent,
    Same,
    Scaling,
    Semantics,
    Sum,
    build,
)
from bnfold.semantics.equations import DEAD, EMPTY, LOG, SHIFT, SIGN
from bnfold.semantics.moving import reshaped
from bnfold.semantics.system import Floats, Ints, given


@dataclass
class Kind:
    """``semantics`` says what ``run`` does to operands of ``shapes``; ``free``: whether any scale and any shift is."""

    semantics: Semantics
    run: Callable[..., Tensor]
    shapes: dict[str, tuple[int, ...]]
    free: tuple[bool, bool] = (True, True)


A = (2, 4, 3)
PADDED = Movement(("self",), ((2, 4, 2),), lambda parts: F.pad(parts[0], (0, 1)))
KINDS = {
    "Movement": Kind(
        Movement(("self",), (A,), lambda parts: parts[0].transpose(1, 2)), lambda x: x.transpose(1, 2), {"self": A}),
    "Movement of two": Kind(
        Movement(("t.0", "t.1"), ((2, 1, 3), (2, 3, 3)), lambda parts: torch.cat([*parts], 1)),
        lambda *parts: torch.cat(parts, 1), {"t.0": (2, 1, 3), "t.1": (2, 3, 3)}),
    "Movement of copies": Kind(
        Movement(("self",), ((2, 1, 3),), lambda p: p[0].expand(A)), lambda x: x.expand(A), {"self": (2, 1, 3)}),
    "Movement that makes zeros": Kind(PADDED, lambda x: F.pad(x, (0, 1)), {"self": (2, 4, 2)}),
    "Movement that may make zeros": Kind(
        Movement(("self",), (A,), lambda p: p[0], may_pad=True), lambda x: x, {"self": A}, (True, False)),
    "Same": Kind(Same("input"), lambda x: x.clone(), {"input": A}),
    "Average": Kind(Average("self", (2,), 3), lambda x: x.mean(2, keepdim=True), {"self": A}),
    "Average that drops": Kind(Average("self", (1,), 4, drops=True), lambda x: x.mean(1), {"self": (2, 5, 4, 3)}),
    "Average that counts what is no number": Kind(
        Average("self", (2,), 3, no_shift="dynamic-size"), lambda x: x.mean(2, keepdim=True), {"self": A},
        (True, False)),
    "Average, a sum": Kind(Average("self", (2,), 3, total=3.0), lambda x: x.sum(2, keepdim=True), {"self": A}),
    "Sum": Kind(Sum(("self", "other"), -2.0), lambda a, b: a - 2 * b, {"self": A, "other": A}),
    "Sum, broadcast": Kind(Sum(("self", "other")), lambda a, b: a + b, {"self": A, "other": (4, 1)}),
    "Product": Kind(Product(("self", "other")), lambda a, b: a * b, {"self": A, "other": A}, (True, False)),
    "Product, broadcast": Kind(
        Product(("self", "other")), lambda a, b: a * b, {"self": A, "other": (4, 1)}, (True, False)),
    "Quotient": Kind(
        Product(("self", "other"), divides=True), lambda a, b: a / b, {"self": A, "other": A}, (True, False)),
    "Product of matrices": Kind(
        Product(("self", "other"), uniform=((-1,), (-2,))), torch.matmul, {"self": A, "other": (2, 3, 5)},
        (True, False)),
    "Product that mixes all": Kind(
        Product(("self", "other"), uniform=((-3, -2, -1),) * 2), torch.matmul, {"self": A, "other": (2, 3, 5)},
        (True, False)),
    "Homogeneous": Kind(Homogeneous(("self",)), F.relu, {"self": A}, (True, False)),
    "Homogeneous along an axis": Kind(
        Homogeneous(("self",), (2,), shifts=True, drops=True), lambda x: x.amax(2), {"self": A}),
    "Homogeneous with shifts": Kind(
        Homogeneous(("self", "other"), shifts=True), torch.maximum, {"self": A, "other": A}),
    "Homogeneous, of any sign": Kind(
        Homogeneous(("self",), any_sign=True), lambda x: x * (x.abs() * 0 + torch.tensor([0.0, 1.0, 0.0])), {"self": A},
        (True, False)),
    "Opaque": Kind(Opaque(), torch.sigmoid, {"self": A}, (False, False)),
}  # fmt: skip


def solved(equations: Equations, seed: int = 0) -> tuple[Floats, Floats]:
    """Scales and shifts that the equations allow, as arbitrary as can be."""
    draw = np.random.default_rng(seed)

    def anything(binary: bool, logs: bool = False) -> Callable[[Ints, Ints, Floats, Floats], Floats]:
        def choose(var: Ints, root: Ints, val: Floats, right: Floats) -> Floats:
            numbers = draw.integers(0, 2, len(right)).astype(float) if binary else draw.normal(size=len(right))
            numbers[0] = 0.0
            return given(np.exp(numbers) if logs else numbers, logs)

        return choose

    assert not equations.commit()
    size = equations.systems[LOG].solved(anything(False, True))[0]
    sign, shift = equations.systems[SIGN].solved(anything(True)), equations.systems[SHIFT].solved(anything(False))
    return size * np.where(sign == 1, -1.0, 1.0), shift


def affine(gauge: Gauge, numbers: tuple[Floats, Floats]) -> Affine:
    return Affine(torch.tensor(numbers[0][gauge.scale]), torch.tensor(numbers[1][gauge.shift]))


def fresh(equations: Equations, shape: tuple[int, ...]) -> Gauge:
    return Gauge(equations.scale.fresh(shape), equations.shift.fresh(shape))


@pytest.mark.parametrize("name", KINDS)
def test_what_is_stored_of_the_result_is_made_of_what_is_stored_of_the_operands(name):
    kind, equations = KINDS[name], Equations()
    values = {slot: noise(*shape, seed=5 + i) for i, (slot, shape) in enumerate(kind.shapes.items())}
    gauges = {slot: fresh(equations, shape) for slot, shape in kind.shapes.items()}
    stored = kind.run(*values.values())
    result = kind.semantics.relate(gauges, equations, tuple(stored.shape))
    for seed in range(5):
        numbers = solved(equations, seed)
        meant = kind.run(*(affine(gauges[slot], numbers)(value) for slot, value in values.items()))
        assert torch.allclose(affine(result, numbers)(stored), meant, rtol=1e-9, atol=1e-9)
    scales, shifts = (np.concatenate([each.ravel() for each in parts]) for parts in zip(
        *((numbers[0][g.scale] != 1, numbers[1][g.shift] != 0) for g in gauges.values())))  # fmt: skip
    assert (bool(scales.any()), bool(shifts.any())) == kind.free


def padded_windows() -> tuple[Equations, Gauge, Gauge, Callable[[Tensor], Tensor]]:
    """A gauge per channel, and what it becomes where windows of a padded value are laid beside the samples."""
    shapes = [(2, 4, 6), (2, 4, 8), (2, 4, 3, 4), (8, 3, 4)]
    steps = [lambda x: F.pad(x, (1, 1)), lambda x: x.unfold(2, 4, 2), lambda x: reshaped(x, (8, 3, 4))]
    equations = Equations()
    given = found = fresh(equations, (1, 4, 1))
    for step, before, after in zip(steps, shapes, shapes[1:]):
        kept = (0, 1) if len(before) == len(after) == 3 and before[:2] == after[:2] else ()
        movement = Movement(("x",), (before,), lambda parts, step=step: step(parts[0]), kept=kept)
        found = movement.relate({"x": found}, equations, after)
    return equations, given, found, lambda x: steps[2](steps[1](steps[0](x)))


def test_zeros_that_are_made_up_are_kept_apart():
    equations, given, found, run = padded_windows()
    assert (found.base.shape, found.made.shape) == ((8, 1, 1), (1, 3, 4))
    numbers, x = solved(equations), noise(2, 4, 6)
    assert numbers[1][given.shift].all()
    assert torch.allclose(affine(found, numbers)(run(x)), run(affine(given, numbers)(x)))


@pytest.mark.parametrize(("axis", "free"), [(0, True), (1, False), (2, False)])
def test_no_shift_is_one_along_an_axis_with_zeros_that_are_made_up(axis, free):
    equations, given, found, _ = padded_windows()
    Average("x", (axis,), 3).relate({"x": found}, equations, (8, 3, 4))
    assert bool(solved(equations)[1][given.shift].any()) == free


@pytest.mark.parametrize(
    ("old", "new", "kept"),
    [((7, 8, 3), (56, 3), 56 * 3), ((1, 5, 6), (5, 2, 3), 5 * 6), ((4, 1), (2, 2, 1, 1), 4), ((), (1, 1), 1)],
)
def test_reshaping_copies_no_more_than_it_mixes(old, new, kept):
    x = torch.arange(float(math.prod(old))).reshape(old)
    assert torch.equal(reshaped(x, new), x.reshape(new))
    wide = x[..., None, None].expand(*old, 50, 40)
    found = reshaped(wide, (*new, 40, 50))
    assert torch.equal(found, wide.reshape(*new, 40, 50))
    assert found.untyped_storage().nbytes() == 4 * kept


class Grouped(dict[str, Tensor | None]):
    """A linear layer with groups, as a table's row sees it."""

    def constant(self, slot: str) -> Tensor | None:
        return self[slot]

    def shape(self, slot: str) -> tuple[int, ...]:
        return tuple(self[slot].shape)

    def size(self, axis: int) -> int:
        return 6


def contraction(bias: bool = True, no_shift: str | None = None) -> Contraction:
    call = Grouped(weight=noise(6, 2), bias=noise(6, seed=3))
    return Contraction(
        call, "input", "weight", (2, 3, 2), "goi", ("", "go"), ("", "gi"), "bias" if bias else None, 1,
        no_shift=no_shift,
    )  # fmt: skip


def grouped(x: Tensor, weight: Tensor, bias: Tensor | float) -> Tensor:
    return torch.einsum("ngi,goi->ngo", x.unflatten(1, (2, 2)), weight.reshape(2, 3, 2)).flatten(1) + bias


@pytest.mark.parametrize("bias", [True, False])
def test_the_two_sides_of_a_contraction_are_free_of_one_another(bias):
    kind, equations, x = contraction(bias), Equations(), noise(5, 4, seed=8)
    data = fresh(equations, (5, 4))
    made = kind.relate({"input": data}, equations, (5, 6))
    numbers = solved(equations)
    before, result = affine(data, numbers), affine(made, numbers)
    assert before.compressed().varies() == result.compressed().varies() == (1,)
    before, after = before.compressed(), Affine(1 / result.scale, -result.shift / result.scale)
    found = kind.rewritten({"input": before}, after)
    assert (found.add is None) == bias
    meant = grouped(before(x), kind.get_weight(), kind.get_bias() if bias else 0.0)
    got = grouped(x, found.constants["weight"], found.constants["bias"] if bias else found.add)
    assert torch.allclose(result(got), meant, rtol=1e-9)


def test_no_shift_comes_into_padding():
    equations = Equations()
    data = fresh(equations, (5, 4))
    contraction(no_shift="zero-padding").relate({"input": data}, equations, (5, 6))
    assert not solved(equations)[1][data.shift].any()


def test_a_lookup_and_a_norm_of_its_own_write_what_comes_after():
    after = Affine.per_channel(noise(4, seed=1), noise(4, seed=2), 3, 2)
    table, indices = noise(7, 4), torch.tensor([[1, 2], [6, 0]])
    call: Any = SimpleNamespace(rank=3, is_constant=lambda slot: True, constant=lambda slot: table)
    found = build.lookup(call, "weight").rewritten({}, after)
    assert torch.allclose(F.embedding(indices, found.constants["weight"]), after(F.embedding(indices, table)))
    assert Normalised((2,), lambda a: {"weight": a.scale}).rewritten({}, after).constants["weight"] is after.scale


def test_a_recurrent_layer_reads_its_input_through_every_direction():
    rnn = torch.nn.LSTM(3, 2, bidirectional=True, batch_first=True).double()
    slots = {"w": "weight_ih_l0", "b": "bias_ih_l0", "rw": "weight_ih_l0_reverse", "rb": "bias_ih_l0_reverse"}
    kind = Recurrent("input", (("w", "b"), ("rw", "rb")), lambda slot: getattr(rnn, slots[slot]).detach())
    x, before = noise(2, 5, 3), Affine.per_channel(noise(3, seed=1), noise(3, seed=2), 3, 2)
    with torch.no_grad():
        meant = rnn(before(x))[0]
        for slot, tensor in kind.rewritten({"input": before}, Affine.per_channel(1.0, 0.0, 3)).constants.items():
            getattr(rnn, slots[slot]).copy_(tensor)
        assert torch.allclose(rnn(x)[0], meant, rtol=1e-9)


def scaling(*scale: float, free: tuple[str, ...] = ("scale", "shift")) -> Scaling:
    own = Affine.per_channel(torch.tensor(scale, dtype=torch.float64), noise(len(scale), seed=4), 2)
    return Scaling("self", own, "batch_norm", lambda new: {"s": new.scale, "t": new.shift}, free, (1,))


@pytest.mark.parametrize("dead", [False, True])
@pytest.mark.parametrize("scale", [(0.5, -2.0), (0.5, 0.0)])
def test_an_affine_that_goes_is_stored_as_its_operand(scale, dead):
    kind, equations, x = scaling(*scale), Equations(), noise(5, 2)
    data = fresh(equations, (1, 2))
    made = kind.relate({"self": data}, equations, (5, 2))
    kind.goes(data, made, equations, dead=dead)
    before, result = (affine(g, (numbers := solved(equations))) for g in (data, made))
    empty, gone = (equations.systems[name].solved() for name in (EMPTY, DEAD))
    meant = kind.affine(before(x).where(torch.tensor(empty[data.scale] == 0), 0.0))
    stored = x.where(torch.tensor(empty[data.scale] == 0), -before.shift / before.scale)
    assert torch.allclose(
        Affine(result.scale.where(torch.tensor(gone[made.scale] == 0), 0.0), result.shift)(stored), meant
    )
    assert (bool(empty[data.scale].any()), bool(gone[made.scale].any())) == (
        0.0 in scale and not dead,
        0.0 in scale and dead,
    )
    assert numbers[0].all()


def test_an_affine_that_stays_takes_up_any_difference():
    kind, equations, x = scaling(0.5, -2.0), Equations(), noise(5, 2)
    data = fresh(equations, (1, 2))
    made = kind.relate({"self": data}, equations, (5, 2))
    kind.remains(data, made, equations)
    numbers = solved(equations)
    before, result = affine(data, numbers), affine(made, numbers)
    found = kind.rewritten({"self": before}, Affine(1 / result.scale, -result.shift / result.scale)).constants
    assert torch.allclose(result(x * found["s"] + found["t"]), kind.affine(before(x)))


def test_reasons_are_of_the_closed_list():
    equations = Equations()
    for name, kind in KINDS.items():
        equations.node = name
        gauges = {slot: fresh(equations, shape) for slot, shape in kind.shapes.items()}
        values = [noise(*shape) for shape in kind.shapes.values()]
        kind.semantics.relate(gauges, equations, tuple(kind.run(*values).shape))
    assert {reason for _, reason in equations.origins} <= REASONS.keys()
    assert Opaque().reason in REASONS
