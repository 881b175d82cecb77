"""What one run was asked for, understood and free of contradictions, before anything heavy is imported."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from bnfold.commands.arguments import CLASHES, REPORTS
from bnfold.errors import UsageError
from bnfold.files import there

if TYPE_CHECKING:
    from bnfold.loading.specs import InputSpec, Range


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
    """What --input and --dynamic say."""
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
