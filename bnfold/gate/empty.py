"""What proves nothing: no output compared, none that depends on an input, none that differs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from bnfold.gate.judge import Judge
from bnfold.gate.samples import Batch
from bnfold.graph.capture import Captured

#: Inputs with their outputs.
Runs = Sequence[tuple[Batch, Sequence[Tensor]]]


def prove_nothing(judge: Judge, captured: Captured, runs: Runs) -> None:
    """Says of a judgement why nothing follows from it, where that is so."""
    findings, rows = judge.findings, [row for row in judge.table if not row.inside]
    compared = {row.witness for row in rows if row.shown}
    if not rows and not findings.problems:
        findings.problems.append("no output was compared")
    for witness in dict.fromkeys(row.witness for row in rows):
        if witness not in compared:
            findings.doubts.append(f"{witness}: no output has an element to compare; give real inputs (--data)")
    if captured.names and not _reads_inputs(captured):
        findings.doubts.append(
            "no output depends on any input: the model answers with what it kept from an earlier call, or with a "
            "constant"
        )
    elif _says_nothing(runs):
        findings.doubts.append(
            "every output is the same for every input that was tried, so nothing is seen of what lies before it: "
            "load trained weights (is the last layer zero?), or give inputs that matter (--data)"
        )


def _reads_inputs(captured: Captured) -> bool:
    """Whether an output depends on a user input."""
    reached: set[fx.Node] = {node for node in captured.program.graph.nodes if node.name in captured.names}
    for node in captured.program.graph.nodes:
        if any(operand in reached for operand in node.all_input_nodes):
            reached.add(node)
    return captured.program.graph.output_node() in reached


def _says_nothing(runs: Runs) -> bool:
    """Whether inputs differ and no output does: the same floats for every sample of every run."""

    def alike(runs: Runs) -> bool:
        first: dict[int, Tensor] = {}
        for batch, values in runs:
            for i, value in enumerate(values):
                rows = value if batch.leads(value) else value[None]
                row = first.setdefault(i, rows[0]) if len(rows) else torch.empty(0)
                if not value.is_floating_point() or row.shape != rows.shape[1:] or not bool((rows == row).all()):
                    return False
        return bool(first)

    given = [(batch, [value for value in batch.flat if isinstance(value, Tensor)]) for batch, _ in runs]
    return alike(runs) and not alike(given)
