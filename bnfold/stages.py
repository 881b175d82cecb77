"""The stages of the pipeline, each with its arguments made from the options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.export import ExportedProgram

from bnfold import store
from bnfold._version import __version__
from bnfold.capture import Captured, capture, tensor_inputs
from bnfold.errors import FoldError, InputError
from bnfold.folding import fold as fold_graph
from bnfold.graph import Graph
from bnfold.inputs import load_data, widen_batch
from bnfold.load import Provenance
from bnfold.lower import EXTERNAL_BYTES, Lowered, relocate, save
from bnfold.merge import merge as merge_graph
from bnfold.options import Clock, Folded, Model, Options
from bnfold.report import CheckReport, ExportReport, FileReport, Ledger


def prepare(
    model: Model, args: Any, kwargs: Any, dynamic_shapes: Any, options: Options, clock: Clock
) -> tuple[Folded, dict[str, np.ndarray] | None, np.ndarray | None]:
    """Captures and folds, and reads the data that the gate will need."""
    with clock("capture"):
        captured = capture_model(model, args, kwargs, dynamic_shapes, options.dtype, options.static)
        data, labels = read_data(options.data, captured)
    with clock("fold"):
        folded = (
            fold_captured(captured, merge=options.merge)
            if options.fold
            else Folded(captured.program, Ledger(), captured)
        )
        if not options.allow_nonfinite:
            refuse_nonfinite(folded.ledger)
    return folded, data, labels


def make_report(
    model: Model, options: Options, folded: Folded, verdict: CheckReport | None, clock: Clock
) -> ExportReport:
    """The report of a run, before a file is written."""
    return ExportReport(
        source_facts(options.provenance, model), folded.ledger, verdict, None, count_operators(folded), clock.spent,
        folded.captured.notes,
    )  # fmt: skip


def capture_model(
    model: Model, args: Any, kwargs: Any, dynamic_shapes: Any, dtype: torch.dtype | None, static: bool
) -> Captured:
    """Captures the model, with a batch that torch.export does not take for a constant."""
    if args is not None and not isinstance(args, tuple):
        raise InputError(f"args must be a tuple of inputs, not {type(args).__name__}", hint="Write (x,) for one input")
    if not isinstance(model, ExportedProgram) and not static:
        # Whatever batch the user shows, a batch of 1 would be captured as a constant.
        args, kwargs = widen_batch(args or (), kwargs or {})
    return capture(model, args, kwargs, dynamic_shapes=dynamic_shapes, dtype=dtype, static=static)


def fold_captured(captured: Captured, *, merge: bool) -> Folded:
    """Folds and merges a captured program."""
    graph = Graph(captured.program, captured.masters)
    ledger = fold_graph(graph)
    if merge:
        ledger = merge_graph(graph, ledger)
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


def opset(options: Options) -> int | None:
    """The operator set to ask torch.onnx for; None leaves the choice to it."""
    # ONNX knows a bfloat16 Conv from opset 22 on.
    return 22 if options.opset is None and options.dtype is torch.bfloat16 else options.opset


def write_file(lowered: Lowered, staging: store.Staging, external: bool | None) -> FileReport:
    """Writes the lowered model into the staging folder, its weights beside it where they are too many."""
    target, data = staging.folder / staging.path.name, None
    if external if external is not None else lowered.weight_bytes > EXTERNAL_BYTES:
        save(lowered, target, external="weights")
        data, digest = staging.seal_data("weights")
        relocate(target, data, digest)
    else:
        save(lowered, target)
    size = target.stat().st_size + ((staging.folder / data).stat().st_size if data else 0)
    return FileReport(str(target), size, lowered.nodes, lowered.opset, lowered.batch_norms, data)


def metadata(options: Options, folded: Folded) -> dict[str, str]:
    """What the file says about where it comes from."""
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


def count_operators(folded: Folded) -> tuple[int, int]:
    """Operators before and after folding."""

    def count(program: ExportedProgram) -> int:
        return sum(n.op == "call_function" and isinstance(n.meta.get("val"), Tensor) for n in program.graph.nodes)

    return count(folded.captured.program), count(folded.program)


def read_data(data: Any, captured: Captured) -> tuple[dict[str, np.ndarray] | None, np.ndarray | None]:
    """Samples by input name and their labels, checked against the model's inputs."""
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
