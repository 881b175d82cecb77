"""ONNX files as what a file is judged against: read -> check."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bnfold.errors import UsageError
from bnfold.gate.data import load_data
from bnfold.gate.file_gate import FileGate
from bnfold.loading.onnx_file import OnnxFile, read_onnx
from bnfold.options import Options
from bnfold.report import CheckReport
from bnfold.stages import compared, expect, judging, keep_baseline, provenance_facts


def check_file(path: Path | None, source: OnnxFile | str | Path, options: Options, *, whole: bool) -> CheckReport:
    """Judges one file against another; ``whole``: on all the data at once.

    Raises:
        UsageError: there is no file to judge, or an option does not apply to one.
        InputError: a file is not what it claims to be, or runs on none of the inputs made for it.
    """
    if path is None or not whole:
        raise UsageError("a file is compared with a file, on data of one part")
    source = source if isinstance(source, OnnxFile) else read_onnx(Path(source))
    expect(options)
    for name in ("dtype", "adversarial", "static"):
        if getattr(options, name):
            raise UsageError("it does not apply to an ONNX file", where=f"--{name}")
    read_onnx(path)
    asked = judging(options)
    if asked.get("runner") is not None:
        raise UsageError("a runner is judged against a torch model", where="--runner")
    verdict = FileGate(
        source.path, path, asked["device"], options.seed, options.limit, data=_data(options.data, source),
        progress=options.progress,
    ).judge()  # fmt: skip
    verdict = compared(verdict, options)
    keep_baseline(verdict, options)
    facts = provenance_facts(options.provenance, source.path.name, source.elements)
    return replace(verdict, source=facts, file=str(path))


def _data(data: Any, source: OnnxFile) -> Mapping[str, np.ndarray[Any, Any]] | None:
    """Samples by input name."""
    if data is None:
        return None
    held = {tensor.name for tensor in source.model.graph.initializer}
    names = [value.name for value in source.model.graph.input if value.name not in held]
    if isinstance(data, Mapping):
        return {name: np.asarray(value) for name, value in data.items()}
    arrays, _ = load_data(Path(data), names, [value.name for value in source.model.graph.output], [])
    return {name: np.asarray(rows[0 : len(rows)]) for name, rows in arrays.items()}
