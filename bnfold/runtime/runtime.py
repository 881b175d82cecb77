"""ONNX Runtime as the rest of bnfold sees it: which providers really work, why one does not, a session on one of them.

ONNX Runtime lists CUDA on machines that have none. Here a provider counts as usable only after a convolution ran on it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

import numpy as np

from bnfold.errors import BnfoldError, ProviderError, UsageError
from bnfold.runtime.arithmetic import FLOAT32, FORMATS, Arithmetic, arithmetic
from bnfold.runtime.device import CPU, CUDA, Device, Provider
from bnfold.runtime.session import Array, Session, ValueInfo, model_of, onnxruntime, open_on

_DISTRIBUTIONS = ("", "-gpu", "-directml", "-openvino", "-qnn", "-rocm", "-migraphx", "-cann", "-training")


# -- the table ---------------------------------------------------------------------------------------------------------


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


def _preload() -> None:
    """Finds CUDA's libraries, those that came with torch among them, and prints what it does not find."""
    onnxruntime().preload_dlls()


def _system(name: str, platform: str) -> str | None:
    return None if sys.platform == platform else f"this machine does not run {name}"


#: A provider is a row. Others that ONNX Runtime knows have one without more than their names: ``find``.
PROVIDERS: tuple[Provider, ...] = (
    Provider("cpu", CPU, package="onnxruntime"),
    Provider(
        "cuda", CUDA, {"use_tf32": "0"}, "onnxruntime-gpu", memory="cuda", prepare=_preload,
        needs="an NVIDIA GPU, CUDA and cuDNN (pip install 'onnxruntime-gpu[cuda,cudnn]')",
        missing=lambda: driver_problem(),
    ),
    Provider(
        "tensorrt", "TensorrtExecutionProvider", {}, "onnxruntime-gpu", memory="cuda", prepare=_preload,
        needs="an NVIDIA GPU and TensorRT's libraries (pip install tensorrt)", missing=lambda: driver_problem(),
        notes="it builds an engine for every shape that it sees: trt_engine_cache_enable=1 keeps them",
    ),
    Provider(
        "openvino", "OpenVINOExecutionProvider", {}, "onnxruntime-openvino",
        needs="a processor of Intel's or another that OpenVINO knows; device_type=CPU, GPU or NPU says which",
    ),
    Provider(
        "directml", "DmlExecutionProvider", {}, "onnxruntime-directml", needs="Windows and a GPU with DirectX 12",
        missing=lambda: _system("Windows", "win32"),
    ),
    Provider(
        "coreml", "CoreMLExecutionProvider", {}, "onnxruntime", needs="macOS",
        missing=lambda: _system("macOS", "darwin"),
        notes="MLComputeUnits=CPUOnly computes in float32, the Neural Engine in float16",
    ),
    Provider(
        "qnn", "QNNExecutionProvider", {}, "onnxruntime-qnn",
        needs="a Qualcomm chip, and the option backend_path: its QNN library",
    ),
)  # fmt: skip


def find(name: str) -> Provider:
    """The provider that ``name`` stands for: a row's, ONNX Runtime's own, or that without its ending, in any case.

    UsageError where there is none of that name; ProviderError where onnxruntime is needed to know and cannot be
    imported.
    """
    wanted = name.lower().removesuffix("executionprovider")
    for row in PROVIDERS:
        if wanted in (row.name, row.ort_name.lower().removesuffix("executionprovider")):
            return row
    for known in dict.fromkeys([*onnxruntime().get_all_providers(), *listed_providers()]):
        if wanted == (own := known.lower().removesuffix("executionprovider")):
            return Provider(own, known)
    names = ", ".join(["auto", *(row.name for row in PROVIDERS)])
    hint = f"Use {names}, or a name that onnxruntime.get_all_providers() lists"
    raise UsageError(f"there is no execution provider '{name}'", where="--device", hint=hint)


def on_gpu(name: str) -> bool:
    """Whether a provider of that name has its values on one of NVIDIA's GPUs; only rows of the table do."""
    return any(name.lower() in (row.name, row.ort_name.lower()) and row.memory == "cuda" for row in PROVIDERS)


# -- what works --------------------------------------------------------------------------------------------------------


def device_of(name: str, options: Mapping[str, str] | None = None) -> Device:
    """The device of that name, whether it works or not; names as for ``find``."""
    return Device(find(name), tuple((options or {}).items()))


def resolve_device(name: str | Device = "auto", options: Mapping[str, str] | None = None) -> Device:
    """The device to use: "auto" is CUDA where it really works and the CPU elsewhere; no other name falls back.

    Names are as for ``find``, ``options`` the provider's; a device that was resolved before is handed back. UsageError
    where there is no such provider or option; ProviderError, which names the reason, where it cannot be used.
    """
    if isinstance(name, Device):
        return name
    if name == "auto":
        if options:
            raise UsageError("options belong to one provider", where="--provider-option", hint="Name it with --device")
        return device_of("cpu") if cuda_problem() else device_of("cuda")
    device = device_of(name, options)
    if not device.is_cpu and (why := problem(device)) is not None:
        title = device.provider.ort_name.removesuffix("ExecutionProvider")
        raise ProviderError(f"{title} cannot be used: {why}", hint="Run: python -m bnfold doctor, or use --device cpu")
    return device


def open_session(
    model: str | os.PathLike[str] | bytes,
    *,
    device: Device | str = "cpu",
    optimized: bool = True,
    threads: int | None = None,
    deployed: bool = False,
    disabled_optimizers: Sequence[str] = (),
    spinning: bool = False,
    profile: Path | None = None,
    beside: Path | None = None,
) -> Session:
    """Open a model in ONNX Runtime on exactly the device asked for.

    Args:
        model: path of an ONNX file, or content.
        device: one that works, or the name of a provider; it never falls back to the CPU.
        optimized: all of ONNX Runtime's graph optimisations, or none.
        threads: for the operators of a CPU session; None leaves the choice to ONNX Runtime.
        deployed: as the runtime's own defaults have it, which let CUDA round float32 factors to 10 bits of mantissa.
        disabled_optimizers: names of single optimisations to leave out.
        profile: write a profile into a file whose name begins with this, until ``Session.end_profiling``.
        spinning: threads wait for work as the runtime's defaults have it, but only while a run lasts.
        beside: the file that content was made from: its external data lie in the same folder, and messages name it.
            Content with external data is refused without it: it has no folder.

    Raises:
        InputError: there is no such file, or its external data is missing, damaged or outside its folder.
        LowerError: the model is invalid, or ONNX Runtime does not implement it.
        ProviderError: ONNX Runtime is missing, or the session would not run on the device.
        ResourceError: the memory gave out.
    """
    return open_on(
        model, resolve_device(device), optimized=optimized, threads=threads, deployed=deployed,
        disabled_optimizers=disabled_optimizers, spinning=spinning, profile=profile, beside=beside,
    )  # fmt: skip


def cuda_problem() -> str | None:
    """Why ONNX Runtime cannot use CUDA here, in one line, or None when a probe really ran there. Found out once."""
    return problem(device_of("cuda"))


@functools.cache
def problem(device: Device) -> str | None:
    """Why ONNX Runtime cannot use a device here, in one line, or None when a probe really ran there. Found out once.

    UsageError where the provider does not know one of the device's options.
    """
    row = device.provider
    try:
        listed = listed_providers()
    except ProviderError as error:
        return str(error)
    if row.ort_name not in listed:
        installed = installed_runtimes()
        return (pip_problem() if row.package in installed else None) or row.missing() or (
            f"{' '.join(installed) or 'this onnxruntime'} has no {row.ort_name}"
            + (f"; {row.package} has it" if row.package else "")
        )  # fmt: skip
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            row.prepare()
        return probe(device)
    except UsageError:
        raise
    except Exception as error:
        what = error.what if isinstance(error, BnfoldError) else str(error)
        if "assigned to the default CPU EP" in what:
            what = "it leaves a single convolution to the CPU"
        return row.missing() or _reason(device) or what


def cpu_problem() -> str | None:
    """Why ONNX Runtime cannot run a convolution on the CPU, in one line, or None when it can."""
    try:
        return probe(device_of("cpu"))
    except BnfoldError as error:
        return str(error)


def listed_providers() -> list[str]:
    """The providers this onnxruntime was built with, which says nothing about what works here."""
    return list(onnxruntime().get_available_providers())


def probe(device: Device, *, bfloat16: bool = False) -> str | None:
    """Run one operator that needs the device's libraries to be really there; None when it came out right.

    BnfoldError where it did not run on the device.
    """
    import ml_dtypes

    fallback = device.provider.ort_name == CPU
    session = open_on(probe_model(bfloat16=bfloat16), device, threads=1, cpu_fallback=fallback)
    (result,) = session.run({"x": np.full((1, 1, 2, 2), 2, ml_dtypes.bfloat16 if bfloat16 else np.float32)})
    return None if np.array_equal(result, np.full_like(result, 6)) else "a convolution came out wrong"


@functools.cache
def has_bfloat16(device: Device) -> bool:
    """Whether the device runs a convolution in bfloat16."""
    try:
        return probe(device, bfloat16=True) is None
    except BnfoldError:
        return False


def probe_model(*, bfloat16: bool = False) -> bytes:
    """y = Conv(x, weight) with a weight of 3."""
    import ml_dtypes

    kind, opset, dtype = ("bfloat16", 22, ml_dtypes.bfloat16) if bfloat16 else ("float", 18, np.float32)
    values = f"({kind}[1,1,2,2] x) => ({kind}[1,1,2,2] y)"
    return model_of(f"{values} {{ y = Conv(x, weight) }}", opset=opset, weight=np.full((1, 1, 1, 1), 3, dtype))


# -- why not -----------------------------------------------------------------------------------------------------------


def _reason(device: Device) -> str | None:
    """What ONNX Runtime logs when it cannot make the provider: it says so nowhere else, and to the terminal.

    So it is asked again in a process of its own.
    """
    code = "from bnfold.runtime.runtime import _complain; _complain()"
    search = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(
            [sys.executable, "-c", code], input=json.dumps([device.provider.ort_name, dict(device.options)]),
            capture_output=True, text=True, check=False, timeout=120, env=os.environ | {"PYTHONPATH": search},
        )  # fmt: skip
        return logged_error(done.stderr)
    return None


def _complain() -> None:
    """The child of ``_reason``: opens a session on the provider and lets ONNX Runtime write its log."""
    name, options = json.load(sys.stdin)
    ort = onnxruntime()
    ort.set_default_logger_severity(3)
    with contextlib.suppress(Exception):
        find(name).prepare()
    with contextlib.suppress(Exception):
        ort.InferenceSession(probe_model(), providers=[(name, options), CPU], enable_fallback=0)


def logged_error(log: str) -> str | None:
    """The first error in a log of ONNX Runtime, without colours, times, places in its source and C++ signatures."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", log)
    found = re.search(r"\[E:onnxruntime:.*?\] (.*)", text)
    if found is None:
        return None
    line = re.sub(r"^.*(?:\[ERROR\] (?:\[\w+\] )?|with error: |Exception caught: )", "", found[1])
    line = re.sub(r"^/\S+:\d+ (?:[^()]*\(.*?\)(?: const)? )?", "", " ".join(line.split())).rstrip(". ")
    return line[:300] or None


# -- what pip did ------------------------------------------------------------------------------------------------------


def installed_runtimes() -> list[str]:
    """The installed distributions whose files ``import onnxruntime`` finds; more than one overwrite each other's."""
    spec = importlib.util.find_spec("onnxruntime")
    folder = Path(spec.origin).parents[1] if spec is not None and spec.origin else None
    found = []
    for name in (f"onnxruntime{ending}" for ending in _DISTRIBUTIONS):
        with contextlib.suppress(metadata.PackageNotFoundError):
            place = metadata.distribution(name).locate_file("")
            if folder is None or os.path.realpath(str(place)) == os.path.realpath(folder):
                found.append(name)
    return found


def pip_problem() -> str | None:
    """What is wrong where several distributions of ONNX Runtime share one folder, and the two commands that mend it."""
    if len(installed := installed_runtimes()) < 2:
        return None
    keep = next((name for name in reversed(installed) if name != "onnxruntime"), installed[0])
    return (
        f"{' and '.join(installed)} are installed together, and one overwrote the other: "
        f"pip uninstall -y {' '.join(installed)} && pip install {keep}"
    )


def provider_notes(device: Device) -> list[str]:
    """What someone who reads a verdict reached on ``device`` should know about this installation, a line each."""
    notes = [note for note in (pip_problem(), device.provider.notes) if note]
    if device.provider.ort_name == CPU and driver_problem() is None and (why := cuda_problem()) is not None:
        notes.append(f"there is a CUDA device, but ONNX Runtime cannot use it ({why}): run on the CPU")
    return notes
