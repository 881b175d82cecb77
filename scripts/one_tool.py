"""Writes one model with one tool, in a process of its own, and says what that took.

    python scripts/one_tool.py MODULE.pt TOOL OUTPUT.onnx

MODULE.pt is ``(module, args)`` from ``torch.save``; the last line printed is JSON with the peak of resident memory.
"""

from __future__ import annotations

import json
import resource
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "scripts")]

Tool = Callable[[Any, Any, Path], None]


def _bnfold(check: bool) -> Tool:
    def write(module: Any, args: Any, path: Path) -> None:
        import bnfold

        report = bnfold.export(module, path, args, device="cpu", check=check)
        assert not check or report.passed, report.check

    return write


def _torch_onnx(module: Any, args: Any, path: Path) -> None:
    import torch

    program = torch.onnx.export(module, args, dynamo=True, verbose=False, dynamic_shapes=({0: "batch"},))
    assert program is not None
    program.save(path)


def _onnxsim(module: Any, args: Any, path: Path) -> None:
    _torch_onnx(module, args, path)
    import onnx
    import onnxsim

    simplified, ok = onnxsim.simplify(onnx.load(path))
    assert ok, "onnxsim's own check failed"
    onnx.save(simplified, path)


def _onnxslim(module: Any, args: Any, path: Path) -> None:
    _torch_onnx(module, args, path)
    import onnxslim

    onnxslim.slim(str(path), str(path))


def _onnxoptimizer(module: Any, args: Any, path: Path) -> None:
    _torch_onnx(module, args, path)
    import onnx
    import onnxoptimizer

    onnx.save(onnxoptimizer.optimize(onnx.load(path), onnxoptimizer.get_fuse_and_elimination_passes()), path)


def _onnxruntime(module: Any, args: Any, path: Path) -> None:
    _torch_onnx(module, args, path)
    import onnxruntime as ort

    options = ort.SessionOptions()
    # Beyond this level files are bound to the processor that they were written on.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    written = path.with_suffix(".optimised.onnx")
    options.optimized_model_filepath = str(written)
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    shutil.move(written, path)


TOOLS: dict[str, Tool] = {
    "bnfold": _bnfold(check=False),
    "bnfold, checked": _bnfold(check=True),
    "torch.onnx": _torch_onnx,
    "torch.onnx + onnxsim": _onnxsim,
    "torch.onnx + onnxslim": _onnxslim,
    "torch.onnx + onnxoptimizer": _onnxoptimizer,
    "torch.onnx + ONNX Runtime": _onnxruntime,
}


def main() -> None:
    source, tool, output = sys.argv[1:]
    warnings.simplefilter("ignore")
    import torch

    module, args = torch.load(source, weights_only=False)
    TOOLS[tool](module, args, Path(output))
    print(json.dumps({"peak": _peak()}))


def _peak() -> int:
    """Bytes of resident memory at their peak; Linux carries ``ru_maxrss`` over from the process that started this."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
