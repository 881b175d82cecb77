"""The command line: arguments -> pipeline -> printed report -> exit code.

Nothing heavy is imported before a command runs, so that ``--help`` is immediate.
"""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import re
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bnfold._version import __version__
from bnfold.arguments import (
    Command,
    Job,
    debug_option,
    device_option,
    gate_options,
    input_options,
    json_option,
    model_options,
    onnx_options,
    output_options,
    report_options,
)
from bnfold.errors import EXIT_CODES, BnfoldError, ResourceError, UsageError

if TYPE_CHECKING:
    from bnfold.load import Loaded
    from bnfold.options import Options
    from bnfold.render import Page, Progress
    from bnfold.report import CheckReport, ExportReport

_VERDICT_CODES = {"pass": 0, "fail": 1, "inconclusive": 7}
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EFBIG}
_EPILOG = "\b\nExit codes:\n" + "\n".join(f"  {code:<5}{meaning}" for code, meaning in EXIT_CODES.items())
_EPILOG += (
    "\n\nAn example: bnfold export models/digits.py:digits_cnn --weights models/digits_cnn.safetensors -o net.onnx"
)


# -- how a run fails --------------------------------------------------------------------------------------------------


class _Commands(click.Group):
    """Every failure is one line and one of the documented exit codes."""

    def main(self, *args: Any, **extra: Any) -> Any:
        extra["standalone_mode"] = False
        try:
            code = super().main(*args, **extra)
        except click.exceptions.NoArgsIsHelpError as error:
            code = _fail(error.format_message(), 2, prefix="")
        except click.ClickException as error:
            path = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "bnfold"
            message = error.format_message().rstrip(".")
            code = _fail(f"{message}{'' if message.endswith('?') else '.'} Run {path} --help", 2)
        except click.Abort:
            code = _fail("interrupted", 130)
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except KeyboardInterrupt:
            return _fail("interrupted", 130)
        except BnfoldError as error:
            _trace(ctx)
            return _fail(str(error), 6 if _exhausted(error) else error.exit_code)
        except Exception as error:
            _trace(ctx)
            if _exhausted(error):
                return _fail(f"the memory or the disk gave out: {_one_line(error)}", 6)
            hint = "" if ctx.meta.get("debug") else ". Run it again with --debug for the traceback, and report it"
            return _fail(f"internal: {_one_line(error)}{hint}", 4)


def _fail(message: str, code: int, prefix: str = "error: ") -> int:
    _write(f"{prefix}{message}\n", sys.stderr)
    return code


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:400].rstrip(": .")


def _trace(ctx: click.Context) -> None:
    if ctx.meta.get("debug"):
        _write(traceback.format_exc(), sys.stderr)


def _exhausted(error: BaseException | None) -> bool:
    """Whether the memory or the disk is what was really missing."""
    while error is not None:
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in _FULL):
            return True
        if isinstance(error, RuntimeError) and re.search(r"can't allocate memory|out of memory", str(error)):
            return True
        error = error.__cause__
    return False


def _write(text: str, stream: Any) -> None:
    """Writes at once. A reader that has left (``| head``) is no failure: the verdict stays what it is."""
    if stream is None:
        return
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        stream.flush()
    except OSError as error:
        # What is still buffered would fail again when the interpreter ends.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if error.errno not in (errno.EPIPE, errno.EINVAL):
            raise ResourceError(f"the report could not be printed: {error.strerror}") from error


# -- commands ----------------------------------------------------------------------------------------------------------


@click.group(
    cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}, epilog=_EPILOG
)
@click.version_option(__version__, prog_name="bnfold")
def cli() -> None:
    """Fold BatchNorm wherever algebra allows, export ONNX, and prove the file equal to the unfolded model.

    \b
    SOURCE is one of
      path/to/file.py:factory   a function or class that builds the model; --weights has its checkpoint
      pkg.module:factory        the same, imported
      net.pt2                   what torch.export.save wrote
      net.pt                    a whole pickled module, only with --unsafe-pickle
    """


@cli.command(cls=Command)
@click.argument("source")
@output_options
@onnx_options
@model_options
@input_options
@gate_options
@device_option
@report_options
@debug_option
def export(source: str, **given: Any) -> int:
    """Fold, lower to ONNX, check, and write.

    The file is written only if ONNX Runtime's outputs are as close to float64 as those of the unfolded model.

    \b
    bnfold export net.py:make --weights net.safetensors -o net.onnx
    bnfold export net.py:make --arg width=32 --input "x:float32[N,3,H,W]" --dynamic N=1..64 -o net.onnx
    """
    return _produce(Job.of(source, given, suffix=".onnx"), given, "export")


@cli.command(cls=Command)
@click.argument("source")
@output_options
@model_options
@input_options
@gate_options
@report_options
@debug_option
def fold(source: str, **given: Any) -> int:
    """Fold, check, and write the folded program as .pt2, without ONNX.

    \b
    bnfold fold net.py:make --weights net.safetensors -o net.pt2
    """
    return _produce(Job.of(source, given, suffix=".pt2"), given, "save_folded")


@cli.command(cls=Command)
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
    with _working(job) as progress:
        from bnfold import pipeline

        loaded, inputs = _load(job)
        report = pipeline.check(file, loaded.model, **inputs, options=_pipeline_options(job, loaded, progress))
        origin = pipeline.source_facts(loaded.provenance)

    def render(page: Page, verbose: bool) -> None:
        from bnfold.render import check_report

        check_report(origin, str(file), report, page, verbose=verbose)

    _present(job, report, render)
    return _exit_code(job, report)


@cli.command(cls=Command)
@click.argument("source")
@model_options
@input_options
@report_options
@debug_option
def inspect(source: str, **given: Any) -> int:
    """Print the fold plan: what goes where, what stays and why. Writes nothing.

    \b
    bnfold inspect net.py:make --weights net.safetensors
    """
    job = Job.of(source, given)
    with _working(job) as progress:
        from bnfold import pipeline

        loaded, inputs = _load(job)
        report = pipeline.plan(loaded.model, **inputs, options=_pipeline_options(job, loaded, progress))

    def render(page: Page, verbose: bool) -> None:
        from bnfold.render import plan_report

        plan_report(report, page, verbose=verbose)

    _present(job, report, render)
    return 0


@cli.command(cls=Command)
@json_option
@debug_option
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> int:
    """Print versions, providers that really work, and what is wrong here. Exit code 5 if something is."""
    with _quiet(debug=bool(ctx.meta.get("debug"))), contextlib.redirect_stdout(sys.stderr):
        from bnfold.doctor import examine

        found = examine()
    if as_json:
        import json
        from dataclasses import asdict

        _write(json.dumps([asdict(finding) for finding in found], indent=2) + "\n", sys.stdout)
    else:
        from bnfold.render import findings

        _print(lambda page: findings(found, page))
    return 5 if any(finding.level == "problem" for finding in found) else 0


def main() -> None:
    """Runs the command line and exits."""
    cli()


# -- a run -------------------------------------------------------------------------------------------------------------


def _load(job: Job) -> tuple[Loaded, dict[str, Any]]:
    import torch

    from bnfold.inputs import model_inputs, parse_dynamic, parse_input
    from bnfold.load import load

    given = job.given
    specs = [parse_input(text) for text in given["inputs"]]
    ranges = {name: (low, high) for name, low, high in map(parse_dynamic, given["dynamic"])}
    if given["static"] and any(isinstance(dim, str) for spec in specs for dim in spec.dims):
        raise UsageError("--static and an --input with letters contradict each other", hint="Write numbers")
    loaded = load(
        job.source, weights=given["weights"], weights_key=given["weights_key"], strip_prefix=given["strip_prefix"],
        factory_args=job.factory_args, unsafe_pickle=given["unsafe_pickle"],
    )  # fmt: skip
    if given["static"] and not isinstance(loaded.model, torch.nn.Module):
        raise UsageError("--static does not apply to a .pt2 program", hint="Its dynamic sizes are fixed in the file")
    args, kwargs, shapes = model_inputs(
        loaded.model, loaded.args, loaded.kwargs, specs, ranges, where=job.source, seed=given.get("seed", 0)
    )
    return loaded, {"args": args, "kwargs": kwargs, "dynamic_shapes": shapes}


def _pipeline_options(job: Job, loaded: Loaded, progress: Progress) -> Options:
    import torch

    from bnfold.options import Options

    given = job.given
    same: tuple[str, ...] = ("device", "data", "samples", "seed", "limit", "opset", "static", "external_data")
    same += ("allow_nonfinite", "keep_failed", "dry_run")
    return Options(
        **{name: given[name] for name in same if name in given},
        dtype=getattr(torch, given["dtype"]) if given["dtype"] else None,
        fold=not given.get("no_fold"),
        merge=not given.get("no_merge"),
        simplify=not given.get("no_simplify"),
        check=not given.get("no_check"),
        provenance=loaded.provenance,
        sources=job.reads,
        progress=progress,
    )


def _produce(job: Job, given: dict[str, Any], command: str) -> int:
    """What ``export`` and ``fold`` share: all but the pipeline's function."""
    with contextlib.ExitStack() as stack:
        output = given["output"]
        if output is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="bnfold-"))
            output = Path(folder) / ("model.onnx" if command == "export" else "model.pt2")
        else:
            from bnfold.store import check_destination

            check_destination(output, sources=job.reads)  # before torch is imported, and anything is computed
        with _working(job) as progress:
            from bnfold import pipeline

            loaded, inputs = _load(job)
            options = _pipeline_options(job, loaded, progress)
            report: ExportReport = getattr(pipeline, command)(loaded.model, output, **inputs, options=options)

    def render(page: Page, verbose: bool) -> None:
        from bnfold.render import export_report

        export_report(report, page, destination=str(output), dry_run=given["dry_run"], verbose=verbose)

    _present(job, report, render)
    return _exit_code(job, report.check)


@contextlib.contextmanager
def _working(job: Job) -> Iterator[Progress]:
    """While it runs, what models and torch print shows only with --debug: stdout is the report's, stderr ours."""
    from bnfold.render import Progress

    debug = bool(click.get_current_context().meta.get("debug"))
    out, err = (sys.stderr, sys.stderr) if debug else (io.StringIO(), io.StringIO())
    progress = Progress(sys.stderr, quiet=job.given["quiet"])
    with progress, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), _quiet(debug=debug):
        progress("load", 0, 1)  # importing torch included
        yield progress


@contextlib.contextmanager
def _quiet(*, debug: bool) -> Iterator[None]:
    """Keeps the warnings of torch and its company away; whatever matters is in the report."""
    if debug:
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


def _present(job: Job, report: ExportReport | CheckReport, render: Callable[[Page, bool], None]) -> None:
    if job.given["report"] is not None:
        from bnfold.store import atomic

        with atomic(job.given["report"]) as staged:
            staged.write_text(report.to_json() + "\n", encoding="utf-8")
    if job.given["as_json"]:
        _write(report.to_json() + "\n", sys.stdout)
    elif not job.given["quiet"]:
        _print(lambda page: render(page, job.given["verbose"]))


def _print(render: Callable[[Page], None]) -> None:
    from bnfold.render import text

    _write(text(render, sys.stdout), sys.stdout)


def _exit_code(job: Job, verdict: CheckReport | None) -> int:
    if verdict is None:
        return 0
    if not verdict.passed and job.given["quiet"]:
        from bnfold.render import problems

        _fail(problems(verdict), 1)
    return _VERDICT_CODES[verdict.verdict]
