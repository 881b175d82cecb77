"""OpenVINO's own runtime as a runner: pip install openvino.

    python -m bnfold check net.onnx net.py:make --runner examples/runners/openvino_runtime.py:infer

On processors with bfloat16 units OpenVINO computes float32 models in bfloat16 unless it is told not to. ``infer`` tells
it, and proves the file; ``infer_as_deployed`` does not, and is judged as what it then computes in, with
``--precision bfloat16``.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import openvino

DEVICE = "CPU"


@functools.cache
def compiled(path: Path, precision: str) -> Any:
    """The file, compiled once; ``precision`` is OpenVINO's name of a format, empty for its own choice."""
    config = {"INFERENCE_PRECISION_HINT": precision} if precision else {}
    return openvino.Core().compile_model(str(path), DEVICE, config)


def infer(inputs: dict[str, np.ndarray], path: Path) -> list[np.ndarray]:
    """The file's outputs in its order, computed in float32."""
    return [np.array(value) for value in compiled(path, "f32")(inputs).values()]


def infer_as_deployed(inputs: dict[str, np.ndarray], path: Path) -> list[np.ndarray]:
    """The same as OpenVINO's defaults have it."""
    return [np.array(value) for value in compiled(path, "")(inputs).values()]
