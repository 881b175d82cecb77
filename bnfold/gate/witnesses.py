"""Who computes what a model does, in float64: a program, or every operator of a file."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor
from torch.export import ExportedProgram

from bnfold.aten.deciding import bound
from bnfold.evaluate.evaluator import After, File64
from bnfold.evaluate.reading import inlined
from bnfold.evaluate.subject import Run, Turn
from bnfold.gate.decisions import Place, places
from bnfold.gate.evidence import EXCUSE, Draws, Source, unit_roundoff
from bnfold.gate.samples import Batch
from bnfold.gate.values import as_tensor, numbers, to_numpy
from bnfold.graph.functional import module_of
from bnfold.graph.interpret import Runner, Steering
from bnfold.runtime.model_file import opsets_of, read_model


class Witness:
    """A *reference*, or a *claim* that equals it. Each has names of its own for values, and outputs in one order.

    Attributes:
        name: what reports call it.
        outputs: the names of its outputs.
        units: unit roundoff of every output that holds floats, by its name.
        epsilon: of the finest dtype that a constant is stored in: what rounds more coarsely has lost something.
        halves: the dtypes of half the width that it has values of.
        decisions: the values that hold decisions on floats.
        louder: how many times louder than rounding its constants is what ``loudly`` does; 1: it has no such run.
        knows: whether, as a claim, it is told what the reference's values are called in it, or has to guess.
    """

    name: str
    outputs: Sequence[str]
    units: Mapping[str, float]
    epsilon: float
    halves: Collection[str]
    decisions: Sequence[str] = ()
    louder: float = 1.0
    knows: bool = True

    @property
    def coarsest(self) -> float:
        """The unit roundoff of the coarsest output; that of float32 where none holds floats."""
        return max(self.units.values(), default=2.0**-24)

    def draws(self, sources: Sequence[Source], begun: Draws | None = None) -> Draws:
        """As its own constants and a claim's are drawn. What rounds to halves may move by much of itself: no bound."""
        return Draws(sources, begun, self.coarsest, math.inf if self.halves else EXCUSE)

    def run(
        self, batch: Batch, keep: Collection[str] = (), *, follow: Mapping[str, Any] | None = None,
        seed: int | None = None,
    ) -> Run:  # fmt: skip
        """In float64: by itself with all that it decides, after somebody else's decisions, or with constants drawn.

        Raises:
            Exception: whatever an operator raises.
        """
        raise NotImplementedError

    def after(self, batch: Batch, known: Run, taken: Mapping[str, Any]) -> Run:
        """A run after somebody's decisions; the one that is ``known``, by itself, where that decides as they do."""
        mine = known.decided
        both = [(mine[name], x) for name, x in taken.items() if name in mine and x.shape == mine[name].shape]
        if all(torch.equal(x.to(own.dtype), own) for own, x in both):
            return known
        return self.run(batch, follow={**mine, **taken})

    def own(self, batch: Batch) -> list[Tensor]:
        """The outputs as it computes them in its own dtypes.

        Raises:
            Exception: it does not run on these inputs.
        """
        raise NotImplementedError

    def loudly(self, batch: Batch, seed: int | None, keep: Collection[str] = ()) -> Run:
        """As it computes in its own dtypes, with its constants disturbed or, without a seed, as they are."""
        raise NotImplementedError

    def complete(self, taken: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Decisions, and those of places that compute the very same: a file may hold one of them only."""
        return dict(taken)

    def called(self, name: str) -> str | None:
        """What, as a claim, it calls a value of the reference; None where it has none."""
        raise NotImplementedError

    def unread(self, decisions: Iterable[str]) -> list[str]:
        """The decisions of the reference that it has no name for."""
        return [name for name in decisions if self.called(name) is None]


# ---- a program ------------------------------------------------------------------------------------------------------


class Program64(Witness):
    """A program, captured or folded; ``masters`` are constants of higher precision, as for ``Runner``."""

    name = "folded torch"

    def __init__(self, program: ExportedProgram, masters: Mapping[str, Tensor] | None = None) -> None:
        self.program, self._masters = program, masters
        self.places: tuple[Place, ...] = places(program, module_of)
        self._runner = Runner(program, precise=True, masters=masters)
        self._moved: Runner | None = None
        self._nodes = {node.name for node in program.graph.nodes}

    def run(
        self, batch: Batch, keep: Collection[str] = (), *, follow: Mapping[str, Any] | None = None,
        seed: int | None = None,
    ) -> Run:  # fmt: skip
        """As ``Witness.run``."""
        runner = self._runner
        if seed is not None:
            if self._moved is None:
                self._moved = Runner(self.program, precise=True, masters=self._masters, jitter=True)
            runner, self._moved.seed = self._moved, seed
        turns: list[Turn] = []
        chosen = [(place, (follow or {}).get(place.value)) for place in self.places]
        steering = {place.node: _steer(place, taken, turns) for place, taken in chosen if taken is not None}
        deciding = [place.value for place in self.places]
        outputs = numbers(runner(batch.flat, keep={*keep, *deciding}, steering=steering))
        held = runner.taken()
        kept, decided = ({n: held[n] for n in each if n in held} for each in (keep, deciding))
        return Run(tuple(outputs), kept, decided, tuple(turns))

    def called(self, name: str) -> str | None:
        """Values keep their names."""
        return name if name in self._nodes else None

    def unread(self, decisions: Iterable[str]) -> list[str]:
        """As ``Witness.unread``."""
        known = {place.value for place in self.places} | {place.twin for place in self.places}
        return [name for name in decisions if name not in known]


def _steer(place: Place, chosen: Any, turns: list[Turn]) -> Steering:
    def decide(args: tuple[Any, ...], kwargs: dict[str, Any], own: Any) -> Any:
        mine, theirs = own if place.rule.item is None else own[place.rule.item], as_tensor(chosen)
        if mine.shape != theirs.shape:
            return own
        differs = place.rule.differs(mine, theirs)
        at = bound(place.target, args, kwargs)
        if not bool(differs.any()):
            turns.append(Turn(place.value, place.words, np.zeros(1), 0, place.rule.compared(at)))
            return own
        if place.twin == place.value:  # what computes the very same is judged once
            gap = place.rule.gap(at, mine, theirs)
            turns.append(Turn(place.value, place.words, gap.numpy(), int(differs.sum()), place.rule.compared(at)))
        return place.rule.result(at, own, theirs)

    return decide


# ---- a file ----------------------------------------------------------------------------------------------------------


class FileWitness(Witness):
    """An ONNX file, every operator of it.

    Args:
        path: the file.
        model: what was read from it.
        inputs: flat input index and the file's name for it; by default its own in their order.
        outputs: its outputs that are the reference's, in that one's order; None for all as they are.
        names: what the file calls the reference's values, where that is known.
        like: the reference, where it claims to equal one: how coarse its constants may be, and what a cast may round.

    Raises:
        InputError: it is no ONNX file.
        MissingOperatorError: it holds an operator that nothing computes in float64.
    """

    name = "the file in float64"

    def __init__(
        self, path: Path, model: onnx.ModelProto | None = None, inputs: Sequence[tuple[int, str]] | None = None,
        outputs: Sequence[str] | None = None, names: Mapping[str, str] | None = None, like: Witness | None = None,
    ) -> None:  # fmt: skip
        model = inlined(
            read_model(path, light=True) if model is None else model
        )  # operators in functions are asked too
        self.path, self.file = path, File64(model, beside=path.parent, where=str(path))
        self.inputs = list(enumerate(v.name for v in self.file.inputs)) if inputs is None else inputs
        self._chosen, self._names, self.knows = outputs, names or {}, names is not None
        self._taken = {value.name for value in self.file.inputs}
        self.outputs = [value.name for value in self.file.outputs]
        kinds = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
        floats = [v for v in self.file.outputs if v.dtype.kind == "f" or v.dtype.name == "bfloat16"]
        self.units = {v.name: unit_roundoff(kinds.get(v.dtype.name, torch.float64)) for v in floats}
        self.epsilon, self.halves = self.file.epsilon(), self.file.halves()
        #: Constants are drawn so finely at least. Of a model that computes in halves each is drawn by its own dtype.
        self._finest = None if like is None or like.halves else like.epsilon
        self.file.rounds = set() if like is None else {"float16", "bfloat16"} - set(like.halves)
        #: Its operators and their versions without its weights.
        self.graph = onnx.GraphProto(node=model.graph.node, output=model.graph.output)
        self.opsets = opsets_of(model)
        self.values = {name for node in self.graph.node for name in node.output if name}

    def called(self, name: str) -> str | None:
        """What the file calls a value of the model; where nobody said so, what torch.onnx calls it."""
        tries = (self._names[name],) if name in self._names else (name, f"{name}_value", f"{name}:0")
        return next((each for each in tries if each in self.values), None)

    def run(
        self, batch: Batch, keep: Collection[str] = (), *, follow: Mapping[str, Any] | None = None,
        seed: int | None = None, after: After | None = None,
    ) -> Run:  # fmt: skip
        """As ``Witness.run``, and as ``File64.run``; what is no array stays as it is."""
        theirs = {name: to_numpy(x) if isinstance(x, Tensor) else x for name, x in (follow or {}).items()}
        found = self.file.run(self.feeds(batch), keep, follow=theirs, decide=seed is None,
                              jitter=None if seed is None else (self._finest, seed), after=after)  # fmt: skip
        outputs = {name: as_tensor(x) for name, x in zip(self.outputs, found.outputs)}
        kept, decided = ({n: as_tensor(x) for n, x in each.items()} for each in (found.kept, found.decided))
        turns = tuple(replace(turn, compared=as_tensor(turn.compared)) for turn in found.turns)
        return Run(tuple(outputs[n] for n in self._chosen or self.outputs), kept, decided, turns, found.shapes)

    def feeds(self, batch: Batch) -> dict[str, Any]:
        """What the file is given, as arrays."""
        return {name: to_numpy(batch.flat[index]) for index, name in self.inputs if name in self._taken}
