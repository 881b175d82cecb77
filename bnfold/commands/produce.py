"""``export`` and ``fold``: what writes a model."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bnfold.commands.arguments import (
    Command,
    Job,
    debug_option,
    engine_options,
    fold_options,
    gate_options,
    input_options,
    model_options,
    onnx_options,
    output_options,
    report_options,
)
from bnfold.commands.running import exit_code, is_onnx, load_model, pipeline_options, present, with_arguments, working

if TYPE_CHECKING:
    from bnfold.render import Page
    from bnfold.report import ExportReport


@click.command(cls=Command)
@click.argument("source")
@output_options
@onnx_options
@model_options
@input_options
@gate_options
@engine_options
@report_options
@debug_option
def export(source: str, **given: Any) -> int:
    """Fold, lower to ONNX, check, and write.

    The file is written only if ONNX Runtime's outputs are as close to float64 as those of the unfolded model.

    \b
    bnfold export net.py:make --weights net.safetensors -o net.onnx
    bnfold export net.py:make --arg width=32 --input "x:float32[N,3,H,W]" --dynamic N=1..64 -o net.onnx
    """
    return _produce(source, given, "export", ".onnx")


@click.command(cls=Command)
@click.argument("source")
@output_options
@fold_options
@model_options
@input_options
@gate_options
@report_options
@debug_option
def fold(source: str, **given: Any) -> int:
    """Fold, check, and write the folded program as .pt2, or the folded weights of the model's class; no ONNX.

    \b
    bnfold fold net.py:make --weights net.safetensors -o net.pt2
    bnfold fold net.py:make --weights net.safetensors --eager -o folded.safetensors
    """
    if is_onnx(source):
        return _produce(source, given, "export", ".onnx")
    return _produce(source, given, "save_folded", ".safetensors" if given["eager"] else ".pt2")


def _produce(source: str, given: dict[str, Any], command: str, suffix: str) -> int:
    """What ``export`` and ``fold`` share: all but the pipeline's function and the kind of file."""
    job = Job.of(source, given, suffix=suffix)
    with contextlib.ExitStack() as stack:
        output = given["output"]
        if output is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="bnfold-"))
            output = Path(folder) / f"model{suffix}"
        else:
            from bnfold.store import check_destination

            check_destination(output, sources=job.reads)  # before torch is imported, and anything is computed
        with working(job) as progress:
            from bnfold import pipeline

            loaded, inputs = load_model(job)
            options = pipeline_options(job, loaded, progress)
            report: ExportReport = getattr(pipeline, command)(loaded.model, output, **inputs, options=options)

    def render(page: Page, verbose: bool) -> None:
        from bnfold.render import export_report

        export_report(
            with_arguments(job, report), page, destination=str(output), dry_run=given["dry_run"], verbose=verbose
        )

    present(job, report, render)
    return exit_code(job, report.check)
