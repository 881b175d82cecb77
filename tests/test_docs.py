"""The README names every command, exit code, refusal reason and kind of semantics, and its claims about files hold."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from bnfold import semantics
from bnfold.cli import cli
from bnfold.errors import EXIT_CODES
from bnfold.report import FINDINGS, REASONS
from bnfold.runtime.runtime import PROVIDERS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("command", cli.commands)
def test_every_command_is_in_the_readme(command: str) -> None:
    assert re.search(rf"^\| `python -m bnfold {command}\b", README, re.MULTILINE)


def test_the_table_of_exit_codes_is_the_programs_own() -> None:
    assert dict(re.findall(r"^\| (\d+) \| (.+) \|$", README, re.MULTILINE)) == {
        str(k): v for k, v in EXIT_CODES.items()
    }


def test_the_table_of_reasons_is_the_programs_own() -> None:
    section = README[README.index("## Why a BatchNorm stays") :]
    assert re.findall(r"^\| `([a-z-]+)` \|", section, re.MULTILINE) == list(REASONS)


def test_the_table_of_findings_is_the_programs_own() -> None:
    section = README[README.index("## Healthy BatchNorms") : README.index("## Why a BatchNorm stays")]
    rows = re.findall(r"^\| `([a-z-]+)` \| (\w+) \|", section, re.MULTILINE)
    assert rows == [(code, severity) for code, (severity, _, _) in FINDINGS.items()]


def test_kinds_of_semantics_are_listed() -> None:
    section = README[README.index("## Add an operator") :]
    kinds = {"Scaling", "Contraction", "Lookup", "Movement", "Average", "Sum", "Product", "Homogeneous", "Opaque"}
    assert kinds <= set(semantics.__all__)
    assert all(kind in section for kind in kinds)


def test_the_row_shown_is_a_row_of_the_table() -> None:
    row = re.search(r"\*_rows\(.*\),", README)
    assert row is not None
    assert row.group() in (ROOT / "bnfold" / "aten" / "__init__.py").read_text()


def test_links_lead_somewhere() -> None:
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", README):
        assert (ROOT / link).exists(), link


@pytest.mark.parametrize("module", sorted(p for p in (ROOT / "bnfold").rglob("*.py")), ids=lambda p: p.name)
def test_no_module_outgrows_a_head(module: Path) -> None:
    assert len(module.read_text().splitlines()) <= 430, "split it along the data flow"


def test_the_requirements_without_a_gpu_are_those_of_the_package() -> None:
    """But for the runtime, of which that without CUDA is taken everywhere."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [line.partition(";")[0].strip() for line in project["dependencies"]]
    lines = [line for line in (ROOT / "requirements-cpu.txt").read_text().splitlines() if not line.startswith("#")]
    assert lines == [line for line in wanted if not line.startswith("onnxruntime-gpu")]
    assert any(line.startswith("onnxruntime>=") for line in lines)


def test_every_provider_is_in_the_table() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \|", (ROOT / "docs" / "providers.md").read_text(), re.MULTILINE)
    assert rows == [(row.name, row.ort_name) for row in PROVIDERS]
    for row in PROVIDERS:
        assert f"`{row.name}`" in README, "the README names them too"


def test_only_the_runtime_knows_cuda() -> None:
    """A provider is a row: nothing outside of runtime/ tells one by its name."""
    files = [p for p in (ROOT / "bnfold").rglob("*") if p.suffix in {".py", ".json"} and p.parent.name != "runtime"]
    assert [str(p) for p in files if '"cuda"' in p.read_text()] == []
