"""Programs of any length, for measuring how folding scales; ``PROGRAMS[name](n)`` has about ``n`` layers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from programs import Node, Program, aten
from torch.export import ExportedProgram


def norm(p: Program, x: Node, i: int) -> Node:
    """BatchNorm with statistics that stay near one, so that ten thousand of them neither vanish nor explode."""
    c, generator = p.shape(x)[1], torch.Generator().manual_seed(i)
    rows = torch.rand(4, c, generator=generator) * 0.2
    statistics = [
        p.parameter(f"norm{i}.{name}", row + centre)
        for name, row, centre in zip(("weight", "bias", "running_mean", "running_var"), rows, (0.9, 0.0, 0.0, 0.9))
    ]
    return p.call(aten.batch_norm.default, x, *statistics, False, 0.1, 1e-5, False, module=f"norm{i}")


def conv(p: Program, x: Node, i: int) -> Node:
    """A 1x1 convolution near the identity."""
    c = p.shape(x)[1]
    weight = torch.eye(c) + 0.01 * torch.randn(c, c, generator=torch.Generator().manual_seed(i))
    return p.call(aten.conv2d.default, x, p.parameter(f"conv{i}.weight", weight[:, :, None, None]), module=f"conv{i}")


def conv_norm_relu(n: int) -> ExportedProgram:
    """Convolution, BatchNorm, ReLU, n times."""
    p = Program((2, 4, 2, 2))
    x = p.x
    for i in range(n):
        x = p.call(aten.relu.default, norm(p, conv(p, x, i), i))
    return p.done(x)


def linear_norm(n: int) -> ExportedProgram:
    """Linear layer, BatchNorm, tanh, n times."""
    p = Program((2, 4))
    x = p.x
    for i in range(n):
        x = p.call(aten.linear.default, x, p.parameter(f"fc{i}.weight", torch.eye(4)), module=f"fc{i}")
        x = p.call(aten.tanh.default, norm(p, x, i))
    return p.done(x)


def multiply_add(n: int) -> ExportedProgram:
    """A bare multiply and a bare add, n times: all of them are one affine."""
    p = Program((2, 4))
    x = p.x
    for i in range(n):
        x = p.call(aten.mul.Tensor, x, p.parameter(f"scale{i}", torch.linspace(0.9999, 1.0001, 4)))
        x = p.call(aten.add.Tensor, x, p.parameter(f"shift{i}", torch.linspace(-0.1, 0.1, 4)))
    return p.done(x)


def norms_and_movements(n: int) -> ExportedProgram:
    """BatchNorm and a flip, n times: all of them are one."""
    p = Program((2, 4, 2, 2))
    x = p.x
    for i in range(n):
        x = p.call(aten.flip.default, norm(p, x, i), [2])
    return p.done(x)


def scales_and_relus(n: int) -> ExportedProgram:
    """One convolution, then ReLU and a positive scale, n times."""
    p = Program((2, 4, 2, 2))
    x = conv(p, p.x, 0)
    for i in range(n):
        scale = p.parameter(f"scale{i}", torch.linspace(0.9999, 1.0001, 4).reshape(4, 1, 1))
        x = p.call(aten.mul.Tensor, p.call(aten.relu.default, x), scale)
    return p.done(x)


def residual(n: int) -> ExportedProgram:
    """``x + norm(conv(relu(x)))``, n times."""
    p = Program((2, 4, 2, 2))
    x = p.x
    for i in range(n):
        x = p.call(aten.add.Tensor, x, norm(p, conv(p, p.call(aten.tanh.default, x), i), i))
    return p.done(x)


def preactivation(n: int) -> ExportedProgram:
    """``x + conv(relu(norm(x)))``, n times: one BatchNorm stays, for the stream begins and ends as it is."""
    p = Program((2, 4, 2, 2))
    x = p.x
    for i in range(n):
        x = p.call(aten.add.Tensor, x, conv(p, p.call(aten.relu.default, norm(p, x, i)), i))
    return p.done(x)


def concat(n: int) -> ExportedProgram:
    """n branches of convolution and BatchNorm, concatenated, and a BatchNorm behind."""
    p = Program((2, 4, 2, 2))
    branches = [norm(p, conv(p, p.x, i), i) for i in range(n)]
    return p.done(norm(p, p.call(aten.cat.default, branches, 1), n))


def sums(n: int) -> ExportedProgram:
    """A sum of n convolutions, and a BatchNorm behind."""
    p = Program((2, 4, 2, 2))
    x = conv(p, p.x, 0)
    for i in range(1, n):
        x = p.call(aten.add.Tensor, x, conv(p, p.x, i))
    return p.done(norm(p, x, n))


def shared_weight(n: int) -> ExportedProgram:
    """One weight used by n convolutions, each with a BatchNorm of its own."""
    p = Program((2, 4, 2, 2))
    x, weight = p.x, p.parameter("conv.weight", torch.eye(4)[:, :, None, None])
    for i in range(n):
        x = p.call(aten.relu.default, norm(p, p.call(aten.conv2d.default, x, weight, module="conv"), i))
    return p.done(x)


#: name -> program of about n layers, and how many affines of it are left
PROGRAMS: dict[str, tuple[Callable[[int], ExportedProgram], Callable[[int], int]]] = {
    "conv_norm_relu": (conv_norm_relu, lambda n: 0),
    "linear_norm": (linear_norm, lambda n: 0),
    "multiply_add": (multiply_add, lambda n: 2),
    "norms_and_movements": (norms_and_movements, lambda n: 1),
    "scales_and_relus": (scales_and_relus, lambda n: 0),
    "residual": (residual, lambda n: 0),
    "preactivation": (preactivation, lambda n: 1),
    "concat": (concat, lambda n: 0),
    "sums": (sums, lambda n: 0),
    "shared_weight": (shared_weight, lambda n: 0),
}
