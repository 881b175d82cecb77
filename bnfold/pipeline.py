"""The data flow, a line per stage. Whoever reads this file knows the program.

load -> capture -> fold -> lower -> check -> store
source  graph      graph   ONNX     verdict  file on disk
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.export import ExportedProgram

from bnfold import store
from bnfold._version import __version__
from bnfold.capture import Captured, capture, tensor_inputs
from bnfold.errors import FoldError, InputError, LowerError
from bnfold.folding import fold as fold_graph
from bnfold.gate import Gate
from bnfold.graph import Graph
from bnfold.inputs import load_data, widen_batch
from bnfold.load import Provenance
from bnfold.lower import EXTERNAL_BYTES, Lowered, lower, relocate, save
from bnfold.merge import merge as merge_graph
from bnfold.options import Clock, Folded, Model, Options
from bnfold.program_file import save_program
from bnfold.report import CheckReport, ExportReport, FileReport, Ledger
from bnfold.runtime import resolve_device


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
    captured = _capture(model, args, kwargs, dynamic_shapes, dtype, static)
    folded = _fold(captured, merge=merge)
    if not allow_nonfinite:
        _refuse_nonfinite(folded.ledger)
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
    folded, data, labels = _prepare(model, args, kwargs, dynamic_shapes, options, clock)
    with clock("lower"):
        lowered = lower(
            folded.program, opset=_opset(options), simplify=options.simplify, dims=folded.captured.dims,
            sites=folded.ledger.sites, metadata=_metadata(options, folded),
        )  # fmt: skip
        if options.opset not in (None, lowered.opset):
            raise LowerError(f"torch.onnx wrote opset {lowered.opset} instead of {options.opset}", where="--opset")
    with store.stage(path) as staging:
        with clock("write"):
            file = _write(lowered, staging, options.external_data)
        verdict = None
        if options.check:
            with clock("check"):
                verdict = Gate(
                    folded.captured, folded.ledger, folded.program, staging.folder / staging.path.name,
                    lowered.sites, device,
                    samples=options.samples, seed=options.seed, limit=options.limit, data=data, labels=labels,
                    progress=options.progress,
                ).judge()  # fmt: skip
        report = _report(model, options, folded, verdict, clock)
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
    folded, data, labels = _prepare(model, args, kwargs, dynamic_shapes, options, clock)
    verdict = None
    if options.check:
        with clock("check"):
            verdict = Gate(
                folded.captured, folded.ledger, folded.program, samples=options.samples, seed=options.seed,
                limit=options.limit, data=data, labels=labels, progress=options.progress,
            ).judge()  # fmt: skip
    report = _report(model, options, folded, verdict, clock)
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
    folded, _, _ = _prepare(model, args, kwargs, dynamic_shapes, options, clock)
    return _report(model, options, folded, None, clock)


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
        captured = _capture(model, args, kwargs, dynamic_shapes, options.dtype, options.static)
        data, labels = _data(options.data, captured)
    return Gate(
        captured, Ledger(), None, path, device=device, samples=options.samples, seed=options.seed, limit=options.limit,
        data=data, labels=labels, progress=options.progress,
    ).judge()  # fmt: skip


# -- stages ------------------------------------------------------------------------------------------------------------


def _prepare(
    model: Model, args: Any, kwargs: Any, dynamic_shapes: Any, options: Options, clock: Clock
) -> tuple[Folded, dict[str, np.ndarray] | None, np.ndarray | None]:
    """Captures and folds, and reads the data that the gate will need."""
    with clock("capture"):
        captured = _capture(model, args, kwargs, dynamic_shapes, options.dtype, options.static)
        data, labels = _data(options.data, captured)
    with clock("fold"):
        folded = _fold(captured, merge=options.merge) if options.fold else Folded(captured.program, Ledger(), captured)
        if not options.allow_nonfinite:
            _refuse_nonfinite(folded.ledger)
    return folded, data, labels


def _report(model: Model, options: Options, folded: Folded, verdict: CheckReport | None, clock: Clock) -> ExportReport:
    return ExportReport(
        source_facts(options.provenance, model), folded.ledger, verdict, None, _operators(folded), clock.spent,
        folded.captured.notes,
    )  # fmt: skip


def _capture(
    model: Model, args: Any, kwargs: Any, dynamic_shapes: Any, dtype: torch.dtype | None, static: bool
) -> Captured:
    if args is not None and not isinstance(args, tuple):
        raise InputError(f"args must be a tuple of inputs, not {type(args).__name__}", hint="Write (x,) for one input")
    if not isinstance(model, ExportedProgram) and not static:
        # Whatever batch the user shows, a batch of 1 would be captured as a constant.
        args, kwargs = widen_batch(args or (), kwargs or {})
    return capture(model, args, kwargs, dynamic_shapes=dynamic_shapes, dtype=dtype, static=static)


def _fold(captured: Captured, *, merge: bool) -> Folded:
    graph = Graph(captured.program, captured.masters)
    ledger = fold_graph(graph)
    if merge:
        ledger = merge_graph(graph, ledger)
    return Folded(graph.finish(), ledger, captured)


def _refuse_nonfinite(ledger: Ledger) -> None:
    for entry in ledger.left:
        for refusal in entry.refusals:
            if refusal.reason == "nonfinite":
                raise FoldError(
                    refusal.detail or "a constant is NaN or infinite",
                    where=f"module '{refusal.blocker}'",
                    hint="Repair the checkpoint, or export it unfolded as it is with --allow-nonfinite",
                )


def _opset(options: Options) -> int | None:
    # ONNX knows a bfloat16 Conv from opset 22 on.
    return 22 if options.opset is None and options.dtype is torch.bfloat16 else options.opset


def _write(lowered: Lowered, staging: store.Staging, external: bool | None) -> FileReport:
    target, data = staging.folder / staging.path.name, None
    if external if external is not None else lowered.weight_bytes > EXTERNAL_BYTES:
        save(lowered, target, external="weights")
        data, digest = staging.seal_data("weights")
        relocate(target, data, digest)
    else:
        save(lowered, target)
    size = target.stat().st_size + ((staging.folder / data).stat().st_size if data else 0)
    return FileReport(str(target), size, lowered.nodes, lowered.opset, lowered.batch_norms, data)


def _metadata(options: Options, folded: Folded) -> dict[str, str]:
    gone, total = folded.ledger.count()
    found = {
        "bnfold.version": __version__,
        "bnfold.torch_version": str(torch.__version__),
        "bnfold.batch_norms_folded": str(gone),
        "bnfold.batch_norms_left": str(total - gone),
        # The file that is judged is, byte for byte, the file that is stored; one that fails is not stored.
        "bnfold.verdict": "pass" if options.check else "not checked",
    }
    if options.provenance is not None:
        found["bnfold.source"] = options.provenance.source
        if options.provenance.sha256:
            found["bnfold.source_sha256"] = options.provenance.sha256
    return found


def source_facts(provenance: Provenance | None, model: Model | None = None) -> dict[str, Any]:
    """What a report says about the model: its source, its weights' file and SHA-256, how many parameters."""
    if provenance is None:
        return {"source": type(model).__name__}
    return {
        "source": provenance.source,
        "weights": provenance.weights,
        "sha256": provenance.sha256,
        "parameters": provenance.parameters,
    }


def _operators(folded: Folded) -> tuple[int, int]:
    def count(program: ExportedProgram) -> int:
        return sum(n.op == "call_function" and isinstance(n.meta.get("val"), Tensor) for n in program.graph.nodes)

    return count(folded.captured.program), count(folded.program)


def _data(data: Any, captured: Captured) -> tuple[dict[str, np.ndarray] | None, np.ndarray | None]:
    if data is None:
        return None, None
    names = tensor_inputs(captured.program)
    if isinstance(data, (str, Path)):
        arrays, labels = load_data(Path(data), names)
    else:
        labels = np.asarray(data["labels"]) if "labels" in data else None
        arrays = {name: np.asarray(value) for name, value in data.items() if name != "labels"}
        if set(arrays) != set(names):
            raise InputError(f"data has arrays {sorted(arrays)}, the model takes {names}", hint="Name them alike")
    for name, rows in arrays.items():
        value = captured.flat[captured.names.index(name)]
        if isinstance(value, Tensor) and tuple(rows.shape[1:]) != tuple(value.shape[1:]):
            raise InputError(
                f"array '{name}' holds samples of {tuple(rows.shape[1:])}, the model takes {tuple(value.shape[1:])}",
                hint="The first axis of every array is the sample",
            )
    return arrays, labels
