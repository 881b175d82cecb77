"""``check``: what judges a file that is there already."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bnfold.commands.arguments import (
    Command,
    Job,
    debug_option,
    device_option,
    gate_options,
    input_options,
    model_options,
    report_options,
)
from bnfold.commands.running import exit_code, load_model, pipeline_options, present, with_arguments, working

if TYPE_CHECKING:
    from bnfold.render import Page


@click.command(cls=Command)
@click.argument("file", metavar="NET.ONNX", type=click.Path(path_type=Path))
@click.argument("source")
@model_options
@input_options
@gate_options
@device_option
@report_options
@debug_option
def check(file: Path, source: str, **given: Any) -> int:
    """Judge an existing ONNX file against a torch model.

    \b
    bnfold check net.onnx net.py:make --weights net.safetensors --data samples.npz
    """
    job = Job.of(source, given, reads=[file])
    with working(job) as progress:
        from bnfold import pipeline
        from bnfold.stages import source_facts

        loaded, inputs = load_model(job)
        report = pipeline.check(file, loaded.model, **inputs, options=pipeline_options(job, loaded, progress))
        origin = source_facts(loaded.provenance)

    def render(page: Page, verbose: bool) -> None:
        from bnfold.render import check_report

        check_report(origin, str(file), with_arguments(job, report), page, verbose=verbose)

    present(job, report, render)
    return exit_code(job, report)
