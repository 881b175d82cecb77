"""Random values for one input: legal where the graph says what is, masks as masks, floats like the example."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import Dim

from bnfold.gate.draw import GUESSED, MASKED, draw, index_limits, is_mask
from bnfold.gate.samples import batches
from bnfold.graph.capture import capture

torch.set_num_threads(1)


class Reads(nn.Module):
    """A table of 20 rows and one of 9, read as ``read`` says."""

    def __init__(self, read: Callable[..., Tensor]) -> None:
        super().__init__()
        self.table, self.other, self.read = nn.Embedding(20, 4), nn.Embedding(9, 4), read

    def forward(self, ids: Tensor, x: Tensor | None = None) -> Tensor:
        return self.read(self, ids) if x is None else self.read(self, ids, x)


def made(read: Callable[..., Tensor], ids: Tensor, x: Tensor | None = None, shapes: Any = None) -> list[Tensor]:
    """The integer inputs of every run; every one of them must be legal."""
    c = capture(Reads(read), (ids,) if x is None else (ids, x), dynamic_shapes=shapes)
    found = batches(c.program, c.names, c.flat, samples=40, sizes=c.sizes)
    for batch in found:
        c.run_eager(batch.flat)
    return [batch.flat[0] for batch in found]


ONES = torch.ones(2, 5, dtype=torch.int64)
READS: dict[str, tuple[Callable[..., Tensor], int]] = {
    "embedding": (lambda m, ids: m.table(ids), 20),
    "behind a view and a cast": (lambda m, ids: m.table(ids.int().reshape(-1)), 20),
    "two tables": (lambda m, ids: m.table(ids) + m.other(ids), 9),
    "an offset": (lambda m, ids: m.other(ids + 3), 6),
    "a negative offset": (lambda m, ids: m.other(ids - 1), 10),
    "index_select": (lambda m, ids: m.table.weight.index_select(1, ids[0].clamp(max=1)) + m.other(ids[0]).sum(), 9),
    "advanced index": (lambda m, ids: m.other.weight[ids], 9),
    "one_hot": (lambda m, ids: nn.functional.one_hot(ids, 7).float(), 7),
    "embedding_bag": (lambda m, ids: nn.functional.embedding_bag(ids, m.other.weight), 9),
}


@pytest.mark.parametrize("name", READS)
def test_indices_cover_the_table_and_stay_inside(name: str) -> None:
    read, rows = READS[name]
    low = 1 if name == "a negative offset" else 0
    found = torch.cat([ids.flatten() for ids in made(read, ONES)])
    assert set(found.tolist()) == set(range(low, rows)), "a constant example must not keep the input constant"


def test_the_first_run_keeps_to_the_values_of_the_example() -> None:
    first, *others = made(READS["embedding"][0], torch.tensor([[3, 9], [5, 4]]))
    assert int(first.min()) >= 3 and int(first.max()) <= 9 and max(int(ids.max()) for ids in others) == 19


def test_indices_into_a_dynamic_axis_follow_its_size() -> None:
    shapes = {"ids": {0: Dim("n")}, "x": {0: Dim("n"), 1: Dim("t", min=2, max=64)}}
    x = torch.randn(2, 16, 3)
    found = made(
        lambda m, ids, x: x.gather(1, ids[:, :, None].expand(-1, -1, 3)), torch.tensor([[0, 15]] * 2), x, shapes
    )
    assert {int(ids.max()) for ids in found} >= {1, 15} and max(int(ids.max()) for ids in found) > 31


def test_what_indexes_nothing_has_no_limits() -> None:
    c = capture(Reads(lambda m, ids: ids * 2.0 + m.table.weight.sum()), (ONES,))
    (node,) = [n for n in c.program.graph.nodes if n.name == "ids"]
    assert index_limits(node) == []


# -- masks -------------------------------------------------------------------------------------------------------------

CAUSAL = torch.full((4, 4), float("-inf")).triu(1)
MASKS: dict[str, tuple[Tensor, bool]] = {
    "all ones": (torch.ones(2, 6, dtype=torch.int64), True),
    "all zeros": (torch.zeros(2, 6, dtype=torch.int64), True),
    "all true": (torch.ones(2, 6, dtype=torch.bool), True),
    "padded": (torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]), True),
    "padded at the left": (torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]), True),
    "key padding": (torch.zeros(2, 6, dtype=torch.bool), True),
    "causal": (CAUSAL, True),
    "additive": (torch.zeros(2, 1, 1, 5).masked_fill(torch.arange(5) > 3, torch.finfo(torch.float32).min), True),
    "causal booleans": (torch.ones(4, 4, dtype=torch.bool).tril(), True),
    "scattered": (torch.tensor([[True, False, True, False]] * 2), False),
    "token ids": (torch.tensor([[1, 2, 0]] * 2), False),
    "a flag for each sample": (torch.tensor([True, True]), False),
    "an image": (torch.ones(2, 3, 3, dtype=torch.uint8), False),
    "floats": (torch.zeros(2, 3), False),
    "many large floats": (torch.tensor([[-1e5, 0, 3]]), False),
    "nothing": (torch.zeros(2, 0), False),
}  # fmt: skip


@pytest.mark.parametrize("name", MASKS)
def test_masks_are_told_from_other_inputs(name: str) -> None:
    leaf, expected = MASKS[name]
    assert is_mask(leaf) is expected


@pytest.mark.parametrize("name", [name for name, (_, mask) in MASKS.items() if mask])
def test_masks_stay_masks_at_every_size(name: str) -> None:
    leaf, _ = MASKS[name]
    generator = torch.Generator().manual_seed(0)
    seen = set(leaf.unique().tolist())
    for run in range(8):
        shape = tuple(3 + run if n > 2 else n for n in leaf.shape)
        value = draw(shape, leaf, generator, None, run)
        assert value.dtype == leaf.dtype and value.shape == shape
        assert bool(((value[..., 1:] != value[..., :-1]).sum(-1) <= 2).all())  # padding at both ends at most
        if leaf.dtype.is_floating_point:
            assert (value > MASKED).any(-1).all(), "a softmax over nothing is NaN"
        seen |= set(value.unique().tolist())
    assert len(seen) == 2


def test_an_attention_mask_of_ones_loses_the_ends_of_some_rows() -> None:
    leaf = torch.ones(8, 12, dtype=torch.int64)
    first, *others = (draw((8, 12), leaf, torch.Generator().manual_seed(1), None, run) for run in range(3))
    assert torch.equal(first, leaf)
    for value in others:
        assert (value[:, 0] == 1).all() and bool((value.diff(dim=1) <= 0).all())
        assert 0 < (value.amin(1) == 0).sum() < 8, "some rows lose their end, some do not"


def test_a_causal_mask_stays_causal() -> None:
    for run in range(4):
        value = draw((4, 4), CAUSAL, torch.Generator().manual_seed(0), None, run)
        assert bool(value[CAUSAL < 0].isneginf().all()) and (value[:, 0] == 0).all()


# -- constants, images, floats -----------------------------------------------------------------------------------------


def drawn(leaf: Tensor, run: int = 0, shape: tuple[int, ...] | None = None, seed: int = 0) -> Tensor:
    return draw(shape or tuple(leaf.shape), leaf, torch.Generator().manual_seed(seed), None, run)


@pytest.mark.parametrize(("example", "values"), [(5, {1, 2, 3, 4, 5}), (1, {0, 1}), (0, {0, 1}), (-2, {-2, -1})])
def test_unknown_constants_are_varied_on_few_runs(example: int, values: set[int]) -> None:
    leaf = torch.full((200,), example)
    runs = {run: set(drawn(leaf, run).tolist()) for run in range(2 * GUESSED)}
    assert {run for run, found in runs.items() if found != {example}} == {1, 1 + GUESSED}
    assert runs[1] == values


def test_an_image_of_zeros_in_bytes_gets_every_byte() -> None:
    value = drawn(torch.zeros(1, 3, 40, 40, dtype=torch.uint8))
    assert value.dtype == torch.uint8 and len(value.unique()) == 256
    assert set(drawn(torch.tensor([[[7, 9]]], dtype=torch.uint8), 1, (1, 1, 50)).flatten().tolist()) == {7, 8, 9}


@pytest.mark.parametrize("leaf", [torch.tensor(2.5), torch.full((3, 4), 2.5), torch.tensor([2.5])], ids=str)
def test_a_constant_keeps_its_sign_and_varies(leaf: Tensor) -> None:
    values = torch.stack([drawn(leaf, run, seed=run) for run in range(20)])
    assert (values > 0).all() and values.shape[1:] == leaf.shape and len(values.unique()) > 10
    assert (drawn(-leaf) < 0).all()


def test_zeros_stand_for_anything() -> None:
    value = drawn(torch.zeros(1000))
    assert value.std() == pytest.approx(1, abs=0.1) and value.mean() == pytest.approx(0, abs=0.2)
    assert drawn(torch.tensor(0.0)).shape == ()


def test_a_strictly_positive_example_never_gets_a_zero() -> None:
    leaf = 0.5 + torch.rand(2, 500)
    assert all(float(drawn(leaf, run).min()) >= float(leaf.min()) / 4 - 1e-6 for run in range(8))


def test_infinities_do_not_spoil_the_rest() -> None:
    value = drawn(torch.tensor([[1.0, float("inf"), 3.0]]), shape=(1, 1000))
    assert value.isfinite().all() and value.mean() == pytest.approx(2, abs=0.3)


def test_complex_inputs_vary_in_both_parts() -> None:
    value = drawn(torch.randn(2, 300, dtype=torch.complex64))
    assert value.dtype == torch.complex64 and value.shape == (2, 300)
    assert value.real.std() > 0.3 and value.imag.std() > 0.3 and not torch.equal(value.real, value.imag)


DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8, torch.bool]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3), st.integers(-3, 3), st.integers(0, 9),
    st.integers(0, 3),
)  # fmt: skip
def test_whatever_the_example_is_the_shape_and_the_dtype_are_right(
    dtype: torch.dtype, shape: list[int], value: int, run: int, more: int
) -> None:
    leaf = torch.full(shape, value).to(dtype)
    wanted = tuple(n + more if n else n for n in shape)
    found = draw(wanted, leaf, torch.Generator().manual_seed(0), 0 if wanted else None, run)
    assert found.shape == wanted and found.dtype == dtype
    assert torch.equal(found, draw(wanted, leaf, torch.Generator().manual_seed(0), 0 if wanted else None, run))
