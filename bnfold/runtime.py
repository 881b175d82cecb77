"""ONNX Runtime sessions and providers that tell the truth.

ONNX Runtime lists CUDA on machines that have none and hands out a CPU session where a CUDA session was asked for. Here
the provider of a session is what the session itself reports after construction, CUDA counts as usable only after a
convolution ran on it, and every failure is one line of a :class:`~bnfold.errors.BnfoldError`. Nothing is printed.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import io
import os
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from bnfold.errors import BnfoldError, InputError, LowerError, ProviderError, ResourceError

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"

Array = npt.NDArray[Any]

#: onnx.TensorProto.BFLOAT16, for which numpy has no type and ONNX Runtime takes no numpy array.
_BFLOAT16 = 16
_OUT_OF_MEMORY = re.compile(r"failed to allocate|out of memory|bad.alloc|smaller than requested", re.IGNORECASE)
_DISTRIBUTIONS = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino", "onnxruntime-qnn")


@dataclass(frozen=True)
class ValueInfo:
    """An input or output of a model: its shape holds ints, dimension names, and None where neither is known."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...]


@dataclass(frozen=True)
class Session:
    """A model ready to run. Its memory is freed with the last reference to it.

    Attributes:
        provider: the provider the session really uses, e.g. "CPUExecutionProvider".
        optimized: whether ONNX Runtime's graph optimisations are on.
        inputs, outputs: in the model's order.
    """

    provider: str
    optimized: bool
    inputs: tuple[ValueInfo, ...]
    outputs: tuple[ValueInfo, ...]
    _where: str = field(repr=False)
    _session: Any = field(repr=False)

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None) -> list[Array]:
        """Run the model once.

        Args:
            feeds: an array for each input, by name; bfloat16 inputs take ``ml_dtypes.bfloat16`` arrays.
            outputs: the names of the outputs wanted, in that order; None for all.

        Returns:
            New arrays that share memory with nothing, on the CPU whatever the provider.

        Raises:
            InputError: the feeds do not fit the inputs, or there is no such output.
            LowerError: the model fails on these inputs.
            ProviderError: the provider failed.
            ResourceError: the memory gave out.
        """
        known = [value.name for value in self.outputs]
        wanted = known if outputs is None else list(outputs)
        if unknown := [name for name in wanted if name not in known]:
            raise InputError(
                f"no output named {_names(unknown)}", where=self._where, hint=f"Its outputs are {_names(known)}"
            )
        _check_feeds(self.inputs, feeds, self._where)
        try:
            values = {value.name: _to_ort(feeds[value.name]) for value in self.inputs}
            # Both values live on the CPU: the session moves them to its provider and back.
            results = self._session.run_with_ort_values(wanted, values)
            return [_from_ort(result) for result in results]
        except Exception as error:
            raise _explain(error, self._where, running=True) from error


def resolve_device(device: Literal["auto", "cpu", "cuda"]) -> Literal["cpu", "cuda"]:
    """The device to use: "auto" is CUDA where it really works and the CPU elsewhere; "cuda" never falls back.

    Raises:
        ProviderError: "cuda" was asked for and cannot be used; names the reason.
    """
    if device == "cpu":
        return "cpu"
    problem = cuda_problem()
    if problem is None:
        return "cuda"
    if device == "cuda":
        raise _no_cuda(problem)
    return "cpu"


def open_session(
    model: str | os.PathLike[str] | bytes,
    *,
    device: Literal["cpu", "cuda"] = "cpu",
    optimized: bool = True,
    threads: int | None = None,
    tf32: bool = False,
    disabled_optimizers: Sequence[str] = (),
) -> Session:
    """Open a model in ONNX Runtime on exactly the device asked for.

    Args:
        model: path of an ONNX file, or its content. Content with external data is refused: it has no folder.
        device: "cuda" never falls back to the CPU.
        optimized: all of ONNX Runtime's graph optimisations, or none.
        threads: for the operators of a CPU session; None leaves the choice to ONNX Runtime.
        tf32: let CUDA round float32 factors to 10 bits of mantissa, as the runtime does by default.
        disabled_optimizers: names of single optimisations to leave out.

    Raises:
        InputError: there is no such file, or its external data is missing, damaged or outside its folder.
        LowerError: the model is invalid, or ONNX Runtime does not implement it.
        ProviderError: ONNX Runtime is missing, or the session would not run on the device.
        ResourceError: the memory gave out.
    """
    if device == "cuda" and (problem := cuda_problem()) is not None:
        raise _no_cuda(problem)
    return _open(
        model, device, optimized=optimized, threads=threads, tf32=tf32, disabled_optimizers=disabled_optimizers
    )


@functools.cache
def cuda_problem() -> str | None:
    """Why ONNX Runtime cannot use CUDA here, in one line, or None when a probe really ran there. Found out once."""
    try:
        ort = _onnxruntime()
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
    return list(_onnxruntime().get_available_providers())


def installed_runtimes() -> list[str]:
    """The installed distributions that provide ``onnxruntime``; more than one overwrite each other's files."""
    found = []
    for name in _DISTRIBUTIONS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            metadata.version(name)
            found.append(name)
    return found


@functools.cache
def _onnxruntime() -> ModuleType:
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise ProviderError(
            f"onnxruntime cannot be imported ({error})", hint="Install it: pip install onnxruntime-gpu"
        ) from error
    # Fatal only. A session's own level does not reach the logger that reports provider libraries, and whatever matters
    # is in the exception or in get_providers().
    ort.set_default_logger_severity(4)
    module: ModuleType = ort
    return module


def _options(*, optimized: bool, threads: int | None) -> Any:
    ort = _onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 4
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
    # Threads that spin while they wait take the processor from torch, which runs in turn with the session.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if threads is not None:
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
    return options


def _open(
    model: str | os.PathLike[str] | bytes,
    device: str,
    *,
    optimized: bool = True,
    threads: int | None = None,
    tf32: bool = False,
    disabled_optimizers: Sequence[str] = (),
    cpu_fallback: bool = True,
) -> Session:
    ort = _onnxruntime()
    where = "the model" if isinstance(model, bytes) else os.fspath(model)
    if not isinstance(model, bytes) and not Path(model).is_file():
        raise InputError("there is no such file", where=where, hint="Name an existing ONNX file")
    wanted = CUDA if device == "cuda" else CPU
    options = _options(optimized=optimized, threads=threads)
    if not cpu_fallback:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    if isinstance(model, bytes):
        # ONNX Runtime would look for external data in the current folder, and take whatever has that name there.
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", os.devnull)
    providers: list[Any] = [CPU] if wanted == CPU else [(CUDA, {"use_tf32": str(int(tf32))}), CPU]
    try:
        session = ort.InferenceSession(
            model, options, providers=providers, disabled_optimizers=set(disabled_optimizers), enable_fallback=0
        )
    except Exception as error:
        raise _explain(error, where, running=False) from error
    session.disable_fallback()
    provider = session.get_providers()[0]
    if provider != wanted:
        raise ProviderError(f"asked for {wanted}, got {provider}", where=where, hint="Run: python -m bnfold doctor")
    inputs = tuple(_value_info(arg, where) for arg in session.get_inputs())
    outputs = tuple(_value_info(arg, where) for arg in session.get_outputs())
    return Session(provider, optimized, inputs, outputs, where, session)


@functools.cache
def _dtypes() -> dict[str, np.dtype[Any]]:
    import ml_dtypes

    named = {"float": "float32", "double": "float64"} | {
        name: name
        for name in ("float16", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool")
    }
    dtypes = {f"tensor({onnx})": np.dtype(numpy) for onnx, numpy in named.items()}
    return dtypes | {"tensor(bfloat16)": np.dtype(ml_dtypes.bfloat16)}


def _value_info(arg: Any, where: str) -> ValueInfo:
    dtype = _dtypes().get(arg.type)
    if dtype is None:
        raise LowerError(
            f"{arg.name} is a {arg.type}, which has no place in a numeric comparison",
            where=where,
            hint="Leave it out of the model's inputs and outputs",
        )
    return ValueInfo(arg.name, dtype, tuple(arg.shape))


def _check_feeds(inputs: Sequence[ValueInfo], feeds: Mapping[str, Array], where: str) -> None:
    expected = [value.name for value in inputs]
    hint = f"Its inputs are {_names(expected)}"
    if missing := [name for name in expected if name not in feeds]:
        raise InputError(f"nothing is given for input {_names(missing)}", where=where, hint=hint)
    if unexpected := [name for name in feeds if name not in expected]:
        raise InputError(f"no input named {_names(unexpected)}", where=where, hint=hint)
    for value in inputs:
        given: Any = feeds[value.name]
        if not isinstance(given, np.ndarray | np.generic):
            kind = type(given).__name__
            raise InputError(f"input {value.name} is a {kind}", where=where, hint="Give a numpy array")
        # ONNX Runtime shows a scalar and a value of unknown rank alike, as (): it has the last word on those.
        fits = not value.shape or (
            len(given.shape) == len(value.shape)
            and all(not isinstance(dim, int) or dim == size for dim, size in zip(value.shape, given.shape, strict=True))
        )
        if given.dtype != value.dtype or not fits:
            raise InputError(
                f"input {value.name} expects {_shaped(value.dtype, value.shape)}, "
                f"given {_shaped(given.dtype, given.shape)}",
                where=where,
                hint="Give it in that shape and dtype",
            )


def _shaped(dtype: np.dtype[Any], shape: Sequence[int | str | None]) -> str:
    return f"{dtype.name}[{', '.join('?' if dim is None else str(dim) for dim in shape)}]"


def _names(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"


def _to_ort(array: Array) -> Any:
    value = _onnxruntime().OrtValue
    # Not ascontiguousarray, which makes a scalar one-dimensional.
    array = np.asarray(array, order="C")
    if array.dtype.name == "bfloat16":
        return value.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), _BFLOAT16)
    return value.ortvalue_from_numpy(array)


def _from_ort(value: Any) -> Array:
    # Copies: an output that is an input, or an initializer, is handed out as the very same memory.
    if value.element_type() != _BFLOAT16:
        return np.array(value.numpy())
    size = value.tensor_size_in_bytes()
    raw = ctypes.string_at(value.data_ptr(), size) if size else b""
    return np.frombuffer(bytearray(raw), _dtypes()["tensor(bfloat16)"]).reshape(value.shape())


def _explain(error: Exception, where: str, *, running: bool) -> BnfoldError:
    """The error class and the one line that a failure of ONNX Runtime stands for."""
    if isinstance(error, BnfoldError):
        return error
    kind, text = type(error).__name__, _fact(error)
    if isinstance(error, MemoryError) or _OUT_OF_MEMORY.search(text):
        return ResourceError(f"the memory gave out: {text}", where=where, hint="Use a smaller batch or more memory")
    if re.search(r"CUDA (error|failure)|CUDNN_|CUBLAS_", text):
        return ProviderError(f"CUDA failed: {text}", where=where, hint="Run: python -m bnfold doctor, or --device cpu")
    if running and kind == "InvalidArgument":
        return InputError(text, where=where, hint="Give inputs of the model's shapes")
    if running:
        return LowerError(f"ONNX Runtime failed on these inputs: {text}", where=where, hint="Try another input shape")
    if re.search(r"external (data|initializer)", text, re.I):
        return InputError(text, where=where, hint="Keep the model's own .data file beside it, in the same folder")
    return LowerError(f"ONNX Runtime refuses it: {text}", where=where, hint="Export it again, or with another --opset")


def _fact(error: Exception) -> str:
    """ONNX Runtime's message without its codes, source lines and C++ signatures."""
    text = " ".join(str(error).split())
    text = re.sub(r"/\S+\.(?:cc|h):\d+ .*?\) ", "", text)
    text = re.sub(r"\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text).rstrip(". ")
    return text if len(text) <= 400 else text[:400] + "…"


def _no_cuda(problem: str) -> ProviderError:
    return ProviderError(f"CUDA cannot be used: {problem}", hint="Run: python -m bnfold doctor, or use --device cpu")


def _probe(device: str) -> str | None:
    """Run one operator that needs CUDA, cuBLAS or cuDNN to be really there; None when it came out right.

    Raises:
        BnfoldError: it did not run on the device.
    """
    session = _open(_probe_model(), device, threads=1, cpu_fallback=device == "cpu")
    (result,) = session.run({"x": np.full((1, 1, 2, 2), 2, np.float32)})
    return None if np.array_equal(result, np.full_like(result, 6)) else "a convolution came out wrong"


def _probe_model() -> bytes:
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
