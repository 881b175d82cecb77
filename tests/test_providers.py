"""Which providers really work, and the one line that says why one does not."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper
from onnx_parts import FLOAT, Value, serialized

from bnfold.errors import ProviderError
from bnfold.runtime import providers
from bnfold.runtime import session as sessions
from bnfold.runtime.runtime import CPU, CUDA, Array, cuda_problem

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def silent(capfd: pytest.CaptureFixture[str]) -> Any:
    """Nothing in this module may print, on either stream."""
    yield
    printed = capfd.readouterr()
    assert printed.out == "" and printed.err == ""


@pytest.fixture
def probe() -> Any:
    """cuda_problem() without what it remembers."""
    cuda_problem.cache_clear()
    yield cuda_problem
    cuda_problem.cache_clear()


@pytest.mark.parametrize(
    ("installed", "problem"),
    [
        (["onnxruntime"], "onnxruntime has no CUDA provider; onnxruntime-gpu has it"),
        (["onnxruntime", "onnxruntime-gpu"], "onnxruntime and onnxruntime-gpu are both installed"),
        ([], "this onnxruntime has no CUDA provider"),
    ],
)
def test_a_runtime_without_cuda_says_which_package(
    probe: Any, monkeypatch: pytest.MonkeyPatch, installed: list[str], problem: str
) -> None:
    def version(name: str) -> str:
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return "1.31.1"

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(sessions.onnxruntime(), "get_available_providers", lambda: [CPU])
    assert probe().startswith(problem)


@pytest.mark.parametrize(
    ("driver", "said", "problem"),
    [
        ("no driver", "", "no driver"),
        (
            None,
            "Failed to load libcublas.so.13: libcublas.so.13: cannot open",
            "the CUDA library libcublas.so.13",
        ),
        (None, "Failed to load /opt/nvidia/libcudart.so.13: damaged", "the CUDA library libcudart.so.13 cannot"),
        (None, "", "the model: asked for"),
    ],
)
def test_an_unusable_cuda_says_what_is_missing(
    probe: Any, monkeypatch: pytest.MonkeyPatch, driver: str | None, said: str, problem: str
) -> None:
    ort = sessions.onnxruntime()

    def fall_back(*_: object, **__: object) -> None:
        raise ProviderError(f"asked for {CUDA}, got {CPU}", where="the model")

    monkeypatch.setattr(ort, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(ort, "preload_dlls", lambda: print(said), raising=False)
    monkeypatch.setattr(providers, "open_on", fall_back)
    monkeypatch.setattr(providers, "driver_problem", lambda: driver)
    assert probe().startswith(problem)


@pytest.mark.parametrize(("shift", "usable"), [(0, True), (1, False)])
def test_cuda_counts_only_when_the_probe_comes_out_right(
    probe: Any, monkeypatch: pytest.MonkeyPatch, shift: float, usable: bool
) -> None:
    class Probe:
        def run(self, feeds: dict[str, Array]) -> list[Array]:
            return [3 * feeds["x"] + np.float32(shift)]

    monkeypatch.setattr(sessions.onnxruntime(), "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(sessions.onnxruntime(), "preload_dlls", lambda: None, raising=False)
    monkeypatch.setattr(providers, "open_on", lambda *_, **__: Probe())
    assert (probe() is None) is usable


def test_the_cpu_probe_really_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert providers.cpu_problem() is None
    other = [helper.make_node("Neg", ["x"], ["y"])]
    values: list[Value] = [("x", FLOAT, [1, 1, 2, 2])]
    monkeypatch.setattr(providers, "probe_model", lambda: serialized(other, values, [("y", *values[0][1:])]))
    assert "came out wrong" in str(providers.cpu_problem())
    monkeypatch.setattr(providers, "probe_model", lambda: b"no model")
    assert "refuses it" in str(providers.cpu_problem())


@pytest.mark.parametrize(
    ("installed", "driver", "cuda", "device", "notes"),
    [
        (["onnxruntime-gpu"], None, None, "cuda", []),
        (["onnxruntime-gpu"], "no driver", "no driver", "cpu", []),
        (
            ["onnxruntime-gpu"],
            None,
            "cuDNN is missing",
            "cpu",
            ["there is a CUDA device, but ONNX Runtime cannot use it"],
        ),
        (["onnxruntime-gpu"], None, None, "cpu", []),
        (["onnxruntime", "onnxruntime-gpu"], "no driver", "x", "cpu", ["onnxruntime and onnxruntime-gpu are both"]),
    ],
    ids=["cuda", "no device", "missing library", "cpu wanted", "both packages"],
)
def test_a_verdict_says_what_is_odd_about_the_installation(
    installed: list[str], driver: str | None, cuda: str | None, device: str, notes: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(providers, "installed_runtimes", lambda: installed)
    monkeypatch.setattr(providers, "driver_problem", lambda: driver)
    monkeypatch.setattr(providers, "cuda_problem", lambda: cuda)
    found = providers.provider_notes(device)
    assert len(found) == len(notes) and all(note.startswith(start) for note, start in zip(found, notes))
