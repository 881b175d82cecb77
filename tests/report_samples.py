"""Reports with something in every field, and one real run, for the tests of what is written of them."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import faults
import onnx
import pytest
import torch

import bnfold
from bnfold import pipeline
from bnfold.report import (
    CalibrationReport,
    CheckReport,
    Diagnosis,
    Entry,
    ExportReport,
    FileReport,
    Latency,
    LatencyReport,
    LayerRange,
    Ledger,
    Merge,
    NormRange,
    Operator,
    OutputResult,
    Port,
    Refusal,
    SiteResult,
    WeightRange,
)

#: A name that breaks whatever writes it without care.
NASTY = "layer<b>&\"'\x00\ud800]]>{{ 7 * 7 }}ä"
CHECK = CheckReport(
    "pass", "CPUExecutionProvider", 16, (1, 2, 7),
    (OutputResult("folded torch", "y", 1e-7, 2e-7, 2.0, 3.0, 16, (90, 60, 10)),
     OutputResult("ONNX Runtime", "y", 1e-7, 1e-7, 1.0, 2.0, 16, (120, 40))),
    (SiteResult("folded torch", "conv2d", "bn1", 1.5, 2.5), SiteResult("folded torch", "add", "block", 0.5, 0.7)),
    notes=("a note",),
)  # fmt: skip
FAILED = replace(
    CHECK, verdict="fail", problems=("ONNX Runtime, output 'y': error is 70 times the noise (limit 4)",),
    outputs=(CHECK.outputs[0],
             OutputResult("ONNX Runtime", "y", 1e-7, 7e-6, 70.0, 90.0, 16, (100, 40, 0, 0, 0, 0, 3, 17))),
    sites=(CHECK.sites[0], SiteResult("folded torch", "add", "block", 30.0, float("inf"))),
)  # fmt: skip
UNSURE = replace(CHECK, verdict="inconclusive", problems=("only 3 samples could be run",))
LEDGER = Ledger(
    (
        Entry("bn", "bn1", "BatchNorm2d", "batch_norm", "backward", ("conv1",), ("relu",), site=(("conv2d", "bn"),)),
        Entry("bn_1", "bn2", "BatchNorm2d", "batch_norm", "left",
              refusals=(Refusal("nonlinear", "act", "aten.gelu"), Refusal("model-output", "the model's output"))),
        Entry("mul", NASTY, "Scale", "mul", "forward", ("fc",)),
    ),
    (Merge("add", "parallel", ("block.a", "block.b"), "block.a", ("conv_b",), 2, 36864),),
)  # fmt: skip
EXPORT = ExportReport(
    {"source": "net.py:make", "weights": "net.safetensors", "sha256": "ab" * 32, "parameters": 1234}, LEDGER, CHECK,
    FileReport("net.onnx", 12345, 9, 20, 1, "net.0123.data", "cd" * 32), (12, 9), {"capture": 0.5, "fold": 0.1},
    ("the batch is fixed",),
    (
        LayerRange("conv2d", "conv1", WeightRange((0.5, 0.6), 1.1), WeightRange((0.5, 60.0, 0.4), 1.2), (-1.0, 2.0)),
        LayerRange("linear", NASTY, None, WeightRange((0.0, float("nan")), 1.0)),
    ),
    (NormRange("bn", "bn1", (0.5, -2.0, 1.0), (0.0, 100.0, float("inf"))),),
    interface=(Port("input", "x", "float32", ("batch", 3, "2*H")), Port("output", "y", "float32", ("batch", 10))),
    graph=(
        Operator("input", "x", (), "kept"), Operator("conv2d", "conv1", (0,), "changed"),
        Operator("batch_norm", "bn1", (1,), "folded"), Operator("gelu", "act", (2,), "kept"),
        Operator("mul", NASTY, (3,), "left"), Operator("conv2d", "block.a", (4,), "changed"),
        Operator("conv2d", "block.b", (4,), "merged"), Operator("add", "block", (5, 6), "merged"),
        Operator("add", "block", (7,), "new"), Operator("output", "", (8,), "kept"),
    ),
)  # fmt: skip
LATENCY = LatencyReport(
    (Latency("a.onnx", "CPUExecutionProvider", 1e-3, 2e-3, 10, 1.0, (1.0, 1.0), 0.1, 12345678),
     Latency("net.py:make", "torch cpu", 2e-3, 3e-3, 10, 2.0, (1.9, 2.1))),
    50, 5, None, {"x": "float32[1, 3, 8, 8]"}, {"cpu": "two cores"}, ("a note",),
)  # fmt: skip


def without_check(report: ExportReport = EXPORT) -> ExportReport:
    return replace(report, check=None)


@functools.cache
def diagnosis() -> Diagnosis:
    """Of a model with a healthy BatchNorm and one that uses the statistics of its batch."""
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4), torch.nn.GELU(),
        torch.nn.BatchNorm2d(4, track_running_stats=False),
    ).eval()  # fmt: skip
    return pipeline.inspect(model, (torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(0)),))


def reports() -> dict[str, ExportReport | CheckReport | LatencyReport | Diagnosis | CalibrationReport]:
    """One of every kind, and of every verdict."""
    return {
        "pass": EXPORT, "fail": replace(EXPORT, check=FAILED, file=None),
        "inconclusive": replace(EXPORT, check=UNSURE, file=None), "not judged": without_check(),
        "fold": replace(EXPORT, kind="fold"), "plan": replace(EXPORT, kind="plan", check=None, file=None),
        "empty": ExportReport({"source": "Identity"}, Ledger(), None, None),
        "check": replace(CHECK, source={"source": NASTY}, file="net.onnx"),
        "failed check": replace(
            FAILED, source={"source": "net.py:make", "weights": None, "parameters": 5}, file="net.onnx"
        ),
        "nothing compared": replace(FAILED, outputs=(), sites=(), source={"source": "Net"}, file="net.onnx"),
        "bench": LATENCY, "inspect": diagnosis(), "inspect without a plan": replace(diagnosis(), plan=None),
        "calibrate": CalibrationReport({"source": "net.py:make"}, "sequential", 10, 2, (), ("bn1",)),
    }  # fmt: skip


def real(folder: Path, monkeypatch: pytest.MonkeyPatch, fault: str | None) -> ExportReport:
    """An export of the net that faults are injected into, into the file before it is judged."""
    module, args = faults.victim()
    write = pipeline.write_file

    def wrong(lowered, staging, external):
        file = write(lowered, staging, external)
        if fault is not None:
            path = staging.folder / staging.path.name
            model = onnx.load(path)
            faults.FAULTS[fault](model)
            onnx.save(model, path)
        return file

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "write_file", wrong)
        return bnfold.export(module, folder / "net.onnx", args, device="cpu")
