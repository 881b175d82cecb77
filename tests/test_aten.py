"""The table as a whole: every row has a case, opaque rows refuse, what has no row is named, and rounding happens once.

The rows that let an affine pass have their cases in ``test_aten_contraction``, ``_moving``, ``_average``, ``_scaling``.
"""

from __future__ import annotations

import pytest
import test_aten_average
import test_aten_contraction
import test_aten_moving
import test_aten_recurrent
import test_aten_scaling
import torch
import torch.nn.functional as F
from checker import assert_same_state, build, fold_exactly, noise, operators, state_bytes
from torch import nn

import bnfold
from bnfold import aten
from bnfold.graph.capture import capture
from bnfold.graph.graph import Graph
from bnfold.semantics import Opaque, Same, ShapeOnly

ops = torch.ops.aten
IMAGE = (2, 4, 5, 6)


def conv_and_norm() -> dict[str, nn.Module]:
    return {"conv": nn.Conv2d(4, 4, 1), "norm": nn.BatchNorm2d(4)}


# -- rows that let nothing pass ----------------------------------------------------------------------------------------

OPAQUE = {
    "relu6": F.relu6,
    "hardtanh": F.hardtanh,
    "clamp": lambda x: x.clamp(-1, 1),
    "clamp_min": lambda x: x.clamp_min(0.1),
    "clamp_max": lambda x: x.clamp_max(0.1),
    "clip": lambda x: x.clip(0, 1),
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "hardshrink": F.hardshrink,
    "gelu": F.gelu,
    "silu": F.silu,
    "mish": F.mish,
    "elu": F.elu,
    "selu": F.selu,
    "celu": F.celu,
    "sigmoid": torch.sigmoid,
    "log_sigmoid": F.logsigmoid,
    "tanh": torch.tanh,
    "softplus": F.softplus,
    "exp": torch.exp,
    "log": lambda x: (x**2 + 1).log(),
    "sqrt": lambda x: (x**2).sqrt(),
    "rsqrt": lambda x: (x**2 + 1).rsqrt(),
    "pow": lambda x: x**2,
    "erf": torch.erf,
    "square": torch.square,
    "reciprocal": lambda x: (x**2 + 1).reciprocal(),
    "sin": torch.sin,
    "cos": torch.cos,
    "var": lambda x: x.var((2, 3), keepdim=True),
    "std": lambda x: x.std((2, 3), keepdim=True),
    "softmax": lambda x: x.softmax(1),
    "log_softmax": lambda x: x.log_softmax(1),
    "rms_norm": lambda x: F.rms_norm(x, (6,)),
    "native_layer_norm": lambda x: ops.native_layer_norm(x, [6], None, None, 1e-5)[0],
    "native_group_norm": lambda x: ops.native_group_norm(x, None, None, x.shape[0], 4, 30, 2, 1e-5)[0],
}


@pytest.mark.parametrize("row", OPAQUE)
def test_an_opaque_row_refuses_both_ways(row):
    run = OPAQUE[row]
    after = fold_exactly(
        build(lambda m, x: m.norm(run(m.conv(x))), **conv_and_norm()), noise(*IMAGE), left={"nonlinear", "model-output"}
    )
    before = fold_exactly(
        build(lambda m, x: m.conv(run(m.norm(x))), **conv_and_norm()), noise(*IMAGE), left={"nonlinear", "model-input"}
    )
    assert f"aten.{row}" in str(operators_of(after)) and f"aten.{row}" in str(operators_of(before))
    if row not in ("log", "sqrt", "rsqrt", "reciprocal"):  # a power comes first
        assert after.ledger.left[0].refusals[0].operator == before.ledger.left[0].refusals[1].operator == f"aten.{row}"


def operators_of(folded: bnfold.Folded) -> list[str]:
    return [f"aten.{name}" for name in operators(folded.program)]


DROPOUTS = ["dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"]
SHAPE_ONLY = {
    "sym_numel": (ops.sym_numel.default, ()),
    "sym_stride": (ops.sym_stride.int, (0,)),
    "sym_is_contiguous": (ops.sym_is_contiguous.default, ()),
    "_assert_tensor_metadata": (ops._assert_tensor_metadata.default, ()),
}


def semantics_of(target: object, *args: object) -> object:
    """What the table says of an operator that captured programs of this torch do not hold any more."""
    graph = Graph(capture(build(lambda m, x: m.conv(x), conv=nn.Conv2d(4, 4, 1)), (noise(*IMAGE),)).program)
    (value,) = graph.values()
    with graph.graph.inserting_after(value):
        node = graph.graph.call_function(target, (value, *args))
    node.meta["val"] = value.meta["val"]
    return aten.semantics(graph.call(node))


@pytest.mark.parametrize("row", DROPOUTS)
def test_dropout_passes_in_eval_mode_alone(row):
    packet = getattr(ops, row).default
    assert semantics_of(packet, 0.5, False) == Same("input")
    assert semantics_of(packet, 0.5, True) == Opaque()


@pytest.mark.parametrize("row", SHAPE_ONLY)
def test_what_reads_the_shape_alone(row):
    target, args = SHAPE_ONLY[row]
    assert isinstance(semantics_of(target, *args), ShapeOnly)


@pytest.mark.parametrize(
    "run", [lambda x: F.dropout(x, training=True), lambda x: F.feature_alpha_dropout(x, 0.5, True)]
)
def test_dropout_that_stays_random_refuses(run):
    net = build(lambda m, x: m.norm(run(m.conv(x))), **conv_and_norm())
    (entry,) = bnfold.fold(net, (noise(*IMAGE),)).ledger.left
    assert [refusal.reason for refusal in entry.refusals] == ["nonlinear", "model-output"]


# -- the table as a whole ----------------------------------------------------------------------------------------------


def test_every_row_has_a_case():
    files = (test_aten_average, test_aten_contraction, test_aten_moving, test_aten_recurrent, test_aten_scaling)
    tested = set().union(*(file.ROWS for file in files), OPAQUE, DROPOUTS, SHAPE_ONLY)
    assert {name.removeprefix("aten.") for name in aten.TABLE} == tested


def test_every_row_is_an_operator_of_torch():
    assert [name for name in aten.TABLE if not hasattr(ops, name.removeprefix("aten."))] == []


def test_an_operator_without_a_row_is_named():
    net = build(lambda m, x: m.norm(m.conv(x).cumsum(2)), **conv_and_norm())
    folded = fold_exactly(net, noise(*IMAGE), left={"unknown-operator", "model-output"})
    assert folded.ledger.left[0].refusals[0].operator == "aten.cumsum"
    net = build(lambda m, x: m.conv(m.norm(x).sort(2)[0]), **conv_and_norm())
    folded = fold_exactly(net, noise(*IMAGE), left={"unknown-operator", "model-input"})
    assert folded.ledger.left[0].refusals[1].operator == "aten.sort"
    assert semantics_of(ops.cumsum.default, 1) == Opaque("unknown-operator")


def written_view(m, x):
    y = m.conv(x)
    y.transpose(0, 1)[1].add_(1)
    return m.norm(y)


def test_an_in_place_operator_that_stays_is_a_reason():
    folded = fold_exactly(build(written_view, **conv_and_norm()), noise(*IMAGE), left={"in-place"})
    assert folded.captured.in_place == 1


# -- rounding, memory format, overflow ---------------------------------------------------------------------------------


def formula(net: nn.Module) -> dict[str, torch.Tensor]:
    """``conv -> norm`` as one convolution, in float64 from the stored tensors."""
    conv, norm = net.conv, net.norm
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    return {
        "conv.weight": conv.weight.double() * scale.reshape(-1, 1, 1, 1),
        "conv.bias": conv.bias.double() * scale + (norm.bias.double() - norm.running_mean.double() * scale),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_constants_are_rounded_once(dtype):
    net = build(lambda m, x: m.norm(m.conv(x)), conv=nn.Conv2d(4, 8, 3), norm=nn.BatchNorm2d(8)).to(dtype)
    folded = bnfold.fold(net, (noise(*IMAGE, dtype=dtype),))
    assert not folded.ledger.left
    state, wanted = folded.program.state_dict, formula(net)
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[name], wanted[name].to(dtype)) for name in wanted)
    in_dtype = net.conv.weight * (net.norm.weight / (net.norm.running_var + net.norm.eps).sqrt()).reshape(-1, 1, 1, 1)
    assert not torch.equal(state["conv.weight"], in_dtype)  # or the test would see nothing


def test_two_affines_in_a_row_are_rounded_once():
    net = build(lambda m, x: m.norm(m.conv(x)) * m.c, conv=nn.Conv2d(4, 8, 3), norm=nn.BatchNorm2d(8),
                c=noise(8, 1, 1)).to(torch.float16)  # fmt: skip
    folded = bnfold.fold(net, (noise(*IMAGE, dtype=torch.float16),))
    wanted = formula(net)["conv.weight"] * net.c.double()[:, None]
    assert torch.equal(folded.program.state_dict["conv.weight"], wanted.half())
    twice = formula(net)["conv.weight"].half().double() * net.c.double()[:, None]
    assert not torch.equal(twice.half(), wanted.half())  # or the test would see nothing


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_folding_to_a_lower_dtype_starts_from_the_stored_constants(dtype):
    net = build(lambda m, x: m.norm(m.conv(x)), conv=nn.Conv2d(4, 8, 3), norm=nn.BatchNorm2d(8)).float()
    before = state_bytes(net)
    folded = bnfold.fold(net, (noise(*IMAGE, dtype=torch.float32),), dtype=dtype)
    assert_same_state(before, state_bytes(net))
    for name, wanted in formula(net).items():
        assert torch.equal(folded.program.state_dict[name], wanted.to(dtype))


def test_a_norm_in_float32_on_a_value_in_float16():
    net = build(lambda m, x: m.norm(m.conv(x)), **conv_and_norm())
    net.conv.half(), net.norm.float()
    x = noise(*IMAGE, dtype=torch.float16)
    folded = bnfold.fold(net, (x,))
    assert not folded.ledger.left
    assert all(torch.equal(folded.program.state_dict[name], wanted.half()) for name, wanted in formula(net).items())
    assert folded.module(x).dtype == net(x).dtype == torch.float16


def test_a_multiply_that_widens_the_value_is_left():
    net = build(lambda m, x: m.conv(x) * m.c, conv=nn.Conv2d(4, 4, 1), c=noise(4, 1, 1))
    net.conv.half()
    x = noise(*IMAGE, dtype=torch.float16)
    folded = bnfold.fold(net, (x,))
    assert {refusal.reason for refusal in folded.ledger.left[0].refusals} == {"dtype"}
    assert torch.equal(folded.module(x), net(x))


def test_a_fold_that_overflows_is_refused_and_its_channel_named():
    net = build(lambda m, x: m.norm(m.conv(x)), **conv_and_norm())
    with torch.no_grad():
        net.norm.running_var[2] = 1e-9
        net.norm.weight[2] = 1
        net.conv.weight[2, 1] = 60.0
    net.norm.eps = 1e-8
    fold_exactly(net, noise(*IMAGE))
    folded = bnfold.fold(net, (noise(*IMAGE, dtype=torch.float32).double(),), dtype=torch.float16)
    (entry,) = folded.ledger.left
    assert entry.refusals[0].reason == "overflow" and entry.refusals[0].blocker == "conv"
    assert entry.refusals[0].detail.startswith("weight[2, 1, 0, 0] would be ")


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_memory_format(memory_format):
    net = build(lambda m, x: m.norm(m.conv(x)), conv=nn.Conv2d(4, 8, 3, groups=2), norm=nn.BatchNorm2d(8))
    net = net.to(memory_format=memory_format)
    fold_exactly(net, noise(*IMAGE).to(memory_format=memory_format))
