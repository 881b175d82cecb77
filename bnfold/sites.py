"""Every fold and merge, judged where it happened: the folded value against the value it replaces.

An error in one layer can be invisible at the outputs (a dead channel, a branch behind a small LayerScale) and is large
where it arises.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from bnfold.candidates import Candidate, OnnxCandidate
from bnfold.interpret import Runner, coarsest_epsilon
from bnfold.judge import epsilon, site_ratios
from bnfold.reference import References, first_line
from bnfold.report import Ledger, SiteResult
from bnfold.samples import Batch

#: Values at fold sites are compared for as many samples as fit into this many elements.
SITE_ELEMENTS = 16_000_000
#: How often the effect of rounding the constants is drawn. Drawn once, one channel in fifty happens to move a sixteenth
#: of what it typically does and its ratio is off by as much; over the sites of one MobileNetV2 and six sets of inputs
#: the worst ratio of a correct fold was 14.6 with one, 7.9 with two, 5.5 with four and 4.1 with eight.
ROUNDINGS = 4


def judge_sites(
    references: References, ledger: Ledger, candidates: Sequence[Candidate], limit: float
) -> list[SiteResult]:
    """The ratio of error to noise at every site of every candidate; what exceeds ``limit`` is a problem."""
    sites, findings = ledger.sites, references.findings
    if not sites or not references.batches:
        return []
    modules = {value: entry.module or entry.value for entry in ledger.entries for value, _ in entry.site}
    modules |= {value: merge.into for merge in ledger.merges for value, _ in merge.site}
    batch = _site_batch(references, sites)
    program = references.captured.program
    noise = Noise.of(references, batch, set(sites.values()))
    if noise is None:  # no float64 truth: said already, and inconclusive
        return []
    eps = coarsest_epsilon(program)
    results: list[SiteResult] = []
    for candidate in candidates:
        if candidate.name == "ONNX Runtime":
            continue  # extra outputs block its fusions, so it would be another program
        try:
            found = candidate.values(batch.flat, list(sites))
        except Exception as error:
            findings.problems.append(f"{candidate.name}: fails when asked for the fold sites: {first_line(error)}")
            continue
        if missing := len(set(sites) - set(found)):
            where = f"{missing} of {len(sites)} fold sites"
            if isinstance(candidate, OnnxCandidate):
                findings.notes.append(
                    f"{where} have no value of their own in the file (a neighbour took them in): there the file is "
                    "judged by its outputs alone"
                )
            else:
                findings.problems.append(f"{candidate.name}: {where} are not in the program")
        for folded, value in found.items():
            name = sites[folded]
            truth, own = noise.truth[name], noise.unfolded[name]
            where = f"{candidate.name}, fold of '{modules[folded]}'"
            if value.shape != truth.shape:
                findings.problems.append(f"{where}: shape {tuple(value.shape)} instead of {tuple(truth.shape)}")
                continue
            floor = max(eps, epsilon(own.dtype))
            ratio, channel = site_ratios(value, own, truth, floor, noise.rounding[name], batched=batch.size > 0)
            results.append(SiteResult(candidate.name, folded, modules[folded], ratio, channel))
            if not max(ratio, channel) <= limit:
                findings.problems.append(
                    f"{where}: error is {max(ratio, channel):.3g} times the noise (limit {limit:g})"
                )
    return results


class Noise:
    """Values of the unfolded program by name: true, in its own dtype, and how far rounding its constants moves them."""

    def __init__(
        self, truth: Mapping[str, Tensor], unfolded: Mapping[str, Tensor], rounding: Mapping[str, Tensor]
    ) -> None:
        self.truth, self.unfolded, self.rounding = truth, unfolded, rounding

    @classmethod
    def of(cls, references: References, batch: Batch, names: set[str]) -> Noise | None:
        """Runs the program on one batch; None where it does not run in float64."""
        program, masters = references.captured.program, references.captured.masters
        precise, own = Runner(program, precise=True, masters=masters), Runner(program)
        try:
            precise(batch.flat, keep=names)
        except Exception:
            return None
        own(batch.flat, keep=names)
        floats = {name: value for name, value in precise.kept.items() if value.is_floating_point()}
        squares = {name: torch.zeros_like(value) for name, value in floats.items()}
        for seed in range(ROUNDINGS):
            moved = Runner(program, precise=True, masters=masters, jitter=coarsest_epsilon(program), seed=seed)
            moved(batch.flat, keep=names)
            for name, truth in floats.items():
                squares[name] += (moved.kept[name] - truth).square()
        rounding = {name: (square / ROUNDINGS).sqrt() for name, square in squares.items()}
        return cls(precise.kept, own.kept, rounding)


def _site_batch(references: References, sites: Mapping[str, str]) -> Batch:
    """The largest batch of the first sizes whose values at the sites fit into ``SITE_ELEMENTS``."""
    wanted = set(sites.values())
    elements = 0
    for node in references.captured.program.graph.nodes:
        value = node.meta.get("val")
        if node.name in wanted and isinstance(value, Tensor):
            elements += int(np.prod([n if isinstance(n, int) else max(int(n.node.hint), 1) for n in value.shape]))
    flat = references.captured.flat
    example = flat[0] if flat else None
    per_sample = max(elements // max(example.shape[0] if isinstance(example, Tensor) and example.ndim else 1, 1), 1)
    fitting = [b for b in references.batches if not b.sizes or b.sizes == references.batches[0].sizes]
    small = [b for b in fitting if b.samples * per_sample <= SITE_ELEMENTS]
    return max(small, key=lambda b: b.samples) if small else min(fitting, key=lambda b: b.samples)
