"""The device asked for, or one line that says why not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from onnx import helper
from onnx_parts import FLOAT, X, adder, encode, serialized

from bnfold.errors import ProviderError
from bnfold.runtime import runtime as providers
from bnfold.runtime import session as sessions
from bnfold.runtime.runtime import CPU, CUDA, cuda_problem, device_of, open_session, resolve_device

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def silent(capfd: pytest.CaptureFixture[str]) -> Any:
    """Nothing in this module may print, on either stream."""
    yield
    printed = capfd.readouterr()
    assert printed.out == "" and printed.err == ""


def test_a_session_that_fell_back_is_refused() -> None:
    if cuda_problem() is None:
        pytest.skip("CUDA works here: nothing falls back")
    if CUDA not in sessions.onnxruntime().get_available_providers():
        pytest.skip("this onnxruntime does not know CUDA at all")
    with pytest.raises(ProviderError, match=f"asked for {CUDA}, got {CPU}"):
        open_session(encode(adder()), device=device_of("cuda"))


def test_cuda_is_refused_with_its_reason_and_auto_takes_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "problem", lambda device: "no NVIDIA driver")
    assert resolve_device("auto") == resolve_device("cpu") == device_of("cpu")
    for refused in (lambda: resolve_device("cuda"), lambda: open_session(encode(adder()), device="cuda")):
        with pytest.raises(ProviderError, match=r"cannot be used: no NVIDIA driver\. Run: python -m bnfold doctor"):
            refused()


def test_auto_takes_cuda_where_it_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "problem", lambda device: None)
    assert resolve_device("auto") == resolve_device("cuda") == device_of("cuda")
    assert resolve_device("cpu") == device_of("cpu")


def test_a_missing_onnxruntime_is_a_provider_error() -> None:
    script = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.modules['onnxruntime'] = None\n"
        "from bnfold.runtime.runtime import cuda_problem, open_session\n"
        "print(cuda_problem())\n"
        "try:\n    open_session(b'')\nexcept Exception as error:\n    print(type(error).__name__, error)\n"
    )
    first, second = subprocess.check_output([sys.executable, "-c", script], text=True).splitlines()
    assert "onnxruntime cannot be imported" in first and "pip install" in first
    assert second.startswith("ProviderError onnxruntime cannot be imported")


def test_importing_the_module_loads_no_framework() -> None:
    script = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import bnfold.runtime.runtime\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'onnx', 'onnxruntime')))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


# --- CUDA -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def cuda() -> None:
    if problem := cuda_problem():
        pytest.skip(problem)


@pytest.mark.cuda
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("optimized", [True, False])
def test_a_cuda_session_runs_on_cuda(optimized: bool) -> None:
    session = open_session(encode(adder()), device="cuda", optimized=optimized)
    assert session.provider == CUDA and resolve_device("auto") == device_of("cuda")
    total, relu = session.run({"x": X})
    assert type(total) is np.ndarray
    np.testing.assert_array_equal(total, X + np.array([-1, 0, 1], np.float32))
    np.testing.assert_array_equal(relu, np.maximum(total, 0))


@pytest.mark.cuda
@pytest.mark.usefixtures("cuda")
def test_tf32_is_off_unless_asked_for() -> None:
    values = np.random.default_rng(0).standard_normal((256, 256)).astype(np.float32)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    model = serialized(nodes, [("x", FLOAT, ["N", 256])], [("y", FLOAT, ["N", 256])], {"w": values})
    truth = values.astype(np.float64) @ values.astype(np.float64)
    error = {}
    for tf32 in (False, True):
        (result,) = open_session(model, device="cuda", deployed=tf32).run({"x": values})
        error[tf32] = np.sqrt(np.mean((result - truth) ** 2) / np.mean(truth**2))
    assert error[False] < 2e-6, "float32 sums of 256 products"
    # Only devices of compute capability 8.0 and later have TF32; elsewhere the two are the same.
    assert error[True] > 1e-5 or error[True] == error[False]


@pytest.mark.cuda
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_on_cuda(dtype: Any) -> None:
    onnx_type = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    nodes = [helper.make_node("Add", ["x", "x"], ["y"])]
    session = open_session(serialized(nodes, [("x", onnx_type, ["N", 4])], [("y", onnx_type, ["N", 4])]), device="cuda")
    given = np.arange(8).reshape(2, 4).astype(dtype)
    (result,) = session.run({"x": given})
    assert result.dtype == given.dtype
    np.testing.assert_array_equal(result, given + given)
