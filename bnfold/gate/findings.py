"""What is said of a file, and in which words."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from bnfold.errors import BnfoldError


@dataclass
class Findings:
    """What speaks against a pass: ``problems`` make it a fail, ``doubts`` inconclusive, ``notes`` only inform."""

    problems: list[str] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def once(self) -> None:
        """Drops what is said twice; of problems and doubts that differ in numbers alone the first stays."""
        self.notes = list(dict.fromkeys(self.notes))
        for texts in (self.problems, self.doubts):
            kinds: dict[str, list[str]] = {}
            for text in dict.fromkeys(texts):
                kinds.setdefault(kind_of(text), []).append(text)
            texts[:] = [t[0] + (f" (and {len(t) - 1} more like it)" if t[1:] else "") for t in kinds.values()]


def kind_of(text: str) -> str:
    """A text without its numbers, save for those in names."""
    return re.sub(r"(?<!\w)('[^']*')|(?<![\w.])\d[\d.e+-]*", lambda found: found[1] or "#", text)


def first_line(error: BaseException) -> str:
    """Type and first line of an exception, for a message; one of ours without its type."""
    text = str(error).strip().splitlines()
    if isinstance(error, BnfoldError) and text:
        return text[0]
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
