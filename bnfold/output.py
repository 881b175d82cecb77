"""What is written of a run: the file, what it says of itself, and which of it stays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from bnfold._version import __version__
from bnfold.errors import UsageError
from bnfold.files import sha256_of
from bnfold.gate.baseline import write_baseline
from bnfold.options import Options
from bnfold.report import CheckReport, ExportReport, FileReport, Ledger
from bnfold.store import EXTERNAL_BYTES, Staging

if TYPE_CHECKING:
    from bnfold.lowering.lower import Lowered


def file_metadata(options: Options, ledger: Ledger) -> dict[str, str]:
    """What the file says of where it comes from, and what was folded; UsageError where a key is bnfold's own."""
    gone, total = ledger.count()
    made = ["folded", *(["merged"] if options.merge else []), *(["equalised"] if options.equalize else [])]
    found = {
        "bnfold.version": __version__,
        "bnfold.torch_version": str(torch.__version__),
        "bnfold.batch_norms_folded": str(gone),
        "bnfold.batch_norms_left": str(total - gone),
        "bnfold.rewritten": ", ".join(made) if options.fold else "no",
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


def write_file(lowered: Lowered, staging: Staging, external: bool | None) -> FileReport:
    """Writes the lowered model into the staging folder, its weights beside it where they are too many."""
    from bnfold.lowering.lower import relocate, save  # onnx_ir takes long to import, and no ONNX file needs it

    target, data = staging.folder / staging.path.name, None
    if external if external is not None else lowered.weight_bytes > EXTERNAL_BYTES:
        save(lowered, target, external="weights")
        data, sealed = staging.seal_data("weights")
        relocate(target, data, sealed)
    else:
        save(lowered, target)
    size = target.stat().st_size + ((staging.folder / data).stat().st_size if data else 0)
    return FileReport(str(target), size, lowered.nodes, lowered.opset, lowered.batch_norms, data, sha256_of(target))


def committed(
    report: ExportReport,
    file: FileReport,
    staging: Staging,
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


def keep_baseline(verdict: CheckReport | None, options: Options) -> None:
    """Writes the baseline where that is asked for, on no dry run, and the verdict is a pass."""
    asked = options.update_baseline and not options.dry_run
    if asked and options.baseline is not None and verdict is not None and verdict.passed:
        write_baseline(verdict, Path(options.baseline))
