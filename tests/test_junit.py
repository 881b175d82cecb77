"""Reports as JUnit XML: well-formed whatever the names, counted right, and nothing passes that did not."""

from __future__ import annotations

import io
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from report_samples import CHECK, EXPORT, FAILED, LATENCY, NASTY, UNSURE, real, reports, without_check

from bnfold.render import document
from bnfold.report import CheckReport, Entry, ExportReport, Ledger, OutputResult

torch.set_num_threads(1)


def parsed(report: object) -> ET.Element:
    return ET.fromstring(document(report, ".xml").encode())


def cases(root: ET.Element, suite: str) -> dict[str, str]:
    """Name of a case -> pass, skipped, or the type of its failure."""
    (found,) = root.findall(f"testsuite[@name='{suite}']")
    return {str(case.get("name")): outcome(case) for case in found}


def outcome(case: ET.Element) -> str:
    return next((str(child.get("type", child.tag)) for child in case), "pass")


@pytest.mark.parametrize("name", reports())
def test_the_structure_is_junit(name: str) -> None:
    root = parsed(reports()[name])
    assert root.tag == "testsuites" and len(root)
    total = {"tests": 0, "failures": 0, "skipped": 0}
    for suite in root:
        assert suite.tag == "testsuite" and suite.get("name") and float(suite.get("time", "x")) >= 0
        assert all(case.tag == "testcase" and case.get("name") and case.get("classname") for case in suite)
        counts = {
            "tests": len(suite), "failures": len(suite.findall("testcase/failure")),
            "skipped": len(suite.findall("testcase/skipped")),
        }  # fmt: skip
        assert {key: int(suite.get(key, "-1")) for key in counts} == counts and suite.get("errors") == "0"
        total = {key: total[key] + counts[key] for key in total}
    assert {key: int(root.get(key, "-1")) for key in total} == total


@pytest.mark.parametrize(
    ("check", "gate", "outputs"),
    [
        (CHECK, "pass", {"folded torch": "pass", "ONNX Runtime": "pass"}),
        (FAILED, "fail", {"folded torch": "pass", "ONNX Runtime": "fail"}),
        (UNSURE, "inconclusive", {"folded torch": "inconclusive", "ONNX Runtime": "inconclusive"}),
    ],
)
def test_only_a_pass_passes(check: CheckReport, gate: str, outputs: dict[str, str]) -> None:
    root = parsed(replace(EXPORT, check=check))
    assert cases(root, "verdict") == {"gate": gate}
    assert {name: cases(root, f"outputs: {name}")["y"] for name in outputs} == outputs
    assert (int(root.get("failures", "0")) > 0) is (gate != "pass")


def test_sites_and_folds_have_their_cases() -> None:
    root = parsed(replace(EXPORT, check=FAILED))
    assert cases(root, "fold sites: folded torch") == {"bn1 (conv2d)": "pass", "block (add)": "fail"}
    assert cases(root, "folds") == {"bn1": "pass", "bn2": "skipped"}
    (skipped,) = root.findall("testsuite[@name='folds']/testcase/skipped")
    assert skipped.get("message") == "stays: nonlinear, model-output"
    assert set(cases(parsed(EXPORT), "fold sites: folded torch").values()) == {"pass"}


def test_a_failure_says_ratio_limit_and_what_to_run_next() -> None:
    failures = parsed(replace(EXPORT, check=FAILED, file=None)).findall(".//failure")
    assert len(failures) == 3
    for failure in failures:
        assert "python -m bnfold export net.py:make --weights net.safetensors -o net.onnx --keep-failed" in str(
            failure.text
        )
        assert "python -m bnfold check net.failed.onnx net.py:make" in str(failure.text)
    messages = [str(failure.get("message")) for failure in failures]
    assert any("70 times the noise (limit 4)" in text and "'y'" in text for text in messages)
    assert any("30 times the noise (limit 4)" in text and "'block'" in text for text in messages)


def test_the_next_command_is_one_of_the_program() -> None:
    from bnfold.cli import cli
    from bnfold.render.words import next_steps

    for report in reports().values():
        if isinstance(report, ExportReport | CheckReport):
            for _, command in next_steps(report):
                program, _, rest = command.partition(" -m bnfold ")
                assert (program == "python" and rest.split()[0] in cli.commands) or command.startswith("bnfold.")
    assert not next_steps(EXPORT) and not next_steps(without_check())
    kept = replace(EXPORT, check=UNSURE)
    assert next(command for _, command in next_steps(kept)).endswith("--data samples.npz --samples 64")


def test_integers_that_are_wrong_do_not_pass() -> None:
    from bnfold import render

    counts = tuple(OutputResult(name, "count", 0, 0, 0, 0, 16) for name in ("folded torch", "ONNX Runtime"))
    problem = "ONNX Runtime, output 'count': 3 of 160 integers differ"
    check = replace(FAILED, outputs=(*FAILED.outputs, *counts), problems=(*FAILED.problems, problem))
    root = parsed(check)
    assert cases(root, "outputs: ONNX Runtime") == {"y": "fail", "count": "fail"}
    assert cases(root, "outputs: folded torch") == {"y": "pass", "count": "pass"}
    assert any(problem in str(failure.get("message")) for failure in root.findall(".//failure"))

    def printed(report: CheckReport) -> str:
        named = replace(report, source={"source": "net.py:make"})
        shown = render.text(lambda page: render.printed(named, page), io.StringIO())
        (line,) = (row for row in shown.splitlines() if "count: noise" in row)
        return line

    assert "FAIL" in printed(check) and "PASS" in printed(replace(check, problems=FAILED.problems))


def test_what_was_not_judged_is_skipped() -> None:
    root = parsed(without_check())
    assert cases(root, "verdict") == {"gate": "skipped"} and root.get("failures") == "0"


def test_an_output_without_a_number_is_inconclusive() -> None:
    lost = OutputResult("ONNX Runtime", "y", *[float("nan")] * 4, 0)
    root = parsed(replace(UNSURE, outputs=(lost,)))
    assert cases(root, "outputs: ONNX Runtime") == {"y": "inconclusive"}


def test_flips_and_baselines_that_got_worse_fail() -> None:
    from bnfold.report import Accuracy, BaselineReport, BaselineRow

    rows = (BaselineRow("ratio", "ratio", 1.0, 9.0, 2.0, True), BaselineRow("flips", "count", 0, 0, 0, False))
    known = Accuracy(10, 0.9, 0.9, 1, 0.1)
    root = parsed(replace(CHECK, accuracy=known, baseline=BaselineReport("b.json", "regressed", rows)))
    assert cases(root, "accuracy") == {"flips": "pass"}
    assert cases(root, "baseline") == {"ratio": "fail", "flips": "pass"}
    assert cases(parsed(replace(CHECK, accuracy=replace(known, far_flips=1))), "accuracy") == {"flips": "fail"}


def test_latency_is_time() -> None:
    found = parsed(LATENCY).findall(".//testcase")
    assert {str(c.get("name")): float(c.get("time", "x")) for c in found} == {"a.onnx": 0.001, "net.py:make": 0.002}


@given(st.text(), st.text())
@settings(deadline=None)
def test_any_name_is_well_formed(module: str, problem: str) -> None:
    entry = Entry("bn", module, "BatchNorm2d", "batch_norm", "backward")
    report = replace(EXPORT, ledger=Ledger((entry,)), check=replace(FAILED, problems=(problem, NASTY)))
    root = parsed(report)
    assert len(cases(root, "folds")) == 1


def test_a_real_fault_is_in_the_file_and_a_correct_export_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = parsed(real(tmp_path, monkeypatch, "one channel off by 1 %"))
    assert cases(wrong, "verdict") == {"gate": "fail"}
    assert set(cases(wrong, "outputs: the file in float64").values()) == {"fail"}
    assert set(cases(wrong, "outputs: ONNX Runtime").values()) == {"pass"}, "it runs the wrong file right"
    sites = cases(wrong, "fold sites: the file in float64")
    assert next(v for k, v in sites.items() if k.startswith("body_norm")) == "fail"
    right = parsed(real(tmp_path, monkeypatch, None))
    assert right.get("failures") == "0" and cases(right, "verdict") == {"gate": "pass"}
