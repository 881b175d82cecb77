"""What the gate asks of a file beyond its outputs is asked in memory: the folder of the file is left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from faults import victim
from torch import Tensor, nn

import bnfold
from bnfold.gate import candidates

torch.set_num_threads(1)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """What lies in the folder whenever a session is opened."""
    found: list[list[str]] = []
    opened = candidates.open_session

    def watching(*args: Any, **options: Any) -> Any:
        found.append(sorted(file.name for file in tmp_path.iterdir()))
        return opened(*args, **options)

    monkeypatch.setattr(candidates, "open_session", watching)
    return found


@pytest.mark.parametrize("external", [False, True])
def test_intermediate_values_are_read_without_a_copy_on_disk(
    external: bool, tmp_path: Path, seen: list[list[str]]
) -> None:
    module, args = victim()
    path, mine = tmp_path / "net.onnx", tmp_path / "net.sites.onnx"
    assert bnfold.export(module, path, args, device="cpu", external_data=external).passed
    mine.write_bytes(b"the user's own")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    seen.clear()
    assert bnfold.bisect(path, module, args, device="cpu").passed
    assert len(seen) > 2 and all(listed == sorted(before) for listed in seen)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_file_is_judged_from_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, args = victim()
    assert bnfold.export(module, tmp_path / "net.onnx", args, device="cpu", external_data=True).passed
    monkeypatch.chdir(tmp_path)  # where a relative path has no folder
    assert bnfold.bisect("net.onnx", module, args, device="cpu").passed


class Shuffled(nn.Module):
    """Integers that are external data too, beside weights in bfloat16."""

    order: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 400), nn.BatchNorm1d(400)
        self.register_buffer("order", torch.arange(400).flip(0))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x))[:, self.order]


@pytest.mark.parametrize("external", [False, True])
def test_bfloat16_is_judged_with_external_data_of_other_types(external: bool, tmp_path: Path) -> None:
    module = zoo.randomize(Shuffled()).eval()
    report = bnfold.export(
        module, tmp_path / "net.onnx", (torch.randn(2, 8),), device="cpu", dtype=torch.bfloat16, external_data=external
    )
    assert report.passed and report.file is not None and (report.file.data is not None) is external
    module.order = torch.arange(400)  # its twin: the file is still of the other order
    verdict = bnfold.check(tmp_path / "net.onnx", module, (torch.randn(2, 8),), device="cpu", dtype=torch.bfloat16)
    assert verdict.verdict == "fail"
