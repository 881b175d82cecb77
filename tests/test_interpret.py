"""The float64 truth: a program raised to float64 is what the module would be, had every tensor been float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checker import RELATIVE, Net, assert_close, build, noise
from torch import Tensor, nn
from torch.export import ExportedProgram

from bnfold.graph.capture import capture
from bnfold.graph.interpret import Runner

IMAGE = (2, 4, 5, 6)


def captured(run: Callable[..., Any], dtype: torch.dtype = torch.float32) -> tuple[nn.Module, ExportedProgram]:
    net = build(run, conv=nn.Conv2d(4, 4, 3), norm=nn.BatchNorm2d(4), table=noise(4, 1, 1)).to(dtype)
    return net, capture(net, (noise(*IMAGE, dtype=dtype),)).program


def autocast(m: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = m.conv(x)
    return m.norm(y.float())


def nested_autocast(m: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = m.conv(x)
        with torch.autocast("cpu", enabled=False):
            y = m.norm(y.float())
        return F.relu(y) @ y.transpose(2, 3)


#: forward in float32, and the same with every tensor in float64
TRUTHS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "plain": (lambda m, x: m.norm(m.conv(x)),) * 2,
    ".float()": (lambda m, x: m.norm(m.conv(x).float().exp()), lambda m, x: m.norm(m.conv(x).exp())),
    ".half()": (lambda m, x: m.conv(x.half().float()), lambda m, x: m.conv(x)),
    ".to(bfloat16)": (lambda m, x: m.conv(x).to(torch.bfloat16) * 3, lambda m, x: m.conv(x) * 3),
    "type_as": (lambda m, x: m.conv(x).half().type_as(x) / 3, lambda m, x: m.conv(x) / 3),
    "zeros": (lambda m, x: torch.cat([m.conv(x), torch.zeros(1, 4, 3, 4)]) / 3,
              lambda m, x: torch.cat([m.conv(x), x.new_zeros(1, 4, 3, 4)]) / 3),
    "ones": (lambda m, x: x / (3 * torch.ones(6)), lambda m, x: x / 3),
    "full": (lambda m, x: x * torch.full((6,), 0.1), lambda m, x: x * 0.1),
    "full_like": (lambda m, x: x * torch.full_like(x, 0.1, dtype=torch.half), lambda m, x: x * 0.1),
    "new_full": (lambda m, x: x * x.new_full((6,), 0.1), lambda m, x: x * 0.1),
    "arange": (lambda m, x: x * torch.arange(0.0, 0.6, 0.1),
               lambda m, x: x * torch.arange(0.0, 0.6, 0.1, dtype=torch.float64)),
    "arange of integers": (lambda m, x: x * (torch.arange(6) // 2), lambda m, x: x * (torch.arange(6) // 2)),
    "arange, dtype": (lambda m, x: x * torch.arange(6, dtype=torch.float32).div(7),
                      lambda m, x: x * torch.arange(6, dtype=torch.float64).div(7)),
    "linspace": (lambda m, x: x * torch.linspace(0, 1, 6), lambda m, x: x * torch.linspace(0, 1, 6, dtype=x.dtype)),
    "eye": (lambda m, x: x @ (torch.eye(6) / 3), lambda m, x: x / 3),
    "scalar tensor": (lambda m, x: x * torch.tensor(0.5), lambda m, x: x * 0.5),
    "softmax, dtype": (lambda m, x: x.softmax(1, dtype=torch.float32), lambda m, x: x.softmax(1)),
    "sum, dtype": (lambda m, x: x.half().sum((2, 3), dtype=torch.float32), lambda m, x: x.sum((2, 3))),
    "cumsum, dtype": (lambda m, x: x.cumsum(1, dtype=torch.float32), lambda m, x: x.cumsum(1)),
    "finfo mask": (lambda m, x: x.masked_fill(x > 0, torch.finfo(torch.float32).min).softmax(-1),
                   lambda m, x: x.masked_fill(x > 0, torch.finfo(torch.float32).min).softmax(-1)),
    "-inf mask": (lambda m, x: x.masked_fill(x > 0.5, -torch.inf).softmax(-1),) * 2,
    "buffer": (lambda m, x: x * m.table.half(), lambda m, x: x * m.table),
    "autocast": (autocast, lambda m, x: m.norm(m.conv(x))),
    "nested autocast": (nested_autocast, lambda m, x: F.relu(y := m.norm(m.conv(x))) @ y.transpose(2, 3)),
    "no_grad": (lambda m, x: torch.no_grad()(m.conv)(x) / 3, lambda m, x: m.conv(x) / 3),
}  # fmt: skip


@pytest.mark.parametrize("case", TRUTHS)
def test_truth_is_float64_throughout(case):
    run, true = TRUTHS[case]
    net, program = captured(run)
    x = noise(*IMAGE, seed=3, dtype=torch.float32)
    (found,) = Runner(program, precise=True)([x])
    net.run = true
    with torch.no_grad():
        assert_close(found, net.double()(x.double()), RELATIVE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_program_runs_in_its_own_dtypes(dtype):
    net, program = captured(lambda m, x: m.norm(m.conv(x)).softmax(1), dtype)
    x = noise(*IMAGE, dtype=dtype)
    (found,) = Runner(program)([x])
    with torch.no_grad():
        assert torch.equal(found, net(x)) and found.dtype == dtype
    (true,) = Runner(program, precise=True)([x])
    assert true.dtype == torch.float64 and not torch.equal(true.to(dtype).double(), true)


def test_autocast_regions_run_with_autocast_in_their_own_dtypes():
    net, program = captured(autocast)
    x = noise(*IMAGE, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(Runner(program)([x])[0], net(x))


def test_masters_take_the_place_of_rounded_constants():
    net = build(lambda m, x: m.conv(x), conv=nn.Conv2d(4, 4, 3)).float()
    found = capture(net, (noise(*IMAGE, dtype=torch.float32),), dtype=torch.float16)
    assert found.masters is not None and found.masters.keys() == {"conv.weight", "conv.bias"}
    x = noise(*IMAGE, dtype=torch.float16)
    with torch.no_grad():
        (true,) = Runner(found.program, precise=True, masters=found.masters)([x])
        assert_close(true, net.double()(x.double()), RELATIVE)
        (rounded,) = Runner(found.program, precise=True)([x])
    assert (rounded - true).abs().max() > 1e-6


ACTIVATIONS = {"sigmoid": 1.0, "hardsigmoid": 1.0, "elu": 1.0, "gelu": 8.0, "silu": 8.0, "mish": 8.0, "hardswish": 8.0}


def test_bits_are_those_of_the_values_own_dtype():
    run = lambda m, x: (x.view(torch.int32) & -65536).view(torch.float32)  # noqa: E731
    program = capture(Net(run), (noise(4, 5, dtype=torch.float32),)).program
    x = noise(4, 5)
    (found,) = Runner(program, precise=True)([x])
    assert found.dtype == torch.float64 and torch.equal(found.float(), run(None, x.float()))


def test_a_constant_is_disturbed_by_the_epsilon_of_its_own_dtype():
    parts = {name: torch.full((2000,), 3.0, dtype=getattr(torch, name)) for name in ("float16", "float32", "float64")}
    program = capture(Net(lambda m, x: [x.double() * getattr(m, n).double() for n in parts], **parts),
                      (noise(2, 2000, dtype=torch.float32),)).program  # fmt: skip
    x = torch.ones(2, 2000)
    for moved, still in zip(*(Runner(program, precise=True, jitter=j)([x]) for j in (True, False))):
        name = next(iter(parts))
        most = 0.5 * torch.finfo(parts.pop(name).dtype).eps
        assert 0.9 * most <= (moved / still - 1).abs().max() <= most * (1 + 1e-6) + 3e-16, (
            name
        )  # and a rounding each of product and quotient


def test_what_tables_are_added_up_of_is_disturbed():
    """The middle of a grid is zero by luck: float32 may leave a rounding of one there, in a file as in the model."""

    def run(m, x):
        table = torch.linspace(-1, 1, 9)
        return [x * 0 + table, x * 0 + (table * 2 - table), F.affine_grid(x[:, :6].view(-1, 2, 3), (2, 1, 5, 9))]

    x = torch.cat([torch.eye(3)[:2].reshape(1, 6).repeat(2, 1), torch.zeros(2, 3)], 1)
    program = capture(Net(run), (x,)).program
    still, moved = (Runner(program, precise=True, jitter=jitter)([x]) for jitter in (False, True))
    unit = torch.finfo(torch.float32).eps
    for zero, off in ((still[0][:, 4], moved[0][:, 4]), (still[1][:, 4], moved[1][:, 4]),
                      (still[2][:, 2, 4], moved[2][:, 2, 4])):  # fmt: skip
        assert not zero.any() and 0 < off.abs().max() < 4 * unit
    counted = capture(Net(lambda m, x: x * 0 + torch.arange(9) * 0.5), (x,)).program
    assert not Runner(counted, precise=True, jitter=True)([x])[0][:, 0].any()


@pytest.mark.parametrize("slope", [(), (0.2,)])
def test_the_slope_of_a_leaky_relu_is_disturbed(slope):
    """A file holds it in float32, and a sum of both signs behind it takes away what hides that."""
    program = capture(Net(lambda m, x: F.leaky_relu(x, *slope)), (torch.ones(2, 3),)).program
    x = torch.tensor([[-3.0, 2.0, -1.0], [1.0, -2.0, 0.0]])
    still, moved = (Runner(program, precise=True, jitter=jitter)([x])[0] for jitter in (False, True))
    below = x < 0
    off = (moved / still - 1)[below].abs()
    assert torch.equal(moved[~below], still[~below])
    assert 0 < off.max() <= torch.finfo(torch.float32).eps / 2 * (1 + 1e-6)


def test_values_are_kept_as_they_were():
    def run(m, x):
        y = m.conv(x)
        v = y[:, :2]
        y.add_(1)  # stays in place: a view of y is read later
        return v * 1

    _, program = captured(run)
    runner, x = Runner(program), noise(*IMAGE, dtype=torch.float32)
    (out,) = runner([x], keep=["conv2d"])
    assert runner.kept.keys() == {"conv2d"}
    assert torch.equal(runner.kept["conv2d"][:, :2] + 1, out)


def test_the_inputs_and_the_stored_constants_stay_as_they_are():
    net, program = captured(lambda m, x: m.norm(m.conv(x)))
    x = noise(*IMAGE, dtype=torch.float32)
    weight, kept = net.conv.weight.clone(), x.clone()
    Runner(program, precise=True)([x])
    assert torch.equal(x, kept) and torch.equal(net.conv.weight, weight) and net.conv.weight.dtype == torch.float32


def test_the_number_of_inputs_is_checked():
    net = Net(lambda m, x, y: x + y)
    program = capture(net, (noise(2, 3), noise(2, 3))).program
    with pytest.raises(ValueError, match="takes 2 flat inputs, 1 were given"):
        Runner(program)([noise(2, 3)])
