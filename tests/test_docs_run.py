"""What the documentation shows is run: commands and Python, and what they print is compared but for its numbers.

Blocks marked ``console`` and ``sh`` are run in order, and what a ``console`` block prints is compared; ``[1]`` below a
command is its exit code, and ``...`` stands for any words. Lines of ``sh`` blocks that need a network, a cluster or
another package are in ``ELSEWHERE`` with the reason, and their options are parsed. ``python`` blocks with a title are
files, the others are executed.
"""

from __future__ import annotations

import ast
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from torch import nn

import bnfold
from bnfold.cli import cli
from bnfold.pytest_plugin import OnnxGate

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*/README.md"))
#: How rows of a table begin, which are no Python by themselves.
ROWS = ("*", '"')
_BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)


def blocks(page: Path, *kinds: str) -> list[tuple[str, str, str]]:
    """Kind, title and text of every block of these kinds."""
    return [found for found in _BLOCK.findall(page.read_text()) if found[0] in kinds]


#: How lines of ``sh`` blocks begin that are not run here, and why.
ELSEWHERE = {
    "make ": "installs from an index of packages; CI runs check, of which docs and test are parts",
    "python3 -m venv ": "installs from an index of packages; CI's recipes begin like this",
    ".venv/bin/pip ": "installs from an index of packages; CI's recipes begin like this",
    "pip install ": "installs from an index of packages",
    ".venv/bin/python -m pytest ": "runs these very tests",
    "python -m bnfold check net.onnx net.py:make --device openvino ": "OpenVINO's own wheel: tests/test_openvino.py",
    "python -m bnfold check net.onnx net.py:make --runner ": "OpenVINO's own package: tests/test_openvino.py",
    "PYTHONPATH=openvino ": "OpenVINO's own wheel: tests/test_openvino.py",
    "python -m bnfold fleet models.toml ": "a cluster, or minutes: tests/test_fleet.py",
    "python -m bnfold check net.onnx SOURCE ": "a cluster: tests/test_fleet_shards.py",
    "python -m bnfold calibrate SOURCE ": "workers and shards: tests/test_fleet_shards.py",
}


def shown(kind: str, text: str) -> Iterator[tuple[list[str], str, int]]:
    """Every command of a block that is run here, what it prints, and its exit code."""
    text = re.sub(r"\\\n\s*", " ", text)
    if kind == "sh":
        for line in filter(None, text.splitlines()):
            if not line.startswith(tuple(ELSEWHERE)):
                yield shlex.split(line, comments=True), "", 0
        return
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, _, printed = part.partition("\n")
        code = re.search(r"^\[(\d+)\]$", printed, re.MULTILINE)
        yield shlex.split(command), re.sub(r"^\[\d+\]$", "", printed, flags=re.MULTILINE), int(code[1]) if code else 0


def plain(text: str) -> str:
    """The words of a text: lines may break elsewhere, numbers and the worst of several sites are the processor's."""
    text = re.sub(r"(?<![\w.])[-+]?\d[\d.]*(e[-+]?\d+)?%?", "#", re.sub(r"at '[^']*'", "at '#'", text))
    return " ".join(text.split())


def matches(printed: str, expected: str) -> bool:
    pattern = ".*".join(map(re.escape, plain(expected).split("...")))
    return re.fullmatch(pattern, plain(printed)) is not None


def ran(page: Path, folder: Path) -> int:
    """Runs the commands of a page; how many there were."""
    found = [each for kind, _, text in blocks(page, "console", "sh") for each in shown(kind, text)]
    for command, expected, code in found:
        if command[0] == "pytest":
            done = subprocess.run([sys.executable, "-m", *command], cwd=folder, capture_output=True, text=True)
            assert done.returncode == code, (command, done.stdout, done.stderr)
            continue
        assert command[:3] == ["python", "-m", "bnfold"], f"not known how to run {command}"
        result = CliRunner().invoke(cli, command[3:])
        printed = result.stdout if result.stdout or code == 0 else result.stderr
        assert result.exit_code == code, (command, result.stdout, result.stderr)
        assert not expected.strip() or matches(printed, expected), f"{shlex.join(command)}\n{printed}"
    return len(found)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every file that the pages name, the models' and their data among them."""
    folder = tmp_path_factory.mktemp("place")
    shutil.copytree(ROOT / "models", folder / "models", ignore=shutil.ignore_patterns("__pycache__"))
    for page in PAGES:
        for _, title, text in blocks(page, "python", "toml"):
            if title:
                (folder / title).write_text(text)
    first, net = made(folder / "first.py"), made(folder / "net.py")
    state = {f"model.{key}": value for key, value in first.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state, "optimizer_states": [{"state": {}}]}, folder / "last.ckpt")
    for name in ("net.safetensors", "weights.safetensors"):
        save_file(net.state_dict(), folder / name)
    np.savez(folder / "heldout.npz", image=torch.randn(4, 3, 32, 32).numpy(), labels=np.arange(4))
    return folder


def made(file: Path) -> nn.Module:
    """The ``Net`` of a file."""
    own: dict[str, Any] = {}
    exec(file.read_text(), own)
    net: nn.Module = own["Net"]()
    return net


#: Pages whose commands go on from net.onnx, which the second of these writes, and how many of them are run.
CHAIN = {
    "guides/first.md": 3, "guides/export.md": 4, "guides/regressions.md": 2, "guides/fail.md": 2, "guides/onnx.md": 3,
    "guides/sizes.md": 1, "guides/weights.md": 1, "guides/fleet.md": 1,
}  # fmt: skip


@pytest.mark.parametrize("name", CHAIN)
def test_the_commands_of_the_guides_do_what_is_shown(name: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    if name != "guides/export.md" and not Path("net.onnx").exists():
        ran(ROOT / "docs/guides/export.md", place)
    assert ran(ROOT / "docs" / name, place) == CHAIN[name]


def test_the_job_of_the_recipes_passes(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once with the option that writes its baseline, then as it stands; both servers run the same."""
    monkeypatch.chdir(place)
    found = [[*commands(re.sub(r"\n\s+-o", " -o", text))] for _, _, text in blocks(ROOT / "docs/ci.md", "yaml")]
    assert found[0] == found[1] and len(found[0]) == 1
    for more in (["--update-baseline"], []):
        done = CliRunner().invoke(cli, [*found[0][0], *more])
        assert done.exit_code == 0, done.stderr
    assert Path("baseline.json").exists() and Path("report.xml").exists() and Path("report.html").exists()


@pytest.mark.parametrize("name", ["README.md", "docs/guides/health.md"])
def test_the_commands_on_trained_nets_do_what_is_shown(place: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(place)
    assert ran(ROOT / name, place)


@pytest.mark.parametrize("page", EXAMPLES, ids=lambda page: page.parent.name)
def test_examples_do_what_is_shown(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / page.parent.name
    shutil.copytree(page.parent, folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.chdir(folder)
    assert ran(page, folder)


def test_no_page_with_commands_is_left_out() -> None:
    run = {ROOT / "README.md", ROOT / "docs/guides/health.md", *(ROOT / "docs" / name for name in CHAIN)}
    assert {
        page for page in PAGES if any([*shown(kind, text)] for kind, _, text in blocks(page, "console", "sh"))
    } == run
    lines = [line for page in PAGES for _, _, text in blocks(page, "sh") for line in text.splitlines()]
    assert [each for each in ELSEWHERE if not any(line.startswith(each) for line in lines)] == [], (
        "no such line is left"
    )


def test_python_on_the_pages_runs(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each page with a model of its own, and what else a reader is expected to have."""
    monkeypatch.chdir(place)
    net, x = partial(made, place / "net.py"), torch.randn(4, 3, 32, 32)
    gate = OnnxGate(place / "test_it.py", "docs", place, update=True)
    for page in PAGES:
        own = {
            "bnfold": bnfold, "model": net(), "x": x, "batches": [x], "net": net, "make": net, "onnx_gate": gate,
        }  # fmt: skip
        for _, title, text in blocks(page, "python"):
            if title or text.lstrip().startswith(ROWS):  # a file, or a row of a table
                continue
            exec(compile(text, str(page), "exec"), own)
            for test in [value for name, value in own.items() if name.startswith("test_")]:
                test(gate)
                del own[test.__name__]


def commands(text: str) -> Iterator[list[str]]:
    """The bnfold commands in the lines of a script, without what the shell does with them."""
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        found = re.search(r"\bbnfold ((?:export|fold|check|inspect|calibrate|bisect|fleet|bench|doctor)\b.*)", line)
        if found:
            yield shlex.split(found[1], comments=True)


@pytest.mark.parametrize("page", [*PAGES, *EXAMPLES], ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_that_are_not_run_are_commands(page: Path) -> None:
    for _, _, text in blocks(page, "sh", "yaml", "text"):
        for name, *arguments in commands(text):
            command = cli.commands[name]
            known = {option for each in command.params for option in (*each.opts, *each.secondary_opts)}
            given = {word.partition("=")[0] for word in arguments if re.match(r"--?[a-z]", word)}
            assert given <= known, (page, name, given - known)
    for kind, _, text in blocks(page, "python"):
        assert kind and (text.lstrip().startswith(ROWS) or ast.parse(text))


def test_the_comparison_sees_another_word() -> None:
    """The twin of the tests above."""
    assert matches("error 1.3e-07 times\n  17.2%", "error 9 times 3%") and matches("a 1 b c", "a ... c")
    assert not matches("error 1.3e-07 times", "error 1.3e-07 time") and not matches("a b", "a")
    assert [*shown("console", "$ a b \\\n   c\nout\n[3]\n")] == [(["a", "b", "c"], "out\n\n", 3)]
    assert [*shown("sh", "make demo\n\na b  # c\n")] == [(["a", "b"], "", 0)]
