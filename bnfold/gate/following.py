"""Which truth the outputs of a candidate are compared with: the one that took the candidate's decisions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bnfold.gate.candidates import Candidate
from bnfold.gate.decisions import NEAR, NOISE_LIMIT, Following, Place, Turn
from bnfold.gate.judge import Tally, epsilon, finite_problem
from bnfold.gate.reference import Findings, References, batched, first_line, numbers, words

#: Largest ratio of any sample with which decisions explain outputs so well that no others are looked for.
EXPLAINED = 2.0


class Follower:
    """Runs one candidate batch by batch and finds the truth that follows it.

    Args:
        references: the references, which have been run.
        candidate: what is judged.
        before: the follower of a candidate that probably decides alike; its decisions are tried first where asking
            this candidate for its own makes another program of it.
        findings: in place of those of the references.
    """

    def __init__(
        self,
        references: References,
        candidate: Candidate,
        before: Follower | None = None,
        findings: Findings | None = None,
    ) -> None:
        self._references, self._candidate = references, candidate
        self._findings = references.findings if findings is None else findings
        self._before = before._taken if before is not None and candidate.deployed else {}
        self._taken: dict[int, Mapping[str, Tensor]] = {}
        self._turns: list[Turn] = []
        self._unread: set[Place] = set()

    def misfit(self, run: int) -> float:
        """The largest ratio of any sample of any output on a batch, infinite where it fails or integers differ."""
        try:
            return self._misfit(*self.run(run), run)
        except Exception:
            return math.inf

    def run(self, run: int) -> tuple[list[Any], list[Tensor]]:
        """The candidate's outputs on a batch, and the truth that they are to equal within the noise.

        Raises:
            Exception: whatever the candidate raises.
        """
        references, batch = self._references, self._references.batches[run]
        names = references.decisions.names
        if not names or run in references.blind:
            return self._candidate.run(batch.flat), references.truth[run]
        tries: Iterator[Mapping[str, Tensor]]
        if self._candidate.deployed:
            outputs, known = self._candidate.run(batch.flat), self._before.get(run)
            tries = itertools.chain([known] if known is not None else [], self._asked(batch.flat, names))
        else:
            outputs, read = self._candidate.decide(batch.flat, names)
            # Where names were guessed another value may have been read: then the unfolded model's decisions are tried.
            tries = iter([read] if self._candidate.knows(names) else [read, {}])
        best: tuple[tuple[bool, float], Following, Mapping[str, Tensor]] | None = None
        failure = ""
        for taken in tries:
            try:
                taken = references.decisions.complete({**taken, **self._returned(outputs)})
                followed = references.following(run, taken)
            except Exception as error:
                failure = first_line(error)
                continue
            cost = (followed.multiple > NEAR * self._candidate.coarser, self._misfit(outputs, followed.outputs, run))
            if best is None or cost < best[0]:
                best = cost, followed, taken
            if not cost[0] and cost[1] <= EXPLAINED:
                break
        if best is None:
            where = f"{self._candidate.name}: its decisions at {words(batch)} cannot be followed"
            self._findings.problems.append(f"{where}: {failure}")
            return outputs, references.truth[run]
        self._taken[run] = best[2]
        self._turns += best[1].turns
        self._unread |= {place for place in references.decisions.places if place.value not in best[2]}
        return outputs, best[1].outputs

    def unread(self, output: int) -> int:
        """On how many decisions that could not be read an output depends."""
        return sum(output in place.outputs for place in self._unread)

    def report(self) -> None:
        """Adds what is to be said of the candidate's decisions to the findings."""
        findings, name = self._findings, self._candidate.name
        near = 0
        for place in dict.fromkeys(turn.place for turn in self._turns):
            turns = [turn for turn in self._turns if turn.place == place]
            worst, different = max(turn.multiple for turn in turns), sum(turn.different for turn in turns)
            wild = max(turn.noise for turn in turns)
            if worst > NEAR * self._candidate.coarser:
                findings.problems.append(
                    f"{name}: {place.words} decides otherwise than float64 in {different} places, although what it "
                    f"compares is up to {worst:.3g} times the noise away from that (limit "
                    f"{NEAR * self._candidate.coarser:g})"
                )
            elif wild > NOISE_LIMIT:
                findings.doubts.append(
                    f"{name}: {place.words} decides otherwise than float64 in {different} places, and the unfolded "
                    f"model's own error in what it compares is {wild:.2g} of it, so almost any decision would pass"
                )
            else:
                near += different
        if near:
            most = max(turn.multiple for turn in self._turns)
            findings.notes.append(
                f"{name}: {near} decisions (such as {self._turns[0].place.words}) fell otherwise than in float64, all "
                f"of them near-ties, at most {most:.2g} times the noise: float64 was run again with them"
            )

    def _asked(self, flat: Sequence[Any], names: Sequence[str]) -> Iterator[Mapping[str, Tensor]]:
        yield self._candidate.decide(flat, names)[1]

    def _returned(self, outputs: Sequence[Any]) -> dict[str, Tensor]:
        """The decisions that the candidate returns, which are its own whatever else was read."""
        signature = self._references.captured.program.graph_signature
        wanted = set(self._references.decisions.names)
        names = [getattr(spec.arg, "name", "") for spec in signature.output_specs]
        if len(names) != len(outputs):
            return {}
        return {n: v for n, v in zip(names, outputs) if n in wanted and isinstance(v, Tensor)}

    def _misfit(self, outputs: Sequence[Any], truth: Sequence[Tensor], run: int) -> float:
        """The largest ratio of any sample of any output, infinite where an integer differs."""
        batch, worst = self._references.batches[run], 0.0
        own = zip(self._references.unfolded[run], self._references.truth[run])
        if len(outputs) != len(truth):
            return torch.inf
        for value, followed, (unfolded, true) in zip(numbers(outputs), truth, own):
            if value.shape != followed.shape:
                return torch.inf
            if not value.is_floating_point():
                if not torch.equal(value, followed):
                    return torch.inf
                continue
            if finite_problem(value, followed) is not None:
                return torch.inf
            tally = Tally(epsilon(unfolded.dtype), self._candidate.coarser)
            tally.add(value, unfolded, true, batched=batched(batch, unfolded), run=run, followed=followed)
            ratios = tally.ratios(steady=True)
            worst = max(worst, float(ratios.max())) if len(ratios) else worst
        return worst
