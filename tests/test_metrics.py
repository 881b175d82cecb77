"""The arithmetic of accuracy: against plain numpy, and batch by batch the same as at once."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bnfold.gate.metrics import Classification, Errors, Regression, rms

torch.set_num_threads(1)


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def never() -> Tensor:
    raise AssertionError("float64 was asked for without a flip")


def classified(
    old: Tensor, new: Tensor, labels: Tensor | None = None, *, size: int = 100, noise: float = 0.0, near: float = 64.0,
    axis: int = 1, truth: Any = None, ignored: tuple[int, ...] = (-100,),
) -> dict[str, Any]:  # fmt: skip
    found = Classification("out", axis, near)
    for start in range(0, len(old), size):
        part = slice(start, start + size)
        found.add(
            old[part], new[part], None if labels is None else labels[part], ignored,
            torch.full((old.shape[axis],), noise / math.sqrt(2), dtype=torch.float64), start, truth or (lambda: None),
        )  # fmt: skip
    return found.result()


# -- errors ------------------------------------------------------------------------------------------------------------


def test_rms_leaves_out_what_is_not_good() -> None:
    value = torch.tensor([[3.0, 4.0], [1.0, math.inf], [math.nan, math.nan]])
    assert rms(value, value.isfinite()).tolist() == pytest.approx([math.sqrt(12.5), 1, 0])
    assert rms(value[:, 0], value[:, 0].isfinite()).tolist() == [3, 1, 0]


@settings(max_examples=30, deadline=None)
@given(count=st.integers(1, 40), size=st.integers(1, 40), seed=st.integers(0, 99), off=st.floats(1e-7, 1))
def test_errors_are_those_of_numpy(count: int, size: int, seed: int, off: float) -> None:
    before = rows(count, 3, 4, seed=seed)
    after = before + off * rows(count, 3, 4, seed=seed + 1)
    errors = Errors("out")
    told = [errors.add(before[i : i + size], after[i : i + size]) for i in range(0, count, size)]
    found = errors.result(1e-7, 0, 1.0)
    a, b = before.double().numpy().reshape(count, -1), after.double().numpy().reshape(count, -1)
    each = np.sqrt(((b - a) ** 2).mean(1) / (a**2).mean(1))
    for quantile, value in ((0.5, found.p50), (0.9, found.p90), (0.99, found.p99), (1, found.max)):
        assert value == pytest.approx(np.quantile(each, quantile, method="higher"))
    assert found.sqnr == pytest.approx(10 * np.log10((a**2).sum() / ((b - a) ** 2).sum()))
    assert found.difference == pytest.approx(np.sqrt(((b - a) ** 2).mean()))
    assert found.samples == count and torch.cat(told).numpy() == pytest.approx(each)


def test_equal_outputs_have_no_error() -> None:
    errors = Errors("out")
    errors.add(rows(4, 3), rows(4, 3))
    found = errors.result(1e-7, 0, 0.0)
    assert found.sqnr == math.inf and found.max == 0


def test_outputs_of_zeros() -> None:
    equal, moved = Errors("out"), Errors("out")
    equal.add(torch.zeros(4, 3), torch.zeros(4, 3))
    moved.add(torch.zeros(4, 3), rows(4, 3))
    assert equal.result(1e-7, 0, 0.0).sqnr == math.inf
    assert math.isnan(moved.result(1e-7, 0, 0.0).sqnr), "an error and nothing to compare it with"


def test_a_sample_next_to_zero_is_no_outlier() -> None:
    before = torch.stack([torch.ones(4), torch.zeros(4)])
    errors = Errors("out")
    errors.add(before, before + 1e-7)
    assert errors.result(1e-7, 0, 0.0).max == pytest.approx(1e-4, rel=0.1)  # of a thousandth of the largest sample


def test_nan_and_infinities_are_left_out() -> None:
    before = torch.tensor([[1.0, math.inf], [math.nan, 2.0]])
    errors = Errors("out")
    errors.add(before, before.clone())
    assert errors.result(1e-7, 0, 0.0).max == 0


# -- classes -----------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(1, 30), classes=st.integers(2, 12), size=st.integers(1, 30), seed=st.integers(0, 99),
    rest=st.sampled_from([(), (3,), (2, 3)]), last=st.booleans(),
)  # fmt: skip
def test_accuracy_is_that_of_numpy(
    count: int, classes: int, size: int, seed: int, rest: tuple[int, ...], last: bool
) -> None:
    old, new = (rows(count, *rest, classes, seed=seed + i) for i in (0, 1))
    labels = torch.randint(0, classes, (count, *rest), generator=torch.Generator().manual_seed(seed))
    labels[labels == classes - 1] = -100
    axis = -1 if last else 1
    found = classified(*(x if last else x.movedim(-1, 1) for x in (old, new)), labels, size=size, axis=axis)
    known = (labels != -100).numpy()
    assert found["labelled"] == known.sum()
    for logits, top1, top5 in ((old, "before", "top5_before"), (new, "after", "top5_after")):
        ranked = logits.numpy().argsort(-1)[..., ::-1]
        right = ranked == labels.numpy()[..., None]
        share = [right[known][:, :k].any(-1).mean() if known.any() else None for k in (1, 5)]
        assert found[top1] == (None if share[0] is None else pytest.approx(share[0]))
        assert found[top5] == (None if share[1] is None or classes <= 5 else pytest.approx(share[1]))
    changed = old.argmax(-1) != new.argmax(-1)
    assert found["flips"] == int(changed.sum())
    assert len(found["flipped"]) == min(20, found["flips"])


def test_without_labels_there_are_flips_alone() -> None:
    found = classified(rows(5, 3), -rows(5, 3))
    assert found["before"] is None and found["after"] is None and found["flips"] == 5


def test_equal_logits_are_no_flip() -> None:
    tied = torch.zeros(4, 7)
    found = classified(tied, tied.clone(), torch.zeros(4, dtype=torch.long), truth=never)
    assert (found["flips"], found["undecided"], found["smallest_margin"]) == (0, 4, 0.0)
    assert found["before"] == found["after"] == 1


def test_a_class_alone_has_none_to_be_mistaken_for() -> None:
    found = classified(rows(4, 1), rows(4, 1, seed=1), torch.zeros(4, dtype=torch.long), noise=1.0, truth=never)
    assert (found["flips"], found["undecided"], found["smallest_margin"]) == (0, 0, math.inf)
    assert classified(rows(4, 2), rows(4, 2), noise=1.0)["undecided"] == 4


def test_a_flip_is_measured_in_the_noise_of_its_two_logits() -> None:
    """A masked class, or one that is noisy by itself, excuses no other."""
    old, new = torch.tensor([[1.0, 0.0, -1e9]]), torch.tensor([[0.0, 1.0, -1e9]])
    found = Classification("out", 1, 64.0)
    found.add(old, new, None, (), torch.tensor([1e-7, 1e-7, 60.0], dtype=torch.float64), 0, lambda: None)
    assert found.result()["far_flips"] == 1


def test_a_flip_is_measured_in_noise() -> None:
    old = torch.tensor([[1.0, 0.9, 0.0], [1.0, 0.0, 0.0], [5.0, 0.0, 0.0]])
    new = torch.tensor([[0.9, 1.0, 0.0], [0.0, 0.0, 2.0], [5.0, 0.0, 0.0]])
    found = classified(old, new, noise=0.01, near=20)
    assert (found["flips"], found["far_flips"]) == (2, 1)
    first, second = found["flipped"]
    assert (first.sample, first.before, first.after) == (1, 0, 2) and first.units == pytest.approx(100)
    assert (second.sample, second.before, second.after) == (0, 0, 1) and second.units == pytest.approx(10)
    assert second.margin == pytest.approx(0.1)
    # Where float64 shows that these logits are worse than usual, less speaks against the flip.
    assert classified(old, new, noise=0.01, near=20, truth=lambda: torch.full((3, 3), 0.1))["far_flips"] == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_flip_by_nan_is_far(bad: float) -> None:
    old, new = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, bad]])
    assert classified(old, new, noise=1e-7)["far_flips"] == 1


def test_samples_within_the_noise_are_undecided() -> None:
    old = torch.tensor([[1.0, 0.9], [1.0, 0.0]])
    assert classified(old, old, noise=0.01, near=20)["undecided"] == 1
    assert classified(old, old, noise=0.001, near=20)["undecided"] == 0


def test_void_pixels_count_for_nothing() -> None:
    old, labels = torch.zeros(2, 3, 2), torch.tensor([[0, 255], [1, -100]])
    old[:, 0] = 1
    found = classified(old, old, labels, ignored=(-100, 255))
    assert (found["labelled"], found["before"]) == (2, 0.5)


def test_the_furthest_flips_are_told() -> None:
    margins = torch.arange(1.0, 101)
    old, new = torch.stack([margins, torch.zeros(100)], 1), torch.stack([torch.zeros(100), margins], 1)
    found = classified(old, new, noise=1.0, size=7)
    assert [flip.sample for flip in found["flipped"]] == list(range(99, 79, -1))


# -- targets -----------------------------------------------------------------------------------------------------------


def test_regression_errors() -> None:
    found = Regression("out")
    found.add(torch.zeros(2, 1), torch.ones(2, 1), torch.tensor([3.0, 4.0]))
    found.add(torch.zeros(1, 1), torch.ones(1, 1), torch.tensor([[0.0]]))
    fit = found.result()
    assert fit.rmse_before == pytest.approx(math.sqrt(25 / 3)) and fit.rmse_after == pytest.approx(math.sqrt(14 / 3))
    assert fit.mae_before == pytest.approx(7 / 3) and fit.mae_after == pytest.approx(2)
