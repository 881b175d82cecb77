"""Hooks of the site: its first page is the README, and a link to a file that is on no page is that file's name.

mkdocs calls these, as ``mkdocs.yml`` says.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
_LINK = re.compile(r"\[([^\]]+)\]\((?!https?:|#)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Adds the README as the first page, its links as they are seen from ``docs/``."""
    text = _LINK.sub(
        lambda m: f"[{m[1]}]({posixpath.relpath(m[2], 'docs')}{m[3] or ''})", (ROOT / "README.md").read_text()
    )
    files.append(File.generated(config, "index.md", content=text))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Links to what lies outside of ``docs/`` become names; one that leads nowhere stays, for mkdocs to warn of."""
    folder = ROOT / "docs" / Path(page.file.src_uri).parent

    def named(link: re.Match[str]) -> str:
        target = (folder / link[2]).resolve()
        outside = target.exists() and not target.is_relative_to(ROOT / "docs")
        return f"{link[1]} (`{target.relative_to(ROOT)}`)" if outside else link[0]

    return _LINK.sub(named, markdown)
