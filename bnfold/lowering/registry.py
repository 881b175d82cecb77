"""The translations of torch.onnx, gathered once a process.

``torch.onnx.export`` gathers all of them anew for every model, and parses the source of each to learn a domain that
nothing asks for: more than half of its time on a small model.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch


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
