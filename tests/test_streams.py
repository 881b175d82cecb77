"""BatchNorms in front of activations, in the streams of published nets: how many stay (``scripts/streams.py``)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from checker import build, fold_exactly, noise
from torch import nn
from zoo_streams import STREAMS, signed

from bnfold.graph.capture import capture
from bnfold.graph.graph import Graph
from bnfold.graph.interpret import Runner
from bnfold.passes.folding import fold
from bnfold.report import Entry

#: How many BatchNorms stay with positive scales, and with half of them negated: signs decide in front of a ReLU.
LEFT = {
    "resnet_v2": (0, 2), "resnet_v2_bottleneck": (0, 1), "xception": (0, 1), "face": (1, 1), "ecapa_tdnn": (3, 4),
    "wavenet": (0, 0), "ecg": (0, 1), "deepspeech": (0, 0), "hourglass": (3, 11), "segresnet": (0, 4),
    "highresnet": (1, 3), "convmixer": (2, 2), "densenet": (8, 8),
}  # fmt: skip


@pytest.mark.parametrize("name", STREAMS)
def test_no_more_stays_than_signs_and_padding_hold(name: str) -> None:
    torch.manual_seed(0)
    make, small, _ = STREAMS[name]
    module, inputs = make(*small)
    program = capture(signed(module, 0.0).double(), (*(x.double() for x in inputs),)).program
    assert (stays(program, inputs), stays(signed(module, 0.5) and program, inputs)) == LEFT[name]


def stays(program: torch.export.ExportedProgram, inputs: tuple[torch.Tensor, ...]) -> int:
    """How many; what remains is equal, and where signs decide a refusal names another BatchNorm and the channels."""
    graph = Graph(program)
    ledger = fold(graph)
    given = [x.double() for x in inputs]
    for found, true in zip(Runner(graph.finish())(given), Runner(program)(given), strict=True):
        assert float((found - true).abs().max()) <= 1e-10 * float(true.abs().max())
    assert all(names_channels(entry) for entry in ledger.left)
    return len(ledger.left)


ACTIVATIONS = {
    "relu": F.relu, "leaky_relu": F.leaky_relu, "masked": lambda y: F.relu(y).masked_fill(y[:, :1] > 0, 0.0),
    "pooled": lambda y: F.max_pool2d(F.relu(y), 3, 1, 1),
}  # fmt: skip


@pytest.mark.parametrize(
    ("activation", "shift", "kernel", "left"),
    [
        ("relu", -0.7, 3, set()),  # it is zero, and so is what padding adds
        ("relu", 0.0, 3, set()),
        ("relu", 0.9, 1, set()),  # its columns are a bias
        ("relu", 0.9, 3, {"several-readers", "zero-padding"}),
        ("leaky_relu", 0.9, 1, set()),
        ("leaky_relu", -0.7, 1, {"several-readers", "shift-through-activation"}),
        ("pooled", 0.9, 1, set()),
        ("masked", 0.9, 1, {"several-readers", "shift-through-activation"}),
    ],
)
def test_a_gamma_of_zero_in_a_stream_leaves_its_channel_out(activation, shift, kernel, left):
    """What is left of the channel behind the activation is one number, whatever is stored there."""
    act = ACTIVATIONS[activation]
    net = build(
        lambda m, x: (y := m.stem(x), z := y + m.conv(act(m.norm(y))), m.head(F.relu(m.last(z))))[-1],
        stem=nn.Conv2d(3, 4, 1), norm=nn.BatchNorm2d(4), conv=nn.Conv2d(4, 4, kernel, padding=kernel // 2),
        last=nn.BatchNorm2d(4), head=nn.Conv2d(4, 2, 1),
    )  # fmt: skip
    with torch.no_grad():
        for norm in (net.norm, net.last):
            norm.weight.abs_()
        net.norm.weight[1], net.norm.bias[1] = 0.0, shift
    fold_exactly(net, noise(2, 3, 6, 8), left=left)


@pytest.mark.parametrize(("indices", "left"), [(False, set()), (True, {"several-readers", "nonlinear"})])
def test_what_was_chosen_in_a_channel_holds_it(indices, left):
    """A maximum of a channel that is left out is that channel's number; where it was is read of what is stored."""

    def run(m, x):
        y = m.stem(x)
        values, places = F.max_pool2d(m.norm(y), 2, return_indices=True)
        return m.conv(values), m.other(y), places if indices else values.shape[0]

    net = build(run, stem=nn.Conv2d(3, 4, 1), norm=nn.BatchNorm2d(4), conv=nn.Conv2d(4, 4, 1), other=nn.Conv2d(4, 2, 1))
    with torch.no_grad():
        net.norm.weight.abs_()
        net.norm.weight[1] = 0.0
    fold_exactly(net, noise(2, 3, 6, 8), left=left)


def test_what_was_chosen_in_a_channel_that_is_multiplied_by_zero_stays():
    """Its producer emits no zeros for it: where the largest are would be lost."""

    def run(m, x):
        values, places = F.max_pool2d(m.stem(x), 2, return_indices=True)
        return m.conv(m.norm(values)), places

    net = build(run, stem=nn.Conv2d(3, 4, 1), norm=nn.BatchNorm2d(4), conv=nn.Conv2d(4, 4, 1))
    with torch.no_grad():
        net.norm.weight.abs_()
        net.norm.weight[1] = 0.0
    fold_exactly(net, noise(2, 3, 6, 8), left=set())


def names_channels(entry: Entry) -> bool:
    return all(r.blocker and r.detail.startswith("in channels") for r in entry.refusals if r.reason == "sign")
