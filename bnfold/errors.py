"""One error class per stage, each with the exit code that the command line documents.

An error says what is wrong, where, and the way out. The low-level code raises with the fact; the stage that knows
the user's words (a path, a module name, an option) fills in ``where`` and ``hint``.
"""

from __future__ import annotations

from typing import ClassVar


def printable(text: str) -> str:
    r"""``text`` for a terminal, which characters of names in files could steer: ``\x1b`` is spelt out.

    >>> printable("\x1b[31mred\u202e")
    '\\x1b[31mred\\u202e'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def first_line(error: BaseException) -> str:
    """The first line of what an exception says; of one that says nothing, its class."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


class BnfoldError(Exception):
    """Base of every error that bnfold raises on purpose.

    Args:
        what: what is wrong, in one sentence without a full stop.
        where: the file, module or option it is about.
        hint: what the user can do about it.
    """

    exit_code: ClassVar[int] = 4

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(what)
        self.what, self.where, self.hint = what, where, hint

    def __str__(self) -> str:
        # One line, whatever the text of an underlying exception looked like.
        text = " ".join((f"{self.where}: " if self.where else "").split() + self.what.split())
        return printable(f"{text}. {' '.join(self.hint.split())}" if self.hint else text)


class UsageError(BnfoldError):
    """The arguments contradict each other or cannot be understood."""

    exit_code = 2


class InputError(BnfoldError):
    """A file, checkpoint, factory or input specification was rejected."""

    exit_code = 3


class CaptureError(BnfoldError):
    """``torch.export`` could not capture the model."""


class FoldError(BnfoldError):
    """The graph cannot be folded at all, or holds values that must not be folded (NaN, negative variance)."""


class LowerError(BnfoldError):
    """The graph could not be written as valid ONNX."""


class ProviderError(BnfoldError):
    """The environment lacks what was asked for: a package, a provider, a CUDA library."""

    exit_code = 5


class ResourceError(BnfoldError):
    """The disk or the memory gave out, or the destination cannot be written."""

    exit_code = 6


#: Every exit code of the command line, with its meaning, in the order of the README's table.
EXIT_CODES: dict[int, str] = {
    0: "pass: the file was written, or everything asked for holds",
    1: "the gate failed: nothing was written; bisect found a culprit, or inspect --strict an error or a warning",
    2: "usage: the arguments cannot be understood",
    3: "input rejected: a file, checkpoint, factory or input specification",
    4: "capture, fold or lowering failed",
    5: "environment: a package or an execution provider is missing",
    6: "disk or memory: the result could not be stored",
    7: "inconclusive: the model is too noisy on these inputs for a verdict",
    130: "interrupted",
    143: "terminated",
}
