"""The pages name every command, exit code, refusal reason and kind of semantics, and their claims about files hold."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from bnfold import semantics
from bnfold.cli import cli
from bnfold.errors import EXIT_CODES
from bnfold.report import FINDINGS, REASONS
from bnfold.runtime.runtime import PROVIDERS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("examples/**/*.md"), *DOCS.rglob("*.md")]


def page(name: str) -> str:
    return (DOCS / name).read_text()


@pytest.mark.parametrize("command", cli.commands)
def test_every_command_is_in_the_readme(command: str) -> None:
    assert re.search(rf"^\| `python -m bnfold {command}\b", README, re.MULTILINE)


def test_the_first_page_is_one_page() -> None:
    assert len(README.splitlines()) <= 150


def test_the_table_of_exit_codes_is_the_programs_own() -> None:
    rows = re.findall(r"^\| (\d+) \| (.+) \|$", page("guides/export.md"), re.MULTILINE)
    assert dict(rows) == {str(k): v for k, v in EXIT_CODES.items()}


def test_the_table_of_reasons_is_the_programs_own() -> None:
    assert re.findall(r"^\| `([a-z-]+)` \|", page("guides/left.md"), re.MULTILINE) == list(REASONS)


def test_the_table_of_findings_is_the_programs_own() -> None:
    rows = re.findall(r"^\| `([a-z-]+)` \| (\w+) \|", page("guides/health.md"), re.MULTILINE)
    assert rows == [(code, severity) for code, (severity, _, _) in FINDINGS.items()]


def test_kinds_of_semantics_are_listed() -> None:
    section = page("design.md").partition("## Add an operator")[2]
    kinds = {"Scaling", "Contraction", "Recurrent", "Movement", "Average", "Sum", "Product", "Homogeneous", "Opaque"}
    assert kinds <= set(vars(semantics))
    assert all(kind in section for kind in kinds)


def test_the_row_shown_is_a_row_of_the_table() -> None:
    row = re.search(r"^\"pixel_shuffle.*: rows.move,$", page("design.md"), re.MULTILINE)
    assert row is not None
    assert row.group() in (ROOT / "bnfold" / "aten" / "__init__.py").read_text()


def anchors(text: str) -> set[str]:
    """Of its headings, as forges and the site make them."""
    heads = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    for link, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", path.read_text()):
        target = (path.parent / link).resolve() if link else path
        assert target.exists(), (link, path)
        assert not anchor or anchor in anchors(target.read_text()), (link, anchor)


def test_every_page_is_in_the_navigation_of_the_site() -> None:
    listed = re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text().partition("nav:")[2])
    assert sorted(listed) == sorted(["index.md", *(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))])


#: What the README promised when it was one page: each is still said somewhere.
PROMISES = (
    "no tolerance to choose",
    "never install two",
    "--unsafe-pickle",
    "allow-list",
    "--mean-std",
    "schema.json is its JSON Schema",
    "without scripts or requests",
    "only a pass passes",
    "16 times the median",
    "--data 'shards/*.npz'",
    "in standard deviations",
    "exact mean and variance",
    "as such: it reads",
    "plain torch.export.load reads it",
    "under torch.compile and AOTInductor",
    "one refusal per direction",
    "never adds multiply-adds, weights or operators",
    "powers of two, so no bit",
    "truth is the captured, unfolded graph",
    "of every sample is at most 4, and no single element is off by more than 6 times its noise",
    "near-tie",
    "64 times the noise",
    "none falls back",
    "measured, not believed",
    "nothing is unpickled",
    "one that is made on the way cannot fail",
    "pytest --bnfold-update",
    "have not been measured: there was no GPU",
    "geometric means",
    "grow linearly",
    "an operator without a row lets nothing pass",
    "who may import whom",
)


def test_every_promise_of_the_old_first_page_is_still_somewhere() -> None:
    def words(text: str) -> str:
        return " ".join(re.sub(r"[`*]", "", text).lower().split())

    said = words(" ".join(path.read_text() for path in PAGES))
    missing = [promise for promise in PROMISES if words(promise) not in said]
    assert missing == []


@pytest.mark.parametrize("module", sorted(p for p in (ROOT / "bnfold").rglob("*.py")), ids=lambda p: p.name)
def test_no_module_outgrows_a_head(module: Path) -> None:
    assert len(module.read_text().splitlines()) <= 430, "split it along the data flow"


def test_the_requirements_without_a_gpu_are_those_of_the_package() -> None:
    """But for the runtime, of which that without CUDA is taken everywhere."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [line.partition(";")[0].strip() for line in project["dependencies"]]
    lines = [line for line in (ROOT / "requirements-cpu.txt").read_text().splitlines() if not line.startswith("#")]
    assert lines == [line for line in wanted if not line.startswith("onnxruntime-gpu")]
    assert any(line.startswith("onnxruntime>=") for line in lines)


def test_the_classifiers_are_the_versions_that_the_guide_says_were_run() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    classifiers = [each.rpartition(" ")[2] for each in project["classifiers"] if "Python :: 3." in each]
    assert classifiers == re.findall(r"CPython (3\.\d+)", page("guides/install.md"))


def test_every_provider_is_in_the_table() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \|", (ROOT / "docs" / "providers.md").read_text(), re.MULTILINE)
    assert rows == [(row.name, row.ort_name) for row in PROVIDERS]
    for row in PROVIDERS:
        assert f"`{row.name}`" in README, "the README names them too"


def test_only_the_runtime_knows_cuda() -> None:
    """A provider is a row: runtime/ alone tells one by its name, and timing/ torch's device of that name."""
    own = {"runtime", "timing"}
    files = [p for p in (ROOT / "bnfold").rglob("*") if p.suffix in {".py", ".json"} and p.parent.name not in own]
    assert [str(p) for p in files if '"cuda"' in p.read_text()] == []


def test_what_pip_installs_is_the_whole_package() -> None:
    """Every folder with modules is a package, which setuptools finds, and files that are no modules are listed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert project["packages"] == {"find": {"include": ["bnfold*"]}}
    folders = {path.parent for path in (ROOT / "bnfold").rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []
    listed = [path for each in project["package-data"]["bnfold"] for path in (ROOT / "bnfold").glob(each)]
    others = [p for p in (ROOT / "bnfold").rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")]
    assert sorted(listed) == sorted(others)
