"""Two test processes share two cores, so each keeps to one thread."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
os.environ["COLUMNS"] = "120"  # reports wrap at the terminal's width, which a test worker may not have

import torch

torch.set_num_threads(1)
