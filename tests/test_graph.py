"""The graph editor and the program it finishes: tensors never overwritten, names kept, constants materialised."""

from __future__ import annotations

import io

import pytest
import torch
import zoo
from checker import assert_close, assert_same_state, build, fold_exactly, noise, operators, removed, state_bytes
from torch import nn
from torch.export import Dim
from torch.nn.utils import parametrizations

import bnfold
from bnfold.graph.capture import capture
from bnfold.graph.graph import Graph
from bnfold.semantics.sizes import WAYS

IMAGE = (2, 4, 5, 6)


def conv_and_norm(**more):
    return {"conv": nn.Conv2d(4, 4, 3), "norm": nn.BatchNorm2d(4), **more}


def names(folded: bnfold.Folded) -> set[str]:
    return set(folded.program.state_dict)


# -- editing -----------------------------------------------------------------------------------------------------------


def test_set_constant_writes_to_nothing_that_is_there():
    net = build(lambda m, x: m.conv(x), conv=nn.Conv2d(4, 4, 3))
    program = capture(net, (noise(*IMAGE),)).program
    before, graph = state_bytes(net), Graph(program)
    (value,) = graph.values()
    weight = graph.call(value).constant("weight")
    assert weight is not None
    graph.set_constant(value, "weight", weight * 2)
    graph.set_constant(value, "weight", weight * 3)
    assert torch.equal(graph.call(value).constant("weight"), weight * 3)
    finished = graph.finish()
    assert_same_state(before, state_bytes(net))
    assert torch.equal(program.state_dict["conv.weight"], net.conv.weight)
    assert torch.equal(finished.state_dict["conv.weight"], weight * 3)
    assert finished.state_dict["conv.bias"] is program.state_dict["conv.bias"]


def test_add_after_is_read_by_all_that_read_the_value():
    net = build(lambda m, x: (y := m.conv(x), y.tanh() + y), conv=nn.Conv2d(4, 4, 3, bias=False))
    x, graph = noise(*IMAGE), Graph(capture(net, (noise(*IMAGE),)).program)
    value, constant = next(graph.values()), noise(4, 1, 1)
    graph.add_after(value, constant)
    with torch.no_grad():
        y = net.conv(x) + constant
        assert_close(graph.finish().module()(x), (y, y.tanh() + y))


def test_bypass_drops_what_nobody_reads_any_more():
    net = build(lambda m, x: m.conv(x).tanh().sigmoid() + x.sum(), conv=nn.Conv2d(4, 4, 3))
    graph = Graph(capture(net, (noise(*IMAGE),)).program)
    values = list(graph.values())
    by = next(n for n in graph.graph.nodes if n.name == "inputs_0")
    graph.bypass({next(v for v in values if v.name == "sigmoid"): by})
    finished = graph.finish()
    assert operators(finished) == {"add": 1, "sum": 1}
    assert not finished.state_dict and len(finished.graph_signature.input_specs) == 1


def test_sizes_are_generic_ones_and_not_the_examples():
    net = build(lambda m, x: m.conv(x).flatten(0, 1), conv=nn.Conv2d(4, 4, 3))
    graph = Graph(capture(net, (noise(*IMAGE),)).program)
    conv, flat = graph.values()
    assert graph.example_shape(flat) == (8, 3, 4) and graph.dynamic_axes(flat) == (0,)
    batches = []
    for way in range(WAYS):
        graph.resize(way)
        batches.append(graph.shape(conv)[0])
        assert graph.shape(flat) == (4 * batches[-1], 3, 4)
    graph.resize(0)
    assert graph.shape(conv)[0] == batches[0]
    # Neither one of 3, 4, 5 and 6, nor a multiple or a divisor of one.
    assert batches[0] == 7


def test_a_constant_that_overflows_says_where():
    graph = Graph(capture(build(lambda m, x: m.conv(x), conv=nn.Conv2d(4, 4, 3)).half(),
                          (noise(*IMAGE, dtype=torch.float16),)).program)  # fmt: skip
    (value,) = graph.values()
    weight = graph.call(value).constant("weight")
    assert graph.overflow(value, "weight", weight) is None
    weight[2, 1, 0, 2] = -70000.0
    found = graph.overflow(value, "weight", weight)
    assert found is not None and (found.largest, found.index) == (70000.0, (2, 1, 0, 2))


# -- names -------------------------------------------------------------------------------------------------------------


def test_initializers_keep_the_models_names():
    net, args = zoo.NETS["resnet_bottleneck"]()
    before = set(net.state_dict())
    folded = bnfold.fold(net, args)
    assert names(folded) - before <= {name[: -len("weight")] + "bias" for name in before if name.endswith("weight")}
    assert not any(word in name for name in names(folded) for word in ("running", "folded", "num_batches"))


def test_a_nested_weight_passes_its_name_on_and_its_new_bias_stands_beside_it():
    net = build(lambda m, x: m.layer1(x), layer1=nn.Sequential(nn.Sequential(nn.Conv2d(4, 4, 3, bias=False),
                                                                            nn.BatchNorm2d(4))))  # fmt: skip
    assert names(fold_exactly(net, noise(*IMAGE))) == {"layer1.0.0.weight", "layer1.0.0.bias"}


def test_a_shared_weight_gets_a_copy_per_use_with_a_name_of_its_own():
    net = build(lambda m, x: m.a(m.conv(x)).tanh() + m.b(m.conv(x.flip(3))), conv=nn.Conv2d(4, 4, 3),
                a=nn.BatchNorm2d(4), b=nn.BatchNorm2d(4))  # fmt: skip
    folded = fold_exactly(net, noise(*IMAGE))
    assert names(folded) == {"conv.weight", "conv.weight_1", "conv.bias", "conv.bias_1"}


def test_a_use_without_an_affine_keeps_the_shared_weight():
    net = build(lambda m, x: m.a(m.conv(x)).tanh() + m.conv(x.flip(3)), conv=nn.Conv2d(4, 4, 3), a=nn.BatchNorm2d(4))
    folded = fold_exactly(net, noise(*IMAGE))
    assert names(folded) == {"conv.weight", "conv.weight_1", "conv.bias", "conv.bias_1"}
    assert torch.equal(folded.program.state_dict["conv.weight"], net.conv.weight)


def test_tied_parameters_of_two_modules():
    first, second = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
    second.weight = first.weight
    net = build(lambda m, x: m.norm(m.a(x)).tanh() + m.b(x), a=first, b=second, norm=nn.BatchNorm2d(4))
    folded = fold_exactly(net, noise(*IMAGE))
    assert len([name for name in names(folded) if "weight" in name]) == 2


def test_two_norms_that_share_a_bias():
    a, b = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
    b.bias = a.bias
    net = build(lambda m, x: m.b(m.d(m.a(m.c(x)).tanh())), c=nn.Conv2d(4, 4, 1), d=nn.Conv2d(4, 4, 1), a=a, b=b)
    fold_exactly(net, noise(*IMAGE))


def test_dead_parameters_leave():
    net = build(lambda m, x: m.norm(m.conv(x)), **conv_and_norm(unused=nn.Linear(3, 3)))
    folded = fold_exactly(net, noise(*IMAGE))
    assert names(folded) == {"conv.weight", "conv.bias"}
    assert {s.target for s in folded.program.graph_signature.input_specs} == {None, "conv.weight", "conv.bias"}


def test_an_input_may_be_called_input():
    class Takes(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)

        def forward(self, input):
            return {"input": input.tanh(), "output": self.norm(self.conv(input))}

    net = zoo.randomize(Takes()).double()
    folded = fold_exactly(net, noise(*IMAGE))
    assert folded.captured.names == ("input",)
    assert folded.program.graph_signature.user_inputs == ("input",)
    assert folded.module(noise(*IMAGE)).keys() == {"input", "output"}


# -- what constants alone compute --------------------------------------------------------------------------------------


class FrozenBatchNorm(nn.Module):
    """BatchNorm's arithmetic written out, as detection models do."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(channels))

    def forward(self, x):
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1)


class StandardisedConv(nn.Conv2d):
    def forward(self, x):
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        std = self.weight.std((1, 2, 3), keepdim=True)
        return self._conv_forward(x, (self.weight - mean) / (std + 1e-5), self.bias)


def old_weight_norm(module: nn.Module) -> nn.Module:
    with pytest.warns(FutureWarning, match="weight_norm"):
        torch.nn.utils.weight_norm(module)
    with torch.no_grad():  # as it leaves training, its weight is part of an autograd graph, which nothing can copy
        module(torch.zeros(1, 4, 3, 3))
    return module


@pytest.mark.parametrize("make", [
    lambda: parametrizations.weight_norm(nn.Conv2d(4, 4, 3)),
    lambda: parametrizations.spectral_norm(nn.Conv2d(4, 4, 3)),
    lambda: old_weight_norm(nn.Conv2d(4, 4, 3, bias=False)),
    lambda: StandardisedConv(4, 4, 3),
], ids=["weight_norm", "spectral_norm", "old weight_norm", "weight standardisation"])  # fmt: skip
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, FrozenBatchNorm, lambda channels: nn.Identity()])
def test_a_computed_weight_becomes_the_weight(make, norm):
    net = build(lambda m, x: m.norm(m.conv(x)), conv=make().eval(), norm=norm(4))
    folded = fold_exactly(net, noise(*IMAGE))
    assert operators(folded.program) == {"conv2d": 1}
    assert names(folded) - {"conv.bias"} == {"conv.weight"}


def test_frozen_batch_norm_is_one():
    net = build(lambda m, x: m.norm(m.conv(x)), conv=nn.Conv2d(4, 4, 3), norm=FrozenBatchNorm(4))
    folded = fold_exactly(net, noise(*IMAGE))
    assert {entry.module for entry in folded.ledger.entries} == {"norm"}
    assert all(entry.is_batch_norm for entry in folded.ledger.entries)


def test_a_constant_larger_than_what_it_is_computed_from_stays_computed():
    net = build(lambda m, x: x + (m.a * m.b).tanh(), a=noise(4, 5, 1), b=noise(4, 1, 6))
    folded = fold_exactly(net, noise(*IMAGE))
    assert names(folded) == {"a", "b"} and not removed(folded)


# -- the program that comes out ----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # torch's own
def test_a_folded_program_is_saved_and_loaded():
    net, x = build(lambda m, x: m.norm(m.conv(x)), **conv_and_norm()), noise(3, 4, 5, 6)
    folded, buffer = fold_exactly(net, noise(*IMAGE)), io.BytesIO()
    torch.export.save(folded.program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer)
    assert loaded.state_dict.keys() == folded.program.state_dict.keys()
    assert torch.equal(loaded.module()(x), folded.module(x))
    assert torch.equal(loaded.run_decompositions().module()(x), folded.module(x))


def test_no_size_enters_an_argument():
    net = build(lambda m, x: m.linear(m.norm(m.conv(x)).flatten(1)), **conv_and_norm(linear=nn.Linear(48, 3)))
    program = fold_exactly(net, noise(*IMAGE)).program
    for node in program.graph.nodes:
        leaves = torch.utils._pytree.tree_leaves((node.args, node.kwargs))
        assert not any(isinstance(leaf, torch.SymInt) for leaf in leaves)


def test_height_and_width_may_be_dynamic():
    net = build(lambda m, x: m.norm(m.conv(x)).mean((2, 3)), **conv_and_norm())
    shapes = ({0: Dim("n"), 2: Dim("h", min=4), 3: Dim("w", min=4)},)
    folded = fold_exactly(net, noise(*IMAGE), dynamic_shapes={"inputs": shapes})
    x = noise(3, 4, 9, 7)
    with torch.no_grad():
        assert_close(folded.module(x), net(x))


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # torch's own
@pytest.mark.parametrize("name", ["plain", "decomposed"])
def test_a_program_folds_like_its_module(name):
    net = build(lambda m, x: m.b(m.d(m.norm(m.conv(x)).relu().mean((2, 3)))),
                **conv_and_norm(d=nn.Linear(4, 5), b=nn.BatchNorm1d(5)))  # fmt: skip
    with torch.no_grad():
        program = torch.export.export(net, (noise(*IMAGE),), dynamic_shapes={"inputs": ({0: Dim("n")},)})
    program = program.run_decompositions() if name == "decomposed" else program
    before = {key: tensor.clone() for key, tensor in program.state_dict.items()}
    folded = bnfold.fold(program)
    assert not folded.ledger.left and len(folded.ledger.entries) == 2
    assert all(torch.equal(program.state_dict[key], tensor) for key, tensor in before.items())
    assert "conv.weight" in names(folded) and "d.weight" in names(folded)
    x = noise(3, 4, 5, 6, seed=4)
    with torch.no_grad():
        assert_close(folded.module(x), net(x))
