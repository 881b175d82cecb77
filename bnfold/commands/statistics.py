"""``calibrate``: what gives BatchNorms new statistics."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bnfold.commands.arguments import (
    Command,
    Job,
    calibration_options,
    debug_option,
    report_options,
    source_options,
    workers_options,
)
from bnfold.commands.running import load_source, present, working
from bnfold.commands.sharded import observer, sharded

if TYPE_CHECKING:
    from bnfold.render import Page


@click.command(cls=Command)
@click.argument("source")
@calibration_options
@source_options
@workers_options
@report_options
@debug_option
def calibrate(source: str, **given: Any) -> int:
    """Measure BatchNorm statistics over data, and write all weights with them.

    For BatchNorms without running statistics (they can be folded then), and for statistics that went bad.

    \b
    bnfold calibrate net.py:make --weights net.safetensors --data train.npz -o stats.safetensors
    bnfold calibrate net.py:make --data 's3://bucket/train/*.npz' --scheduler tcp://host:8786 -o stats.safetensors
    bnfold export net.py:make --weights stats.safetensors -o net.onnx
    """
    job = Job.of(source, given, suffix=".safetensors")
    output: Path = given["output"]
    from bnfold.store import check_destination

    check_destination(output, sources=job.reads)
    with working(job) as progress:
        from bnfold import pipeline
        from bnfold.options import Options

        loaded = load_source(job)
        with sharded(job, partial(observer, job), progress, "calibrate") as (data, spread):
            report = pipeline.save_calibrated(
                loaded.model, output, data, only=given["only"] or None, scheme=given["scheme"],
                batch=given["batch_size"], spread=spread,
                options=Options(provenance=loaded.provenance, sources=job.reads, progress=progress),
            )  # fmt: skip

    def render(page: Page, verbose: bool) -> None:
        from bnfold.render import calibration

        calibration(report, page, verbose=verbose)

    present(job, report, render)
    return 0
