"""What the pipeline is asked for, and what it hands back of a fold."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from bnfold.eager.eager import WrittenBack
from bnfold.eager.eager import write_back as write_into_class
from bnfold.gate.gate import LIMIT
from bnfold.graph.capture import Captured
from bnfold.graph.wrapped import unwrapped
from bnfold.loading.load import Provenance
from bnfold.report import Ledger
from bnfold.runtime.runner import TIME_LIMIT

Model = nn.Module | ExportedProgram
#: Called with a stage's name, how much of it is done, and how much there is.
Progress = Callable[[str, int, int], None]


def silent(stage: str, done: int, total: int) -> None:
    """Reports nothing."""


@dataclass(frozen=True)
class Folded:
    """A folded model.

    Attributes:
        program: the folded program; ``torch.export.save`` takes it.
        ledger: one entry per affine: where it went, or why it stays.
        captured: the unfolded program that it came from.
    """

    program: ExportedProgram
    ledger: Ledger
    captured: Captured

    @property
    def module(self) -> nn.Module:
        """The folded model as a torch.nn.Module with the same signature."""
        module: nn.Module = self.program.module()
        return module

    def apply_to(self, model: Model) -> nn.Module:
        """A copy of ``model``, of the same class and in eval mode, with the folds written into it.

        Weights change, layers gain biases, and an ``nn.Identity`` stands where a BatchNorm was. What the class cannot
        express stays: see ``write_back``, which names it.

        Args:
            model: what was folded; not touched.

        Raises:
            InputError: ``model`` is a program, which has no class, or is not what was folded.
            FoldError: the copy does not compute what the folded program does.
        """
        return self.write_back(model).module

    def write_back(self, model: Model) -> WrittenBack:
        """As ``apply_to``, with the ledger of what was written: ``.module``, ``.ledger``, ``.refused``, ``.program``.

        A merge, and a fold that gives each use of a weight its own, are in no class: the fold is planned again without
        them, so that ``.program`` may be less folded than this one. ``bnfold.prepare(other, written.ledger)`` gives
        another instance of the class the structure that ``written.module.state_dict()`` loads into.
        """
        return write_into_class(self.captured, model if isinstance(model, ExportedProgram) else unwrapped(model))


@dataclass(frozen=True)
class Options:
    """What ``export`` can be asked for beyond its model and its inputs; see the README's table."""

    device: str = "auto"
    provider_options: Mapping[str, str] = field(default_factory=dict)
    require_all_nodes: bool = False
    runner: str | Callable[..., Any] | None = None
    runner_timeout: float = TIME_LIMIT
    precision: str | None = None
    data: Path | str | Mapping[str, Any] | None = None
    samples: int = 10
    seed: int = 0
    adversarial: bool = False
    limit: float = LIMIT
    opset: int | None = None
    dtype: torch.dtype | str | None = None
    static: bool = False
    fold: bool = True
    merge: bool = True
    equalize: bool = False
    eager: bool = False
    #: None: a torch model is, and of an ONNX file only what folds is touched.
    simplify: bool | None = None
    check: bool = True
    external_data: bool | None = None
    allow_nonfinite: bool = False
    keep_failed: bool = False
    dry_run: bool = False
    baseline: Path | str | None = None
    update_baseline: bool = False
    provenance: Provenance | None = None
    sources: Sequence[Path] = ()
    progress: Progress = field(default=silent, repr=False)

    @property
    def notes(self) -> Mapping[str, str]:
        """bnfold's own notes in the file that the weights came from; a file of weights that is written keeps them."""
        return {} if self.provenance is None else self.provenance.notes


class Clock:
    """Times the stages and reports them as they begin."""

    def __init__(self, progress: Progress) -> None:
        self.spent: dict[str, float] = {}
        self._progress = progress

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Times one stage, in seconds."""
        self._progress(stage, 0, 1)
        start = time.perf_counter()
        yield
        self.spent[stage] = time.perf_counter() - start
        self._progress(stage, 1, 1)
