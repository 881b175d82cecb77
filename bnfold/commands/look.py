"""``inspect`` and ``doctor``: what looks and writes nothing."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Any

import click

from bnfold.commands.arguments import (
    Command,
    Job,
    debug_option,
    health_options,
    input_options,
    inspected_options,
    json_option,
    report_options,
)
from bnfold.commands.running import load_model, pipeline_options, present, quiet, working
from bnfold.commands.terminal import show, write

if TYPE_CHECKING:
    from bnfold.render import Page


@click.command(cls=Command)
@click.argument("source")
@inspected_options
@input_options
@health_options
@report_options
@debug_option
def inspect(source: str, **given: Any) -> int:
    """Print the health of every BatchNorm and the fold plan. Writes nothing.

    Exit code 0 whatever it finds, unless --strict.

    \b
    bnfold inspect net.py:make --weights net.safetensors
    bnfold inspect net.py:make --weights net.safetensors --data train.npz --strict
    """
    job = Job.of(source, given)
    with working(job) as progress:
        from bnfold import pipeline

        loaded, inputs = load_model(job)
        report = pipeline.inspect(loaded.model, **inputs, options=pipeline_options(job, loaded, progress))

    def render(page: Page, verbose: bool) -> None:
        from bnfold.render import diagnosis

        diagnosis(report, page, verbose=verbose)

    present(job, report, render)
    return 1 if given["strict"] and not report.healthy else 0


@click.command(cls=Command)
@json_option
@debug_option
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> int:
    """Print versions, providers that really work, and what is wrong here. Exit code 5 if something is."""
    with quiet(debug=bool(ctx.meta.get("debug"))), contextlib.redirect_stdout(sys.stderr):
        from bnfold.runtime.doctor import examine

        found = examine()
    if as_json:
        import json
        from dataclasses import asdict

        write(json.dumps([asdict(finding) for finding in found], indent=2) + "\n", sys.stdout)
    else:
        from bnfold.render import findings

        show(lambda page: findings(found, page))
    return 5 if any(finding.level == "problem" for finding in found) else 0
