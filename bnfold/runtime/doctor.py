"""Facts for ``python -m bnfold doctor``: what is installed, what really works, and what to do about the rest.

A problem keeps bnfold from doing its work, or makes ONNX Runtime pretend something; a note is worth knowing.
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from bnfold._version import __version__
from bnfold.runtime import runtime

if TYPE_CHECKING:
    from packaging.requirements import Requirement


@dataclass(frozen=True)
class Finding:
    """One fact about this installation."""

    #: "ok", "note" (works, but worth knowing) or "problem" (something does not work).
    level: Literal["ok", "note", "problem"]
    what: str  #: the fact, in one line.
    hint: str | None = None  #: what the user can do about it, if anything.


def examine() -> list[Finding]:
    """Examine this installation. Never raises: what fails is a finding. Takes seconds: it imports torch and runs it."""
    findings = [Finding("ok", f"bnfold {__version__}, Python {platform.python_version()}, {platform.platform()}")]
    for check in (_packages, _runtimes, _torch_cpu, _torch_cuda, _runtime_cpu, _providers):
        findings += _guarded(check)
    return findings


def _guarded(check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    try:
        yield from check()
    except Exception as error:
        name = check.__name__.strip("_").replace("_", " ")
        yield Finding("problem", f"{name}: {type(error).__name__}: {' '.join(str(error).split())}", _reinstall(name))


def _reinstall(name: str) -> str:
    package = "torch" if name.startswith("torch") else " ".join(runtime.installed_runtimes()) or "onnxruntime-gpu"
    return f"Reinstall it: pip install --force-reinstall {package}"


def _packages() -> Iterator[Finding]:
    """Every package that bnfold's own metadata requires here, its version against the required minimum."""
    from packaging.requirements import Requirement  # it comes with onnxruntime

    try:
        required = importlib.metadata.requires("bnfold") or []
    except importlib.metadata.PackageNotFoundError:
        yield Finding("note", "bnfold runs from a folder and is not installed", "Install it: pip install -e .")
        return
    for requirement in map(Requirement, required):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield _package(requirement)


def _package(requirement: Requirement) -> Finding:
    name = requirement.name
    wanted = f"{name}{requirement.specifier}"
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        others = [other for other in runtime.installed_runtimes() if other != name]
        if name.startswith("onnxruntime") and others:
            return Finding("note", f"{others[0]} {importlib.metadata.version(others[0])} stands in for {name}")
        return Finding("problem", f"{name} is missing", f"Install it: pip install '{wanted}'")
    if not requirement.specifier.contains(version, prereleases=True):
        return Finding("problem", f"{name} {version} is not what bnfold needs", f"Update it: pip install '{wanted}'")
    return Finding("ok", f"{name} {version}")


def _runtimes() -> Iterator[Finding]:
    if problem := runtime.pip_problem():
        what, _, commands = problem.partition(": ")
        yield Finding("problem", what, f"Keep one: {commands}")


def _torch_cpu() -> Iterator[Finding]:
    import torch

    with torch.no_grad():
        result = torch.nn.functional.conv2d(torch.full((1, 1, 2, 2), 2.0), torch.full((1, 1, 1, 1), 3.0))
    if not torch.equal(result, torch.full((1, 1, 2, 2), 6.0)):
        yield Finding("problem", "torch computes a convolution wrongly on the CPU", _reinstall("torch"))
    else:
        yield Finding("ok", f"torch runs on the CPU, {torch.get_num_threads()} threads")


def _torch_cuda() -> Iterator[Finding]:
    import torch

    if torch.version.cuda is None:
        yield Finding("note", "torch is built without CUDA")
    elif not torch.cuda.is_available():
        yield Finding("note", f"torch is built for CUDA {torch.version.cuda} and sees no device")
    else:
        name, memory = torch.cuda.get_device_name(0), torch.cuda.get_device_properties(0).total_memory
        yield Finding("ok", f"torch sees {name}, {memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}")


def _runtime_cpu() -> Iterator[Finding]:
    if problem := runtime.cpu_problem():
        yield Finding("problem", f"ONNX Runtime does not work on the CPU: {problem}", _reinstall("onnxruntime"))
    else:
        yield Finding("ok", "ONNX Runtime runs on the CPU")


def _providers() -> Iterator[Finding]:
    """What ONNX Runtime can really use, provider by provider, and what is missing for the others."""
    listed, rows = runtime.listed_providers(), runtime.PROVIDERS[1:]
    others = [name for name in listed if name not in {row.ort_name for row in runtime.PROVIDERS}]
    for row in (*rows, *(runtime.device_of(name).provider for name in others)):
        problem = runtime.problem(runtime.Device(row))
        if problem is None:
            yield Finding("ok", f"ONNX Runtime runs on {row.name}")
        elif row.ort_name == runtime.CUDA and runtime.driver_problem() is None:
            package = "'onnxruntime-gpu[cuda,cudnn]'" if row.ort_name in listed else "onnxruntime-gpu"
            yield Finding(
                "problem",
                f"this machine has a GPU that ONNX Runtime cannot use: {problem}",
                f"Install what it lacks: pip install {package}",
            )
        else:
            shown = "ONNX Runtime lists it, and it cannot be used: " if row.ort_name in listed else ""
            yield Finding(
                "note", f"no {row.name} here: {shown}{problem}", f"It needs {row.needs}" if row.needs else None
            )
