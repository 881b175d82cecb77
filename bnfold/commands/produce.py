"""``export``, ``fold`` and ``calibrate``: what writes a model."""

from __future__ import annotations

import contextlib
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import click

from bnfold.commands.arguments import (
    CALIBRATION,
    EAGER,
    ENGINE,
    GATE,
    INPUTS,
    MODEL,
    ONNX,
    OUTPUT,
    REPORT,
    UNCONVERTED,
    WORKERS,
    command,
)
from bnfold.commands.job import Job
from bnfold.commands.running import finish, is_onnx, load_model, load_source, pipeline_options, working
from bnfold.commands.sharded import observer, sharded


@command(click.argument("source"), OUTPUT, ONNX, MODEL, INPUTS, GATE, ENGINE, REPORT)
def export(source: str, **given: Any) -> int:
    """Fold, lower to ONNX, check, and write.

    The file is written only if ONNX Runtime's outputs are as close to float64 as those of the unfolded model.

    \b
    bnfold export net.py:make --weights net.safetensors -o net.onnx
    bnfold export net.py:make --arg width=32 --input "x:float32[N,3,H,W]" --dynamic N=1..64 -o net.onnx
    """
    return _produce(source, given, "export", ".onnx")


@command(click.argument("source"), OUTPUT, EAGER, MODEL, INPUTS, GATE, REPORT)
def fold(source: str, **given: Any) -> int:
    """Fold, check, and write the folded program as .pt2, or the folded weights of the model's class; no ONNX.

    \b
    bnfold fold net.py:make --weights net.safetensors -o net.pt2
    bnfold fold net.py:make --weights net.safetensors --eager -o folded.safetensors
    """
    if is_onnx(source):
        return _produce(source, given, "export", ".onnx")
    return _produce(source, given, "save_folded", ".safetensors" if given["eager"] else ".pt2")


def _produce(source: str, given: dict[str, Any], function: str, suffix: str) -> int:
    """What ``export`` and ``fold`` share: all but the pipeline's function and the kind of file."""
    job, output = Job.of(source, given, suffix=suffix), given["output"]
    with contextlib.ExitStack() as stack:
        if output is None:
            output = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bnfold-"))) / f"model{suffix}"
        with working(job) as progress:
            from bnfold import pipeline

            loaded, inputs = load_model(job)
            options = pipeline_options(job, loaded, progress)
            report = getattr(pipeline, function)(loaded.model, output, **inputs, options=options)
    return finish(job, report, destination=None if given["dry_run"] else str(output))


@command(click.argument("source"), CALIBRATION, UNCONVERTED, WORKERS, REPORT)
def calibrate(source: str, **given: Any) -> int:
    """Measure BatchNorm statistics over data, and write all weights with them.

    For BatchNorms without running statistics (they can be folded then), and for statistics that went bad.

    \b
    bnfold calibrate net.py:make --weights net.safetensors --data train.npz -o stats.safetensors
    bnfold calibrate net.py:make --data 's3://bucket/train/*.npz' --scheduler tcp://host:8786 -o stats.safetensors
    bnfold export net.py:make --weights stats.safetensors -o net.onnx
    """
    job = Job.of(source, given, suffix=".safetensors")
    with working(job) as progress:
        from bnfold import pipeline
        from bnfold.options import Options

        loaded = load_source(job)
        with sharded(job, partial(observer, job), progress, "calibrate") as (data, spread):
            report = pipeline.save_calibrated(
                loaded.model, given["output"], data, only=given["only"] or None, scheme=given["scheme"],
                batch=given["batch_size"], spread=spread,
                options=Options(provenance=loaded.provenance, sources=job.reads, progress=progress),
            )  # fmt: skip
    return finish(job, report)
