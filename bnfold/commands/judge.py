"""``check``: what judges a file that is there already."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
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
    workers_options,
)
from bnfold.commands.running import exit_code, load_model, pipeline_options, present, with_arguments, working
from bnfold.commands.sharded import looker, sharded

if TYPE_CHECKING:
    from bnfold.render import Page


@click.command(cls=Command)
@click.argument("file", metavar="NET.ONNX", type=click.Path(path_type=Path))
@click.argument("source")
@model_options
@input_options
@gate_options
@device_option
@workers_options
@report_options
@debug_option
def check(file: Path, source: str, **given: Any) -> int:
    """Judge an existing ONNX file against a torch model.

    \b
    bnfold check net.onnx net.py:make --weights net.safetensors --data samples.npz
    bnfold check net.onnx net.py:make --weights net.safetensors --data 'shards/*.npz' --workers 4
    """
    job = Job.of(source, given, reads=[file])
    with working(job) as progress:
        from bnfold import pipeline
        from bnfold.stages import source_facts

        loaded, inputs = load_model(job)
        with sharded(job, partial(looker, job, file), progress, "accuracy") as (data, spread):
            options = replace(pipeline_options(job, loaded, progress), data=data)
            report = pipeline.check(file, loaded.model, **inputs, options=options, spread=spread)
        origin = source_facts(loaded.provenance)

    def render(page: Page, verbose: bool) -> None:
        from bnfold.render import check_report

        check_report(origin, str(file), with_arguments(job, report), page, verbose=verbose)

    present(job, report, render)
    return exit_code(job, report)
