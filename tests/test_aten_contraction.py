"""Rows with a constant weight: every attribute that they read, an affine after them and an affine before them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checker import Net, build, fold_exactly, noise, operators, removed
from torch import Tensor, nn

# -- convolutions ------------------------------------------------------------------------------------------------------

CONVS = [
    {},
    {"bias": False},
    {"out_channels": 6, "groups": 2},
    {"out_channels": 6, "groups": 2, "bias": False},
    {"groups": 4},
    {"out_channels": 8, "groups": 4},
    {"out_channels": 3, "stride": 2},
    {"dilation": 2},
    {"padding": 1},
    {"padding": 1, "out_channels": 6, "groups": 2, "stride": 2},
    {"padding": "same"},
    {"padding": "same", "kernel_size": 1},
    {"padding": "valid"},
    {"padding": 1, "padding_mode": "reflect"},
    {"padding": 1, "padding_mode": "replicate"},
    {"padding": 1, "padding_mode": "circular", "groups": 2},
]
TRANSPOSED = [
    {},
    {"bias": False},
    {"out_channels": 6, "groups": 2},
    {"groups": 4},
    {"out_channels": 8, "groups": 4, "bias": False},
    {"out_channels": 3, "stride": 2, "output_padding": 1},
    {"stride": 2, "padding": 1, "dilation": 2, "output_padding": 1},
]
CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
CONV_TRANSPOSE = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def name_of(row: str, options: dict[str, Any]) -> str:
    return "-".join([row, *(f"{k}={v}" for k, v in options.items())])


def convolution(kinds: dict[int, Any], dims: int, options: dict[str, Any]) -> nn.Module:
    return kinds[dims](4, **{"out_channels": 4, "kernel_size": 3, **options})


CONV_CASES = [
    pytest.param(row, kinds, d, options, id=name_of(row, options))
    for name, kinds, table in (("conv", CONV, CONVS), ("conv_transpose", CONV_TRANSPOSE, TRANSPOSED))
    for d, row in ((d, f"{name}{d}d") for d in kinds)
    for options in (table if d == 2 else table[2 :: d + 1])  # the rows share one rule, which does not count axes
]


@pytest.mark.parametrize(("row", "kinds", "dims", "options"), CONV_CASES)
def test_convolution_absorbs_what_follows(row, kinds, dims, options):
    conv = convolution(kinds, dims, options)
    net = build(lambda m, x: m.norm(m.conv(x)), conv=conv, norm=NORM[dims](conv.out_channels))
    folded = fold_exactly(net, noise(2, 4, *(5, 6, 7)[:dims]))
    assert removed(folded) == {"batch_norm": 1}
    assert operators(folded.program)[row] == 1
    assert folded.program.state_dict.keys() == {"conv.weight", "conv.bias"}


@pytest.mark.parametrize(("row", "kinds", "dims", "options"), CONV_CASES)
def test_convolution_absorbs_what_precedes(row, kinds, dims, options):
    conv, norm = convolution(kinds, dims, options), NORM[dims](4)
    net = build(lambda m, x: m.conv(m.norm(x)), conv=conv, norm=norm)
    x = noise(2, 4, *(5, 6, 7)[:dims])
    kernel_reaches = conv.kernel_size[0] > 1 and conv.padding not in ("valid", (0,) * dims)
    if conv.transposed or (kernel_reaches and conv.padding_mode == "zeros"):
        refused = fold_exactly(net, x, left={"model-input", "zero-padding"})
        assert refused.ledger.left[0].refusals[1].operator == f"aten.{row}"
        with torch.no_grad():  # only the shift is in the way
            norm.running_mean.zero_()
            norm.bias.zero_()
    folded = fold_exactly(net, x)
    assert removed(folded) == {"batch_norm": 1}


@pytest.mark.parametrize(
    "conv",
    [nn.Conv1d(4, 6, 3, groups=2), nn.Conv2d(4, 4, 3), nn.Conv3d(4, 6, 2), nn.ConvTranspose2d(4, 6, 3, groups=2)],
)
def test_unbatched_convolution(conv):
    tail = (1,) * len(conv.kernel_size)
    after = {"c": noise(conv.out_channels, *tail), "d": noise(conv.out_channels, *tail, seed=1)}
    x = noise(4, *(5, 6, 7)[: len(tail)])
    fold_exactly(build(lambda m, x: m.conv(x) * m.c + m.d, conv=conv, **after), x, dynamic=False)
    fold_exactly(build(lambda m, x: m.conv(x * m.c), conv=conv, c=noise(4, *tail)), x, dynamic=False)


def test_core_aten_convolution_is_one_row_for_both_kinds():
    for transposed, weight in ((False, (6, 2, 3, 3)), (True, (4, 3, 3, 3))):

        def run(m, x, transposed=transposed):
            return m.norm(torch.ops.aten.convolution(x, m.weight, None, [1, 1], [1, 1], [1, 1], transposed, [0, 0], 2))

        net = build(run, weight=nn.Parameter(noise(*weight)), norm=nn.BatchNorm2d(6))
        folded = fold_exactly(net, noise(2, 4, 5, 5))
        assert operators(folded.program) == {"convolution": 1}


# -- products with a constant matrix -----------------------------------------------------------------------------------


@dataclass
class Matrix:
    """``run(m, x)`` contracts x with ``w``; channels are axis ``inp`` of x and axis ``out`` of the result."""

    row: str
    shape: tuple[int, ...]
    run: Callable[[Any, Tensor], Tensor]
    weight: tuple[int, ...]
    inp: int = -1
    out: int = -1
    bias: tuple[int, ...] | None = None
    dynamic: bool = True

    def __str__(self) -> str:
        return f"{self.row}-{self.shape}-{self.weight}"


MATRICES = [
    *(Matrix("linear", s, lambda m, x: F.linear(x, m.w, m.b), (6, 4), bias=(6,))
      for s in [(2, 4), (2, 3, 4), (2, 3, 5, 4)]),
    Matrix("linear", (4,), lambda m, x: F.linear(x, m.w, m.b), (4, 4), bias=(4,), dynamic=False),
    Matrix("addmm", (2, 4), lambda m, x: torch.addmm(m.b, x, m.w), (4, 6), bias=(6,)),
    Matrix("addmm", (2, 4), lambda m, x: torch.addmm(m.b, x, m.w, beta=0.5, alpha=3.0), (4, 6), bias=(6,)),
    Matrix("addmm", (2, 4), lambda m, x: torch.addmm(m.b, x, m.w, beta=2), (4, 4), bias=(1, 4)),
    Matrix("addmm", (3, 4), lambda m, x: torch.addmm(m.b, x, m.w, alpha=-1), (4, 6), bias=(3, 6), dynamic=False),
    Matrix("addmm", (3, 4), lambda m, x: torch.addmm(m.b, x, m.w), (4, 6), bias=(3, 1), dynamic=False),
    Matrix("addmm", (3, 4), lambda m, x: torch.addmm(m.b, x, m.w), (4, 6), bias=(), dynamic=False),
    Matrix("mm", (2, 4), lambda m, x: torch.mm(x, m.w), (4, 6)),
    Matrix("mm", (4, 5), lambda m, x: torch.mm(m.w, x), (4, 4), inp=0, out=0, dynamic=False),
    Matrix("bmm", (3, 5, 4), lambda m, x: torch.bmm(x, m.w), (3, 4, 4), dynamic=False),
    Matrix("bmm", (3, 4, 5), lambda m, x: torch.bmm(m.w, x), (3, 6, 4), inp=1, out=1, dynamic=False),
    Matrix("bmm", (3, 4, 5), lambda m, x: torch.bmm(m.w, x), (3, 6, 4), inp=0, out=0, dynamic=False),
    Matrix("matmul", (2, 4), lambda m, x: x @ m.w, (4, 6)),
    Matrix("matmul", (2, 3, 4), lambda m, x: x @ m.w, (4, 4)),
    Matrix("matmul", (2, 3, 5, 4), lambda m, x: x @ m.w, (3, 4, 6)),
    Matrix("matmul", (2, 3, 5, 4), lambda m, x: x @ m.w, (3, 4, 6), inp=1, out=1),
    Matrix("matmul", (2, 3, 5, 4), lambda m, x: x @ m.w, (1, 3, 4, 6)),
    Matrix("matmul", (2, 3, 5, 4), lambda m, x: x @ m.w, (1, 1, 4, 4)),
    Matrix("matmul", (2, 4, 5), lambda m, x: m.w @ x, (4, 4), inp=1, out=1),
    Matrix("matmul", (2, 3, 4, 5), lambda m, x: m.w @ x, (3, 6, 4), inp=2, out=2),
    Matrix("einsum", (2, 3, 4), lambda m, x: torch.einsum("bli,io->blo", x, m.w), (4, 6)),
    Matrix("einsum", (2, 4, 5), lambda m, x: torch.einsum("oc, ncl -> nol", m.w, x), (4, 4), inp=1, out=1),
    Matrix("einsum", (2, 3, 5, 4), lambda m, x: torch.einsum("bhld,hde->bleh", x, m.w), (3, 4, 6), inp=3, out=2),
    Matrix("einsum", (2, 3, 5, 4), lambda m, x: torch.einsum("bhld,hde->bleh", x, m.w), (3, 4, 6), inp=1, out=3),
    Matrix("einsum", (2, 3, 4), lambda m, x: torch.einsum("bij,kij->bk", x, m.w), (5, 3, 4), inp=1, out=1),
]  # fmt: skip


ROWS = {case.values[0] for case in CONV_CASES} | {case.row for case in MATRICES} | {"convolution"}


def along(axis: int, ndim: int, size: int, seed: int) -> Tensor:
    constant = noise(size, seed=seed)
    return constant.reshape([size if a == axis % ndim else 1 for a in range(ndim)])


@pytest.mark.parametrize("case", MATRICES, ids=str)
@pytest.mark.parametrize("shift", [False, True])
def test_matrix_absorbs_what_follows(case, shift):
    w, b = nn.Parameter(noise(*case.weight)), None if case.bias is None else nn.Parameter(noise(*case.bias, seed=1))
    shape = case.run(Net(None, w=w, **({} if b is None else {"b": b})), noise(*case.shape)).shape
    c, d = (along(case.out, len(shape), shape[case.out], seed) for seed in (2, 3))
    parts = {"w": w, "c": c, "d": d, **({} if b is None else {"b": b})}
    net = build(lambda m, x: case.run(m, x) * m.c + m.d if shift else case.run(m, x) * m.c, **parts)
    folded = fold_exactly(net, noise(*case.shape, seed=4), dynamic=case.dynamic)
    # Without an operand for it, the shift of both operators after stays the one addition.
    assert operators(folded.program) == {case.row: 1, **({"add": 1} if shift and b is None else {})}


@pytest.mark.parametrize("case", MATRICES, ids=str)
@pytest.mark.parametrize("shift", [False, True])
def test_matrix_absorbs_what_precedes(case, shift):
    w, b = nn.Parameter(noise(*case.weight)), None if case.bias is None else nn.Parameter(noise(*case.bias, seed=1))
    c, d = (along(case.inp, len(case.shape), case.shape[case.inp], seed) for seed in (2, 3))
    parts = {"w": w, "c": c, "d": d, **({} if b is None else {"b": b})}
    net = build(lambda m, x: case.run(m, x * m.c + m.d if shift else x * m.c), **parts)
    folded = fold_exactly(net, noise(*case.shape, seed=4), dynamic=case.dynamic)
    # Without an operand for it, the shift of both operators before becomes one addition after.
    assert operators(folded.program) == {case.row: 1, **({"add": 1} if shift and b is None else {})}


# -- refusing twins ----------------------------------------------------------------------------------------------------

IMAGE = (2, 4, 5, 6)


def conv_and_norm() -> dict[str, nn.Module]:
    return {"conv": nn.Conv2d(4, 4, 3), "norm": nn.BatchNorm2d(4)}


#: what is refused: forward, its parts, shapes of the inputs, every reason given
REFUSED = {
    "activation after the weight": (
        lambda m, x: m.norm(m.conv(x).sigmoid()), conv_and_norm(), [IMAGE], {"nonlinear", "model-output"}),
    "activation before the weight": (
        lambda m, x: m.conv(m.norm(x).tanh()), conv_and_norm(), [IMAGE], {"model-input", "nonlinear"}),
    "second reader": (
        lambda m, x: (m.norm(y := m.conv(x)), y.tanh()), conv_and_norm(), [IMAGE], {"several-readers", "model-output"}),
    "second reader after": (
        lambda m, x: (m.conv(y := m.norm(x)), y.tanh()), conv_and_norm(), [IMAGE], {"model-input", "nonlinear"}),
    "model output between": (
        lambda m, x: (m.norm(y := m.conv(x)), y), conv_and_norm(), [IMAGE], {"several-readers", "model-output"}),
    "model output between, before": (
        lambda m, x: (m.conv(y := m.norm(x)), y), conv_and_norm(), [IMAGE], {"model-input", "model-output"}),
    "along the width": (
        lambda m, x: m.conv(x) * m.c, {"conv": nn.Conv2d(4, 4, 3), "c": noise(4)}, [IMAGE],
        {"other-axis", "model-output"}),
    "along the height, before": (
        lambda m, x: m.conv(x * m.c), {"conv": nn.Conv2d(4, 4, 3), "c": noise(5, 1)}, [IMAGE],
        {"model-input", "other-axis"}),
    "BatchNorm1d of (N, C, L) after a linear": (
        lambda m, x: m.norm(m.linear(x)), {"linear": nn.Linear(6, 4), "norm": nn.BatchNorm1d(4)}, [(2, 4, 6)],
        {"other-axis", "model-output"}),
    "a weight that is an input": (
        lambda m, x, w: m.norm(F.conv2d(x, w)), {"norm": nn.BatchNorm2d(7)}, [IMAGE, (7, 4, 3, 3)],
        {"nonlinear", "model-output"}),
    "a transposed weight that is an input": (
        lambda m, x, w: m.norm(F.conv_transpose2d(x, w)), {"norm": nn.BatchNorm2d(7)}, [IMAGE, (4, 7, 3, 3)],
        {"nonlinear", "model-output"}),
    "a linear weight that is an input": (
        lambda m, x, w: F.linear(m.norm(x), w), {"norm": nn.BatchNorm1d(4)}, [(2, 4), (7, 4)],
        {"model-input", "nonlinear"}),
    "a linear with a vector for its weight": (
        lambda m, x: F.linear(x, m.w) * m.c, {"w": noise(4), "c": noise(3)}, [(2, 3, 4)],
        {"nonlinear", "model-output"}),
    "addmm with a C that is a value": (
        lambda m, x, c: torch.addmm(c, m.norm(x), m.w), {"norm": nn.BatchNorm1d(4), "w": noise(4, 5)}, [(2, 4), (2, 5)],
        {"model-input", "nonlinear"}),
    "addmm with beta 0": (
        lambda m, x: torch.addmm(m.b, m.norm(x), m.w, beta=0),
        {"norm": nn.BatchNorm1d(4), "w": noise(4, 5), "b": noise(5)}, [(2, 4)], {"model-input", "nonlinear"}),
    "a shift alone and no operand for it": (
        lambda m, x: x @ m.w + m.c, {"w": noise(4, 5), "c": noise(5)}, [(2, 3, 4)], {"no-saving", "model-output"}),
    "a shift alone and no operand for it, before": (
        lambda m, x: (x + m.c) @ m.w, {"w": noise(4, 5), "c": noise(4)}, [(2, 3, 4)], {"model-input", "no-saving"}),
    "a BatchNorm that would become two additions": (
        lambda m, x: m.norm(torch.cat([x @ m.w, x @ m.v], 1)),
        {"norm": nn.BatchNorm1d(9), "w": noise(4, 5), "v": noise(4, 4)}, [(2, 4)], {"no-saving", "model-output"}),
    "matmul of two values": (
        lambda m, x, y: (x @ y) * m.c, {"c": noise(5)}, [(2, 3, 4), (2, 4, 5)], {"model-input", "model-output"}),
    "matmul of two values, before": (
        lambda m, x, y: m.norm(x) @ y, {"norm": nn.BatchNorm1d(3)}, [(2, 3, 4), (2, 4, 5)],
        {"model-input", "model-output"}),
    "matmul along the axis that it sums": (
        lambda m, x, y: (x * m.c) @ m.a(y), {"c": noise(4), "a": nn.Linear(5, 5)}, [(2, 3, 4), (2, 4, 5)],
        {"model-input", "other-axis"}),
    "a shift before a matmul of two values": (lambda m, x, y: (x + 0.5) @ m.a(y), {"a": nn.Linear(5, 5)},
        [(2, 3, 4), (2, 4, 5)], {"model-input", "shift-through-product"}),
    "matmul with a vector": (
        lambda m, x: (x * m.c) @ m.w, {"w": noise(4), "c": noise(4)}, [(2, 3, 4)], {"model-input", "nonlinear"}),
    "matmul that broadcasts the value": (
        lambda m, x: (x * m.c) @ m.w, {"w": noise(3, 4, 6), "c": noise(4)}, [(2, 1, 5, 4)],
        {"model-input", "nonlinear"}),
    "einsum of two values": (
        lambda m, x, y: torch.einsum("bij,bjk->bik", x, y) * m.c, {"c": noise(5)}, [(2, 3, 4), (2, 4, 5)],
        {"model-input", "model-output"}),
    "einsum with an ellipsis": (
        lambda m, x: torch.einsum("...i,io->...o", x, m.w) * m.c, {"w": noise(4, 5), "c": noise(5)}, [(2, 3, 4)],
        {"nonlinear", "model-output"}),
    "einsum that sums the value on its own": (
        lambda m, x: torch.einsum("bli,io->bo", x * m.c, m.w), {"w": noise(4, 5), "c": noise(4)}, [(2, 3, 4)],
        {"model-input", "nonlinear"}),
    "einsum of a diagonal": (
        lambda m, x: torch.einsum("bii,io->bo", x * m.c, m.w), {"w": noise(4, 5), "c": noise(4)}, [(2, 4, 4)],
        {"model-input", "nonlinear"}),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    run, parts, shapes, reasons = REFUSED[case]
    fold_exactly(build(run, **parts), *(noise(*shape, seed=i) for i, shape in enumerate(shapes)), left=reasons)


def test_a_batch_norm_may_become_one_addition():
    """The twin of a refusal: no operator more than before."""
    after = {"norm": nn.BatchNorm1d(5), "w": noise(4, 5)}
    fold_exactly(build(lambda m, x: m.norm(x @ m.w), **after), noise(2, 4))


BILINEAR = {
    "matmul": lambda m, x, y: (m.a(x) @ m.b(y)) * 0.5,
    "matmul, after": lambda m, x, y: m.c((m.a(x) * 0.5) @ (y * 3.0)),
    "bmm": lambda m, x, y: torch.bmm(m.a(x), m.b(y)) / 8,
    "einsum": lambda m, x, y: torch.einsum("bij,bjk->bik", m.a(x), m.b(y)) * -0.5,
    "attention scores": lambda m, x, y: (m.a(x) @ m.b(y) * 0.125).softmax(-1),
}


@pytest.mark.parametrize("run", BILINEAR.values(), ids=BILINEAR)
def test_one_number_passes_a_product_of_two_values(run) -> None:
    parts = {"a": nn.Linear(4, 4), "b": nn.Linear(5, 5), "c": nn.Linear(5, 3)}
    folded = fold_exactly(build(run, **parts), noise(2, 3, 4), noise(2, 4, 5, seed=1))
    assert not operators(folded.program).keys() & {"mul", "div"}
