"""The doctor states facts: each failure becomes a finding with its way out, and no GPU is no problem."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bnfold.runtime import doctor, runtime
from bnfold.runtime.doctor import Finding, examine

ROOT = Path(__file__).parent.parent


def find(findings: list[Finding], text: str) -> Finding:
    (found,) = [finding for finding in findings if text in finding.what]
    return found


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Finding]]:
    """Findings about packages for a made-up installation: versions by name, and bnfold's requirements."""

    def examine_packages(installed: dict[str, str], *requires: str) -> list[Finding]:
        def version(name: str) -> str:
            if name not in installed:
                raise importlib.metadata.PackageNotFoundError(name)
            return installed[name]

        monkeypatch.setattr(importlib.metadata, "version", version)
        runtimes = [name for name in installed if name.startswith("onnxruntime")]
        monkeypatch.setattr(runtime, "installed_runtimes", lambda: sorted(runtimes))
        monkeypatch.setattr(importlib.metadata, "requires", lambda _: list(requires))
        return [*doctor._packages(), *doctor._runtimes()]

    return examine_packages


def test_this_installation_is_examined_without_printing(capfd: pytest.CaptureFixture[str]) -> None:
    findings = examine()
    whats = [finding.what for finding in findings]
    assert all("\n" not in what for what in whats) and len(set(whats)) == len(whats)
    for package in ("torch", "onnx", "onnxscript", "onnxsim", "numpy", "safetensors", "click", "rich"):
        version = importlib.metadata.version(package)
        assert find(findings, f"{package} {version}").level == "ok"
    assert find(findings, "torch runs on the CPU").level == "ok"
    assert find(findings, "ONNX Runtime runs on the CPU").level == "ok"
    assert f"Python {sys.version_info.major}.{sys.version_info.minor}" in whats[0]
    assert not any("pytest" in what for what in whats), "extras are not required"
    assert capfd.readouterr() == ("", "")


def test_problems_and_only_problems_need_a_way_out() -> None:
    for finding in examine():
        assert finding.level != "problem" or finding.hint


@pytest.mark.parametrize(
    ("installed", "requirement", "level", "what", "hint"),
    [
        ({"torch": "2.13.0+cpu"}, "torch>=2.11", "ok", "torch 2.13.0+cpu", None),
        ({"torch": "2.11"}, "torch>=2.11.0", "ok", "torch 2.11", None),
        (
            {"torch": "2.9.1"},
            "torch>=2.11",
            "problem",
            "torch 2.9.1 is not what bnfold needs",
            "pip install 'torch>",
        ),
        ({}, "torch>=2.11", "problem", "torch is missing", "pip install 'torch>=2.11'"),
        ({}, "click", "problem", "click is missing", "pip install 'click'"),
        ({}, 'torch>=2.11; sys_platform in "linux darwin win32"', "problem", "torch is missing", "pip install"),
        ({"onnxruntime": "1.31.1"}, "onnxruntime-gpu>=1.23", "note", "onnxruntime 1.31.1 stands in for", None),
    ],
)
def test_packages(
    packages: Callable[..., list[Finding]],
    installed: dict[str, str],
    requirement: str,
    level: str,
    what: str,
    hint: str | None,
) -> None:
    (finding,) = packages(installed, requirement)
    assert finding.level == level and finding.what.startswith(what)
    assert hint in (finding.hint or "") if hint else finding.hint is None


@pytest.mark.parametrize("requirement", ['pytest>=8; extra == "test"', 'torch; sys_platform == "plan9"'])
def test_what_is_not_required_here_is_not_missed(packages: Callable[..., list[Finding]], requirement: str) -> None:
    assert packages({}, requirement) == []


def test_two_runtimes_are_a_problem(packages: Callable[..., list[Finding]]) -> None:
    assert packages({"onnxruntime-gpu": "1.31.1"}) == []
    (finding,) = packages({"onnxruntime-gpu": "1.31.1", "onnxruntime": "1.31.1"})
    assert finding.level == "problem" and "onnxruntime and onnxruntime-gpu are installed together" in finding.what
    assert finding.hint is not None
    assert "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu" in finding.hint


def test_a_folder_that_is_not_installed_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", missing)
    (finding,) = doctor._packages()
    assert finding.level == "note" and "not installed" in finding.what


@pytest.mark.parametrize(
    ("cuda", "driver", "listed", "level", "what", "hint"),
    [
        (None, None, True, "ok", "ONNX Runtime runs on cuda", None),
        (
            "no driver",
            "no driver",
            True,
            "note",
            "no cuda here: ONNX Runtime lists it, and it cannot be used: no",
            "GPU",
        ),
        ("no CUDA provider", "no driver", False, "note", "no cuda here: no CUDA provider", "It needs an NVIDIA GPU"),
        ("no libcublas", None, True, "problem", "cannot use: no libcublas", "'onnxruntime-gpu[cuda,cudnn]'"),
        ("no CUDA provider", None, False, "problem", "cannot use: no CUDA provider", "pip install onnxruntime-gpu"),
    ],
)
def test_providers(
    monkeypatch: pytest.MonkeyPatch,
    cuda: str | None,
    driver: str | None,
    listed: bool,
    level: str,
    what: str,
    hint: str | None,
) -> None:
    monkeypatch.setattr(runtime, "problem", lambda device: cuda if device.provider.ort_name == runtime.CUDA else "none")
    monkeypatch.setattr(runtime, "driver_problem", lambda: driver)
    monkeypatch.setattr(runtime, "listed_providers", lambda: [runtime.CUDA, runtime.CPU][not listed :])
    findings = list(doctor._providers())
    assert len(findings) == len(runtime.PROVIDERS) - 1
    finding = findings[0]
    assert finding.level == level and what in finding.what
    assert hint in (finding.hint or "") if hint else finding.hint is None
    for row, other in zip(runtime.PROVIDERS[2:], findings[1:]):
        assert other.level == "note" and other.hint == f"It needs {row.needs}" and row.name in other.what


def test_a_provider_without_a_row_is_told_where_it_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "listed_providers", lambda: ["AzureExecutionProvider", runtime.CPU])
    monkeypatch.setattr(runtime, "problem", lambda device: None)
    assert doctor.Finding("ok", "ONNX Runtime runs on azure") in list(doctor._providers())


@pytest.mark.parametrize(
    ("version", "device", "level", "what"),
    [
        (None, False, "note", "torch is built without CUDA"),
        ("13.0", False, "note", "torch is built for CUDA 13.0 and sees no device"),
        ("13.0", True, "ok", "torch sees Test GPU, 24 GiB, CUDA 13.0"),
    ],
)
def test_torch_cuda(monkeypatch: pytest.MonkeyPatch, version: str | None, device: bool, level: str, what: str) -> None:
    import torch

    class Properties:
        total_memory = 24 * 2**30

    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Test GPU")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    (finding,) = doctor._torch_cuda()
    assert (finding.level, finding.what) == (level, what)


def test_a_wrong_result_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.nn.functional, "conv2d", lambda *_: torch.zeros(1, 1, 2, 2))
    monkeypatch.setattr(runtime, "cpu_problem", lambda: "came out wrong")
    for check in (doctor._torch_cpu, doctor._runtime_cpu):
        (finding,) = check()
        assert finding.level == "problem" and finding.hint and "pip install --force-reinstall" in finding.hint


def test_a_broken_library_is_a_finding_and_the_rest_is_still_examined(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Iterator[Finding]:
        raise OSError("libtorch.so:\nundefined symbol")

    broken.__name__ = "_torch_cpu"
    monkeypatch.setattr(doctor, "_torch_cpu", broken)
    findings = examine()
    finding = find(findings, "undefined symbol")
    assert finding == Finding(
        "problem",
        "torch cpu: OSError: libtorch.so: undefined symbol",
        "Reinstall it: pip install --force-reinstall torch",
    )
    assert find(findings, "ONNX Runtime runs on the CPU").level == "ok"


def test_without_torch_and_onnxruntime_it_still_answers() -> None:
    script = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from bnfold.runtime.doctor import examine\n"
        "assert not {'torch', 'onnx', 'onnxruntime'} & set(sys.modules)\n"
        "sys.modules['torch'] = sys.modules['onnxruntime'] = None\n"
        "print(*(f'{finding.level} {finding.what}' for finding in examine()), sep='\\n')"
    )
    lines = subprocess.check_output([sys.executable, "-W", "error", "-c", script], text=True).splitlines()
    problems = [line for line in lines if line.startswith("problem")]
    assert [line for line in problems if line.startswith("problem torch cpu: ModuleNotFoundError")]
    assert [line for line in problems if "onnxruntime cannot be imported" in line]
