"""The zoo itself: every net runs, is deterministic, in eval mode, hears its input, and torch.export captures it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import zoo
import zoo_hf
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

Build = Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]

NETS: list[object] = [pytest.param(build, id=name) for name, build in zoo.NETS.items()]
HF_NETS = [pytest.param(name, id=name, marks=pytest.mark.slow) for name in zoo_hf.HF_NETS]


def tensors(outputs: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]


def other_inputs(args: tuple[Tensor, ...], batch: int) -> tuple[Tensor, ...]:
    """Inputs of ``batch`` samples unlike those of ``args``, of the same kind: rows mixed, or ids in another order."""
    rows = torch.arange(batch) % 2
    return tuple(a[rows] + 0.3 * a.flip(0)[rows] if a.is_floating_point() else a.flip(-1)[rows] for a in args)


def export(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor] | None = None):
    shapes: object = tuple({0: torch.export.Dim.AUTO} for _ in args)
    if kwargs:
        names = list(module.forward.__code__.co_varnames[1 : 1 + len(args)]) + list(kwargs)
        shapes = {name: {0: torch.export.Dim.AUTO} for name in names}
    with torch.no_grad():
        return torch.export.export(module, args, kwargs, dynamic_shapes=shapes, strict=False)


def check_net(build: Build) -> None:
    module, args = build()
    again, same_args = build()
    assert not any(child.training for child in module.modules())
    assert all(arg.shape[0] == 2 for arg in args)
    with torch.no_grad():
        first, second = tensors(module(*args)), tensors(again(*same_args))
        moved = tensors(module(*other_inputs(args, 2)))
    assert first and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(out.isfinite().all() for out in first)
    # A net of random statistics can drown its input in constants; a fault in front of them would go unseen.
    assert any((a - b).float().norm() > 5e-3 * a.float().norm() for a, b in zip(first, moved, strict=True))


def check_capture(build: Build) -> None:
    module, args = build()
    program = export(module, args)
    inputs = [node for node in program.graph.nodes if node.name in program.graph_signature.user_inputs]
    assert all(isinstance(node.meta["val"].shape[0], torch.SymInt) for node in inputs)
    args = other_inputs(args, 3)
    with torch.no_grad():
        captured, eager = tensors(program.module()(*args)), tensors(module(*args))
    assert len(captured) == len(eager) > 0
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(captured, eager, strict=True))


@pytest.mark.parametrize("build", NETS)
def test_net_runs_deterministically(build):
    check_net(build)


@pytest.mark.parametrize("build", NETS)
def test_net_is_captured_with_a_dynamic_batch(build):
    check_capture(build)


# How transformers' nets are captured and folded, tests/test_models.py asks with the nets that it builds.
@pytest.mark.parametrize("name", HF_NETS)
def test_hf_net_runs_deterministically(name):
    check_net(zoo_hf.HF_NETS[name])


def test_hf_lists_name_nets_that_exist():
    assert len(zoo_hf.HF_NETS) == sum(len(family.NETS) for family in zoo_hf.FAMILIES)
    assert zoo_hf.HF_NETS.keys() >= zoo_hf.WITHOUT_BATCHNORM


@pytest.mark.parametrize("name", zoo.KEYWORD_NETS)
def test_keyword_net_is_captured(name):
    module, args, kwargs = zoo.KEYWORD_NETS[name]()
    program = export(module, args, kwargs)
    with torch.no_grad():
        assert torch.equal(program.module()(*args, **kwargs), module(*args, **kwargs))


def test_every_net_counts_its_batchnorms():
    assert zoo.BATCHNORMS.keys() == zoo.NETS.keys()
    assert all(zoo.BATCHNORMS.values())
    assert zoo.count_batchnorms(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))) == 0
    norm = nn.BatchNorm1d(2)
    assert zoo.count_batchnorms(nn.ModuleList([norm, norm, nn.SyncBatchNorm(2)])) == 2


def test_randomize_gives_statistics_that_matter():
    net = zoo.randomize(nn.Sequential(nn.Conv2d(3, 64, 1), nn.BatchNorm2d(64)), seed=3)
    norm = net[1]
    assert not net.training
    assert (norm.weight == 0).sum() == 1
    size = norm.weight[norm.weight != 0].abs()
    assert size.min() >= 0.5 and size.max() <= 1.5
    assert 4 < (norm.weight < 0).sum() < 32
    assert norm.running_var.min() >= 0.2 and norm.running_var.max() <= 2
    assert 0.3 < norm.running_mean.std() < 0.7 and 0.3 < norm.bias.std() < 0.7


def test_randomize_follows_its_seed():
    first, same, other = (zoo.randomize(nn.BatchNorm2d(8), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.running_mean, same.running_mean)
    assert not torch.equal(first.running_mean, other.running_mean)


def test_randomize_leaves_what_is_not_there():
    norm = zoo.randomize(nn.BatchNorm2d(8, affine=False, track_running_stats=False))
    assert norm.weight is None and norm.running_mean is None
    conv = nn.Conv2d(3, 8, 1)
    before = conv.weight.clone()
    zoo.randomize(conv)
    assert torch.equal(conv.weight, before)


def test_randomize_reaches_layer_scale_and_frozen_buffers():
    module = nn.Module()
    module.layer_scale = nn.Parameter(torch.full((16,), 1e-6))
    module.frozen = zoo.zoo_convnets.FrozenBatchNorm2d(16)
    zoo.randomize(module)
    size = module.layer_scale.abs()
    assert size.min() >= 0.3 and size.max() <= 1
    assert (module.layer_scale < 0).any() and (module.layer_scale > 0).any()
    assert zoo.count_batchnorms(module) == 1
    assert module.frozen.running_mean.std() > 0.1
