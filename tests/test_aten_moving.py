"""Rows that move elements: an affine after them goes into what is before, one before them into what is after."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from checker import build, fold_exactly, noise, operators
from torch import Tensor, nn

import bnfold

ops = torch.ops.aten
IMAGE = (2, 4, 5, 6)
SEQUENCE = (2, 4, 5)
VOLUME = (2, 4, 3, 4, 5)


@dataclass
class Move:
    """``run`` moves the elements of a value of ``shape``, whose channels (axis 1) end up along ``axis``."""

    row: str
    run: Callable[[Tensor], Tensor]
    axis: int = 1
    shape: tuple[int, ...] = IMAGE
    #: It makes up zeros, which no shift reaches.
    zeros: bool = False
    dynamic: bool = True


ORDER = torch.tensor([2, 0, 3, 1])


def halves(x: Tensor) -> Tensor:
    return x.chunk(2, 1)[0]


MOVES = [
    # shape alone
    Move("view", lambda x: x.view(x.shape[0], 4, 30)),
    Move("view", lambda x: x.view(-1, 2, 2, 5, 6).transpose(1, 2).reshape(-1, 4, 5, 6)),
    Move("view", lambda x: x.view(x.shape[0], -1)),
    Move("reshape", lambda x: x.reshape(-1, 4, 5 * 6)),
    Move("reshape", lambda x: x.permute(0, 2, 3, 1).reshape(-1, 4)),
    Move("reshape", lambda x: x.reshape(x.shape[0], 2, -1, 5, 6).permute(0, 3, 2, 1, 4).reshape(-1, 5, 4, 6), 2),
    Move("_unsafe_view", lambda x: ops._unsafe_view(x, [x.shape[0], 4, 30])),
    Move("flatten", lambda x: x.flatten(1)),
    Move("flatten", lambda x: x.flatten(-2)),
    Move("flatten", lambda x: x.transpose(1, 2).flatten(0, 1), shape=SEQUENCE),
    Move("unflatten", lambda x: x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)),
    Move("unflatten", lambda x: x.unflatten(-1, (2, 3))),
    Move("view_as", lambda x: x.view_as(torch.zeros_like(x).flatten(2))),
    Move("reshape_as", lambda x: x.reshape_as(torch.zeros_like(x).flatten(2))),
    Move("ravel", lambda x: x.ravel(), 0, dynamic=False),
    Move("squeeze", lambda x: x.mean((2, 3), keepdim=True).squeeze(-1).squeeze(), dynamic=False),
    Move("squeeze", lambda x: x[:, :, :1, :1].squeeze((2, -1))),
    Move("unsqueeze", lambda x: x.unsqueeze(1), 2),
    Move("unsqueeze", lambda x: x.unsqueeze(-1), 1),
    # order of the axes
    Move("permute", lambda x: x.permute(0, 2, 3, 1), 3),
    Move("permute", lambda x: x.permute(1, -1, 0, 2), 0),
    Move("transpose", lambda x: x.transpose(1, 2), 2),
    Move("transpose", lambda x: x.transpose(-1, 1), -1),
    Move("t", lambda x: x.t(), 0, (2, 4)),
    Move("swapaxes", lambda x: x.swapaxes(1, -1), 3),
    Move("swapdims", lambda x: x.swapdims(0, 1), 0),
    Move("movedim", lambda x: x.movedim(1, -1), -1),
    Move("movedim", lambda x: x.movedim((1, 2), (3, 1)), 3),
    Move("moveaxis", lambda x: torch.moveaxis(x, -1, 1), 2),
    Move("numpy_T", lambda x: x.T, 0, (2, 4)),
    Move("mT", lambda x: x.mT, 2, SEQUENCE),
    Move("adjoint", lambda x: x.adjoint(), 2, SEQUENCE),
    # copies
    Move("expand", lambda x: x.unsqueeze(2).expand(-1, -1, 3, -1), 1, SEQUENCE),
    Move("expand", lambda x: x.unsqueeze(2).expand(-1, 4, 3, 5).flatten(1, 2), 1, SEQUENCE),
    Move("expand_as", lambda x: x[:, :, :1].expand_as(x)),
    Move("repeat", lambda x: x.repeat(1, 2, 1, 3)),
    Move("repeat", lambda x: x.repeat(2, 1, 1, 1, 1), 2),
    Move("repeat_interleave", lambda x: x.repeat_interleave(3, 1)),
    Move("repeat_interleave", lambda x: x.repeat_interleave(2, -1)),
    Move("tile", lambda x: x.tile(2, 1, 1)),
    Move("broadcast_to", lambda x: x.unsqueeze(1).broadcast_to(x.shape[0], 2, 4, 5), 2, SEQUENCE),
    # parts
    Move("slice", lambda x: x[:, 1:]),
    Move("slice", lambda x: x[:, ::2, 1:-1, -3:]),
    Move("slice", lambda x: x[..., 1::2, :]),
    Move("select", lambda x: x[:, :, -1]),
    Move("select", lambda x: x.select(-1, 2)),
    Move("narrow", lambda x: x.narrow(1, 1, 2)),
    Move("split", lambda x: torch.cat(x.split(2, 1)[::-1], 1)),
    Move("split", lambda x: x.split(3, 1)[1]),
    Move("split_with_sizes", lambda x: x.split([1, 3], 1)[1]),
    Move("split_with_sizes", lambda x: torch.cat(x.split([2, 4], -1)[::-1], 3)),
    Move("chunk", lambda x: torch.stack(x.chunk(2, 1), 1).flatten(1, 2)),
    Move("unbind", lambda x: torch.stack(x.unbind(1)[::-1], 1)),
    Move("unbind", lambda x: x.unbind(-1)[2]),
    Move("tensor_split", lambda x: x.tensor_split(3, 1)[0]),
    Move("tensor_split", lambda x: x.tensor_split((1, 3), 1)[1]),
    Move("unsafe_split", lambda x: x.unsafe_split(2, 1)[1]),
    Move("unsafe_chunk", lambda x: x.unsafe_chunk(2, 1)[0]),
    # put together
    Move("cat", lambda x: torch.cat([x, x.flip(1)], 1)),
    Move("cat", lambda x: torch.cat([x, x], -1)),
    Move("cat", lambda x: torch.cat([x, x[:, :, 1:]], 2)),
    Move("cat", lambda x: torch.cat([x, x], 0)),
    Move("concat", lambda x: torch.concat([halves(x), halves(x)], 1)),
    Move("concatenate", lambda x: torch.concatenate([x, halves(x)], 1)),
    Move("stack", lambda x: torch.stack([x, x], 1), 2),
    Move("stack", lambda x: torch.stack([x, x.flip(2)], -1), 1),
    Move("stack", lambda x: torch.stack([x, x], 0), 2),
    Move("hstack", lambda x: torch.hstack([x, halves(x)])),
    Move("vstack", lambda x: torch.vstack([x, x])),
    # order of the elements
    Move("flip", lambda x: x.flip(1)),
    Move("flip", lambda x: x.flip((2, -1))),
    Move("roll", lambda x: x.roll(1, 1)),
    Move("roll", lambda x: x.roll((1, -2), (2, 3))),
    Move("rot90", lambda x: x.rot90(1, (2, 3))),
    Move("rot90", lambda x: x.rot90(1, (1, 2)), 2),
    Move("pixel_shuffle", lambda x: F.pixel_shuffle(x.repeat_interleave(4, 1), 2)),
    Move("pixel_unshuffle", lambda x: F.pixel_unshuffle(x, 2), shape=(2, 4, 4, 6)),
    Move("channel_shuffle", lambda x: F.channel_shuffle(x, 2)),
    Move("native_channel_shuffle", lambda x: F.native_channel_shuffle(x, 2), dynamic=False),
    Move("index_select", lambda x: x.index_select(1, ORDER)),
    Move("index_select", lambda x: x.index_select(-1, ORDER[:2])),
    Move("index", lambda x: x[:, ORDER]),
    Move("index", lambda x: x[:, [3, 1]]),
    Move("index", lambda x: x[:, :, [0, 1, 4], [5, 0, 2]]),
    Move("gather", lambda x: x.gather(1, ORDER.view(1, 4, 1, 1).expand(2, 4, 5, 6)), dynamic=False),
    Move("take_along_dim", lambda x: x.take_along_dim(ORDER.view(1, 4, 1, 1), 1), dynamic=False),
    # windows and borders
    Move("unfold", lambda x: x.unfold(2, 3, 2)),
    Move("unfold", lambda x: x.unfold(1, 4, 4).squeeze(1), -1),
    Move("im2col", lambda x: F.unfold(x, 3, stride=2)),
    Move("im2col", lambda x: F.unfold(x, (2, 3), padding=1, dilation=2), zeros=True),
    Move("pad", lambda x: F.pad(x, (1, 2)), zeros=True),
    Move("pad", lambda x: F.pad(x, (-1, 0, 0, -2))),
    Move("pad", lambda x: F.pad(x, (1, 2, 2, 1), "reflect")),
    Move("pad", lambda x: F.pad(x, (1, 2), "replicate"), shape=SEQUENCE),
    Move("pad", lambda x: F.pad(x, (1, 0, 2, 2), "circular")),
    Move("pad", lambda x: F.pad(x, (1, 1, 1, 1, 1, 1), "circular"), shape=VOLUME),
    Move("constant_pad_nd", lambda x: ops.constant_pad_nd(x, [0, 1, 2, 0]), zeros=True),
    Move("reflection_pad1d", lambda x: ops.reflection_pad1d(x, [2, 1]), shape=SEQUENCE),
    Move("reflection_pad2d", lambda x: ops.reflection_pad2d(x, [2, 1, 0, 3])),
    Move("reflection_pad3d", lambda x: ops.reflection_pad3d(x, [2, 1, 0, 3, 1, 1]), shape=VOLUME),
    Move("replication_pad1d", lambda x: ops.replication_pad1d(x, [2, 1]), shape=SEQUENCE),
    Move("replication_pad2d", lambda x: ops.replication_pad2d(x, [2, 1, 0, 3])),
    Move("replication_pad3d", lambda x: ops.replication_pad3d(x, [2, 1, 0, 3, 1, 1]), shape=VOLUME),
    # every element stays
    Move("clone", lambda x: x.clone()),
    Move("clone", lambda x: x.clone(memory_format=torch.channels_last)),
    Move("contiguous", lambda x: x.transpose(2, 3).contiguous()),
    Move("detach", lambda x: ops.detach(x)),
    Move("alias", lambda x: ops.alias(x)),
    Move("lift_fresh_copy", lambda x: ops.lift_fresh_copy(x)),
    Move("positive", lambda x: +x),
    Move("to", lambda x: x.to(torch.float64, copy=True)),
    Move("_to_copy", lambda x: ops._to_copy(x, dtype=torch.float64)),
]
ROWS = {move.row for move in MOVES} | {"embedding"}
CASES = [pytest.param(move, id=f"{move.row}-{i}") for i, move in enumerate(MOVES)]


def moved_channels(move: Move, seed: int) -> Tensor:
    """A constant per channel, as it stands along ``axis`` after the movement."""
    image = noise(4, seed=seed).reshape(1, 4, *[1] * (len(move.shape) - 2)).expand(move.shape).contiguous()
    found = move.run(image)
    middle = [slice(None) if a == move.axis % found.ndim else slice(n // 2, n // 2 + 1)
              for a, n in enumerate(found.shape)]  # fmt: skip
    return found[tuple(middle)].clone()


def pointwise(dims: int) -> nn.Module:
    return [nn.Linear(4, 4), nn.Conv1d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv3d(4, 4, 1)][dims]


def norm(dims: int) -> nn.Module:
    return [nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d][dims](4)


@pytest.mark.parametrize("move", CASES)
def test_an_affine_after_goes_before(move):
    c, d = moved_channels(move, 1), torch.zeros(1) if move.zeros else moved_channels(move, 2)
    conv = pointwise(len(move.shape) - 2)
    net = build(lambda m, x: move.run(m.conv(x)) * m.c + m.d, conv=conv, c=c, d=d)
    folded = fold_exactly(net, noise(*move.shape), dynamic=move.dynamic)
    assert operators(folded.program)[move.row] >= 1
    assert not {"mul", "add"} & operators(folded.program).keys()
    assert folded.program.state_dict.keys() == {"conv.weight", "conv.bias"}


@pytest.mark.parametrize("move", CASES)
def test_an_affine_before_goes_after(move):
    features = move.run(torch.zeros(move.shape)).shape[move.axis]
    net = build(
        lambda m, x: m.linear(move.run(m.norm(x)).movedim(move.axis, -1)),
        norm=norm(len(move.shape) - 2), linear=nn.Linear(features, 3),
    )  # fmt: skip
    if move.zeros:
        with torch.no_grad():
            net.norm.running_mean.zero_()
            net.norm.bias.zero_()
    folded = fold_exactly(net, noise(*move.shape), dynamic=move.dynamic)
    assert operators(folded.program)[move.row] >= 1
    assert "batch_norm" not in operators(folded.program)


# -- refusing twins ----------------------------------------------------------------------------------------------------


def conv() -> dict[str, nn.Module]:
    return {"conv": nn.Conv2d(4, 4, 1)}


def norm_and_linear(features: int) -> dict[str, nn.Module]:
    return {"norm": nn.BatchNorm2d(4), "linear": nn.Linear(features, 3)}


AFTER = {"other-axis", "model-output"}
BEFORE = {"model-input", "other-axis"}
#: what is refused: forward of an image, its parts, every reason given
REFUSED = {
    "permute: the axis that was the width": (
        lambda m, x: m.conv(x).permute(0, 2, 3, 1) * m.c, conv() | {"c": noise(6, 1)}, AFTER),
    "transpose: before a linear along another axis": (
        lambda m, x: m.linear(m.norm(x).transpose(2, 3)), norm_and_linear(5), BEFORE),
    "flatten: more constants than channels": (
        lambda m, x: m.conv(x).flatten(1) * m.c, conv() | {"c": noise(120)}, AFTER),
    "view: the batch among the constants": (
        lambda m, x: m.linear((x * m.c).reshape(-1, 30)), {"c": noise(4, 1, 1), "linear": nn.Linear(30, 3)}, BEFORE),
    "view: channels mixed into the dynamic batch": (
        lambda m, x: m.linear((x * m.c).reshape(-1, 24)), {"c": noise(4, 1, 1), "linear": nn.Linear(24, 3)}, BEFORE),
    "stack: one constant for each copy": (
        lambda m, x: torch.stack([y := m.conv(x), y], 1) * m.c, conv() | {"c": noise(2, 1, 1, 1)},
        {"copies-differ", "model-output"}),
    "expand: one constant for each copy": (
        lambda m, x: m.conv(x)[:, :1].expand(-1, 4, -1, -1) * m.c, conv() | {"c": noise(4, 1, 1)},
        {"copies-differ", "model-output"}),
    "repeat: one constant for each copy": (
        lambda m, x: m.conv(x).repeat(1, 2, 1, 1) * m.c, conv() | {"c": noise(8, 1, 1)},
        {"copies-differ", "model-output"}),
    "unfold: overlapping windows of the channels": (
        lambda m, x: m.conv(x).unfold(1, 2, 1) * m.c, conv() | {"c": noise(2)}, {"copies-differ", "model-output"}),
    "cat: one branch is the input, which is read elsewhere": (
        lambda m, x: torch.cat([m.conv(x.tanh()), x], 1) * m.c, conv() | {"c": noise(8, 1, 1)},
        {"model-input", "model-output"}),
    "cat: along the width, two affines": (
        lambda m, x: m.conv(torch.cat([m.norm(x.sigmoid()), x], 3)), conv() | {"norm": nn.BatchNorm2d(4)},
        {"nonlinear", "other-axis"}),
    "split: the other part is read as it is": (
        lambda m, x: ((parts := m.conv(x).split(2, 2))[0] * m.c, parts[1].tanh()), conv() | {"c": noise(4, 1, 1)},
        {"nonlinear", "model-output"}),
    "slice: another slice overlaps": (
        lambda m, x: ((y := m.conv(x))[:, :3] * m.c, y[:, 2:].tanh()), conv() | {"c": noise(3, 1, 1)},
        {"several-readers", "model-output"}),
    "index: one constant for each copy": (
        lambda m, x: m.conv(x)[:, [0, 0, 1]] * m.c, conv() | {"c": noise(3, 1, 1)}, {"copies-differ", "model-output"}),
    "index_select: the order comes from the inputs": (
        lambda m, x: m.conv(x).index_select(1, x.mean((0, 2, 3)).argsort()) * m.c, conv() | {"c": noise(4, 1, 1)},
        {"nonlinear", "model-output"}),
    "repeat_interleave: the repeats come from the inputs": (
        lambda m, x: m.conv(x).repeat_interleave((x.mean((0, 2, 3)) > 9).long() + 1, 1, output_size=4) * m.c,
        conv() | {"c": noise(4, 1, 1)}, {"nonlinear", "model-output"}),
    "pad: zeros and a shift, after": (
        lambda m, x: m.norm(F.pad(m.conv(x), (1, 1))), conv() | {"norm": nn.BatchNorm2d(4)},
        {"zero-padding", "model-output"}),
    "pad: zeros and a shift, before": (
        lambda m, x: m.conv(F.pad(m.norm(x), (1, 1))), conv() | {"norm": nn.BatchNorm2d(4)}, BEFORE),
    "pad: another constant": (
        lambda m, x: F.pad(m.conv(x), (1, 1), value=2.0) * m.c, conv() | {"c": noise(4, 1, 1)},
        {"nonlinear", "model-output"}),
    "pad: another constant, before": (
        lambda m, x: m.conv(F.pad(x * m.c, (1, 1), value=-1.0)), conv() | {"c": noise(4, 1, 1)},
        {"model-input", "nonlinear"}),
    "view: the bits of it as integers": (
        lambda m, x: (m.conv(x).view(torch.int64) & -65536).view(torch.float64) * m.c, conv() | {"c": noise(4, 1, 1)},
        {"nonlinear", "model-output"}),
    "view: the bits of it as integers, before": (
        lambda m, x: m.conv(((x * m.c).view(torch.int64) & -65536).view(torch.float64)),
        conv() | {"c": noise(4, 1, 1)}, {"model-input", "nonlinear"}),
    "view: the bits of it as another float": (
        lambda m, x: m.conv(x).view(torch.float32).view(torch.float64) * m.c, conv() | {"c": noise(4, 1, 1)},
        {"nonlinear", "model-output"}),
    "to: a cast that rounds": (
        lambda m, x: m.conv(x).to(torch.float32).double() * m.c, conv() | {"c": noise(4, 1, 1)},
        {"nonlinear", "model-output"}),
    "type_as: a cast that rounds, before": (
        lambda m, x: m.conv((x * m.c).type_as(torch.zeros_like(x, dtype=torch.half)).double()),
        conv() | {"c": noise(4, 1, 1)}, {"model-input", "nonlinear"}),
    "to: a cast to integers": (
        lambda m, x: m.conv((x * m.c).to(torch.int64).double()), conv() | {"c": noise(4, 1, 1)},
        {"model-input", "nonlinear"}),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    run, parts, reasons = REFUSED[case]
    fold_exactly(build(run, **parts), noise(*IMAGE), left=reasons)


# -- disjoint parts of one value, and what is read for its shape alone -------------------------------------------------

PARTS = {
    "split": lambda m, x: (y := m.conv(x).split(2, 1), m.norm(y[0]), y[1].tanh())[1:],
    "chunk": lambda m, x: (y := m.conv(x).chunk(2, 1), m.norm(y[1]), y[0].tanh())[1:],
    "slice": lambda m, x: (y := m.conv(x), m.norm(y[:, 1:3]), y[:, :1].tanh(), y[:, 3:].tanh())[1:],
    "select": lambda m, x: (y := m.conv(x), m.norm(y[:, 2:]), y[:, 1].tanh())[1:],
    "unflatten": lambda m, x: (y := m.conv(x).unflatten(1, (2, 2)).unbind(1), m.norm(y[0]), y[1].tanh())[1:],
}


@pytest.mark.parametrize("part", PARTS)
def test_an_affine_on_one_part_leaves_the_others(part):
    net = build(PARTS[part], conv=nn.Conv2d(4, 4, 1, bias=False), norm=nn.BatchNorm2d(2))
    fold_exactly(net, noise(*IMAGE))


def test_different_affines_on_disjoint_parts():
    net = build(
        lambda m, x: (y := m.conv(x).chunk(2, 1), m.a(y[0]).tanh(), m.b(y[1]).tanh())[1:],
        conv=nn.Conv2d(4, 4, 1), a=nn.BatchNorm2d(2), b=nn.BatchNorm2d(2),
    )  # fmt: skip
    fold_exactly(net, noise(*IMAGE))


def test_one_affine_for_every_branch_of_a_cat():
    net = build(
        lambda m, x: m.norm(torch.cat([m.a(x), m.b(x), m.c(x).transpose(2, 3).transpose(2, 3)], 1)),
        a=nn.Conv2d(4, 2, 1), b=nn.Conv2d(4, 3, 1, bias=False), c=nn.Conv2d(4, 1, 1), norm=nn.BatchNorm2d(6),
    )  # fmt: skip
    folded = fold_exactly(net, noise(*IMAGE))
    assert set(folded.ledger.entries[0].into) == {"a", "b", "c"}


def test_branches_of_a_cat_carry_their_own_affine_on():
    net = build(
        lambda m, x: m.conv(torch.cat([m.a(x), x.tanh(), m.b(x)], 1)),
        a=nn.BatchNorm2d(4), b=nn.BatchNorm2d(4), conv=nn.Conv2d(12, 3, 2),
    )  # fmt: skip
    fold_exactly(net, noise(*IMAGE))


SHAPE_ONLY = {
    "sym_size": lambda y: torch.ones(y.shape[0], 3),
    "empty_like": lambda y: torch.zeros(torch.empty_like(y).shape[1:]),
    "zeros_like": torch.zeros_like,
    "ones_like": torch.ones_like,
    "rand_like": lambda y: torch.rand_like(y) > 2,
    "randn_like": lambda y: torch.randn_like(y) > 100,
    "new_empty": lambda y: torch.zeros(y.new_empty(2, 3).shape),
    "full_like": lambda y: torch.full_like(y, 2.5),
    "new_zeros": lambda y: y.new_zeros(y.shape[0], 3),
    "new_ones": lambda y: y.new_ones(2, 3),
    "new_full": lambda y: y.new_full((2, 3), 0.5),
}


ROWS |= SHAPE_ONLY.keys()


@pytest.mark.parametrize("row", SHAPE_ONLY)
def test_a_reader_of_the_shape_is_not_in_the_way(row):
    read = SHAPE_ONLY[row]
    net = build(lambda m, x: (m.norm(y := m.conv(x)), read(y)), conv=nn.Conv2d(4, 4, 1), norm=nn.BatchNorm2d(4))
    folded = fold_exactly(net, noise(*IMAGE))
    assert any(getattr(n.target, "_opname", "") == row for n in folded.captured.program.graph.nodes)


# -- a table of rows, and casts ----------------------------------------------------------------------------------------


def test_embedding_takes_an_affine_along_its_last_axis():
    net = build(
        lambda m, i: m.embedding(i) * m.c + m.d, embedding=nn.Embedding(7, 4, padding_idx=2), c=noise(4), d=noise(4)
    )
    folded = fold_exactly(net, torch.tensor([[0, 1, 2], [3, 4, 6]]))
    assert operators(folded.program) == {"embedding": 1}
    assert folded.program.state_dict.keys() == {"embedding.weight"}


def test_embedding_refuses_an_affine_along_the_positions():
    net = build(lambda m, i: m.embedding(i) * m.c, embedding=nn.Embedding(7, 4), c=noise(3, 1))
    fold_exactly(net, torch.tensor([[0, 1, 2], [3, 4, 6]]), left={"other-axis", "model-output"})


def test_embedding_with_a_table_that_is_an_input():
    net = build(lambda m, i, w: F.embedding(i, w) * m.c, c=noise(4))
    fold_exactly(net, torch.tensor([[0, 1], [3, 4]]), noise(7, 4), left={"nonlinear", "model-output"})


def test_zeros_among_many_classes_hold_a_shift(monkeypatch):
    """What is padded and cut off again lets a shift pass, as long as every window may have its own."""
    net = build(
        lambda m, x: m.norm(F.pad(m.conv(x), (1, 1))[..., 1:-1]), conv=nn.Conv2d(4, 4, 1), norm=nn.BatchNorm2d(4)
    )
    fold_exactly(net, noise(*IMAGE), left=set())
    monkeypatch.setattr("bnfold.semantics.moving.LARGEST", 16)
    fold_exactly(net, noise(*IMAGE), left={"zero-padding", "model-output"})


@pytest.mark.parametrize("cast", ["to", "_to_copy", "type_as"])
def test_a_widening_cast_lets_an_affine_pass(cast):
    casts = {
        "to": lambda x: x.double(),
        "_to_copy": lambda x: ops._to_copy(x, dtype=torch.float64),
        "type_as": lambda x: x.type_as(torch.zeros(1, dtype=torch.float64)),
    }
    net = build(lambda m, x: casts[cast](m.conv(x)) * m.c, conv=nn.Conv2d(4, 4, 1), c=torch.tensor(2.0).exp2())
    # Small integers and powers of two: every sum is exact in float32, so float32 is no excuse for a difference.
    net.conv.float()
    with torch.no_grad():
        for parameter in net.conv.parameters():
            parameter.copy_((4 * parameter).round())
    folded = bnfold.fold(net, (x := (4 * noise(*IMAGE)).round().float(),))
    assert not folded.ledger.left
    assert folded.program.state_dict["conv.weight"].dtype == torch.float32
    assert torch.equal(folded.module(x), net(x))
