"""``inspect`` and ``doctor``: what looks and writes nothing."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import click

from bnfold.commands.arguments import FINDINGS, HEALTH, INPUTS, INSPECTED, REPORT, command
from bnfold.commands.job import Job
from bnfold.commands.running import finish, load_model, pipeline_options, quiet, working
from bnfold.commands.terminal import show, write


@command(click.argument("source"), INSPECTED, INPUTS, HEALTH, REPORT)
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
    return finish(job, report)


@command(FINDINGS)
def doctor(as_json: bool) -> int:
    """Print versions, providers that really work, and what is wrong here. Exit code 5 if something is."""
    with quiet(), contextlib.redirect_stdout(sys.stderr):
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
