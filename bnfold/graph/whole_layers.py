"""Recurrent layers stay one operator.

To find out their shapes torch walks them step by step, which takes long and fixes the number of steps. Their shapes
follow from their operands'.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch._subclasses.fake_tensor import FakeTensor

_ATEN = torch.ops.aten
_LAYERS = (_ATEN.lstm.input, _ATEN.gru.input, _ATEN.rnn_tanh.input, _ATEN.rnn_relu.input)
_KEYS = (DispatchKey.CompositeImplicitAutograd, DispatchKey.Autograd)


@contextmanager
def whole_recurrent() -> Iterator[None]:
    """While a graph is traced, the shapes of recurrent layers are computed without a step of them."""
    saved = [(layer, key, layer.py_kernels[key]) for layer in _LAYERS for key in _KEYS if key in layer.py_kernels]
    for layer, key, walking in saved:
        layer.py_kernels[key] = partial(_shapes, walking)
        layer._dispatch_cache.clear()
    try:
        yield
    finally:
        for layer, key, walking in saved:
            layer.py_kernels[key] = walking
            layer._dispatch_cache.clear()


def _shapes(
    walking: Callable[..., Any], data: Tensor, state: Tensor | Sequence[Tensor], parameters: Any, *options: Any
) -> Any:
    """Empty results of the shapes that the layer's have: ``(out, h)``, of an LSTM ``(out, h, c)``."""
    if not isinstance(data, FakeTensor):
        return walking(data, state, parameters, *options)
    states = [state] if isinstance(state, Tensor) else list(state)
    bidirectional = options[4]
    features = states[0].shape[2] * (2 if bidirectional else 1)
    return (data.new_empty((*data.shape[:2], features)), *(torch.empty_like(each) for each in states))
