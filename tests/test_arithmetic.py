"""What a provider computes in is told by what comes out of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn

from bnfold.gate.candidates import coarser, settings
from bnfold.graph.capture import capture
from bnfold.runtime import arithmetic as module
from bnfold.runtime.arithmetic import FLOAT32, FLOAT64, FORMATS, arithmetic, classified
from bnfold.runtime.device import CPU, Device, Provider
from bnfold.runtime.session import Array, ValueInfo, open_on

#: The CPU under another name, so that it is measured.
MEASURED = Device(Provider("measured", CPU))


def tf32(array: Array) -> Array:
    """float32 with 10 bits of mantissa, rounded to nearest."""
    bits = array.astype(np.float32).view(np.uint32)
    return ((bits + np.uint32(0xFFF) + ((bits >> 13) & 1)) & np.uint32(0xFFFFE000)).view(np.float32)


def half(array: Array) -> Array:
    with np.errstate(over="ignore"):
        return array.astype(np.float16)


ROUND: dict[str, Callable[[Array], Array]] = {
    "float32": lambda array: array.astype(np.float32),
    "tf32": tf32,
    "float16": half,
    "bfloat16": lambda array: array.astype(ml_dtypes.bfloat16),
}


class Engine:
    """Multiplies in one format and adds in float32, as tensor cores do, or with ``sums`` in the format too."""

    inputs = tuple(ValueInfo(name, np.dtype(np.float32), ()) for name in "xa")
    outputs = tuple(ValueInfo(name, np.dtype(np.float32), ()) for name in "yz")

    def __init__(self, name: str, *, sums: bool) -> None:
        self.round, self.sums = ROUND[name], sums

    def run(self, feeds: dict[str, Array]) -> list[Array]:
        weight, b = (self.round(w).astype(np.float32) for w in module._weights())
        x, a = (self.round(feeds[name]).astype(np.float32) for name in ("x", "a"))
        windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), (2, 3))
        with np.errstate(invalid="ignore"):
            found = [np.einsum("nchwij,ocij->nohw", windows, weight), a @ b]
        return [self.round(y).astype(np.float32) if self.sums else y for y in found]


@pytest.fixture(autouse=True)
def forgetful() -> Any:
    arithmetic.cache_clear()
    yield
    arithmetic.cache_clear()


@pytest.mark.parametrize("sums", [False, True])
@pytest.mark.parametrize("name", ROUND)
def test_formats_are_told_apart(name: str, sums: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "open_on", lambda *_, **__: Engine(name, sums=sums))
    assert arithmetic(MEASURED) == FORMATS[name]


def test_the_cpu_computes_in_the_models_own_dtype_measured_or_not() -> None:
    assert arithmetic(MEASURED) == arithmetic(Device(Provider("cpu", CPU))) == FLOAT32
    assert arithmetic(MEASURED, double=True) == arithmetic(Device(Provider("cpu", CPU)), double=True) == FLOAT64


def test_as_deployed_is_measured_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "open_on", lambda *_, deployed: Engine("tf32" if deployed else "float32", sums=False))
    assert arithmetic(MEASURED) == FLOAT32 and arithmetic(MEASURED, deployed=True) == FORMATS["tf32"]


def test_what_is_coarser_than_any_format_keeps_its_own_roundoff() -> None:
    found = classified(2.0**-5, overflows=False)
    assert found.name == "less than 8 bits" and found.unit_roundoff >= 2.0**-5


def test_the_truth_of_the_probe_is_that_of_its_model() -> None:
    random = np.random.default_rng(3)
    feeds = {"x": random.standard_normal((2, 16, 9, 9)), "a": random.standard_normal((24, 144))}
    feeds = {name: array.astype(np.float32) for name, array in feeds.items()}
    largest = max(float(np.abs(array).max()) for array in (*feeds.values(), *module._weights()))
    for double in (False, True):
        found = module._run(open_on(module._model(double=double), MEASURED), feeds)
        assert set(found) == ({"z"} if double else {"y", "z"})
        for name, array in found.items():
            bound = 145 * (2.0**-53 if double else 2.0**-24) * 144 * largest**2  # of any order of summation
            np.testing.assert_allclose(array, module._truth(feeds)[name], rtol=0, atol=bound)


@pytest.mark.parametrize(
    ("dtype", "name", "times"),
    [
        (torch.float32, "float32", 1.0), (torch.float32, "tf32", 2.0**13), (torch.float32, "bfloat16", 2.0**16),
        (torch.float16, "float32", 1.0), (torch.float16, "tf32", 1.0), (torch.float16, "bfloat16", 8.0),
        (torch.bfloat16, "float16", 1.0), (torch.float64, "float32", 2.0**29), (torch.float64, "float64", 1.0),
    ],
)  # fmt: skip
def test_coarseness_is_relative_to_the_models_own_dtype(dtype: torch.dtype, name: str, times: float) -> None:
    program = capture(nn.Linear(3, 2).to(dtype), (torch.ones(2, 3, dtype=dtype),)).program
    assert coarser(FORMATS[name], program) == times


def test_a_device_that_is_as_fine_as_the_model_is_asked_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    half = capture(nn.Linear(3, 2).half(), (torch.ones(2, 3, dtype=torch.float16),)).program
    single = capture(nn.Linear(3, 2), (torch.ones(2, 3),)).program
    monkeypatch.setattr(module, "open_on", lambda *_, **__: Engine("tf32", sums=False))
    assert [s.device for s in settings(MEASURED, half)] == [MEASURED]
    assert [s.device.provider.name for s in settings(MEASURED, single)] == ["cpu", "measured"]
