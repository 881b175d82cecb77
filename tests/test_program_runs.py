"""A folded .pt2 is an ordinary exported program: plain torch loads it, torch.compile and AOTInductor run it."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from zoo import randomize

from bnfold.pipeline import save_folded

torch.set_num_threads(1)
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))), reason="Inductor needs a C++ compiler"
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """A folded program in a file, and the model that it comes from."""
    torch.manual_seed(0)
    model = randomize(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)))
    path = tmp_path_factory.mktemp("program") / "net.pt2"
    report = save_folded(model, path, (torch.randn(2, 6),))
    assert report.passed and report.ledger.count() == (1, 1)
    return path, model


def agrees(found: Tensor, model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(found.detach(), model(x), rtol=1e-4, atol=1e-5)


def test_plain_torch_loads_it(saved: tuple[Path, nn.Module]) -> None:
    path, model = saved
    program = torch.export.load(path)
    assert not [node for node in program.graph.nodes if "batch_norm" in node.name]
    for batch in (1, 5):
        x = torch.randn(batch, 6)
        agrees(program.module()(x), model, x)


@needs_compiler
@pytest.mark.slow
def test_torch_compile_runs_it(saved: tuple[Path, nn.Module]) -> None:
    path, model = saved
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(torch.export.load(path).module())
        for batch in (4, 7):
            x = torch.randn(batch, 6)
            with torch.no_grad():
                agrees(compiled(x), model, x)


@needs_compiler
@pytest.mark.slow
def test_aotinductor_packages_it(saved: tuple[Path, nn.Module], tmp_path: Path) -> None:
    path, model = saved
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        package = torch._inductor.aoti_compile_and_package(
            torch.export.load(path), package_path=str(tmp_path / "net_aoti.pt2")
        )
        runner = torch._inductor.aoti_load_package(package)
    for batch in (4, 7):
        x = torch.randn(batch, 6)
        agrees(runner(x), model, x)
