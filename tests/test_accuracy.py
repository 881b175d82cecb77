"""Accuracy on the user's data: every sample, before and after; near-ties are told from faults."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import zoo
from faults import FAULTS, victim
from onnx import numpy_helper
from torch import Tensor, nn

import bnfold
from bnfold import stages
from bnfold.errors import InputError
from bnfold.gate import accuracy
from bnfold.gate.decisions import places
from bnfold.gate.gate import Gate
from bnfold.graph.capture import Captured, capture
from bnfold.graph.graph import Graph
from bnfold.lowering.lower import lower, save
from bnfold.passes.folding import fold as fold_graph
from bnfold.report import Accuracy, CheckReport

torch.set_num_threads(1)


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Exported:
    """A net captured, folded and lowered once; ``judge`` with data, and a fault if wanted, is cheap."""

    def __init__(self, module: nn.Module, args: tuple[Any, ...], **options: Any) -> None:
        self.captured: Captured = capture(module, args, **options)
        graph = Graph(self.captured.program, self.captured.masters)
        self.ledger = fold_graph(graph)
        self.folded = graph.finish()
        traced = [*self.ledger.sites, *(place.value for place in places(self.folded))]
        self.lowered = lower(self.folded, dims=self.captured.dims, sites=traced)

    def judge(self, path: Path, data: Any, fault: Any = None, **options: Any) -> CheckReport:
        save(self.lowered, path)
        if fault is not None:
            model = onnx.load(path)
            fault(model)
            onnx.save(model, path)
        arrays, labels = stages.read_data(data, self.captured)
        return Gate(
            self.captured, self.ledger, self.folded, path, self.lowered.sites, data=arrays, labels=labels, **options
        ).judge()


@cache
def exported(static: bool = False) -> Exported:
    return Exported(*victim(), static=static)


def labelled(count: int) -> dict[str, np.ndarray]:
    """Samples for the victim with its own classes for labels."""
    data = rows(count, 3, 8, 8, seed=5)
    with torch.no_grad():
        labels = victim()[0](data)[0].argmax(1)
    return {"x": data.numpy(), "labels": labels.numpy()}


def found(data: Any, tmp_path: Path, fault: Any = None, **options: Any) -> Accuracy:
    result = exported(**options).judge(tmp_path / "net.onnx", data, fault).accuracy
    assert result is not None
    return result


# -- classes -----------------------------------------------------------------------------------------------------------


def test_every_labelled_sample_counts(tmp_path: Path) -> None:
    data = labelled(70)  # more than the 64 that are run at once
    data["labels"][:7] = (data["labels"][:7] + 1) % 5
    result = found(data, tmp_path)
    assert (result.samples, result.labelled, result.flips, result.far_flips) == (70, 70, 0, 0)
    assert result.before == result.after == pytest.approx(0.9)
    assert result.top5_before is None  # of 5 classes
    assert result.candidate == "ONNX Runtime" and result.output == "output_0" and len(result.data) == 64


def test_flips_that_noise_does_not_explain_fail(tmp_path: Path) -> None:
    report = exported().judge(tmp_path / "net.onnx", labelled(70), FAULTS["negated output"])
    result = report.accuracy
    assert result is not None and result.before == 1 and result.after == pytest.approx(1 - result.flips / 70)
    assert result.flips == result.far_flips > 60 and report.verdict == "fail"
    told = next(p for p in report.problems if "change in 70 samples and not by noise" in p)
    flip = result.flipped[0]
    assert f"sample {flip.sample} goes from {flip.before} to {flip.after}" in told


def two_logits(scale: float) -> nn.Module:
    """Two classes whose logits are ``scale`` apart for every sample, but for rounding."""

    class Near(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(6, 6, bias=False), nn.BatchNorm1d(6)
            nn.init.uniform_(self.norm.running_mean), nn.init.uniform_(self.norm.running_var, 0.5, 2)
            self.scale = scale

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.linear(x)).sum(1, keepdim=True)
            return torch.cat([y, y * (1 + self.scale)], 1)

    torch.manual_seed(0)
    return Near()


def test_near_ties_may_flip(tmp_path: Path) -> None:
    net = Exported(two_logits(1e-7), (rows(2, 6),))
    report = net.judge(tmp_path / "net.onnx", {"x": rows(200, 6).numpy()}, shifted(1 - 3e-7))
    result = report.accuracy
    assert result is not None and result.flips > 20 and result.far_flips == 0 and result.undecided > 150
    assert all(0 <= flip.units < 64 for flip in result.flipped)
    assert not any("class" in problem for problem in report.problems)
    # The same disturbance where the classes are far apart from one another is none.
    apart = Exported(two_logits(1.0), (rows(2, 6),)).judge(tmp_path / "b.onnx", {"x": rows(200, 6).numpy()}).accuracy
    assert apart is not None and apart.flips == 0


def shifted(factor: float) -> Any:
    """Multiplies the second class's logit by ``factor``."""

    def inject(model: onnx.ModelProto) -> None:
        graph = model.graph
        name = graph.output[0].name
        for node in graph.node:
            node.output[:] = ["y" if v == name else v for v in node.output]
        graph.initializer.append(numpy_helper.from_array(np.array([1, factor], np.float32), "by"))
        graph.node.append(onnx.helper.make_node("Mul", ["y", "by"], [name]))

    return inject


def test_labels_may_lie_in_a_map(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4))
    nn.init.uniform_(net[1].running_mean), nn.init.uniform_(net[1].running_var, 0.5, 2)
    x = rows(20, 3, 6, 6)
    with torch.no_grad():
        labels = net.eval()(x).argmax(1).numpy()
    labels[0, :3] = 255
    labels[1] = -100
    labels[2, 0] = (labels[2, 0] + 1) % 4
    report = Exported(net, (rows(2, 3, 6, 6),)).judge(tmp_path / "net.onnx", {"input": x.numpy(), "labels": labels})
    result = report.accuracy
    assert report.passed and result is not None and result.samples == 20
    assert result.labelled == 20 * 36 - 18 - 36
    assert result.before == result.after == pytest.approx(1 - 6 / result.labelled)


def test_labels_that_fit_no_output_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"labels of shape \(7, 9\) fit no output\. The outputs are output_0 \(\?, 5\)"
    ):
        found(labelled(7) | {"labels": np.zeros((7, 9), np.int64)}, tmp_path)


@pytest.mark.parametrize("count", [1, 5, 71])
def test_labels_must_be_as_many_as_samples(count: int, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"x 70, labels {count}"):
        found(labelled(70) | {"labels": np.zeros(count, np.int64)}, tmp_path)


# -- without labels, with targets --------------------------------------------------------------------------------------


def test_unlabelled_data_show_agreement(tmp_path: Path) -> None:
    result = found({"x": labelled(70)["x"]}, tmp_path)
    assert result.before is None and result.flips == 0 and result.output == "output_0"
    assert [a.output for a in result.agreement] == ["output_0", "output_1"]
    for one in result.agreement:
        assert one.samples == 70 and 0 < one.p50 <= one.p90 <= one.p99 <= one.max < 1e-5
        assert 100 < one.sqnr < 200 and 0 < one.worst_ratio < 20 and 1e-8 < one.noise < 1e-5


def test_agreement_measures_what_a_fault_does(tmp_path: Path) -> None:
    data = {"x": labelled(70)["x"]}
    plain = found(data, tmp_path).agreement[0]
    report = exported().judge(tmp_path / "net.onnx", data, FAULTS["wrong in one row of a batch"])
    assert report.accuracy is not None
    faulty = report.accuracy.agreement[0]
    assert faulty.max > 1e3 * plain.max and faulty.worst_ratio > 256 and faulty.sqnr < plain.sqnr - 40
    assert faulty.p50 < 2 * plain.p99  # only one sample in each batch is wrong
    assert report.verdict != "pass"
    assert any(f"sample {faulty.worst} of the data is off by" in problem for problem in report.problems)


def test_targets_are_fitted_before_and_after(tmp_path: Path) -> None:
    x = labelled(30)["x"]
    with torch.no_grad():
        truth = victim()[0](torch.from_numpy(x))[1].numpy()
    right = found({"x": x, "output_1": truth + 0.5}, tmp_path).targets
    assert len(right) == 1 and right[0].output == "output_1"
    assert right[0].rmse_before == pytest.approx(0.5, rel=1e-4) == right[0].rmse_after
    wrong = found({"x": x, "output_1": truth}, tmp_path, FAULTS["negated output"]).targets[0]
    assert wrong.rmse_before < 1e-5 and wrong.mae_before < 1e-5
    other = found({"x": x, "targets": np.zeros((30, 5))}, tmp_path).targets[0]
    assert other.output == "output_0" and other.rmse_before > 0.1


def test_unused_arrays_are_noted(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=labelled(12)["x"], extra=np.zeros(3))
    report = exported().judge(tmp_path / "net.onnx", tmp_path / "d.npz")
    assert any("the data's 'extra'" in note for note in report.notes)


# -- batches and memory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [9, 10])
def test_few_samples_are_noted(count: int, tmp_path: Path) -> None:
    report = exported().judge(tmp_path / "net.onnx", {"x": labelled(count)["x"]})
    assert any("only 9 of the 10 samples" in note for note in report.notes) == (count == 9)


@pytest.mark.parametrize("count", [6, 7])
def test_a_fixed_batch_judges_every_sample(count: int, tmp_path: Path) -> None:
    assert found(labelled(count), tmp_path, static=True).labelled == count


def test_the_size_of_batches_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = labelled(23)
    first = found(data, tmp_path)
    monkeypatch.setattr(accuracy, "SAMPLES", 5)
    second = found(data, tmp_path)
    assert (first.before, first.samples) == (second.before, second.samples)
    assert first.agreement[0].p90 == pytest.approx(second.agreement[0].p90, rel=0.5)
    monkeypatch.setattr(accuracy, "BYTES", 1)  # one at a time
    assert found(data, tmp_path).labelled == 23


def test_a_file_that_fails_on_the_data_fails(tmp_path: Path) -> None:
    report = exported().judge(tmp_path / "net.onnx", labelled(70), FAULTS["output of two samples"])
    assert report.verdict == "fail" and report.accuracy is None


def test_progress_is_told(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    exported().judge(tmp_path / "net.onnx", labelled(70), progress=lambda *x: told.append(x))
    assert [step for step in told if step[0] == "accuracy"] == [("accuracy", n, 70) for n in (0, 64, 70)]


MEASURE = """
import sys
import torch
import bnfold
torch.set_num_threads(1)
def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten(), torch.nn.Linear(144, 3))
for data in sys.argv[2:]:
    report = bnfold.check(sys.argv[1], net(), (torch.randn(2, 3, 8, 8),), data=data, device="cpu")
    assert report.passed
    high = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print(report.accuracy.samples, high)
"""  # noqa: E501


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells the largest resident set")
def test_memory_does_not_grow_with_the_samples(tmp_path: Path) -> None:
    spec: dict[str, Any] = {"torch": torch}
    exec(MEASURE[MEASURE.index("def net") : MEASURE.index("for data")], spec)
    bnfold.export(spec["net"](), tmp_path / "net.onnx", (rows(2, 3, 8, 8),), check=False)
    counts = (1_000, 30_000)  # 0.8 and 23 MB of samples
    for count in counts:
        x = np.random.default_rng(0).normal(size=(count, 3, 8, 8)).astype(np.float32)
        np.savez(tmp_path / f"{count}.npz", input=x)
    paths = [str(tmp_path / name) for name in ("net.onnx", *(f"{count}.npz" for count in counts))]
    told = subprocess.check_output([sys.executable, "-c", MEASURE, *paths], stderr=subprocess.DEVNULL).split()
    assert (int(told[0]), int(told[2])) == counts
    assert int(told[3]) - int(told[1]) < 8_000  # KB: a third of the samples


# -- end to end --------------------------------------------------------------------------------------------------------


def test_digits_end_to_end(tmp_path: Path) -> None:
    from click.testing import CliRunner

    from bnfold.cli import cli

    models = Path(__file__).parent.parent / "models"
    arguments = ["export", f"{models / 'digits.py'}:digits_cnn", "--weights", models / "digits_cnn.safetensors"]
    arguments += ["--data", models / "digits_heldout.npz", "-o", tmp_path / "net.onnx", "--device", "cpu"]
    arguments += ["--report", tmp_path / "r.json"]
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.stderr
    assert "top-1 on 360 labelled samples: 99.4% before, 99.4% after, 0 flips" in result.stdout
    told = json.loads((tmp_path / "r.json").read_text())["check"]["accuracy"]
    (agreement,) = told["agreement"]
    assert f"output on 360 samples: SQNR {agreement['sqnr']:.1f} dB" in result.stdout
    assert agreement["samples"] == 360 and told["top5_after"] == 1.0


def test_data_for_the_python_interface_may_be_tensors(tmp_path: Path) -> None:
    module, args = victim()
    data = labelled(12)
    tensors = {name: torch.from_numpy(array) for name, array in data.items()}
    tensors["x"].requires_grad_()
    report = bnfold.export(module, tmp_path / "net.onnx", args, data=tensors, device="cpu")
    assert report.check is not None and report.check.accuracy is not None and report.check.accuracy.before == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_tensors_of_any_float_are_data(dtype: torch.dtype) -> None:
    data = rows(12, 3, 8, 8).to(dtype)
    arrays, _ = stages.read_data({"x": data}, exported().captured)
    assert arrays is not None and np.array_equal(arrays["x"][:], data.double().numpy())
    with pytest.raises(InputError, match="the model takes"):
        stages.read_data({"x": data[..., 1:]}, exported().captured)


# -- models that decide ------------------------------------------------------------------------------------------------


class Ranking(nn.Module):
    """Positions of the largest of a map's values, as numbers: near-ties move them far."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        convs = [nn.Conv2d(i, 8, 3, padding=1) for i in (3, 8, 8)]
        self.body = nn.Sequential(*(m for c in convs for m in (c, nn.BatchNorm2d(8), nn.ReLU())))

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x).flatten(1)
        return y.topk(64).values.sum(1, keepdim=True) + y.topk(300).indices.float()


@cache
def ranking() -> Exported:
    return Exported(zoo.randomize(Ranking()).eval(), (rows(2, 3, 16, 16),))


def clip_inputs(model: onnx.ModelProto) -> None:
    """What no random input shows, and one sample of the data does."""
    for node in model.graph.node:
        node.input[:] = ["clipped" if name == "x" else name for name in node.input]
    model.graph.initializer.extend(
        numpy_helper.from_array(np.float32(value), name) for name, value in (("low", -6), ("high", 6))
    )
    model.graph.node.insert(0, onnx.helper.make_node("Clip", ["x", "low", "high"], ["clipped"], "clip"))


def test_decisions_that_near_ties_explain_are_followed_on_the_data(tmp_path: Path) -> None:
    data = rows(200, 3, 16, 16, seed=0)
    report = ranking().judge(tmp_path / "net.onnx", {"x": data})
    assert report.verdict == "pass", report.problems
    assert report.accuracy is not None and report.accuracy.agreement[0].worst_ratio < 4
    assert report.accuracy.agreement[0].max > 1e-3, "some of them fell the other way"


def test_decisions_that_near_ties_do_not_explain_fail_on_the_data(tmp_path: Path) -> None:
    data = rows(200, 3, 16, 16, seed=0)
    data[150, :, 3:5] = 20
    assert ranking().judge(tmp_path / "net.onnx", {"x": data}).verdict == "pass"
    report = ranking().judge(tmp_path / "net.onnx", {"x": data}, clip_inputs)
    assert report.verdict == "fail" and any("topk" in problem for problem in report.problems), report.problems
