"""``check`` and ``bisect``: what judges a file that is there already, and finds the place where it goes wrong."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click

from bnfold.commands.arguments import DEVICE, ENGINE, GATE, INPUTS, MODEL, REPORT, SEARCH, WORKERS, command
from bnfold.commands.job import Job
from bnfold.commands.running import finish, load_model, pipeline_options, working
from bnfold.commands.sharded import looker, sharded
from bnfold.errors import UsageError

_NAMED = click.argument("named", metavar="[NET.ONNX] SOURCE", nargs=-1, required=True)
_FILE = click.argument("file", metavar="NET.ONNX", type=click.Path(path_type=Path))


@command(_NAMED, MODEL, INPUTS, GATE, ENGINE, WORKERS, REPORT)
def check(named: tuple[str, ...], **given: Any) -> int:
    """Judge an existing ONNX file against a torch model or another file, or whatever else runs the model.

    \b
    bnfold check net.onnx net.py:make --weights net.safetensors --data samples.npz
    bnfold check simplified.onnx net.onnx
    bnfold check net.onnx net.py:make --weights net.safetensors --data 'shards/*.npz' --workers 4
    bnfold check net.onnx net.py:make --device openvino --provider-option device_type=CPU
    bnfold check --runner engine.py:infer net.py:make --weights net.safetensors
    """
    if len(named) != 2 and not (given["runner"] and len(named) == 1):
        raise UsageError("name the file and the model that it is judged against", hint="See bnfold check --help")
    *files, source = named
    file = Path(files[0]) if files else None
    job = Job.of(source, given, reads=[file] if file else [])
    with working(job) as progress:
        from bnfold import pipeline

        loaded, inputs = load_model(job)
        with sharded(job, partial(looker, job, file), progress, "accuracy") as (data, spread):
            options = replace(pipeline_options(job, loaded, progress), data=data)
            report = pipeline.check(file, loaded.model, **inputs, options=options, spread=spread)
    return finish(job, report)


@command(_FILE, click.argument("source"), MODEL, INPUTS, SEARCH, DEVICE, REPORT)
def bisect(file: Path, source: str, **given: Any) -> int:
    """Name the first module of an ONNX file that leaves the noise, and what was folded into it.

    The file is held against a torch model, or against another file.

    Where ONNX Runtime's optimisations make a right file wrong, name the one to disable. The exit code is 0 where
    nothing leaves the noise, and 1 where something does.

    \b
    bnfold bisect net.failed.onnx net.py:make --weights net.safetensors
    bnfold bisect simplified.onnx net.onnx
    """
    job = Job.of(source, given, reads=[file])
    for path in given["report"]:
        if path.suffix.lower() != ".json":
            raise UsageError("what bisect finds is written as .json alone", where=f"--report {path}")
    with working(job) as progress:
        from bnfold import pipeline

        loaded, inputs = load_model(job)
        report = pipeline.bisect(file, loaded.model, **inputs, options=pipeline_options(job, loaded, progress))
    return finish(job, report)
