"""What a sample costs, read off a graph's shapes."""

from __future__ import annotations

import math
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

from bnfold.gate.effort import ELEMENT, effort, file_effort, operations
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


def _file(op: str, shapes: list[list[int]], out: list[int], **attributes: Any) -> float:
    """Operations of a file of one node, beside what its elements cost."""
    names = [f"v{i}" for i in range(len(shapes))]
    node = onnx.helper.make_node(op, names, ["y"], **attributes)
    given = {**dict(zip(names, shapes, strict=True)), "y": out}
    return file_effort([node], given, 2) - ELEMENT * math.prod(out) / 2


@pytest.mark.parametrize(
    ("op", "shapes", "out", "products"),
    [
        ("Conv", [[2, 6, 11, 8], [9, 2, 3, 2]], [2, 9, 5, 4], 9 * 5 * 4 * 2 * 3 * 2),
        ("ConvTranspose", [[2, 4, 7], [4, 5, 3]], [2, 5, 15], 4 * 7 * 5 * 3),
        ("Gemm", [[2, 7], [7, 11], [11]], [2, 11], 7 * 11),
        ("Gemm", [[7, 2], [11, 7]], [2, 11], 7 * 11),
        ("MatMul", [[2, 5, 7], [7, 11]], [2, 5, 11], 5 * 7 * 11),
        ("GRU", [[13, 2, 7], [2, 15, 7], [2, 15, 5]], [13, 2, 2, 5], 13 * 2 * 15 * (7 + 5)),
        ("Relu", [[2, 5]], [2, 5], 0),
    ],
)
def test_operations_of_one_sample_of_a_file(op: str, shapes: list[list[int]], out: list[int], products: int) -> None:
    assert _file(op, shapes, out) == 2 * products


def test_what_has_no_shape_costs_nothing() -> None:
    assert file_effort([onnx.helper.make_node("Conv", ["x", "w"], ["y"])], {}, 1) == 0
