"""Results of long measurements, a JSON object per line, and the place of a page where their table stands."""

from __future__ import annotations

import datetime
import json
from importlib import metadata
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def stored(path: Path | None) -> list[Row]:
    """What a file holds; nothing where there is none."""
    if path is None or not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, mark: str, text: str) -> None:
    """Puts ``text``, with the date and versions, between the comment ``mark`` of a page and the next ``end``."""
    before, rest = path.read_text(encoding="utf-8").split(f"<!-- {mark} -->", 1)
    _, behind = rest.split("<!-- end -->", 1)
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("onnx", "onnxruntime-gpu", "torch"))
    said = f"Measured {datetime.date.today()} with {versions}."
    path.write_text(f"{before}<!-- {mark} -->\n\n{said} {text}\n\n<!-- end -->{behind}", encoding="utf-8")
