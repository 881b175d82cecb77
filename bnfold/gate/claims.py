"""What claims to equal a model, in float64: the written file, every operator of it, or the folded program."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
from torch import Tensor
from torch.export import ExportedProgram

from bnfold.evaluate.evaluator import After, File64
from bnfold.evaluate.reading import inlined
from bnfold.evaluate.subject import Run
from bnfold.gate.models import Program64
from bnfold.gate.samples import Batch
from bnfold.gate.values import as_tensor, to_numpy
from bnfold.runtime.model_file import opsets_of


def run_file(
    file: File64, inputs: Mapping[str, Tensor], keep: Collection[str] = (), *, follow: Mapping[str, Any] | None = None,
    jitter: tuple[float | None, int] | None = None, after: After | None = None,
) -> Run:  # fmt: skip
    """One run of a file in float64, with tensors in and out; what is no array stays as it is."""
    feeds = {name: to_numpy(x) for name, x in inputs.items()}
    theirs = {name: to_numpy(x) if isinstance(x, Tensor) else x for name, x in (follow or {}).items()}
    found = file.run(feeds, keep, follow=theirs, decide=jitter is None, jitter=jitter, after=after)
    return Run(
        tuple(as_tensor(x) for x in found.outputs), {n: as_tensor(x) for n, x in found.kept.items()},
        {n: as_tensor(x) for n, x in found.decided.items()},
        tuple(replace(turn, compared=as_tensor(turn.compared)) for turn in found.turns), found.shapes,
    )  # fmt: skip


class FileClaim:
    """An ONNX file in float64.

    Args:
        path: the file.
        model: what was read from it.
        inputs: flat input index and the file's name for it.
        outputs: its outputs that are the model's, in the model's order; None for all as they are.
        names: what the file calls the model's values, where that is known.
        epsilon: of the finest dtype that the model's constants are stored in.
        halves: the dtypes of half the width that the model computes in; a cast of the file to another one rounds.

    Raises:
        MissingOperatorError: it holds an operator that nothing computes in float64.
    """

    def __init__(
        self, path: Path, model: onnx.ModelProto, inputs: Sequence[tuple[int, str]], outputs: Sequence[str] | None,
        names: Mapping[str, str] | None, epsilon: float, halves: Collection[str],
    ) -> None:  # fmt: skip
        model = inlined(model)  # so that operators in functions are asked too
        self.name, self.file = "the file in float64", File64(model, beside=path.parent, where=str(path))
        self._inputs, self._outputs, self._names, self._epsilon = inputs, outputs, names or {}, epsilon
        self._halves = bool(halves)
        self.file.rounds = {"float16", "bfloat16"} - set(halves)
        #: Its operators and their versions without its weights.
        self.graph = onnx.GraphProto(node=model.graph.node, output=model.graph.output)
        self.opsets = opsets_of(model)
        self.values = {name for node in self.graph.node for name in node.output if name}
        self.knows = names is not None
        self._taken = {value.name for value in self.file.inputs}
        #: Types as they are declared.
        self.dtypes = {v.name: v.type.tensor_type.elem_type for v in model.graph.output}

    def called(self, name: str) -> str | None:
        """What the file calls a value of the model; where nobody said so, what torch.onnx calls it."""
        tries = (self._names[name],) if name in self._names else (name, f"{name}_value", f"{name}:0")
        return next((each for each in tries if each in self.values), None)

    def unread(self, decisions: Iterable[str]) -> list[str]:
        """As ``Claim.unread``."""
        return [name for name in decisions if self.called(name) is None]

    def run(
        self, batch: Batch, keep: Collection[str] = (), *, follow: Mapping[str, Any] | None = None,
        seed: int | None = None, after: After | None = None,
    ) -> Run:  # fmt: skip
        """As ``Claim.run``, and as ``File64.run``."""
        # A model that computes in halves has values that are no finer: there each constant is drawn by its own dtype.
        jitter = None if seed is None else (None if self._halves else self._epsilon, seed)
        found = run_file(self.file, self._given(batch), keep, follow=follow, jitter=jitter, after=after)
        if self._outputs is None:
            return found
        by_name = {v.name: x for v, x in zip(self.file.outputs, found.outputs)}
        return replace(found, outputs=tuple(by_name[name] for name in self._outputs))

    def _given(self, batch: Batch) -> dict[str, Any]:
        return {name: batch.flat[index] for index, name in self._inputs if name in self._taken}

    def feeds(self, batch: Batch) -> dict[str, Any]:
        """What the file is given, as arrays."""
        return {name: to_numpy(x) for name, x in self._given(batch).items()}

    def weights(self) -> Weights:
        """Its constants, as they are stored; read one by one."""
        return Weights(self.file)


class Weights(Mapping[str, Any]):
    """The constants of a file by name, each read when it is asked for; bfloat16 as ONNX Runtime on a CPU has it."""

    def __init__(self, file: File64) -> None:
        self._held = file.weights()

    def __getitem__(self, name: str) -> Any:
        return self._held[name].array()

    def __contains__(self, name: object) -> bool:
        return name in self._held  # without reading it

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)


class ProgramClaim(Program64):
    """The folded program in float64, its constants rounded as they are."""

    knows = True

    def __init__(self, program: ExportedProgram) -> None:
        super().__init__(program)
        self.name = "folded torch"
        self._nodes = {node.name for node in program.graph.nodes}

    def called(self, name: str) -> str | None:
        """Values keep their names."""
        return name if name in self._nodes else None

    def unread(self, decisions: Iterable[str]) -> list[str]:
        """As ``Claim.unread``."""
        known = {place.value for place in self.places} | {place.twin for place in self.places}
        return [name for name in decisions if name not in known]
