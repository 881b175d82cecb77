"""Which providers really work, and the one line that says why one does not."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from onnx import helper
from onnx_parts import FLOAT, Value, serialized

from bnfold.errors import BnfoldError, ProviderError, UsageError
from bnfold.runtime import runtime as providers
from bnfold.runtime import session as sessions
from bnfold.runtime.runtime import CPU, CUDA, PROVIDERS, Array, Device, Provider, cuda_problem, resolve_device

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def silent(capfd: pytest.CaptureFixture[str]) -> Any:
    """Nothing in this module may print, on either stream."""
    yield
    printed = capfd.readouterr()
    assert printed.out == "" and printed.err == ""


@pytest.fixture(autouse=True)
def forgetful() -> Any:
    """Nothing is remembered of other tests' providers."""
    for found_once in (providers.problem, providers.has_bfloat16):
        found_once.cache_clear()
    yield
    for found_once in (providers.problem, providers.has_bfloat16):
        found_once.cache_clear()


def install(monkeypatch: pytest.MonkeyPatch, names: list[str], elsewhere: tuple[str, ...] = ()) -> None:
    """As if these distributions were where onnxruntime is imported from, and those ``elsewhere`` in another folder."""
    here = Path(sessions.onnxruntime().__file__).parents[1]

    class Distribution:
        def __init__(self, name: str) -> None:
            self.folder = here if name in names else ROOT

        def locate_file(self, _: str) -> Path:
            return self.folder

    def distribution(name: str) -> Distribution:
        if name not in (*names, *elsewhere):
            raise metadata.PackageNotFoundError(name)
        return Distribution(name)

    monkeypatch.setattr(metadata, "distribution", distribution)


# -- rows --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", PROVIDERS, ids=lambda row: row.name)
def test_a_provider_answers_to_its_name_and_to_that_of_onnx_runtime(row: Provider) -> None:
    names = (row.name, row.ort_name, row.ort_name.upper(), row.ort_name.removesuffix("ExecutionProvider"))
    assert all(providers.find(name) is row for name in names)
    assert row.package and (row.needs or row.ort_name == CPU)
    assert row.ort_name in sessions.onnxruntime().get_all_providers()


def test_every_provider_that_onnx_runtime_knows_is_found() -> None:
    for name in sessions.onnxruntime().get_all_providers():
        assert providers.find(name).ort_name == name
    with pytest.raises(
        UsageError, match=r"there is no execution provider 'tpu'.*Use auto, cpu, cuda, tensorrt, openvino"
    ):
        providers.find("tpu")


def test_the_users_options_come_after_the_rows_own() -> None:
    row = Provider("p", CUDA, {"use_tf32": "0", "other": "1"})
    device = Device(row, (("use_tf32", "1"), ("device_id", "3")))
    assert device.provider_options() == {"use_tf32": "1", "other": "1", "device_id": "3"}
    assert device.provider_options(deployed=True) == {"use_tf32": "1", "device_id": "3"}
    assert str(device) == f"{CUDA} use_tf32=1 device_id=3"
    assert hash(device) == hash(Device(row, device.options)) and device != Device(row)


def test_only_the_bare_cpu_is_the_cpu() -> None:
    assert resolve_device("cpu").is_cpu and resolve_device("CPUExecutionProvider").is_cpu
    assert not resolve_device("cpu", {"arena_extend_strategy": "kSameAsRequested"}).is_cpu
    with pytest.raises(UsageError, match="options belong to one provider"):
        resolve_device("auto", {"use_tf32": "1"})


# -- what works --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("installed", "problem"),
    [
        (["onnxruntime"], "onnxruntime has no CUDAExecutionProvider; onnxruntime-gpu has it"),
        (["onnxruntime", "onnxruntime-gpu"], "onnxruntime and onnxruntime-gpu are installed together"),
        ([], "this onnxruntime has no CUDAExecutionProvider"),
    ],
)
def test_a_runtime_without_cuda_says_which_package(
    monkeypatch: pytest.MonkeyPatch, installed: list[str], problem: str
) -> None:
    install(monkeypatch, installed)
    cuda = replace(providers.find(CUDA), missing=lambda: None)
    monkeypatch.setattr(sessions.onnxruntime(), "get_available_providers", lambda: [CPU])
    assert str(providers.problem(Device(cuda))).startswith(problem)


@pytest.mark.parametrize(
    ("driver", "logged", "problem"),
    [
        ("no driver", "the log", "no driver"),
        (None, "libcublas.so.13: cannot open", "libcublas.so.13: cannot open"),
        (None, None, "asked for"),
    ],
)
def test_an_unusable_provider_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, driver: str | None, logged: str | None, problem: str
) -> None:
    def fall_back(*_: object, **__: object) -> None:
        raise ProviderError(f"asked for {CUDA}, got {CPU}", where="the model")

    cuda = replace(providers.find(CUDA), missing=lambda: driver, prepare=lambda: print("not found"))
    monkeypatch.setattr(sessions.onnxruntime(), "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(providers, "open_on", fall_back)
    monkeypatch.setattr(providers, "_reason", lambda device: logged)
    assert str(providers.problem(Device(cuda))).startswith(problem)


@pytest.mark.parametrize(("shift", "usable"), [(0, True), (1, False)])
def test_a_provider_counts_only_when_the_probe_comes_out_right(
    monkeypatch: pytest.MonkeyPatch, shift: float, usable: bool
) -> None:
    class Probe:
        def run(self, feeds: dict[str, Array]) -> list[Array]:
            return [3 * feeds["x"] + np.float32(shift)]

    monkeypatch.setattr(sessions.onnxruntime(), "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(sessions.onnxruntime(), "preload_dlls", lambda: None, raising=False)
    monkeypatch.setattr(providers, "open_on", lambda *_, **__: Probe())
    assert (cuda_problem() is None) is usable


@pytest.mark.parametrize(("fallback", "named"), [(True, [CUDA, CPU]), (False, [CUDA])])
def test_a_session_that_may_not_fall_back_does_not_name_the_cpu(
    monkeypatch: pytest.MonkeyPatch, fallback: bool, named: list[str]
) -> None:
    """ONNX Runtime refuses one that does, so that no provider would ever be usable."""
    asked: list[str] = []

    def note(*_: object, providers: list[Any], **__: object) -> None:
        asked.extend(p if isinstance(p, str) else p[0] for p in providers)
        raise RuntimeError

    monkeypatch.setattr(sessions.onnxruntime(), "InferenceSession", note)
    with pytest.raises(BnfoldError):
        sessions.open_on(b"", providers.device_of("cuda"), cpu_fallback=fallback)
    assert asked == named


def test_an_option_that_a_provider_does_not_know_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("/x.cc:10 void f(int) Invalid OpenVINO EP option: bogus")

    monkeypatch.setattr(sessions.onnxruntime(), "InferenceSession", refuse)
    with pytest.raises(UsageError, match="--provider-option: Invalid OpenVINO EP option: bogus"):
        sessions.open_on(b"", Device(Provider("p", CPU), (("bogus", "1"),)))


LOGS = {
    "Device GPU is not available": (
        "\x1b[1;31m2026-11-30 07:18:49.4 [E:onnxruntime:Default, provider_bridge_ort.cc:2310 Create] /onnxruntime/core/"
        "openvino_provider_factory.cc:141 std::string ParseDeviceType(std::shared_ptr<OVCore>, const Options&) [ERROR] "
        "[OpenVINO] Device GPU is not available\n\x1b[m\n\x1b[0;93m2026 [W:onnxruntime:Default, x.cc:1 f] Failed"
    ),
    "libnvinfer.so.10: cannot open shared object file: No such file or directory": (
        "Failed to load x\n2026 [E:onnxruntime:Default, provider_bridge_ort.cc:2430 operator()] /src/session/"
        "provider_bridge_ort.cc:2043 onnxruntime::Provider& onnxruntime::ProviderLibrary::Get() [ONNXRuntimeError] : "
        "1 : FAIL : Failed to load library /a/libonnxruntime_providers_tensorrt.so with error: libnvinfer.so.10: "
        "cannot open shared object file: No such file or directory\n"
    ),
    None: "2026 [W:onnxruntime:Default, x.cc:1 f] a warning\n",
}  # fmt: skip


@pytest.mark.parametrize("reason", LOGS)
def test_the_reason_is_read_off_the_log(reason: str | None) -> None:
    assert providers.logged_error(LOGS[reason]) == reason


def test_the_log_is_really_read() -> None:
    """A provider of this package that cannot be loaded here says why in a process of its own."""
    listed = [name for name in providers.listed_providers() if name != CPU]
    absent = next((name for name in listed if providers.problem(providers.device_of(name)) is not None), None)
    if absent is None:
        pytest.skip("every provider of this onnxruntime works here")
    assert providers._reason(providers.device_of(absent))


def test_the_cpu_probe_really_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert providers.cpu_problem() is None
    other = [helper.make_node("Neg", ["x"], ["y"])]
    values: list[Value] = [("x", FLOAT, [1, 1, 2, 2])]
    wrong = serialized(other, values, [("y", *values[0][1:])])
    monkeypatch.setattr(providers, "probe_model", lambda **_: wrong)
    assert "came out wrong" in str(providers.cpu_problem())
    monkeypatch.setattr(providers, "probe_model", lambda **_: b"no model")
    assert "refuses it" in str(providers.cpu_problem())


def test_bfloat16_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = providers.device_of("cpu")
    try:
        known = providers.probe(cpu, bfloat16=True) is None
    except BnfoldError:
        known = False
    assert providers.has_bfloat16(cpu) is known


# -- what pip did ------------------------------------------------------------------------------------------------------


def test_two_distributions_in_one_folder_are_told_with_the_commands_that_mend_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch, ["onnxruntime-gpu"], elsewhere=("onnxruntime-openvino",))
    assert providers.installed_runtimes() == ["onnxruntime-gpu"] and providers.pip_problem() is None
    install(monkeypatch, ["onnxruntime", "onnxruntime-gpu"])
    said = str(providers.pip_problem())
    assert "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu" in said


def test_what_pip_left_of_a_package_is_no_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    sessions.onnxruntime.cache_clear()
    monkeypatch.setitem(sys.modules, "onnxruntime", ModuleType("onnxruntime"))
    try:
        with pytest.raises(ProviderError, match=r"cannot be imported.*pip install --force-reinstall"):
            sessions.onnxruntime()
    finally:
        sessions.onnxruntime.cache_clear()


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
        (["onnxruntime", "onnxruntime-gpu"], "no driver", "x", "cpu", ["onnxruntime and onnxruntime-gpu are inst"]),
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
    found = providers.provider_notes(providers.device_of(device))
    assert len(found) == len(notes) and all(note.startswith(start) for note, start in zip(found, notes))
