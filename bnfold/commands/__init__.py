"""The commands, one function each: arguments -> pipeline -> printed report -> exit code."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bnfold.commands import arguments as asked
from bnfold.commands.arguments import command
from bnfold.commands.running import Job, is_onnx, quiet, refuse_contradictions
from bnfold.commands.terminal import fail, show, write
from bnfold.errors import InputError, UsageError

if TYPE_CHECKING:
    import torch

    from bnfold.fleet.cluster import Make
    from bnfold.render import Progress
    from bnfold.report import ModelRow

_PATH = click.Path(path_type=Path)
_SOURCE = click.argument("source")
_NAMED = click.argument("named", metavar="[NET.ONNX] SOURCE", nargs=-1, required=True)
_FILE = click.argument("file", metavar="NET.ONNX", type=_PATH)
_FILES = click.argument("files", metavar="NET.ONNX [OTHER.ONNX]...", nargs=-1, required=True, type=_PATH)
_MODELS = click.argument("models", metavar="MODELS.TOML", type=_PATH)


@command(_SOURCE, asked.OUTPUT, asked.ONNX, asked.MODEL, asked.INPUTS, asked.GATE, asked.ENGINE, asked.REPORT)
def export(source: str, **given: Any) -> int:
    """Fold, lower to ONNX, check, and write.

    The file is written only if ONNX Runtime's outputs are as close to float64 as those of the unfolded model.

    \b
    bnfold export net.py:make --weights net.safetensors -o net.onnx
    bnfold export net.py:make --arg width=32 --input "x:float32[N,3,H,W]" --dynamic N=1..64 -o net.onnx
    """
    return _produce(source, given, "export", ".onnx")


@command(_SOURCE, asked.OUTPUT, asked.EAGER, asked.MODEL, asked.INPUTS, asked.GATE, asked.REPORT)
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
        destination = None if given["dry_run"] else str(output)
        return job.ask(lambda pipeline, model, given: getattr(pipeline, function)(model, output, **given), destination)


@command(_SOURCE, asked.CALIBRATION, asked.UNCONVERTED, asked.WORKERS, asked.REPORT)
def calibrate(source: str, **given: Any) -> int:
    """Measure BatchNorm statistics over data, and write all weights with them.

    For BatchNorms without running statistics (they can be folded then), and for statistics that went bad.

    \b
    bnfold calibrate net.py:make --weights net.safetensors --data train.npz -o stats.safetensors
    bnfold calibrate net.py:make --data 's3://bucket/train/*.npz' --scheduler tcp://host:8786 -o stats.safetensors
    bnfold export net.py:make --weights stats.safetensors -o net.onnx
    """
    job = Job.of(source, given, suffix=".safetensors")
    with job.working() as progress:
        from bnfold import pipeline
        from bnfold.options import Options

        loaded = job.load_source()
        with sharded(job, partial(observer, job), progress, "calibrate") as (data, spread):
            report = pipeline.save_calibrated(
                loaded.model, given["output"], data, only=given["only"] or None, scheme=given["scheme"],
                batch=given["batch_size"], spread=spread,
                options=Options(provenance=loaded.provenance, sources=job.reads, progress=progress),
            )  # fmt: skip
    return job.finish(report)


@command(_NAMED, asked.MODEL, asked.INPUTS, asked.GATE, asked.ENGINE, asked.WORKERS, asked.REPORT)
def check(named: tuple[str, ...], **given: Any) -> int:
    """Judge an existing ONNX file against a torch model or another file, or whatever else runs the model.

    \b
    bnfold check net.onnx net.py:make --weights net.safetensors --data samples.npz
    bnfold check simplified.onnx net.onnx
    bnfold check net.onnx net.py:make --weights net.safetensors --data 'shards/*.npz' --workers 4
    bnfold check net.onnx net.py:make --device openvino --provider-option device_type=CPU
    bnfold check --runner engine.py:infer net.py:make --weights net.safetensors
    """
    if len(named) != 2 and not (given["runner"] and len(named) == 1):
        raise UsageError("name the file and the model that it is judged against", hint="See bnfold check --help")
    *files, source = named
    file = Path(files[0]) if files else None
    job = Job.of(source, given, reads=[file] if file else [])
    with job.working() as progress:
        from bnfold import pipeline

        loaded, inputs = job.load_model()
        with sharded(job, partial(looker, job, file), progress, "accuracy") as (data, spread):
            options = replace(job.options(loaded, progress), data=data)
            report = pipeline.check(file, loaded.model, **inputs, options=options, spread=spread)
    return job.finish(report)


@command(_FILE, _SOURCE, asked.MODEL, asked.INPUTS, asked.SEARCH, asked.DEVICE, asked.REPORT)
def bisect(file: Path, source: str, **given: Any) -> int:
    """Name the first module of an ONNX file that leaves the noise, and what was folded into it.

    The file is held against a torch model, or against another file.

    Where ONNX Runtime's optimisations make a right file wrong, name the one to disable. The exit code is 0 where
    nothing leaves the noise, and 1 where something does.

    \b
    bnfold bisect net.failed.onnx net.py:make --weights net.safetensors
    bnfold bisect simplified.onnx net.onnx
    """
    job = Job.of(source, given, reads=[file])
    for path in given["report"]:
        if path.suffix.lower() != ".json":
            raise UsageError("what bisect finds is written as .json alone", where=f"--report {path}")
    return job.ask(lambda pipeline, model, given: pipeline.bisect(file, model, **given))


@command(_SOURCE, asked.INSPECTED, asked.INPUTS, asked.HEALTH, asked.REPORT)
def inspect(source: str, **given: Any) -> int:
    """Print the health of every BatchNorm and the fold plan. Writes nothing.

    Exit code 0 whatever it finds, unless --strict.

    \b
    bnfold inspect net.py:make --weights net.safetensors
    bnfold inspect net.py:make --weights net.safetensors --data train.npz --strict
    """
    return Job.of(source, given).ask(lambda pipeline, model, given: pipeline.inspect(model, **given))


@command(asked.FINDINGS)
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


@command(_MODELS, asked.FLEET, asked.FLEET_REPORT)
def fleet(models: Path, output: str, **given: Any) -> int:
    """Export every model of a list, on all cores or on a cluster, and write a page about all of them.

    What an earlier run has done and what nothing has changed of is not done again. pip install 'bnfold[fleet]'

    \b
    bnfold fleet models.toml -o out/
    bnfold fleet models.toml -o s3://bucket/out --scheduler tcp://host:8786
    """
    refuse_contradictions(given)
    from bnfold.fleet.rows import ListError, read_rows, size_of

    memory = size_of(given["memory"]) if given["memory"] else None
    try:
        rows = read_rows(models)
    except ListError as error:
        for fault in error.faults:
            fail(f"{models}: {fault}", 2)
        return 2
    with quiet(), contextlib.redirect_stdout(sys.stderr):
        from bnfold.fleet.cluster import Where
        from bnfold.fleet.places import Folder
        from bnfold.fleet.work import run
        from bnfold.render import document, fleet_line, require_matplotlib

        require_matplotlib()  # for the models' pages

        def tell(row: ModelRow, done: int, total: int) -> None:
            if not given["quiet"]:
                write(fleet_line(row, done, total) + "\n", sys.stderr)

        report = run(
            rows, models.name, models.absolute().parent, output,
            Where(given["scheduler"], given["workers"], memory), timeout=given["timeout"], anew=given["retry"],
            tell=tell,
        )  # fmt: skip
        results = Folder(output)
        for suffix in (".json", ".html", ".xml"):
            results.write(f"index{suffix}", document(report, suffix).encode("utf-8", "backslashreplace"))
    if given["as_json"]:
        write(report.to_json() + "\n", sys.stdout)
    elif not given["quiet"]:
        from bnfold.render import fleet_report

        show(lambda page: fleet_report(report, page, where=f"{output.rstrip('/')}/index.html, index.json, index.xml"))
    return report.exit_code


@command(_FILES, asked.MEASUREMENT, asked.MODEL, asked.LATENCY_REPORT)
def bench(files: tuple[Path, ...], **given: Any) -> int:
    """Measure latency, in pairs: every round gives each file, and the torch model, a turn in random order.

    A ratio is a time over the first file's, the median over the rounds. Random inputs; nothing is judged or written.

    \b
    bnfold bench net.onnx other.onnx --threads 1
    bnfold bench net.onnx --source net.py:make --weights net.safetensors --batch 8
    """
    source, shapes = given["source"], _shapes(given["inputs"])
    _check_model_options(given)
    job = Job.of(source or str(files[0]), given, reads=files)
    with job.working() as progress:
        from bnfold.timing.bench import bench as run

        same = ("device", "provider_options", "threads", "batch", "warmup", "seed")
        model, args, kwargs = _load(job) if source else (None, None, {})
        report = run(
            files, model=model, name=source or "", args=args, kwargs=kwargs, shapes=shapes, rounds=given["runs"],
            progress=progress, **{name: given[name] for name in same},
        )  # fmt: skip
    return job.finish(report)


def _check_model_options(given: Mapping[str, Any]) -> None:
    names = ("weights", "weights_key", "strip_prefix", "args", "unsafe_pickle", "dtype")
    if given["source"] is None and (said := [name for name in names if given[name]]):
        option = {"args": "arg"}.get(said[0], said[0]).replace("_", "-")
        raise UsageError("it is about a torch model, and none is named", where=f"--{option}", hint="Add --source")


def _load(job: Job) -> tuple[torch.nn.Module, tuple[Any, ...] | None, dict[str, Any]]:
    """The torch model in eval mode and in the dtype asked for, and its own example inputs."""
    import torch

    given, loaded = job.given, job.load_source()
    if not isinstance(loaded.model, torch.nn.Module):
        if given["dtype"]:
            raise UsageError("--dtype does not apply to a .pt2 program", hint="Its dtype is fixed in the file")
        return loaded.model.module(), loaded.args, dict(loaded.kwargs)
    model = loaded.model.eval()
    return model.to(getattr(torch, given["dtype"])) if given["dtype"] else model, loaded.args, dict(loaded.kwargs)


def _shapes(texts: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """The shapes that the user gave, by input."""
    if not texts:
        return {}
    from bnfold.loading.specs import parse_input

    found: dict[str, tuple[int, ...]] = {}
    for text in texts:
        spec = parse_input(text)
        letters = [dim for dim in spec.dims if isinstance(dim, str)]
        if letters or spec.name is None or spec.name in found:
            what = f"{letters[0]} is no size" if letters else "it is given twice" if spec.name else "it names no input"
            raise UsageError(what, where=f"--input {text}", hint="Write NAME[1,3,224,224], once for an input")
        found[spec.name] = tuple(int(dim) for dim in spec.dims)
    return found


# -- data in shards: which files they are, and what is asked of them, here or on workers -------------------------------


def _shards(job: Job) -> list[str]:
    """The files that ``--data`` names; none where it is one of this machine, and no worker is asked for.

    InputError where there is no such file, UsageError where there are workers and no data.
    """
    from bnfold.fleet.places import is_url, matching

    given, text = job.given, str(job.given["data"] or "")
    if not text and (given["scheduler"] or given["workers"]):
        raise UsageError("workers go through data, and there is none", hint="Add --data, or leave them out")
    pattern = is_url(text) or (bool(set("*?[") & set(text)) and not Path(text).exists())
    if not pattern:
        return [text] if text and (given["scheduler"] or given["workers"]) else []
    found = matching(text)
    if not found:
        raise InputError("no file is called like that", where=f"--data {text}")
    return found


@contextlib.contextmanager
def sharded(job: Job, make: Make, progress: Progress, stage: str) -> Iterator[tuple[Any, Callable[[Any], Any] | None]]:
    """The data that the command itself reads, the first of several, and a function that asks them all, if several.

    ``make`` makes what answers, in every process.
    """
    if not (shards := _shards(job)):
        yield job.given["data"], None
        return
    from bnfold.fleet.cluster import Where, asking
    from bnfold.fleet.places import fetched

    where = Where(job.given["scheduler"], job.given["workers"])
    with (
        fetched(shards[0]) as first,
        asking(shards, make, where, lambda done, of: progress(stage, done, of)) as ask,
    ):
        yield first, ask


def looker(job: Job, file: Path | None) -> Callable[[Path, Any], Any]:
    """Sees how an ONNX file, or a runner, does on a shard of the data, against the model that the job names."""
    from bnfold import stages
    from bnfold.report.progress import silent

    with quiet():
        loaded, inputs = job.load_model()
        return stages.looker(file, loaded.model, **inputs, options=job.options(loaded, silent))


def observer(job: Job) -> Callable[[Path, Any], Any]:
    """Measures the BatchNorms of the model that the job names on a shard of the data."""
    from bnfold import stages

    with quiet():
        return stages.observer(job.load_source().model, only=job.given["only"] or None, batch=job.given["batch_size"])


#: In the order of the help.
COMMANDS = (export, fold, check, bisect, inspect, calibrate, fleet, bench, doctor)
