"""``bench``: what takes the time of models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bnfold.commands.arguments import LATENCY_REPORT, MEASUREMENT, MODEL, command
from bnfold.commands.job import Job
from bnfold.commands.running import finish, load_source, working
from bnfold.errors import UsageError

if TYPE_CHECKING:
    import torch

_FILES = click.argument(
    "files", metavar="NET.ONNX [OTHER.ONNX]...", nargs=-1, required=True, type=click.Path(path_type=Path)
)


@command(_FILES, MEASUREMENT, MODEL, LATENCY_REPORT)
def bench(files: tuple[Path, ...], **given: Any) -> int:
    """Measure latency, in pairs: every round gives each file, and the torch model, a turn in random order.

    A ratio is a time over the first file's, the median over the rounds. Random inputs; nothing is judged or written.

    \b
    bnfold bench net.onnx other.onnx --threads 1
    bnfold bench net.onnx --source net.py:make --weights net.safetensors --batch 8
    """
    source, shapes = given["source"], _shapes(given["inputs"])
    _check_model_options(given)
    job = Job.of(source or str(files[0]), given, reads=files)
    with working(job) as progress:
        from bnfold.timing.bench import bench as run

        model, args, kwargs = _load(job) if source else (None, None, {})
        report = run(
            files, model=model, name=source or "", args=args, kwargs=kwargs, device=given["device"],
            provider_options=given["provider_options"],
            threads=given["threads"], batch=given["batch"], shapes=shapes, rounds=given["runs"],
            warmup=given["warmup"], seed=given["seed"], progress=progress,
        )  # fmt: skip
    return finish(job, report)


def _check_model_options(given: Mapping[str, Any]) -> None:
    names = ("weights", "weights_key", "strip_prefix", "args", "unsafe_pickle", "dtype")
    if given["source"] is None and (said := [name for name in names if given[name]]):
        option = {"args": "arg"}.get(said[0], said[0]).replace("_", "-")
        raise UsageError("it is about a torch model, and none is named", where=f"--{option}", hint="Add --source")


def _load(job: Job) -> tuple[torch.nn.Module, tuple[Any, ...] | None, dict[str, Any]]:
    """The torch model in eval mode and in the dtype asked for, and its own example inputs."""
    import torch

    given, loaded = job.given, load_source(job)
    if not isinstance(loaded.model, torch.nn.Module):
        if given["dtype"]:
            raise UsageError("--dtype does not apply to a .pt2 program", hint="Its dtype is fixed in the file")
        return loaded.model.module(), loaded.args, dict(loaded.kwargs)
    model = loaded.model.eval()
    return model.to(getattr(torch, given["dtype"])) if given["dtype"] else model, loaded.args, dict(loaded.kwargs)


def _shapes(texts: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """The shapes that the user gave, by input."""
    if not texts:
        return {}
    from bnfold.loading.specs import parse_input

    found: dict[str, tuple[int, ...]] = {}
    for text in texts:
        spec = parse_input(text)
        letters = [dim for dim in spec.dims if isinstance(dim, str)]
        if letters or spec.name is None or spec.name in found:
            what = f"{letters[0]} is no size" if letters else "it is given twice" if spec.name else "it names no input"
            raise UsageError(what, where=f"--input {text}", hint="Write NAME[1,3,224,224], once for an input")
        found[spec.name] = tuple(int(dim) for dim in spec.dims)
    return found
