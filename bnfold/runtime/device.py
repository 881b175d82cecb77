"""What a provider is, and a device: a provider with the options that somebody wants it to have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


def _nothing() -> None:
    """Nothing is missing, nothing is to be prepared."""


@dataclass(frozen=True)
class Provider:
    """An execution provider of ONNX Runtime; rows of ``runtime.PROVIDERS``."""

    name: str  #: what ``--device`` calls it.
    ort_name: str  #: what ONNX Runtime calls it.
    #: provider options without which it would round more coarsely than the model's own dtype; the user's come after
    #: them. A session that is opened ``deployed`` goes without.
    options: Mapping[str, str] = field(default_factory=dict, hash=False)
    package: str = ""  #: the distribution on PyPI that has it; empty where none is known.
    memory: str = "cpu"  #: where ONNX Runtime keeps its inputs and outputs when they are bound.
    needs: str = ""  #: what it takes besides the package, in words that follow "needs".
    #: why it cannot be here at all, whatever is installed, in one line; None where nothing speaks against it.
    missing: Callable[[], str | None] = _nothing
    #: makes its libraries found, before its first session; may print what it does not find.
    prepare: Callable[[], None] = _nothing
    notes: str = ""  #: what whoever reads a verdict of it should know.


@dataclass(frozen=True)
class Device:
    """A provider and the user's options for it, in the order given."""

    provider: Provider
    options: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        return " ".join([self.provider.ort_name, *(f"{key}={value}" for key, value in self.options)])

    @property
    def is_cpu(self) -> bool:
        """Whether it is the reference that every ONNX Runtime has, with nothing changed about it."""
        return self.provider.name == "cpu" and not self.options

    def provider_options(self, *, deployed: bool = False) -> dict[str, str]:
        """What a session is asked for: the user's options, and the row's own unless it is as ``deployed``."""
        return ({} if deployed else dict(self.provider.options)) | dict(self.options)
