"""What torch's BatchNorm does, asked of torch itself: bnfold's algebra, health findings and calibration rest on it."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

torch.set_num_threads(1)

LAYERS = {
    "1d": (nn.BatchNorm1d, (7, 3)),
    "1d over time": (nn.BatchNorm1d, (7, 3, 5)),
    "2d": (nn.BatchNorm2d, (4, 3, 5, 2)),
    "3d": (nn.BatchNorm3d, (4, 3, 2, 3, 2)),
}


def norm(kind: type[nn.Module] = nn.BatchNorm2d, **options) -> nn.Module:
    """In float64, with statistics and weights that no formula can ignore."""
    torch.manual_seed(0)
    layer = kind(3, **options).double()
    with torch.no_grad():
        for tensor in (layer.running_mean, layer.weight, layer.bias):
            if tensor is not None:
                tensor.normal_()
        if layer.running_var is not None:
            layer.running_var.uniform_(0.2, 2)
    return layer


def images(*shape: int, seed: int = 1) -> Tensor:
    return 3 * torch.randn(*(shape or (4, 3, 5, 2)), generator=torch.Generator().manual_seed(seed)).double() + 1


def per_channel(vector: Tensor, like: Tensor) -> Tensor:
    return vector.reshape(1, -1, *[1] * (like.ndim - 2))


def batch_statistics(x: Tensor, *, correction: int) -> tuple[Tensor, Tensor]:
    axes = [axis for axis in range(x.ndim) if axis != 1]
    return x.mean(axes), x.var(axes, correction=correction)


@pytest.mark.parametrize("kind", LAYERS)
@settings(max_examples=10, deadline=None)
@given(eps=st.floats(1e-12, 10.0))
def test_eval_mode_is_the_formula(kind, eps):
    layer_class, shape = LAYERS[kind]
    layer, x = norm(layer_class, eps=eps).eval(), images(*shape)
    scale = layer.weight / (layer.running_var + eps).sqrt()
    expected = per_channel(scale, x) * x + per_channel(layer.bias - layer.running_mean * scale, x)
    torch.testing.assert_close(layer(x), expected, rtol=1e-9, atol=1e-9)


def test_eps_is_added_to_the_variance_and_not_to_the_deviation():
    layer, x = norm(eps=0.5).eval(), images()
    inside = (x - per_channel(layer.running_mean, x)) / per_channel((layer.running_var + 0.5).sqrt(), x)
    outside = (x - per_channel(layer.running_mean, x)) / per_channel(layer.running_var.sqrt() + 0.5, x)
    plain = nn.functional.batch_norm(x, layer.running_mean, layer.running_var, eps=0.5)
    torch.testing.assert_close(plain, inside)
    assert not torch.allclose(plain, outside)


def test_without_affine_gamma_is_one_and_beta_zero():
    layer, x = norm(affine=False).eval(), images()
    assert layer.weight is None and layer.bias is None
    same = norm().eval()
    same.load_state_dict({**layer.state_dict(), "weight": torch.ones(3), "bias": torch.zeros(3)})
    torch.testing.assert_close(layer(x), same(x))


def test_training_normalises_with_the_biased_and_stores_the_unbiased_variance():
    layer, x = norm(momentum=0.25).train(), images()
    mean, biased = batch_statistics(x, correction=0)
    _, unbiased = batch_statistics(x, correction=1)
    before = layer.running_mean.clone(), layer.running_var.clone()
    normalised = (layer(x) - per_channel(layer.bias, x)) / per_channel(layer.weight, x)
    expected = (x - per_channel(mean, x)) / per_channel((biased + layer.eps).sqrt(), x)
    torch.testing.assert_close(normalised, expected)
    torch.testing.assert_close(layer.running_mean, 0.75 * before[0] + 0.25 * mean)
    torch.testing.assert_close(layer.running_var, 0.75 * before[1] + 0.25 * unbiased)
    assert not torch.allclose(layer.running_var, 0.75 * before[1] + 0.25 * biased, rtol=1e-4)


def test_momentum_none_is_the_average_over_all_batches():
    layer = norm(momentum=None).train()
    batches = [images(seed=seed) for seed in range(5)]
    for x in batches:
        layer(x)
    known = [batch_statistics(x, correction=1) for x in batches]
    assert layer.num_batches_tracked == 5
    # The statistics it had before count for nothing: the first batch has weight 1.
    torch.testing.assert_close(layer.running_mean, torch.stack([mean for mean, _ in known]).mean(0))
    torch.testing.assert_close(layer.running_var, torch.stack([variance for _, variance in known]).mean(0))


def test_momentum_zero_never_moves_the_statistics():
    layer = norm(momentum=0.0).train()
    before = layer.running_mean.clone(), layer.running_var.clone()
    layer(images())
    assert torch.equal(layer.running_mean, before[0]) and torch.equal(layer.running_var, before[1])
    assert layer.num_batches_tracked == 1


@pytest.mark.parametrize("momentum", [0.1, 0.5, 2 / 3, 0.9])
def test_a_moving_average_is_as_good_as_a_mean_over_two_minus_m_over_m_batches(momentum):
    """What the limit of the finding ``momentum-high`` rests on: the sum of the squared weights of the batches."""
    weights = momentum * (1 - momentum) ** torch.arange(2000, dtype=torch.float64)
    assert weights.sum() == pytest.approx(1)
    assert 1 / weights.square().sum() == pytest.approx((2 - momentum) / momentum)


def test_without_running_statistics_eval_mode_uses_those_of_the_batch():
    layer, x = norm(track_running_stats=False).eval(), images()
    assert layer.running_mean is None and layer.running_var is None and layer.num_batches_tracked is None
    mean, biased = batch_statistics(x, correction=0)
    normalised = (layer(x) - per_channel(layer.bias, x)) / per_channel(layer.weight, x)
    torch.testing.assert_close(normalised, (x - per_channel(mean, x)) / per_channel((biased + layer.eps).sqrt(), x))
    torch.testing.assert_close(layer.train()(x), layer.eval()(x))
    # So the answer to a sample depends on the others in the batch; with running statistics it does not.
    assert not torch.allclose(layer(x[:2]), layer(x)[:2])
    tracked = norm().eval()
    torch.testing.assert_close(tracked(x[:2]), tracked(x)[:2])


def test_train_mode_moves_the_statistics_without_any_optimiser():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), norm().float()).train()
    weights = copy.deepcopy(dict(model.named_parameters()))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with torch.no_grad():
        model(images().float())
    assert all(torch.equal(value, weights[name]) for name, value in model.named_parameters())
    assert all(not torch.equal(value, before[name]) for name, value in model.named_buffers())
    after = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.eval()(images().float())
    assert all(torch.equal(value, after[name]) for name, value in model.named_buffers())


def test_one_layer_in_eval_mode_is_frozen_while_the_model_trains_until_train_is_called_again():
    model = nn.Sequential(norm(), norm())
    model.train()
    model[0].eval()
    before = [layer.running_mean.clone() for layer in model]
    model(images())
    assert torch.equal(model[0].running_mean, before[0]) and not torch.equal(model[1].running_mean, before[1])
    model.train()
    model(images())
    assert not torch.equal(model[0].running_mean, before[0])


def test_1d_over_time_pools_over_samples_and_positions():
    x = images(7, 3, 5)
    layer = norm(nn.BatchNorm1d, momentum=1.0).train()
    layer(x)
    flat = x.transpose(1, 2).reshape(-1, 3)
    torch.testing.assert_close(layer.running_mean, flat.mean(0))
    torch.testing.assert_close(layer.running_var, flat.var(0))
    layer.eval()
    torch.testing.assert_close(layer(x), layer(flat).reshape(7, 5, 3).transpose(1, 2))


def test_one_value_per_channel_cannot_be_normalised_in_training_and_can_in_eval_mode():
    x = images(1, 3)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        norm(nn.BatchNorm1d).train()(x)
    assert norm(nn.BatchNorm1d).eval()(x).shape == (1, 3)


def test_instance_norm_with_running_statistics_is_a_batch_norm_in_eval_mode():
    torch.manual_seed(0)
    instance, layer, x = nn.InstanceNorm2d(3, affine=True, track_running_stats=True).double(), norm(), images()
    instance.load_state_dict(layer.state_dict())
    torch.testing.assert_close(instance.eval()(x), layer.eval()(x))
    # In training it averages the variance of each sample, which is less than that of all of them together.
    instance.momentum = layer.momentum = 1.0
    instance.train()(x + torch.arange(4)[:, None, None, None]), layer.train()(x + torch.arange(4)[:, None, None, None])
    assert (instance.running_var < layer.running_var).all()


def test_a_synchronised_one_without_processes_is_a_plain_one():
    layer, x = norm(), images()
    synchronised = nn.SyncBatchNorm(3).double()
    synchronised.load_state_dict(layer.state_dict())
    torch.testing.assert_close(synchronised.eval()(x), layer.eval()(x))


def test_the_functional_form_moves_the_buffers_it_is_given_whatever_mode_a_module_is_in():
    layer, x = norm().eval(), images()
    before = layer.running_mean.clone()
    F.batch_norm(x, layer.running_mean, layer.running_var, training=True)
    assert not torch.equal(layer.running_mean, before)
