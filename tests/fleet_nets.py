"""Models of fleets, sound and otherwise. Their weights are drawn from a seed of their own."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def small(width: int = 5, seed: int = 0) -> nn.Module:
    """A convolution with its BatchNorm, and a head."""
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, width, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(width, 7),
    )  # fmt: skip
    with torch.no_grad():
        for tensor in net.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    net.example_inputs = (torch.randn(2, 3, 9, 11, generator=generator),)
    return net


def configured() -> nn.Module:
    """One whose width stands in a file beside the code, which only running the code shows."""
    return small(json.loads((Path(__file__).parent / "width.json").read_text())["width"])


class Touched(nn.Module):
    """Leaves a line in a file whenever it is built, and takes its time: what is computed twice shows."""

    def __init__(self, seed: int, seconds: float, log: str) -> None:
        super().__init__()
        with Path(log).open("a") as file:
            file.write(f"{seed} {os.getpid()}\n")
        time.sleep(seconds)
        self.net = small(seed=seed)
        self.example_inputs = self.net.example_inputs

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.net(x)


def touched(log: str, seed: int = 0, seconds: float = 0.0) -> nn.Module:
    """A ``Touched``."""
    return Touched(seed, seconds, log)


def broken() -> nn.Module:
    """Has a fault in its code."""
    raise ValueError("no such layer")


def hangs() -> Any:
    """Never ends."""
    while True:
        time.sleep(1)


def eats() -> Any:
    """Takes more and more memory."""
    kept = []
    while True:
        kept.append(torch.ones(4 << 20))
        time.sleep(0.005)


def gulps() -> Any:
    """Takes more memory than there is, at once."""
    return torch.ones(1 << 40)


def crashes() -> Any:
    """Dies as a fault in a library would make it."""
    os.kill(os.getpid(), signal.SIGSEGV)


def leaves() -> None:
    """Ends its process as if all were well."""
    os._exit(0)
