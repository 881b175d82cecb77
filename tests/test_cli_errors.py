"""Bad input: one line that says what is wrong, the documented exit code, and a destination that stays as it was."""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from click.testing import CliRunner, Result
from conftest import BOUND
from torch import nn

from bnfold import stages, store
from bnfold.cli import cli
from bnfold.errors import CaptureError
from bnfold.runtime import runtime as providers

torch.set_num_threads(1)
BEFORE = b"the file of yesterday"

NETS = """
import torch
from torch import nn

class Net(nn.Sequential):
    def __init__(self, width=4):
        super().__init__(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(0.5))
        self.example_inputs = (torch.randn(2, 3, 6, 6),)

class Branches(Net):
    def forward(self, x): return x if x.sum() > 0 else -x

class Mutates(Net):
    def forward(self, x): return x.add_(1)

def make(width=4): return Net(width)
def training(): return Net().train()
def bare(): return nn.Conv1d(3, 4, 3)
def broken():
    net = Net()
    net[1].running_mean[2] = float("nan")
    return net
def infinite():
    net = Net()
    net[1].weight.data[0] = float("inf")
    return net
def negative():
    net = Net()
    net[1].running_var[3] = -1
    return net
def hopeless():
    return nn.Sequential(*broken(), nn.Conv2d(4, 2, 1)), (torch.randn(2, 3, 6, 6),)
def raises(): raise ValueError("no [red] such\\nblock")
def text(): return "no module"
def branches(): return Branches()
def mutates(): return Mutates()
number = 3
"""


class Evil:
    """Unpickling this writes a file."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.proof,)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project to work in, with one file per way of being wrong."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "nets.py").write_text(NETS)
    (tmp_path / "importing.py").write_text("import no_such_package\n")
    (tmp_path / "syntax.py").write_text("def make(:\n")
    (tmp_path / "net[bold].py").write_text(NETS)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    torch.save(net.state_dict(), "good.pt")
    safetensors.torch.save_file(net.state_dict(), "good.safetensors")
    torch.save({"fc.weight": torch.ones(2)}, "keys.pt")
    torch.save({f"net.{key}": value for key, value in net.state_dict().items()}, "prefixed.pt")
    torch.save(nn.Sequential(nn.Conv2d(3, 7, 3), nn.BatchNorm2d(7)).state_dict(), "shapes.pt")
    torch.save(net, "module.pt")
    torch.save(Evil(tmp_path / "proof"), "evil.pt")
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Evil(tmp_path / "proof")))
    good = Path("good.pt").read_bytes()
    Path("empty.pt").write_bytes(b"")
    Path("cut.pt").write_bytes(good[: len(good) // 2])
    at = good.index(net[0].weight.detach().numpy().tobytes())
    Path("flipped.pt").write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
    Path("text.pt").write_text("hello, this is a text file\n")
    program = torch.export.export(net.eval(), (torch.randn(2, 3, 6, 6),))
    torch.export.save(program, "net.pt2")
    Path("cut.pt2").write_bytes(Path("net.pt2").read_bytes()[:3000])
    np.savez("data.npz", input=np.zeros((3, 3, 6, 6), np.float32))
    np.savez("shape.npz", input=np.zeros((3, 5, 6, 6), np.float32))
    np.savez("named.npz", other=np.zeros((3, 3, 6, 6), np.float32))
    Path("net.onnx").write_bytes(BEFORE)
    return tmp_path


def bnfold(*arguments: str) -> Result:
    return CliRunner().invoke(cli, list(arguments))


NET = "nets.py:make"
#: Arguments of ``export``, the exit code, and what the line must say. ``-o net.onnx`` is added where there is no -o.
BAD: dict[str, tuple[str, int, str]] = {
    # usage
    "unknown option": (f"{NET} --no-such", 2, "No such option"),
    "unknown device": (f"{NET} --device tpu", 2, "--device"),
    "not a number": (f"{NET} --samples many", 2, "--samples"),
    "no samples": (f"{NET} --samples 0", 2, "--samples"),
    "limit nan": (f"{NET} --limit nan", 2, "positive number"),
    "limit inf": (f"{NET} --limit inf", 2, "positive number"),
    "limit negative": (f"{NET} --limit -1", 2, "positive number"),
    "static and dynamic": (f"{NET} --static --dynamic N=1..4", 2, "contradict"),
    "static and letters": (f"{NET} --static --input input[N,3,6,6]", 2, "contradict"),
    "unchecked and data": (f"{NET} --no-check --data data.npz", 2, "--no-check and --data contradict"),
    "unchecked and cuda": (f"{NET} --no-check --device cuda", 2, "contradict"),
    "unfolded and nonfinite": (f"{NET} --no-fold --allow-nonfinite", 2, "contradict"),
    "dry and keep": (f"{NET} --dry-run --keep-failed", 2, "contradict"),
    "argument without value": (f"{NET} --arg width", 2, "--arg width=32"),
    "argument twice": (f"{NET} --arg width=1 --arg width=2", 2, "twice"),
    "input syntax": (f"{NET} --input x:float32(2,3)", 2, "no input specification"),
    "input dtype": (f"{NET} --input input:float23[N,3,6,6]", 2, "Did you mean float32"),
    "dynamic syntax": (f"{NET} --input input[N,3,6,6] --dynamic N=4..1", 2, "range"),
    "dynamic of nothing": (f"{NET} --dynamic N=1..4", 2, "--input"),
    "key without weights": (f"{NET} --weights-key ema", 2, "need --weights"),
    "weights of a program": ("net.pt2 --weights good.pt", 2, "whole model"),
    "input of a program": ("net.pt2 --input input[2,3,6,6]", 2, "fixed in the file"),
    "static program": ("net.pt2 --static", 2, "--static does not apply"),
    "report of another kind": (f"{NET} --report r.txt", 2, "a .json, .html or .xml file"),
    "report over the source": ("net.json --report net.json", 2, ""),
    "output of another kind": (f"{NET} -o net.pt2", 2, "must be a .onnx file"),
    "output is a folder": (f"{NET} -o .", 2, "is a folder"),
    "no source of any kind": ("https://a.b/c", 2, "no source of a model"),
    "factory without a name": ("nets.py", 2, "FACTORY"),
    # input
    "missing file": ("missing.pt2", 3, "no such file"),
    "missing weights": (f"{NET} --weights missing.pt", 3, "missing.pt: there is no such file"),
    "missing python file": ("missing.py:make", 3, "no such file"),
    "missing module": ("no_such_module:make", 3, "no Python module"),
    "missing factory": ("nets.py:mak", 3, "Did you mean make"),
    "import error": ("importing.py:make", 3, "no_such_package"),
    "syntax error": ("syntax.py:make", 3, "syntax.py:1"),
    "factory raises": ("nets.py:raises", 3, "ValueError: no [red] such block"),
    "factory of text": ("nets.py:text", 3, "the factory returned str"),
    "no factory": ("nets.py:number", 3, "is a int and cannot be called"),
    "factory argument": (f"{NET} --arg depth=2", 3, "depth"),
    "empty": (f"{NET} --weights empty.pt", 3, "the file is empty"),
    "cut": (f"{NET} --weights cut.pt", 3, "cut short or damaged"),
    "flipped": (f"{NET} --weights flipped.pt", 3, "checksum"),
    "text": (f"{NET} --weights text.pt", 3, "a text file"),
    "code": (f"{NET} --weights evil.pt", 3, "--unsafe-pickle"),
    "code as source": ("evil.pt", 3, "--unsafe-pickle"),
    "plain pickle": ("evil.pkl", 3, "plain pickle"),
    "pickled module": ("module.pt", 3, "--unsafe-pickle"),
    "keys": (f"{NET} --weights keys.pt", 3, "missing"),
    "shapes": (f"{NET} --weights shapes.pt", 3, "instead of"),
    "prefix": (f"{NET} --weights prefixed.pt", 3, "--strip-prefix net. makes it fit"),
    "weights as source": ("good.pt", 3, "holds weights and no model"),
    "safetensors as source": ("good.safetensors", 3, "holds weights and no model"),
    "cut program": ("cut.pt2", 3, "cut short or damaged"),
    "no inputs": ("nets.py:bare", 3, '--input "input:float32'),
    "unknown input": (f"{NET} --input image[N,3,6,6]", 3, "no input 'image'"),
    "missing data": (f"{NET} --data missing.npz", 3, "no such file"),
    "data of another shape": (f"{NET} --data shape.npz", 3, "(5, 6, 6)"),
    "data without the input": (f"{NET} --data named.npz", 3, "no array for input"),
    "dtype of a program": ("net.pt2 --dtype float16", 3, "keeps the dtype"),
    # capture, fold, lower
    "nan": ("nets.py:broken", 4, "module '1'"),
    "infinite": ("nets.py:infinite", 4, "module '1'"),
    "negative variance": ("nets.py:negative", 4, "module '1'"),
    "inputs that do not fit": (f"{NET} --input input[N,5,6,6]", 4, "--input"),
    "branches on values": ("nets.py:branches", 4, "torch.cond"),
    "no such opset": (f"{NET} --opset 99", 4, "--opset"),
    # environment and storage
    "missing folder": (f"{NET} -o missing/net.onnx", 6, "there is no folder"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_the_destination_alone(case: str, folder: Path) -> None:
    text, code, says = BAD[case]
    arguments = text.split()
    if case == "report over the source":
        Path("net.json").write_text("{}")
    if "-o" not in arguments:
        arguments += ["-o", "net.onnx"]
    there = sorted(folder.iterdir())
    result = bnfold("export", *arguments, "--quiet")
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert re.fullmatch(r"error: [^\n]+\n", result.stderr) and "internal" not in result.stderr, result.stderr
    assert says in result.stderr
    assert Path("net.onnx").read_bytes() == BEFORE and sorted(folder.iterdir()) == there
    assert not Path("proof").exists(), "the pickle ran"


def test_the_pickle_would_have_run(folder: Path) -> None:
    """Else the test above proves nothing."""
    result = bnfold("export", "evil.pt", "--unsafe-pickle", "-o", "net.onnx", "-q")
    assert Path("proof").exists() and result.exit_code == 3


def test_a_missing_output_is_asked_for(folder: Path) -> None:
    result = bnfold("export", NET)
    assert result.exit_code == 2 and "-o says where" in result.stderr and "--dry-run" in result.stderr


def test_torchscript_without_its_inputs_is_refused(folder: Path) -> None:
    with contextlib.suppress(DeprecationWarning):
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.save(torch.jit.trace(nn.ReLU(), torch.ones(2)), "script.pt")
    result = bnfold("export", "script.pt", "-o", "net.onnx", "-q")
    assert result.exit_code == 3 and "--input" in result.stderr and result.stderr.count("\n") == 1
    assert Path("net.onnx").read_bytes() == BEFORE


@pytest.mark.parametrize(
    "arguments",
    [
        ("export", NET, "--weights", "same.onnx", "-o", "same.onnx"),
        ("export", NET, "--data", "same.onnx", "-o", "same.onnx"),
        ("export", "same.onnx", "-o", "same.onnx"),
        ("fold", "net.pt2", "-o", "net.pt2"),
        ("fold", "net.pt2", "-o", "link.pt2"),
        ("export", NET, "-o", "net.onnx", "--report", "same.json", "--weights", "same.json"),
        ("check", "same.json", NET, "--report", "same.json"),
        ("export", NET, "--dry-run", "-o", "r.onnx", "--report", "nets.py"),
    ],
)
def test_no_output_replaces_what_the_run_reads(arguments: tuple[str, ...], folder: Path) -> None:
    for name in ("same.onnx", "same.json"):
        Path(name).write_bytes(Path("good.pt").read_bytes())
    Path("link.pt2").symlink_to("net.pt2")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    result = bnfold(*arguments, "-q")
    assert result.exit_code == 2 and result.stderr.count("\n") == 1, result.output
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_an_output_and_a_report_of_one_name_contradict(folder: Path) -> None:
    Path("r.json").symlink_to("net.onnx")
    result = bnfold("export", NET, "-o", "net.onnx", "--report", "r.json")
    assert result.exit_code == 2 and "one file" in result.stderr


# -- NaN ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factory", ["broken", "infinite", "negative"])
def test_nonfinite_statistics_pass_where_asked_for_and_stay(factory: str, folder: Path) -> None:
    result = bnfold("export", f"nets.py:{factory}", "-o", "net.onnx", "--allow-nonfinite")
    assert result.exit_code == 0, result.output
    assert "Left     1 of 1 BatchNorm" in result.stdout and "nonfinite" in result.stdout
    assert Path("net.onnx").read_bytes() != BEFORE


def test_a_model_of_nothing_but_nan_is_inconclusive(folder: Path) -> None:
    result = bnfold("export", "nets.py:hopeless", "-o", "net.onnx", "--allow-nonfinite")
    assert result.exit_code == 7 and "INCONCLUSIVE" in result.stdout and "FAIL" not in result.stdout
    assert Path("net.onnx").read_bytes() == BEFORE


def test_a_model_in_training_mode_is_exported_in_eval_mode(folder: Path) -> None:
    import onnx

    assert bnfold("export", "nets.py:training", "-o", "net.onnx", "-q").exit_code == 0
    operators = {node.op_type for node in onnx.load("net.onnx").graph.node}
    assert operators == {"Conv", "Relu"}


# -- the machine -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [("export", NET, "-o", "net.onnx"), ("check", "net.onnx", NET)])
def test_cuda_never_falls_back(command: tuple[str, ...], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "problem", lambda device: "there is none")
    result = bnfold(*command, "--device", "cuda", "-q")
    assert result.exit_code == 5 and "there is none" in result.stderr and "--device cpu" in result.stderr
    assert Path("net.onnx").read_bytes() == BEFORE


@pytest.fixture
def read_only(folder: Path) -> Iterator[Path]:
    path = folder / "locked"
    path.mkdir()
    path.chmod(0o500)
    yield path
    path.chmod(0o700)


def test_a_read_only_folder(read_only: Path) -> None:
    command = [*BOUND, sys.executable, "-m", "bnfold", "export", NET, "-o", str(read_only / "net.onnx"), "-q"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 6 and re.fullmatch(r"error: [^\n]*Permission denied[^\n]*\n", done.stderr), done.stderr


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    return fail


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (MemoryError(), 6, "gave out"),
        (OSError(errno.ENOSPC, "No space left on device"), 6, "gave out"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 6, "allocate"),
        (caused(CaptureError("it failed"), MemoryError()), 6, "it failed"),
        (CaptureError("it failed"), 4, "it failed"),
        (ValueError("two\nlines [x]"), 4, "internal: ValueError: two lines [x]. Run it again with --debug"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_whatever_fails_is_one_line(
    error: BaseException, code: int, says: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "capture", raising(error))
    result = bnfold("export", NET, "-o", "net.onnx", "-q")
    assert result.exit_code == code and says in result.stderr and result.stderr.count("\n") == 1
    assert Path("net.onnx").read_bytes() == BEFORE


@pytest.mark.parametrize("error", [ValueError("odd"), CaptureError("it failed")])
def test_debug_shows_the_traceback(error: Exception, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "capture", raising(error))
    result = bnfold("export", NET, "-o", "net.onnx", "--debug")
    assert "Traceback" in result.stderr and result.stderr.splitlines()[-1].startswith("error: ")


def test_a_disk_that_fills_up_while_writing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(store.Staging, "_settle", raising(full))
    for command, name in (("export", "net.onnx"), ("fold", "new.pt2")):
        result = bnfold(command, NET, "-o", name, "--no-check", "-q")
        assert result.exit_code == 6 and "Free disk space" in result.stderr
    assert Path("net.onnx").read_bytes() == BEFORE and not Path("new.pt2").exists()
    assert not list(folder.glob(".*"))


def test_brackets_are_no_markup(folder: Path) -> None:
    assert "net[bold].py:make" in bnfold("inspect", "net[bold].py:make").stdout
    assert "net[bold].py:mke" in bnfold("inspect", "net[bold].py:mke").stderr


def test_a_check_of_what_is_no_onnx_file(folder: Path) -> None:
    for name, code in (("missing.onnx", 3), ("net.onnx", 4), ("good.pt", 4)):
        result = bnfold("check", name, NET, "-q")
        assert result.exit_code in (3, code) and result.stderr.count("\n") == 1, result.output
        assert "internal" not in result.stderr
