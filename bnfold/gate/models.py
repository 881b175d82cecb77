"""What is judged against: the unfolded model, in float64 and as it runs by itself."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from bnfold.evaluate.subject import Run
from bnfold.gate.evidence import unit_roundoff
from bnfold.gate.findings import Findings, first_line
from bnfold.gate.samples import Batch
from bnfold.gate.values import numbers
from bnfold.gate.witnesses import Program64
from bnfold.graph.capture import Captured
from bnfold.graph.interpret import Runner, coarsest_epsilon
from bnfold.graph.names import number_names

#: How many times louder than rounding constants are disturbed in float32.
LOUDER = 256.0


class Model(Program64):
    """A captured model.

    ``dear``: what rounding its constants does is found in its own dtype where that will do.
    """

    def __init__(self, captured: Captured, *, dear: bool = False) -> None:
        super().__init__(captured.program, captured.masters)
        self.captured, self.outputs = captured, number_names(captured.program)
        self.graph = Runner(captured.program)
        self._loud: Runner | None = None
        self.decisions = [place.value for place in self.places]
        held = [*captured.program.state_dict.values(), *captured.program.constants.values()]
        floats = [x.dtype for x in held if isinstance(x, Tensor) and x.is_floating_point()]
        finest = min((2 * unit_roundoff(d) for d in floats), default=coarsest_epsilon(captured.program))
        # Where autocast rounds constants, as a model of its own accord does, a file holds them rounded.
        regions = (n.args for n in captured.program.graph.nodes if "wrap_with_autocast" in str(n.target))
        dtypes = [args[1] for args in regions if args[2] and isinstance(args[1], torch.dtype)]
        self.epsilon = max([finest, *(2 * unit_roundoff(dtype) for dtype in dtypes)])
        values = (n.meta.get("val") for n in captured.program.graph.nodes)
        dtypes += [x.dtype for x in values if isinstance(x, Tensor)]
        self.halves = {str(dtype).removeprefix("torch.") for dtype in dtypes} & {"float16", "bfloat16"}
        # Twice its own rounding errors, between two runs, are then the last hundredth of what is seen.
        plain = dear and not self.halves and self.epsilon == torch.finfo(torch.float32).eps
        self.louder = LOUDER if plain else 1.0
        self.units: dict[str, float] = {}
        self._first: tuple[Batch, list[Tensor], list[Tensor]] | None = None
        #: How far the eager model was off its captured graph, in noises.
        self.capture_error = 0.0

    def own(self, batch: Batch) -> list[Tensor]:
        """As ``Witness.own``: by the eager model where there is one."""
        found = numbers(self.graph(batch.flat) if self.captured.eager is None else self.captured.run_eager(batch.flat))
        self.units |= {n: unit_roundoff(x.dtype) for n, x in zip(self.outputs, found) if x.is_floating_point()}
        return found

    def loudly(self, batch: Batch, seed: int | None, keep: Collection[str] = ()) -> Run:
        """As ``Witness.loudly``."""
        runner = self.graph
        if seed is not None:
            if self._loud is None:
                self._loud = Runner(self.program, jitter=True, louder=self.louder)
            runner, self._loud.seed = self._loud, seed
        return Run(tuple(numbers(runner(batch.flat, keep=keep))), runner.taken())

    def influence(self, value: str) -> frozenset[int]:
        """The outputs that depend on a decision, by position."""
        return next((place.outputs for place in self.places if place.value == value), frozenset())

    def complete(self, taken: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As ``Witness.complete``."""
        twins = {place.twin: taken[place.value] for place in self.places if place.value in taken}
        more = {p.value: twins[p.twin] for p in self.places if p.twin in twins and p.value not in taken}
        return {**taken, **more}

    # -- the eager model -----------------------------------------------------------------------------------------------

    def accepts(self, batch: Batch, own: list[Tensor] | Exception, truth: Run | None, found: Findings) -> bool:
        """Whether the model runs on a batch, and its captured graph does too."""
        if isinstance(own, Exception):
            found.notes.append(f"the unfolded model itself does not run at {batch.words}: {first_line(own)}")
            return False
        if truth is None and self.captured.eager is not None:
            try:
                self.graph(batch.flat)
            except Exception as error:
                found.problems.append(
                    f"capture: the model runs at {batch.words}, its captured graph does not ({first_line(error)}): "
                    "fix that dimension (--static)"
                )
                return False
        if truth is not None and self._first is None:
            self._first = batch, own, [t.double() for t in truth.outputs]
        return True

    def keeps_state(self, found: Findings) -> bool:
        """Whether what ran in between changed what the model answers: then it keeps state, which no file does."""
        if self._first is None:
            return False
        batch, before, truth = self._first
        # Of the same shape: a state may be one for each.
        halved = [x * 0.5 if isinstance(x, Tensor) and x.is_floating_point() else x for x in batch.flat]
        after = list[Tensor]()
        with contextlib.suppress(Exception):
            self.captured.run_eager(tuple(halved))
        with contextlib.suppress(Exception):
            after = numbers(self.captured.run_eager(batch.flat))
        if len(after) == len(before) and all(map(_same, before, after, truth)):
            return False
        # Whatever differed was the state's doing, and no size that is fixed would mend it.
        found.problems[:] = [each for each in found.problems if not each.startswith("capture:")]
        found.problems.append(
            "capture: the model keeps state from call to call: the same input gives another result the next time; take "
            "the state as an input and return it, or set it anew where forward begins"
        )
        return True


def _same(before: Tensor, after: Tensor, truth: Tensor) -> bool:
    """Whether two answers of one model differ by no more than the first is off."""
    if before.shape != after.shape or not before.is_floating_point() or torch.equal(before, after):
        return torch.equal(before, after)
    both = before.isfinite()
    if not torch.equal(both, after.isfinite()) or not bool(both.any()) or truth.shape != before.shape:
        return torch.equal(both, after.isfinite())
    moved, off = ((a.double() - before.double())[both].abs().max() for a in (after, truth))
    return bool(moved <= off)
