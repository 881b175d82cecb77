"""``bisect``: what finds the place where a file goes wrong."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bnfold.commands.arguments import (
    Command,
    Job,
    bisect_options,
    debug_option,
    device_option,
    input_options,
    model_options,
    report_options,
)
from bnfold.commands.running import load_model, pipeline_options, present, working
from bnfold.commands.terminal import fail
from bnfold.errors import UsageError

if TYPE_CHECKING:
    from bnfold.render import Page


@click.command(cls=Command)
@click.argument("file", metavar="NET.ONNX", type=click.Path(path_type=Path))
@click.argument("source")
@model_options
@input_options
@bisect_options
@device_option
@report_options
@debug_option
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
    for path in job.given["report"]:
        if path.suffix.lower() != ".json":
            raise UsageError("what bisect finds is written as .json alone", where=f"--report {path}")
    with working(job) as progress:
        from bnfold import pipeline

        loaded, inputs = load_model(job)
        report = pipeline.bisect(file, loaded.model, **inputs, options=pipeline_options(job, loaded, progress))

    def render(page: Page, verbose: bool) -> None:
        from bnfold.render import bisection

        bisection(report, page, verbose=verbose)

    present(job, report, render)
    if not report.passed and given["quiet"]:
        from bnfold.render import found

        fail(found(report), 1)
    return 0 if report.passed else 1
