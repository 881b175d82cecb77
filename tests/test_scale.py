"""Folding is linear in the graph: counted in questions to the semantics, never in seconds (``scripts/scaling.py``)."""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from checker import count_operators
from long_programs import PROGRAMS
from torch.export import ExportedProgram

from bnfold.graph.graph import Graph
from bnfold.graph.interpret import Runner
from bnfold.passes.folding import fold
from bnfold.passes.gauges import Gauges
from bnfold.passes.rewriter import Rewriter
from bnfold.passes.solution import Solution
from bnfold.report import Ledger


def folded(program: ExportedProgram) -> tuple[ExportedProgram, Ledger]:
    graph = Graph(program)
    ledger = fold(graph)
    return graph.finish(), ledger


def assert_right(program: ExportedProgram, after: ExportedProgram) -> None:
    """The outputs agree as far as the float32 rounding of that many layers lets them."""
    x = program.example_inputs[0][0]
    truth = torch.cat([t.flatten() for t in Runner(program, precise=True)([x])])
    plain = torch.cat([t.flatten() for t in Runner(program)([x])]).double()
    mine = torch.cat([t.flatten() for t in Runner(after)([x])]).double()
    assert truth.isfinite().all() and float(truth.abs().max()) > 1e-6
    floor = 8 * torch.finfo(torch.float32).eps * float(truth.norm())
    assert float((mine - truth).norm()) <= 4 * max(float((plain - truth).norm()), floor)


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts what folding does: questions to semantics, equations asked for, edges read, constants computed."""
    counted: Counter[str] = Counter()

    def count(owner: type, name: str) -> None:
        old: Callable[..., Any] = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            counted[f"{owner.__name__}.{name}"] += 1
            return old(*args, **kwargs)

        monkeypatch.setattr(owner, name, wrapped)

    for owner, name in (
        (Rewriter, "at"), (Gauges, "at"), (Gauges, "_relate"), (Gauges, "ask"), (Graph, "call"),
        (Graph, "shape"), (Graph, "readers"), (Graph, "constant"), (Solution, "before"), (Solution, "after"),
    ):  # fmt: skip
        count(owner, name)
    return counted


@pytest.mark.parametrize("name", PROGRAMS)
def test_work_grows_with_the_layers_and_no_faster(name, work):
    """Twice the layers are twice the work, of every kind, but for a constant."""
    make, left = PROGRAMS[name]
    found = []
    for layers in (20, 40, 80):
        work.clear()
        program = make(layers)
        after, ledger = folded(program)
        assert len(ledger.left) == left(layers)
        assert count_operators(after) <= count_operators(program)
        assert_right(program, after)
        found.append(dict(work))
    for kind in found[-1]:
        small, middle, large = (counts.get(kind, 0) for counts in found)
        assert large - middle <= 2.1 * (middle - small) + 8, (kind, small, middle, large)


def test_the_count_sees_quadratic_work(work, monkeypatch):
    """A folder that looks at the whole graph for every value does not pass."""
    relate = Gauges._relate

    def slow(self: Gauges, value: Any) -> None:
        for other in self.graph.values():
            self.graph.call(other)
        relate(self, value)

    monkeypatch.setattr(Gauges, "_relate", slow)
    with pytest.raises(AssertionError, match="call"):
        test_work_grows_with_the_layers_and_no_faster("residual", work)


def test_depth_needs_no_recursion():
    """Chains several times as deep as Python may recurse, of every kind of region."""
    chains = [PROGRAMS[name] for name in ("sums", "scales_and_relus", "norms_and_movements", "residual")]
    programs = [(make(600), left(600)) for make, left in chains]
    before = sys.getrecursionlimit()
    try:
        sys.setrecursionlimit(len(inspect.stack()) + 150)
        found = [(len(fold(Graph(program)).left), left) for program, left in programs]
    finally:
        sys.setrecursionlimit(before)
    assert all(count == left for count, left in found)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layers"), [("conv_norm_relu", 3_000), ("concat", 1_000), ("residual", 500)])
def test_large(name, layers):
    make, left = PROGRAMS[name]
    program = make(layers)
    after, ledger = folded(program)
    assert len(ledger.left) == left(layers)
    assert count_operators(after) == count_operators(program) - len(ledger.folded)
    assert_right(program, after)
