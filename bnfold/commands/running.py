"""One run of a command: its arguments, understood and free of contradictions before anything heavy is imported, its
model, its options, its quiet, its report and its exit code.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import logging
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from bnfold.commands.arguments import CLASHES, REPORTS
from bnfold.commands.terminal import Unfailing, fail, show, write
from bnfold.errors import UsageError
from bnfold.files import there

if TYPE_CHECKING:
    from bnfold.loading.source import Loaded
    from bnfold.loading.specs import InputSpec, Range
    from bnfold.options import Options
    from bnfold.render import Progress, Report

_Report = TypeVar("_Report")
#: What a run that is proposed does not take over from this one: where it writes, and how much it says.
_OWN = {"output", "report", "as_json", "verbose", "quiet", "dry_run", "keep_failed", "update_baseline"}
VERDICT_CODES = {"pass": 0, "fail": 1, "inconclusive": 7}


@dataclass(frozen=True)
class Job:
    """One run's arguments, understood and free of contradictions."""

    source: str
    given: dict[str, Any]
    reads: tuple[Path, ...]
    factory_args: dict[str, Any]
    specs: tuple[InputSpec, ...] = ()
    ranges: Mapping[str, Range] = field(default_factory=dict)

    @classmethod
    def of(cls, source: str, given: dict[str, Any], *, suffix: str = "", reads: Sequence[Path] = ()) -> Job:
        """Raises UsageError where options contradict one another."""
        _check_output(given, suffix)
        refuse_contradictions(given)
        file = Path(source if there(source) else source.rpartition(":")[0] or source)
        if source.startswith("hf:"):
            file = Path(source[len("hf:") :]) / "model.safetensors"
            with contextlib.suppress(RuntimeError):  # there is no such user
                file = file.expanduser()
        read = [file, *(given[name] for name in ("weights", "data") if given.get(name)), *reads]
        _check_reports(given, read)
        if given.get("baseline") is not None or given.get("update_baseline"):
            from bnfold.gate.baseline import expect_baseline

            expect_baseline(given["baseline"], update=given["update_baseline"], sources=read)
        job = cls(source, given, tuple(read), _factory_args(given["args"]), *_inputs(given))
        if suffix and given["output"] is not None:
            from bnfold.store import check_destination

            check_destination(given["output"], sources=read)
        return job

    def load_source(self) -> Loaded:
        """The model that the source names."""
        from bnfold.loading.load import load
        from bnfold.loading.source import Normalization

        given = self.given
        by_hand = Normalization.parse(given["mean_std"]) if given.get("mean_std") else None
        same = ("weights", "weights_key", "strip_prefix", "unsafe_pickle", "ignore")
        return load(
            self.source, factory_args=self.factory_args, strict=bool(given.get("strict")),
            normalize=by_hand or bool(given.get("normalize")), **{name: given[name] for name in same},
        )  # fmt: skip

    def load_model(self) -> tuple[Loaded, dict[str, Any]]:
        """The model that the source names, and its example inputs as the pipeline takes them, where any are given."""
        import torch

        from bnfold.loading.inputs import model_inputs

        specs, ranges, loaded = self.specs, self.ranges, self.load_source()
        if is_onnx(self.source):
            if specs or ranges:
                what = "--input and --dynamic do not apply to an ONNX file"
                raise UsageError(what, hint="Its inputs are in the file")
            return loaded, {}
        if self.given["static"] and not isinstance(loaded.model, torch.nn.Module):
            what = "--static does not apply to a .pt2 program"
            raise UsageError(what, hint="Its dynamic sizes are fixed in the file")
        seed = self.given.get("seed", 0)
        args, kwargs, shapes = model_inputs(loaded.model, loaded.args, loaded.kwargs, specs, ranges, seed=seed)
        return loaded, {"args": args, "kwargs": kwargs, "dynamic_shapes": shapes}

    def options(self, loaded: Loaded, progress: Callable[[str, int, int], None]) -> Options:
        """What the command line asks of the pipeline: options of one name, and what those that say no mean."""
        from bnfold.options import Options

        given = self.given
        same = {each.name: given[each.name] for each in fields(Options) if each.name in given}
        own = {
            **{name: not given.get(f"no_{name}") for name in ("fold", "merge", "check")},
            "simplify": False if given.get("no_simplify") else given.get("simplify") or None,
            "provenance": loaded.provenance, "sources": self.reads, "progress": progress,
        }  # fmt: skip
        return Options(**{**same, **own})

    @contextlib.contextmanager
    def working(self) -> Iterator[Progress]:
        """While it runs, what models and torch print shows only with --debug: stdout is the report's, stderr ours."""
        from bnfold.render import Progress

        out, err = (sys.stderr, sys.stderr) if _debugging() else (io.StringIO(), io.StringIO())
        stderr: Any = Unfailing(sys.stderr)
        progress = Progress(stderr, quiet=self.given["quiet"])
        with progress, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), quiet():
            progress("load", 0, 1)  # importing torch included
            if "bnfold.pipeline" not in sys.modules:
                gc.disable()
                importlib.import_module("bnfold.pipeline")
                gc.freeze()  # what was imported stays as long as the process: no collection need go through it
                gc.enable()
            yield progress

    def ask(self, command: Callable[[Any, Any, dict[str, Any]], Report], destination: str | None = None) -> int:
        """Runs a function of the pipeline, given that, the model and what else it takes; see ``finish``."""
        with self.working() as progress:
            from bnfold import pipeline

            loaded, inputs = self.load_model()
            report = command(pipeline, loaded.model, inputs | {"options": self.options(loaded, progress)})
        return self.finish(report, destination=destination)

    def finish(self, report: Report, *, destination: str | None = None) -> int:
        """Writes the report where it was asked for, whatever the verdict: to files, as JSON, or for people.

        ``destination`` is the file to be written, None where nothing is. Returns the exit code; of a run that failed,
        what is wrong has been told in one line with --quiet too.
        """
        from bnfold.render import document, in_a_line, printed
        from bnfold.store import atomic

        shared = _with_arguments(self, _with_command(self, report), shared=True)
        try:
            for path in self.given["report"]:
                with quiet():
                    text = document(shared, path.suffix.lower())
                with atomic(path) as staged:
                    staged.write_text(text, encoding="utf-8", errors="backslashreplace")
        finally:
            if self.given["as_json"]:
                write(shared.to_json() + "\n", sys.stdout)
            elif not self.given["quiet"]:
                known, verbose = _with_arguments(self, report), self.given.get("verbose", False)
                show(lambda page: printed(known, page, verbose=verbose, destination=destination))
        code = _exit_code(self, report)
        if code and self.given["quiet"] and (wrong := in_a_line(report)):
            fail(wrong, code)
        return code


def is_onnx(source: str) -> bool:
    """Whether a source is an ONNX file, by its name."""
    return source.lower().endswith(".onnx")


def _exit_code(job: Job, report: Report) -> int:
    from bnfold.report import Bisection, CheckReport, Diagnosis, ExportReport

    verdict = report.check if isinstance(report, ExportReport) else report
    if isinstance(verdict, CheckReport):
        return VERDICT_CODES[verdict.verdict]
    if isinstance(report, Diagnosis):
        return int(job.given["strict"] and not report.healthy)
    return int(isinstance(report, Bisection) and not report.passed)


def _check_reports(given: dict[str, Any], read: Sequence[Path]) -> None:
    taken = {os.path.realpath(given[name]) for name in ("output", "baseline") if given.get(name) is not None}
    for report in given["report"]:
        from bnfold.store import check_destination

        where = f"--report {report}"
        if report.suffix.lower() not in REPORTS:
            raise UsageError("a report is a .json, .html or .xml file", where=where)
        if report.suffix.lower() == ".html":
            from bnfold.render import require_matplotlib

            require_matplotlib()
        check_destination(report, sources=read)
        if os.path.realpath(report) in taken:
            raise UsageError("the report and another output are one file", where=where)
        taken.add(os.path.realpath(report))


def _check_output(given: dict[str, Any], suffix: str) -> None:
    if not suffix:
        return
    output = given["output"]
    if output is None and not given["dry_run"]:
        raise UsageError(f"-o says where the {suffix} file goes, and is missing", hint="To write nothing: --dry-run")
    if output is not None and output.suffix.lower() != suffix and not (there(output) and output.is_dir()):
        eager = "; with --eager .safetensors, for the model's own class"
        hint = {
            ".onnx": f"The fold command writes .pt2{eager}",
            ".pt2": f"The export command writes .onnx{eager if output.suffix.lower() == '.safetensors' else ''}",
            ".safetensors": "--eager writes the state dict of the model's own class; without it, .pt2 is written",
        }.get(suffix)
        raise UsageError(f"the output must be a {suffix} file", where=f"-o {output}", hint=hint)


def refuse_contradictions(given: dict[str, Any]) -> None:
    """Raises UsageError where options that were given contradict one another."""
    context = click.get_current_context()
    said = {name for name in given if context.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    for one, other in CLASHES:
        if {one, other} <= said:
            a, b = (f"--{name.replace('_', '-')}" for name in (one, other))
            raise UsageError(f"{a} and {b} contradict each other", hint="Leave one of them out")


def _inputs(given: dict[str, Any]) -> tuple[tuple[InputSpec, ...], dict[str, Range]]:
    texts, dynamic = given.get("inputs", ()), given.get("dynamic", ())
    if not texts and not dynamic:
        return (), {}
    from bnfold.loading.specs import parse_dynamic, parse_input

    specs = tuple(map(parse_input, texts))
    if given.get("static") and any(isinstance(dim, str) for spec in specs for dim in spec.dims):
        raise UsageError("--static and an --input with letters contradict each other", hint="Write numbers")
    return specs, {name: (low, high) for name, low, high in map(parse_dynamic, dynamic)}


def _factory_args(texts: Sequence[str]) -> dict[str, Any]:
    if not texts:
        return {}
    from bnfold.loading.specs import parse_factory_arg

    found: dict[str, Any] = {}
    for name, value in map(parse_factory_arg, texts):
        if name in found:
            raise UsageError("this argument is given twice", where=f"--arg {name}")
        found[name] = value
    return found


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


# -- how a run could be made again -------------------------------------------------------------------------------------


def _with_arguments(job: Job, report: _Report, *, shared: bool = False) -> _Report:
    """The report of a verdict that is no pass, knowing what the command line was given, to propose commands.

    ``shared``: others will read it, and paths outside of the working directory are file names alone.
    """
    from bnfold.report import CheckReport, ExportReport

    check = report.check if isinstance(report, ExportReport) else report
    if not isinstance(report, CheckReport | ExportReport) or not isinstance(check, CheckReport) or check.passed:
        return report

    word, output = _shared_word if shared else str, job.given.get("output")
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
        name = parameter.name or ""
        if name not in names or name not in context.params or not isinstance(parameter, click.Option):
            continue
        if context.get_parameter_source(name) is not ParameterSource.COMMANDLINE:
            continue
        value = context.params[name]
        if parameter.is_flag:
            found.append([(parameter.opts if value else parameter.secondary_opts)[0]])
        else:
            values = [f"{k}={v}" for k, v in value.items()] if isinstance(value, dict) else value
            found += [[parameter.opts[0], word(each)] for each in (values if parameter.multiple else [values])]
    return found
