"""A user's own runner: whatever goes wrong with it is told as what it is, and never hangs the run."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

import bnfold
from bnfold.cli import cli
from bnfold.errors import InputError, UsageError
from bnfold.render.words import next_steps
from bnfold.report import CheckReport
from bnfold.runtime.runner import Crashed, NoAnswer, Raised, UserRunner, arrays, takes_path

torch.set_num_threads(1)
X = torch.arange(24.0).reshape(2, 12) / 7

FILE = '''
"""A linear layer in numpy, right and in every way wrong."""
import os, sys, time
import numpy as np

WEIGHT = np.arange(36, dtype=np.float32).reshape(12, 3) / 11 - 1
calls = 0

def right(inputs):
    print("what it prints is nobody's answer")
    return {"output": (inputs["x"].astype(np.float64) @ WEIGHT).astype(np.float32)}

class Engine:
    def __call__(self, inputs):
        return right(inputs)

def listed(inputs):
    return list(right(inputs).values())

def bare(inputs):
    return right(inputs)["output"]

def through_text(inputs):
    return [right(inputs)["output"].tolist()]

def off(inputs):
    return {"output": right(inputs)["output"] * np.float32(1.001)}

def raises(inputs):
    raise ValueError("the engine\\nis cold")

def hangs(inputs):
    time.sleep(600)

def exits(inputs):
    sys.exit(3)

def dies(inputs):
    print("last words", file=sys.stderr, flush=True)
    os._exit(7)

def nothing(inputs):
    return None

def ragged(inputs):
    return [[[1.0], [1.0, 2.0]]]

def words(inputs):
    return {"output": "tall"}

def more(inputs):
    return listed(inputs) * 2

def shapes(inputs):
    return [listed(inputs)[0].T]

def doubled_rows(inputs):
    return [np.repeat(listed(inputs)[0], 2, 0)]

def half(inputs):
    return [listed(inputs)[0].astype(np.float16)]

def integers(inputs):
    return [listed(inputs)[0].astype(np.int64)]

def named(inputs):
    return {"logits": listed(inputs)[0], "boxes": listed(inputs)[0]}

def extra(inputs):
    return {"other": np.zeros(3), **right(inputs)}

def fickle(inputs):
    global calls
    calls += 1
    return {"output": right(inputs)["output"] * np.float32(1 + calls % 2 / 100)}

def jitters(inputs):
    global calls
    calls += 1
    return {"output": right(inputs)["output"] * np.float32(1 + calls % 2 * 2.0**-23)}

def nan_later(inputs):
    global calls
    calls += 1
    return {"output": right(inputs)["output"] * np.float32(1 if calls < 5 else np.nan)}

def with_path(inputs, path):
    if path is None:
        raise ValueError("no path")
    import onnxruntime
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, inputs)

number = 3
'''


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 3, bias=False)
        weight = torch.arange(36, dtype=torch.float32).reshape(12, 3) / 11 - 1
        self.layer.weight = nn.Parameter(weight.T.contiguous())

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "engine.py").write_text(FILE)
    (tmp_path / "net.py").write_text(
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom test_runner import Net, X\n"
        "example_inputs = (X,)\ndef make():\n    net = Net(); net.example_inputs = (X,); return net\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def check(runner: str | Callable[..., Any], **options: Any) -> CheckReport:
    return bnfold.check(None, Net(), (X,), runner=runner, **options)


# -- what passes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["right", "Engine", "listed", "bare", "through_text", "extra", "jitters"]
)  # fmt: skip
def test_a_right_runner_passes(name: str, folder: Path) -> None:
    report = check(f"engine.py:{name}")
    assert report.passed, report.problems
    assert report.provider == f"runner engine.py:{name}" and report.samples >= 10
    (engine,) = report.engines
    assert (engine.verdict, engine.arithmetic) == ("pass", "float32") and 0 <= engine.ratio <= report.limit
    assert any("its answers to one input differ" in note for note in report.notes) is (name == "jitters")


def test_any_callable_will_do(folder: Path) -> None:
    weight = Net().layer.weight.detach().numpy().T
    assert check(lambda inputs: [inputs["x"] @ weight]).passed
    assert check(functools.partial(np.matmul)).verdict == "fail", "it raises: it wants another argument"


def test_an_importable_module_will_do(folder: Path) -> None:
    assert check("engine:right").passed


def test_a_runner_of_a_file_is_given_its_path(folder: Path) -> None:
    report = bnfold.export(Net(), "net.onnx", (X,), device="cpu", runner="engine.py:with_path")
    assert report.passed and [e.verdict for e in report.check.engines] == ["pass", "pass"], report
    report = bnfold.check("net.onnx", Net(), (X,), device="cpu", runner="engine.py:with_path")
    assert report.passed
    with pytest.raises(UsageError, match="must take its path"):
        bnfold.export(Net(), "other.onnx", (X,), device="cpu", runner="engine.py:right")
    assert not Path("other.onnx").exists()


def test_a_wrong_runner_keeps_a_right_file_from_being_written(folder: Path) -> None:
    report = bnfold.export(Net(), "net.onnx", (X,), device="cpu", runner=lambda inputs, path: inputs["x"][:, :3])
    assert not report.passed and not Path("net.onnx").exists()
    assert [e.verdict for e in report.check.engines] == ["pass", "fail"]
    assert not any("bisect" in command for _, command in next_steps(report)), "the file is right"


# -- what does not -----------------------------------------------------------------------------------------------------

WRONG = {
    "off": r"output 'output': error is [\d.e+]+ times the noise",
    "raises": r"Raised: ValueError: the engine is cold \(engine\.py:\d+\)",
    "exits": r"Raised: SystemExit: 3 \(engine\.py:\d+\)",
    "dies": r"Crashed: its process ended with exit code 7: last words",
    "nothing": r"Raised: TypeError: what it returns is a NoneType, not an array of numbers",
    "ragged": r"Raised: TypeError: output 0 is no array",
    "words": r"Raised: TypeError: output 'output' is a str, not an array of numbers",
    "more": r"2 outputs instead of 1",
    "shapes": r"\(3, 1\) torch.float32 instead of \(1, 3\)",
    "doubled_rows": r"\(2, 3\) torch.float32 instead of \(1, 3\)",
    "half": r"torch.float16 instead of \(1, 3\) torch.float32",
    "integers": r"torch.int64 instead of \(1, 3\) torch.float32",
    "named": r"Raised: its outputs are logits, boxes, those of the model output",
    "fickle": r"answers otherwise when it is asked again, by [\d.e+]+ times the noise",
    "nan_later": r"answers otherwise when it is asked again, by inf times|NaN",
    "with_path": r"Raised: ValueError: no path",
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_runner_fails_and_is_told_as_what_it_is(name: str, folder: Path) -> None:
    import re

    report = check(f"engine.py:{name}")
    assert report.verdict == "fail" and report.engines[0].verdict == "fail"
    assert any(re.search(WRONG[name], problem) for problem in report.problems), report.problems
    assert all(f"engine.py:{name}" in p for p in report.problems if p != "no output was compared")


@pytest.mark.parametrize("own_process", [True, False])
def test_a_runner_that_hangs_costs_its_time_limit_once(own_process: bool, folder: Path) -> None:
    start = time.perf_counter()
    report = check("engine.py:hangs" if own_process else lambda inputs: time.sleep(30), runner_timeout=1.5)
    assert report.verdict == "fail" and "NoAnswer: no answer within 1.5 s" in report.problems[0]
    assert sum("NoAnswer" in problem for problem in report.problems) == 1, "one line for one cause"
    assert time.perf_counter() - start < 25, "not once for each batch, and not until it wakes up"


def test_a_crash_is_told_again_at_once(folder: Path) -> None:
    runner = UserRunner("engine.py:dies")
    for _ in range(2):
        with pytest.raises(Crashed, match="exit code 7"):
            runner({"x": X.numpy()})


def test_a_failure_leaves_a_runner_usable(folder: Path) -> None:
    (folder / "once.py").write_text(
        "seen = []\ndef infer(inputs):\n    seen.append(0)\n    return [1 // (len(seen) - 1)]\n"
    )
    runner = UserRunner("once.py:infer")
    with pytest.raises(Raised, match=r"ZeroDivisionError.*once\.py:4"):
        runner({})
    assert runner({})[0] == 1


def test_its_process_ends_with_it(folder: Path) -> None:
    runner = UserRunner("engine.py:right")
    assert runner._process is not None
    child = runner._process._child
    assert child.poll() is None
    del runner
    assert child.poll() is not None


BAD: dict[str, tuple[str, type[Exception], str]] = {
    "no name": ("engine.py", UsageError, "file.py:name or pkg.module:name"),
    "no file": ("absent.py:infer", InputError, "there is no file absent.py"),
    "no module": ("absent:infer", InputError, "No module named 'absent'"),
    "no function": ("engine.py:infer", InputError, "engine.py has no callable infer"),
    "a number": ("engine.py:number", InputError, "engine.py has no callable number"),
    "broken": ("broken.py:infer", InputError, r"RuntimeError: no device \(broken.py:1\)"),
    "slow": ("slow.py:infer", NoAnswer, "no answer within 1 s"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_loaded_is_refused_before_anything_runs(name: str, folder: Path) -> None:
    (folder / "broken.py").write_text("raise RuntimeError('no device')\n")
    (folder / "slow.py").write_text("import time; time.sleep(60)\n")
    spec, error, message = BAD[name]
    with pytest.raises(error, match=message):
        check(spec, runner_timeout=1.0 if name == "slow" else 60.0)


def test_answers_are_copies() -> None:
    kept = np.ones(3)
    (found,) = arrays([kept])
    kept += 1
    assert found.tolist() == [1, 1, 1]
    assert arrays(np.float32(2))[0].shape == () and arrays({"y": [1, 2]})["y"].dtype == np.int64  # type: ignore[call-overload]


def test_the_second_argument_is_a_path() -> None:
    assert takes_path(lambda inputs, path: None) and takes_path(lambda inputs, path=None: None)
    assert not takes_path(lambda inputs: None) and not takes_path(lambda inputs, *, path=None: None)
    assert not takes_path(dict.fromkeys(["a"]).get.__class__)


# -- what it computes in -----------------------------------------------------------------------------------------------


def test_what_a_runner_computes_in_is_said(folder: Path) -> None:
    report = check("engine.py:half", precision="float16")
    assert report.passed, report.problems
    assert report.engines[0].arithmetic == "float16" and report.engines[0].unit_roundoff == 2.0**-11
    wrong = "import numpy as np, engine\ndef infer(inputs):\n    return [engine.half(inputs)[0] * np.float16(1.03)]\n"
    (folder / "wrong.py").write_text(wrong)
    assert check("wrong.py:infer", precision="float16").verdict == "fail"


def test_precision_needs_a_runner_and_a_name(folder: Path) -> None:
    with pytest.raises(UsageError, match="there is no format 'fp16'"):
        check("engine.py:half", precision="fp16")
    with pytest.raises(UsageError, match="what a provider computes in is measured"):
        bnfold.export(Net(), "net.onnx", (X,), device="cpu", precision="float16")
    with pytest.raises(UsageError, match="there is nothing to judge"):
        bnfold.check(None, Net(), (X,))


# -- the command line --------------------------------------------------------------------------------------------------


def run(*arguments: str) -> Any:
    return CliRunner().invoke(cli, list(arguments))


def test_the_command_line_judges_a_runner_alone(folder: Path) -> None:
    result = run("check", "net.py:make", "--runner", "engine.py:right")
    assert result.exit_code == 0 and "runner engine.py:right" in result.stdout, result.output
    result = run("check", "net.py:make", "--runner", "engine.py:off")
    assert result.exit_code == 1 and "times the noise" in result.stdout
    again = "python -m bnfold check net.py:make --runner engine.py:off --verbose"
    assert again in result.stdout and "bisect" not in result.stdout, "there is no file to look into"
    assert run("check", "net.py:make", "--runner", "engine.py:absent").exit_code == 3
    assert run("check", "net.py:make").exit_code == 2
    assert run("check", "a.onnx", "net.py:make", "more", "--runner", "engine.py:right").exit_code == 2
