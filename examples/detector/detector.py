"""A one-stage detector: three strides, boxes and scores, for images whose sides its largest stride divides."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def block(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """Convolution, BatchNorm and SiLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.SiLU(inplace=True)
    )


class Detector(nn.Module):
    """Features at strides 8, 16 and 32, the coarse ones added to the fine, and a head that they share."""

    strides = (8, 16, 32)

    def __init__(self, width: int = 8, classes: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(block(3, width, 2), block(width, width, 2), block(width, width, 2))
        self.down = nn.ModuleList([block(width, width, 2), block(width, width, 2)])
        self.lateral = nn.ModuleList([block(width, width, 1) for _ in self.strides])
        self.box, self.score = nn.Conv2d(width, 4, 1), nn.Conv2d(width, classes, 1)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Boxes (N, boxes, 4) in pixels as corners, and scores (N, boxes, classes) in [0, 1]."""
        levels = [self.stem(image)]
        for down in self.down:
            levels.append(down(levels[-1]))
        top, found = None, []
        for level, lateral, stride in reversed([*zip(levels, self.lateral, self.strides)]):
            top = lateral(level) if top is None else lateral(level) + nn.functional.interpolate(top, scale_factor=2.0)
            height, width = top.shape[-2:]
            y = (torch.arange(height, device=image.device) + 0.5)[:, None] * stride
            x = (torch.arange(width, device=image.device) + 0.5)[None] * stride
            sides = self.box(top).exp() * stride
            boxes = torch.stack([x - sides[:, 0], y - sides[:, 1], x + sides[:, 2], y + sides[:, 3]], 1)
            found.append((boxes.flatten(2), self.score(top).sigmoid().flatten(2)))
        return {
            "boxes": torch.cat([boxes for boxes, _ in found], 2).mT,
            "scores": torch.cat([scores for _, scores in found], 2).mT,
        }
