"""One run of a command: its model, its options, its quiet, its report and its exit code."""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import logging
import shlex
import sys
import warnings
from collections.abc import Callable, Collection, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from bnfold.commands.job import Job
from bnfold.commands.terminal import Unfailing, fail, show, write
from bnfold.errors import UsageError

if TYPE_CHECKING:
    from bnfold.loading.source import Loaded
    from bnfold.options import Options
    from bnfold.render import Progress, Report

_Report = TypeVar("_Report")
#: What a run that is proposed does not take over from this one: where it writes, and how much it says.
_OWN = {"output", "report", "as_json", "verbose", "quiet", "dry_run", "keep_failed", "update_baseline"}

VERDICT_CODES = {"pass": 0, "fail": 1, "inconclusive": 7}


def load_model(job: Job) -> tuple[Loaded, dict[str, Any]]:
    """The model that the source names, and its example inputs as the pipeline takes them, where any are given."""
    import torch

    from bnfold.loading.inputs import model_inputs

    specs, ranges = job.specs, job.ranges
    loaded = load_source(job)
    if is_onnx(job.source):
        if specs or ranges:
            raise UsageError("--input and --dynamic do not apply to an ONNX file", hint="Its inputs are in the file")
        return loaded, {}
    if job.given["static"] and not isinstance(loaded.model, torch.nn.Module):
        raise UsageError("--static does not apply to a .pt2 program", hint="Its dynamic sizes are fixed in the file")
    seed = job.given.get("seed", 0)
    args, kwargs, shapes = model_inputs(loaded.model, loaded.args, loaded.kwargs, specs, ranges, seed=seed)
    return loaded, {"args": args, "kwargs": kwargs, "dynamic_shapes": shapes}


def is_onnx(source: str) -> bool:
    """Whether a source is an ONNX file, by its name."""
    return source.lower().endswith(".onnx")


def load_source(job: Job) -> Loaded:
    """The model that the source names."""
    from bnfold.loading.load import load
    from bnfold.loading.normalize import Normalization

    given = job.given
    by_hand = Normalization.parse(given["mean_std"]) if given.get("mean_std") else None
    same = ("weights", "weights_key", "strip_prefix", "unsafe_pickle", "ignore")
    return load(
        job.source, factory_args=job.factory_args, strict=bool(given.get("strict")),
        normalize=by_hand or bool(given.get("normalize")), **{name: given[name] for name in same},
    )  # fmt: skip


def pipeline_options(job: Job, loaded: Loaded, progress: Callable[[str, int, int], None]) -> Options:
    """What the command line asks of the pipeline: options of one name as they are, and what those that say no mean."""
    from bnfold.options import Options

    given = job.given
    same = {each.name: given[each.name] for each in fields(Options) if each.name in given}
    own = {
        **{name: not given.get(f"no_{name}") for name in ("fold", "merge", "check")},
        "simplify": False if given.get("no_simplify") else given.get("simplify") or None,
        "provenance": loaded.provenance, "sources": job.reads, "progress": progress,
    }  # fmt: skip
    return Options(**{**same, **own})


@contextlib.contextmanager
def working(job: Job) -> Iterator[Progress]:
    """While it runs, what models and torch print shows only with --debug: stdout is the report's, stderr ours."""
    from bnfold.render import Progress

    out, err = (sys.stderr, sys.stderr) if _debugging() else (io.StringIO(), io.StringIO())
    stderr: Any = Unfailing(sys.stderr)
    progress = Progress(stderr, quiet=job.given["quiet"])
    with progress, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), quiet():
        progress("load", 0, 1)  # importing torch included
        if "bnfold.pipeline" not in sys.modules:
            gc.disable()
            importlib.import_module("bnfold.pipeline")
            gc.freeze()  # what was imported stays as long as the process: no collection need go through it
            gc.enable()
        yield progress


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps the warnings of torch and its company away, unless with --debug; whatever matters is in the report."""
    if _debugging():
        yield
        return
    before = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(before)


def _debugging() -> bool:
    context = click.get_current_context(silent=True)
    return context is not None and bool(context.meta.get("debug"))


def finish(job: Job, report: Report, *, destination: str | None = None) -> int:
    """Writes the report where it was asked for, whatever the verdict: to files, as JSON, or for people.

    Args:
        destination: the file to be written; None where there is none, or nothing is to be written.

    Returns:
        The exit code; of a run that failed, what is wrong has been told in one line with --quiet too.
    """
    from bnfold.render import document, in_a_line, printed
    from bnfold.store import atomic

    shared = _with_arguments(job, _with_command(job, report), shared=True)
    try:
        for path in job.given["report"]:
            with quiet():
                text = document(shared, path.suffix.lower())
            with atomic(path) as staged:
                staged.write_text(text, encoding="utf-8", errors="backslashreplace")
    finally:
        if job.given["as_json"]:
            write(shared.to_json() + "\n", sys.stdout)
        elif not job.given["quiet"]:
            known, verbose = _with_arguments(job, report), job.given.get("verbose", False)
            show(lambda page: printed(known, page, verbose=verbose, destination=destination))
    code = _exit_code(job, report)
    if code and job.given["quiet"] and (wrong := in_a_line(report)):
        fail(wrong, code)
    return code


def _exit_code(job: Job, report: Report) -> int:
    from bnfold.report import Bisection, CheckReport, Diagnosis, ExportReport

    verdict = report.check if isinstance(report, ExportReport) else report
    if isinstance(verdict, CheckReport):
        return VERDICT_CODES[verdict.verdict]
    if isinstance(report, Diagnosis):
        return int(job.given["strict"] and not report.healthy)
    return int(isinstance(report, Bisection) and not report.passed)


# -- how a run could be made again -------------------------------------------------------------------------------------


def _with_arguments(job: Job, report: _Report, *, shared: bool = False) -> _Report:
    """The report, knowing what the command line was given where it goes on to propose commands.

    Args:
        report: any; changed is that of a verdict that is no pass.
        shared: others will read it: paths outside of the working directory are file names alone.
    """
    from bnfold.report import CheckReport, ExportReport

    check = report.check if isinstance(report, ExportReport) else report
    if not isinstance(report, CheckReport | ExportReport) or not isinstance(check, CheckReport) or check.passed:
        return report

    def word(value: Any) -> str:
        return _shared_word(value) if shared else str(value)

    output = job.given.get("output")
    given = {
        "source": report.source["source"] if shared else job.source,
        "output": None if output is None else word(output),
        "options": {name: _options(word, name) for name in ("export", "fold", "check", "bisect")},
    }
    return replace(report, source=report.source | {"given": given})


def _with_command(job: Job, report: _Report) -> _Report:
    """The report with the command line that it came from, as others may read it."""
    context = click.get_current_context()
    known = getattr(report, "source", None)
    if not isinstance(known, dict):
        return report
    named = context.params.get("named") or [*filter(None, [context.params.get("file")]), job.source]
    words = [_shared_word(Path(each)) if "://" not in str(each) else str(each) for each in named]
    own = [parameter.name or "" for parameter in context.command.params]
    words += [word for group in _given(_shared_word, own) for word in group]
    return replace(report, source=known | {"command": f"bnfold {context.info_name} {shlex.join(words)}"})  # type: ignore[type-var]


def _shared_word(value: Any) -> str:
    """A path outside of the working directory as its name alone: of where others work it tells nothing."""
    outside = isinstance(value, Path) and (value.is_absolute() or ".." in value.parts)
    return value.name if outside else str(value)


def _options(word: Callable[[Any], str], command: str) -> list[list[str]]:
    """The options that this run was given and ``command`` takes, each with its value as the command line has it."""
    group = click.get_current_context().find_root().command
    params = group.commands[command].params if isinstance(group, click.Group) else []
    return _given(word, {parameter.name for parameter in params} - _OWN)


def _given(word: Callable[[Any], str], names: Collection[str | None]) -> list[list[str]]:
    """Those of this run's options that are called so."""
    context = click.get_current_context()
    found: list[list[str]] = []
    for parameter in context.command.params:
        said = context.get_parameter_source(parameter.name or "") is ParameterSource.COMMANDLINE
        if not said or parameter.name not in names or parameter.name not in context.params:
            continue
        if not isinstance(parameter, click.Option):
            continue
        value = context.params[parameter.name]
        if parameter.is_flag:
            found.append([(parameter.opts if value else parameter.secondary_opts)[0]])
        else:
            values = [f"{k}={v}" for k, v in value.items()] if isinstance(value, dict) else value
            found += [[parameter.opts[0], word(each)] for each in (values if parameter.multiple else [values])]
    return found
