"""The data flow for ONNX files as sources: read -> fold -> check against the file itself -> store."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx

from bnfold import store
from bnfold.affine import Meaning
from bnfold.errors import BnfoldError, InputError, LowerError, ResourceError, UsageError
from bnfold.files import sha256_of
from bnfold.gate.bisection import FileBisector
from bnfold.gate.data import load_data
from bnfold.gate.file_gate import FileGate
from bnfold.graph.onnx_graph import OnnxGraph
from bnfold.interface import file_operators
from bnfold.loading.onnx_file import OnnxFile, bytes_of, put, read_onnx
from bnfold.options import Clock, Options
from bnfold.output import committed, file_metadata, keep_baseline
from bnfold.passes.equalize import equalize as equalize_graph
from bnfold.passes.folding import fold as fold_graph
from bnfold.passes.merge import merge as merge_graph
from bnfold.report import Bisection, CheckReport, Diagnosis, ExportReport, FileReport, Ledger, Operator
from bnfold.runtime.model_file import apart, filled
from bnfold.runtime.runtime import resolve_device
from bnfold.stages import compared, expect, judging, refuse_nonfinite, source_facts
from bnfold.statistics.batchnorms import file_layers
from bnfold.statistics.diagnose import findings

#: Initializers of no more bytes stay in the file; others begin on a page of the file beside it, as memory maps want.
SMALL, PAGE = 1024, 4096


@dataclass(frozen=True)
class FoldedFile:
    """A file folded: ``ledger`` says where every affine went.

    ``model`` is its content. Initializers that were outside of the source still are, and large ones that are new are
    made by ``beside``, by name. ``meanings`` has what its values stand for, by name, where that is not the value of the
    source that has their name.
    """

    source: OnnxFile
    model: onnx.ModelProto
    ledger: Ledger
    operators: tuple[int, int]
    graph: tuple[Operator, ...]
    meanings: Mapping[str, Meaning | None]
    beside: Mapping[str, Callable[[], bytes]]

    def raw(self, tensor: onnx.TensorProto) -> bytes | None:
        """The bytes of an initializer that is written; None where it has numbers in place of bytes."""
        return self.beside[tensor.name]() if tensor.name in self.beside else self.source.raw(tensor)

    def report(
        self, kind: Literal["export", "plan"], options: Options, clock: Clock, verdict: CheckReport | None = None
    ) -> ExportReport:
        """What was found out, before a file is written."""
        return ExportReport(
            _facts(self.source, options), self.ledger, verdict, None, self.operators, clock.spent, kind=kind,
            graph=self.graph,
        )  # fmt: skip


def fold_file(source: OnnxFile, options: Options) -> FoldedFile:
    """Folds every affine of a file that algebra allows; only what folds is touched."""
    converts = options.opset is not None and options.opset != source.opset
    model = source.loaded() if converts or options.simplify else source.copied()
    if options.opset is not None and converts:
        try:
            model = onnx.version_converter.convert_version(model, options.opset)
        except Exception as error:  # whatever onnx's converter in C++ raises
            text = " ".join(str(error).split())[:200]
            what = f"onnx cannot convert the file to opset {options.opset}: {text}"
            raise LowerError(what, where="--opset") from error
    if options.simplify:
        from bnfold.lowering.lower import simplified  # onnx_ir takes long to import

        model = simplified(model)
    ledger, meant, beside = Ledger(), dict[str, Meaning | None](), dict[str, Callable[[], bytes]]()
    before = len(model.graph.node)
    if options.fold:
        graph, ledger = _folded(model, source.path, options)
        model, meant, beside = graph.model, graph.meanings(), graph.beside
    if not options.allow_nonfinite:
        refuse_nonfinite(ledger)
    count, drawn = len(model.graph.node), file_operators(source.model, model, ledger)
    return FoldedFile(source, model, ledger, (before, count), drawn, meant, beside)


def _folded(model: onnx.ModelProto, path: Path, options: Options) -> tuple[OnnxGraph, Ledger]:
    """The model with what folds folded, and where every affine went."""
    try:
        graph = OnnxGraph(model, path.parent)
        ledger = graph.with_unseen(fold_graph(graph))
        if options.merge:
            ledger = merge_graph(graph, ledger)
        if options.equalize:
            ledger = equalize_graph(graph, ledger)
        graph.finish()
        return graph, ledger
    except BnfoldError as error:
        error.where = error.where or str(path)
        raise
    except MemoryError as error:
        raise ResourceError("the memory does not suffice to fold it", where=str(path)) from error
    except Exception as error:  # a file may contradict itself in any way, and onnx's inference misses some
        text = " ".join(str(error).split())[:200] or type(error).__name__
        what = f"its operators, attributes and shapes do not fit one another: {text}"
        hint = "onnx.checker.check_model(path, full_check=True) may say more; if it runs, please report it"
        raise InputError(what, where=str(path), hint=hint) from error


def export_file(source: OnnxFile | str | Path, path: Path, options: Options) -> ExportReport:
    """Folds an ONNX file, and proves the one that is written equal to it before it is there."""
    source, clock = read_onnx(source), Clock(options.progress)
    expect(options)
    _refuse(options)
    device = judging(options, writes=True)["device"] if options.check else None
    store.check_destination(path, sources=(*options.sources, source.path))
    data = _data(options.data, source)
    with clock("fold"):
        folded = fold_file(source, options)
    for key, value in file_metadata(options, folded.ledger).items():
        for entry in [e for e in folded.model.metadata_props if e.key == key]:
            folded.model.metadata_props.remove(entry)
        folded.model.metadata_props.add(key=key, value=value)
    with store.stage(path) as staging:
        target = staging.folder / staging.path.name
        with clock("write"):
            file = _write(folded, target, staging, options.external_data)
        verdict = None
        if options.check:
            with clock("check"):
                verdict = _judged(source, target, options, device, data)
        report = folded.report("export", options, clock, verdict)

        def failed(said: str) -> FileReport:
            for entry in folded.model.metadata_props:
                entry.value = said if entry.key == "bnfold.verdict" else entry.value
            return _stored(folded, target, staging, file.data)

        return committed(report, file, staging, options, failed)


def plan_file(source: OnnxFile | str | Path, options: Options) -> Diagnosis:
    """The health of a file's BatchNormalizations, and what folding would do to it. Writes and judges nothing."""
    source, clock = read_onnx(source), Clock(options.progress)
    with clock("fold"):
        folded = fold_file(source, replace(options, allow_nonfinite=True))
    plan = folded.report("plan", options, clock)
    with clock("health"):
        layers = file_layers(OnnxGraph(source.copied(), source.path.parent))
    health = tuple(layer.health for layer in layers)
    return Diagnosis(_facts(source, options), health, findings(layers), plan, 0, ())


def check_file(path: Path | None, source: OnnxFile | str | Path, options: Options, *, whole: bool) -> CheckReport:
    """Judges one file against another; ``whole``: on all the data at once.

    UsageError where there is no file to judge, or an option does not apply to one; InputError where a file is not what
    it claims to be, or runs on none of the inputs made for it.
    """
    if path is None or not whole:
        raise UsageError("a file is compared with a file, on data of one part")
    source = read_onnx(source)
    expect(options)
    _refuse(options)
    read_onnx(path)
    asked = judging(options)
    if asked.get("runner") is not None:
        raise UsageError("a runner is judged against a torch model", where="--runner")
    verdict = _judged(source, path, options, asked["device"], _data(options.data, source))
    keep_baseline(verdict, options)
    return replace(verdict, source=_facts(source, options), file=str(path))


def bisect_file(path: Path, source: OnnxFile | str | Path, options: Options) -> Bisection:
    """The first value of a file that is off from another file that it claims to equal.

    UsageError and InputError as for ``check_file``, and where they have other inputs or outputs.
    """
    source = read_onnx(source)
    _refuse(options)
    read_onnx(path)
    clock = Clock(options.progress)
    with clock("fold"):
        folded = fold_file(source, options)
    with clock("bisect"):
        found = FileBisector(
            path=path, original=source.path, ledger=folded.ledger, meanings=folded.meanings,
            folded={name for node in folded.model.graph.node for name in node.output if name},
            device=resolve_device(options.device, options.provider_options), seed=options.seed, limit=options.limit,
            data=_data(options.data, source), progress=options.progress,
        ).find()  # fmt: skip
    return replace(found, source=_facts(source, options), file=str(path))


def _facts(source: OnnxFile, options: Options) -> dict[str, Any]:
    return source_facts(options, source.path.name, source.elements)


def _judged(source: OnnxFile, path: Path, options: Options, device: Any, data: Any) -> CheckReport:
    """The verdict on a file that is to equal its source, with the baseline's say in it."""
    gate = FileGate(source.path, path, device, options.seed, options.limit, data=data, progress=options.progress)
    return compared(gate.judge(), options)


def _refuse(options: Options) -> None:
    for name in ("dtype", "adversarial", "static", "eager", "input_names", "output_names"):
        if getattr(options, name):
            raise UsageError("it does not apply to an ONNX file", where=f"--{name.replace('_', '-')}")


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


def _write(folded: FoldedFile, target: Path, staging: store.Staging, external: bool | None) -> FileReport:
    """Writes a file into the staging folder, its weights beside it where they are too many; one is held at a time."""
    model, data = folded.model, None
    constants = [a.t for node in model.graph.node if node.op_type == "Constant" for a in node.attribute]
    weights = sum(map(bytes_of, (*model.graph.initializer, *constants)))  # ByteSize would write all of it for that
    if external if external is not None else weights > store.EXTERNAL_BYTES:
        apart = _put_apart(folded, staging.folder / "weights")
        data, sealed = staging.seal_data("weights")
        for tensor in apart:
            tensor.external_data.add(key="location", value=data)
        model.metadata_props.add(key="bnfold.data_sha256", value=sealed)
    return _stored(folded, target, staging, data)


def _put_apart(folded: FoldedFile, path: Path) -> list[onnx.TensorProto]:
    """Writes the bytes of the initializers that are large into a file of their own, page by page; answers which."""
    apart = []
    with path.open("wb") as out:
        for tensor in folded.model.graph.initializer:
            content = folded.raw(tensor)
            if content is None:
                continue
            if len(content) <= SMALL:
                put(tensor, content)
                continue
            out.seek(-(-out.tell() // PAGE) * PAGE)
            put(tensor, b"")
            tensor.ClearField("raw_data")
            tensor.data_location = onnx.TensorProto.EXTERNAL
            tensor.external_data.add(key="offset", value=str(out.tell()))
            tensor.external_data.add(key="length", value=str(len(content)))
            out.write(content)
            apart.append(tensor)
    return apart


def _stored(folded: FoldedFile, target: Path, staging: store.Staging, data: str | None) -> FileReport:
    """Writes what is not in a file of its own, the bytes of one initializer after the other."""
    model = folded.model
    held = {
        i: tensor
        for i, tensor in enumerate(model.graph.initializer)
        if data is None and onnx.external_data_helper.uses_external_data(tensor)
    }
    sizes = {i: bytes_of(tensor) for i, tensor in held.items()}
    with target.open("wb") as out:
        out.writelines(filled(model.SerializeToString(), sizes, lambda i: folded.raw(held[i]) or b""))
    if (problem := _invalid(target, staging.folder)) is not None and _invalid(folded.source.path, None) is None:
        raise LowerError(f"onnx.checker rejects the file: {problem}", hint="Please report this model")
    size = target.stat().st_size + ((staging.folder / data).stat().st_size if data else 0)
    norms = sum(node.op_type == "BatchNormalization" for node in model.graph.node)
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), None)
    return FileReport(str(target), size, len(model.graph.node), opset, norms, data, sha256_of(target))


def _invalid(path: Path, beside: Path | None) -> str | None:
    """What onnx.checker has against a file; of a large one without its weights, in a file in the folder ``beside``."""
    content = apart(path) if beside is not None else None
    light = path if content is None or beside is None else beside / f"{path.name}.light"
    try:
        if content is not None:
            light.write_bytes(content)
        onnx.checker.check_model(str(light))
    except onnx.checker.ValidationError as error:
        return " ".join(str(error).split())[:300]
    finally:
        if light != path:
            light.unlink(missing_ok=True)
    return None
