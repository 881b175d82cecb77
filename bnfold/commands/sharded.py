"""Data in shards: which files they are, and what is asked of them, here or on workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnfold.commands.running import Job, quiet
from bnfold.errors import InputError, UsageError

if TYPE_CHECKING:
    from bnfold.fleet.cluster import Make
    from bnfold.render import Progress


def shards_of(job: Job) -> list[str]:
    """The files that ``--data`` names; none where it is one of this machine, and no worker is asked for.

    InputError where there is no such file, UsageError where there are workers and no data.
    """
    from bnfold.fleet.places import is_url, matching

    given, text = job.given, str(job.given["data"] or "")
    if not text and (given["scheduler"] or given["workers"]):
        raise UsageError("workers go through data, and there is none", hint="Add --data, or leave them out")
    pattern = is_url(text) or (bool(set("*?[") & set(text)) and not Path(text).exists())
    if not pattern:
        return [text] if text and (given["scheduler"] or given["workers"]) else []
    found = matching(text)
    if not found:
        raise InputError("no file is called like that", where=f"--data {text}")
    return found


@contextmanager
def sharded(job: Job, make: Make, progress: Progress, stage: str) -> Iterator[tuple[Any, Callable[[Any], Any] | None]]:
    """The data that the command itself reads, the first of several, and a function that asks them all, if several.

    Args:
        make: what answers, made in every process.
        progress: is told of the shards that have answered.
    """
    if not (shards := shards_of(job)):
        yield job.given["data"], None
        return
    from bnfold.fleet.cluster import Where, asking
    from bnfold.fleet.places import fetched

    where = Where(job.given["scheduler"], job.given["workers"])
    with (
        fetched(shards[0]) as first,
        asking(shards, make, where, lambda done, of: progress(stage, done, of)) as ask,
    ):
        yield first, ask


def looker(job: Job, file: Path | None) -> Callable[[Path, Any], Any]:
    """Sees how an ONNX file, or a runner, does on a shard of the data, against the model that the job names."""
    from bnfold import stages
    from bnfold.report.progress import silent

    with quiet():
        loaded, inputs = job.load_model()
        return stages.looker(file, loaded.model, **inputs, options=job.options(loaded, silent))


def observer(job: Job) -> Callable[[Path, Any], Any]:
    """Measures the BatchNorms of the model that the job names on a shard of the data."""
    from bnfold import stages

    with quiet():
        return stages.observer(job.load_source().model, only=job.given["only"] or None, batch=job.given["batch_size"])
