"""One model on data in many files: a question to each, here or on workers, and the answers in the order of the files.

An answer does not depend on where it was found: every worker makes the model anew from its source, computes with one
thread, and begins each file from the same state. So the sum of the answers, taken in the order of the files, has the
same bits whoever finished first and however many workers there were.
"""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from bnfold.errors import BnfoldError
from bnfold.fleet.cluster import Where, connected, spread
from bnfold.fleet.places import fetched

_Question = TypeVar("_Question")
_Answer = TypeVar("_Answer")
#: Answers a question about a file; made once in a process, where the model is loaded and captured.
Make = Callable[[], Callable[[Path, Any], Any]]
_made: dict[str, Callable[[Path, Any], Any]] = {}
_lock = threading.Lock()


@dataclass(frozen=True)
class _Task(Generic[_Question]):
    run: str
    folder: str
    make: Make
    shard: str
    question: _Question


@contextmanager
def asking(
    shards: Sequence[str], make: Make, where: Where, progress: Callable[[int, int], None]
) -> Iterator[Callable[[_Question], list[_Answer]]]:
    """A function that asks every shard, and gives the answers in their order.

    Args:
        shards: paths, or URLs for fsspec.
        make: is called once in every process, in this one's folder, and so must be known by name there.
        where: the workers; without a scheduler and a number of them, this process.
        progress: is told how many shards have answered, and of how many.

    Raises:
        BnfoldError: a shard cannot be read, or what it was asked fails on it.
    """
    run, folder = uuid.uuid4().hex, str(Path.cwd())
    with ExitStack() as stack:
        stack.callback(_made.pop, run, None)
        client: Any = None
        if where.scheduler or where.workers:
            client = stack.enter_context(connected(where, tasks=len(shards)))

        def ask(question: _Question) -> list[_Answer]:
            tasks = [_Task(run, folder, make, shard, question) for shard in shards]
            answers = spread(client, _answer, tasks) if client else enumerate(map(_answer, tasks))
            found: dict[int, Any] = {}
            for i, answer in answers:
                if isinstance(answer, BnfoldError):
                    raise answer
                found[i] = answer
                progress(len(found), len(shards))
            return [found[i] for i in range(len(shards))]

        yield ask


def _answer(task: _Task[Any]) -> Any:
    with _lock, _one_thread():
        os.chdir(task.folder)
        if task.run not in _made:
            _made.clear()  # a worker keeps the model of one run
            _made[task.run] = task.make()
        try:
            with fetched(task.shard) as path:
                return _made[task.run](path, task.question)
        except BnfoldError as error:
            error.where = error.where or task.shard
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
