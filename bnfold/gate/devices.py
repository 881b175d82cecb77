"""Whether a file runs where it was asked to: the placement of its nodes, and bound inputs against plain ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bnfold.gate.candidates import OnnxCandidate
from bnfold.gate.findings import Findings, first_line
from bnfold.report import Placement
from bnfold.runtime.placement import placement_finding


def judge_device(
    candidate: OnnxCandidate, flat: Sequence[Any], findings: Findings, *, whole: bool = False
) -> Placement | None:
    """Where the file's nodes ran; a file that ran nowhere as asked, or runs otherwise when bound, is a problem.

    So is, where the ``whole`` is asked for, one of which a node ran elsewhere.
    """
    try:
        if problem := candidate.binding_problem(flat):
            findings.problems.append(f"{candidate.name}: {problem}")
        found = candidate.placement(flat)
    except Exception as error:
        findings.doubts.append(f"{candidate.name}: where its nodes run cannot be seen: {first_line(error)}")
        return None
    problem, note = placement_finding(found, candidate.session.provider)
    if whole and problem is None:
        problem, note = note, None
    findings.problems += [f"{candidate.name}: {problem}"] if problem else []
    findings.notes += [note] if note else []
    return found
