"""What the pipeline is asked for, and what it hands back of a fold."""

from __future__ import annotations

import ctypes
import difflib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypedDict, TypeVar

import torch
from torch import nn
from torch.export import ExportedProgram

from bnfold.eager.eager import WrittenBack
from bnfold.eager.eager import write_back as write_into_class
from bnfold.errors import UsageError
from bnfold.gate.gate import LIMIT
from bnfold.graph.capture import Captured
from bnfold.graph.wrapped import unwrapped
from bnfold.loading.source import Provenance
from bnfold.report import Ledger
from bnfold.report.progress import Progress, silent
from bnfold.runtime.runner import TIME_LIMIT
from bnfold.user_code import unended

Model = nn.Module | ExportedProgram
_Function = TypeVar("_Function", bound=Callable[..., Any])


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
    """What ``export`` and its like can be asked for beyond the model and its inputs, each as a keyword argument too.

    Attributes:
        device: the provider that runs the file: ``cpu``, ``cuda``, ``openvino``, ... as ``--device`` takes them;
            ``auto`` is CUDA where that works.
        provider_options: of that provider.
        require_all_nodes: fail where a node runs on another provider.
        runner: ``"file.py:name"`` or a callable that is judged as well.
        runner_timeout: seconds for one call of it.
        precision: what it computes in, such as ``"float16"``; the model's dtype by default.
        data: samples by input name, or the .npz or .npy file that holds them.
        samples: how many to compare, 10 at least.
        seed: of random samples.
        adversarial: look by gradient for inputs that overflow or differ most.
        limit: the largest error, in multiples of the unfolded model's own.
        opset: ONNX operator set; ``opset_version`` is understood too.
        dtype: convert the model to this floating-point dtype first.
        static: no dynamic sizes by default.
        fold, merge, simplify, check: on, unless False; an ONNX file is simplified only if True.
        equalize: move scales between layers so that per-tensor int8 loses less.
        eager: write the folds into the model's own class (``save_folded``).
        external_data: weights in a file beside it; by default above 1 GB.
        allow_nonfinite: leave a BatchNorm with NaN or infinities in place instead of raising.
        keep_failed: keep a file that does not pass, as NAME.failed.SUFFIX.
        dry_run: write nothing.
        baseline: JSON file that the run must not be worse than.
        update_baseline: write it, if the verdict is a pass.
        input_names, output_names: of the file's inputs and outputs, in order; by default the model's own.
        metadata: entries of the file's ``metadata_props``.
        provenance, sources: where the model comes from, and the files that must not be written over.
        progress: called with a stage's name, how much of it is done, and how much there is.
    """

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
    input_names: Sequence[str] = ()
    output_names: Sequence[str] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    provenance: Provenance | None = None
    sources: Sequence[Path] = ()
    progress: Progress = field(default=silent, repr=False)

    @property
    def notes(self) -> Mapping[str, str]:
        """bnfold's own notes in the file that the weights came from; a file of weights that is written keeps them."""
        return {} if self.provenance is None else self.provenance.notes


class OptionFields(TypedDict, total=False):
    """The fields of ``Options`` as keyword arguments; a test holds the two together."""

    device: str
    provider_options: Mapping[str, str]
    require_all_nodes: bool
    runner: str | Callable[..., Any] | None
    runner_timeout: float
    precision: str | None
    data: Path | str | Mapping[str, Any] | None
    samples: int
    seed: int
    adversarial: bool
    limit: float
    opset: int | None
    opset_version: int | None
    dtype: torch.dtype | str | None
    static: bool
    fold: bool
    merge: bool
    equalize: bool
    eager: bool
    simplify: bool | None
    check: bool
    external_data: bool | None
    allow_nonfinite: bool
    keep_failed: bool
    dry_run: bool
    baseline: Path | str | None
    update_baseline: bool
    input_names: Sequence[str]
    output_names: Sequence[str]
    metadata: Mapping[str, str]
    provenance: Provenance | None
    sources: Sequence[Path]
    progress: Progress


def public(function: _Function) -> _Function:
    """A function for users: the model's code does not end its run, its docstring lists the options that it takes."""
    if "OptionFields" in str(function.__annotations__.get("more")) and function.__doc__ and Options.__doc__:
        function.__doc__ += f"\n    Options:{Options.__doc__.partition('Attributes:')[2]}"
    return unended()(function)


#: What ``torch.onnx.export`` takes besides, and why bnfold does not.
_OF_TORCH = {
    "dynamic_axes": "Give dynamic_shapes, as torch.export has it",
    "f": "The path is the second argument",
    "export_params": "The weights are always in the file",
    "verify": "The check is always made, unless check=False",
    "do_constant_folding": "simplify=False leaves simplification out",
    "optimize": "simplify=False leaves simplification out",
    "training": "What is exported is the model in eval mode",
    "report": "The report is what export returns; it has to_json()",
    "keep_initializers_as_inputs": "Weights are no inputs of the file",
    "verbose": "progress= is told of every stage",
    **dict.fromkeys(
        ("dynamo", "fallback", "operator_export_type", "custom_opsets", "custom_translation_table", "autograd_inlining",
         "export_modules_as_functions", "profile", "dump_exported_program", "artifacts_dir"),
        "bnfold calls the exporter its own way; leave it out",
    ),
}  # fmt: skip


def asked(options: Options | None, more: Mapping[str, Any]) -> Options:
    """The options of a call: ``options``, with what was given by name in place.

    UsageError where there is no such option, with the nearest, or what stands for torch.onnx's.
    """
    more = dict(more)
    if "opset_version" in more:  # torch.onnx's own word
        more.setdefault("opset", more.pop("opset_version"))
    known = [each.name for each in fields(Options)]
    for name in more:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = _OF_TORCH.get(name) or (f"Did you mean {near[0]}?" if near else f"There are {', '.join(known)}")
            raise UsageError(f"there is no option {name!r}", hint=hint)
    return replace(options or Options(), **more)


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
        _give_back()
        self._progress(stage, 1, 1)


def _give_back() -> None:
    """Gives freed memory back to the system: glibc keeps what one stage freed, and the next asks for other sizes."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
