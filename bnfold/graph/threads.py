"""How many threads torch computes with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[int]:
    """That many threads of torch's within; gives how many there were.

    Threads wait for one another by spinning. On a busy machine, or in a container that may use fewer cores than it
    sees, small operators take fifty times as long with several as with one: folding a LeViT took 20 s in place of 0.4.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield before
    finally:
        torch.set_num_threads(before)
