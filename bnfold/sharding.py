"""The two questions that are asked of data in parts: how a file does on a part, and what a part shows of BatchNorms.

A function is made once per process, where the model is loaded, and answers for every part; ``pipeline.check`` and
``pipeline.save_calibrated`` ask, and add the answers up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.export import ExportedProgram

from bnfold.errors import UsageError
from bnfold.gate.gate import Gate
from bnfold.gate.metrics import Facts, Part
from bnfold.options import Model, Options
from bnfold.report import Ledger
from bnfold.report.progress import silent
from bnfold.stages import Run, judging, read_data
from bnfold.statistics.batches import data_batches
from bnfold.statistics.calibration import Scratch
from bnfold.statistics.schemes import Pass, Seen


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
