"""Two test processes share two cores, so each keeps to one thread; and every test draws the same numbers every time."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
os.environ["COLUMNS"] = "120"  # reports wrap at the terminal's width, which a test worker may not have

import pytest
import torch

torch.set_num_threads(1)
torch.manual_seed(0)  # for what test modules draw as they are imported


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
