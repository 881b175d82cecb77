"""In-place operators: swapped where that is safe, left and frozen where it is not, refused where they leak out.

Every net here is compared with eager bit for bit: a value that was overwritten too early or too late is off by a lot.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from checker import assert_same_state, build, fold_exactly, noise, operators, state_bytes
from torch import nn
from torch.utils import _pytree as pytree

import bnfold
from bnfold.graph.capture import capture
from bnfold.graph.interpret import Runner

IMAGE = (2, 4, 5, 6)


def dropout_then_write(m, x):
    y = m.conv(x)
    z = F.dropout(y, 0.5, training=False)
    z += 1  # eval dropout returns y itself
    return y, z * 2


def write_then_read(m, x):
    y = m.conv(x)
    z = y.add_(1)
    return y * z


def read_then_write(m, x):
    y = m.conv(x)
    before = y.tanh()
    y.mul_(2)
    return before + y


def chain(m, x):
    return m.conv(x).relu_().add_(1).mul_(0.5).sigmoid_()


def write_a_view(m, x):
    y = m.conv(x)
    y[:, 1].mul_(3)
    return y.tanh()


def write_a_view_and_read_both(m, x):
    y = m.conv(x)
    v = y.view(y.shape[0], -1)
    v.relu_()
    return y + 1, v


def relu_of_a_view_whose_base_is_read(m, x):
    y = m.conv(x)
    y.transpose(1, 2).relu_()
    return y * 2


def write_the_base_of_a_view(m, x):
    y = m.conv(x)
    v = y[:, :2]
    y.add_(1)
    return v * 2, y


def write_one_part(m, x):
    y = m.conv(x)
    a, b = y[:, :2], y[:, 1:]
    a.add_(1)
    return a, b


def write_a_view_of_a_view(m, x):
    y = m.conv(x)
    v = y.flatten(2)[:, 1:]
    v.neg_()
    return y, v.sum(2)


def add_that_promotes(m, x):
    y = (m.conv(x) > 0).to(torch.float32)
    y += m.conv(x)  # float32 stays float32, though x is float64
    return y


def index_put(m, x):
    y = m.conv(x)
    y[:, 0] = 0.0
    return y + 1


def write_slices_of_slices(m, x):
    y = m.conv(x)
    out = torch.zeros_like(y)
    out[:, :2, :-1] = y[:, :2, 1:]
    out[:, 2:, 1:] = y[:, 2:, :-1].to(torch.float32)
    out[:, 1:2, 3] = 0.5
    return out, y


def write_samples(m, x):
    y = m.conv(x)
    y[0].mul_(2)
    y[-1:] = y[:1].tanh()
    y[:, :2] += 1
    return y * 2


def write_between_two_ends(m, x):
    y = m.conv(x)
    y[:, :, 1:-1].neg_()  # of fewer than two rows there would be nothing between
    return y.tanh()


def move_a_view(m, x):
    y = m.conv(x)
    square = y[..., :5].transpose_(2, 3)
    return y, square.tanh()


def copy_into(m, x):
    y = torch.zeros_like(x)
    y.copy_(m.conv(x))
    return y * 2


def dropout_of_the_output(m, x):
    return F.dropout(m.conv(x), 0.1, training=False)


def dropout_of_the_input(m, x):
    return F.dropout(x, 0.1, training=False) + 0, F.dropout2d(x, 0.1, training=False)


def contiguous_that_aliases(m, x):
    y = m.conv(x)
    z = y.contiguous()
    z += 1
    return y


def to_that_aliases(m, x):
    y = m.conv(x)
    z = y.to(torch.float64)
    z -= 1
    return y, z


def everything_slice(m, x):
    y = m.conv(x)
    y[:, :2].add_(1)
    return y[:], y[:, 1:]


def einsum_then_write(m, x):
    y = torch.einsum("nchw,oc->nohw", m.conv(x), m.conv.weight[:, :, 0, 0])
    y.relu_()
    return y


def view_by_einsum_then_write(m, x):
    y = m.conv(x)
    torch.einsum("nchw->chwn", y).relu_()
    return y * 2


def activation_modules(m, x):
    return nn.Hardswish(inplace=True)(nn.LeakyReLU(inplace=True)(nn.SiLU(inplace=True)(m.conv(x))))


def unannounced(view):
    def run(m, x):
        y = m.conv(x)
        view(y).mul_(2.0)
        return y + 0.5

    run.__name__ = next(name for name, known in UNANNOUNCED.items() if known is view)
    return run


#: Views that no schema tells of.
UNANNOUNCED = {
    "meshgrid": lambda y: torch.meshgrid(y.flatten(), indexing="ij")[0],
    "broadcast_tensors": lambda y: torch.broadcast_tensors(y[:, :1], y)[1],
    "atleast_3d": torch.atleast_3d,
    "cartesian_prod": lambda y: torch.cartesian_prod(y.flatten()),
    "unsafe_chunk": lambda y: torch.unsafe_chunk(y, 2, 1)[0],
    "unsafe_split": lambda y: torch.unsafe_split(y, 2, 1)[1],
    "conj_physical": torch.conj_physical,
    "chain_matmul": lambda y: torch.ops.aten.chain_matmul([y[0, 0]]),
    "einsum": lambda y: torch.einsum("nchw->whcn", y),
}
TRAPS = [
    *(unannounced(view) for view in UNANNOUNCED.values()),
    dropout_then_write, write_then_read, read_then_write, chain, write_a_view, write_a_view_and_read_both,
    relu_of_a_view_whose_base_is_read, write_the_base_of_a_view, write_one_part, write_a_view_of_a_view,
    add_that_promotes, index_put, write_slices_of_slices, write_samples, write_between_two_ends, move_a_view, copy_into,
    dropout_of_the_output, dropout_of_the_input, contiguous_that_aliases, to_that_aliases, everything_slice,
    einsum_then_write, view_by_einsum_then_write, activation_modules,
]  # fmt: skip
#: Those in which no other value that shares the storage is read later, but what the written one is a slice of.
SAFE = {dropout_then_write, write_then_read, read_then_write, chain, dropout_of_the_output, dropout_of_the_input,
        einsum_then_write, activation_modules, write_a_view, index_put, write_slices_of_slices, write_samples,
        everything_slice}  # fmt: skip


@pytest.mark.parametrize("trap", TRAPS, ids=lambda f: f.__name__)
def test_the_captured_program_computes_what_eager_does(trap):
    net, x = build(trap, conv=nn.Conv2d(4, 4, 1)), noise(*IMAGE)
    captured = capture(net, (x,))
    assert trap not in SAFE or captured.in_place == 0
    assert not any(name.endswith("_") for name in operators(captured.program)) or captured.in_place
    found, wanted = (pytree.tree_leaves(f(x.clone())) for f in (captured.program.module(), net))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("trap", TRAPS, ids=lambda f: f.__name__)
def test_norms_around_a_trap_fold_right_or_not_at_all(trap):
    def run(m, x):
        return pytree.tree_map(lambda y: y * m.c + m.d if y.dtype == x.dtype else y, trap(m, m.norm(x)))

    net = build(run, conv=nn.Conv2d(4, 4, 1), norm=nn.BatchNorm2d(4), c=noise(1), d=noise(1))
    folded = bnfold.fold(net, (noise(*IMAGE),))
    fold_exactly(net, noise(*IMAGE), left=len(folded.ledger.left))
    frozen = {refusal.reason for entry in folded.ledger.left for refusal in entry.refusals} & {"in-place"}
    assert bool(frozen) <= bool(folded.captured.in_place)


def partial_convolution(m, x):
    y = m.norm(x)
    y[:, :2] = m.part(y[:, :2])
    return m.conv(y)


def partial_sigmoid(m, x):
    y = m.norm(x)
    y[:, :2] = y[:, :2].sigmoid()
    return m.conv(y)


@pytest.mark.parametrize("run, left", [(partial_convolution, 0), (partial_sigmoid, {"model-input", "nonlinear"})])
def test_a_norm_passes_a_slice_that_is_written_as_it_passes_a_concatenation(run, left):
    parts = {"conv": nn.Conv2d(4, 4, 1), "part": nn.Conv2d(2, 2, 1), "norm": nn.BatchNorm2d(4)}
    assert fold_exactly(build(run, **parts), noise(*IMAGE), left=left).captured.in_place == 0


# -- side effects are refused ------------------------------------------------------------------------------------------


def write_input(m, x):
    x.add_(1)
    return m.conv(x)


def write_view_of_input(m, x):
    x[:, 0].mul_(2)
    return m.conv(x)


def relu_of_input(m, x):
    return m.conv(F.relu(x, inplace=True))


@pytest.mark.parametrize("run", [write_input, write_view_of_input, relu_of_input], ids=lambda f: f.__name__)
def test_a_write_to_an_input_is_refused(run):
    with pytest.raises(bnfold.CaptureError, match=r"writes to its input 'inputs_0' in eval mode.*clone the input"):
        capture(build(run, conv=nn.Conv2d(4, 4, 1)), (noise(*IMAGE),))


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        self.calls.add_(1)
        return x * self.calls


def test_a_write_to_a_buffer_is_refused_and_the_module_named():
    net = build(lambda m, x: m.counting(m.conv(x)), conv=nn.Conv2d(4, 4, 1), counting=Counting())
    before = state_bytes(net)
    with pytest.raises(bnfold.CaptureError, match=r"counting: the model writes to its buffer 'counting.calls'"):
        bnfold.fold(net, (noise(*IMAGE),))
    assert_same_state(before, state_bytes(net))


def test_running_statistics_that_move_in_eval_mode_stay_the_callers():
    def run(m, x):
        return F.batch_norm(m.conv(x), m.mean, m.var, training=True)

    net = build(run, conv=nn.Conv2d(4, 4, 1), mean=noise(4), var=noise(4).square())
    before = state_bytes(net)
    folded = bnfold.fold(net, (noise(*IMAGE),))
    assert_same_state(before, state_bytes(net))
    assert {refusal.reason for refusal in folded.ledger.left[0].refusals} == {"batch-statistics"}
    x = noise(*IMAGE, seed=1)
    assert torch.equal(folded.module(x), copy.deepcopy(net)(x))
    assert_same_state(before, state_bytes(net))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_an_epsilon_that_follows_the_dtype_is_written_down(dtype: torch.dtype) -> None:
    """A run in float64 would take its own, and be no truth for numbers as small as the root of the other."""

    class Norm(nn.Module):
        def __init__(self, eps):
            super().__init__()
            self.norm = nn.RMSNorm(7, eps=eps)

        def forward(self, x):
            return self.norm(x), F.rms_norm(x, (7,), eps=self.norm.eps)

    x = torch.full((2, 7), 2.0**-12, dtype=dtype)
    for eps in (None, 0.5):
        module = Norm(eps).to(dtype)
        program = capture(module, (x,)).program
        nodes = program.graph.find_nodes(op="call_function", target=torch.ops.aten.rms_norm.default)
        meant = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps if eps is None else eps
        assert [node.args[3] for node in nodes] == [meant] * 2
        truth = 2.0**-12 / (2.0**-24 + meant) ** 0.5
        for value in module(x):
            assert float(value.detach().double().mean()) == pytest.approx(truth, rel=float(torch.finfo(dtype).eps))
        for exact in Runner(program, precise=True)([x]):
            assert float(exact.detach().mean()) == pytest.approx(truth, rel=1e-14)
