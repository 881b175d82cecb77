"""BatchNorms in front of activations, in the streams of published nets: how many stay (``scripts/streams.py``)."""

from __future__ import annotations

import pytest
import torch
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


def names_channels(entry: Entry) -> bool:
    return all(r.blocker and r.detail.startswith("in channels") for r in entry.refusals if r.reason == "sign")
