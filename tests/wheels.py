"""Packages that cannot stand beside the others: each in a folder of its own, which a test puts first on the path.

``make wheels`` fills the folders. onnxruntime-openvino would overwrite onnxruntime-gpu, and what needs neither has no
business in an installation of bnfold.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path(os.environ.get("BNFOLD_WHEELS", ROOT / "build" / "wheels"))


def path_with(package: str) -> str:
    """A PYTHONPATH on which a package of ``make wheels`` comes first, and bnfold second; skips where it is absent."""
    folder = FOLDER / package
    if not (folder / ".installed").is_file():
        pytest.skip(f"{package} is not in {folder}: `make wheels` installs it there")
    return os.pathsep.join([str(folder), str(ROOT)])
