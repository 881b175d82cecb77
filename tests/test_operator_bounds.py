"""The table of operator accuracies covers what it says, holds here, and is narrow enough to show a wrong operator."""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx.helper import make_node
from torch import Tensor
from torch.nn import functional as F

from bnfold.evaluate.attributes import Attributes
from bnfold.gate.by_operator import ROOM, as_kernels_round
from bnfold.gate.operator_bounds import MAGNITUDES, UNITS, bound, table

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

from operator_accuracy import CASES, runs

#: Kernels of their own each: vectorised and not, along rows and elementwise, resized, recurrent.
MEASURED = (
    "Sigmoid", "Tanh", "Exp", "Gelu", "HardSwish", "Softmax", "LayerNormalization", "GroupNormalization", "Resize",
    "GRU",
)  # fmt: skip
FIRST = {case.op: case for case in reversed(CASES)}


def test_the_table_has_every_operator_that_the_script_sweeps_and_no_other() -> None:
    measured = {row["op"] for row in table()["entries"] if row["dtype"] == "float32"}
    assert measured == set(FIRST) and set(MAGNITUDES) <= measured
    assert {row["op"] for row in table()["entries"]} == measured
    numbers = np.array([[row["absolute"], row["relative"]] for row in table()["entries"]])
    assert np.isfinite(numbers).all() and (numbers[:, 0] >= 0).all() and (numbers[:, 1] > 0).all()
    assert table()["safety"] >= 2 and table()["processors"] and table()["onnxruntime"]


@pytest.mark.parametrize("op", MEASURED)
def test_what_this_processor_computes_lies_within_the_table(op: str) -> None:
    for dtype in ("float32", "float16"):
        for at, operands, got, exact in islice(runs(FIRST[op], dtype, 20_000), 60):
            limit = bound(op, dtype, at, operands, exact)
            assert limit is not None
            inside = np.abs(exact) < np.finfo(dtype).max * (1 - 2 * UNITS[dtype])
            assert (np.abs(got[inside] - exact[inside]) <= limit[inside]).all()


#: What somebody else computes: an attribute that is a little off, an approximation that is not the operator.
WRONG: dict[str, Callable[..., Tensor]] = {
    "Sigmoid": lambda x: torch.sigmoid(x * (1 + 1e-5)),
    "Tanh": lambda x: torch.tanh(x) + 3e-6,
    "Exp": lambda x: torch.exp(x * (1 + 1e-5)),
    "Gelu": lambda x: F.gelu(x, approximate="tanh"),
    "HardSwish": lambda x: x * (x * 0.16667 + 0.5).clamp(0, 1),
    "Softmax": lambda x: torch.softmax(x * (1 + 1e-5), -1),
    "LayerNormalization": lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b, 1.01e-5),
    "GroupNormalization": lambda x, w, b: F.group_norm(x, 4, w, b),
    "Resize": lambda x, *_: F.interpolate(x, size=(11, 14), mode="bilinear")[:, :, :10],
}


@pytest.mark.parametrize("op", WRONG)
def test_a_wrong_operator_lies_outside_of_the_table(op: str) -> None:
    worst = 0.0
    for at, operands, _, exact in islice(runs(FIRST[op], "float32", 20_000), 40):
        limit = bound(op, "float32", at, operands, exact)
        wrong = WRONG[op](*(None if x is None else torch.from_numpy(x) for x in operands)).numpy()
        if wrong.shape == exact.shape:
            inside = np.abs(exact) < np.finfo(np.float32).max
            worst = max(worst, float((np.abs(wrong[inside] - exact[inside]) / limit[inside]).max()))
    assert worst > 1


def test_half_precision_has_at_least_the_units_of_float32_and_what_was_not_measured_has_no_bound() -> None:
    x = np.linspace(-9, 9, 50)
    exact, at = 1 / (1 + np.exp(-x)), Attributes({}, 22, 1)
    bounds = {dtype: bound("Sigmoid", dtype, at, (x,), exact) for dtype in UNITS}
    for dtype in ("float16", "bfloat16"):
        assert (bounds[dtype] / UNITS[dtype] >= bounds["float32"] / UNITS["float32"]).all()
    assert bound("Conv", "float32", at, (x,), exact) is None and bound("Sigmoid", "float64", at, (x,), exact) is None


# -- what kernels may do, drawn --------------------------------------------------------------------------------------


def test_results_are_off_as_kernels_round() -> None:
    """A product of K terms by ``(8 √K + K / 16) u |x| |w|`` and a rounding, over eight, in the RMS of each element."""
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((5, 96)), rng.standard_normal((96, 7)).astype(np.float32)
    node, true = make_node("MatMul", ["x", "w"], ["y"]), x @ w.astype(np.float64)
    off = np.stack([
        as_kernels_round(node, {"x": x, "w": w}, [true], opsets={"": 20}, dtype="float32", rng=rng)[0] - true
        for _ in range(400)
    ])  # fmt: skip
    size = np.abs(x) @ np.abs(w.astype(np.float64))
    sigma = UNITS["float32"] * ((8 * 97**0.5 + 97 / 16) * size + np.abs(true)) / ROOM
    # A mean of 400 squares of uniform numbers is within five of its standard errors of theirs.
    np.testing.assert_allclose(np.square(off / sigma).mean(0), 1, atol=5 * 0.8**0.5 / 400**0.5)


@pytest.mark.parametrize("op", ["Relu", "Identity", "RandomNormalLike"])
def test_what_is_exact_or_drawn_is_left_alone(op: str) -> None:
    node, given = make_node(op, ["x"], ["y"]), np.arange(6.0)
    results = [given]
    rng = np.random.default_rng(0)
    assert as_kernels_round(node, {"x": given}, results, opsets={"": 20}, dtype="float32", rng=rng) is results
    whole = [np.arange(3)]
    add = make_node("Add", ["x", "x"], ["y"])
    assert as_kernels_round(add, {"x": whole[0]}, whole, opsets={"": 20}, dtype="float32", rng=rng) is whole


def test_a_mean_is_off_by_what_it_is_a_sum_of() -> None:
    """Of terms that cancel it is next to nothing, and zeros are as far off as any other."""
    x = np.random.default_rng(0).standard_normal((2, 3, 144)).astype(np.float32)
    x[..., 0] = 0
    x -= x[..., 1:].mean(-1, keepdims=True) * (np.arange(144) > 0)
    wide, unit = x.astype(np.float64), np.ones(3)
    mean, sigma = wide.mean(-1, keepdims=True), np.sqrt(wide.var(-1, keepdims=True) + 1e-5)
    limit = bound(
        "InstanceNormalization", "float32", Attributes({}, 0, 1), (wide, unit, unit * 0), (wide - mean) / sigma
    )
    assert limit is not None
    # One after another, in float32: each of the sums is rounded.
    found = ((x - np.add.accumulate(x, -1, dtype=np.float32)[..., -1:] / np.float32(144)) / sigma)[..., 0]
    assert (np.abs(found + (mean / sigma)[..., 0]) <= limit[..., 0]).all()
    assert (limit[..., 0] >= UNITS["float32"] * (np.abs(wide).mean(-1) / sigma[..., 0])).all()


@pytest.mark.parametrize("count", [100, 1001, 4097])
def test_equal_terms_that_are_added_one_by_one_are_within_the_bound(count: int) -> None:
    """All their roundings go the same way: the largest of sixty such sums takes less than half of the bound."""
    numbers = np.random.default_rng(count).random(60).astype(np.float32)
    for axis in (1, 2):
        shape = [1, 3, 3]
        shape[axis] = count
        at = Attributes({"axes": [axis], "keepdims": 1}, 13, 1)
        for number in numbers:
            x = np.full(shape, number)
            total = np.cumsum(np.square(x), axis=axis, dtype=np.float32)  # one by one, as the slowest kernel does
            exact = np.sqrt(np.square(x.astype(np.float64)).sum(axis, keepdims=True))
            given = np.sqrt(total.take([-1], axis)).astype(np.float64)
            limit = bound("ReduceL2", "float32", at, (x.astype(np.float64),), exact)
            assert limit is not None and (np.abs(given - exact) <= limit / 2).all()
