"""A small share of ``scripts/torture.py``; docs/reliability.md has a full run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="trials are forks")


def tortured(*arguments: str) -> str:
    command = [sys.executable, str(ROOT / "scripts" / "torture.py"), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout


def test_files_are_whole_or_absent(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    told = tortured(
        "--share", "0.01", "--only", "commits,exports,terminations,writers,disks,limits", "--write", str(page)
    )
    parts = re.findall(r"^(.+): (\d+) trials, 0 faults; (.+) \(", told, re.M)
    assert len(parts) == 6 and all(int(trials) > 0 or "not tried" in counts for _, trials, counts in parts), told
    assert all(f"| {name} |" in page.read_text() for name, _, _ in parts)


def test_files_from_strangers_are_refused_in_one_line() -> None:
    told = tortured("--share", "0.02", "--only", "mutations", "--seed", "1")
    assert re.search(r"damaged files: \d+ trials, 0 faults; .*exit 3", told), told


def test_a_fault_is_told(tmp_path: Path) -> None:
    """The twin: a store that renames before it is done, and a reader that lets every error out."""
    script = tmp_path / "torture_twice.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT / 'scripts')!r})\n"
        "import shutil, torture, hostile_files\nfrom pathlib import Path\n"
        "from bnfold import store\n"
        "def commit(self, file, data=None, *, name=None):\n"
        "    with (self.folder / file).open('rb') as source, self.path.open('wb') as target:\n"
        "        while piece := source.read(64): target.write(piece), target.flush()\n"
        "store.Staging.commit = commit\n"
        "sys.exit(torture.main(['--share', '0.02', '--only', 'commits']))\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 1 and "FAULT trial" in done.stdout, done.stdout + done.stderr[-2000:]
