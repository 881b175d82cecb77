"""Whole architectures: how many BatchNorms are left, why, and that the float64 result is the same.

``LEFT`` is the provable minimum: what stays is listed with the reasons that must be given for it.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import zoo
import zoo_hf
from checker import fold_exactly
from test_zoo import other_inputs
from torch.utils import _pytree as pytree

import bnfold

#: Net -> BatchNorms that must stay, and every reason that the ledger gives for them. All others: none.
LEFT: dict[str, tuple[int, set[str]]] = {
    # BatchNorm -> ReLU on a concatenation or sum that later layers read too
    "densenet": (3, {"shift-through-activation", "sign"}),
    "preact_resnet": (2, {"several-readers", "sign", "zero-padding"}),
    "dpn": (3, {"sign", "nonlinear"}),
    # GELU -> BatchNorm -> zero-padded convolution, or a residual
    "convmixer": (4, {"nonlinear", "zero-padding"}),
    "xcit": (1, {"nonlinear", "zero-padding"}),
    # the border is one value that is written four times
    "dbb_border": (1, {"several-readers", "unequal-scales"}),
    # one convolution that two BatchNorms, or a BatchNorm and something else, read
    "conv_before_two_norms": (1, {"several-readers", "unequal-scales"}),
    "residual_tap": (1, {"several-readers", "unequal-scales"}),
    "two_inputs": (1, {"several-readers", "model-output"}),
    # normalises axis 1, between two linears on the last axis
    "square_norm": (1, {"other-axis"}),
    "batch_statistics": (2, {"batch-statistics"}),
}


@pytest.mark.parametrize("name", [name for name in zoo.NETS if name != "mixed_precision"])
def test_batch_norms_left(name: str) -> None:
    module, args = zoo.NETS[name]()
    args = pytree.tree_map_only(torch.Tensor, lambda x: x.double() if x.is_floating_point() else x, args)
    # In float64 nothing is rounded, so what differs is wrong. Bare multiplies and adds may stay.
    folded = fold_exactly(module.double(), *args, left=None)
    check_left(folded, *LEFT.get(name, (0, set())))


def check_left(folded: bnfold.Folded, count: int, reasons: set[str]) -> None:
    gone, total = folded.ledger.count()
    left = [entry for entry in folded.ledger.left if entry.is_batch_norm]
    assert total - gone == count, [(e.module, e.refusals) for e in left]
    assert {refusal.reason for entry in left for refusal in entry.refusals} == reasons
    assert all(len(entry.refusals) == 2 and all(r.blocker for r in entry.refusals) for entry in left)


def test_mixed_precision_keeps_its_dtypes() -> None:
    module, args = zoo.NETS["mixed_precision"]()
    folded = bnfold.fold(module, args)
    check_left(folded, 0, set())
    assert folded.module(*args).dtype == module(*args).dtype
    assert {t.dtype for t in folded.program.state_dict.values()} == {torch.float16}


#: transformers nets with BatchNorms that must stay, and how many.
HF_LEFT = {
    "hubert": 1,  # before a zero-padded convolution, and its producer feeds the residual too
    "emu3_block": 1,  # pre-activation: norm, swish, with a shortcut around
    "clap_audio": 1,  # normalises mel bins, an axis that the first convolution mixes
    "patchtsmixer": 2,  # normalises patches, an axis that the linears before and after mix
}


#: ``len()`` of a tensor in their code makes the batch a constant.
ONE_BATCH = {"rt_detr", "rt_detr_v2", "d_fine"}
#: Nets that the gate judges as well.
GATED = ["resnet_basic", "mobilenet_v2", "segformer", "speecht5_postnet", "levit"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in zoo_hf.HF_NETS if n not in zoo_hf.VARIANTS and n not in GATED])
@pytest.mark.filterwarnings("ignore")
def test_transformers_batch_norms_left(name: str) -> None:
    """``scripts/sweep_transformers.py`` has the variants too, and judges them all."""
    module, args = zoo_hf.HF_NETS[name]()
    gone, total = (folded := bnfold.fold(module, args)).ledger.count()
    assert total - gone == HF_LEFT.get(name, 0), [(e.module, e.refusals) for e in folded.ledger.left if e.is_batch_norm]
    assert (total > 0) == (name not in zoo_hf.WITHOUT_BATCHNORM)
    # At another batch, where the net's own code leaves that free, what was captured computes what the net does.
    args = other_inputs(args, 2 if name in ONE_BATCH else 3)
    with torch.no_grad():
        captured = pytree.tree_leaves(folded.captured.program.module()(*args))
        eager = pytree.tree_leaves(module(*args))
    tensors = [(a, b) for a, b in zip(captured, eager, strict=True) if isinstance(a, torch.Tensor)]
    assert tensors and all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in tensors)


@pytest.mark.slow
@pytest.mark.parametrize("name", GATED)
@pytest.mark.filterwarnings("ignore")
def test_transformers_pass_the_gate(name: str, tmp_path: Path) -> None:
    module, args = zoo_hf.HF_NETS[name]()
    report = bnfold.export(module, tmp_path / "net.onnx", args, device="cpu")
    assert report.passed, report.check
    assert report.file is not None and report.file.batch_norms == 0
    assert report.ledger.count()[1] > 0
