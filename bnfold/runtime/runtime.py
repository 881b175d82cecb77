"""ONNX Runtime as the rest of bnfold sees it: a session on exactly the device asked for, or why there is none."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from bnfold.errors import ProviderError
from bnfold.runtime.providers import (
    cpu_problem,
    cuda_problem,
    driver_problem,
    installed_runtimes,
    listed_providers,
    provider_notes,
)
from bnfold.runtime.session import CPU, CUDA, Array, Session, ValueInfo, open_on

__all__ = [
    "CPU",
    "CUDA",
    "Array",
    "Session",
    "ValueInfo",
    "cpu_problem",
    "cuda_problem",
    "driver_problem",
    "installed_runtimes",
    "listed_providers",
    "open_session",
    "provider_notes",
    "resolve_device",
]


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
    spinning: bool = False,
    profile: Path | None = None,
    beside: Path | None = None,
) -> Session:
    """Open a model in ONNX Runtime on exactly the device asked for.

    Args:
        model: path of an ONNX file, or content.
        device: "cuda" never falls back to the CPU.
        optimized: all of ONNX Runtime's graph optimisations, or none.
        threads: for the operators of a CPU session; None leaves the choice to ONNX Runtime.
        tf32: let CUDA round float32 factors to 10 bits of mantissa, as the runtime does by default.
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
    if device == "cuda" and (problem := cuda_problem()) is not None:
        raise _no_cuda(problem)
    return open_on(
        model, device, optimized=optimized, threads=threads, tf32=tf32, disabled_optimizers=disabled_optimizers,
        spinning=spinning, profile=profile, beside=beside,
    )  # fmt: skip


def _no_cuda(problem: str) -> ProviderError:
    return ProviderError(f"CUDA cannot be used: {problem}", hint="Run: python -m bnfold doctor, or use --device cpu")
