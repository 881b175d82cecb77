"""Files on which ONNX Runtime may end the process while it optimises them are opened by another process first.

Half floats have no convolution of their own on a CPU. With what optimisations make of that in place, ONNX Runtime 1.31
ends the process on nets of a convolution, a recurrent layer and a product behind it, and nothing could be said of them.
"""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from bnfold.runtime.model_file import has_initializer_of

#: TensorProto.FLOAT16, TensorProto.BFLOAT16.
HALVES = frozenset({10, 16})
#: Seconds after which it hangs, and bytes of the file that take one more.
PATIENCE, BYTES = 60, 10**7
_OPEN = """
import sys, onnxruntime as ort
options = ort.SessionOptions()
options.log_severity_level = 4
ort.InferenceSession(sys.argv[1], options, ["CPUExecutionProvider"], disabled_optimizers=set(sys.argv[2:]))
"""


def how_it_ends(path: Path, disabled: Sequence[str] = ()) -> str | None:
    """How a process ends that opens a file of half floats on the CPU, in words; None where it goes on.

    An error that ONNX Runtime raises is none: whoever opens the file meets it too.

    Args:
        path: an ONNX file.
        disabled: names of optimisations to leave out.
    """
    embedded = not sys.executable or getattr(sys, "frozen", False)  # there is no Python to start
    if embedded or not has_initializer_of(path, HALVES):
        return None
    found = path.stat()
    return _tried(os.fspath(path), found.st_mtime_ns, found.st_size, tuple(disabled))


@functools.lru_cache(maxsize=64)
def _tried(path: str, changed: int, size: int, disabled: tuple[str, ...]) -> str | None:
    # Of the same libraries, and none that lies in the current folder.
    paths = os.pathsep.join(entry for entry in sys.path if entry)
    patience = PATIENCE + size / BYTES
    try:
        ended = subprocess.run(
            [sys.executable, "-P", "-c", _OPEN, path, *disabled], env={**os.environ, "PYTHONPATH": paths},
            stdin=subprocess.DEVNULL, capture_output=True, timeout=patience, check=False,
        ).returncode  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"takes more than {patience:.0f} seconds"
    return f"ends the process ({signal.Signals(-ended).name})" if ended < 0 else None
