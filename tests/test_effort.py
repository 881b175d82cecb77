"""What a sample costs, read off a graph's shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bnfold.gate.effort import ELEMENT, effort, operations
from bnfold.graph.capture import capture


class Products(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return torch.bmm(x, x.mT), torch.addmm(x[:, 0], x[:, 0], x[0].mT), x @ x.mT


@pytest.mark.parametrize(
    ("model", "shape", "products"),
    [
        (nn.Conv2d(6, 9, (3, 2), stride=2, groups=3), (2, 6, 11, 8), 9 * 5 * 4 * 2 * 3 * 2),
        (nn.ConvTranspose1d(4, 5, 3, stride=2), (3, 4, 7), 4 * 7 * 5 * 3),
        (nn.Linear(7, 11), (2, 5, 7), 5 * 7 * 11),
        (Products(), (2, 5, 5), 2 * 5 * 5 * 5 + 5 * 5),
        (nn.ReLU(), (2, 5), 0),
    ],
    ids=["conv", "transposed", "linear", "products", "none"],
)
def test_operations_of_one_sample(model: nn.Module, shape: tuple[int, ...], products: int) -> None:
    captured = capture(model.eval(), (torch.randn(shape),))
    assert operations(captured) == 2 * products


def test_elements_cost_as_well() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Flatten())
    captured = capture(model.eval(), (torch.randn(2, 3, 11, 8),))
    assert effort(captured) == operations(captured) + ELEMENT * 3 * 5 * 9 * 6
