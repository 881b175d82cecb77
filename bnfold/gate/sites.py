"""Every fold and merge, judged where it happened: the folded value against the value it replaces.

An error in one layer can be invisible at the outputs (a dead channel, a branch behind a small LayerScale) and is large
where it arises.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from bnfold.affine import Meaning
from bnfold.gate.candidates import Candidate, OnnxCandidate, TorchCandidate
from bnfold.gate.judge import epsilon, site_ratios
from bnfold.gate.reference import KERNELS, ROUNDINGS, References, first_line, watched_batch
from bnfold.gate.samples import Batch
from bnfold.graph.interpret import Runner, coarsest_epsilon
from bnfold.report import Ledger, SiteResult


def judge_sites(
    references: References,
    ledger: Ledger,
    meanings: Mapping[str, Meaning | None],
    candidates: Sequence[Candidate],
    limit: float,
) -> list[SiteResult]:
    """The ratio of error to noise at every site of every candidate; what exceeds ``limit`` is a problem."""
    sites, findings = ledger.sites, references.findings
    if not sites or not references.batches:
        return []
    modules = {value: entry.module or entry.value for entry in ledger.entries for value, _ in entry.site}
    modules |= {value: merge.into for merge in ledger.merges for value, _ in merge.site}
    modules |= {value: ", ".join(scaled.into) for scaled in ledger.scaled for value, _ in scaled.site}
    watched = references.watched
    batch = watched[0] if watched else watched_batch(references.captured, references.batches, set(sites.values()))
    noise = Noise.of(references, batch, set(sites.values()))
    if noise is None:  # no float64 truth: said already, and inconclusive
        return []
    judge = _SiteJudge(references, sites, meanings, modules, batch, noise, limit)
    results: list[SiteResult] = []
    for candidate in candidates:
        if candidate.deployed:
            continue  # extra outputs block its fusions, so it would be another program
        found, problems = judge.judge(candidate)
        off = [site for site in found if not _worst(site) <= limit]
        if off and isinstance(candidate, TorchCandidate) and all(_worst(site) <= KERNELS * limit for site in off):
            exact, still = judge.judge(candidate.precise())
            if not still:  # what is off is rounding in torch's kernels, not the fold
                findings.notes.append(
                    f"{candidate.name}: {len(off)} fold sites are off by up to {max(map(_worst, off)):.3g} times the "
                    f"noise, in float64 by {max(map(_worst, exact)):.3g} times: the rest is rounding in torch's "
                    "kernels for convolutions with a bias"
                )
                found, problems = exact, []
        results += found
        findings.problems += problems
    return results


@dataclass
class _SiteJudge:
    """Judges candidates at the fold sites, one after another."""

    references: References
    sites: Mapping[str, str]
    meanings: Mapping[str, Meaning | None]
    modules: Mapping[str, str]
    batch: Batch
    noise: Noise
    limit: float

    def judge(self, candidate: Candidate) -> tuple[list[SiteResult], list[str]]:
        """The ratio at every site that a candidate has, and what speaks against it."""
        results: list[SiteResult] = []
        problems: list[str] = []
        decisions = self.references.decisions.names
        try:
            found = candidate.values(self.batch.flat, [*self.sites, *(n for n in decisions if n not in self.sites)])
            taken = self.references.decisions.complete({name: found[name] for name in decisions if name in found})
            followed = self.noise.following(taken)
        except Exception as error:
            return [], [f"{candidate.name}: fails when asked for the fold sites: {first_line(error)}"]
        if missing := len(set(self.sites) - set(found)):
            where = f"{missing} of {len(self.sites)} fold sites"
            if isinstance(candidate, OnnxCandidate):
                self.references.findings.notes.append(
                    f"{where} have no value of their own in the file (a neighbour took them in): there the file is "
                    "judged by its outputs alone"
                )
            else:
                problems.append(f"{candidate.name}: {where} are not in the program")
        for folded, value in ((name, value) for name, value in found.items() if name in self.sites):
            name = self.sites[folded]
            truth = self.noise.truth[name]
            meaning = self.meanings.get(folded) or Meaning(name)
            if name in followed and value.shape == truth.shape == followed[name].shape:
                # What the candidate's own decisions change is no error: it is taken off.
                right, wanted = meaning.of(followed[name]), meaning.of(truth)
                value = torch.where(value == right, wanted, value.double() - right + wanted)
            where = f"{candidate.name}, fold of '{self.modules[folded]}'"
            if value.shape != truth.shape:
                problems.append(f"{where}: shape {tuple(value.shape)} instead of {tuple(truth.shape)}")
                continue
            ratios = self.noise.ratios(value, meaning, self.limit, batched=self.batch.size > 0)
            site = SiteResult(candidate.name, folded, self.modules[folded], *ratios)
            results.append(site)
            if not _worst(site) <= self.limit:
                problems.append(f"{where}: error is {_worst(site):.3g} times the noise (limit {self.limit:g})")
        return results, problems


def _worst(site: SiteResult) -> float:
    return max(site.ratio, site.channel_ratio)


class Noise:
    """Values of the unfolded program by name on one batch: true, and in its own dtype."""

    def __init__(self, references: References, batch: Batch, names: set[str]) -> None:
        self._references, self._batch, self._names = references, batch, names
        captured = references.captured
        self._precise = Runner(captured.program, precise=True, masters=captured.masters)
        if references.watched and references.watched[0] is batch and names <= set(references.watch):
            _, self.truth, self.unfolded = references.watched
            return
        self.truth = references.decisions.follow(self._precise, batch, keep=names).kept
        own = Runner(captured.program)
        own(batch.flat, keep=names)
        self.unfolded = own.kept

    @classmethod
    def of(cls, references: References, batch: Batch, names: set[str]) -> Noise | None:
        """Runs the program on one batch; None where it does not run in float64."""
        try:
            return cls(references, batch, names)
        except Exception:
            return None

    def ratios(self, value: Tensor, meaning: Meaning, limit: float, *, batched: bool) -> tuple[float, float]:
        """Error over noise, over all elements and in the worst channel, of a value that stands for another."""
        truth, own = meaning.of(self.truth[meaning.value]), meaning.of(self.unfolded[meaning.value])
        floor = max(coarsest_epsilon(self._references.captured.program), epsilon(own.dtype))
        found = site_ratios(value, own, truth, floor, batched=batched)
        if max(found) <= limit:
            return found
        # What rounding does is noise too. It only makes a ratio smaller, and costs a run in float64 each time.
        return site_ratios(value, own, truth, floor, meaning.moved(self.rounding[meaning.value]), batched=batched)

    def following(self, taken: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The true values where a candidate took these decisions; empty where they are those of the unfolded model."""
        decisions = self._references.decisions
        if decisions.same(self._batch, taken):
            return {}
        return decisions.follow(self._precise, self._batch, taken, keep=self._names).kept

    @cached_property
    def rounding(self) -> Mapping[str, Tensor]:
        """How far each value moves where every constant is rounded once, in RMS over several draws."""
        floats = {name: value for name, value in self.truth.items() if value.is_floating_point()}
        squares = {name: torch.zeros_like(value) for name, value in floats.items()}
        for moved in self._references.disturbed(self._batch, keep=self._names):
            for name, truth in floats.items():
                squares[name] += (moved.kept[name] - truth).square()
        return {name: (square / ROUNDINGS).sqrt() for name, square in squares.items()}
