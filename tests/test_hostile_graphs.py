"""Programs that are hostile to folding: a share of what ``scripts/fuzz_folds.py`` runs by the thousand."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hostile_graphs import check, functional, grow

from bnfold.graph.graph import Graph

torch.set_num_threads(1)


@pytest.mark.parametrize("block", range(6))
def test_hostile_programs_compute_what_they_did(block):
    for seed in range(10 * block, 10 * block + 10):
        fault, _ = check(grow(seed))
        assert fault is None, f"seed {seed}: {fault}"


def test_they_hold_what_is_hostile():
    """They are only worth their time if they fold, and if what may go wrong is there."""
    found, outcomes = Counter[str](), Counter[str]()
    for seed in range(40):
        program = grow(seed)
        graph = Graph(functional(program))
        nodes = list(graph.graph.nodes)
        values = [node for node in nodes if isinstance(node.meta.get("val"), torch.Tensor)]
        found["written"] += any(getattr(n.target, "_opname", "").endswith("_") for n in program.graph.nodes)
        found["a number as an argument"] += any(
            graph.is_number(operand) for node in values for operand in node.all_input_nodes
        )
        found["several dtypes"] += len({node.meta["val"].dtype for node in values}) > 1
        outcomes.update(entry.outcome for entry in check(program)[1].entries)
    assert min(found.values()) >= 8, found
    assert min(outcomes["backward"], outcomes["forward"], outcomes["left"]) >= 8, outcomes
