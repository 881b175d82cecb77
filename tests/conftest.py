"""Two test processes share two cores, so each keeps to one thread, unless OMP_NUM_THREADS says how many; and every test
draws the same numbers every time."""

from __future__ import annotations

import gc
import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
os.environ["COLUMNS"] = "120"  # reports wrap at the terminal's width, which a test worker may not have

import hypothesis
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

THREADS = int(os.environ["OMP_NUM_THREADS"])
torch.set_num_threads(THREADS)
# No test asserts a time, and a change is judged by what it changes: new draws are made with --hypothesis-profile=fuzz.
hypothesis.settings.register_profile("bnfold", deadline=None, derandomize=True)
hypothesis.settings.register_profile("fuzz", deadline=None, max_examples=1000)
hypothesis.settings.load_profile("bnfold")
torch.manual_seed(0)  # for what test modules draw as they are imported

#: Before a command: permissions bind it, though root runs it.
BOUND = [] if sys.platform == "win32" or os.geteuid() else ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]


def pytest_collection_finish() -> None:
    """What is imported by now stays, and looking through it for garbage, of which tracing makes much, takes time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


def pytest_sessionstart(session: pytest.Session) -> None:
    # What torch logs is no part of a failure.
    shown = session.config.pluginmanager.get_plugin("logging-plugin").report_handler
    shown.addFilter(lambda record: not record.name.startswith("torch"))


@pytest.fixture(autouse=True, scope="module")
def _forgotten() -> None:
    """torch keeps what it learns of every traced operator with the sizes of its trace, which never come again."""
    FakeTensorMode.cache_clear()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
