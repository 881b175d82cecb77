"""Accuracy on labelled data, before and after."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from bnfold.candidates import Candidate, OnnxCandidate
from bnfold.capture import tensor_inputs
from bnfold.errors import InputError
from bnfold.interpret import Runner
from bnfold.reference import References, first_line, numbers
from bnfold.report import Accuracy
from bnfold.samples import stored_batches


def judge_accuracy(
    references: References, candidate: Candidate, data: Mapping[str, np.ndarray], labels: np.ndarray
) -> Accuracy | None:
    """Top-1 of the unfolded model and of ``candidate`` on labelled data; None, with a note, where that is not defined.

    Raises:
        InputError: there is not one label per sample.
    """
    captured, findings = references.captured, references.findings
    index = next((i for i, v in enumerate(references.unfolded[0]) if v.is_floating_point() and v.ndim == 2), None)
    if index is None:
        findings.notes.append("labels were given, but no output has the shape (samples, classes)")
        return None
    rows, classes = min(len(r) for r in data.values()), torch.from_numpy(labels).long().flatten()
    if len(classes) != rows:
        raise InputError(f"there are {len(classes)} labels for {rows} samples", hint="Give one class per sample")
    unfolded = Runner(captured.program)
    size = _batch_size(references)
    before, after = [], []
    for flat in stored_batches(captured.names, captured.flat, data, size=size):
        given = next(len(v) for v, name in zip(flat, captured.names) if name in data)
        if not references.batches[0].size and given < size:
            break  # a fixed batch does not take the rest
        try:
            before.append(numbers(unfolded(flat))[index].double())
            after.append(numbers(candidate.run(flat))[index].double())
        except Exception as error:
            findings.problems.append(f"{candidate.name}: fails on the labelled data: {first_line(error)}")
            return None
        if before[-1].shape != after[-1].shape or len(before[-1]) != given:
            findings.notes.append("labels were given, but no output has the shape (samples, classes)")
            return None
    if isinstance(candidate, OnnxCandidate):
        candidate.close()
    if not before:
        findings.notes.append(f"labels were given, but fewer samples than the fixed batch of {size}")
        return None
    old, new = torch.cat(before), torch.cat(after)
    classes = classes[: len(old)]
    top = old.topk(2, dim=1).values if old.shape[1] > 1 else torch.cat([old, old * 0], 1)
    margin, flipped = top[:, 0] - top[:, 1], old.argmax(1) != new.argmax(1)
    correct = [float((logits.argmax(1) == classes).double().mean()) for logits in (old, new)]
    smallest = margin[flipped] if bool(flipped.any()) else margin
    return Accuracy(len(classes), correct[0], correct[1], int(flipped.sum()), float(smallest.min()))


def _batch_size(references: References) -> int:
    """How many labelled samples are run at once: 64, or fewer where the batch's range or its fixed size says so."""
    if not references.batches[0].size:
        first = next((v for v in references.captured.flat if isinstance(v, Tensor) and v.ndim), None)
        return 1 if first is None else int(first.shape[0])
    node = next(
        n for n in references.captured.program.graph.nodes if n.name == tensor_inputs(references.captured.program)[0]
    )
    high = references.captured.ranges.get(str(node.meta["val"].shape[0]), (1, None))[1]
    return min(64, high or 64)
