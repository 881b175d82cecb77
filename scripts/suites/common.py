"""What the suites share: their settings, the tables they hand back, the files that they compare."""

from __future__ import annotations

import contextlib
import datetime
import io
import logging
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn

from bnfold.report import Latency
from bnfold.runtime.runtime import cuda_problem
from bnfold.timing.bench import machine, matched_feeds, measure, onnx_contestants, random_feeds, sized_inputs


@dataclass(frozen=True)
class Settings:
    """What the command line asks of a suite.

    Attributes:
        only: names of what to measure; empty for all.
        quick: small models, to see that it works.
        rounds: turns of every contestant.
        threads: for one call.
        device: ``"auto"`` measures on CUDA as well, where it works.
    """

    only: frozenset[str] = frozenset()
    quick: bool = False
    rounds: int = 60
    threads: int = 1
    device: str = "auto"

    def wants(self, name: str) -> bool:
        """Whether ``name`` is to be measured."""
        return not self.only or name in self.only

    def devices(self) -> list[str]:
        """Where to measure."""
        return ["cpu", "cuda"] if self.device == "auto" and cuda_problem() is None else ["cpu"]


@dataclass(frozen=True)
class Table:
    """A table with what stands above and below it."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    before: str = ""
    after: str = ""

    def markdown(self) -> str:
        """Names to the left, numbers to the right."""
        rule = ["---"] + ["---:"] * (len(self.columns) - 1)
        lines = ["| " + " | ".join(row) + " |" for row in (self.columns, rule, *self.rows)]
        parts = [f"## {self.title}", self.before, "\n".join(lines), self.after]
        return "\n\n".join(part for part in parts if part)


@dataclass(frozen=True)
class Outcome:
    """What a suite found: tables for people, ``data`` for programs."""

    title: str
    intro: str
    tables: Sequence[Table]
    data: dict[str, Any] = field(repr=False)
    #: Draws the picture that stands above the tables, as SVG.
    figure: Callable[[Path], None] | None = None

    def markdown(self, picture: str = "") -> str:
        """The whole page, with the picture of that name."""
        shown = [f"![{self.title}]({picture})"] if picture else []
        tables = (table.markdown() for table in self.tables)
        return "\n\n".join([f"# {self.title}", self.intro, *shown, *tables]) + "\n"


def conditions(settings: Settings) -> dict[str, str]:
    """Date, machine and versions, and how it was measured."""
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {"date": today, **machine(), "threads": str(settings.threads), "rounds": str(settings.rounds)}


def sentence(found: dict[str, str]) -> str:
    """``conditions`` in words."""
    versions = ", ".join(
        f"{name} {found[name]}" for name in ("onnxruntime-gpu", "onnxruntime", "torch") if name in found
    )
    return (
        f"Measured on {found['date']}: {found['processor']}, {found['cores']} cores, {found['system']}; {versions}; "
        f"threads per call {found['threads']}, {found['rounds']} rounds."
    )


def race(paths: Sequence[Path], settings: Settings, device: str) -> list[Latency]:
    """Files on the same random inputs, in turn; ratios refer to the first."""
    feeds = [random_feeds(sized_inputs(paths[0]))]
    feeds += [matched_feeds(path, feeds[0], paths[0]) for path in paths[1:]]
    threads = settings.threads if device == "cpu" else None
    contestants = onnx_contestants(paths, feeds, device=device, threads=threads)
    return list(measure(contestants, rounds=settings.rounds))


def torch_onnx(model: nn.Module, args: tuple[Any, ...], path: Path) -> Path:
    """What ``torch.onnx.export`` writes by default, its own optimiser included."""
    with quiet():
        program = torch.onnx.export(model, args, dynamo=True, verbose=False)
        assert program is not None
        program.save(path)
    return path


def operators(path: Path) -> int:
    """Nodes of an ONNX file's graph."""
    return len(onnx.load(path, load_external_data=False).graph.node)


def plain(latency: Latency) -> dict[str, Any]:
    """A latency as what JSON knows."""
    return asdict(latency) | {"name": Path(latency.name).stem}


def geometric_mean(values: Sequence[float]) -> float:
    """Of positive numbers."""
    return math.exp(sum(map(math.log, values)) / len(values)) if values else math.nan


def spread(latency: Latency) -> str:
    """``1.23x (1.21 to 1.25)``: by how much the first contestant is faster."""
    low, high = latency.interval
    return f"{latency.ratio:.2f}x ({low:.2f} to {high:.2f})"


def tell(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps to itself what torch.onnx prints."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)
