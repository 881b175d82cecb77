"""The public functions: nothing at the destination before the verdict, and the caller's things as they were."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from faults import victim
from torch import Tensor, nn
from torch.export import Dim

import bnfold
from bnfold import pipeline, stages
from bnfold.errors import FoldError, InputError, UsageError
from bnfold.runtime.runtime import open_session

torch.set_num_threads(1)


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fold stage that gets one channel wrong by 1 %."""
    right = stages.fold_captured

    def wrong(*args: Any, **kwargs: Any) -> bnfold.Folded:
        folded = right(*args, **kwargs)
        weight = folded.program.state_dict["body.weight"].detach().clone()
        weight[3] *= 1.01
        folded.program.state_dict["body.weight"] = nn.Parameter(weight)
        return folded

    monkeypatch.setattr(stages, "fold_captured", wrong)


def export(path: Path, **options: Any) -> bnfold.ExportReport:
    module, args = victim()
    return bnfold.export(module, path, args, device="cpu", **options)


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize("dtype", ["float16", "torch.float16", torch.float16])
def test_a_dtype_may_be_given_by_name(dtype: str | torch.dtype, tmp_path: Path) -> None:
    module, args = victim()
    assert bnfold.fold(module, args, dtype=dtype).program.state_dict["body.weight"].dtype == torch.float16
    assert export(tmp_path / "net.onnx", dtype=dtype).passed
    assert bnfold.check(tmp_path / "net.onnx", module, args, dtype=dtype, device="cpu").passed


@pytest.mark.parametrize(
    ("dtype", "says"),
    [
        ("flaot16", r"dtype: there is no dtype 'flaot16'\. Did you mean float16\?"),
        ("half", r"There are float32, float64, float16, bfloat16"),
        ("int8", "int8 is no floating-point dtype"),
        (torch.int64, "int64 is no floating-point dtype"),
        (7, "there is no dtype '7'"),
    ],
)
def test_a_dtype_that_is_none(dtype: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=says):
        export(tmp_path / "net.onnx", dtype=dtype)


def test_a_pass_is_written(tmp_path: Path) -> None:
    report = export(tmp_path / "net.onnx")
    assert report.passed and report.file is not None and report.file.path == str(tmp_path / "net.onnx")
    assert set(files(tmp_path)) == {"net.onnx"} and report.file.bytes == (tmp_path / "net.onnx").stat().st_size
    stored = {p.key: p.value for p in onnx.load(tmp_path / "net.onnx").metadata_props}
    assert stored["bnfold.verdict"] == "pass" and stored["bnfold.batch_norms_folded"] == "3"


@pytest.mark.usefixtures("faulty")
def test_a_failure_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "net.onnx").write_bytes(b"old")
    report = export(tmp_path / "net.onnx")
    assert not report.passed and report.file is None and report.check is not None and report.check.verdict == "fail"
    assert files(tmp_path) == {"net.onnx": b"old"}


@pytest.mark.usefixtures("faulty")
def test_a_failure_is_kept_elsewhere_when_asked(tmp_path: Path) -> None:
    (tmp_path / "net.onnx").write_bytes(b"old")
    report = export(tmp_path / "net.onnx", keep_failed=True)
    assert not report.passed and report.file is not None and report.file.path.endswith("net.failed.onnx")
    assert set(files(tmp_path)) == {"net.onnx", "net.failed.onnx"} and files(tmp_path)["net.onnx"] == b"old"


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("verdict", ["fail", "inconclusive", "pass"])
def test_a_file_says_the_verdict_that_it_got(
    verdict: str, external: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = pipeline.Gate.judge
    monkeypatch.setattr(pipeline.Gate, "judge", lambda self: replace(right(self), verdict=verdict))
    file = export(tmp_path / "net.onnx", keep_failed=True, external_data=external).file
    assert file is not None and file.sha256 == hashlib.sha256(Path(file.path).read_bytes()).hexdigest()
    model = onnx.load(file.path)  # its weights are beside it
    stored = {p.key: p.value for p in model.metadata_props}
    assert stored["bnfold.verdict"] == verdict and ("bnfold.data_sha256" in stored) is external
    assert set(files(tmp_path)) == {Path(file.path).name, *([file.data] if file.data else [])}


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    report = export(tmp_path / "net.onnx", dry_run=True)
    assert report.passed and report.file is None and files(tmp_path) == {}


def test_nothing_is_there_before_the_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "net.onnx").write_bytes(b"old")

    def interrupted(self: Any) -> None:
        assert (tmp_path / "net.onnx").read_bytes() == b"old"
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline.Gate, "judge", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(tmp_path / "net.onnx")
    assert files(tmp_path) == {"net.onnx": b"old"}


def test_an_inconclusive_verdict_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = pipeline.Gate.judge
    monkeypatch.setattr(pipeline.Gate, "judge", lambda self: replace(right(self), verdict="inconclusive"))
    report = export(tmp_path / "net.onnx")
    assert not report.passed and report.file is None and files(tmp_path) == {}


def test_unchecked_is_said(tmp_path: Path) -> None:
    report = export(tmp_path / "net.onnx", check=False)
    assert report.check is None and not report.passed and report.file is not None
    assert {p.key: p.value for p in onnx.load(tmp_path / "net.onnx").metadata_props}["bnfold.verdict"] == "not checked"


def test_external_data_goes_with_its_model(tmp_path: Path) -> None:
    report = export(tmp_path / "net.onnx", external_data=True)
    assert report.passed and report.file is not None and report.file.data is not None
    assert set(files(tmp_path)) == {"net.onnx", report.file.data}
    digest = hashlib.sha256(files(tmp_path)[report.file.data]).hexdigest()
    stored = {p.key: p.value for p in onnx.load(tmp_path / "net.onnx").metadata_props}
    assert stored["bnfold.data_sha256"] == digest and report.file.data == f"net.{digest[:16]}.data"
    module, args = victim()
    (first, _) = open_session(tmp_path / "net.onnx").run({"x": args[0].numpy()})
    assert torch.allclose(torch.from_numpy(first), module(*args)[0], rtol=1e-4, atol=1e-5)
    assert bnfold.check(tmp_path / "net.onnx", module, args, device="cpu").passed


OPTIONS: list[tuple[dict[str, Any], Any]] = [
    ({"opset": 20}, lambda r: r.file.opset == 20),
    ({"samples": 30, "seed": 3}, lambda r: r.check.samples >= 30),
    ({"static": True}, lambda r: r.check.batches == (0,)),
    ({"fold": False}, lambda r: r.ledger.entries == () and r.file.batch_norms == 3),
    ({"simplify": False}, lambda r: r.file.batch_norms == 0),
    ({"limit": 1e-6}, lambda r: r.check.verdict == "fail" and r.check.limit == 1e-6 and r.file is None),
]


@pytest.mark.parametrize(("options", "holds"), OPTIONS, ids=[", ".join(o) for o, _ in OPTIONS])
def test_options(options: dict[str, Any], holds: Any, tmp_path: Path) -> None:
    assert holds(export(tmp_path / "net.onnx", **options))


def test_options_as_one_object_or_one_by_one(tmp_path: Path) -> None:
    report = export(tmp_path / "net.onnx", options=bnfold.Options(opset=19, dry_run=True), seed=5)
    assert report.check is not None and not files(tmp_path)
    with pytest.raises(bnfold.UsageError, match="nonsense"):
        export(tmp_path / "net.onnx", nonsense=1)


def test_progress_names_the_stages(tmp_path: Path) -> None:
    seen: list[str] = []
    export(tmp_path / "net.onnx", progress=lambda stage, done, total: seen.append(stage))
    assert list(dict.fromkeys(seen)) == ["capture", "fold", "lower", "write", "check", "truth"]


def test_programs_are_exported(tmp_path: Path) -> None:
    module, args = victim()
    program = torch.export.export(module, args, dynamic_shapes=({0: Dim("n")},))
    torch.export.save(program, tmp_path / "net.pt2")
    report = bnfold.export(torch.export.load(tmp_path / "net.pt2"), tmp_path / "net.onnx", device="cpu")
    assert report.passed and report.check is not None and report.check.batches == (1, 2, 7, 54, 3, 33)


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(9, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)

    def forward(self, input_ids: Tensor | None = None, mask: Tensor | None = None, flag: bool | None = None) -> Any:
        hidden = self.embed(input_ids) * mask[..., None]  # type: ignore[index]
        return {"logits": self.head(self.norm(hidden.mean(1))), "hidden": hidden}


def test_keyword_models(tmp_path: Path) -> None:
    inputs = {"mask": torch.tensor([[1.0, 0, 1, 1]] * 2), "input_ids": torch.tensor([[0, 3, 8, 1], [2, 4, 5, 6]])}
    report = bnfold.export(Keywords(), tmp_path / "net.onnx", kwargs=inputs, device="cpu")
    graph = onnx.load(tmp_path / "net.onnx").graph
    assert report.passed and {i.name for i in graph.input} == {"input_ids", "mask"}
    assert [o.name for o in graph.output] == ["logits", "hidden"]


def test_fold_gives_a_module_and_a_ledger() -> None:
    module, args = victim()
    folded = bnfold.fold(module, args)
    with torch.no_grad():
        pairs = zip(folded.module(*args), module(*args), strict=True)
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in pairs)
    assert folded.ledger.count() == (3, 3) and not any(
        "batch_norm" in str(n.target) for n in folded.program.graph.nodes
    )


def test_nonfinite_statistics_are_refused(tmp_path: Path) -> None:
    module, args = victim()
    module.stem_norm.running_mean[2] = float("nan")
    with pytest.raises(FoldError, match=r"stem_norm.*--allow-nonfinite"):
        bnfold.export(module, tmp_path / "net.onnx", args, device="cpu")
    assert bnfold.fold(module, args).ledger.count() == (2, 3)
    # Everything behind it is NaN: there is nothing to compare, and that is no pass.
    report = bnfold.export(module, tmp_path / "net.onnx", args, device="cpu", allow_nonfinite=True)
    assert report.check is not None and not report.passed and files(tmp_path) == {}


def test_wrong_calls_are_explained(tmp_path: Path) -> None:
    module, args = victim()
    with pytest.raises(InputError, match=r"args must be a tuple.*\(x,\)"):
        bnfold.export(module, tmp_path / "net.onnx", args[0], device="cpu")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="is a folder"):
        bnfold.export(module, tmp_path, args, device="cpu")
    with pytest.raises(InputError, match="no such file"):
        bnfold.check(tmp_path / "none.onnx", module, args, device="cpu")
    with pytest.raises(InputError, match="holds samples of"):
        bnfold.export(module, tmp_path / "net.onnx", args, device="cpu", data={"x": torch.zeros(4, 3, 9, 9).numpy()})
    assert files(tmp_path) == {}


def test_data_of_another_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        export(tmp_path / "net.onnx", data={"image": torch.zeros(4, 3, 8, 8).numpy()})
