"""Baselines: what may change between two runs, what may not, and files that cannot be trusted."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

import bnfold
from bnfold.cli import cli
from bnfold.errors import InputError, ResourceError, UsageError
from bnfold.gate.baseline import expect_baseline, judge_baseline, write_baseline
from bnfold.report import Accuracy, Agreement, CheckReport, OutputResult, SiteResult, TargetFit

torch.set_num_threads(1)
MODELS = Path(__file__).parent.parent / "models"

AGREEMENT = Agreement("out", 100, 130.0, 1e-6, 2e-7, 3e-7, 4e-7, 5e-7, 7, 1.5, 1e-7)
ACCURACY = Accuracy(
    100, 0.99, 0.98, 1, 0.1, "ONNX Runtime", "out", 100, 1.0, 1.0, 0, 0, (), (AGREEMENT,),
    (TargetFit("out", 0.5, 0.5, 0.4, 0.4),), "digest",
)  # fmt: skip
CHECK = CheckReport(
    "pass", "CPUExecutionProvider", 16, (1, 2, 7, 6),
    (OutputResult("folded torch", "out", 1e-7, 1e-7, 1.0, 2.0, 16),
     OutputResult("ONNX Runtime", "out", 1e-7, 1.5e-7, 1.5, 2.0, 16)),
    (SiteResult("folded torch", "v", "m", 2.0, 3.0),), accuracy=ACCURACY,
)  # fmt: skip


def with_ratio(ratio: float, **more: Any) -> CheckReport:
    return replace(CHECK, outputs=(replace(CHECK.outputs[1], ratio=ratio),), **more)


def with_accuracy(**changes: Any) -> CheckReport:
    return replace(CHECK, accuracy=replace(ACCURACY, **changes))


def compare(then: CheckReport, now: CheckReport, tmp_path: Path) -> CheckReport:
    write_baseline(then, tmp_path / "b.json")
    return judge_baseline(now, tmp_path / "b.json", update=False)


def test_the_same_run_holds(tmp_path: Path) -> None:
    found = compare(CHECK, CHECK, tmp_path)
    assert found.passed and found.baseline is not None and found.baseline.outcome == "held"
    assert found.baseline.versions == {} and found.baseline.notes == () and not found.baseline.regressed
    assert [row.what for row in found.baseline.rows] == [
        "ratio of 'out'", "ratio at the fold sites", "top-1", "top-5", "flips", "RMS error of 'out'", "SQNR of 'out'",
    ]  # fmt: skip
    assert all(row.then == row.now for row in found.baseline.rows)


#: What changes -> the figure that regresses, or None.
CHANGES: dict[str, tuple[CheckReport, str | None]] = {
    "ratio within its spread": (with_ratio(2.9), None),
    "ratio beyond it": (with_ratio(3.1), "ratio of 'out'"),
    "ratio is gone": (replace(CHECK, outputs=()), "ratio of 'out'"),
    "ratio is NaN": (with_ratio(math.nan), "ratio of 'out'"),
    "sites within their spread": (replace(CHECK, sites=(SiteResult("t", "v", "m", 7.0, 7.3),)), None),
    "sites beyond it": (replace(CHECK, sites=(SiteResult("t", "v", "m", 1.0, 7.4),)), "ratio at the fold sites"),
    "no sites to compare": (replace(CHECK, sites=()), None),
    "accuracy rises": (with_accuracy(after=1.0), None),
    "accuracy falls": (with_accuracy(after=0.97), "top-1"),
    "accuracy falls by what is undecided": (with_accuracy(after=0.97, undecided=1), None),
    "accuracy falls by more": (with_accuracy(after=0.96, undecided=1), "top-1"),
    "top-5 falls": (with_accuracy(top5_after=0.99), "top-5"),
    "labels are gone": (with_accuracy(after=None, top5_after=1.0), "top-1"),
    "a flip more": (with_accuracy(flips=2), "flips"),
    "a flip more that is undecided": (with_accuracy(flips=2, undecided=2), None),
    "fewer flips": (with_accuracy(flips=0), None),
    "fit within rounding": (with_accuracy(targets=(TargetFit("out", 0.5, 0.500003, 0.4, 0.4),)), None),
    "fit beyond it": (with_accuracy(targets=(TargetFit("out", 0.5, 0.500005, 0.4, 0.4),)), "RMS error of 'out'"),
    "SQNR within 6 dB": (with_accuracy(agreement=(replace(AGREEMENT, sqnr=124.1),)), None),
    "SQNR beyond": (with_accuracy(agreement=(replace(AGREEMENT, sqnr=123.9),)), "SQNR of 'out'"),
    "no data": (replace(CHECK, accuracy=None), "accuracy: the baseline's run had data, this one has none; samples"),
    "other data": (with_accuracy(data="other"), "accuracy: the data are not the baseline's; samples"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_regresses(change: str, tmp_path: Path) -> None:
    now, what = CHANGES[change]
    found = compare(CHECK, now, tmp_path)
    assert found.baseline is not None
    assert [row.what for row in found.baseline.regressed] == ([what] if what else [])
    assert found.verdict == ("fail" if what else "pass")
    assert (found.baseline.outcome == "regressed") == (what is not None)
    assert any(what in problem for problem in found.problems) if what else found.problems == ()


@given(st.floats(0, 4), st.floats(0, 4))
def test_a_better_ratio_never_regresses(one: float, other: float) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        found = compare(with_ratio(max(one, other)), with_ratio(min(one, other)), Path(folder))
        assert found.passed


def test_bitwise_equality_is_no_promise(tmp_path: Path) -> None:
    """What once came out identical may later differ by the unfolded model's own noise: 140 dB here."""
    equal = with_accuracy(agreement=(replace(AGREEMENT, sqnr=math.inf, difference=0.0),))
    assert compare(equal, with_accuracy(agreement=(replace(AGREEMENT, sqnr=134.1),)), tmp_path).passed
    assert not compare(equal, with_accuracy(agreement=(replace(AGREEMENT, sqnr=133.9),)), tmp_path).passed


def test_another_provider_is_shown_and_not_judged(tmp_path: Path) -> None:
    found = compare(CHECK, with_ratio(3.9, provider="CUDAExecutionProvider"), tmp_path)
    assert found.passed and found.baseline is not None
    assert "the ratios are CUDAExecutionProvider's" in found.baseline.notes[0]
    assert found.baseline.rows[0].allowed is None and found.baseline.rows[0].now == 3.9


def test_a_baseline_without_data_says_nothing_about_data(tmp_path: Path) -> None:
    found = compare(replace(CHECK, accuracy=None), CHECK, tmp_path)
    assert found.passed and found.baseline is not None and "made without data" in found.baseline.notes[0]


def test_versions_that_moved_are_told(tmp_path: Path) -> None:
    write_baseline(CHECK, tmp_path / "b.json")
    text = (tmp_path / "b.json").read_text().replace(f'"{torch.__version__}"', '"1.0"')
    (tmp_path / "b.json").write_text(text)
    found = judge_baseline(CHECK, tmp_path / "b.json", update=False).baseline
    assert found is not None and found.versions == {"torch": ("1.0", str(torch.__version__))}


def test_a_verdict_that_fails_anyway_stays_one(tmp_path: Path) -> None:
    failed = replace(with_ratio(9.0), verdict="fail", problems=("ratio",))
    assert compare(CHECK, failed, tmp_path).problems[-1] == "ratio"
    unsure = replace(CHECK, verdict="inconclusive", problems=("noise",))
    assert compare(CHECK, unsure, tmp_path).verdict == "inconclusive"


# -- writing -----------------------------------------------------------------------------------------------------------


def test_updating_creates_then_rewrites(tmp_path: Path) -> None:
    path = tmp_path / "b.json"
    assert judge_baseline(CHECK, path, update=True).baseline.outcome == "created"  # type: ignore[union-attr]
    assert not path.exists()  # judging writes nothing
    write_baseline(CHECK, path)
    found = judge_baseline(with_ratio(3.9), path, update=True)
    assert found.passed and found.baseline is not None and found.baseline.outcome == "updated"
    assert found.baseline.rows[0].regressed  # told, and accepted
    failed = replace(CHECK, verdict="fail")
    assert judge_baseline(failed, path, update=True).baseline.outcome == "not written"  # type: ignore[union-attr]
    path.write_text("garbage")
    assert judge_baseline(CHECK, path, update=True).baseline.outcome == "created"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "there is no baseline yet. Create it once with --update-baseline"),
        ("", "no readable baseline"),
        ("{", "no readable baseline"),
        ("[]", "no baseline of bnfold"),
        ("{}", "no baseline of bnfold"),
        ('{"bnfold_baseline": 99}', "format 99, not 1"),
        ('{"bnfold_baseline": 1, "ratios": {}}', "lacks accuracy, provider, site_ratio, versions"),
        (b"\xff\xfe", "no readable baseline"),
    ],
)
def test_what_is_no_baseline(content: Any, says: str, tmp_path: Path) -> None:
    path = tmp_path / "b.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for run in (lambda: expect_baseline(path, update=False), lambda: judge_baseline(CHECK, path, update=False)):
        with pytest.raises(InputError, match=says) as caught:
            run()
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)


DAMAGES: dict[str, tuple[tuple[str, ...], Any]] = {
    "versions": (("versions",), []),
    "ratios": (("ratios",), None),
    "a ratio": (("ratios", "out"), "1"),
    "site_ratio": (("site_ratio",), {}),
    "accuracy": (("accuracy",), 3),
    "nothing known of the accuracy": (("accuracy",), {}),
    "accuracy.sqnr": (("accuracy", "sqnr"), None),
    "accuracy.top1": (("accuracy", "top1"), "0.9"),
    "accuracy.rmse": (("accuracy", "rmse", "out"), None),
    "accuracy.difference": (("accuracy", "difference"), {}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_baseline(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "b.json"
    write_baseline(CHECK, path)
    expect_baseline(path, update=False)
    keys, value = DAMAGES[damage]
    document = part = json.loads(path.read_text())
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = value
    path.write_text(json.dumps(document))
    for run in (lambda: expect_baseline(path, update=False), lambda: judge_baseline(CHECK, path, update=False)):
        with pytest.raises(InputError, match=rf"{path}: in the baseline, {keys[0]}.* is damaged\. Create it"):
            run()
    assert judge_baseline(CHECK, path, update=True).passed, "what is rewritten need not be readable"


@pytest.mark.parametrize(("sqnr", "rmse"), [(math.inf, 0.5), (math.nan, 0.5), (130.0, math.nan), (130.0, math.inf)])
def test_a_run_never_regresses_against_itself(sqnr: float, rmse: float, tmp_path: Path) -> None:
    targets = (replace(ACCURACY.targets[0], rmse_after=rmse),)
    same = with_accuracy(agreement=(replace(AGREEMENT, sqnr=sqnr),), targets=targets)
    assert compare(same, same, tmp_path).passed
    worse = with_accuracy(agreement=(replace(AGREEMENT, sqnr=20.0),), targets=targets)
    assert compare(same, worse, tmp_path).passed is math.isnan(sqnr)


def test_a_baseline_is_expected_before_anything_runs(tmp_path: Path) -> None:
    expect_baseline(None, update=False)
    expect_baseline(tmp_path / "b.json", update=True)
    with pytest.raises(UsageError, match="none is named"):
        expect_baseline(None, update=True)
    with pytest.raises(UsageError, match=r"a baseline is a \.json file"):
        expect_baseline(tmp_path / "b.txt", update=True)
    with pytest.raises(ResourceError, match="no folder"):
        expect_baseline(tmp_path / "none" / "b.json", update=True)
    with pytest.raises(UsageError, match="no check"):
        bnfold.export(torch.nn.Linear(2, 2), tmp_path / "n.onnx", baseline=tmp_path / "b.json", check=False)
    with pytest.raises(InputError, match="no baseline yet"):
        bnfold.export(torch.nn.Linear(2, 2), tmp_path / "n.onnx", baseline=tmp_path / "b.json")


# -- end to end --------------------------------------------------------------------------------------------------------

NETS = """
import torch
def make(seed=0):
    torch.manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
    torch.nn.init.uniform_(net[1].running_mean), torch.nn.init.uniform_(net[1].running_var, 0.5, 2)
    net.example_inputs = (torch.randn(2, 6),)
    return net
"""


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def test_the_command_line_end_to_end(tmp_path: Path) -> None:
    import numpy as np

    (tmp_path / "net.py").write_text(NETS)
    source, base, file = f"{tmp_path / 'net.py'}:make", tmp_path / "b.json", tmp_path / "net.onnx"
    space: dict[str, Any] = {}
    exec(NETS, space)
    x = np.random.default_rng(0).normal(size=(60, 6)).astype(np.float32)
    with torch.no_grad():
        labels = space["make"]().eval()(torch.from_numpy(x)).argmax(1).numpy()
    np.savez(tmp_path / "d.npz", input=x, labels=labels)
    data = ("--data", tmp_path / "d.npz")

    missing = run("export", source, "-o", file, "--baseline", base, *data)
    assert missing.exit_code == 3 and "no baseline yet" in missing.stderr and not file.exists() and not base.exists()
    created = run("export", source, "-o", file, "--baseline", base, "--update-baseline", *data)
    assert created.exit_code == 0 and f"Baseline {base}" in created.stdout and "created" in created.stdout
    assert json.loads(base.read_text())["accuracy"]["top1"] == 1
    stored = base.read_bytes()
    for command in (("export", source, "-o", file), ("check", file, source)):
        held = run(*command, "--baseline", base, *data)
        assert held.exit_code == 0 and "held" in held.stdout, held.output

    worse = run("export", source, "--arg", "seed=1", "-o", tmp_path / "w.onnx", "--baseline", base, *data)
    assert worse.exit_code == 1 and not (tmp_path / "w.onnx").exists() and base.read_bytes() == stored
    assert "problem: baseline" in worse.stdout and "WORSE" in worse.stdout and "100.00%" in worse.stdout
    quiet = run("export", source, "--arg", "seed=1", "-o", tmp_path / "w.onnx", "--baseline", base, *data, "--quiet")
    assert quiet.exit_code == 1 and "top-1 100.00% then" in quiet.stderr
    other = run("export", source, "-o", file, "--baseline", base)
    assert other.exit_code == 1 and "this one has none" in other.stdout

    folded = run("fold", source, "-o", tmp_path / "n.pt2", "--baseline", tmp_path / "f.json", "--update-baseline")
    assert folded.exit_code == 0
    again = run("fold", source, "-o", tmp_path / "n.pt2", "--baseline", tmp_path / "f.json", "--json")
    assert again.exit_code == 0 and json.loads(again.stdout)["check"]["baseline"]["outcome"] == "held"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--update-baseline",), "none is named"),
        (("--baseline", "b.txt"), "a baseline is a .json file"),
        (("--baseline", "b.json", "--no-check"), "contradict each other"),
        (("--baseline", "b.json", "--update-baseline", "--dry-run"), "contradict each other"),
        (("--baseline", "b.json", "--update-baseline", "--report", "b.json"), "one file"),
    ],
)
def test_arguments_that_make_no_sense(
    arguments: tuple[str, ...], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NETS)
    result = run("export", "net.py:make", "-o", "net.onnx", *arguments)
    assert result.exit_code == 2 and says in result.stderr
