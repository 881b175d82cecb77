"""How runs end: the documented exit code, one line, no file, whatever the model's code or the machine does."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
import types
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner, Result
from onnx_parts import adder, encode
from torch import nn

import bnfold
from bnfold.cli import cli
from bnfold.commands.terminal import Unfailing
from bnfold.errors import CaptureError, InputError, ResourceError, printable
from bnfold.gate.stored import open_arrays
from bnfold.store import check_destination
from bnfold.user_code import is_inside

torch.set_num_threads(1)
ROOT = Path(__file__).parent.parent

NETS = """
import sys

import click
import torch
from torch import nn

class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.example_inputs = (torch.zeros(2, 4),)

class Leaves(Net):
    def forward(self, x): sys.exit(0)

class LeavesLater(Net):
    def forward(self, x):
        if x.shape[0] > 1:
            sys.exit()
        return super().forward(x)

class Raises(Net):
    def forward(self, x): raise BaseException("no")

class Clicks(Net):
    def forward(self, x): raise click.exceptions.Exit(0)

class Example(Net):
    @property
    def example_input_array(self): sys.exit(0)

def raises(): raise BaseException("no")
def leaves(): sys.exit(0)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "nets.py").write_text(NETS)
    return tmp_path


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, list(arguments))


def hearing() -> None:
    """Signals that the tests' own process was started to ignore, by ``nohup`` or in the background, are heard."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def process(*arguments: str, **more: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "ignore", "-m", "bnfold", *arguments]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True, **more)  # type: ignore[call-overload, no-any-return]


# ---- the model's own code --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Leaves", "LeavesLater", "Raises", "Clicks", "Example", "raises", "leaves"])
@pytest.mark.parametrize(
    "command", ["export {} -o x.onnx", "fold {} -o x.pt2", "fold {} --eager -o x.safetensors", "check good.onnx {}"]
)
def test_the_models_code_cannot_end_a_run(command: str, name: str, folder: Path) -> None:
    Path("good.onnx").write_bytes(encode(adder()))
    result = run(*command.format(f"nets.py:{name}").split(), "-q")
    assert result.exit_code in (3, 4) and result.stderr.count("\n") == 1, result.output
    assert "internal" not in result.stderr and "nets.py:" in result.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["good.onnx", "nets.py"]


def test_inspect_has_no_verdict_on_a_model_that_leaves(folder: Path) -> None:
    result = run("inspect", "--strict", "nets.py:Leaves", "-q")
    assert result.exit_code == 4 and "SystemExit: 0" in result.stderr
    assert run("inspect", "nets.py:Net", "-q").exit_code == 0  # the twin


class Leaves(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        sys.exit(0)


def test_python_gets_an_error_and_no_exit(tmp_path: Path) -> None:
    x = torch.zeros(2, 4)
    for call in (
        lambda: bnfold.fold(Leaves(), (x,)),
        lambda: bnfold.export(Leaves(), tmp_path / "x.onnx", (x,)),
        lambda: bnfold.inspect(Leaves(), (x,)),
        lambda: bnfold.calibrate(nn.Sequential(nn.BatchNorm1d(4), Leaves()), [x, x]),
    ):
        with pytest.raises(CaptureError, match=r"SystemExit: 0.*test_ends.py"):
            call()
    assert not list(tmp_path.iterdir())


def test_an_interruption_is_no_error_of_the_models(tmp_path: Path) -> None:
    class Interrupted(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bnfold.fold(Interrupted(), (torch.zeros(2, 4),))


def test_a_lazy_module_that_cannot_be_asked_is_no_sibling(tmp_path: Path) -> None:
    class Lazy(types.ModuleType):
        def __getattr__(self, name: str) -> object:
            raise ImportError(f"no {name}")

    module = Lazy("lazy")
    assert not is_inside(module, tmp_path)
    module.__file__ = str(tmp_path / "lazy.py")
    assert is_inside(module, tmp_path)


def test_a_source_beside_a_lazy_module_loads(folder: Path) -> None:
    (folder / "lazy.py").write_text(
        "import sys, types\n"
        "class Lazy(types.ModuleType):\n"
        "    def __getattr__(self, name): raise ImportError(name)\n"
        "sys.modules['lazy.inner'] = Lazy('lazy.inner')\n"
    )
    (folder / "uses.py").write_text("import lazy\nfrom nets import Net\n")
    try:
        result = run("export", "uses.py:Net", "-o", "x.onnx", "-q")
    finally:
        sys.modules.pop("lazy.inner", None)
    assert result.exit_code == 0, result.output


# ---- streams and signals ---------------------------------------------------------------------------------------------


class Full(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


def test_a_stream_that_takes_nothing_does_not_fail() -> None:
    assert Unfailing(Full()).write("progress") == 8
    closed = io.StringIO()
    closed.close()
    assert Unfailing(closed).write("x") == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_behind_stderr_or_stdout(folder: Path) -> None:
    with open("/dev/full", "w") as full:  # noqa: PTH123
        null = subprocess.DEVNULL
        runs = [
            (process("export", "nets.py:Net", "-o", "a.onnx", "--no-check", stdout=null, stderr=full), 0),
            (process("export", "nowhere.py:x", "-o", "b.onnx", stdout=null, stderr=full), 3),
            (process("nonsense", stdout=null, stderr=full), 2),
            (process("--help", stdout=full, stderr=null), 6),
            (process("--version", stdout=full, stderr=full), 6),
            (process("export", "nets.py:Net", "-o", "c.onnx", "--no-check", stdout=full, stderr=null), 6),
        ]
        assert [one.wait(120) for one, _ in runs] == [code for _, code in runs]
    assert Path("a.onnx").exists() and not Path("b.onnx").exists()


def test_a_reader_of_the_help_that_has_left_is_no_failed_gate() -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as pipe:
        assert process("--help", stdout=pipe, stderr=subprocess.DEVNULL).wait(60) == 0


SLOW = """
import os, sys, time, torch
from nets import Net as Base

class Net(Base):
    def forward(self, x):
        open("running", "w").close()
        time.sleep(30)
        return super().forward(x)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_run_with_nothing_left(number: signal.Signals, folder: Path) -> None:
    (folder / "slow.py").write_text(SLOW)
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    one = process("export", "slow.py:Net", "-o", "x.onnx", **pipes, preexec_fn=hearing)
    deadline = time.monotonic() + 60
    while not Path("running").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    one.send_signal(number)
    _, said = one.communicate(timeout=60)
    assert one.returncode == 143 and said.endswith("error: terminated\n") and "Traceback" not in said, said
    assert sorted(path.name for path in folder.iterdir() if path.name != "__pycache__") == [
        "nets.py", "running", "slow.py",
    ]  # fmt: skip


# ---- what the command line is given ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "codes"),
    [
        (["nets.py:Net", "--input", "x:float32[99999999999999999999999999,4]"], (2,)),
        (["nets.py:Net", "--input", "x:float32[" + ",".join(["1"] * 2000) + "]"], (2,)),
        (["nets.py:Net", "--input", "input[N,4]", "--dynamic", f"N=1..{'9' * 30}"], (2,)),
        (["nets.py:Net", "--samples", "9" * 26], (2,)),
        (["nets.py:Net", "--opset", "9" * 26], (2,)),
        (["nets.py:Net", "--weights", "w" * 300], (3,)),
        (["nets.py:Net", "--data", "w" * 300], (3,)),
        (["nets.py:Net", "--report", "w" * 300 + ".json"], (6,)),
        (["nets.py:Net", "--baseline", "w" * 300 + ".json"], (3, 6)),
        (["w" * 5000], (2, 3)),
        (["w" * 300 + ".py:Net"], (3,)),
        (["w" * 300 + ":Net"], (3,)),
        (["hf:" + "w" * 300], (3, 5)),
        (["hf:~nobody-of-this-name/x"], (3, 5)),
    ],
)
def test_numbers_and_names_that_are_too_long(arguments: list[str], codes: tuple[int, ...], folder: Path) -> None:
    result = run("export", *arguments, "-o", "x.onnx", "-q")
    assert result.exit_code in codes and result.stderr.count("\n") == 1, result.output
    assert "internal" not in result.stderr


def test_a_name_too_long_for_what_stands_beside_it(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"File name too long.*Choose a shorter name"):
        check_destination(tmp_path / ("x" * 300 + ".onnx"))
    check_destination(tmp_path / ("x" * 200 + ".onnx"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with names")
@pytest.mark.parametrize(
    "arguments",
    [
        ["export", "nets.py:Net", "--weights", "pipe", "-o", "x.onnx"],
        ["export", "nets.py:Net", "--weights", "pipe.safetensors", "-o", "x.onnx"],
        ["export", "nets.py:Net", "--data", "pipe", "-o", "x.onnx"],
        ["export", "nets.py:Net", "--baseline", "pipe.json", "-o", "x.onnx"],
        ["export", "pipe", "-o", "x.onnx"],
        ["export", "pipe.py:Net", "-o", "x.onnx"],
        ["export", "hf:hub", "-o", "x.onnx"],
        ["check", "pipe", "nets.py:Net"],
        ["bisect", "pipe", "nets.py:Net"],
        ["bench", "pipe"],
        ["calibrate", "nets.py:Net", "--data", "pipe", "-o", "x.safetensors"],
        ["inspect", "nets.py:Net", "--data", "pipe"],
    ],
)
def test_a_pipe_is_no_file(arguments: list[str], folder: Path) -> None:
    (folder / "hub").mkdir()
    (folder / "hub" / "config.json").write_text('{"model_type": "bert"}')
    for name in ("pipe", "pipe.json", "pipe.safetensors", "pipe.py", "hub/model.safetensors"):
        os.mkfifo(name)
    result = run(*arguments, "-q")
    assert result.exit_code in (3, 5) and "a pipe" in result.stderr and result.stderr.count("\n") == 1, result.output


@pytest.mark.parametrize("broken", [b"'shape': (40, 4(", b"'shape': (-40,-4", b"'shape': (40, 'x", b"'shape': ((((((("])
@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_a_damaged_header(suffix: str, broken: bytes, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros((40, 4), np.float32))
    content = buffer.getvalue().replace(b"'shape': (40, 4)", broken)
    assert content != buffer.getvalue() and len(content) == len(buffer.getvalue())
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content)
    if suffix == ".npz":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x.npy", content)
    with pytest.raises(InputError, match="no readable NumPy file"):
        open_arrays(path)


# ---- what reaches the terminal ---------------------------------------------------------------------------------------

HOSTILE = "\x1b]0;title\x07\x1b[31mred\x9b2J\u202e\r\x08"


def visible(result: Result) -> bool:
    return all(c.isprintable() or c == "\n" for c in result.output)


def test_printable_spells_out_what_steers_a_terminal() -> None:
    assert printable(HOSTILE).isprintable() and "red" in printable(HOSTILE)
    assert printable("häuser [bold] 目\nx") == "häuser [bold] 目\nx"


@pytest.mark.parametrize(
    "arguments",
    [
        ["export", HOSTILE + ".py:Net", "-o", "x.onnx"],
        ["export", "nets.py:" + HOSTILE, "-o", "x.onnx"],
        ["export", "nets.py:Net", "--weights", HOSTILE, "-o", "x.onnx"],
        ["export", "nets.py:Net", "--" + HOSTILE],
        [HOSTILE],
        ["export", "nets.py:Net", "--input", HOSTILE, "-o", "x.onnx"],
    ],
)
def test_no_control_character_is_echoed(arguments: list[str], folder: Path) -> None:
    result = run(*arguments)
    assert result.exit_code in (2, 3) and visible(result), repr(result.output)


def test_names_in_files_are_spelt_out(folder: Path) -> None:
    torch.save({f"{HOSTILE}weight": torch.zeros(2)}, "w.pt")
    np.savez("d.npz", **{f"{HOSTILE}x": np.zeros((3, 4), np.float32)})
    for option in (["--weights", "w.pt"], ["--data", "d.npz"]):
        result = run("export", "nets.py:Net", *option, "-o", "x.onnx")
        assert result.exit_code == 3 and "red" in result.stderr and visible(result), repr(result.output)
    net = nn.Sequential()
    net.add_module("\x1b[31mred", nn.Conv2d(3, 4, 3))
    net.add_module("\x1b[2J", nn.BatchNorm2d(4))
    torch.save(net, "net.pt")
    result = run("inspect", "net.pt", "--unsafe-pickle", "--input", "input[N,3,8,8]", "-v")
    assert result.exit_code == 0 and "[31mred" in result.stdout and visible(result), repr(result.output)


def test_every_command_refuses_data_outside_of_a_models_folder(folder: Path) -> None:
    held = onnx.TensorProto(name="w", data_type=1, dims=[2], data_location=onnx.TensorProto.EXTERNAL)
    held.external_data.add(key="location", value="../secret")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["w"], ["y"])], "g", [], [], [held])
    (folder / "in").mkdir()
    (folder / "in" / "net.onnx").write_bytes(onnx.helper.make_model(graph).SerializeToString())
    (folder / "secret").write_bytes(bytes(8))
    for command in (
        ["check", "in/net.onnx", "nets.py:Net"],
        ["bisect", "in/net.onnx", "nets.py:Net"],
        ["bench", "in/net.onnx"],
    ):
        result = run(*command, "-q")
        assert result.exit_code == 3 and "outside of the model's folder" in result.stderr, result.output


SWALLOWED = """
import signal, sys, time, weakref
from bnfold.commands.terminal import heed_signals
heed_signals()
class Thing: pass
thing = Thing()
reference = weakref.ref(thing, lambda _: signal.raise_signal(signal.{name}))
try:
    del thing
    time.sleep(60)
except BaseException as error:
    print(type(error).__name__)
"""


@pytest.mark.parametrize(("name", "kind"), [("SIGTERM", "Terminated"), ("SIGINT", "KeyboardInterrupt")])
def test_a_signal_in_a_callback_is_not_lost(name: str, kind: str) -> None:
    words = [sys.executable, "-c", SWALLOWED.format(name=name)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, preexec_fn=hearing)
    assert (done.stdout, done.stderr) == (f"{kind}\n", "")
