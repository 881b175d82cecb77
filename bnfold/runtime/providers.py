"""Which execution providers really work, and why one does not.

ONNX Runtime lists CUDA on machines that have none. Here CUDA counts as usable only after a convolution ran on it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import io
import re
import sys
import warnings
from importlib import metadata

import numpy as np

from bnfold.errors import BnfoldError, ProviderError
from bnfold.runtime.session import CUDA, onnxruntime, open_on

_DISTRIBUTIONS = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino", "onnxruntime-qnn")


def provider_notes(device: str) -> list[str]:
    """What someone who reads a verdict reached on ``device`` should know about this installation, a line each."""
    notes = []
    if len(installed := installed_runtimes()) > 1:
        names = " and ".join(installed)
        notes.append(
            f"{names} are both installed, and one overwrote the other: uninstall both, then install the one you want"
        )
    if device == "cpu" and driver_problem() is None and (problem := cuda_problem()) is not None:
        notes.append(f"there is a CUDA device, but ONNX Runtime cannot use it ({problem}): run on the CPU")
    return notes


@functools.cache
def cuda_problem() -> str | None:
    """Why ONNX Runtime cannot use CUDA here, in one line, or None when a probe really ran there. Found out once."""
    try:
        ort = onnxruntime()
    except ProviderError as error:
        return str(error)
    if CUDA not in listed_providers():
        installed = installed_runtimes()
        if len(installed) > 1:
            return f"{' and '.join(installed)} are both installed, and one overwrote the other"
        return f"{' '.join(installed) or 'this onnxruntime'} has no CUDA provider; onnxruntime-gpu has it"
    said = io.StringIO()
    try:
        # It prints what it does not find; torch's CUDA libraries, if any, are among what it looks for.
        with contextlib.redirect_stdout(said), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ort.preload_dlls()
        return _probe("cuda")
    except Exception as error:
        return driver_problem() or _missing_library(said.getvalue()) or str(error)


def cpu_problem() -> str | None:
    """Why ONNX Runtime cannot run a convolution on the CPU, in one line, or None when it can."""
    try:
        return _probe("cpu")
    except BnfoldError as error:
        return str(error)


def driver_problem() -> str | None:
    """Why no CUDA device can be there at all, whatever the packages, or None when the driver shows one."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return "no NVIDIA driver (libcuda) is installed"
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value == 0:
        return "the NVIDIA driver shows no CUDA device"
    return None


def listed_providers() -> list[str]:
    """The providers this onnxruntime was built with, which says nothing about what works here.

    Raises:
        ProviderError: onnxruntime cannot be imported.
    """
    return list(onnxruntime().get_available_providers())


def installed_runtimes() -> list[str]:
    """The installed distributions that provide ``onnxruntime``; more than one overwrite each other's files."""
    found = []
    for name in _DISTRIBUTIONS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            metadata.version(name)
            found.append(name)
    return found


def _probe(device: str) -> str | None:
    """Run one operator that needs CUDA, cuBLAS or cuDNN to be really there; None when it came out right.

    Raises:
        BnfoldError: it did not run on the device.
    """
    session = open_on(probe_model(), device, threads=1, cpu_fallback=device == "cpu")
    (result,) = session.run({"x": np.full((1, 1, 2, 2), 2, np.float32)})
    return None if np.array_equal(result, np.full_like(result, 6)) else "a convolution came out wrong"


def probe_model() -> bytes:
    """y = Conv(x, weight) with a weight of 3."""
    from onnx import TensorProto, helper

    shape = [1, 1, 2, 2]
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "weight"], ["y"])],
        "probe",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [helper.make_tensor("weight", TensorProto.FLOAT, [1, 1, 1, 1], [3.0])],
    )
    content: bytes = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10
    ).SerializeToString()
    return content


def _missing_library(said: str) -> str | None:
    """The first library that ONNX Runtime's preloading, which prints its failures, did not find."""
    found = re.search(r"Failed to load (?:\S*/)?([^\s:]+):", said)
    return f"the CUDA library {found[1]} cannot be loaded" if found else None
