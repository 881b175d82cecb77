"""The export as a regression test: its baseline is written by ``pytest --bnfold-update`` and committed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from digits import Digits, example_inputs


def test_the_export(onnx_gate: Any) -> None:
    """As accurate as the last time, and equal to the net within its own noise."""
    state = torch.load(Path(__file__).parent / "digits.ckpt", weights_only=True)["state_dict"]
    net = Digits()
    net.load_state_dict({key.removeprefix("model."): value for key, value in state.items()})
    onnx_gate(net, example_inputs, data="heldout.npz")
