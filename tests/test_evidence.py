"""The arithmetic of the gate: every element has its own noise, and nothing hides behind anything larger."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bnfold.gate import evidence
from bnfold.gate.evidence import CHEAP, ELEMENT, STEPS, Draws, Row, Source, compare, pooled, specials, typical

UNIT = 2.0**-24


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def misfit(given: Tensor, truth: Tensor, noise: Tensor) -> float:
    ratio, worst, *_ = compare(given, truth, noise, unit=UNIT)
    return Row("", "", "", ratio, worst).misfit(4.0)


@pytest.mark.parametrize("shape", [(2, 1000), (1, 5), (3, 8, 16, 16), (2, 400, 6), (50_000,)])
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_errors_as_large_as_the_noise_pass_at_every_scale(shape: tuple[int, ...], scale: float) -> None:
    truth = normal(*shape) * scale
    drawn = torch.stack([normal(*shape, seed=seed) for seed in range(1, 17)])
    noise = 1e-7 * scale * drawn.square().mean(0).sqrt()
    assert misfit(truth + 1e-7 * scale * normal(*shape, seed=20), truth, noise) <= 1
    assert misfit(truth + 1e-6 * scale * normal(*shape, seed=20), truth, noise) > 1


@pytest.mark.parametrize("large", [1.0, 1e4, 1e9])
def test_one_wrong_element_is_seen_beside_any_other(large: float) -> None:
    truth = normal(4, 100, 50)
    truth[:, 99] = -large
    noise = 1e-7 * truth.abs().clamp(min=0.1)
    wrong = truth + noise * normal(4, 100, 50, seed=3)
    assert misfit(wrong, truth, noise) <= 1
    wrong[2, 7, 31] = truth[2, 7, 31] + 20 * noise[2, 7, 31]
    assert misfit(wrong, truth, noise) > 1
    assert compare(wrong, truth, noise, unit=UNIT)[2] == (2, 7, 31)


def test_elements_are_counted_by_the_doublings_of_their_noise() -> None:
    truth, noise = torch.full((1, 64), 1.0, dtype=torch.float64), torch.full((1, 64), 2.0**-10, dtype=torch.float64)
    off = truth.clone()
    off[0, :5] += 1.5 * 2.0**-10
    off[0, 5:7] += 3 * 2.0**-10
    off[0, 7] += 1e30
    off[0, 8] = torch.nan
    *_, counts = compare(off, truth, noise, unit=UNIT)
    assert counts[:3] == (55, 5, 2) and counts[-1] == 1 and len(counts) == 65 and sum(counts) == 63
    assert compare(truth, truth, noise, unit=UNIT)[-1] == (64,)


def test_closed_elements_have_the_noise_of_closed_ones() -> None:
    """A sigmoid from 1 down to 1e-20: one that is zero where it should be 1e-9 is a fault."""
    truth = torch.sigmoid(torch.linspace(-46, 10, 4000, dtype=torch.float64))[None]
    noise = 1e-6 * truth * (1 - truth)
    right = truth + noise * normal(1, 4000)
    assert misfit(right, truth, noise) <= 1
    wrong = right.clone()
    wrong[0, 1800] = 0.0
    assert misfit(wrong, truth, noise) > 1


def test_an_element_at_the_edge_of_a_relu_is_measured_by_its_neighbours() -> None:
    signal = normal(2, 4, 500)
    truth = signal.relu()
    noise = torch.where(truth > 0, 1e-7, 0.0)
    given = truth.clone()
    edge = int(signal[0, 0].where(signal[0, 0] < 0, -9.0).argmax())
    given[0, 0, edge] = 1e-8  # closed in truth, a little open here; no draw opened it
    assert misfit(given, truth, noise) <= 1
    given[0, 0, edge] = 1e-5
    assert misfit(given, truth, noise) > 1


def test_what_is_seen_once_is_pooled_wider_than_what_is_drawn() -> None:
    size = torch.linspace(1, 2, 4096, dtype=torch.float64)[None]
    steps = torch.where(torch.arange(4096) % 256 < 128, 0.0, 1e-7)[None].double()  # a kernel that errs in steps
    assert float(typical(steps, size).min()) == 0 and float(pooled(steps, size).min()) > 5e-8


@pytest.mark.parametrize("louder", [1.0, 8.0])
def test_noise_is_the_sum_of_what_all_sources_do(louder: float) -> None:
    truth = torch.zeros(3, dtype=torch.float64)
    seeds: dict[str, list[int]] = {"reference": [], "claim": []}

    def source(name: str, off: float) -> Source:
        moved = [truth + louder * off]
        return Source([truth], lambda seed: seeds[name].append(seed) or moved, louder)  # type: ignore[func-returns-value]

    draws, plan = Draws([source("reference", 3), source("claim", 4)]), STEPS if louder == 1 else CHEAP
    for step, (expected, counts) in enumerate(zip((3.0, 5.0 if louder == 1 else 3.0, 5.0, 5.0, 5.0), plan)):
        draws.more(step)
        assert draws.noise(0).tolist() == [expected] * 3
        assert tuple(map(len, seeds.values())) == counts
    assert seeds["reference"] == list(range(16))  # none twice
    few = Draws([source("reference", 3), Source([], lambda seed: [])])  # an output too few
    assert few.noise(0).tolist() == [0.0] * 3


def test_a_louder_draw_that_is_out_of_proportion_is_none() -> None:
    still = torch.full((7,), 8.0, dtype=torch.float64)

    def source(*values: Tensor, louder: float = 1.0, quiet: Source | None = None) -> Source:
        return Source([still] * len(values), lambda seed: [still + value for value in values], louder, quiet)

    off = torch.full_like(still, 0.5)
    quiet = source(off / 64, off / 32)
    draws = Draws([source(off, 2 * off, louder=16.0, quiet=quiet), source(off)])
    draws.more(0)
    assert draws.chaotic == {1}  # more than a sixteenth of itself
    assert draws.noise(0).tolist() == [0.5 / 64] * 7 and draws.noise(1).tolist() == [0.5 / 32] * 7
    begun = Draws([source(off, off, louder=16.0, quiet=quiet)], draws)
    begun.more(2)
    assert begun.chaotic == {1} and begun.noise(1).tolist() == [0.5 / 32] * 7
    fine = Draws([source(off, off, louder=16.0, quiet=quiet)])
    fine.more(0)
    assert not fine.chaotic and fine.noise(1).tolist() == [0.5 / 16] * 7


@pytest.mark.parametrize("draws", [1, 2, 4, 16])
def test_neighbours_say_what_noise_is_however_often_it_is_drawn(draws: int) -> None:
    """The median of so few draws is less than what they are draws of."""
    generator = torch.Generator().manual_seed(draws)
    noise = torch.randn(draws, 1, 1 << 16, generator=generator, dtype=torch.float64).square().mean(0).sqrt()
    found, quiet = typical(noise, torch.ones_like(noise), draws), noise < 0.8
    # 1 is what they are draws of; of two middle ones it is the lower, and of two orders the smaller.
    assert 0.9 < float(found[quiet].mean()) < 1.05
    assert float(typical(noise, torch.ones_like(noise))[quiet].mean()) < float(found[quiet].mean())


def test_a_channel_that_one_draw_left_still_has_the_noise_of_others_that_are_as_large() -> None:
    """One constant moves all of a channel, so that none of its own elements says so."""
    noise = torch.full((1, 40, 64), 1e-7, dtype=torch.float64)
    noise[:, 7] = 1e-12
    size = 1 + normal(1, 40, 64).abs()
    size[:, 8], noise[:, 8] = 1e-6, 1e-13  # what is small has small neighbours
    few, many = typical(noise, size, 1), typical(noise, size, 1000)
    assert float(few[0, 7].min()) > 5e-8 and float(many[0, 7].max()) < 1e-8
    assert float(few[0, 8].max()) < 1e-12 and float(typical(noise, size)[0, 7].max()) == 1e-12


def test_of_one_draw_the_elements_of_a_sample_are_each_others_neighbours_and_nobody_elses() -> None:
    """One sample may be moved thirty times as far as another one whose elements are as large."""
    loud = torch.tensor([1.0, 30.0, 1.0], dtype=torch.float64)[:, None]
    truth, noise = normal(3, 2000, seed=1), 1e-7 * loud * normal(3, 2000, seed=2)
    right = truth + 1e-7 * loud * normal(3, 2000, seed=3).clamp(-1.7, 1.7)
    wrong = right.clone()
    wrong[0, 5] = truth[0, 5] + 2e-6  # less than the loud sample is moved by

    def worst(given: Tensor, batched: bool) -> float:
        return compare(given, truth, noise.abs(), unit=UNIT, draws=1, batched=batched)[1]

    assert worst(right, True) < 6 < worst(right, False)
    assert worst(wrong, True) > 12


@pytest.mark.parametrize(
    ("given", "truth", "said"),
    [
        (torch.nan, 1.0, "NaN or infinite where the truth is finite"),
        (1.0, torch.inf, "finite where the truth"),
        (torch.nan, torch.inf, "another kind"),
        (-torch.inf, torch.inf, "another kind"),
    ],
)
def test_what_is_not_finite_must_be_the_same(given: float, truth: float, said: str) -> None:
    found = specials(torch.tensor([1.0, given]), torch.tensor([1.0, truth]))
    assert found is not None and said in found
    assert specials(torch.tensor([torch.nan, torch.inf]), torch.tensor([torch.nan, torch.inf])) is None


def test_a_row_fits_by_both_of_its_numbers() -> None:
    assert Row("", "", "", 4.0, 4.0 * ELEMENT).misfit(4.0) == 1 and Row("", "", "", 0.1, 60.0).misfit(4.0) == 10


def test_the_order_of_sizes_is_one_and_the_same_wherever_it_is_found() -> None:
    generator = torch.Generator().manual_seed(3)
    sizes = (
        torch.rand(3, 1001, generator=generator, dtype=torch.float64) * 10.0 ** torch.arange(-320, 300, 248)[:, None]
    )
    sizes[:, 5:17] = 0.25
    sizes[1, ::7] = 0.0
    order = evidence._by_size(sizes)
    coarse = sizes.float()
    assert torch.equal(order, torch.sort(coarse, dim=1, descending=True, stable=True).indices)
