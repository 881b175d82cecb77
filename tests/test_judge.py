"""The gate's arithmetic, against plain formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bnfold.gate.judge import Tally, epsilon, finite_problem, median, site_ratios

INF, NAN = float("inf"), float("nan")
EPS = epsilon(torch.float32)


def tally(candidate: Tensor, unfolded: Tensor, truth: Tensor, *, batched: bool = True, run: int = 0) -> Tally:
    made = Tally(EPS)
    made.add(candidate, unfolded, truth, batched=batched, run=run)
    return made


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("scale", [1.0, 100.0, 0.01])
@pytest.mark.parametrize("batched", [True, False])
def test_ratio_is_rms_over_rms(scale: float, batched: bool) -> None:
    truth = scale * values(4, 3, 5)
    own, candidate = truth + scale * 1e-4 * values(4, 3, 5, seed=1), truth + scale * 3e-4 * values(4, 3, 5, seed=2)
    rows = range(4) if batched else [slice(None)]
    expected = [math.sqrt(((candidate - truth)[i] ** 2).mean() / ((own - truth)[i] ** 2).mean()) for i in rows]
    made = tally(candidate, own, truth, batched=batched)
    assert made.ratios().tolist() == pytest.approx(expected, rel=1e-12)
    assert made.elements == 60
    relative = sorted(math.sqrt(((own - truth)[i] ** 2).mean() / (truth[i] ** 2).mean()) for i in rows)
    assert made.relative(made.noise) == pytest.approx(relative[len(relative) // 2], rel=1e-12)


def test_zero_noise_has_a_floor_of_an_ulp() -> None:
    truth = torch.ones(1, 4, dtype=torch.float64)
    assert tally(truth, truth, truth).ratios().item() == 0
    assert tally(truth * (1 + 2 * EPS), truth, truth).ratios().item() == pytest.approx(2)
    assert tally(truth * 1.01, truth, truth).ratios().item() > 1e4


def test_a_truth_of_zero_does_not_divide_by_zero() -> None:
    zero = torch.zeros(2, 3)
    assert tally(zero, zero, zero.double()).ratios().tolist() == [0, 0]
    assert bool((tally(zero + 1e-30, zero, zero.double()).ratios() > 1e6).all())


@pytest.mark.parametrize("spoilt", [0, 1, 2])
@pytest.mark.parametrize("special", [NAN, INF])
def test_what_is_not_finite_leaves_the_rest(spoilt: int, special: float) -> None:
    truth = values(2, 3)
    triple = [truth + 3e-4, truth + 1e-4, truth.clone()]
    triple[spoilt][0, 0] = special
    made = tally(*triple)
    assert made.elements == 5 and made.ratios().tolist() == pytest.approx([3, 3], rel=1e-9)


@pytest.mark.parametrize("spoilt", [0, 1, 2])
def test_a_sample_without_finite_elements_does_not_count_as_right(spoilt: int) -> None:
    truth = values(3, 4)
    triple = [truth + 9.0, truth + 1e-4, truth.clone()]
    triple[spoilt][:2] = NAN
    made = tally(*triple)
    assert len(made.ratios()) == 1 and median(made.ratios()) > 1e4 and made.runs == [0]
    triple[spoilt][:] = NAN
    assert tally(*triple).elements == 0 and len(tally(*triple).ratios()) == 0


def test_the_median_takes_the_worse_of_two() -> None:
    assert median(torch.tensor([1.0, 100.0])) == 100
    assert median(torch.tensor([3.0, 1.0, 2.0])) == 2
    assert math.isnan(median(torch.tensor([1.0, NAN, 2.0])))


def test_runs_are_kept_apart() -> None:
    made = Tally(EPS)
    for run, (rows, error) in enumerate([(1, 1e-4), (7, 1e-4), (2, 1e-1)]):
        truth = torch.ones(rows, 8, dtype=torch.float64)
        made.add(truth + error, truth + 1e-4, truth, batched=True, run=run)
    assert made.per_run() == pytest.approx({0: 1, 1: 1, 2: 1000}, rel=1e-6)
    assert median(made.ratios()) == pytest.approx(1)


def test_a_sample_of_no_noise_is_no_outlier_but_a_wrong_one_is() -> None:
    truth = torch.ones(8, 4, dtype=torch.float64)
    own, candidate = truth + 1e-4, truth + 1e-4
    own[0] = truth[0]
    candidate[1] = 2
    made = tally(candidate, own, truth)
    assert made.ratios()[0] > 500 and made.ratios(steady=True).tolist() == pytest.approx([1, 1e4, *[1] * 6], rel=1e-3)


def test_epsilon_gives_float64_room_since_it_is_its_own_truth() -> None:
    assert epsilon(torch.float16) == 2**-10 and epsilon(torch.bfloat16) == 2**-7 and EPS == 2**-23
    assert epsilon(torch.float64) == 2**-42


# -- fold sites --------------------------------------------------------------------------------------------------------

CHANNELS = [
    ((4, 16, 6, 6), 1),
    ((4, 16), 1),
    ((4, 9, 16), 2),
    ((4, 16, 9), 1),
    ((4, 6, 6, 16), 3),
    ((2, 16, 3, 3, 3), 1),
]


@pytest.mark.parametrize(("shape", "axis"), CHANNELS, ids=str)
def test_one_wrong_channel_stands_out(shape: tuple[int, ...], axis: int) -> None:
    truth = values(*shape)
    own, candidate = truth + 1e-6 * values(*shape, seed=1), truth + 1e-6 * values(*shape, seed=2)
    ratio, channel = site_ratios(candidate, own, truth, EPS)
    assert ratio == pytest.approx(1, abs=0.35) and channel < 3
    candidate.select(axis, 5).add_(1e-4)
    off, noise = candidate - truth, own - truth
    expected = math.sqrt(off.select(axis, 5).square().mean() / noise.select(axis, 5).square().mean())
    assert site_ratios(candidate, own, truth, EPS)[1] >= expected * (1 - 1e-12)
    assert site_ratios(candidate, own, truth, EPS)[0] == pytest.approx(off.norm().item() / noise.norm().item())


def test_rounded_constants_are_noise_too() -> None:
    truth = values(4, 8)
    own, rounding, candidate = truth + 3e-6, torch.full_like(truth, 4e-6), truth + 1e-5
    assert site_ratios(candidate, own, truth, EPS)[0] == pytest.approx(10 / 3)
    assert site_ratios(candidate, own, truth, EPS, rounding)[0] == pytest.approx(2)


@pytest.mark.parametrize("wrong", [1e-6, 1e-3])
def test_a_channel_of_one_number_that_happens_to_be_exact_is_no_measure(wrong: float) -> None:
    """Behind a pool each channel is one number per sample, and the noise of one in a thousand is next to nothing."""
    truth = values(1, 1000)
    own, candidate = truth + 1e-6 * values(1, 1000, seed=1), truth + 1e-6 * values(1, 1000, seed=2)
    rounding = torch.full_like(truth, 3e-7)
    own[0, 5], candidate[0, 5], rounding[0, 5] = truth[0, 5], truth[0, 5] + wrong, 1e-7
    assert site_ratios(candidate, own, truth, EPS)[1] > 1
    channel = site_ratios(candidate, own, truth, EPS, rounding)[1]
    assert channel < 16 if wrong == 1e-6 else channel > 1000


SPECIALS = [
    ("candidate", NAN, INF),
    ("candidate", INF, INF),
    ("truth", NAN, INF),
    ("truth", INF, INF),
    ("both", INF, 1.0),
    ("both", -INF, 1.0),
    ("unfolded", INF, 1.0),
    ("unfolded", NAN, 1.0),
]


@pytest.mark.parametrize(("where", "special", "expected"), SPECIALS)
def test_specials_at_a_site(where: str, special: float, expected: float) -> None:
    truth = values(4, 8)
    own, candidate = truth + 1e-6, truth + 1e-6
    for name, tensor in (("candidate", candidate), ("truth", truth), ("unfolded", own)):
        if where in (name, "both"):
            tensor[1, 2] = special
    assert site_ratios(candidate, own, truth, EPS)[0] == pytest.approx(expected, rel=1e-3)


def test_an_overflow_of_the_unfolded_model_hides_no_fault() -> None:
    truth = values(4, 8)
    own, candidate = truth + 1e-6, truth + 1e-2
    own[0, 0] = INF
    assert site_ratios(candidate, own, truth, EPS)[0] > 1e3
    assert site_ratios(candidate, own * INF, truth, EPS) == (INF, INF)


FINITE = [
    ([1.0, NAN], [1.0, 2.0], "1 of 2 elements are NaN or infinite where the truth is finite"),
    ([1.0, INF], [1.0, 2.0], "1 of 2 elements are NaN or infinite where the truth is finite"),
    ([1.0, 2.0], [1.0, NAN], "1 of 2 elements are finite where the truth is NaN or infinite"),
    ([INF, 2.0], [-INF, 2.0], "another kind"),
    ([NAN, 2.0], [INF, 2.0], "another kind"),
    ([INF, NAN], [INF, NAN], None),
    ([1.0, 2.0], [3.0, 4.0], None),
]


@pytest.mark.parametrize(("candidate", "truth", "expected"), FINITE)
def test_finite_problem(candidate: list[float], truth: list[float], expected: str | None) -> None:
    found = finite_problem(torch.tensor(candidate), torch.tensor(truth, dtype=torch.float64))
    assert found is expected or (found is not None and expected is not None and expected in found)
    assert finite_problem(torch.tensor([1, 2]), torch.tensor([1, 2])) is None
