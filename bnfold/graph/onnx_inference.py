"""onnx's shape inference in a process of its own: what its C++ asserts of a file ends that process and not this one."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import struct
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import onnx

#: What inferring shapes may take beyond what is in use already.
MEMORY, SECONDS = 1 << 30, 60
#: Before an answer: whether it is an error, and how many bytes it is.
_HEAD = struct.Struct("?Q")


def infer(models: Sequence[onnx.ModelProto], *, strict: bool) -> list[onnx.ModelProto | ValueError]:
    """The models with the types and shapes of their values, all in one process: to begin it takes longer than they do.

    Args:
        models: without weights.
        strict: a value that does not fit its operator is an error; else it is left out.

    Returns:
        An error in place of a model that onnx finds inconsistent, or fails on.
    """
    if sys.platform == "win32":
        return [_inferred(model, strict) for model in models]
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
            with os.fdopen(writing, "wb") as pipe:
                for model in models:
                    found = _inferred(model, strict)
                    failed = isinstance(found, ValueError)
                    content = str(found).encode(errors="replace") if failed else found.SerializeToString()  # type: ignore
                    pipe.write(_HEAD.pack(failed, len(content)) + content)
                    pipe.flush()
        os._exit(0)
    os.close(writing)
    answers: list[onnx.ModelProto | ValueError] = []
    try:
        with os.fdopen(reading, "rb") as pipe:
            while len(head := pipe.read(_HEAD.size)) == _HEAD.size:
                failed, size = _HEAD.unpack(head)
                content = pipe.read(size)
                if len(content) == size:
                    answers.append(ValueError(content.decode()) if failed else onnx.ModelProto.FromString(content))
    finally:
        os.waitpid(child, 0)
    return answers + [ValueError("its shape inference fails on the file") for _ in models[len(answers) :]]


def _inferred(model: onnx.ModelProto, strict: bool) -> onnx.ModelProto | ValueError:
    try:
        found: onnx.ModelProto = onnx.shape_inference.infer_shapes(model, strict_mode=strict, data_prop=strict)
    except Exception as error:  # of onnx's own, which it does not export
        return ValueError(str(error))
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
