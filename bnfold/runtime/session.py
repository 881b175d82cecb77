"""ONNX Runtime sessions that tell the truth.

ONNX Runtime hands out a CPU session where a CUDA session was asked for; here the provider of a session is what the
session itself reports after construction, and every failure is one line of a :class:`~bnfold.errors.BnfoldError`.
Nothing is printed.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from bnfold.errors import BnfoldError, InputError, LowerError, ProviderError, ResourceError, UsageError
from bnfold.files import require_file
from bnfold.runtime.device import CPU, Device
from bnfold.runtime.model_file import shortened
from bnfold.runtime.trial import how_it_ends

Array = npt.NDArray[Any]

#: onnx.TensorProto.BFLOAT16, for which numpy has no type and ONNX Runtime takes no numpy array.
_BFLOAT16 = 16
_PROVIDER_FAILED = re.compile(
    r"(CUDA|HIP|TensorRT|OpenVINO|DML|QNN) .{0,9}(error|failure|failed)|CUDNN_|CUBLAS_|EP_FAIL|Please install .* librar"
)
_OUT_OF_MEMORY = re.compile(r"failed to allocate|out of memory|bad.alloc|smaller than requested", re.IGNORECASE)


@dataclass(frozen=True)
class ValueInfo:
    """An input or output of a model: its shape holds ints, dimension names, and None where neither is known."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...]

    def takes(self, shape: Sequence[int]) -> bool:
        """Whether an array of that shape fits."""
        # ONNX Runtime shows a scalar and a value of unknown rank alike, as (): it has the last word on those.
        fixed = [dim == size or not isinstance(dim, int) for dim, size in zip(self.shape, shape)]
        return not self.shape or (len(shape) == len(self.shape) and all(fixed))


@dataclass(frozen=True)
class Session:
    """A model ready to run. Its memory is freed with the last reference to it."""

    provider: str  #: the provider the session really uses, e.g. "CPUExecutionProvider".
    optimized: bool  #: whether ONNX Runtime's graph optimisations are on.
    inputs: tuple[ValueInfo, ...]  #: in the model's order, as the outputs are.
    outputs: tuple[ValueInfo, ...]
    _where: str = field(repr=False)
    _session: Any = field(repr=False)
    _memory: str = field(default="cpu", repr=False)

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
            hint = f"Its outputs are {_names(known)}"
            raise InputError(f"no output named {_names(unknown)}", where=self._where, hint=hint)
        # On a GPU as it is deployed: inputs and outputs on the device, bound.
        return self._checked(self._run_plainly if self._memory == "cpu" else self._run_bound, feeds, wanted)

    def binding_problem(self, feeds: Mapping[str, Array]) -> str | None:
        """How a run with bound inputs and outputs differs from a plain one, in one line; None where they agree.

        A device's sums may come out in another order, which moves the last digits; what binding can get wrong (memory
        read before it is written, or of an earlier run) moves the first ones. So half of the digits must agree.

        Raises:
            BnfoldError: one of the two runs failed; as for ``run``.
        """
        names = [value.name for value in self.outputs]
        plain = [array.astype(np.float64) for array in self._checked(self._run_plainly, feeds, names)]
        bound = [array.astype(np.float64) for array in self._checked(self._run_bound, feeds, names)]
        for value, one, other in zip(self.outputs, plain, bound):
            digits = np.sqrt(float(_epsilon(value.dtype)))
            if one.shape != other.shape:
                return f"output '{value.name}' is {list(other.shape)} with bound inputs and {list(one.shape)} without"
            good = np.isfinite(one) & np.isfinite(other)
            off, size = np.linalg.norm((one - other)[good]), np.linalg.norm(one[good])
            if not np.array_equal(np.isfinite(one), np.isfinite(other)) or not off <= digits * size:
                return f"output '{value.name}' is another with bound inputs than in a plain run"
        return None

    def assigned(self) -> Mapping[str, list[tuple[str, str]]]:
        """Name and operator of the nodes given to each provider, of a session that was opened with a profile.

        A provider that compiles shows in a profile what it made of them; empty where ONNX Runtime is too old to say.
        """
        found: dict[str, list[tuple[str, str]]] = {}
        if hasattr(self._session, "get_provider_graph_assignment_info"):
            for part in self._session.get_provider_graph_assignment_info():
                found.setdefault(part.ep_name, []).extend((node.name, node.op_type) for node in part.get_nodes())
        return found

    def end_profiling(self) -> Path:
        """Ends the profile of a session that was opened with one; the file that it is in."""
        return Path(self._session.end_profiling())

    def _checked(self, run: Callable[..., list[Array]], feeds: Mapping[str, Array], names: list[str]) -> list[Array]:
        _check_feeds(self.inputs, feeds, self._where)
        try:
            return run(feeds, names)
        except Exception as error:
            raise _explain(error, self._where, running=True) from error

    def _run_plainly(self, feeds: Mapping[str, Array], wanted: list[str]) -> list[Array]:
        values = {value.name: _to_ort(feeds[value.name]) for value in self.inputs}
        # Both values live on the CPU: the session moves them to its provider and back.
        results = self._session.run_with_ort_values(wanted, values)[::-1]
        return [_from_ort(results.pop()) for _ in wanted]

    def _binding(self, feeds: Mapping[str, Array], outputs: Mapping[str, str]) -> Any:
        """Inputs, which binding copies to the device, and where each output is to be."""
        binding = self._session.io_binding()
        for value in self.inputs:
            binding.bind_ortvalue_input(value.name, _to_ort(feeds[value.name]))
        for name, memory in outputs.items():
            binding.bind_output(name, memory)
        return binding

    def _run_bound(self, feeds: Mapping[str, Array], wanted: list[str]) -> list[Array]:
        # bfloat16 is read from memory below, since numpy does not know it: ONNX Runtime brings it to the CPU.
        halves = {value.name for value in self.outputs if value.dtype.name == "bfloat16"}
        binding = self._binding(feeds, {name: "cpu" if name in halves else self._memory for name in wanted})
        binding.synchronize_inputs()
        self._session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return [_from_ort(result) for result in binding.get_outputs()]

    def bind(self, feeds: Mapping[str, Array]) -> Callable[[], None]:
        """What runs the model once on ``feeds``, moved to the device here, and waits; the outputs stay there."""
        binding = self._binding(feeds, {value.name: self._memory for value in self.outputs})

        def run() -> None:
            self._session.run_with_iobinding(binding)
            binding.synchronize_outputs()

        return run


def model_of(text: str, *, opset: int = 18, **weights: Array) -> bytes:
    """An ONNX file of a graph in ONNX's own textual syntax, and of its initializers by name."""
    import onnx

    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": {opset}]> probe {text}')
    model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in weights.items())
    content: bytes = model.SerializeToString()
    return content


@functools.cache
def onnxruntime() -> ModuleType:
    """The package, silenced; ProviderError where it cannot be imported."""
    try:
        import onnxruntime as ort

        _ = ort.InferenceSession  # what is left of a package that pip removed another of imports, and has nothing in it
    except (ImportError, AttributeError) as error:
        what = f"onnxruntime cannot be imported ({error})"
        hint = "Install it: pip install --force-reinstall onnxruntime-gpu, or onnxruntime where there is no GPU"
        raise ProviderError(what, hint=hint) from error
    # Fatal only. A session's own level does not reach the logger that reports provider libraries, and whatever matters
    # is in the exception or in get_providers().
    ort.set_default_logger_severity(4)
    module: ModuleType = ort
    return module


def _options(*, optimized: bool, threads: int | None, spinning: bool) -> Any:
    ort = onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 4
    level = "ORT_ENABLE_ALL" if optimized else "ORT_DISABLE_ALL"
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    options.enable_cpu_mem_arena = optimized
    # Threads that spin while they wait take the processor from torch, which runs in turn with the session.
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if threads is None and (said := os.environ.get("OMP_NUM_THREADS", "")).isdecimal():
        threads = int(said)  # which the runtime itself does not read, and is meant for every library
    if threads is not None:
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
    return options


def open_on(
    model: str | os.PathLike[str] | bytes,
    device: Device,
    *,
    optimized: bool = True,
    threads: int | None = None,
    deployed: bool = False,
    disabled_optimizers: Sequence[str] = (),
    spinning: bool = False,
    cpu_fallback: bool = True,
    profile: Path | None = None,
    beside: Path | None = None,
) -> Session:
    """As ``runtime.open_session``, which is for everyone else, on a device that nobody has looked at before.

    ``cpu_fallback``: let nodes that the provider does not implement run on the CPU.
    """
    ort = onnxruntime()
    file = beside if isinstance(model, bytes) else model
    where = "the model" if file is None else os.fspath(file)
    if not isinstance(model, bytes):
        require_file(model, hint="Name an existing ONNX file")
        beside = Path(model)
        if optimized and device.is_cpu and (said := how_it_ends(beside, disabled_optimizers)):
            raise LowerError(
                f"ONNX Runtime {ort.__version__} {said} while it optimises {beside.name}",
                hint="One of its optimisations is at fault: python -m bnfold bisect names it",
            )
    # As it is deployed a file is read by the runtime itself; else the weights of a large one stay in it.
    short = shortened(model if isinstance(model, bytes) else Path(model), light=not optimized)
    model = model if short is None else short
    wanted, doctor = device.provider.ort_name, "Run: python -m bnfold doctor"
    if wanted not in ort.get_available_providers():
        raise ProviderError(f"asked for {wanted}, which this onnxruntime does not have", where=where, hint=doctor)
    options = _options(optimized=optimized, threads=threads, spinning=spinning)
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, os.fspath(profile)
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if not cpu_fallback:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    if isinstance(model, bytes):
        # ONNX Runtime would look for external data in the current folder, and take whatever has that name there.
        folder = os.devnull if beside is None else os.fspath(beside.parent)
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    # Named, the CPU would count as asked for, which contradicts a session that may not fall back on it.
    others = [CPU] if wanted != CPU and cpu_fallback else []
    providers: list[Any] = [(wanted, device.provider_options(deployed=deployed)), *others]
    try:
        session = ort.InferenceSession(
            model, options, providers=providers, disabled_optimizers=set(disabled_optimizers), enable_fallback=0
        )
    except Exception as error:
        if device.options and (found := re.search(r"[^.]*\boption\b.*", _fact(error), re.IGNORECASE)):
            hint = "See the provider's page in ONNX Runtime's documentation for those that it has"
            raise UsageError(found[0], where="--provider-option", hint=hint) from error
        raise _explain(error, where, running=False) from error
    session.disable_fallback()
    session._model_bytes = None  # kept for a fallback, of which there is none, as long as the session lives
    provider = session.get_providers()[0]
    if provider != wanted:
        raise ProviderError(f"asked for {wanted}, got {provider}", where=where, hint=doctor)
    inputs = tuple(_value_info(arg, where) for arg in session.get_inputs())
    outputs = tuple(_value_info(arg, where) for arg in session.get_outputs())
    return Session(provider, optimized, inputs, outputs, where, session, device.provider.memory)


@functools.cache
def _dtypes() -> dict[str, np.dtype[Any]]:
    import ml_dtypes

    named = {"float": "float32", "double": "float64"} | {
        name: name
        for name in ("float16", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool")
    }
    dtypes = {f"tensor({onnx})": np.dtype(numpy) for onnx, numpy in named.items()}
    return dtypes | {"tensor(bfloat16)": np.dtype(ml_dtypes.bfloat16)}


def _epsilon(dtype: np.dtype[Any]) -> float:
    """Distance from 1 to the next number; 0 for integers."""
    import ml_dtypes

    exact = dtype.kind in "iub" and dtype.name != "bfloat16"
    return 0.0 if exact else float(ml_dtypes.finfo(dtype).eps)  # type: ignore[no-untyped-call]


def _value_info(arg: Any, where: str) -> ValueInfo:
    dtype = _dtypes().get(arg.type)
    if dtype is None:
        what = f"{arg.name} is a {arg.type}, which has no place in a numeric comparison"
        raise LowerError(what, where=where, hint="Leave it out of the model's inputs and outputs")
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
        if given.dtype != value.dtype or not value.takes(given.shape):
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
    value = onnxruntime().OrtValue
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
    if _PROVIDER_FAILED.search(text):
        hint = "Run: python -m bnfold doctor, or --device cpu"
        return ProviderError(f"the provider failed: {text}", where=where, hint=hint)
    if running and kind == "InvalidArgument":
        return InputError(text, where=where, hint="Give inputs of the model's shapes")
    if running:
        return LowerError(f"ONNX Runtime failed on these inputs: {text}", where=where, hint="Try another input shape")
    if re.search(r"external (data|initializer)", text, re.I):
        return InputError(text, where=where, hint="Keep the model's own .data file beside it, in the same folder")
    hint = "Export it again, or with another --opset"
    if "Could not find an implementation" in text:  # as of a convolution in float64
        hint = "The provider has none of it in that dtype: try --dtype float32, or another --opset"
    return LowerError(f"ONNX Runtime refuses it: {text}", where=where, hint=hint)


def _fact(error: Exception) -> str:
    """ONNX Runtime's message without its codes, source lines and C++ signatures."""
    text = " ".join(str(error).split())
    text = re.sub(r"/\S+\.(?:cc|h):\d+ .*?\) ", "", text)
    text = re.sub(r"\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text).rstrip(". ")
    return text if len(text) <= 400 else text[:400] + "…"
