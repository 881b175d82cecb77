"""What other tools get wrong. Each case is named after the defect; bnfold is right, or declines and says why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from checker import build, fold_exactly, noise, operators
from torch import Tensor, nn
from torch.nn import functional as F

import bnfold
from bnfold.graph.interpret import Runner

IMAGE = noise(2, 4, 6, 6)
NORM = "batch_norm"


def conv(out: int = 4, kernel: int = 3, padding: int = 1, channels: int = 4, **more: Any) -> nn.Conv2d:
    return nn.Conv2d(channels, out, kernel, padding=padding, **more)


def bn(channels: int = 4, **more: Any) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, **more)


def affine_axis(axis: int) -> Tensor:
    return torch.linspace(0.5, 2.0, 6, dtype=torch.float64).reshape([6 if a == axis else 1 for a in range(4)][-3:])


def zero_gamma() -> nn.Module:
    module = build(lambda m, x: m.n(m.a(x)), a=conv(), n=bn())
    module.n.weight.data[1:3] = 0.0
    return module


def shared_bias() -> nn.Module:
    run = lambda m, x: m.n2(m.b(F.relu(m.n1(m.a(x)))))  # noqa: E731
    module = build(run, a=conv(bias=False), b=conv(bias=False), n1=bn(), n2=bn())
    module.n2.bias = module.n1.bias
    return module


def pair(run: Callable[..., Any], **parts: Any) -> Callable[[], nn.Module]:
    return lambda: build(run, **parts)


# -- folded, and right -------------------------------------------------------------------------------------------------

#: case -> module, input
RIGHT: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "one convolution called twice": (
        pair(lambda m, x: m.n2(m.a(F.relu(m.n1(m.a(x))))), a=conv(), n1=bn(), n2=bn()), IMAGE),
    "linear and BatchNorm1d along the features": (
        pair(lambda m, x: m.n(m.a(x).transpose(1, 2)), a=nn.Linear(6, 5), n=nn.BatchNorm1d(5)), noise(2, 5, 6)),
    "matmul, transpose, BatchNorm": (
        pair(lambda m, x: m.n((x @ m.w).transpose(1, 2)), w=noise(6, 5), n=nn.BatchNorm1d(5)), noise(2, 5, 6)),
    "matmul, reshape, BatchNorm": (
        pair(lambda m, x: m.n((x @ m.w).flatten(0, 1)).reshape(-1, 5, 6), w=noise(6, 6), n=nn.BatchNorm1d(6)),
        noise(2, 5, 6)),
    "transposed convolution with as many inputs as outputs": (
        pair(lambda m, x: m.n(m.a(x)), a=nn.ConvTranspose2d(4, 4, 3, 2, 1, 1), n=bn()), IMAGE),
    "transposed convolution in two groups": (
        pair(lambda m, x: m.n(m.a(x)), a=nn.ConvTranspose2d(4, 6, 2, 2, groups=2), n=bn(6)), IMAGE),
    "transposed convolution, depthwise": (
        pair(lambda m, x: m.n(m.a(x)), a=nn.ConvTranspose2d(4, 4, 2, 2, groups=4, bias=False), n=bn()), IMAGE),
    "a scale before a transposed convolution in two groups": (
        pair(lambda m, x: m.a(x * m.s), a=nn.ConvTranspose2d(4, 6, 2, 2, groups=2), s=noise(4, 1, 1)), IMAGE),
    "gamma is zero": (zero_gamma, IMAGE),
    "affine=False after a linear layer": (
        pair(lambda m, x: m.n(m.a(x)), a=nn.Linear(6, 5), n=nn.BatchNorm1d(5, affine=False)), noise(3, 6)),
    "affine=False after a convolution without a bias": (
        pair(lambda m, x: m.n(m.a(x)), a=conv(bias=False), n=bn(affine=False)), IMAGE),
    "two norms share one bias": (shared_bias, IMAGE),
    "reflect padding after a shift": (
        pair(lambda m, x: m.a(m.n(x)), a=conv(padding_mode="reflect"), n=bn()), IMAGE),
    "Gemm with beta": (
        pair(lambda m, x: m.n(torch.addmm(m.c, x, m.w, beta=0.5, alpha=2.0)), c=noise(5), w=noise(6, 5),
             n=nn.BatchNorm1d(5)), noise(3, 6)),
    "a pair by data flow, not by order of registration": (
        pair(lambda m, x: F.relu(m.n2(m.a(m.n1(m.b(x))))), a=conv(), n1=bn(), b=conv(), n2=bn()), IMAGE),
}  # fmt: skip


@pytest.mark.parametrize("case", RIGHT)
def test_is_folded_and_right(case):
    make, x = RIGHT[case]
    folded = fold_exactly(make(), x)
    assert NORM not in operators(folded.program)


# -- declined, by name -------------------------------------------------------------------------------------------------

#: case -> module, input, reason, blocker
DECLINED: dict[str, tuple[Callable[[], nn.Module], Tensor, str, str]] = {
    "one convolution before two norms": (
        pair(lambda m, x: F.relu(m.n1(y := m.a(x))) + m.n2(y).sigmoid(), a=conv(), n1=bn(), n2=bn()), IMAGE,
        "several-readers", "n1"),
    "the convolution feeds the norm and a residual": (
        pair(lambda m, x: F.relu(m.n(y := m.a(x))) + y.sigmoid(), a=conv(), n=bn()), IMAGE,
        "several-readers", "aten.sigmoid"),
    "linear and BatchNorm1d along another axis of equal size": (
        pair(lambda m, x: m.n(m.a(x)), a=nn.Linear(5, 5), n=nn.BatchNorm1d(5)), noise(2, 5, 5), "other-axis", "a"),
    "a norm without running statistics": (
        pair(lambda m, x: m.n(m.a(x)), a=conv(), n=bn(track_running_stats=False)), IMAGE, "batch-statistics", "n"),
    "a norm with training=True": (
        pair(lambda m, x: F.batch_norm(m.a(x), None, None, training=True), a=conv()), IMAGE,
        "batch-statistics", "aten.batch_norm"),
    "a constant along the height": (
        pair(lambda m, x: m.a(x) * m.s, a=conv(6), s=affine_axis(2)), IMAGE, "other-axis", "a"),
    "a constant along the width": (
        pair(lambda m, x: m.a(x) * m.s, a=conv(6), s=affine_axis(3)), IMAGE, "other-axis", "a"),
    "a zero-padded convolution after a shift": (
        pair(lambda m, x: m.a(m.n(x)), a=conv(), n=bn()), IMAGE, "zero-padding", "a"),
    "convolution, relu, norm": (
        pair(lambda m, x: m.n(F.relu(m.a(x))), a=conv(), n=bn()), IMAGE, "shift-through-activation", "aten.relu"),
}  # fmt: skip


@pytest.mark.parametrize("case", DECLINED)
def test_is_declined_by_name(case):
    make, x, reason, blocker = DECLINED[case]
    folded = fold_exactly(make(), x, left=1)
    assert (reason, blocker) in {(r.reason, r.blocker) for r in folded.ledger.left[0].refusals}


def test_a_constant_along_the_batch():
    """With a fixed batch of 6, N is as long as C: a constant along N still is no channel's."""
    run = lambda m, x: m.a(x) * m.s  # noqa: E731
    module = build(run, a=conv(6), s=noise(6, 1, 1, 1))
    folded = fold_exactly(module, noise(6, 4, 6, 6), left={"other-axis", "model-output"}, dynamic=False)
    assert folded.ledger.left[0].refusals[0].blocker == "a"


def test_variance_plus_eps_below_zero():
    module = build(lambda m, x: m.n(m.a(x)), a=conv(), n=bn())
    module.n.running_var[2] = -1.0
    folded = bnfold.fold(module, (IMAGE,))
    (left,) = folded.ledger.left
    refusal = left.refusals[0]
    assert (refusal.reason, refusal.blocker) == ("nonfinite", "n") and "[2]" in refusal.detail
    with pytest.raises(bnfold.BnfoldError, match="variance"):
        bnfold.fold(module, (IMAGE,), allow_nonfinite=False)


def test_train_mode_is_folded_as_eval():
    """``train()`` is a flag of the caller's; what is folded is the model in eval mode, and the flag stays."""
    module = build(lambda m, x: m.n(m.a(x)), a=conv(), n=bn()).train()
    before = module.n.running_mean.clone()
    folded = bnfold.fold(module, (IMAGE,))
    assert module.training and module.n.training and torch.equal(module.n.running_mean, before)
    assert not folded.ledger.left
    with torch.no_grad():
        torch.testing.assert_close(folded.module(IMAGE), module.eval()(IMAGE), rtol=1e-10, atol=1e-10)


# -- half precision ----------------------------------------------------------------------------------------------------


def test_float16_with_a_tiny_variance():
    """var 1e-9 and eps 1e-8 are zero in float16, and 1/sqrt of their sum infinite; in float64 they are not."""
    module = build(lambda m, x: m.n(m.a(x)), a=conv(), n=bn(eps=1e-8)).float()
    module.n.running_var.fill_(1e-9)
    module.n.weight.data.mul_(1e-4)
    module.n.running_mean.zero_()
    folded = bnfold.fold(module, (IMAGE.float(),), dtype=torch.float16)
    assert not folded.ledger.left
    assert all(p.isfinite().all() for p in folded.program.state_dict.values())
    with torch.no_grad():
        true = module.double()(IMAGE)
    found = folded.module(IMAGE.half()).double()
    assert float((found - true).norm() / true.norm()) < 8 * torch.finfo(torch.float16).eps


def test_float16_constants_are_rounded_once():
    module = build(lambda m, x: m.n(m.a(x)), a=conv(), n=bn())
    a, n = module.a, module.n
    scale = n.weight.float().double() / (n.running_var.float().double() + n.eps).sqrt()
    weight = (a.weight.float().double() * scale[:, None, None, None]).half()
    shift = n.bias.float().double() - n.running_mean.float().double() * scale
    bias = (a.bias.float().double() * scale + shift).half()
    folded = bnfold.fold(module.float(), (IMAGE.float(),), dtype=torch.float16)
    state = folded.program.state_dict
    assert torch.equal(state["a.weight"], weight) and torch.equal(state["a.bias"], bias)


# -- through ONNX ------------------------------------------------------------------------------------------------------


def exported(module: nn.Module, path: Path, x: Tensor, **more: Any) -> tuple[onnx.ModelProto, bnfold.ExportReport]:
    """The file that bnfold writes, valid, and no further from float64 than ``report`` allows, optimisations off."""
    report = bnfold.export(module, path, (x,), device="cpu", samples=16, **more)
    assert report.passed, report.check
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    given = x.to(more.get("dtype", x.dtype))
    (found,) = session.run(None, {session.get_inputs()[0].name: given.numpy()})
    captured = bnfold.fold(module, (x,), dtype=more.get("dtype")).captured
    (true,) = Runner(captured.program, precise=True, masters=captured.masters)([given])
    assert found.dtype == given.numpy().dtype
    error = np.linalg.norm(found.astype(np.float64) - true.numpy()) / np.linalg.norm(true.numpy())
    assert error < 32 * torch.finfo(given.dtype).eps, error
    return model, report


def kinds(model: onnx.ModelProto) -> set[str]:
    return {node.op_type for node in model.graph.node}


def test_onnx_gemm_with_beta(tmp_path):
    run = lambda m, x: m.n(torch.addmm(m.c, x, m.w, beta=0.5, alpha=2.0))  # noqa: E731
    module = build(run, c=noise(5), w=noise(6, 5), n=nn.BatchNorm1d(5)).float()
    model, _ = exported(module, tmp_path / "net.onnx", noise(3, 6).float())
    assert "BatchNormalization" not in kinds(model)


def test_onnx_norm_without_running_statistics(tmp_path):
    module = build(lambda m, x: m.n(m.a(x)), a=conv(), n=bn(track_running_stats=False)).float()
    model, report = exported(module, tmp_path / "net.onnx", IMAGE.float())
    assert [e.refusals[0].reason for e in report.ledger.left] == ["batch-statistics"]
    assert "Conv" in kinds(model) and "ReduceMean" in kinds(model)


def batch_statistics() -> nn.Module:
    run = lambda m, x: F.batch_norm(m.a(x), m.mean, m.var, training=True)  # noqa: E731
    return build(run, a=conv(), mean=noise(4), var=noise(4) ** 2).float()


def test_onnx_batch_statistics_give_no_wrong_file(tmp_path):
    path = tmp_path / "net.onnx"
    report = bnfold.export(batch_statistics(), path, (IMAGE.float(),), device="cpu", samples=16)
    assert [e.refusals[0].reason for e in report.ledger.left] == ["batch-statistics"]
    assert report.passed == path.exists()


def test_onnx_batch_statistics_are_lowered(tmp_path):
    exported(batch_statistics(), tmp_path / "net.onnx", IMAGE.float())


def test_onnx_float16_convolution_with_a_float32_norm(tmp_path):
    """Folded or not, every operator of the file gets operands of one dtype."""
    run = lambda m, x: m.n(m.a(x.half()).float())  # noqa: E731
    module = build(run, a=conv(), n=bn()).float()
    module.a.half()
    path, x = tmp_path / "net.onnx", IMAGE.float()
    report = bnfold.export(module, path, (x,), device="cpu", samples=16)
    assert report.passed, report.check
    onnx.checker.check_model(onnx.load(path), full_check=True)
    ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"inputs_0": x.numpy()})


def test_onnx_matmul_transpose_norm(tmp_path):
    run = lambda m, x: m.n((x @ m.w).transpose(1, 2))  # noqa: E731
    module = build(run, w=noise(6, 5), n=nn.BatchNorm1d(5)).float()
    model, _ = exported(module, tmp_path / "net.onnx", noise(2, 5, 6).float())
    assert "BatchNormalization" not in kinds(model) and "MatMul" in kinds(model)


def test_onnx_linear_norm_along_another_axis(tmp_path):
    module = build(lambda m, x: m.n(m.a(x)), a=nn.Linear(5, 5), n=nn.BatchNorm1d(5)).float()
    model, _ = exported(module, tmp_path / "net.onnx", noise(2, 5, 5).float())
    assert "BatchNormalization" in kinds(model)


def test_onnx_shared_bias(tmp_path):
    model, _ = exported(shared_bias().float(), tmp_path / "net.onnx", IMAGE.float())
    assert kinds(model) == {"Conv", "Relu"}
