"""The inputs that the gate runs: reproducible, at every size that is claimed, like the example or from real data."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import bnfold
from bnfold.gate.samples import MIN_SAMPLES, Batch, batches
from bnfold.graph.capture import Captured, capture


class Anything(nn.Module):
    def forward(self, x: Tensor, ids: Tensor | None = None) -> Tensor:
        return x * 2 if ids is None else x * ids.sum()


CAPTURES: dict[str, tuple[tuple[Tensor, ...], Any, bool]] = {
    "batch": ((torch.randn(2, 3),), None, False),
    "static": ((torch.randn(4, 3),), None, True),
    "up to 5": ((torch.randn(2, 3),), ({0: Dim("n", max=5)},), False),
    "image": (
        (torch.randn(2, 3, 16, 16),),
        ({0: Dim("n"), 2: Dim("h", min=4, max=100), 3: Dim("w", min=4, max=100)},),
        False,
    ),
    "free image": ((torch.randn(2, 3, 16, 16),), ({0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO},), False),
    "eights": ((torch.randn(2, 3, 16),), ({0: Dim("n"), 2: 8 * Dim("h")},), False),
    "two": ((torch.randn(2, 3), torch.tensor([[3, 9], [5, 4]])), None, False),
    "shared axis": ((torch.randn(2, 6), torch.ones(2, 6)), ({0: Dim("n"), 1: Dim("t")},) * 2, False),
}  # fmt: skip


@cache
def captured(name: str) -> Captured:
    args, shapes, static = CAPTURES[name]
    return capture(Anything(), args, dynamic_shapes=shapes, static=static)


def made(name: str, **options: Any) -> list[Batch]:
    c = captured(name)
    return batches(c.program, c.names, c.flat, sizes=c.sizes, **options)


def shapes(name: str, **options: Any) -> list[tuple[int, ...]]:
    return [tuple(batch.flat[0].shape) for batch in made(name, **options)]


@pytest.mark.parametrize("name", CAPTURES)
def test_the_same_seed_gives_the_same_inputs(name: str) -> None:
    first, second, other = made(name), made(name), made(name, seed=1)
    same = [torch.equal(a, b) for x, y in zip(first, second) for a, b in zip(x.flat, y.flat)]
    assert all(same) and not torch.equal(first[0].flat[0], other[0].flat[0])
    assert not any(torch.equal(a.flat[0], b.flat[0]) for a, b in pairwise(first))


SIZES = [
    ("batch", {}, [1, 2, 7, 6]),
    ("batch", {"samples": 12}, [1, 2, 7, 2]),
    ("batch", {"samples": 1}, [1, 2, 7]),
    ("up to 5", {}, [1, 2, 5, 5, 3]),
    ("static", {"samples": 1}, [4] * MIN_SAMPLES),
    ("static", {"samples": 12}, [4] * 12),
]


@pytest.mark.parametrize(("name", "options", "sizes"), SIZES)
def test_batch_sizes(name: str, options: dict[str, int], sizes: list[int]) -> None:
    plain = [batch for batch in made(name, **options) if not batch.origin]
    assert [batch.flat[0].shape[0] for batch in plain] == sizes
    assert sum(batch.samples for batch in plain) >= max(MIN_SAMPLES, options.get("samples", 10))
    assert all(batch.size == (0 if name == "static" else n) for batch, n in zip(plain, sizes))


@pytest.mark.parametrize("dear", [False, True])
def test_what_provokes_is_among_the_inputs(dear: bool) -> None:
    """What a file may decide on: every condition holds for some batch, and its opposite for another."""
    c = captured("free image")
    images = [b.flat[0] for b in batches(c.program, c.names, c.flat, sizes=c.sizes, dear=dear)]
    conditions: dict[str, Callable[[Tensor], bool]] = {
        "an exact zero": lambda x: bool((x == 0).any()), "no negative": lambda x: bool((x >= 0).all()),
        "bytes": lambda x: float(x.max()) > 100, "all small": lambda x: float(x.abs().max()) < 0.3,
        "constant in a channel": lambda x: bool((x == x[..., :1, :1]).flatten(1).all(1).any()),
        "zeros and ones": lambda x: bool(((x == 0) | (x == 1)).flatten(1).all(1).any()),
        "far out": lambda x: bool((x.abs().flatten(1).amax(1) > 8 * x.flatten(1).std(1)).any()),
        "no multiple of two": lambda x: bool(x.shape[2] % 2), "one": lambda x: len(x) == 1,
        "three": lambda x: len(x) == 3,
    }  # fmt: skip
    assert {name for name, holds in conditions.items() if not any(map(holds, images))} == set()
    assert {name for name, holds in conditions.items() if all(map(holds, images))} == set()
    assert max(map(len, images)) == (3 if dear else 33)


def test_every_size_of_a_declared_range_is_tried_and_none_beyond() -> None:
    sizes = [shape[2:] for shape in shapes("image")]
    odd = {(17, 19), (19, 29)}  # multiples of nothing
    assert set(sizes) == {(16, 16), (32, 32), (8, 32), (24, 8), (4, 4), (100, 100), *odd}
    assert any(h != w for h, w in sizes)  # or a swap of the two would go unseen


def test_sizes_without_a_range_are_tried_around_the_example() -> None:
    assert {shape[2:] for shape in shapes("free image")} == {
        (16, 16), (17, 19), (19, 29), (32, 32), (8, 32), (24, 8)
    }  # fmt: skip


def test_a_multiple_of_a_dimension_stays_one() -> None:
    sizes = {shape[2] for shape in shapes("eights")}
    assert sizes == {16, 24, 32, 40}


def test_inputs_that_share_an_axis_agree() -> None:
    for batch in made("shared axis"):
        assert batch.flat[0].shape == batch.flat[1].shape


def test_floats_have_the_examples_spread_at_more_than_one_scale() -> None:
    c = capture(Anything(), (5 + 3 * torch.randn(2, 4000),))
    rows = torch.cat([b.flat[0] for b in batches(c.program, c.names, c.flat) if not b.origin])
    assert rows.mean(1).tolist() == pytest.approx([5] * 16, abs=1)
    spreads = rows.std(1) / c.flat[0].std()
    assert [round(float(s), 1) for s in sorted(spreads)[:1] + sorted(spreads)[-1:]] == [
        pytest.approx(0.25, abs=0.06),
        4.0,
    ]


def test_an_example_that_is_never_negative_gets_such_inputs() -> None:
    c = capture(Anything(), (torch.rand(2, 50),))
    assert all(bool((b.flat[0] >= 0).all()) for b in batches(c.program, c.names, c.flat))
    assert not all(bool((b.flat[0] >= 0).all()) for b in made("batch"))


def test_integers_and_booleans_lie_between_the_examples_extremes() -> None:
    ids = torch.cat([batch.flat[1] for batch in made("two")])
    assert ids.dtype == torch.int64 and set(ids.flatten().tolist()) == {3, 4, 5, 6, 7, 8, 9}
    c = capture(Anything(), (torch.randn(2, 3), torch.tensor([[True, False], [True, True]])))
    masks = torch.cat([batch.flat[1] for batch in batches(c.program, c.names, c.flat)])
    assert masks.dtype == torch.bool and masks.any() and not masks.all()


DATA = np.arange(9, dtype=np.float32)[:, None].repeat(3, 1)


def test_data_is_used_in_order_and_over_again() -> None:
    used = torch.cat([b.flat[0] for b in made("batch", data={"x": DATA}) if not b.origin])[:, 0].int().tolist()
    assert used == [i % 9 for i in range(16)]


def test_a_fixed_batch_takes_as_many_rows_as_it_has() -> None:
    used = [batch.flat[0][:, 0].int().tolist() for batch in made("static", data={"x": DATA})]
    assert used[:3] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 0, 1, 2]]


def test_data_does_not_keep_other_sizes_from_being_tried() -> None:
    data = {"x": np.random.default_rng(0).normal(size=(3, 3, 16, 16)).astype(np.float32)}
    found = made("image", data=data)
    assert {(16, 16), (17, 19), (19, 29)} <= {tuple(b.flat[0].shape[2:]) for b in found}
    assert torch.equal(found[2].flat[0][0, :, :16, :16], torch.from_numpy(data["x"][0]))


class Pooled(nn.Module):
    """Embeds, attends, pools over what the mask keeps, normalises."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.places = nn.Embedding(30, 8), nn.Embedding(16, 8)
        self.attention, self.norm = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.BatchNorm1d(8)
        self.norm.running_mean.normal_(), self.norm.running_var.uniform_(0.5, 2)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.table(ids) + self.places(torch.arange(ids.shape[1]))
        x = self.attention(x, src_key_padding_mask=mask == 0)
        return self.norm((x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


def test_a_text_model_with_a_lazy_example_is_judged_on_real_variety(tmp_path: Path) -> None:
    """Ids of zeros and a mask of ones: a file that ignores either must not pass."""
    args = (torch.zeros(2, 7, dtype=torch.int64), torch.ones(2, 7, dtype=torch.int64))
    assert bnfold.export(Pooled(), tmp_path / "net.onnx", args, device="cpu").passed

    class Blind(Pooled):
        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            return super().forward(
                ids if self.sees == "ids" else ids * 0, mask if self.sees == "mask" else mask * 0 + 1
            )

    for sees in ("ids", "mask"):
        blind = Blind()
        blind.sees = sees
        assert bnfold.check(tmp_path / "net.onnx", blind, args, device="cpu").verdict == "fail"


class Complex(nn.Module):
    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.gain = nn.Linear(4, 4), gain

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.real) + self.gain * x.imag


def test_complex_inputs_are_judged(tmp_path: Path) -> None:
    args = (torch.randn(3, 4, dtype=torch.complex64),)
    assert bnfold.export(Complex(), tmp_path / "net.onnx", args, device="cpu").passed
    assert bnfold.check(tmp_path / "net.onnx", Complex(), args, device="cpu").passed
    assert bnfold.check(tmp_path / "net.onnx", Complex(1.01), args, device="cpu").verdict == "fail"
