"""ONNX Runtime as the rest of bnfold sees it: a session on exactly the device asked for, or why there is none."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from bnfold.runtime.arithmetic import FLOAT32, FORMATS, Arithmetic, arithmetic
from bnfold.runtime.device import CPU, CUDA, Device, Provider
from bnfold.runtime.providers import (
    PROVIDERS,
    cpu_problem,
    cuda_problem,
    device_of,
    driver_problem,
    has_bfloat16,
    installed_runtimes,
    listed_providers,
    pip_problem,
    problem,
    provider_notes,
    resolve_device,
)
from bnfold.runtime.session import Array, Session, ValueInfo, open_on


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
