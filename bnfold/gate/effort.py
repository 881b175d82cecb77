"""How much a model costs to run, and how many runs say enough of it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch.utils.flop_counter import FlopCounterMode

from bnfold.gate.samples import MIN_SAMPLES
from bnfold.graph.capture import Captured
from bnfold.graph.interpret import Runner
from bnfold.graph.threads import torch_threads

#: Seconds that one run of the example takes before a second thread pays.
LONG_RUN = 0.1


def has_summaries(captured: Captured) -> bool:
    """Whether an output is a handful of numbers for a whole batch, so that a run of many samples says as little as one.

    Ten runs are then made, as ten samples are of other outputs.
    """
    (outputs,) = captured.program.graph.output_node().args
    values = [getattr(node, "meta", {}).get("val") for node in cast("Sequence[Any]", outputs)]
    return any(
        isinstance(value, torch.Tensor)
        and value.is_floating_point()
        and not any(isinstance(size, torch.SymInt) for size in value.shape)
        and value.numel() < MIN_SAMPLES
        for value in values
    )


def operations(captured: Captured) -> float:
    """Floating-point operations of convolutions and products, for one sample of the example."""
    rows = max((x.shape[0] for x in captured.flat if isinstance(x, torch.Tensor) and x.ndim), default=1)
    with contextlib.suppress(Exception), FlopCounterMode(display=False) as counter:
        Runner(captured.program)(captured.flat)
        return float(counter.get_total_flops()) / max(rows, 1)
    return 0.0


@contextlib.contextmanager
def threads_that_pay(captured: Captured) -> Iterator[None]:
    """One thread for a model that runs in a blink: several save it nothing, and cost much on a busy machine."""
    with torch_threads(1) as threads:
        start = time.perf_counter()
        with contextlib.suppress(Exception):  # whoever runs it next reports that
            Runner(captured.program)(captured.flat)
        if time.perf_counter() - start > LONG_RUN:
            torch.set_num_threads(threads)
        yield
