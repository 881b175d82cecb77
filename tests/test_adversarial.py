"""Inputs found by gradients: overflows that random data hides are seen, correct nets pass, nothing leaves its range."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from click.testing import CliRunner
from torch import Tensor, nn

import bnfold
from bnfold.cli import cli
from bnfold.gate import adversarial
from bnfold.gate.adversarial import STEPS, search
from bnfold.gate.samples import Batch, batches
from bnfold.graph.capture import Captured, capture
from bnfold.stages import fold_captured

torch.set_num_threads(1)


class Wide(nn.Module):
    """Sums of 512 terms: random signs cancel, gradients find those that add up. Times ``gain`` inside, not outside."""

    def __init__(self, gain: float = 1.0, highest: float = float("inf")) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wide, self.norm, self.head = nn.Linear(512, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.highest = highest
        zoo.randomize(zoo.he_init(self, 1), 1)
        with torch.no_grad():
            self.norm.weight.mul_(gain), self.norm.bias.mul_(gain), self.head.weight.div_(gain)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.wide(x)).clamp(max=self.highest).relu())


X = torch.randn(2, 512, generator=torch.Generator().manual_seed(0))


def exported(module: nn.Module, args: Any, path: Path, **options: Any) -> Any:
    report = bnfold.export(module, path / "net.onnx", args, device="cpu", **options)
    assert report.check is not None
    return report.check


def found_for(module: nn.Module, args: Any, **options: Any) -> tuple[adversarial.Found, list[Batch], Captured]:
    captured = capture(module, args, **options)
    made = batches(captured.program, captured.names, captured.flat)
    return search(captured, fold_captured(captured, merge=True).program, made), made, captured


# -- what it is for ----------------------------------------------------------------------------------------------------


def test_an_overflow_in_float16_that_random_data_hides_is_found(tmp_path: Path) -> None:
    options: dict[str, Any] = {"dtype": torch.float16}
    assert exported(Wide(400), (X,), tmp_path, **options).verdict == "pass"
    report = exported(Wide(400), (X,), tmp_path, adversarial=True, **options)
    assert report.verdict == "fail" and report.samples > 10
    assert any("NaN or infinite" in p and "adversarial (large values)" in p for p in report.problems)
    found = report.adversarial
    assert found.peak > 1 > found.peak_before and found.peak_module == "wide" and found.ratio == float("inf")
    # In float32, and in float16 where the same net is a thousand times smaller inside, it is no overflow.
    assert exported(Wide(400), (X,), tmp_path, adversarial=True).verdict == "pass"
    assert exported(Wide(0.4), (X,), tmp_path, adversarial=True, **options).verdict == "pass"


def test_a_file_that_differs_at_large_values_only_is_found(tmp_path: Path) -> None:
    """A black box: what is found in the model is tried in the file."""
    bnfold.export(Wide(), tmp_path / "net.onnx", (X,), device="cpu")
    other = Wide(highest=150.0)
    assert bnfold.check(tmp_path / "net.onnx", other, (X,), device="cpu").passed
    report = bnfold.check(tmp_path / "net.onnx", other, (X,), device="cpu", adversarial=True)
    assert not report.passed and report.adversarial is not None and report.adversarial.ratio > 1e3
    assert bnfold.check(tmp_path / "net.onnx", Wide(), (X,), device="cpu", adversarial=True).passed


def test_the_difference_search_moves_where_a_wrong_fold_shows() -> None:
    captured = capture(Wide(), (X,))
    folded = fold_captured(captured, merge=True).program
    made = batches(captured.program, captured.names, captured.flat)
    folded.state_dict["wide.weight"] = folded.state_dict["wide.weight"].clone()
    folded.state_dict["wide.weight"][2, 7] += 0.05
    difference = next(b for b in search(captured, folded, made).batches if "difference" in b.origin)
    box = max(float(b.flat[0].abs().max()) for b in made)
    # Only x[7] matters to that weight, and it goes to the end of its range.
    assert difference.flat[0][:, 7].abs().tolist() == pytest.approx([box, box], rel=0.2)


NETS = ["mobilenet_v2", "levit", "squeeze_excite", "unet", "two_inputs", "mlp", "conv1d"]


@pytest.mark.parametrize("name", NETS)
def test_correct_nets_pass(name: str, tmp_path: Path) -> None:
    report = exported(*zoo.NETS[name](), tmp_path, adversarial=True)
    assert report.verdict == "pass", report.problems
    assert report.adversarial.samples == 4 and report.adversarial.steps == 2 * STEPS
    assert report.adversarial.peak > 5 * report.adversarial.peak_before > 0


# -- the searches ------------------------------------------------------------------------------------------------------


def test_the_same_inputs_every_time_and_none_out_of_range() -> None:
    first, made, _ = found_for(Wide(), (X,))
    second, _, _ = found_for(Wide(), (X,))
    low, high = (f(float(f_(b.flat[0])) for b in made) for f, f_ in ((min, torch.min), (max, torch.max)))
    for one, other in zip(first.batches, second.batches, strict=True):
        assert torch.equal(one.flat[0], other.flat[0])
        assert low <= float(one.flat[0].min()) and float(one.flat[0].max()) <= high
    assert [b.origin for b in first.batches] == ["adversarial (large values)", "adversarial (difference)"]


def test_an_input_that_is_never_negative_stays_so() -> None:
    found, _, _ = found_for(Wide(), (torch.rand(2, 512),))
    assert all(float(b.flat[0].min()) >= 0 for b in found.batches)


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.linear = nn.Embedding(9, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, ids: Tensor, mask: Tensor, bias: Tensor) -> Tensor:
        scores = (x @ (self.linear(x) + self.table(ids)).transpose(1, 2)).masked_fill(~mask[:, None], float("-inf"))
        return (scores + bias).softmax(-1) @ x


def test_only_floats_move_and_masks_stay() -> None:
    bias = torch.zeros(2, 1, 5).masked_fill(torch.arange(5) > 3, torch.finfo(torch.float32).min)
    args = (torch.randn(2, 5, 4), torch.zeros(2, 5, dtype=torch.int64), torch.ones(2, 5, dtype=torch.bool), bias)
    found, made, captured = found_for(Masked(), args)
    starts = [b for b in made if b.size == 2]
    for batch in found.batches:
        assert all(torch.equal(a, b) for a, b in zip(batch.flat[1:], starts[0].flat[1:]))
        assert not torch.equal(batch.flat[0], starts[0].flat[0])
        captured.run_eager(batch.flat)
    assert 0 < found.peak < 1, "minus infinity in a mask is no peak"


NOT_FOUND: dict[str, tuple[Callable[..., Tensor], Tensor, str]] = {
    "integers": (lambda linear, x: linear(x.float()), torch.arange(8).reshape(2, 4), "no input is a floating-point"),
    "no gradient": (lambda linear, x: linear((x > 0).float()), torch.randn(2, 4), "no gradient reaches the inputs"),
}


class Call(nn.Module):
    def __init__(self, run: Callable[..., Tensor]) -> None:
        super().__init__()
        self.linear, self.run = nn.Linear(4, 4), run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.linear, x)


@pytest.mark.parametrize("name", NOT_FOUND)
def test_what_cannot_be_searched_is_told(name: str, tmp_path: Path) -> None:
    run, x, message = NOT_FOUND[name]
    report = exported(Call(run), (x,), tmp_path, adversarial=True)
    assert report.verdict == "pass" and report.adversarial is None
    assert any(message in note for note in report.notes)


def test_an_operator_that_fails_in_the_search_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(self: Any, inputs: Any, rows: int) -> Tensor:
        raise RuntimeError("derivative not implemented")

    monkeypatch.setattr(adversarial._Difference, "score", refuse)
    report = exported(Wide(), (X,), tmp_path, adversarial=True)
    assert report.verdict == "pass" and report.adversarial.samples == 2
    assert any("the search for difference stopped: RuntimeError: derivative" in note for note in report.notes)


def test_a_fixed_batch_is_searched_as_a_whole() -> None:
    found, made, _ = found_for(Wide(), (torch.randn(3, 512),), static=True)
    assert [b.flat[0].shape for b in found.batches] == [(3, 512)] * 2 and all(b.size == 0 for b in found.batches)
    assert found.peak > found.before and made[0].samples == 1


# -- the command line --------------------------------------------------------------------------------------------------

SOURCE = """
import torch
from torch import nn
def make():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).eval()
    net.example_inputs = (torch.randn(2, 64),)
    return net
"""


def test_the_report_says_what_was_found(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(SOURCE)
    source, output = f"{tmp_path / 'net.py'}:make", str(tmp_path / "net.onnx")
    result = CliRunner().invoke(cli, ["export", source, "-o", output, "--adversarial", "--device", "cpu"])
    assert result.exit_code == 0 and "adversarial: 4 samples after 48 steps: worst ratio" in result.stdout
    result = CliRunner().invoke(cli, ["check", output, source, "--adversarial", "--device", "cpu", "--json"])
    assert result.exit_code == 0 and '"adversarial": {' in result.stdout.replace("\n", " ")
    result = CliRunner().invoke(cli, ["check", output, source, "--device", "cpu", "--json"])
    assert '"adversarial": null' in result.stdout
    result = CliRunner().invoke(cli, ["export", source, "-o", output, "--adversarial", "--no-check"])
    assert result.exit_code == 2 and "--no-check and --adversarial contradict each other" in result.stderr
