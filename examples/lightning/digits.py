"""The net of the project: 8x8 digits to ten classes."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Digits(nn.Module):
    """Two convolutions with BatchNorm, and a linear head."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(width, 10)

    def forward(self, image: Tensor) -> Tensor:
        """Logits for images of shape (N, 1, 8, 8) in [0, 1]."""
        return self.head(self.body(image).mean((2, 3)))


example_inputs = (torch.rand(2, 1, 8, 8),)
