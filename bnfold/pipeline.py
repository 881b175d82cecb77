"""The data flow, a line per stage. Whoever reads this file knows the program.

load -> capture -> fold -> lower -> check -> store
source  graph      graph   ONNX     verdict  file on disk
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bnfold import store
from bnfold.errors import InputError, LowerError
from bnfold.gate import Gate
from bnfold.lower import lower
from bnfold.options import Clock, Folded, Model, Options
from bnfold.program_file import save_program
from bnfold.report import CheckReport, ExportReport, FileReport, Ledger
from bnfold.runtime import resolve_device
from bnfold.stages import (
    capture_model,
    fold_captured,
    make_report,
    metadata,
    opset,
    prepare,
    read_data,
    refuse_nonfinite,
    write_file,
)


def fold(
    model: Model,
    args: tuple[Any, ...] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    dtype: torch.dtype | None = None,
    static: bool = False,
    merge: bool = True,
    allow_nonfinite: bool = True,
) -> Folded:
    """Folds every per-channel affine that algebra allows; ``model`` is not touched.

    Args:
        model: a module in any mode (eval mode is what is folded), or an ExportedProgram.
        args: positional example inputs, as for ``torch.export.export``.
        kwargs: keyword example inputs.
        dynamic_shapes: as for ``torch.export.export``; by default the batch, axis 0, is dynamic.
        dtype: convert to this floating-point dtype; folding still starts from the stored constants.
        static: make no dimension dynamic by default.
        merge: make one contraction of parallel and sequential ones.
        allow_nonfinite: leave a BatchNorm with NaN or infinite constants in place instead of raising.

    Raises:
        InputError: no example inputs, or not those that the program takes.
        CaptureError: torch.export cannot capture the model.
        FoldError: NaN or infinite constants and not ``allow_nonfinite``.
    """
    captured = capture_model(model, args, kwargs, dynamic_shapes, dtype, static)
    folded = fold_captured(captured, merge=merge)
    if not allow_nonfinite:
        refuse_nonfinite(folded.ledger)
    return folded


def export(
    model: Model,
    path: str | Path,
    args: tuple[Any, ...] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    options: Options | None = None,
    **more: Any,
) -> ExportReport:
    """Folds ``model``, writes it as ONNX, and proves the file equal to the unfolded model before it is there.

    Args:
        model: a module in any mode, or an ExportedProgram; not touched.
        path: where the file goes; untouched unless the verdict is a pass.
        args: positional example inputs, as for ``torch.export.export``.
        kwargs: keyword example inputs.
        dynamic_shapes: as for ``torch.export.export``; by default the batch, axis 0, is dynamic.
        options: everything else, or its fields one by one as keyword arguments (``device="cuda"``).

    Returns:
        What was folded, the verdict, and the file if one was written.

    Raises:
        BnfoldError: any stage failed; ``exit_code`` says which kind. A failed verdict is no exception: ask ``passed``.
    """
    options = replace(options or Options(), **more)
    path, clock = Path(path), Clock(options.progress)
    device = resolve_device(options.device) if options.check else "cpu"
    store.check_destination(path, sources=options.sources)
    folded, data, labels = prepare(model, args, kwargs, dynamic_shapes, options, clock)
    with clock("lower"):
        lowered = lower(
            folded.program, opset=opset(options), simplify=options.simplify, dims=folded.captured.dims,
            sites=folded.ledger.sites, metadata=metadata(options, folded),
        )  # fmt: skip
        if options.opset not in (None, lowered.opset):
            raise LowerError(f"torch.onnx wrote opset {lowered.opset} instead of {options.opset}", where="--opset")
    with store.stage(path) as staging:
        with clock("write"):
            file = write_file(lowered, staging, options.external_data)
        verdict = None
        if options.check:
            with clock("check"):
                verdict = Gate(
                    folded.captured, folded.ledger, folded.program, staging.folder / staging.path.name,
                    lowered.sites, device,
                    samples=options.samples, seed=options.seed, limit=options.limit, data=data, labels=labels,
                    progress=options.progress,
                ).judge()  # fmt: skip
        report = make_report(model, options, folded, verdict, clock)
        if options.dry_run:
            return report
        if verdict is None or verdict.passed:
            staging.commit(staging.path.name, file.data)
            return replace(report, file=replace(file, path=str(path)))
        if options.keep_failed:
            name = f"{path.stem}.failed{path.suffix}"
            staging.commit(staging.path.name, file.data, name=name)
            return replace(report, file=replace(file, path=str(path.with_name(name))))
    return report


def save_folded(
    model: Model,
    path: str | Path,
    args: tuple[Any, ...] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    options: Options | None = None,
    **more: Any,
) -> ExportReport:
    """Folds ``model``, proves the folded program equal to it, and writes the program as ``.pt2``; no ONNX.

    Args:
        path: where the program goes; untouched unless the verdict is a pass.
        model, args, kwargs, dynamic_shapes, options: as for ``export``.

    Raises:
        BnfoldError: any stage failed; ``exit_code`` says which kind.
    """
    options = replace(options or Options(), **more)
    path, clock = Path(path), Clock(options.progress)
    store.check_destination(path, sources=options.sources)
    folded, data, labels = prepare(model, args, kwargs, dynamic_shapes, options, clock)
    verdict = None
    if options.check:
        with clock("check"):
            verdict = Gate(
                folded.captured, folded.ledger, folded.program, samples=options.samples, seed=options.seed,
                limit=options.limit, data=data, labels=labels, progress=options.progress,
            ).judge()  # fmt: skip
    report = make_report(model, options, folded, verdict, clock)
    if options.dry_run or not (verdict is None or verdict.passed or options.keep_failed):
        return report
    if not (verdict is None or verdict.passed):
        path = path.with_name(f"{path.stem}.failed{path.suffix}")
    with clock("write"), store.atomic(path) as staged:
        save_program(folded.program, staged)
        size = staged.stat().st_size
    gone, total = folded.ledger.count()
    return replace(report, file=FileReport(str(path), size, report.operators[1], None, total - gone))


def plan(
    model: Model,
    args: tuple[Any, ...] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    options: Options | None = None,
    **more: Any,
) -> ExportReport:
    """What folding would do to ``model``: where every affine goes, what stays and why. Writes and judges nothing.

    Args:
        model, args, kwargs, dynamic_shapes, options: as for ``export``.

    Raises:
        InputError: no example inputs, or not those that the program takes.
        CaptureError: torch.export cannot capture the model.
    """
    options = replace(options or Options(), **more, allow_nonfinite=True, data=None)
    clock = Clock(options.progress)
    folded, _, _ = prepare(model, args, kwargs, dynamic_shapes, options, clock)
    return make_report(model, options, folded, None, clock)


def check(
    path: str | Path,
    model: Model,
    args: tuple[Any, ...] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    options: Options | None = None,
    **more: Any,
) -> CheckReport:
    """The gate alone: judges an existing ONNX file against a torch model.

    Args:
        path: the ONNX file; its inputs are matched to the model's by name, else by position and shape.
        model: the unfolded model.
        args: positional example inputs, as for ``torch.export.export``.
        kwargs: keyword example inputs.
        dynamic_shapes: as for ``torch.export.export``.
        options: as for ``export``.

    Raises:
        InputError: the file is missing or damaged, or its inputs do not fit the model's.
        CaptureError: torch.export cannot capture the model.
    """
    options, path = replace(options or Options(), **more), Path(path)
    if not path.is_file():
        raise InputError("there is no such file", where=str(path))
    device, clock = resolve_device(options.device), Clock(options.progress)
    with clock("capture"):
        captured = capture_model(model, args, kwargs, dynamic_shapes, options.dtype, options.static)
        data, labels = read_data(options.data, captured)
    return Gate(
        captured, Ledger(), None, path, device=device, samples=options.samples, seed=options.seed, limit=options.limit,
        data=data, labels=labels, progress=options.progress,
    ).judge()  # fmt: skip
