"""Convolutions in float64 in parts are those in one, whatever their attributes."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from bnfold.evaluate import blocks

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
SIZES, KERNEL = (13, 11, 7), (3, 2, 3)


@pytest.mark.parametrize("axes", CONV)
@pytest.mark.parametrize("lines", [1, 3, 1000])
def test_parts_are_the_whole(monkeypatch: pytest.MonkeyPatch, axes: int, lines: int) -> None:
    generator = torch.Generator().manual_seed(axes)
    w = torch.randn(6, 2, *KERNEL[:axes], generator=generator, dtype=torch.float64)
    bias = torch.randn(6, generator=generator, dtype=torch.float64)
    x = torch.randn(5, 4, *SIZES[:axes], generator=generator, dtype=torch.float64)
    for stride, pad, dilation, b in itertools.product((1, 2), (0, 1), (1, 2), (bias, None)):
        whole = CONV[axes](x, w, b, stride, pad, dilation, 2)
        monkeypatch.setattr(blocks, "BLOCK", lines * whole[0, 0, 0].numel() * w[0].numel() * 8)
        parts = blocks.convolve(CONV[axes], x, w, b, (stride,), (pad,) * axes, (dilation,), 2)
        # Both round to float64, which a sum of so few terms of magnitude one leaves fourteen digits of.
        torch.testing.assert_close(parts, whole, rtol=0, atol=1e-12)


def test_it_is_parted(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not too large, a kernel of one and other dtypes take one call, the rest as many as there are parts."""
    asked: list[tuple[int, ...]] = []

    def conv(x: torch.Tensor, *rest: object) -> torch.Tensor:
        asked.append(tuple(x.shape))
        return F.conv2d(x, *rest)  # type: ignore[arg-type]

    def calls(x: torch.Tensor, w: torch.Tensor) -> int:
        asked.clear()
        blocks.convolve(conv, x, w)
        return len(asked)

    x, w = torch.zeros(3, 4, 17, 9, dtype=torch.float64), torch.zeros(5, 4, 3, 3, dtype=torch.float64)
    assert calls(x, w) == 1
    monkeypatch.setattr(blocks, "BLOCK", 4 * 9 * 7 * 8 * 4)
    assert calls(x, w) == 3 * 4  # 15 lines, four at a time, of each sample
    assert all(shape[0] == 1 and shape[2] <= 6 for shape in asked)
    assert calls(x, w[..., :1, :1]) == calls(x.float(), w.float()) == calls(x[0], w) == 1
    assert calls(x[:0], w) == 1
