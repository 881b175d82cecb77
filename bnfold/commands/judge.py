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
    engine_options,
    gate_options,
    input_options,
    model_options,
    report_options,
    workers_options,
)
from bnfold.commands.running import exit_code, load_model, pipeline_options, present, with_arguments, working
from bnfold.commands.sharded import looker, sharded
from bnfold.errors import UsageError

if TYPE_CHECKING:
    from bnfold.render import Page


@click.command(cls=Command)
@click.argument("named", metavar="[NET.ONNX] SOURCE", nargs=-1, required=True)
@model_options
@input_options
@gate_options
@engine_options
@workers_options
@report_options
@debug_option
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
        from bnfold.stages import source_facts

        loaded, inputs = load_model(job)
        with sharded(job, partial(looker, job, file), progress, "accuracy") as (data, spread):
            options = replace(pipeline_options(job, loaded, progress), data=data)
            report = pipeline.check(file, loaded.model, **inputs, options=options, spread=spread)
        origin = source_facts(loaded.provenance)

    def render(page: Page, verbose: bool) -> None:
        from bnfold.render import check_report

        check_report(origin, str(file or given["runner"]), with_arguments(job, report), page, verbose=verbose)

    present(job, report, render)
    return exit_code(job, report)
