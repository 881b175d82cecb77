"""What the documentation shows is run: commands and Python, and what they print is compared but for its numbers.

Blocks marked ``console`` are run in order, a page in a folder of its own; ``[1]`` below a command is its exit code, and
``...`` stands for any words. ``python`` blocks with a title are files, the others are executed. Of ``sh`` blocks, which
need a network, a cluster or minutes, every bnfold command is parsed.
"""

from __future__ import annotations

import ast
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

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


def shown(text: str) -> Iterator[tuple[list[str], str, int]]:
    """Every command of a console block, what it prints, and its exit code."""
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, _, printed = re.sub(r"\\\n\s*", " ", part).partition("\n")
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
    """Runs the console blocks of a page; how many commands there were."""
    count = 0
    for _, _, text in blocks(page, "console"):
        for command, expected, code in shown(text):
            if command[:2] == ["python", "-m"] and command[2] == "bnfold":
                found = CliRunner().invoke(cli, command[3:])
                printed = found.stdout if found.stdout or code == 0 else found.stderr
                assert found.exit_code == code, (command, found.stdout, found.stderr)
                assert not expected.strip() or matches(printed, expected), f"{shlex.join(command)}\n{printed}"
                count += 1
            else:
                assert command[0] in {"pytest"}, f"not known how to run {command}"
    return count


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every file that the pages name, the models' among them."""
    folder = tmp_path_factory.mktemp("place")
    shutil.copytree(ROOT / "models", folder / "models", ignore=shutil.ignore_patterns("__pycache__"))
    for page in PAGES:
        for _, title, text in blocks(page, "python", "toml"):
            if title:
                (folder / title).write_text(text)
    return folder


#: Pages whose console blocks go on from net.onnx, which the second of these writes.
CHAIN = [
    "guides/first.md",
    "guides/export.md",
    "guides/regressions.md",
    "guides/fail.md",
    "guides/onnx.md",
    "guides/sizes.md",
]


def test_the_commands_of_the_guides_do_what_is_shown(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    own: dict[str, Any] = {}
    exec((place / "first.py").read_text(), own)
    state = {f"model.{key}": value for key, value in own["Net"]().state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state, "optimizer_states": [{"state": {}}]}, "last.ckpt")
    assert [ran(ROOT / "docs" / name, place) for name in CHAIN] == [3, 4, 2, 2, 3, 1]


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
    assert {page for page in PAGES if any([*shown(text)] for _, _, text in blocks(page, "console"))} == run


def test_python_on_the_pages_runs(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each page with a model of its own, and what else a reader is expected to have."""
    monkeypatch.chdir(place)
    net: dict[str, Any] = {}
    exec((place / "net.py").read_text(), net)
    x = torch.randn(4, 3, 32, 32)
    np.savez("heldout.npz", image=x.numpy(), labels=np.arange(4))
    gate = OnnxGate(place / "test_it.py", "docs", place, update=True)
    for page in PAGES:
        own = {
            "bnfold": bnfold, "model": net["Net"](), "x": x, "batches": [x], "net": net["Net"], "make": net["Net"],
            "onnx_gate": gate,
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
    assert [*shown("$ a b \\\n   c\nout\n[3]\n")] == [(["a", "b", "c"], "out\n\n", 3)]
