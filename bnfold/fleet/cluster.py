"""The workers: those of this machine, started for one run, or those of a scheduler that is there already."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from bnfold.errors import BnfoldError, ProviderError
from bnfold.fleet.places import fetched

if TYPE_CHECKING:
    from distributed import Client

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
#: Workers that may die under a task before it is given up.
DEATHS = 3
#: Memory that a worker of this machine is to have at least, in bytes.
_ROOM = 2 * 10**9
#: Seconds until a scheduler must answer, and until a first worker must be there.
_CONNECT, _WAIT = 30, 60.0


@dataclass(frozen=True)
class Where:
    """On which workers: those of ``scheduler``, or that many of this machine, each with ``memory`` bytes."""

    scheduler: str | None = None
    workers: int | None = None
    memory: int | None = None


class SchedulerGoneError(ProviderError):
    """The scheduler went away while tasks were under way."""


@contextmanager
def connected(where: Where, *, tasks: int, gpus: bool = False) -> Iterator[Client]:
    """A client of the workers; ProviderError where distributed is not installed, or no scheduler or worker is there.

    Args:
        tasks: how many there will be; more workers than that are not started.
        gpus: whether some need a GPU: of this machine's, each worker is then given one while there are any.
    """
    try:
        import dask
        import distributed
    except ImportError as error:
        hint = "pip install 'bnfold[fleet]'"
        raise ProviderError("workers are those of Dask's distributed, which is missing", hint=hint) from error
    with ExitStack() as stack:
        settings: dict[str, Any] = {
            "distributed.scheduler.allowed-failures": DEATHS - 1,
            "distributed.scheduler.worker-saturation": 1.0,  # what waits for a worker does not die with it
            "distributed.comm.timeouts.connect": f"{_CONNECT}s",
            "distributed.worker.daemon": False,
            "distributed.diagnostics.nvml": False,
            "logging.distributed": "critical",
        }
        stack.enter_context(dask.config.set(settings))
        try:
            address: Any = where.scheduler or stack.enter_context(_machine(where, tasks, gpus))
            client = stack.enter_context(distributed.Client(address, timeout=_CONNECT))
            client.wait_for_workers(1, timeout=_WAIT)
        except (OSError, TimeoutError, ValueError) as error:
            what = f"no scheduler with workers answers: {error}" if where.scheduler else f"no worker started: {error}"
            hint = "Start one with 'dask scheduler', and workers with 'dask worker ADDRESS --nthreads 1'"
            raise ProviderError(what, where=where.scheduler, hint=hint if where.scheduler else None) from error
        yield client


@contextmanager
def _machine(where: Where, tasks: int, gpus: bool) -> Iterator[Any]:
    """A cluster of this machine, whose cores and memory its workers share."""
    import psutil
    from distributed import Nanny, Scheduler, SpecCluster

    total = psutil.virtual_memory().total
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    count = where.workers or max(1, min(cores, tasks, int(total // (where.memory or _ROOM))))
    there = 0
    if gpus:
        import torch

        there = torch.cuda.device_count()
    threads = str(max(1, cores // count))
    environment = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), threads)
    with tempfile.TemporaryDirectory(prefix="bnfold-workers-") as folder:
        options: dict[str, Any] = {
            "nthreads": 1, "memory_limit": where.memory or total // count, "env": environment,
            "local_directory": folder, "silence_logs": logging.CRITICAL, "dashboard_address": None,
        }  # fmt: skip
        specification = {
            i: {"cls": Nanny, "options": options | ({"resources": {"GPU": 1}} if i < there else {})}
            for i in range(count)
        }
        scheduler = {"cls": Scheduler, "options": {"dashboard_address": None, "host": "127.0.0.1"}}
        with SpecCluster(specification, scheduler, silence_logs=logging.CRITICAL) as cluster:
            yield cluster


def spread(
    client: Client,
    function: Callable[[_Item], _Result],
    items: Sequence[_Item],
    resources: Callable[[_Item], Mapping[str, float]] = lambda item: {},
) -> Iterator[tuple[int, _Result | BnfoldError]]:
    """What ``function`` makes of every item, each with the item's index, in the order in which they end.

    A worker that dies under an item costs a retry; after ``DEATHS`` of them the result is an error. SchedulerGoneError
    where the scheduler went away.
    """
    from distributed import as_completed

    offered = [worker["resources"] for worker in client.scheduler_info(n_workers=-1)["workers"].values()]
    index: dict[str, int] = {}
    alike: dict[tuple[tuple[str, float], ...], list[int]] = {}
    for i, item in enumerate(items):
        alike.setdefault(tuple(sorted(resources(item).items())), []).append(i)
    futures: list[Any] = []
    for needed, which in alike.items():
        if not any(all(has.get(name, 0) >= much for name, much in needed) for has in offered):
            words = ", ".join(f"{much:g} {name}" for name, much in needed)
            error = ProviderError(f"no worker has {words}", hint="Start one: dask worker --resources")
            yield from ((i, error) for i in which)
            continue
        some = client.map(function, [items[i] for i in which], pure=False, resources=dict(needed) or None)
        index |= {future.key: i for future, i in zip(some, which)}
        futures += some
    for batch in as_completed(futures).batches():
        for future in batch:
            yield index[future.key], _outcome(client, future)
            future.release()


def _outcome(client: Client, future: Any) -> Any:
    from distributed import KilledWorker
    from distributed.client import FutureCancelledError
    from distributed.comm import CommClosedError

    try:
        return future.result()
    except BnfoldError as error:
        return error
    except KilledWorker as error:
        died = f"{error.allowed_failures + 1} workers died while they ran it"
        return ProviderError(died, hint="They were out of memory, or their machines went away")
    except Exception as error:
        # What is raised depends on what was under way: a task, or the way of its result.
        if isinstance(error, (FutureCancelledError, CommClosedError)) or client.status != "running":
            hint = "What is done is stored: run the same command again"
            raise SchedulerGoneError("the scheduler went away", hint=hint) from error
        return BnfoldError(f"internal: {type(error).__name__}: {error}")


# -- one model on data in many files: a question to each, here or on workers -------------------------------------------
#
# An answer does not depend on where it was found: every worker makes the model anew from its source, computes with one
# thread, and begins each file from the same state. So the sum of the answers, taken in the order of the files, has the
# same bits whoever finished first and however many workers there were.

_Question = TypeVar("_Question")
_Answer = TypeVar("_Answer")
#: Answers a question about a file; made once in a process, where the model is loaded and captured.
Make = Callable[[], Callable[[Path, Any], Any]]
_made: dict[str, Callable[[Path, Any], Any]] = {}
_lock = threading.Lock()


@contextmanager
def asking(
    shards: Sequence[str], make: Make, where: Where, progress: Callable[[int, int], None]
) -> Iterator[Callable[[_Question], list[_Answer]]]:
    """A function that asks every shard, and gives the answers in their order.

    It raises the BnfoldError of a shard that cannot be read, or that fails on what it is asked.

    Args:
        shards: paths, or URLs for fsspec.
        make: is called once in every process, in this one's folder, and so must be known by name there.
        where: the workers; without a scheduler and a number of them, this process.
        progress: is told how many shards have answered, and of how many.
    """
    run, folder = uuid.uuid4().hex, str(Path.cwd())
    with ExitStack() as stack:
        stack.callback(_made.pop, run, None)
        client: Any = None
        if where.scheduler or where.workers:
            client = stack.enter_context(connected(where, tasks=len(shards)))

        def ask(question: _Question) -> list[_Answer]:
            tasks = [(run, folder, make, shard, question) for shard in shards]
            answers = spread(client, _answer, tasks) if client else enumerate(map(_answer, tasks))
            found: dict[int, Any] = {}
            for i, answer in answers:
                if isinstance(answer, BnfoldError):
                    raise answer
                found[i] = answer
                progress(len(found), len(shards))
            return [found[i] for i in range(len(shards))]

        yield ask


def _answer(task: tuple[str, str, Make, str, Any]) -> Any:
    run, folder, make, shard, question = task
    with _lock, _one_thread():
        os.chdir(folder)
        if run not in _made:
            _made.clear()  # a worker keeps the model of one run
            _made[run] = make()
        try:
            with fetched(shard) as path:
                return _made[run](path, question)
        except BnfoldError as error:
            error.where = error.where or shard
            raise


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums are made in an order that depends on the number of threads."""
    from bnfold.graph.threads import torch_threads

    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # which sessions of ONNX Runtime go by
    try:
        with torch_threads(1):
            yield
    finally:
        os.environ.pop("OMP_NUM_THREADS")
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before
