"""TorchScript as a source: scripted and traced modules, archives of them, and archives that would run code."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from click.testing import CliRunner
from torch import Tensor, nn

import bnfold
from bnfold.cli import cli
from bnfold.errors import CaptureError, InputError
from bnfold.graph import scripted
from bnfold.graph.scripted import converted
from bnfold.loading.load import load

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")


class Net(nn.Module):
    """In-place ReLUs, a branch on a number, an interpolation, and inputs in an order of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        x = self.bn(self.conv(x)).relu()
        if x.ndim == 4:
            x = x + self.block(x)
        x = nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")
        y: Tensor = self.fc(x.mean((2, 3)) * scale)
        return y


class Reads(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.from_file("weights.bin", False, 3)


class Loops(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        scores: dict[str, Tensor] = {"x": x}
        while bool(x.sum() > 0):
            x = x - 1
            scores["x"] = x
        return scores["x"]


class Wakes(nn.Module):
    @torch.jit.export
    def __getstate__(self) -> tuple[int, bool]:
        return 1, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[int, bool]) -> None:
        self.training = state[1]

    def forward(self, x: Tensor) -> Tensor:
        return x


X, SCALE = torch.randn(2, 3, 9, 7), torch.randn(2, 8)
MAKERS: dict[str, Callable[[nn.Module], Any]] = {
    "script": torch.jit.script,
    "trace": lambda module: torch.jit.trace(module, (X, SCALE)),
}


@pytest.fixture
def module() -> nn.Module:
    return zoo.randomize(Net()).eval()


@pytest.fixture(params=MAKERS)
def script(request: pytest.FixtureRequest, module: nn.Module) -> Any:
    return MAKERS[request.param](module)


def test_folds_as_the_module_itself(script: Any, module: nn.Module) -> None:
    script.train()
    mine, theirs = bnfold.fold(script, (X, SCALE)), bnfold.fold(module, (X, SCALE))
    assert script.training and script.bn.training
    assert [(e.module, e.outcome) for e in mine.ledger.entries] == [
        (e.module, e.outcome) for e in theirs.ledger.entries
    ]
    assert {e.module for e in mine.ledger.entries} == {"bn", "block.1"}
    weights = theirs.program.state_dict
    assert set(mine.program.state_dict) == set(weights)
    assert all(torch.equal(value, weights[name]) for name, value in mine.program.state_dict.items())


def test_an_archive_is_exported_and_judged_against_itself(script: Any, tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    script.save(path)
    inputs = ["--input", "x:float32[N,3,9,7]", "--input", "scale:float32[N,8]", "--device", "cpu"]
    result = CliRunner().invoke(cli, ["export", str(path), "-o", str(tmp_path / "net.onnx"), *inputs])
    assert result.exit_code == 0, result.stderr
    assert "2 of 2 BatchNorm" in result.stdout and (tmp_path / "net.onnx").is_file()
    file = bnfold.check(tmp_path / "net.onnx", Net().eval(), (X, SCALE), device="cpu")
    assert not file.passed  # other weights


def test_the_converter_of_torch_is_what_this_leans_on() -> None:
    """Fails with the torch that takes it away or changes what is used of it."""
    from torch._export.converter import TS2EPConverter, TS2FXGraphConverter

    assert callable(TS2EPConverter.convert) and callable(TS2EPConverter.retrace_as_exported_program)
    assert {"convert_prim_If", "convert_prim_Constant", "convert_prim_GetAttr"} <= set(dir(TS2FXGraphConverter))
    module = zoo.randomize(Net()).eval()
    assert torch.equal(converted(torch.jit.script(module), (X, SCALE))(X, SCALE), module(X, SCALE))


def test_what_does_more_than_compute_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="aten::from_file, which is not run"):
        bnfold.fold(torch.jit.script(Reads()), (torch.zeros(2, 3),))
    assert not list(tmp_path.iterdir())


class Resizes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.clone().resize_([100])


class Inside(nn.Module):
    """A branch that these inputs do not take, in a function that another module's method calls."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = Reads()

    def forward(self, x: Tensor) -> Tensor:
        return self.reads(x) if x.ndim > 7 else x


class Hooked(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


def hooked() -> nn.Module:
    def hook(self: Any, input: tuple[Tensor], output: Tensor) -> Tensor:
        return output + torch.from_file("weights.bin", False, 3)

    module = Hooked()
    module.register_forward_hook(hook)
    return module


@pytest.mark.parametrize(
    ("make", "words"),
    [(Reads, "aten::from_file"), (Resizes, "aten::resize_"), (Inside, "aten::from_file"), (hooked, "hooks")],
)
@pytest.mark.parametrize("command", ["export", "inspect", "bench"])
def test_an_archive_may_hold_only_what_is_allowed(
    command: str, make: Callable[[], nn.Module], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.jit.script(make()).save("net.pt")
    monkeypatch.setattr(torch.jit.ScriptModule, "__call__", lambda *_: pytest.fail("it was run"))
    zoo_net = tmp_path / "net.onnx"
    bnfold.export(nn.Linear(3, 3), zoo_net, (torch.zeros(2, 3),), device="cpu", check=False)
    more = {"export": ["net.pt", "-o", "out.onnx"], "inspect": ["net.pt"], "bench": ["net.onnx", "--source", "net.pt"]}
    result = CliRunner().invoke(cli, [command, *more[command], "--input", "x[2,3]"])
    assert result.exit_code == 3 and words in result.stderr and result.stderr.count("\n") == 1, result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"net.pt", "net.onnx"}


def test_what_torch_script_says_on_lists_and_texts_is_allowed(tmp_path: Path) -> None:
    """Lists, their lengths and items, formatted texts, and what a padding in words becomes."""
    path, module = tmp_path / "net.pt", zoo.randomize(Words()).eval()
    torch.jit.script(module).save(path)
    loaded = load(str(path)).model
    x = torch.randn(2, 3, 9, 9)
    assert bnfold.fold(loaded, (x,)).ledger.count() == (1, 1)
    for name in scripted._ON_VALUES:
        assert torch._C._jit_get_schemas_for_operator(f"aten::{name}"), name


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3, padding="same"), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4:
            raise ValueError(f"{x.ndim} axes")
        y = self.bn(self.conv(x))
        parts = [y, y.relu()]
        return torch.cat(parts, 1) if len(parts) == 2 else parts[0]


def test_what_the_converter_does_not_know_is_named_with_ways_out() -> None:
    with pytest.raises((CaptureError, InputError), match=r"prim::\w+.*Give the Python class.*ONNX"):
        bnfold.fold(torch.jit.script(Loops()), (torch.zeros(2, 3),))


def test_an_archive_whose_classes_wake_up_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    torch.jit.script(Wakes()).save(path)
    with pytest.raises(InputError, match="__setstate__"):
        load(str(path))


def test_an_archive_of_custom_classes_is_refused(tmp_path: Path) -> None:
    path, other = tmp_path / "net.pt", tmp_path / "other.pt"
    torch.jit.script(nn.Linear(3, 2)).save(path)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(other, "w", zipfile.ZIP_STORED) as new:
        for member in old.infolist():
            content = old.read(member)
            if member.filename.endswith(".py") and b"class Linear" in content:
                content += b"\n# __torch__.torch.classes.dist_c10d.FileStore\n"
            new.writestr(member.filename, content)
    with pytest.raises(InputError, match=r"torch\.classes"):
        load(str(other))


def test_a_damaged_archive_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    torch.jit.script(nn.Linear(3, 2)).save(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(InputError):
        load(str(path))


@pytest.mark.parametrize(
    ("args", "kwargs", "words"),
    [((X,), {"size": SCALE}, "'scale'"), ((), {"scale": SCALE}, "'x'")],
)
def test_inputs_that_do_not_fit_are_named(args: Any, kwargs: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        bnfold.fold(torch.jit.script(Net().eval()), args, kwargs)


def test_keywords_find_their_place() -> None:
    module = zoo.randomize(Net()).eval()
    folded = bnfold.fold(torch.jit.script(module), (X,), {"scale": SCALE})
    assert (folded.module(X, SCALE) - module(X, SCALE)).abs().max() < 1e-5 * module(X, SCALE).abs().max()
