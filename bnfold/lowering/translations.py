"""Translations of operators: those of torch.onnx, gathered once a process, and of what ONNX has and it does not write.

``torch.onnx.export`` gathers all of its own anew for every model, and parses the source of each to learn a domain that
nothing asks for: more than half of its time on a small model. Recurrent layers torch.onnx (2.13) walks step by step, a
node for every step.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from onnxscript import opset18 as op


def _rnn(activation: str) -> Callable[..., Any]:
    """``h' = activation(W x + b + R h + c)``, layer by layer, in both directions where asked."""

    def translated(
        data: Any, state: Any, parameters: Sequence[Any], has_biases: bool, num_layers: int, dropout: float,
        train: bool, bidirectional: bool, batch_first: bool,
    ) -> tuple[Any, Any]:  # fmt: skip
        directions, kinds = 2 if bidirectional else 1, 4 if has_biases else 2
        sequence = op.Transpose(data, perm=[1, 0, 2]) if batch_first else data
        last = []
        for layer in range(num_layers):
            own = parameters[layer * directions * kinds :][: directions * kinds]

            def both(kind: int, own: Sequence[Any] = own) -> Any:
                each = [op.Unsqueeze(tensor, [0]) for tensor in own[kind::kinds]]
                return op.Concat(*each, axis=0) if len(each) > 1 else each[0]

            given, first = layer * directions, op.Concat(both(2), both(3), axis=1) if has_biases else None
            states, final = op.RNN(
                sequence, both(0), both(1), first, None, op.Slice(state, [given], [given + directions], [0]),
                activations=[activation] * directions, direction="bidirectional" if bidirectional else "forward",
                hidden_size=int(own[1].shape[1]),
            )  # fmt: skip
            # (length, directions, batch, features) -> (length, batch, directions and features)
            sequence = op.Reshape(op.Transpose(states, perm=[0, 2, 1, 3]), [0, 0, -1])
            last.append(final)
        final = op.Concat(*last, axis=0) if len(last) > 1 else last[0]
        return (op.Transpose(sequence, perm=[1, 0, 2]) if batch_first else sequence), final

    return translated


def _log_sigmoid(data: Any) -> Any:
    """``-softplus(-x)``: torch.onnx's own logarithm of a sigmoid is minus infinity where that is zero, from -104 on."""
    return op.Neg(op.Softplus(op.Neg(data)))


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.aten.rnn_tanh.input: _rnn("Tanh"),
    torch.ops.aten.rnn_relu.input: _rnn("Relu"),
    torch.ops.aten.log_sigmoid.default: _log_sigmoid,
}


@contextmanager
def gathered_once() -> Iterator[None]:
    """While it holds ``torch.onnx.export`` takes what was gathered before; of a torch with other insides, anew."""
    try:
        from onnxscript.values import TracedOnnxFunction
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        gather, parsed = ONNXRegistry.from_torchlib, TracedOnnxFunction.function_ir
    except (ImportError, AttributeError):
        yield
        return
    del parsed
    with patch.object(ONNXRegistry, "from_torchlib", _Once(gather, TracedOnnxFunction)):
        yield


@functools.cache
def _gathered(gather: Callable[..., Any], traced: type, opset: int | None) -> Any:
    with patch.object(traced, "function_ir", SimpleNamespace(domain="")):
        return gather() if opset is None else gather(opset_version=opset)


class _Once:
    """Takes the place of ``ONNXRegistry.from_torchlib``; the exporter adds to what it is given."""

    def __init__(self, gather: Callable[..., Any], traced: type) -> None:
        self._gather, self._traced = gather, traced

    def __call__(self, opset_version: int | None = None) -> Any:
        found = copy.copy(_gathered(self._gather, self._traced, opset_version))
        found.functions = {target: list(kept) for target, kept in found.functions.items()}
        return found
