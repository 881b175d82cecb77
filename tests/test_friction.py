"""What a new user stumbled over in an afternoon: each point as it is to be.

What has a file of its own (sizes, checkpoints, installing, pytest, pages) is tested there.
"""

from __future__ import annotations

import inspect
import json
import os
import shlex
import typing
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner, Result
from report_samples import CHECK, EXPORT, FAILED, LATENCY
from torch import nn

import bnfold
from bnfold import pipeline, stages
from bnfold.cli import cli
from bnfold.options import OptionFields, Options, asked
from bnfold.render import document
from bnfold.render.words import next_steps
from bnfold.report import Accuracy
from bnfold.timing import bench

torch.set_num_threads(1)
NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Linear(4, 5)
    def forward(self, image, mask):
        return self.head(self.body(image).mean((2, 3))), mask
"""


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a factory without an example, one beside an example, data, and a file with its report."""
    folder = tmp_path_factory.mktemp("there")
    (folder / "bare.py").write_text(NET)
    (folder / "net.py").write_text(f"{NET}\nexample_inputs = (torch.randn(2, 3, 9, 9), torch.ones(2, 6))\n")
    draw = np.random.default_rng(0)
    np.savez(folder / "x.npz", image=draw.normal(size=(12, 3, 9, 9)), mask=draw.normal(size=(12, 6)),
             labels=draw.integers(0, 5, 12))  # fmt: skip
    done = run(
        "export", folder / "net.py:Net", "-o", folder / "net.onnx", "--report", folder / "r.json", "--report",
        folder / "r.html", "--input-names", "picture,valid", "--output-names", "logits,kept", "--metadata", "owner=me",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    (folder / "printed").write_text(done.stdout)
    return folder


# -- inputs that are known already -------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["check", "bisect"])
def test_check_and_bisect_take_the_inputs_from_the_file(there: Path, command: str) -> None:
    found = run(command, there / "net.onnx", there / "bare.py:Net")
    assert found.exit_code == 0, found.stderr


def test_export_takes_the_inputs_from_the_data(there: Path) -> None:
    found = run("export", there / "bare.py:Net", "--data", there / "x.npz", "--dry-run")
    assert found.exit_code == 0, found.stderr
    assert "Takes    image float32[N, 3, 9, 9]   mask float32[N, 6]" in found.stdout
    lost = run("export", there / "bare.py:Net", "--dry-run")
    assert (
        lost.exit_code == 3 and "--input image:float32[N,...] --input mask" in lost.stderr and "--data" in lost.stderr
    )


def test_python_takes_them_from_either_too(there: Path) -> None:
    spec: dict[str, Any] = {}
    exec(NET, spec)
    data = dict(np.load(there / "x.npz"))
    assert bnfold.export(spec["Net"](), there / "python.onnx", data=data, device="cpu").passed
    assert bnfold.check(there / "python.onnx", spec["Net"](), device="cpu").passed
    with pytest.raises(bnfold.InputError, match="nothing says what the model takes"):
        bnfold.export(spec["Net"](), there / "python.onnx")
    assert stages.looker(there / "python.onnx", spec["Net"](), options=Options(device="cpu")), "workers as well"
    with pytest.raises(bnfold.InputError, match="nothing says what the model takes"):
        stages.looker(None, spec["Net"](), options=Options(device="cpu"))


def test_an_empty_file_is_told_as_one_and_not_by_the_inputs_that_it_does_not_name(tmp_path: Path) -> None:
    (tmp_path / "empty.onnx").touch()
    with pytest.raises(bnfold.InputError, match="no ONNX file"):
        bnfold.check(tmp_path / "empty.onnx", nn.Linear(2, 2))


# -- names -------------------------------------------------------------------------------------------------------------


def test_names_and_metadata_are_those_asked_for(there: Path) -> None:
    model = onnx.load(there / "net.onnx")
    assert [value.name for value in model.graph.input] == ["picture", "valid"]
    assert [value.name for value in model.graph.output] == ["logits", "kept"]
    assert {entry.key: entry.value for entry in model.metadata_props}["owner"] == "me"


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--input-names", "a", "1 names are given and the model has 2"),
        ("--input-names", "a,a", "given twice"),
        ("--input-names", "mask,image", "is what the model calls another"),
        ("--input-names", "head.weight,b", "is called 'head.weight'"),
        ("--metadata", "bnfold.verdict=pass", "is what bnfold writes itself"),
    ],
)
def test_names_that_would_confuse_are_refused(there: Path, option: str, value: str, said: str) -> None:
    found = run("export", there / "net.py:Net", "--dry-run", option, value)
    assert found.exit_code in (2, 4) and said in found.stderr and option in found.stderr


def test_the_terminal_and_the_report_say_what_goes_in_and_out(there: Path) -> None:
    printed = (there / "printed").read_text()
    assert "Takes    picture float32[batch, 3, 9, 9]   valid float32[mask_batch, 6]" in printed
    assert "Gives    logits float32[batch, 5]   kept float32[mask_batch, 6]" in printed
    ports = json.loads((there / "r.json").read_text())["interface"]
    assert ports[0] == {"role": "input", "name": "picture", "dtype": "float32", "shape": ["batch", 3, 9, 9]}


def test_a_report_holds_its_date_and_its_command_line(there: Path) -> None:
    source = json.loads((there / "r.json").read_text())["source"]
    words = shlex.split(source["command"])
    assert words[:3] == ["bnfold", "export", "net.py:Net"] and "--input-names" in words
    assert str(there) not in source["command"], "no folder of whoever ran it"
    page = (there / "r.html").read_text()
    assert source["date"] in page and "--input-names" in page and "Inputs and outputs" in page


# -- Python ------------------------------------------------------------------------------------------------------------


def test_every_option_is_typed() -> None:
    typed = typing.get_type_hints(OptionFields)
    assert typed.pop("opset_version") == int | None, "torch.onnx's own word for it"
    assert typed == typing.get_type_hints(Options)
    described = Options.__doc__ or ""
    assert [each.name for each in fields(Options) if each.name not in described] == []
    for function in (bnfold.export, bnfold.check, bnfold.inspect, bnfold.bisect, pipeline.plan, pipeline.save_folded):
        assert "Unpack[OptionFields]" in str(function.__wrapped__.__annotations__["more"])
        listed = (inspect.getdoc(function) or "").partition("\nOptions:\n")[2]
        assert [each.name for each in fields(Options) if each.name not in listed] == [], "help() shows them"
    assert "\nOptions:" not in (inspect.getdoc(bnfold.fold) or ""), "which takes none of them"


def test_a_type_checker_catches_a_wrong_option(tmp_path: Path) -> None:
    """With the modules that say what there is; what they import is of no account here."""
    mypy = pytest.importorskip("mypy.api", reason="mypy is not installed: pip install 'bnfold[dev]'")
    user = tmp_path / "user.py"
    call = 'import bnfold\nimport torch\nbnfold.export(torch.nn.Linear(2, 2), "n.onnx", {}=20)\n'
    own = [Path(bnfold.__file__).parent / name for name in ("__init__.py", "pipeline.py", "options.py")]
    for name, complaints in (("opset", 0), ("optset", 1)):
        user.write_text(call.format(name))
        found, _, _ = mypy.run([
            "--strict", "--follow-imports=skip", f"--cache-dir={tmp_path}", "--config-file=", *map(str, [user, *own])
        ])  # fmt: skip
        lines = [line for line in found.splitlines() if line.startswith(str(user)) and "error:" in line]
        assert len(lines) == complaints and all('argument "optset"' in line for line in lines), found


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("optset", "Did you mean opset?"),
        ("dynamic_axes", "Give dynamic_shapes"),
        ("do_constant_folding", "simplify=False"),
        ("dynamo", "leave it out"),
        ("xyz", "There are device"),
    ],
)
def test_a_wrong_name_gets_the_right_one(name: str, said: str) -> None:
    with pytest.raises(bnfold.UsageError, match=f"no option '{name}'.*{said}"):
        asked(None, {name: 1})


def test_torchs_own_word_for_the_opset_is_understood() -> None:
    assert asked(Options(seed=3), {"opset_version": 18}) == Options(seed=3, opset=18)


def test_dir_shows_what_is_public() -> None:
    assert dir(bnfold) == sorted(bnfold.__all__)


# -- failures and figures ----------------------------------------------------------------------------------------------


def test_where_accuracy_alone_fell_nobody_is_sent_to_look_for_a_module() -> None:
    known = Accuracy(50, 0.9, 0.7, 10, 0.1, far_flips=10, classes=10, labelled=50)
    fell = replace(CHECK, verdict="fail", problems=("10 classes change",), accuracy=known)
    for check, names in ((fell, False), (FAILED, True)):
        report = replace(check, source={"source": "net.py:make", "weights": None}, file="net.onnx")
        assert any("bisect" in command for _, command in next_steps(report)) is names
        assert next_steps(report)


@pytest.mark.parametrize(("before", "labelled", "guesses"), [(0.1, 1000, True), (0.11, 1000, True), (0.2, 1000, False)])
def test_top_1_at_the_level_of_guessing_is_said_loudly(before: float, labelled: int, guesses: bool) -> None:
    known = Accuracy(labelled, before, before, 0, 0.1, output="y", classes=10, labelled=labelled)
    assert known.at_chance is guesses
    report = replace(EXPORT, check=replace(CHECK, accuracy=known))
    assert ("the unfolded model itself guesses" in document(report, ".html")) is guesses
    assert not replace(known, before=None).at_chance and not replace(known, classes=1).at_chance


def test_labels_drawn_at_random_are_called_that(there: Path) -> None:
    found = run("check", there / "net.onnx", there / "bare.py:Net", "--data", there / "x.npz")
    assert "Warning  the unfolded model itself guesses" in found.stdout


def test_a_ratio_that_its_spread_makes_meaningless_is_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    from bnfold import render
    from bnfold.commands.terminal import show

    unclear = replace(LATENCY.contestants[1], ratio=1.2345, interval=(0.9, 1.7))
    show(lambda page: render.printed(replace(LATENCY, contestants=(LATENCY.contestants[0], unclear)), page))
    printed = capsys.readouterr().out
    assert "not told apart (0.900 to 1.700)" in printed and "1.234" not in printed and "0.81x" not in printed
    show(lambda page: render.printed(LATENCY, page))
    assert "2.000 (1.900 to 2.100)" in capsys.readouterr().out


@pytest.mark.parametrize(("load", "busy"), [(0.2, False), (1.0, False), (64.0, True)])
def test_bench_says_when_the_machine_is_too_busy(monkeypatch: pytest.MonkeyPatch, load: float, busy: bool) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (load, load, load))
    monkeypatch.setattr(bench, "_cores", lambda: 2)
    assert bool(bench._others()) is busy


def test_a_model_is_what_it_was(there: Path) -> None:
    """Whatever is looked up for it: its flags, its weights, its signature."""
    spec: dict[str, Callable[[], nn.Module]] = {}
    exec(NET, spec)
    model = spec["Net"]().train()
    held = {name: value.clone() for name, value in model.state_dict().items()}
    bnfold.check(there / "net.onnx", model, device="cpu")
    assert model.training and all(torch.equal(held[name], value) for name, value in model.state_dict().items())
