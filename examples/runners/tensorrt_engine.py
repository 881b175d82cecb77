"""TensorRT's own runtime as a runner: pip install tensorrt, and torch with CUDA for the memory.

    python -m bnfold check net.onnx net.py:make --runner examples/runners/tensorrt_engine.py:infer
    python -m bnfold check net.onnx net.py:make --runner examples/runners/tensorrt_engine.py:infer_float16 \\
        --precision float16

An engine is built for every set of input shapes that it is asked for. TensorRT takes TF32 for float32 where it may;
``infer`` forbids that, and proves the file.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import tensorrt as trt
import torch

Shapes = tuple[tuple[str, tuple[int, ...]], ...]


@functools.cache
def engine(path: Path, shapes: Shapes, *, float16: bool) -> Any:
    """The file as an engine for these input shapes.

    Raises:
        RuntimeError: TensorRT cannot read the file, or cannot build it.
    """
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        raise RuntimeError("; ".join(parser.get_error(i).desc() for i in range(parser.num_errors)))
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    if float16:
        config.set_flag(trt.BuilderFlag.FP16)
    profile = builder.create_optimization_profile()
    for name, shape in shapes:
        profile.set_shape(name, shape, shape, shape)
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise RuntimeError("TensorRT cannot build an engine of this file")
    return trt.Runtime(logger).deserialize_cuda_engine(plan)


def infer(inputs: dict[str, np.ndarray], path: Path) -> dict[str, np.ndarray]:
    """The file's outputs by name, computed in float32."""
    return run(inputs, path, float16=False)


def infer_float16(inputs: dict[str, np.ndarray], path: Path) -> dict[str, np.ndarray]:
    """The same where TensorRT may compute in float16."""
    return run(inputs, path, float16=True)


def run(inputs: dict[str, np.ndarray], path: Path, *, float16: bool) -> dict[str, np.ndarray]:
    """Runs an engine on the current CUDA device, with torch's memory, and waits."""
    built = engine(path, tuple((name, array.shape) for name, array in inputs.items()), float16=float16)
    context = built.create_execution_context()
    given = {name: torch.from_numpy(np.ascontiguousarray(array)).cuda() for name, array in inputs.items()}
    for name, tensor in given.items():
        context.set_input_shape(name, tuple(tensor.shape))
        context.set_tensor_address(name, tensor.data_ptr())
    found = {}
    for name in (built.get_tensor_name(i) for i in range(built.num_io_tensors)):
        if built.get_tensor_mode(name) == trt.TensorIOMode.OUTPUT:
            dtype = torch.from_numpy(np.empty(0, trt.nptype(built.get_tensor_dtype(name)))).dtype
            found[name] = torch.empty(tuple(context.get_tensor_shape(name)), dtype=dtype, device="cuda")
            context.set_tensor_address(name, found[name].data_ptr())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # the inputs are on their way there
    if not context.execute_async_v3(stream.cuda_stream):
        raise RuntimeError("TensorRT failed")
    stream.synchronize()
    return {name: tensor.cpu().numpy() for name, tensor in found.items()}
