"""Faults of every kind in small nets: each one that has an effect is caught, and right files pass.

``scripts/inject_faults.py`` does the same with more nets, scales and seeds; its tables are in ``docs/gate.md``.
"""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from fault_kinds import KINDS, SPARSE, Subject, subject_of

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import inject_faults
from inject_faults import CLAIM, FIXED, Measure, caught, has_effect, judge, over_noise

torch.set_num_threads(1)

#: A fault in the hidden branch is seen at its fold site alone; the other net has groups, padding and residual sums.
NETS = {"hidden_branch": 1.0, "mobilenet_v2": 0.01}
#: These change next to nothing, as they should: they stand for what need not be caught.
HARMLESS = {"gamma off by 1e-6", "gamma off by one ulp", "variance off by one ulp"}


@cache
def measured(name: str) -> Measure:
    return Measure(subject_of(name, NETS[name]))


def row(name: str, kind: str, folder: Path) -> dict[str, Any] | None:
    measure = measured(name)
    model = KINDS[kind](measure.subject)
    if model is None:
        return None
    return {"kind": kind} | measure.effect(model) | judge(measure.subject, model, folder)


@pytest.mark.parametrize("kind", KINDS)
def test_every_fault_with_an_effect_is_caught(kind: str, tmp_path: Path) -> None:
    """In the first net, and in the other for every third kind and for those that have no effect in the first."""
    rows: list[dict[str, Any]] = []
    for name in NETS:
        needed = not any(map(has_effect, rows)) or list(KINDS).index(kind) % 3 == 0
        if needed and (found := row(name, kind, tmp_path)) is not None:
            rows.append(found)
    assert rows, "a kind that hits neither net tests nothing"
    for found in rows:
        assert caught(found) or not has_effect(found), found
    assert any(has_effect(found) for found in rows) is (kind not in HARMLESS)


@pytest.mark.parametrize("name", NETS)
def test_the_right_file_passes(name: str, tmp_path: Path) -> None:
    measure = measured(name)
    effect = measure.effect(measure.subject.file)
    assert effect["output"] == effect["sample"] == effect["site"] == effect["channel"] == 0
    assert judge(measure.subject, measure.subject.copy(), tmp_path)["verdict"] == "pass"


def test_there_are_enough_kinds() -> None:
    assert len(KINDS) >= 24 and set(KINDS) > SPARSE


def test_wrong_constants_do_not_stay_in_the_subject() -> None:
    subject: Subject = measured("hidden_branch").subject
    before = {name: value.clone() for name, value in subject.captured.program.state_dict.items()}
    for kind in ("beta dropped", "wrong eps in every BatchNorm"):
        assert KINDS[kind](subject) is not None
    assert all(torch.equal(value, before[name]) for name, value in subject.captured.program.state_dict.items())


# -- how effects are measured ------------------------------------------------------------------------------------------


def test_effects_are_multiples_of_the_noise() -> None:
    true = np.ones((4, 100))
    own = (true + 1e-6).astype(np.float32)
    right = own.copy()
    noise = float(np.abs(own - true).mean())
    assert over_noise(right + np.float32(5e-6), right, own, true) == pytest.approx(5e-6 / noise, rel=0.05)
    assert np.isinf(over_noise(right * np.float32("nan"), right, own, true)).all()
    one = right.copy()
    one[2] += 1
    assert (over_noise(one, right, own, true) > 1e5).tolist() == [False, False, True, False]


def test_a_file_that_cannot_be_run_has_an_infinite_effect() -> None:
    broken = onnx.ModelProto()
    broken.CopyFrom(measured("hidden_branch").subject.file)
    broken.graph.node[0].op_type = "NoSuchOperator"
    found = measured("hidden_branch").effect(broken)
    assert found["output"] == float("inf") and all(found[name] for name in FIXED)


# -- the script --------------------------------------------------------------------------------------------------------

HEAD = {"net": "n", "scale": 1.0, "sample": 0.0, "site": 0.0, "channel": 0.0, "site_ratio": 1.0, "problem": ""}
NO_TOLERANCE = dict.fromkeys(FIXED, False)
RIGHT = {"net": "n", "weights": 0, "seed": 0, "verdict": "pass", "ratio": 1.0, "site": 2.0, "channel": 3.0, "sites": 5}
RIGHT |= {"worst": 1.5, "problem": ""}


def fault(kind: str, effect: float, verdict: str) -> dict[str, Any]:
    return HEAD | NO_TOLERANCE | {"kind": kind, "output": effect, "verdict": verdict, "ratio": effect}


@pytest.mark.parametrize(
    ("rows", "code", "text"),
    [
        ([fault("negated output", 1e6, "fail")], 0, "caught 1 of them"),
        ([fault("negated output", 1e6, "pass")], 1, "- negated output, n, scale 1: effect 1000000 at the output"),
        ([fault("negated output", CLAIM / 2, "pass")], 0, "0 have an effect"),
        ([fault("none", 0, "fail")], 1, "refused 1 of 1 right files"),
        ([{"net": "n", "scale": 1.0, "kind": "outputs swapped"}, fault("none", 0, "pass")], 0, "0 faulty files"),
        ([RIGHT], 0, "1 passed"),
        ([RIGHT | {"verdict": "fail", "problem": "a site"}], 1, "- n, weights 0, inputs 0: fail, a site"),
    ],
)
def test_the_tables_say_what_was_missed(
    rows: list[dict[str, Any]], code: int, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "results.jsonl"
    results.write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert inject_faults.main(["--no-run", "--results", str(results)]) == code
    assert text in capsys.readouterr().out


def test_the_document_is_written_between_its_marks(tmp_path: Path) -> None:
    results, document = tmp_path / "results.jsonl", tmp_path / "gate.md"
    results.write_text(json.dumps(RIGHT) + "\n")
    document.write_text("before\n<!-- measured -->\nstale\n<!-- end -->\nafter\n")
    inject_faults.main(["--no-run", "--results", str(results), "--write", str(document)])
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "stale" not in text and "1 passed" in text


def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    done = {("n", 1.0, kind) for kind in ("none", *KINDS)}
    assert list(inject_faults.inject("n", 1.0, tmp_path, done)) == []  # "n" is no net: it would have raised
    with pytest.raises(KeyError):
        next(inject_faults.inject("n", 1.0, tmp_path, set()))


def test_a_correct_fold_is_one_row_for_each_seed(tmp_path: Path) -> None:
    rows = list(inject_faults.correct("mlp", 1, [0, 1], tmp_path))
    assert [r["seed"] for r in rows] == [0, 1] and all(r["verdict"] == "pass" and r["sites"] == 2 for r in rows)
