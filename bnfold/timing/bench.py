"""Latency, measured in pairs: every contestant has a turn in every round, so that a slow moment hits them all alike.

What is compared is the ratio within a round, and its median over the rounds: a drift of the machine's speed cancels,
and an interrupted turn moves one ratio of many. Python's garbage collector is off while the clock runs.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import platform
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bnfold.report import Latency, LatencyReport
from bnfold.report.progress import Progress, silent
from bnfold.runtime.model_file import read_model
from bnfold.runtime.runtime import installed_runtimes, pip_problem, resolve_device
from bnfold.timing.contestants import (
    Contestant,
    matched_feeds,
    onnx_contestants,
    random_feeds,
    sized_inputs,
    torch_arguments,
    torch_contestant,
    written,
)

if TYPE_CHECKING:
    import torch

#: Seconds that a turn lasts at least.
TURN = 0.005
#: Rounds from which on the interval below has its confidence.
MIN_ROUNDS = 6
CONFIDENCE = 0.95

#: p95 over the median from which on a reader is told that the machine was busy.
BUSY = 1.5


def bench(
    paths: Sequence[str | os.PathLike[str]],
    *,
    model: torch.nn.Module | None = None,
    name: str = "torch",
    args: tuple[Any, ...] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    device: str = "cpu",
    provider_options: Mapping[str, str] | None = None,
    threads: int | None = None,
    batch: int | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    rounds: int = 50,
    warmup: int = 5,
    seed: int = 0,
    memory: bool = True,
    progress: Progress = silent,
) -> LatencyReport:
    """Latency of ONNX files, and of a torch module beside them, on the same random inputs.

    Args:
        paths: the files; the first is what the ratios refer to.
        model: a torch module that takes the files' inputs; not touched.
        args, kwargs: its example inputs, where it has any that say how the arrays are nested.
        device: the provider that runs the files; "auto" is CUDA where it works, and no other falls back. The torch
            module runs on the GPU where the files' inputs are on one of NVIDIA's, and else on the CPU.
        threads: for the operators of one call; None leaves the choice to ONNX Runtime and torch.
        batch: the size of a dynamic batch; 1 by default.
        shapes: whole shapes by input, for other dynamic sizes.
        rounds, warmup, seed: as for ``measure``.

    Raises:
        BnfoldError: a file cannot be opened, the inputs differ or their sizes are unknown, or the model fails on them.
    """
    progress("open", 0, 1)
    others = _others()
    where = resolve_device(device, provider_options)
    for path in paths:
        read_model(Path(path))
    feeds = [random_feeds(sized_inputs(paths[0], batch=batch, shapes=shapes), seed)]
    feeds += [matched_feeds(path, feeds[0], paths[0]) for path in paths[1:]]
    with contextlib.ExitStack() as stack:
        if model is not None and threads is not None:
            from bnfold.graph.threads import torch_threads

            stack.enter_context(torch_threads(threads))
        contestants = onnx_contestants(paths, feeds, device=where, threads=threads, memory=memory)
        if model is not None:
            given, named = torch_arguments(model, args, kwargs or {}, feeds[0], name)
            contestants.append(
                torch_contestant(name, model, given, named, device="cuda" if where.provider.memory == "cuda" else "cpu")
            )
        measured = measure(contestants, rounds=rounds, warmup=warmup, seed=seed, progress=progress)
    notes = (*filter(None, [pip_problem()]), *others, *_notes(contestants, measured))
    return LatencyReport(
        measured, rounds, warmup, threads, {n: written(array.dtype, array.shape) for n, array in feeds[0].items()},
        machine(with_torch=model is not None), notes,
    )  # fmt: skip


def measure(
    contestants: Sequence[Contestant],
    *,
    rounds: int = 50,
    warmup: int = 5,
    seed: int = 0,
    progress: Progress = silent,
) -> tuple[Latency, ...]:
    """A result for each contestant, all of which run in turn, ``rounds`` times, in random order within a round.

    Args:
        contestants: the first is what the ratios refer to.
        rounds: turns of each that count; the interval holds what it says from 6 on.
        warmup: calls of each, at least one, before the first round.
    """
    for contestant in contestants:
        for _ in range(max(warmup, 1)):
            contestant.run()
    calls = [_calls(contestant.run) for contestant in contestants]
    times = np.empty((rounds, len(contestants)))
    shuffle, collecting = random.Random(seed), gc.isenabled()
    order = list(range(len(contestants)))
    gc.collect()
    gc.disable()
    try:
        for row in range(rounds):
            shuffle.shuffle(order)
            for i in order:
                times[row, i] = _turn(contestants[i].run, calls[i])
            progress("measure", row + 1, rounds)
    finally:
        if collecting:
            gc.enable()
    return tuple(_result(c, times[:, i], times[:, 0], calls[i]) for i, c in enumerate(contestants))


def interval(ratios: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """A confidence interval of the median that assumes no distribution; the whole range where there are too few.

    The number of independent values below their median is binomial (n, 1/2), so the k-th smallest and the k-th largest
    enclose it with probability ``1 - 2 P(X < k)`` (Conover, Practical Nonparametric Statistics, 3.2).

    >>> interval([3.0, 1.0, 2.0, 4.0, 5.0, 6.0, 7.0, 8.0])
    (1.0, 8.0)
    """
    values, n = sorted(ratios), len(ratios)
    outside, k = 0.0, 0
    while k < n // 2 and 2 * (outside := outside + math.comb(n, k) / 2**n) <= 1 - confidence:
        k += 1
    k = max(k, 1)
    return values[k - 1], values[n - k]


def _calls(run: Callable[[], object]) -> int:
    """Calls that fill a turn, from the fastest of three."""
    return max(1, math.ceil(TURN / max(min(_turn(run, 1) for _ in range(3)), 1e-9)))


def _turn(run: Callable[[], object], calls: int) -> float:
    """Seconds per call."""
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def _result(contestant: Contestant, own: np.ndarray, first: np.ndarray, calls: int) -> Latency:
    ratios = own / first
    return Latency(
        contestant.name, contestant.provider, float(np.median(own)), float(np.quantile(own, 0.95)), calls,
        float(np.median(ratios)), interval(ratios.tolist()), contestant.load, contestant.memory,
    )  # fmt: skip


def _notes(contestants: Sequence[Contestant], measured: Sequence[Latency]) -> Iterator[str]:
    first = contestants[0]
    for other in contestants[1:]:
        if other.outputs != first.outputs:
            yield f"the outputs of {other.name} have other shapes than those of {first.name}: is it the same model?"
    worst = max(measured, key=lambda latency: latency.p95 / latency.median)
    if worst.p95 > BUSY * worst.median:
        yield f"turns of {worst.name} vary: something else keeps this machine busy, or its clock changes"


def _others() -> list[str]:
    """What is said where other programs take so much of the machine that nothing measured on it can be trusted."""
    with contextlib.suppress(OSError, AttributeError):
        cores, load = _cores(), os.getloadavg()[0]
        if load > 1 + cores / 4:  # one is what loading this program and the models takes
            return [
                f"this machine is too busy to measure on: {load:.1f} programs wanted to run on its {cores} cores in "
                "the last minute; take no figure from here"
            ]
    return []


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine(*, with_torch: bool = True) -> dict[str, str]:
    """The processor, its cores that this process may use, and the versions of what runs the models."""
    names = [*installed_runtimes(), *(["torch"] if with_torch else [])]
    found = {"processor": _processor(), "cores": str(_cores()), "system": f"{platform.system()} {platform.machine()}",
             "date": datetime.now(UTC).isoformat(timespec="seconds")}  # fmt: skip
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
