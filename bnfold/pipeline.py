"""The data flow, a line per stage. Whoever reads this file knows the program.

load -> capture -> fold -> lower -> check -> store
source  graph      graph   ONNX     verdict  file on disk
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

import torch
from torch.export import ExportedProgram

from bnfold import store
from bnfold.errors import CaptureError, InputError, LowerError, UsageError
from bnfold.files import sha256_of
from bnfold.gate.bisection import Bisector
from bnfold.gate.file_graph import FileGraph
from bnfold.gate.gate import Gate
from bnfold.gate.metrics import Spread as Parts
from bnfold.graph.program import meanings
from bnfold.graph.wrapped import unwrapped
from bnfold.interface import interface, renamed
from bnfold.loading.program_file import save_program
from bnfold.loading.structure import save_calibrated as write_calibrated
from bnfold.loading.structure import save_written
from bnfold.onnx_flow import bisect_file, check_file, export_file, plan_file
from bnfold.options import Folded, Model, OptionFields, Options, asked, public
from bnfold.output import committed, file_metadata, keep_baseline, write_file
from bnfold.report import Bisection, CalibrationReport, CheckReport, Diagnosis, ExportReport, FileReport, Ledger
from bnfold.runtime.runtime import resolve_device
from bnfold.stages import (
    Run,
    compared,
    expect,
    fold_captured,
    judging,
    model_facts,
    opset,
    refuse_nonfinite,
    traced,
    written_from,
)  # fmt: skip
from bnfold.statistics.calibration import Scheme, measure
from bnfold.statistics.diagnose import examine
from bnfold.statistics.schemes import Spread, data_batches


@public
def fold(
    model: Model,
    args: tuple[Any, ...] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    dtype: torch.dtype | str | None = None,
    static: bool = False,
    merge: bool = True,
    equalize: bool = False,
    allow_nonfinite: bool = True,
) -> Folded:
    """Folds every per-channel affine that algebra allows; ``model`` is not touched.

    Args:
        model: a module in any mode (eval mode is what is folded), or an ExportedProgram.
        args, kwargs: positional and keyword example inputs, as for ``torch.export.export``.
        dynamic_shapes: as for ``torch.onnx.export``: strings, ``Dim``, hints; by default the batch is dynamic.
        dtype: convert to this floating-point dtype, a name will do; folding still starts from the stored constants.
        static: make no dimension dynamic by default.
        merge: make one contraction of parallel and sequential ones.
        equalize: let scales move between consecutive layers so that their channels have like ranges.
        allow_nonfinite: leave a BatchNorm with NaN or infinite constants in place instead of raising.

    Raises:
        InputError: no example inputs, or not those that the program takes.
        CaptureError: torch.export cannot capture the model.
        FoldError: NaN or infinite constants and not ``allow_nonfinite``.
    """
    run = Run(model, args, kwargs, dynamic_shapes, Options(dtype=dtype, static=static))
    folded = fold_captured(run.capture(), merge=merge, equalize=equalize)
    if not allow_nonfinite:
        refuse_nonfinite(folded.ledger)
    return folded


@public
def export(
    model: Model | str | Path,
    path: str | Path,
    args: tuple[Any, ...] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    options: Options | None = None,
    **more: Unpack[OptionFields],
) -> ExportReport:
    """Folds ``model``, writes it as ONNX, and proves the file equal to the unfolded model before it is there.

    Args:
        model: a module in any mode, or an ExportedProgram; not touched.
        path: where the file goes; untouched unless the verdict is a pass.
        args, kwargs: positional and keyword example inputs, as for ``torch.export.export``.
        dynamic_shapes: as for ``torch.onnx.export``: strings, ``Dim``, hints; by default the batch is dynamic.
        options: everything else, or its fields one by one as keyword arguments (``device="cpu"``); see ``Options``.

    Returns:
        What was folded, the verdict, and the file if one was written.

    Raises:
        BnfoldError: any stage failed; ``exit_code`` says which kind. A failed verdict is no exception: ask ``passed``.
    """
    options, path = asked(options, more), Path(path)
    if not isinstance(model, Model):
        return export_file(model, path, options)
    from bnfold.lowering.lower import lower  # onnx_ir and onnxscript take long to import, and no ONNX file needs them

    expect(options)
    store.check_destination(path, sources=options.sources)
    judge = judging(options, writes=True) if options.check else {}
    run = Run(model, args, kwargs, dynamic_shapes, options)
    folded, data, labels = run.prepare()
    with run.clock("lower"):
        lowered = lower(
            folded.program, opset=opset(options, folded.program), simplify=options.simplify is not False,
            dims=folded.captured.dims, sites=traced(folded), metadata=file_metadata(options, folded.ledger),
            **renamed(options, folded.captured),
        )  # fmt: skip
        if options.opset not in (None, lowered.opset):
            raise LowerError(f"torch.onnx wrote opset {lowered.opset} instead of {options.opset}", where="--opset")
    with store.stage(path) as staging:
        with run.clock("write"):
            file = write_file(lowered, staging, options.external_data)
        there = staging.folder / staging.path.name
        verdict = run.judged(folded, there, lowered.sites, data=data, labels=labels, **judge)

        def failed(said: str) -> FileReport:
            lowered.model.metadata_props["bnfold.verdict"] = said
            return write_file(lowered, staging, options.external_data)

        return committed(run.report("export", folded, verdict), file, staging, options, failed)


@public
def save_folded(
    model: Model,
    path: str | Path,
    args: tuple[Any, ...] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    options: Options | None = None,
    **more: Unpack[OptionFields],
) -> ExportReport:
    """Folds ``model``, proves the folded program equal to it, and writes the program as ``.pt2``; no ONNX.

    With ``eager=True`` the folds go back into the model's own class, and its state dict is written as ``.safetensors``;
    ``prepare`` gives another instance of the class the structure that it loads into.

    Args:
        path: where the file goes; untouched unless the verdict is a pass.
        model, args, kwargs, dynamic_shapes, options: as for ``export``.

    Raises:
        BnfoldError: any stage failed; ``exit_code`` says which kind.
    """
    options, path = asked(options, more), Path(path)
    store.check_destination(path, sources=options.sources)
    expect(options)
    run = Run(model, args, kwargs, dynamic_shapes, options)
    folded, data, labels = run.prepare()
    written = None
    if options.eager:
        with run.clock("write back"):
            written = folded.write_back(model)
            folded = replace(folded, program=written.program, ledger=written.ledger)
    given, eager = judging(options, runs=False), written.module if written else None
    verdict = run.judged(folded, data=data, labels=labels, eager=eager, **given)
    report = run.report("fold", folded, verdict)
    failed = verdict is not None and not verdict.passed
    if options.dry_run or (failed and not options.keep_failed):
        return report
    path = path.with_name(f"{path.stem}.failed{path.suffix}") if failed else path
    with run.clock("write"), store.atomic(path) as staged:
        if written is None:
            save_program(folded.program, staged)
        else:
            save_written(written.module, written.ledger, staged, options.notes)
        size, sha256 = staged.stat().st_size, sha256_of(staged)
    keep_baseline(verdict, options)
    gone, total = folded.ledger.count()
    return replace(report, file=FileReport(str(path), size, report.operators[1], None, total - gone, None, sha256))


@public
def plan(
    model: Model,
    args: tuple[Any, ...] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    options: Options | None = None,
    **more: Unpack[OptionFields],
) -> ExportReport:
    """What folding would do to ``model``: where every affine goes, what stays and why. Writes and judges nothing.

    Args:
        model, args, kwargs, dynamic_shapes, options: as for ``export``.

    Raises:
        InputError: no example inputs, or not those that the program takes.
        CaptureError: torch.export cannot capture the model.
    """
    options = replace(asked(options, more), allow_nonfinite=True, data=None)
    run = Run(model, args, kwargs, dynamic_shapes, options)
    return run.report("plan", run.prepare()[0])


@public
def inspect(
    model: Model | str | Path,
    args: tuple[Any, ...] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    options: Options | None = None,
    **more: Unpack[OptionFields],
) -> Diagnosis:
    """The health of every BatchNorm of ``model``, and what folding would do to them; ``model`` is not touched.

    Args:
        model: a module in any mode, or a program, of which only its graph's normalisations can be known.
        args, kwargs: example inputs as for ``export``. Without any the data or the model must say what it takes, or
            there is no fold plan.
        dynamic_shapes, options: as for ``export``; with ``data=`` running statistics are compared with the data's.

    Returns:
        One ``NormHealth`` per BatchNorm, findings from the closed list ``bnfold.report.FINDINGS``, and the plan. A
        model that torch.export cannot capture has the finding ``not-captured`` in place of a plan.

    Raises:
        InputError: the data cannot be read or the model fails on it, or the inputs are not those of the program.
    """
    options = replace(asked(options, more), allow_nonfinite=True)
    if not isinstance(model, Model):
        return plan_file(model, options)
    model = model if isinstance(model, ExportedProgram) else unwrapped(model)
    run = Run(model, args, kwargs, dynamic_shapes, options)
    planned, captured, failure = None, None, None
    try:
        run = run.with_inputs()
    except (CaptureError, InputError) as error:
        run = replace(run, notes=(f"no fold plan: {error}",))
    else:
        try:
            planning = replace(run, options=replace(options, data=None), notes=())
            folded, _, _ = planning.prepare()
            planned, captured = planning.report("plan", folded), folded.captured
        except CaptureError as error:
            failure = error
    with run.clock("health"):
        found = examine(
            model, run.args, run.kwargs, captured=captured, failure=failure, data=options.data,
            progress=options.progress,
        )  # fmt: skip
    return replace(found, source=model_facts(options, model), plan=planned, notes=(*run.notes, *found.notes))


@public
def save_calibrated(
    model: Model,
    path: str | Path,
    data: Path | str | Mapping[str, Any],
    *,
    only: Sequence[str] | None = None,
    scheme: Scheme = "sequential",
    batch: int = 64,
    options: Options | None = None,
    spread: Spread | None = None,
) -> CalibrationReport:
    """Measures the BatchNorms of ``model`` on ``data`` and writes all its weights, the new statistics among them.

    Args:
        model: a module; not touched.
        path: a .safetensors file. ``--weights`` loads it into the same class, also where that keeps no running
            statistics: the file's metadata says which BatchNorms have got some.
        data: samples by input name, or a file of them.
        only: patterns of the BatchNorms to measure. Default: all.
        scheme: as for ``calibrate``.
        batch: samples at a time.
        options: of these the provenance, the source files and the progress.
        spread: makes the passes over all the parts of the data, of which ``data`` is the first.

    Raises:
        UsageError: the model is a program, or ``only`` names no BatchNorm.
        InputError: see ``calibrate``, and where the data cannot be read.
    """
    options, path = options or Options(), Path(path)
    if isinstance(model, ExportedProgram):
        raise UsageError("a .pt2 program has no layers to calibrate", hint="Give the code that builds the model")
    model = unwrapped(model)
    store.check_destination(path, sources=options.sources)
    read, samples = data_batches(model, data, batch)
    options.progress("calibrate", 0, 1)
    measured = measure(model, read, only=only, scheme=scheme, progress=options.progress, spread=spread)
    calibrated = measured.written(model)
    with store.atomic(path) as staged:
        write_calibrated(calibrated, staged, measured.like, options.notes)
        size = staged.stat().st_size
    return CalibrationReport(
        model_facts(options, model), scheme, measured.rows or samples, measured.passes, measured.layers,
        measured.unreached, measured.circular, str(path), size,
    )  # fmt: skip


@public
def bisect(
    path: str | Path,
    model: Model | str | Path,
    args: tuple[Any, ...] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    options: Options | None = None,
    **more: Unpack[OptionFields],
) -> Bisection:
    """The first module of an existing ONNX file that leaves the noise, and what was folded into it.

    Where the file is right and ONNX Runtime's optimisations make it wrong, their names.

    Args:
        path: the ONNX file; every value of one that ``export`` wrote is compared with the model's own.
        model: the unfolded model; or an ONNX file, with which the other is compared.
        args, kwargs, dynamic_shapes, options: as for ``export``; whether to fold and to merge is taken from the file.

    Raises:
        InputError: the file is missing or damaged, does not run, or its inputs do not fit the model's.
        CaptureError: torch.export cannot capture the model.
    """
    options, path = replace(asked(options, more), allow_nonfinite=True), Path(path)
    device = resolve_device(options.device, options.provider_options)
    if made := FileGraph.read(path).metadata.get("bnfold.rewritten"):
        options = replace(options, fold=made != "no", merge="merged" in made, equalize="equalised" in made)
    if not isinstance(model, Model):
        return bisect_file(path, model, options)
    run = Run(model, args, kwargs, dynamic_shapes, options, path)
    folded, data, _ = run.prepare()
    with run.clock("bisect"):
        found = Bisector(
            captured=folded.captured, path=path, ledger=folded.ledger, meanings=meanings(folded.program), device=device,
            samples=options.samples, seed=options.seed, data=data, progress=options.progress,
        ).find()  # fmt: skip
    return replace(found, source=model_facts(options, model), file=str(path))


@public
def check(
    path: str | Path | None,
    model: Model | str | Path,
    args: tuple[Any, ...] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    options: Options | None = None,
    spread: Parts | None = None,
    **more: Unpack[OptionFields],
) -> CheckReport:
    """The gate alone: judges an existing ONNX file against a torch model.

    Args:
        path: the ONNX file; its inputs are matched by name, else by position and shape. None with ``runner=`` alone.
        model: the unfolded model; or an ONNX file, with which the other is compared as it stands.
        args, kwargs, dynamic_shapes, options: as for ``export``.
        spread: goes through all the parts of the data, of which ``options.data`` is the first.

    Raises:
        InputError: the file is missing or damaged, or its inputs do not fit the model's.
        CaptureError: torch.export cannot capture the model.
    """
    options, path = asked(options, more), None if path is None else Path(path)
    resolve_device(options.device, options.provider_options)
    if path is None and options.runner is None:
        raise UsageError("there is nothing to judge", hint="Name an ONNX file, or a --runner")
    file = None if path is None else FileGraph.read(path)  # before anything is computed
    if not isinstance(model, Model):
        return check_file(path, model, options, whole=spread is None)
    expect(options)
    judge = judging(options)
    captured, data, labels = Run(model, args, kwargs, dynamic_shapes, options, path).read()
    judge["written"] = None if file is None else written_from(captured, file)
    verdict = Gate(captured, Ledger(), None, path, data=data, labels=labels, spread=spread, **judge).judge()
    verdict = replace(verdict, notes=(*captured.notes, *verdict.notes), interface=interface(captured))
    verdict = compared(verdict, options)
    keep_baseline(verdict, options)
    return replace(verdict, source=model_facts(options, model), file=None if path is None else str(path))
