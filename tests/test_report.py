"""Reports as JSON: every one validates against the schema in the package, and what is not a report does not."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from report_samples import CHECK, EXPORT, real, reports

from bnfold import pipeline
from bnfold._version import __version__
from bnfold.cli import cli
from bnfold.commands.arguments import REPORTS
from bnfold.render import document
from bnfold.report import schema
from bnfold.report.plain import SCHEMA_VERSION, lines, plain

torch.set_num_threads(1)
SCHEMA = json.loads(schema.PATH.read_text(encoding="utf-8"))
NETS = """
import torch
from torch import nn

def small():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    nn.init.uniform_(net[1].running_mean), nn.init.uniform_(net[1].running_var, 0.5, 2)
    return net, (torch.randn(2, 3, 6, 6),)
"""


def valid(document: Any) -> bool:
    return bool(jsonschema.Draft202012Validator(SCHEMA).is_valid(document))


@pytest.fixture
def nets(tmp_path: Path) -> Path:
    path = tmp_path / "nets.py"
    path.write_text(NETS)
    return path


def test_the_schema_is_one_and_is_that_of_the_classes() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert schema.PATH.read_text(encoding="utf-8") == schema.text(), "python -m bnfold.report.schema"


def test_the_schema_is_packaged() -> None:
    import tomllib

    config = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
    data = config["tool"]["setuptools"]["package-data"]["bnfold"]
    assert "report/schema.json" in data and any("templates" in row for row in data)


@pytest.mark.parametrize("name", reports())
def test_every_report_is_valid_json_of_the_schema(name: str) -> None:
    for indent in (None, 2):
        text = reports()[name].to_json(indent)
        found = json.loads(text)
        jsonschema.validate(found, SCHEMA, cls=jsonschema.Draft202012Validator)
        assert found["schema"] == SCHEMA_VERSION and found["bnfold"] == __version__ and found["versions"]["torch"]
        assert "NaN" not in text and "Infinity" not in text


BREAKS: dict[str, Any] = {
    "no kind": lambda d: d.pop("kind"),
    "another kind": lambda d: d.update(kind="report"),
    "the kind of another command": lambda d: d.update(kind="bench"),
    "another version of the schema": lambda d: d.update(schema=SCHEMA_VERSION + 1),
    "no version": lambda d: d.pop("bnfold"),
    "a field too many": lambda d: d.update(more=1),
    "a field too few": lambda d: d.pop("operators"),
    "no verdict": lambda d: d["check"].pop("verdict"),
    "a verdict that is none": lambda d: d["check"].update(verdict="maybe"),
    "a number as text": lambda d: d["check"]["outputs"][0].update(ratio="2"),
    "three operator counts": lambda d: d["operators"].append(3),
    "an unknown outcome": lambda d: d["ledger"]["entries"][0].update(outcome="gone"),
    "maxima of one number": lambda d: d["layers"][0]["after"].update(maxima=1.0),
    "no list": lambda d: d.update(notes=None),
}


@pytest.mark.parametrize("name", BREAKS)
def test_what_is_no_report_does_not_validate(name: str) -> None:
    good = json.loads(EXPORT.to_json())
    broken = copy.deepcopy(good)
    BREAKS[name](broken)
    assert valid(good) and not valid(broken)


def test_properties_are_in_the_document_and_nan_is_null() -> None:
    found = json.loads(EXPORT.to_json())
    assert found["passed"] is True and found["check"]["ratio"] == 2.0 and found["check"]["site_ratio"] == 2.5
    assert found["layers"][0]["after"]["spread"] == pytest.approx(120) and found["layers"][0]["spoiled"] is True
    assert found["layers"][1]["after"]["maxima"] == [0.0, None] and found["norms"][0]["shift"] == [0.0, 100.0, None]
    assert CHECK.to_json(None).count("\n") == 0


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=20,
)


@given(JSON, st.integers(0, 4))
@settings(deadline=None)
def test_lines_are_json_of_the_same_value(value: Any, indent: int) -> None:
    assert json.loads(lines(value, indent)) == json.loads(json.dumps(value))


@given(st.floats())
def test_plain_numbers_are_numbers_or_null(value: float) -> None:
    found = json.loads(json.dumps(plain(value), allow_nan=False))
    assert found == value if abs(value) < float("inf") else found is None


def test_a_list_of_numbers_stands_on_one_line() -> None:
    text = EXPORT.to_json()
    assert '"operators": [12, 9]' in text and '"maxima": [0.5, 0.6]' in text


# -- the command line --------------------------------------------------------------------------------------------------


def bnfold(*arguments: object) -> Any:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def three(folder: Path) -> list[object]:
    return [part for suffix in REPORTS for part in ("--report", folder / f"r{suffix}")]


def test_every_command_writes_every_kind_of_report(nets: Path, tmp_path: Path) -> None:
    source = f"{nets}:small"
    for command, arguments in {
        "export": [source, "-o", tmp_path / "net.onnx"],
        "fold": [source, "-o", tmp_path / "net.pt2"],
        "inspect": [source],
        "check": [tmp_path / "net.onnx", source],
    }.items():
        folder = tmp_path / command
        folder.mkdir()
        result = bnfold(command, *arguments, "--json", *three(folder))
        assert result.exit_code == 0, result.stderr
        written = (folder / "r.json").read_text(encoding="utf-8")
        assert written == result.stdout and json.loads(written)["kind"] == command and valid(json.loads(written))
        assert (folder / "r.html").read_text(encoding="utf-8").startswith("<!doctype html>")
        assert (folder / "r.xml").read_text(encoding="utf-8").startswith("<?xml")
        assert len(list(folder.iterdir())) == 3


@pytest.mark.parametrize(("verdict", "code"), [("fail", 1), ("inconclusive", 7)])
def test_reports_are_written_whatever_the_verdict(
    verdict: str, code: int, nets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    judge = pipeline.Gate.judge
    monkeypatch.setattr(
        pipeline.Gate, "judge", lambda self: replace(judge(self), verdict=verdict, problems=("it is wrong",))
    )
    result = bnfold("export", f"{nets}:small", "-o", tmp_path / "net.onnx", *three(tmp_path), "--quiet")
    assert result.exit_code == code and not (tmp_path / "net.onnx").exists()
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["check"]["verdict"] == verdict and found["passed"] is False and found["file"] is None
    for suffix in (".html", ".xml"):
        assert "it is wrong" in (tmp_path / f"r{suffix}").read_text(encoding="utf-8")


def test_a_report_that_cannot_be_written_does_not_hide_the_verdict(
    nets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bnfold import store
    from bnfold.errors import ResourceError

    def full(path: Path) -> Any:
        raise ResourceError("could not be written: No space left on device", where=str(path))

    monkeypatch.setattr(store, "atomic", full)
    result = bnfold("inspect", f"{nets}:small", "--report", tmp_path / "r.json")
    assert result.exit_code == 6 and "1 of 1 BatchNorm" in result.stdout and "No space" in result.stderr
    assert not (tmp_path / "r.json").exists()


def test_a_failing_report_leaves_the_old_file(nets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bnfold import render

    def broken(report: object, suffix: str) -> str:
        raise MemoryError

    (tmp_path / "r.html").write_text("yesterday's")
    monkeypatch.setattr(render, "document", broken)
    assert bnfold("inspect", f"{nets}:small", "--report", tmp_path / "r.html").exit_code != 0
    assert (tmp_path / "r.html").read_text() == "yesterday's"


def test_one_file_cannot_be_two_reports(nets: Path, tmp_path: Path) -> None:
    same = tmp_path / "r.json"
    result = bnfold("inspect", f"{nets}:small", "--report", same, "--report", tmp_path / "." / "r.json")
    assert result.exit_code == 2 and "one file" in result.stderr and not same.exists()


def test_without_matplotlib_a_page_is_refused_before_any_work_and_json_is_not(
    nets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = bnfold("inspect", f"{nets}:small", "--report", tmp_path / "r.html")
    assert result.exit_code == 5 and "bnfold[report]" in result.stderr and "capture" not in result.stderr
    assert bnfold("inspect", f"{nets}:small", "--report", tmp_path / "r.json").exit_code == 0


def test_the_suffixes_are_those_that_can_be_written() -> None:
    assert len({document(EXPORT, suffix)[:9] for suffix in REPORTS}) == len(REPORTS)


def test_reports_need_no_torch() -> None:
    code = "import sys, bnfold.report, bnfold.render; sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=600).returncode == 0


def test_a_warning_about_int8_is_printed_once_and_in_full_with_verbose(
    nets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nets.write_text(NETS.replace("return net,", "net[1].weight.data[2] = 900\n    return net,"))
    short, full = (bnfold("inspect", f"{nets}:small", *more).stdout for more in ((), ("--verbose",)))
    assert short.count("per-tensor int8 hopeless") == 1 and "folding 1 into it" in " ".join(short.split())
    assert "spread" in full and "spread" not in short.replace("spreads", "")
    nets.write_text(NETS)
    assert "int8" not in bnfold("inspect", f"{nets}:small").stdout


def test_a_real_failure_is_valid_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = real(tmp_path, monkeypatch, "one channel off by 1 %")
    assert not report.passed and valid(json.loads(report.to_json()))
