"""Rows of recurrent layers: the first layer, in every direction, takes what comes in; what comes out stays as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checker import build, fold_exactly, noise, operators, removed
from torch import Tensor, nn

from bnfold.graph.capture import capture
from bnfold.graph.graph import Graph
from bnfold.passes.folding import fold

KINDS: dict[str, Any] = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "rnn_tanh": lambda *sizes, **options: nn.RNN(*sizes, nonlinearity="tanh", **options),
    "rnn_relu": lambda *sizes, **options: nn.RNN(*sizes, nonlinearity="relu", **options),
}
ROWS = set(KINDS)
OPTIONS: list[dict[str, Any]] = [
    {},
    {"batch_first": True},
    {"num_layers": 2},
    {"num_layers": 3, "dropout": 0.5},
    {"bidirectional": True},
    {"bidirectional": True, "num_layers": 2, "batch_first": True},
    {"bias": False},
    {"bias": False, "bidirectional": True, "num_layers": 2},
]
CASES = [
    pytest.param(row, options, id="-".join([row, *(f"{k}={v}" for k, v in options.items())]))
    for row, some in ((row, [*OPTIONS, *([{"proj_size": 3}] if row == "lstm" else [])]) for row in KINDS)
    for options in some
]
SEQUENCES = (2, 7, 4)


def normalised(norm: nn.Module, x: Tensor) -> Tensor:
    """``norm`` over the last axis."""
    return norm(x.movedim(-1, 1)).movedim(1, -1)


def nets(row: str, options: dict[str, Any]) -> dict[str, nn.Module]:
    width = options.get("proj_size", 5) * (1 + options.get("bidirectional", False))
    rnn = KINDS[row](4, 5, **options)
    return {"rnn": rnn, "norm": nn.BatchNorm1d(4), "after": nn.BatchNorm1d(width), "linear": nn.Linear(width, 3)}


@pytest.mark.parametrize(("row", "options"), CASES)
def test_an_affine_before_goes_into_the_weights_of_the_first_layer(row, options):
    net = build(lambda m, x: m.rnn(normalised(m.norm, x))[0], **nets(row, options))
    if not options.get("bias", True):
        fold_exactly(net, noise(*SEQUENCES), left={"model-input", "no-saving"})
        with torch.no_grad():  # only the shift is in the way
            net.norm.running_mean.zero_()
            net.norm.bias.zero_()
    folded = fold_exactly(net, noise(*SEQUENCES))
    assert removed(folded)["batch_norm"] == 1 and operators(folded.program)[row] == 1
    assert folded.ledger.entries[0].into == ("rnn",)
    state, given = folded.program.state_dict, net.state_dict()
    changed = {name for name in state if name.startswith("rnn") and not torch.equal(state[name], given[name])}
    read = ("weight_ih_l0", "bias_ih_l0") if options.get("bias", True) else ("weight_ih_l0",)
    ends = ("", "_reverse") if options.get("bidirectional") else ("",)
    assert changed == {f"rnn.{name}{end}" for name in read for end in ends}


@pytest.mark.parametrize(("row", "options"), CASES)
def test_an_affine_behind_goes_forward_or_stays(row, options):
    parts = nets(row, options)
    net = build(lambda m, x: m.linear(normalised(m.after, m.rnn(x)[0])), **parts)
    folded = fold_exactly(net, noise(*SEQUENCES))
    assert (folded.ledger.entries[0].outcome, folded.ledger.entries[0].into) == ("forward", ("linear",))
    net = build(lambda m, x: normalised(m.after, m.rnn(x)[0]), **parts)
    folded = fold_exactly(net, noise(*SEQUENCES), left={"nonlinear", "model-output"})
    assert folded.ledger.left[0].refusals[0].blocker == "rnn"


@pytest.mark.parametrize("row", KINDS)
def test_a_state_that_comes_in_stays_as_it_is(row):
    parts = {"rnn": KINDS[row](4, 5), "make": nn.Linear(4, 5), "c": noise(5)}
    state = lambda h: (h, h) if row == "lstm" else h  # noqa: E731
    net = build(lambda m, x: m.rnn(x, state(m.make(x[:1])))[0], **parts)
    assert torch.equal(fold_exactly(net, noise(*SEQUENCES)).program.state_dict["make.weight"], net.make.weight)
    # What the state is multiplied by goes into what makes it, and not into the layer that reads it.
    folded = fold_exactly(build(lambda m, x: m.rnn(x, state(m.make(x[:1]) * m.c))[0], **parts), noise(*SEQUENCES))
    assert folded.ledger.entries[0].into == ("make",)
    net = build(lambda m, x: m.rnn(x, state(x[:1].repeat(1, 1, 2)[..., :5] * m.c))[0], **parts)
    fold_exactly(net, noise(*SEQUENCES), left={"model-input", "nonlinear"})


@pytest.mark.parametrize("row", KINDS)
def test_an_affine_along_the_time_or_the_batch_stays(row):
    parts = {"rnn": KINDS[row](7, 5), "c": noise(7, 1)}
    net = build(lambda m, x: m.rnn(x * m.c)[0], **parts)
    # As many features as steps: nothing but the axis tells them apart.
    fold_exactly(net, noise(2, 7, 7), left={"model-input", "other-axis"})


@pytest.mark.parametrize("row", KINDS)
def test_one_that_reads_a_packed_sequence_takes_nothing(row):
    """torch.export traces none yet, so the layer is put into the graph of one that reads a padded batch."""
    net = build(lambda m, x: m.rnn(normalised(m.norm, x))[0], **nets(row, {}))
    graph = Graph(capture(net, (noise(*SEQUENCES),)).program)
    (node,) = (node for node in graph.graph.nodes if node.target is getattr(torch.ops.aten, row).input)
    data, *rest = node.args
    node.target, node.args = getattr(torch.ops.aten, row).data, (data, data, *rest[:-1])
    (entry,) = fold(graph).left
    assert [refusal.reason for refusal in entry.refusals] == ["model-input", "packed-sequence"]
    assert entry.refusals[1].blocker == "rnn"
