"""What of a dear model needs no float64, and what goes back to it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zoo
import zoo_deciding
from faults import behind
from test_gate import Exported
from torch import Tensor

from bnfold.evaluate.subject import Run
from bnfold.gate import gate as gate_module
from bnfold.gate.samples import Batch
from bnfold.gate.screen import Screen
from bnfold.gate.witnesses import FileWitness

torch.set_num_threads(1)
U = 2.0**-24


@cache
def exported(name: str) -> Exported:
    return Exported(*zoo.NETS[name]())


@pytest.fixture
def raised(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Dear models; the sizes of the batches that the file is run on in float64."""
    monkeypatch.setattr(gate_module, "DEAR", 0)
    sizes: list[int] = []
    run = FileWitness.run

    def counted(self: FileWitness, batch: Batch, *given: Any, **more: Any) -> Run:
        sizes.append(batch.size)
        return run(self, batch, *given, **more)

    monkeypatch.setattr(FileWitness, "run", counted)
    return sizes


@pytest.mark.parametrize("name", ["conv1d", "conv3d", "unet", "nasnet"])
def test_of_a_right_file_the_first_batch_alone_is_run_in_float64(name: str, tmp_path: Path, raised: list[int]) -> None:
    report = exported(name).judge(tmp_path / "net.onnx")
    assert report.passed and report.samples == 4 and report.batches == (1, 3)
    assert set(raised) == {1}
    shown = {result.candidate: result for result in report.outputs}
    assert sum(shown["ONNX Runtime"].doublings) == 4 * sum(shown["the file in float64"].doublings)


def test_a_fault_behind_what_the_first_batch_shows_is_judged_in_float64(tmp_path: Path, raised: list[int]) -> None:
    fault = behind(
        ("ReduceMax", ["x"], "m"), ("Greater", ["m", "top"], "hit"), ("Mul", ["y", "more"], "off"),
        ("Where", ["hit", "off", "y"], "z"), constants={"top": np.float32(0.5), "more": np.float32(1 + 2**-10)},
    )  # fmt: skip
    report = exported("conv1d").judge(tmp_path / "net.onnx", fault)
    assert report.verdict == "fail" and set(raised) == {1, 3}
    assert any("the file in float64" in problem and "at batch 3" in problem for problem in report.problems)


@pytest.mark.parametrize("why", ["decides", "half", "data", "few"])
def test_where_float32_says_less_every_batch_is_run_in_float64(why: str, tmp_path: Path, raised: list[int]) -> None:
    module, args = (
        zoo_deciding.NETS["keypoints"]() if why == "decides" else zoo.NETS["mlp" if why == "few" else "conv1d"]()
    )
    if why == "half":
        module, args = module.half(), tuple(x.half() for x in args)
    net = Exported(module, args)
    data = {net.captured.names[0]: args[0].numpy()} if why == "data" else None
    report = net.judge(tmp_path / "net.onnx", data=data)
    assert report.passed and set(report.batches) == set(raised) and len(set(raised)) > 1


# -- by itself ---------------------------------------------------------------------------------------------------------


def normal(seed: int) -> Tensor:
    return torch.randn(3, 500, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class _Model:
    """Rounding its constants moves it by ``U``; the arithmetic of a run by three of these."""

    outputs, louder = ("y",), 256.0

    def loudly(self, batch: Batch, seed: int) -> Run:
        return Run(((normal(0) + 256 * U * normal(100 + seed)).float(),))


class _File:
    name, coarser = "ONNX Runtime", 1.0

    def __init__(self, *answers: Tensor) -> None:
        self.answers = iter(answers)

    def run(self, flat: Any) -> list[Tensor]:
        return [next(self.answers)]


OWN = normal(0).float()


def answer(change: Callable[[Tensor], Any] = lambda off: off, seed: int = 1) -> Tensor:
    off = 3 * U * normal(seed).clamp(-3, 3)
    found = change(off)
    return (normal(0) + (off if found is None else found)).float()


def cleared(*answers: Tensor) -> list[bool]:
    screen = Screen(_Model(), _File(*answers), 4.0)  # type: ignore[arg-type]
    batches = [Batch((), 3, "") for _ in answers]
    return [screen.clears(batch, [OWN], first=i == 0) for i, batch in enumerate(batches)]


def one(off: Tensor) -> None:
    off[1, 7] = 100 * U


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda off: off, True),
        (lambda off: 4 * off, False),  # all of it
        (lambda off: off * torch.tensor([1.0, 1.0, 5.0])[:, None], False),  # one sample
        (one, False),  # one element
        (lambda off: off * torch.nan, False),
    ],
)
def test_others_are_as_near_as_the_first(change: Callable[[Tensor], Any], expected: bool) -> None:
    assert cleared(answer(), answer(change, seed=2)) == [False, expected]


def test_another_shape_or_dtype_is_never_near() -> None:
    assert cleared(answer(), answer()[:2], answer().double(), answer(seed=5)) == [False, False, False, True]


def test_nothing_is_near_where_the_first_said_nothing() -> None:
    assert cleared(answer() * torch.inf, answer()) == [False, False]
