"""onnx's shape inference in a process of its own: what its C++ asserts of a file ends that process and not this one."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import warnings
from pathlib import Path

import onnx

#: What inferring shapes may take beyond what is in use already.
MEMORY, SECONDS = 4 << 30, 60


def infer(model: onnx.ModelProto, *, strict: bool) -> onnx.ModelProto:
    """The model with the types and shapes of its values.

    Args:
        model: without weights.
        strict: a value that does not fit its operator is an error; else it is left out.

    Raises:
        ValueError: onnx finds the model inconsistent, or fails on it.
    """
    if sys.platform == "win32":
        return _inferred(model, strict)
    content = model.SerializeToString()
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads: none of them is needed below
        child = os.fork()
    if not child:
        # Nothing of the parent's is collected here: a session would wait for threads that this process has not.
        gc.disable()
        with contextlib.suppress(BaseException):
            os.close(reading)
            _limit()
            try:
                answer = b"+" + _inferred(onnx.ModelProto.FromString(content), strict).SerializeToString()
            except Exception as error:
                answer = b"-" + str(error).encode(errors="replace")
            with os.fdopen(writing, "wb") as pipe:
                pipe.write(answer)
        os._exit(0)
    os.close(writing)
    try:
        with os.fdopen(reading, "rb") as pipe:
            answer = pipe.read()
    finally:
        os.waitpid(child, 0)
    if answer[:1] != b"+":
        raise ValueError(answer[1:].decode() or "its shape inference fails on the file")
    found: onnx.ModelProto = onnx.ModelProto.FromString(answer[1:])
    return found


def _inferred(model: onnx.ModelProto, strict: bool) -> onnx.ModelProto:
    try:
        found: onnx.ModelProto = onnx.shape_inference.infer_shapes(model, strict_mode=strict, data_prop=strict)
    except Exception as error:  # of onnx's own, which it does not export
        raise ValueError(str(error)) from error
    return found


def _limit() -> None:
    """No more memory and time than shapes can need, no core and no word of a failed assertion."""
    import resource

    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(SECONDS)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    with contextlib.suppress(OSError, ValueError, IndexError):
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        if hard == resource.RLIM_INFINITY or used + MEMORY < hard:
            resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
