"""The stages of the pipeline, each with its arguments made from the options."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.nn.parameter import is_lazy

from bnfold._version import __version__
from bnfold.errors import CaptureError, FoldError, InputError, UsageError
from bnfold.gate.baseline import expect_baseline, judge_baseline
from bnfold.gate.data import Labels, assign, examine, load_data, select
from bnfold.gate.decisions import places
from bnfold.gate.file_graph import FileGraph
from bnfold.gate.gate import Gate
from bnfold.gate.metrics import Facts, Part
from bnfold.gate.stored import Rows, open_arrays
from bnfold.graph.capture import Captured, capture, input_shapes
from bnfold.graph.graph import Graph
from bnfold.graph.names import number_names
from bnfold.graph.wrapped import refuse_mixed, unwrapped
from bnfold.interface import interface, program_operators, returned
from bnfold.loading.inputs import assumed, model_inputs, proposed, specs_for, specs_of_arrays
from bnfold.loading.onnx_file import specs_of_file
from bnfold.loading.specs import dtype_name
from bnfold.options import Clock, Folded, Model, Options
from bnfold.passes.equalize import equalize as equalize_graph
from bnfold.passes.folding import fold as fold_graph
from bnfold.passes.merge import merge as merge_graph
from bnfold.report import CheckReport, ExportReport, Ledger
from bnfold.report.progress import Progress, silent
from bnfold.runtime.model_file import read_model
from bnfold.runtime.runner import UserRunner
from bnfold.runtime.runtime import FORMATS, resolve_device
from bnfold.statistics.calibration import Scratch
from bnfold.statistics.ranges import layer_ranges, norm_ranges
from bnfold.statistics.schemes import Pass, Seen, data_batches


def expect(options: Options) -> None:
    """Fails at once where the run's baseline could not be read or written in the end."""
    if options.baseline is not None and not options.check:
        raise UsageError("a baseline is compared with what the check finds, and there is no check")
    path = None if options.baseline is None else Path(options.baseline)
    expect_baseline(path, update=options.update_baseline, sources=options.sources)


def judging(options: Options, *, runs: bool = True, writes: bool = False) -> dict[str, Any]:
    """What every gate takes from the options; a device that does not work and a runner that fails to load are told now.

    ``runs``: a file or a runner, and not a program alone; ``writes``: what is judged is a file that is not at its place
    before the verdict. UsageError where there is no such provider, option, format or runner, or the runner would not
    see the file; ProviderError where the provider cannot be used, InputError where the runner cannot be loaded.
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
        hint = "Give it a second parameter: def infer(inputs, path)"
        raise UsageError("a runner of a file that is not written yet must take its path", where=runner.name, hint=hint)
    arithmetic = FORMATS.get(options.precision or "")
    whole = {"require_all_nodes": options.require_all_nodes}
    return found | whole | {"device": device, "runner": runner, "arithmetic": arithmetic}


def compared(verdict: CheckReport, options: Options) -> CheckReport:
    """The verdict with the baseline's say in it."""
    if options.baseline is None:
        return verdict
    return judge_baseline(verdict, Path(options.baseline), update=options.update_baseline)


@dataclass(frozen=True)
class Run:
    """One run on a torch model."""

    model: Model
    args: Any  #: as for ``torch.export``, as the next two are; ``with_inputs`` finds some where none are given.
    kwargs: Mapping[str, Any] | None
    dynamic_shapes: Any
    options: Options  #: everything else that is asked for.
    file: Path | None = None  #: the ONNX file of a run on one.
    notes: tuple[str, ...] = ()

    @cached_property
    def clock(self) -> Clock:
        """Of this run alone."""
        return Clock(self.options.progress)

    def with_inputs(self) -> Run:
        """With example inputs: those given, else as the run's ONNX file says, its data, or the model's first layer.

        InputError where the file's inputs are more than the model's, or nothing says what the model takes.
        """
        if self.args is not None or self.kwargs or isinstance(self.model, ExportedProgram):
            return self
        model, options = unwrapped(self.model), self.options
        found = specs_of_file(read_model(self.file)) if self.file is not None else []
        data, extra = options.data, not found
        if extra and data is not None:
            found = specs_of_arrays(data if isinstance(data, Mapping) else open_arrays(Path(data)))
        specs, notes = specs_for(model, found, extra=extra), tuple[str, ...]()
        if not specs:
            if (own := assumed(model)) is None:
                where = options.provenance.source if options.provenance else type(model).__name__
                hint = f"Give {proposed(model)} or --data, or set example_inputs on the module or beside its factory"
                raise InputError("nothing says what the model takes", where=where, hint=hint)
            specs = [own]
            notes = (f'assumed, after its first layer: --input "{own}"; give your own where it is not that',)
        args, kwargs, shapes = model_inputs(model, None, {}, specs, {}, seed=options.seed)
        shapes = None if options.static else self.dynamic_shapes or shapes
        return replace(self, args=args, kwargs=kwargs, dynamic_shapes=shapes, notes=(*self.notes, *notes))

    def capture(self) -> Captured:
        """Captures the model on the inputs that are given, and tells the progress where that takes long."""
        model, args, kwargs, options = self.model, self.args, dict(self.kwargs or {}), self.options
        if args is not None and not isinstance(args, tuple):
            hint = "Write (x,) for one input"
            raise InputError(f"args must be a tuple of inputs, not {type(args).__name__}", hint=hint)
        if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
            hint = "Load its weights: to_empty(), then load_state_dict"
            raise CaptureError("the model is on the meta device, without values", hint=hint)
        if not isinstance(model, ExportedProgram):
            model = unwrapped(model)
            if options.dtype is None:
                refuse_mixed(model, args or (), kwargs)
        captured = capture(
            model, args, kwargs, dynamic_shapes=self.dynamic_shapes, static=options.static,
            dtype=None if options.dtype is None else getattr(torch, dtype_name(options.dtype)),
            say=lambda words: options.progress(f"capture: {words}", 0, 1),
        )  # fmt: skip
        return replace(captured, notes=(*self.notes, *captured.notes))

    def read(self) -> tuple[Captured, dict[str, Rows] | None, Labels | None]:
        """Captures, on inputs that are found where none are given, and reads the data that the gate will need."""
        with self.clock("capture"):
            captured = self.with_inputs().capture()
            return captured, *read_data(self.options.data, captured, self.options.progress)

    def prepare(self) -> tuple[Folded, dict[str, Rows] | None, Labels | None]:
        """The same, and folds."""
        captured, data, labels = self.read()
        with self.clock("fold"):
            folded = Folded(captured.program, Ledger(), captured)
            if self.options.fold:
                folded = fold_captured(captured, merge=self.options.merge, equalize=self.options.equalize)
            if not self.options.allow_nonfinite:
                refuse_nonfinite(folded.ledger)
        return folded, data, labels

    def judged(self, folded: Folded, *given: Any, **how: Any) -> CheckReport | None:
        """The verdict of a ``Gate`` that is given these besides, with the baseline's say; None where none is wanted."""
        if not self.options.check:
            return None
        with self.clock("check"):
            verdict = Gate(folded.captured, folded.ledger, folded.program, *given, **how).judge()
        return compared(verdict, self.options)

    def report(
        self, kind: Literal["export", "fold", "plan"], folded: Folded, verdict: CheckReport | None = None
    ) -> ExportReport:
        """What was found out, before a file is written."""
        captured, program, ledger = folded.captured, folded.program, folded.ledger
        return ExportReport(
            model_facts(self.options, self.model), ledger, verdict, None,
            (_operators(captured.program), _operators(program)), self.clock.spent, captured.notes,
            layer_ranges(captured, program, ledger), norm_ranges(captured, ledger), kind,
            interface(captured, self.options), program_operators(captured, program, ledger),
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


def written_from(captured: Captured, file: FileGraph) -> ExportedProgram | None:
    """What ``export`` of these versions wrote a file from, after its metadata; None where it wrote none such."""
    said, own = file.metadata, {"bnfold.version": __version__, "bnfold.torch_version": str(torch.__version__)}
    made = said.get("bnfold.rewritten", "")
    if file.producer != "bnfold" or not own.items() <= said.items():
        return None
    if "folded" not in made:
        return captured.program
    return fold_captured(captured, merge="merged" in made, equalize="equalised" in made).program


def refuse_nonfinite(ledger: Ledger) -> None:
    """Raises FoldError where a BatchNorm stays because its constants are NaN or infinite."""
    for entry in ledger.left:
        for refusal in entry.refusals:
            if refusal.reason == "nonfinite":
                what = refusal.detail or "a constant is NaN or infinite"
                hint = "Repair the checkpoint, or export it unfolded as it is with --allow-nonfinite"
                raise FoldError(what, where=f"module '{refusal.blocker}'", hint=hint)


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


def model_facts(options: Options, model: Model | None = None) -> dict[str, Any]:
    """What a report says about the model: its source, its weights' file and SHA-256, how many parameters."""
    held = () if model is None or options.provenance is not None else model.parameters()
    return source_facts(options, type(model).__name__, sum(p.numel() for p in held if not is_lazy(p)))


def source_facts(options: Options, source: str, parameters: int) -> dict[str, Any]:
    """The same of what has a name and so many parameters, where nothing else is known."""
    date, known = datetime.now(UTC).isoformat(timespec="seconds"), options.provenance
    if known is None:
        return {"source": source, "parameters": parameters, "date": date}
    return {
        "date": date, "source": known.source, "weights": known.weights, "sha256": known.sha256,
        "parameters": known.parameters, "left_out": list(known.left_out),
    }  # fmt: skip


def _operators(program: ExportedProgram) -> int:
    return sum(n.op == "call_function" and isinstance(n.meta.get("val"), Tensor) for n in program.graph.nodes)


def read_data(
    data: Any, captured: Captured, progress: Progress = silent
) -> tuple[dict[str, Rows] | None, Labels | None]:
    """Samples by input name and what is known about them, read once; InputError where they do not fit the model."""
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
            what = f"array '{name}' holds samples of {sample}, the model takes ({takes})"
            raise InputError(what, where=labels.where, hint="The first axis of every array is the sample")
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
    return {
        name: tuple(size if isinstance(size, int) else None for size in value.shape)
        for name, value in zip(number_names(captured.program), returned(captured.program))
        if isinstance(value, Tensor) and value.is_floating_point()
    }


# -- data in parts: how a file does on one, and what one shows of BatchNorms -------------------------------------------
#
# A function is made once per process, where the model is loaded, and answers for every part; ``pipeline.check`` and
# ``pipeline.save_calibrated`` ask, and add the answers up.


def looker(
    path: str | Path | None,
    model: Model,
    args: tuple[Any, ...] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    options: Options,
) -> Callable[[Path, Facts], Part]:
    """Sees how the file does on parts of the data, for the ``spread`` of ``check``, which has the same arguments."""
    path, asked = None if path is None else Path(path), judging(options)
    quiet = replace(options, data=None, progress=silent)
    captured, _, _ = Run(model, args, kwargs, dynamic_shapes, quiet, path).read()

    def look(part: Path, facts: Facts) -> Part:
        data, labels = read_data(part, captured)
        return Gate(captured, Ledger(), None, path, data=data, labels=labels, **asked).look(facts)

    return look


def observer(model: Model, *, only: Sequence[str] | None, batch: int) -> Callable[[Path, Pass], Seen]:
    """Makes passes over parts of the data, for the ``spread`` of ``save_calibrated``, which has the same arguments."""
    if isinstance(model, ExportedProgram):
        raise UsageError("a .pt2 program has no layers to calibrate", hint="Give the code that builds the model")
    scratch = Scratch.of(model, only)

    def observe(data: Path, turn: Pass) -> Seen:
        read, rows = data_batches(model, data, batch)
        return replace(scratch.observe(turn, read, silent), rows=rows)

    return observe
