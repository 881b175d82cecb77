"""The pytest plugin as a user's test suite sees it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

#: The plugin by name, whether or not it is installed as an entry point too.
LOADED = ("-p", "no:bnfold", "-p", "bnfold.pytest_plugin", "-p", "no:cacheprovider", "-q")
NETS = """
import os
import numpy as np, pytest, torch
torch.set_num_threads(1)

def net():
    torch.manual_seed(int(os.environ.get("SEED", 0)))
    net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
    torch.nn.init.uniform_(net[1].running_mean), torch.nn.init.uniform_(net[1].running_var, 0.5, 2)
    return net

x = torch.randn(2, 6)
"""
TESTS = (
    NETS
    + """
def test_net(onnx_gate):
    onnx_gate(net(), (x,), data="heldout.npz")

@pytest.mark.parametrize("name", ["plain", "a/b"])
def test_names(onnx_gate, name):
    onnx_gate(net(), (x,), path="kept.onnx")
    onnx_gate(net(), (x,), path="kept.onnx", device="cpu")

class TestClass:
    def test_not_compared(self, onnx_gate):
        assert onnx_gate(net(), (x,), path="kept.onnx", baseline=False).passed

def test_wrong_file(onnx_gate):
    other = net()
    torch.nn.init.ones_(other[0].weight)
    onnx_gate(other, (x,), path="kept.onnx")

def test_wrong_inputs(onnx_gate):
    onnx_gate(net(), (torch.randn(2, 7),), baseline=False)
"""
)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data and an exported file; made first, as a pytester unloads in the end what is imported later."""
    folder = tmp_path_factory.mktemp("kept")
    space: dict[str, object] = {}
    exec(NETS, space)
    import numpy as np
    import torch

    import bnfold

    model = space["net"]()  # type: ignore[operator]
    data = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)
    with torch.no_grad():
        labels = model.eval()(torch.from_numpy(data)).argmax(1).numpy()
    np.savez(folder / "heldout.npz", input=data, labels=labels)
    bnfold.export(model, folder / "kept.onnx", (torch.randn(2, 6),), device="cpu")
    return folder


@pytest.fixture
def suite(kept: Path, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A folder with the tests above, data, and an exported file."""
    monkeypatch.delenv("SEED", raising=False)
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    shutil.copytree(kept, pytester.path / "tests")
    (pytester.path / "tests" / "test_net.py").write_text(TESTS)
    return pytester


def test_a_suite_from_no_baselines_to_a_regression(suite: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = suite.path / "tests" / "bnfold-baselines" / "test_net"

    first = suite.runpytest_subprocess(*LOADED, "tests/test_net.py::test_net")
    first.assert_outcomes(failed=1)
    first.stdout.fnmatch_lines(["*test_net.json: there is no baseline yet. Create it once with*--bnfold-update*"])
    assert not folder.exists()

    update = suite.runpytest_subprocess(*LOADED, "--bnfold-update")
    update.assert_outcomes(passed=4, failed=2)
    # What fails is rendered for people, without bnfold's own traceback.
    update.stdout.fnmatch_lines(
        ["the gate failed: the file in float64*error is*times the noise*", "Checked *", "Verdict  FAIL"]
    )
    update.stdout.fnmatch_lines(["RuntimeError: a and b must have same reduction dim*--input*"])
    said = update.stdout.str()
    assert "bnfold/pipeline.py" not in said and "CheckReport(" not in said and "During handling" not in said
    names = sorted(path.stem for path in folder.iterdir())
    assert names[0].startswith("test_names[a-b]-") and names[1] == f"{names[0]}-2"
    assert names[2:] == ["test_names[plain]", "test_names[plain]-2", "test_net"]  # none of a test that fails
    assert json.loads((folder / "test_net.json").read_text())["accuracy"]["top1"] == 1

    stored = {path: path.read_bytes() for path in folder.iterdir()}
    held = suite.runpytest_subprocess(*LOADED, "-k", "not wrong")
    held.assert_outcomes(passed=4)
    monkeypatch.setenv("SEED", "1")
    worse = suite.runpytest_subprocess(*LOADED, "tests/test_net.py::test_net")
    worse.assert_outcomes(failed=1)
    worse.stdout.fnmatch_lines(["the gate failed: baseline *: top-1 100.00% then, *", "*WORSE"])
    assert {path: path.read_bytes() for path in folder.iterdir()} == stored


LOGS = """
def speak():
    for name in ("torch.onnx", "torch.__trace", "mine"):
        log = logging.getLogger(name)
        log.handle(log.makeRecord(name, logging.WARNING, "f", 1, f"a line of {name}", (), None))

def test_of_the_gate(onnx_gate, caplog):
    onnx_gate(torch.export.export(net().eval(), (x,)), baseline=False)
    speak()
    assert "a line of torch.onnx" in caplog.text, "the fixture sees what it saw before"
    assert False

def test_of_something_else():
    speak()
    assert False
"""


def test_a_red_test_shows_nothing_of_torchs_log(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("import logging" + NETS + LOGS)
    result = pytester.runpytest_subprocess(*LOADED)
    result.assert_outcomes(failed=2)
    gated, other = result.stdout.str().partition("_ test_of_something_else _")[::2]
    assert "a line of mine" in gated and "torch.onnx:" not in gated and "torch.__trace:" not in gated
    assert "a line of mine" in other and "a line of torch.onnx" in other and "torch.__trace:" not in other


def test_the_plugin_is_light_and_named_in_the_help() -> None:
    """It is imported by every pytest run of an environment."""
    code = "import sys, bnfold.pytest_plugin; print(sorted({m.partition('.')[0] for m in sys.modules}))"
    known = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert not {"torch", "numpy", "onnx", "onnxruntime", "click", "rich"} & set(eval(known))
    helped = subprocess.check_output(
        [sys.executable, "-m", "pytest", *LOADED, "--help"], text=True, cwd=Path(__file__).parent
    )
    assert "--bnfold-update" in helped


def test_the_entry_point_is_declared() -> None:
    import tomllib

    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["pytest11"] == {"bnfold": "bnfold.pytest_plugin"}
