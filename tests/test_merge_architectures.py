"""Published architectures with parallel branches: merging leaves what their authors' own deployment code leaves.

The deployment forms come from ``reparametrise``, which knows the authors' formulas and nothing of bnfold.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import zoo
from checker import count_operators, fold_exactly, noise, operators
from reparametrise import by_hand
from torch import nn
from zoo_branchy import FULL, SMALL

import bnfold

torch.set_num_threads(1)
IMAGES = (2, 3, 32, 32)


def small(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = SMALL[name]()
    return zoo.randomize(zoo.he_init(net, 1), 1)


@pytest.mark.parametrize("name", SMALL)
def test_merged_is_what_reparametrisation_by_hand_makes(name: str) -> None:
    net, x = small(name).double(), noise(*IMAGES)
    folded = fold_exactly(net, x)
    hand = by_hand(net)
    with torch.no_grad():
        truth = net(x)
        assert float((hand(x) - truth).abs().max()) <= 1e-10 * float(truth.abs().max())
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in hand.modules())
    reference = bnfold.fold(hand, (x,), merge=False)
    assert operators(folded.program) == operators(reference.program)
    assert count_operators(folded.program) <= count_operators(reference.captured.program)


@pytest.mark.parametrize("name", SMALL)
def test_the_merged_file_passes_the_gate(name: str, tmp_path: Path) -> None:
    report = bnfold.export(small(name), tmp_path / "net.onnx", (noise(*IMAGES, dtype=torch.float32),), device="cpu")
    assert report.passed, report.check.problems
    assert report.check.ratio <= 4 and report.check.site_ratio <= 16
    assert report.ledger.merges and report.file.batch_norms == 0


def test_every_net_has_its_full_size() -> None:
    assert list(FULL) == list(SMALL)
