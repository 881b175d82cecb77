"""Files on which ONNX Runtime ends the process are told, and what of it does that; everyone else meets no trial."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import bnfold
from bnfold.errors import LowerError
from bnfold.runtime import trial
from bnfold.runtime.runtime import open_session

#: Ends itself as ONNX Runtime does, but without an optimisation that is named.
DIES = """
import os, signal, sys
if "NchwcTransformer" not in sys.argv[2:]:
    os.kill(os.getpid(), signal.SIGSEGV)
"""


@pytest.fixture
def opens(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    def opens_by(code: str) -> None:
        trial._tried.cache_clear()
        monkeypatch.setattr(trial, "_OPEN", code)

    return opens_by


def scaled(path: Path, dtype: int, *, inside: bool = False) -> Path:
    """x times a constant, which is an initializer or (``inside``) that of a node."""
    kind = helper.tensor_dtype_to_np_dtype(dtype)
    held = numpy_helper.from_array(np.array([1.5, 2.5, 3.0], kind), "w")
    nodes = [helper.make_node("Mul", ["x", "w"], ["y"])]
    if inside:
        nodes.insert(0, helper.make_node("Constant", [], ["w"], value=held))
    values = [helper.make_tensor_value_info(name, dtype, ["n", 3]) for name in "xy"]
    graph = helper.make_graph(nodes, "scaled", values[:1], values[1:], [] if inside else [held])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def test_half_floats_are_tried_and_nothing_else(
    opens: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    half, single = scaled(tmp_path / "half.onnx", TensorProto.FLOAT16), scaled(tmp_path / "f.onnx", TensorProto.FLOAT)
    assert trial.how_it_ends(half) is None
    opens(DIES)
    assert trial.how_it_ends(half) == "ends the process (SIGSEGV)"
    assert trial.how_it_ends(half, ["GeluFusionL1"]) == "ends the process (SIGSEGV)"
    assert trial.how_it_ends(half, ["NchwcTransformer"]) is None
    assert trial.how_it_ends(single) is None
    assert trial.how_it_ends(scaled(tmp_path / "in.onnx", TensorProto.FLOAT16, inside=True)) is None
    with monkeypatch.context() as patch:
        patch.setattr(trial.sys, "executable", "")
        assert trial.how_it_ends(half) is None
    (tmp_path / "broken.onnx").write_bytes(half.read_bytes()[:-20])
    assert trial.how_it_ends(tmp_path / "broken.onnx") is None


def test_one_that_hangs_is_told(opens: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    opens("import time; time.sleep(60)")
    monkeypatch.setattr(trial, "PATIENCE", 0.2)
    assert trial.how_it_ends(scaled(tmp_path / "half.onnx", TensorProto.FLOAT16)) == "takes more than 0 seconds"


def test_nothing_of_the_current_folder_is_imported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trial._tried.cache_clear()
    (tmp_path / "onnxruntime.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    assert trial.how_it_ends(scaled(tmp_path / "half.onnx", TensorProto.FLOAT16)) is None


def test_sessions_say_so(opens: Callable[[str], None], tmp_path: Path) -> None:
    half = scaled(tmp_path / "half.onnx", TensorProto.FLOAT16)
    opens(DIES)
    with pytest.raises(LowerError, match=r"ends the process \(SIGSEGV\) while it optimises half.onnx"):
        open_session(half)
    open_session(half, optimized=False)
    open_session(half, disabled_optimizers=["NchwcTransformer"])


def test_the_gate_says_whose_fault_it_is(opens: Callable[[str], None], tmp_path: Path) -> None:
    module = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU()).half()
    args = (torch.randn(2, 3, 7, 5).half(),)
    assert bnfold.export(module, tmp_path / "net.onnx", args).passed
    opens(DIES)
    report = bnfold.check(tmp_path / "net.onnx", module, args)
    assert report.verdict == "fail"
    assert "ends the process" in report.problems[0]
    assert "its optimisation NchwcTransformer" in report.problems[1]
