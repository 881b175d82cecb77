"""The stages of the pipeline, each with its arguments made from the options."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.nn.parameter import is_lazy

from bnfold import store
from bnfold._version import __version__
from bnfold.drawing import of_programs
from bnfold.errors import CaptureError, FoldError, InputError, UsageError
from bnfold.gate.baseline import expect_baseline, judge_baseline, write_baseline
from bnfold.gate.data import Labels, assign, examine, load_data, select
from bnfold.gate.decisions import places
from bnfold.gate.stored import Rows, open_arrays
from bnfold.graph.capture import Captured, capture, input_shapes
from bnfold.graph.graph import Graph
from bnfold.graph.names import number_names
from bnfold.graph.wrapped import refuse_mixed, unwrapped
from bnfold.interface import interface
from bnfold.loading.assumed import assumed, proposed
from bnfold.loading.inputs import model_inputs, specs_for, specs_of_arrays
from bnfold.loading.load import Provenance
from bnfold.loading.onnx_file import specs_of_file
from bnfold.loading.specs import dtype_name
from bnfold.lowering.lower import EXTERNAL_BYTES, Lowered, relocate, save
from bnfold.options import Clock, Folded, Model, Options, Progress, silent
from bnfold.passes.equalize import equalize as equalize_graph
from bnfold.passes.folding import fold as fold_graph
from bnfold.passes.merge import merge as merge_graph
from bnfold.report import CheckReport, ExportReport, FileReport, Ledger
from bnfold.runtime.model_file import read_model
from bnfold.runtime.runner import UserRunner
from bnfold.runtime.runtime import FORMATS, resolve_device
from bnfold.statistics.ranges import layer_ranges, norm_ranges


def expect(options: Options) -> None:
    """Fails at once where the run's baseline could not be read or written in the end."""
    if options.baseline is not None and not options.check:
        raise UsageError("a baseline is compared with what the check finds, and there is no check")
    path = None if options.baseline is None else Path(options.baseline)
    expect_baseline(path, update=options.update_baseline, sources=options.sources)


def judging(options: Options, *, runs: bool = True, writes: bool = False) -> dict[str, Any]:
    """What every gate takes from the options; a device that does not work and a runner that fails to load are told now.

    Args:
        options: of the run.
        runs: a file, or a runner; and not a program alone.
        writes: what is judged is a file that is not at its place before the verdict.

    Raises:
        UsageError: there is no such provider, option, format or runner, or the runner would not see the file.
        ProviderError: the provider cannot be used.
        InputError: the runner cannot be loaded.
    """
    same = ("samples", "seed", "limit", "adversarial", "progress")
    found: dict[str, Any] = {name: getattr(options, name) for name in same}
    if not runs:
        return found
    if options.precision is not None and options.precision not in FORMATS:
        known = ", ".join(FORMATS)
        raise UsageError(f"there is no format '{options.precision}'", where="--precision", hint=f"Use one of {known}")
    if options.precision is not None and options.runner is None:
        raise UsageError("what a provider computes in is measured", where="--precision", hint="Name a --runner")
    device = resolve_device(options.device, options.provider_options)
    runner = None if options.runner is None else UserRunner(options.runner, options.runner_timeout)
    if writes and runner is not None and not runner.takes_path:
        raise UsageError(
            "a runner of a file that is not written yet must take its path", where=runner.name,
            hint="Give it a second parameter: def infer(inputs, path)",
        )  # fmt: skip
    arithmetic = FORMATS.get(options.precision or "")
    whole = {"require_all_nodes": options.require_all_nodes}
    return found | whole | {"device": device, "runner": runner, "arithmetic": arithmetic}


def compared(verdict: CheckReport, options: Options) -> CheckReport:
    """The verdict with the baseline's say in it."""
    if options.baseline is None:
        return verdict
    return judge_baseline(verdict, Path(options.baseline), update=options.update_baseline)


def keep_baseline(verdict: CheckReport | None, options: Options) -> None:
    """Writes the baseline where that is asked for, on no dry run, and the verdict is a pass."""
    asked = options.update_baseline and not options.dry_run
    if asked and options.baseline is not None and verdict is not None and verdict.passed:
        write_baseline(verdict, Path(options.baseline))


def prepare(
    model: Model, args: Any, kwargs: Any, dynamic_shapes: Any, options: Options, clock: Clock, file: Path | None = None
) -> tuple[Folded, dict[str, Rows] | None, Labels | None]:
    """Captures and folds, and reads the data that the gate will need; ``file`` is the ONNX file of a run on one."""
    captured, data, labels = read(model, args, kwargs, dynamic_shapes, options, clock, file)
    with clock("fold"):
        folded = (
            fold_captured(captured, merge=options.merge, equalize=options.equalize)
            if options.fold
            else Folded(captured.program, Ledger(), captured)
        )
        if not options.allow_nonfinite:
            refuse_nonfinite(folded.ledger)
    return folded, data, labels


def read(
    model: Model, args: Any, kwargs: Any, dynamic_shapes: Any, options: Options, clock: Clock, file: Path | None
) -> tuple[Captured, dict[str, Rows] | None, Labels | None]:
    """Captures, and reads the data that the gate will need."""
    with clock("capture"):
        notes: tuple[str, ...] = ()
        if args is None and not kwargs and not isinstance(model, ExportedProgram):
            args, kwargs, dynamic_shapes, notes = known_inputs(unwrapped(model), dynamic_shapes, file, options)
        captured = capture_model(model, args, kwargs, dynamic_shapes, options.dtype, options.static, options.progress)
        captured = replace(captured, notes=(*notes, *captured.notes))
        return captured, *read_data(options.data, captured, options.progress)


def known_inputs(
    model: nn.Module, dynamic_shapes: Any, file: Path | None, options: Options
) -> tuple[Any, Any, Any, tuple[str, ...]]:
    """Example inputs where none are given: as the run's ONNX file says, else its data, else the model's first layer.

    Returns:
        ``args``, ``kwargs``, ``dynamic_shapes``, and a note of what was assumed.

    Raises:
        InputError: the file's inputs are more than the model's, or nothing says what the model takes.
    """
    found = specs_of_file(read_model(file)) if file is not None else []
    data, extra = options.data, not found
    if extra and data is not None:
        found = specs_of_arrays(data if isinstance(data, Mapping) else open_arrays(Path(data)))
    specs, notes = specs_for(model, found, extra=extra), tuple[str, ...]()
    if not specs:
        if (own := assumed(model)) is None:
            where = options.provenance.source if options.provenance else type(model).__name__
            hint = f"Give {proposed(model)} or --data, or set example_inputs on the module or beside its factory"
            raise InputError("nothing says what the model takes", where=where, hint=hint)
        specs, notes = [own], (f'assumed, after its first layer: --input "{own}"; give your own where it is not that',)
    args, kwargs, shapes = model_inputs(model, None, {}, specs, {}, seed=options.seed)
    return args, kwargs, None if options.static else dynamic_shapes or shapes, notes


def make_report(
    kind: Literal["export", "fold", "plan"],
    model: Model,
    options: Options,
    folded: Folded,
    verdict: CheckReport | None,
    clock: Clock,
) -> ExportReport:
    """The report of a run, before a file is written."""
    return ExportReport(
        source_facts(options.provenance, model), folded.ledger, verdict, None, count_operators(folded), clock.spent,
        folded.captured.notes, layer_ranges(folded.captured, folded.program, folded.ledger),
        norm_ranges(folded.captured, folded.ledger), kind, interface(folded.captured, options),
        of_programs(folded.captured, folded.program, folded.ledger),
    )  # fmt: skip


def capture_model(
    model: Model, args: Any, kwargs: Any, dynamic_shapes: Any, dtype: torch.dtype | str | None, static: bool,
    progress: Progress = silent,
) -> Captured:  # fmt: skip
    """Captures the model, and tells the progress where that takes long."""
    if args is not None and not isinstance(args, tuple):
        raise InputError(f"args must be a tuple of inputs, not {type(args).__name__}", hint="Write (x,) for one input")
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise CaptureError(
            "the model is on the meta device, without values", hint="Load its weights: to_empty(), then load_state_dict"
        )
    if not isinstance(model, ExportedProgram):
        model = unwrapped(model)
        if dtype is None:
            refuse_mixed(model, args or (), kwargs or {})
    wanted = None if dtype is None else getattr(torch, dtype_name(dtype))
    return capture(
        model, args, dict(kwargs or {}), dynamic_shapes=dynamic_shapes, dtype=wanted, static=static,
        say=lambda words: progress(f"capture: {words}", 0, 1),
    )  # fmt: skip


def fold_captured(captured: Captured, *, merge: bool, equalize: bool = False) -> Folded:
    """Folds, merges and, where asked, equalises a captured program."""
    graph = Graph(captured.program, captured.masters)
    ledger = fold_graph(graph)
    if merge:
        ledger = merge_graph(graph, ledger)
    if equalize:
        ledger = equalize_graph(graph, ledger)
    return Folded(graph.finish(), ledger, captured)


def refuse_nonfinite(ledger: Ledger) -> None:
    """Raises FoldError where a BatchNorm stays because its constants are NaN or infinite."""
    for entry in ledger.left:
        for refusal in entry.refusals:
            if refusal.reason == "nonfinite":
                raise FoldError(
                    refusal.detail or "a constant is NaN or infinite",
                    where=f"module '{refusal.blocker}'",
                    hint="Repair the checkpoint, or export it unfolded as it is with --allow-nonfinite",
                )


def traced(folded: Folded) -> list[str]:
    """The values that the gate reads from the file: the fold sites, and what the model decides."""
    return [*folded.ledger.sites, *(place.value for place in places(folded.program))]


def opset(options: Options, program: ExportedProgram) -> int | None:
    """The operator set to ask torch.onnx for; None leaves the choice to it."""
    if options.opset is not None:
        return options.opset
    bodies = [module for module in program.graph_module.modules() if isinstance(module, fx.GraphModule)]
    values = (node.meta.get("val") for body in bodies for node in body.graph.nodes)
    half = any(isinstance(value, Tensor) and value.dtype == torch.bfloat16 for value in values)
    return 22 if half else None  # ONNX knows a bfloat16 Conv from there on


def write_file(lowered: Lowered, staging: store.Staging, external: bool | None) -> FileReport:
    """Writes the lowered model into the staging folder, its weights beside it where they are too many."""
    target, data = staging.folder / staging.path.name, None
    if external if external is not None else lowered.weight_bytes > EXTERNAL_BYTES:
        save(lowered, target, external="weights")
        data, sealed = staging.seal_data("weights")
        relocate(target, data, sealed)
    else:
        save(lowered, target)
    size = target.stat().st_size + ((staging.folder / data).stat().st_size if data else 0)
    return FileReport(str(target), size, lowered.nodes, lowered.opset, lowered.batch_norms, data, sha256_of(target))


def write_failed(lowered: Lowered, verdict: str, staging: store.Staging, external: bool | None) -> FileReport:
    """Writes the file anew with the verdict that it got, for a file that is kept all the same."""
    lowered.model.metadata_props["bnfold.verdict"] = verdict
    return write_file(lowered, staging, external)


def committed(
    report: ExportReport,
    file: FileReport,
    staging: store.Staging,
    options: Options,
    failed: Callable[[str], FileReport],
) -> ExportReport:
    """The report of what is there at last: the staged file where it passed, and one that failed where it is kept.

    ``failed`` writes the file anew, with the verdict that it got.
    """
    verdict, path = report.check, staging.asked
    if options.dry_run:
        return report
    if verdict is None or verdict.passed:
        staging.commit(staging.path.name, file.data)
        keep_baseline(verdict, options)
        return replace(report, file=replace(file, path=str(path)))
    if options.keep_failed:
        name = f"{path.stem}.failed{path.suffix}"
        file = failed(verdict.verdict)
        staging.commit(staging.path.name, file.data, name=name)
        return replace(report, file=replace(file, path=str(path.with_name(name))))
    return report


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def metadata(options: Options, folded: Folded) -> dict[str, str]:
    """What the file says about where it comes from."""
    return file_metadata(options, folded.ledger)


def file_metadata(options: Options, ledger: Ledger) -> dict[str, str]:
    """The same, of what was folded."""
    gone, total = ledger.count()
    found = {
        "bnfold.version": __version__,
        "bnfold.torch_version": str(torch.__version__),
        "bnfold.batch_norms_folded": str(gone),
        "bnfold.batch_norms_left": str(total - gone),
        "bnfold.rewritten": _rewritten(options),
        # A file that passes is stored byte for byte as it was judged; one that is kept all the same is written anew.
        "bnfold.verdict": "pass" if options.check else "not checked",
    }
    if taken := [key for key in options.metadata if key.startswith("bnfold.")]:
        raise UsageError(f"'{taken[0]}' is what bnfold writes itself", where="--metadata", hint="Choose another key")
    found |= options.metadata
    if options.provenance is not None:
        found["bnfold.source"] = options.provenance.source
        if options.provenance.sha256:
            found["bnfold.source_sha256"] = options.provenance.sha256
    return found


def _rewritten(options: Options) -> str:
    words = ["folded", *(["merged"] if options.merge else []), *(["equalised"] if options.equalize else [])]
    return ", ".join(words) if options.fold else "no"


def source_facts(provenance: Provenance | None, model: Model | None = None) -> dict[str, Any]:
    """What a report says about the model: its source, its weights' file and SHA-256, how many parameters."""
    held = () if model is None or provenance is not None else model.parameters()
    return provenance_facts(provenance, type(model).__name__, sum(p.numel() for p in held if not is_lazy(p)))


def provenance_facts(provenance: Provenance | None, source: str, parameters: int) -> dict[str, Any]:
    """The same of what has a name and so many parameters, where nothing else is known."""
    date = datetime.now(UTC).isoformat(timespec="seconds")
    if provenance is None:
        return {"source": source, "parameters": parameters, "date": date}
    return {
        "date": date,
        "source": provenance.source,
        "weights": provenance.weights,
        "sha256": provenance.sha256,
        "parameters": provenance.parameters,
        "left_out": list(provenance.left_out),
    }


def count_operators(folded: Folded) -> tuple[int, int]:
    """Operators before and after folding."""

    def count(program: ExportedProgram) -> int:
        return sum(n.op == "call_function" and isinstance(n.meta.get("val"), Tensor) for n in program.graph.nodes)

    return count(folded.captured.program), count(folded.program)


def read_data(
    data: Any, captured: Captured, progress: Progress = silent
) -> tuple[dict[str, Rows] | None, Labels | None]:
    """Samples by input name and what is known about them, read once and found fit for the model.

    Raises:
        InputError: the data are damaged, or do not fit the model's inputs or outputs.
    """
    if data is None:
        return None, None
    shapes = input_shapes(captured)
    # An input without samples along its first axis, such as a scale, may be left to the example.
    batched = [name for name, shape in shapes.items() if shape and not isinstance(shape[0], int)]
    optional = [name for name in shapes if batched and name not in batched]
    outputs = _float_outputs(captured)
    if isinstance(data, (str, Path)):
        arrays, labels = load_data(Path(data), list(shapes), list(outputs), optional)
    else:
        given = {name: _array(value) for name, value in data.items()}
        arrays, labels = select(given, list(shapes), list(outputs), optional)
    for name, rows in arrays.items():
        wanted, sample = shapes[name][1:], tuple(rows.shape[1:])
        fits = len(wanted) == len(sample) and all(n == m for n, m in zip(wanted, sample) if isinstance(n, int))
        if not fits or not shapes[name]:
            takes = ", ".join(str(n) if isinstance(n, int) else "?" for n in wanted)
            raise InputError(
                f"array '{name}' holds samples of {sample}, the model takes ({takes})",
                where=labels.where,
                hint="The first axis of every array is the sample",
            )
    labels = assign(labels, outputs)
    dtypes = {name: captured.flat[captured.names.index(name)].dtype for name in arrays}
    return arrays, replace(labels, digest=examine(arrays, labels, dtypes, progress))


def _array(value: Any) -> np.ndarray[Any, Any]:
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        # numpy has no bfloat16, and float32 holds every one of them.
        value = value.float() if value.dtype is torch.bfloat16 else value
    return np.asarray(value)


def _float_outputs(captured: Captured) -> dict[str, tuple[int | None, ...]]:
    """The shape of every floating-point output by name, None where it is dynamic."""
    (values,) = captured.program.graph.output_node().args
    nodes: list[Any] = [value for value in values if isinstance(value, (torch.fx.Node, int, float))]
    metas = {name: getattr(node, "meta", {}).get("val") for name, node in zip(number_names(captured.program), nodes)}
    return {
        name: tuple(size if isinstance(size, int) else None for size in value.shape)
        for name, value in metas.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
