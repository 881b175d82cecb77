"""The options of the command line, each written once, and which of them contradict one another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click

from bnfold.commands.terminal import exit_code

#: What gives a function one or more parameters of the command line.
Decorator = Callable[[Any], Any]
_Row = tuple[Sequence[str], dict[str, Any]]
_PATH = click.Path(path_type=Path)
_NO_GROUP = "Help"
#: Of whatever is counted: more is a slip of the hand.
_MOST = 2**31 - 1


class _Data(click.Path):
    """A path, or a URL, whose slashes a path would lose."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The text of a URL; else as a path."""
        return value if "://" in str(value) else super().convert(value, param, ctx)


_DATA = _Data(path_type=Path)
#: What a report can be written as.
REPORTS = (".json", ".html", ".xml")


class Command(click.Command):
    """Options in the help under the heading of their group."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes a section per group, and the option for help last."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                groups.setdefault(getattr(parameter, "group", _NO_GROUP), []).append(record)
        for group, records in sorted(groups.items(), key=lambda item: item[0] == _NO_GROUP):
            with formatter.section(group):
                formatter.write_dl(records)

    def invoke(self, ctx: click.Context) -> int:
        """Runs it; the exit code."""
        return exit_code(ctx, lambda: super(Command, self).invoke(ctx))


class Option(click.Option):
    """An option that belongs to a group of the help."""

    def __init__(self, *args: Any, group: str = _NO_GROUP, **extra: Any) -> None:
        super().__init__(*args, **extra)
        self.group = group


def _row(*names: str, **settings: Any) -> _Row:
    return names, settings


def _count(*names: str, least: int = 1, **settings: Any) -> _Row:
    return _row(*names, show_default=True, type=click.IntRange(least, _MOST), **settings)


def _finite(ctx: click.Context, parameter: click.Parameter, value: float) -> float:
    if not 0 < value < float("inf"):
        raise click.BadParameter("it must be a positive number", ctx=ctx, param=parameter)
    return value


_flag = partial(_row, is_flag=True)
_file = partial(_row, type=_PATH, metavar="FILE")
_number = partial(_row, type=click.IntRange(1, _MOST), metavar="N")
_positive = partial(_row, type=float, callback=_finite, show_default=True)


def _options(group: str, *rows: _Row) -> Decorator:
    """A decorator that gives a command the options in ``rows``."""

    def decorate(function: Any) -> Any:
        for names, settings in reversed(rows):
            function = click.option(*names, cls=Option, group=group, **settings)(function)
        return function

    return decorate


def command(*parts: Decorator) -> Callable[[Callable[..., int]], Command]:
    """Makes a command of a function: its arguments and options in the order of the help, and --debug."""

    def decorate(function: Any) -> Command:
        for part in reversed((*parts, _DEBUG)):
            function = part(function)
        return click.command(cls=Command)(function)

    return decorate


def _pairs(ctx: click.Context, parameter: click.Parameter, value: tuple[str, ...]) -> dict[str, str]:
    found = dict(text.partition("=")[::2] for text in value)
    if len(found) < len(value) or not all("=" in text and not text.startswith("=") for text in value):
        raise click.BadParameter("write KEY=VALUE, each key once", ctx=ctx, param=parameter)
    return found


def _names(ctx: click.Context, parameter: click.Parameter, value: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in value.split(",")) if value else ()


def _note_debug(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    ctx.meta["debug"] = value


_STRICT = _flag("--strict", help="Refuse --weights with keys that no part of the model has; they are left out else.")
_SOURCE: tuple[_Row, ...] = (
    _file("--weights", help="Checkpoint: .safetensors, from torch.save, an index of shards, or a folder of one."),
    _row("--weights-key", metavar="KEY", help="Where in the checkpoint the weights are, e.g. ema.module."),
    _row("--strip-prefix", metavar="TEXT", help="Taken off the checkpoint's keys, e.g. 'module.' with the dot."),
    _row("--ignore", multiple=True, metavar="PATTERN", help="Keys of it to leave out, e.g. 'criterion.*'; repeatable."),
    _row("--arg", "args", multiple=True, metavar="NAME=VALUE", help="Argument of the factory; repeatable."),
    _flag("--unsafe-pickle", help="Load pickled objects. THE FILE CAN THEN RUN ANY CODE."),
)
_CONVERTED: tuple[_Row, ...] = (
    _row(
        "--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), metavar="DTYPE",
        help="Convert the model first: float32, float16 or bfloat16.",
    ),
    _flag("--normalize", help="Put (x - mean) / std in front, of the model's own configuration; it then folds."),
    _row("--mean-std", metavar="MEAN/STD", help="The same by hand: 0.485,0.456,0.406/0.229,0.224,0.225 or 0.5/0.5."),
)  # fmt: skip
UNCONVERTED = _options("The model", *_SOURCE, _STRICT)
MODEL = _options("The model", *_SOURCE, _STRICT, *_CONVERTED)
INPUTS = _options(
    "Its inputs",
    _row(
        "--input", "inputs", multiple=True, metavar="SPEC",
        help="NAME:DTYPE[N,3,224,224]; letters are dynamic sizes; repeatable. Default: the model's own example, or "
        "what its first layer settles.",
    ),
    _row("--dynamic", multiple=True, metavar="N=1..64", help="Range of a dynamic size; repeatable."),
    _flag("--static", help="No dynamic sizes. Default: the batch is dynamic."),
)  # fmt: skip
INSPECTED = _options("The model", *_SOURCE, *_CONVERTED)
HEALTH = _options(
    "The health",
    _file("--data", metavar="FILE.npz", help="Samples in arrays named like the inputs, to compare statistics with."),
    _flag("--strict", help="Exit code 1 if there is an error or a warning; refuse keys that the model lacks."),
)
CALIBRATION = _options(
    "The statistics",
    _file(
        "--data", required=True, type=_DATA, metavar="FILE.npz",
        help="Samples in arrays named like forward's parameters, prepared as for training; no labels needed. Several "
        "files: 'shards/*.npz', here or as a URL for fsspec.",
    ),
    _file("-o", "--output", required=True, help="A .safetensors file with all weights, for --weights."),
    _row("--only", multiple=True, metavar="PATTERN", help="BatchNorms to measure, e.g. 'layer4.*'; repeatable."),
    _row(
        "--scheme", show_default=True, type=click.Choice(["sequential", "one-pass"]), default="sequential",
        help="sequential: each layer behind measured ones, a pass over the data per level. one-pass: with batch "
        "statistics in front, as in training.",
    ),
    _count("--batch-size", default=64, help="Samples at a time."),
)  # fmt: skip
_SAMPLES: tuple[_Row, ...] = (
    _count("--samples", default=10, help="Samples to compare, 10 at least."),
    _count("--seed", least=0, default=0, help="Of random samples."),
)
GATE = _options(
    "The check",
    _file(
        "--data", type=_DATA, metavar="FILE.npz",
        help="Real samples in arrays named like the inputs; 'labels', or targets named like the outputs, if known. For "
        "check also several files: 'shards/*.npz', here or as a URL for fsspec.",
    ),
    *_SAMPLES,
    _flag("--adversarial", help="Also look by gradient for inputs that overflow, or differ most; takes its time."),
    _positive("--limit", default=4.0, help="Largest error, in the unfolded model's own."),
    _file("--baseline", metavar="FILE.json", help="Fail where this run is worse than the one written there."),
    _flag("--update-baseline", help="Write it, new or anew, if the verdict is a pass."),
)  # fmt: skip
SEARCH = _options(
    "The search",
    _file("--data", metavar="FILE.npz", help="Real samples in arrays named like the inputs."),
    *_SAMPLES,
)
_DEVICE: tuple[_Row, ...] = (
    _row(
        "--device", show_default=True, metavar="NAME", default="auto",
        help="Where ONNX Runtime runs: cpu, cuda, tensorrt, openvino, directml, coreml, qnn, or what it calls another "
        "provider. It never falls back; auto is CUDA where that works.",
    ),
    _row("--provider-option", "provider_options", multiple=True, metavar="KEY=VALUE", callback=_pairs,
         help="Option of that provider, e.g. device_type=CPU or trt_fp16_enable=1; repeatable."),
)  # fmt: skip
DEVICE = _options("The check", *_DEVICE)
ENGINE = _options(
    "The check",
    *_DEVICE,
    _flag("--require-all-nodes", help="Fail where a node runs on another provider than that."),
    _row("--runner", metavar="FILE.py:NAME", help="Judge a function from a dict of arrays to a dict or list as well."),
    _positive("--runner-timeout", default=300.0, help="Seconds for one call of it."),
    _row("--precision", metavar="FORMAT", help="What it computes in: tf32, float16, bfloat16. Default: as the model."),
)
OUTPUT = _options(
    "The file",
    _file("-o", "--output", help="Where it goes; untouched unless the verdict is a pass."),
    _flag("--no-check", help="Write it unproved."),
    _flag("--keep-failed", help="Keep a file that does not pass, as NAME.failed.SUFFIX."),
    _flag("--dry-run", help="Do everything and write nothing; -o is then optional."),
    _flag("--no-merge", help="Do not make one layer of parallel and sequential ones."),
    _flag("--equalize", help="Move scales between consecutive layers so that per-tensor int8 loses less."),
    _flag("--allow-nonfinite", help="Leave a BatchNorm with NaN or infinities in, instead of failing."),
)
ONNX = _options(
    "The file",
    _row("--input-names", metavar="A,B", callback=_names, help="Of its inputs, in order. Default: the model's own."),
    _row("--output-names", metavar="A,B", callback=_names, help="Of its outputs, in order."),
    _row("--metadata", multiple=True, metavar="KEY=VALUE", callback=_pairs, help="Entry of its metadata; repeatable."),
    _number("--opset", help="ONNX operator set. Default: torch.onnx's."),
    _row("--external-data/--no-external-data", default=None, help="Weights in a file beside it. Default: above 1 GB."),
    _flag("--no-fold", help="Export the model as it is, to compare with."),
    _flag("--no-simplify", help="Leave out onnxsim."),
    _flag("--simplify", help="Run onnxsim on an ONNX file too; else only what folds is touched."),
)
EAGER = _options(
    "The file",
    _flag("--eager", help="Write .safetensors for the model's own class, the folds in its weights; see the README."),
)
_JSON = _flag("--json", "as_json", help="Print one JSON document instead.")
_REPORT = _file(
    "--report", multiple=True, metavar="FILE.json|.html|.xml",
    help="Write it to a file as well: JSON, a page to read, or JUnit; repeatable.",
)  # fmt: skip
_QUIET = _flag("--quiet", "-q", help="No progress and no report: errors and the exit code.")
_VERBOSE = _flag("--verbose", "-v", help="List every affine and every candidate.")
REPORT = _options("The report", _REPORT, _JSON, _VERBOSE, _QUIET)
LATENCY_REPORT = _options("The report", _REPORT, _JSON, _QUIET)
FLEET_REPORT = _options("The report", _JSON, _QUIET)
FINDINGS = _options("The report", _JSON)
_WORKERS: tuple[_Row, ...] = (
    _row("--scheduler", metavar="ADDRESS", help="Of Dask's distributed, as tcp://host:8786. Default: this machine."),
    _number("--workers", help="Of this machine. Default: as many as fit."),
)
WORKERS = _options("The workers", *_WORKERS)
FLEET = _options(
    "The workers",
    *_WORKERS,
    _row("--memory", metavar="SIZE", help="Limit of each, and so of a model's process: '4 GB'. Default: its share."),
    _positive("--timeout", default=3600.0, help="Seconds until a model's process is ended."),
    _row("-o", "--output", required=True, metavar="FOLDER", help="Where results go: a folder, or a URL for fsspec."),
    _flag("--retry", help="Export again what failed in an earlier run, though nothing has changed."),
)
MEASUREMENT = _options(
    "The measurement",
    _row("--source", metavar="SOURCE", help="Measure this torch model as well, on the same inputs."),
    _count("--runs", least=6, default=50, help="Rounds; each contestant has a turn in each."),
    _count("--warmup", least=0, default=5, help="Calls of each that do not count."),
    _number("--threads", help="For one call. Default: what ONNX Runtime chooses."),
    _number("--batch", help="Size of a dynamic batch. Default: 1."),
    _row("--input", "inputs", multiple=True, metavar="NAME[1,3,224,224]", help="Whole shape of an input; repeatable."),
    _count("--seed", least=0, default=0, help="Of the inputs and of the order."),
    *_DEVICE,
)
_DEBUG = _options(
    "The report",
    _flag(
        "--debug", expose_value=False, is_eager=True, callback=_note_debug,
        help="Tracebacks, and the warnings of the libraries.",
    ),
)  # fmt: skip

#: Options of which a run can have one.
CLASHES = (
    ("scheduler", "workers"),
    ("scheduler", "memory"),
    ("static", "dynamic"),
    ("dry_run", "keep_failed"),
    ("dry_run", "update_baseline"),
    ("quiet", "verbose"),
    *(("no_fold", other) for other in ("allow_nonfinite", "no_merge", "equalize")),
    *(("eager", other) for other in ("no_merge", "equalize", "normalize", "mean_std")),
    ("normalize", "mean_std"),
    *(("no_check", other) for other in ("data", "samples", "seed", "limit", "device", "keep_failed", "baseline")),
    *(("no_check", other) for other in ("adversarial", "provider_options", "require_all_nodes", "runner")),
)
