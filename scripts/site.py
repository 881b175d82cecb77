"""Hooks of the site: its first page is the README, a link to a file that is on no page is that file's name, and what a
comment says of a field is the field's docstring.

mkdocs calls these, as ``mkdocs.yml`` says.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

import griffe
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


class FieldComments(griffe.Extension):
    """What ``#:`` says behind a field or above it is what a docstring below it would say."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        """Called for every attribute that is found."""
        if attr.docstring is not None or attr.lineno is None or not isinstance(attr.filepath, Path):
            return
        lines = attr.filepath.read_text(encoding="utf-8").splitlines()
        said = [lines[attr.lineno - 1].partition("#: ")[2]]
        for line in reversed(lines[: attr.lineno - 1]):
            if not line.strip().startswith("#: "):
                break
            said.insert(0, line.strip().removeprefix("#: "))
        if text := " ".join(said).strip():
            attr.docstring = griffe.Docstring(text[0].upper() + text[1:], parent=attr)
