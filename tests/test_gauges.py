"""Optimality and honesty of the choice, by brute force: all subsets of the affines of random graphs, by dense algebra.

``BNFOLD_EXAMPLES=5000 pytest tests/test_gauges.py`` looks at that many graphs.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Iterator
from itertools import combinations, product
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_graphs import RandomGraph, grow

from bnfold.graph.graph import Graph
from bnfold.passes.choices import Choices
from bnfold.passes.gauges import Contradiction, Equation, Gauges
from bnfold.passes.rewriter import Rewriter
from bnfold.semantics import Scaling
from bnfold.semantics.equations import LOG, SHIFT
from bnfold.semantics.system import Batch, System

EXAMPLES = int(os.environ.get("BNFOLD_EXAMPLES", "40"))
#: Affines of which all subsets are tried.
MOST = 7


def gauges_of(graph: RandomGraph) -> Gauges:
    program = Graph(graph.program)
    program.materialise()
    return Gauges(Rewriter(program))


# -- dense algebra -----------------------------------------------------------------------------------------------------


def rank(matrix: np.ndarray, binary: bool) -> int:
    """Of a matrix over the reals or GF(2), by elimination with full pivoting."""
    rows = matrix.astype(float) % 2 if binary else matrix / np.maximum(np.abs(matrix).max(1, keepdims=True), 1e-300)
    found = 0
    while found < len(rows) and rows[found:].size:
        block = np.abs(rows[found:])
        at, column = np.unravel_index(block.argmax(), block.shape)
        if block[at, column] <= 1e-9:
            break
        rows[[found, found + at]] = rows[[found + at, found]]
        pivot = rows[found] / rows[found, column]
        rest = rows[found + 1 :]
        rows[found + 1 :] = (rest - np.outer(rest[:, column], pivot)) % 2 if binary else rest - np.outer(
            rest[:, column], pivot)  # fmt: skip
        found += 1
    return found


def consistent(equations: Iterable[tuple[Any, Any, float]], binary: bool) -> bool:
    """Whether linear equations (variables, coefficients, right-hand side) have a solution."""
    equations = list(equations)
    columns = {v: i for i, v in enumerate(sorted({int(v) for var, _, _ in equations for v in var}))}
    matrix = np.zeros((len(equations), len(columns) + 1))
    for row, (var, val, rhs) in zip(matrix, equations):
        np.add.at(row, [columns[int(v)] for v in var], np.asarray(val) % 2 if binary else val)
        row[-1] = rhs
    matrix = matrix[np.abs(matrix).max(1, initial=0) > 0] if len(matrix) else matrix
    return not len(matrix) or rank(matrix.copy(), binary) == rank(matrix[:, :-1].copy(), binary)


def blocks(found: dict[str, Any], logs: str = LOG) -> Iterator[tuple[str, tuple[Any, Any, float]]]:
    for name, parts in found.items():
        for variables, values, rhs, _ in parts:
            values = np.broadcast_to(values, variables.shape)
            for var, val, right in zip(variables, values, rhs):
                yield name, (var, val, np.log(right) if name == logs and right else right)


def equations(gauges: Gauges, add: Any) -> list[tuple[str, tuple[Any, Any, float]]]:
    return list(blocks(gauges.equations.recorded(add)))


def mandatory(gauges: Gauges) -> list[tuple[str, tuple[Any, Any, float]]]:
    """What operators say, affines aside."""
    gauges.equations.undo(gauges.start)
    systems = gauges.equations.systems.items()
    return [(name, system.equation(number)[:3]) for name, system in systems for number in range(system.count)]


def best_by_force(gauges: Gauges) -> tuple[int, int]:
    """How many BatchNorms, and how many affines at all, can go at most."""
    able = [s for s in gauges.sites if isinstance(gauges.at(s), Scaling) and gauges.at(s).stays is None]
    always, parts = mandatory(gauges), {}
    for site in able:
        parts[site, "stay"] = equations(gauges, lambda s=site: gauges.ask(s, "stays"))
        parts[site, "goes"] = equations(gauges, lambda s=site: gauges.ask(s, "goes"))
        parts[site, "dead"] = equations(gauges, lambda s=site: gauges.ask(s, "dead"))
    zero = {s: bool((gauges.at(s).affine.scale == 0).any()) for s in able}
    best = (-1, -1)
    for count in range(len(able), -1, -1):
        for gone in combinations(able, count):
            worth = (len(gauges.norms.intersection(gone)), count)
            if worth <= best:
                continue
            for ways in product(*((["goes", "dead"] if zero[s] else ["goes"]) for s in gone)):
                chosen = dict(zip(gone, ways))
                both = always + [e for s in able for e in parts[s, chosen.get(s, "stay")]]
                names = gauges.equations.systems
                if all(consistent((e for n, e in both if n == name), names[name].binary) for name in names):
                    best = worth
                    break
    return best


def contradicts(why: Contradiction) -> bool:
    equations_ = [(e.var, e.val, e.rhs) for e in why.equations]
    return not consistent(equations_, why.system not in (LOG, SHIFT))


def check(graph: RandomGraph) -> bool:
    """Whether the graph could be decided; asserts that the engine decided as well."""
    gauges = gauges_of(graph)
    if len(gauges.sites) > MOST or gauges.equations.scale.count + gauges.equations.shift.count > 600:
        return False
    choice = Choices(gauges).choose()
    assert all(contradicts(why) for why in choice.why.values())
    assert all(contradicts(why.dead) for why in choice.why.values() if why.dead is not None)
    worth = (len(gauges.norms.intersection(choice.gone)), len(choice.gone))
    assert worth == best_by_force(gauges), (graph, worth)
    return True


@settings(
    max_examples=EXAMPLES, derandomize="BNFOLD_EXAMPLES" not in os.environ, deadline=None, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
@given(st.data())
def test_no_other_choice_lets_more_go(data):
    check(grow(lambda options: data.draw(st.sampled_from(options))))


def test_random_graphs_can_be_decided():
    assert sum(check(grow(random.Random(seed).choice)) for seed in range(20)) >= 10


# -- the systems -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("binary", [False, True])
def test_a_system_accepts_what_has_a_solution_and_nothing_else(binary):
    """Random equations in batches, each accepted if all so far have a solution; a refusal is a contradiction."""
    draw, refused = np.random.default_rng(0), 0
    for _ in range(60):
        system, held = System(binary=binary), []
        system.grow(draw.permutation(8))
        for _ in range(6):
            n, m = draw.integers(1, 4, 2)
            var = np.stack([draw.permutation(8)[:m] for _ in range(n)])
            val = np.ones((n, m)) if binary else draw.integers(1, 3, (n, m)) * draw.choice([-1.0, 1.0], (n, m))
            rhs, mark = draw.integers(0, 2, n).astype(float), system.mark()
            wrong = system.add(Batch.joined([(var, val, rhs, 3)]))
            new = list(zip(var, val, rhs))
            assert (len(wrong) == 0) == consistent(held + new, binary)
            if not len(wrong):
                held += new
                continue
            refused += 1
            assert not consistent((system.equation(number)[:3] for number in system.why(int(wrong[0]))), binary)
            system.undo(mark)
        found = system.solved()
        for var, val, rhs in held:
            off = float(val @ found[var]) - rhs
            assert (off % 2 if binary else abs(off)) < 1e-9
    assert refused > 50


def test_what_is_taken_back_leaves_nothing_in_what_was_solved():
    """Solving puts later rows into earlier ones; once the later ones are taken back, the earlier are as they were."""
    system = System()
    system.grow(np.arange(3))
    assert not len(system.add(Batch.joined([(np.array([[2, 1]]), np.array([[1.0, -1.0]]), np.array([5.0]), 0)])))
    alone, mark = system.solved().tolist(), system.mark()
    assert not len(system.add(Batch.joined([(np.array([[1]]), np.array([[1.0]]), np.array([7.0]), 1)])))
    assert system.solved().tolist() == [0.0, 7.0, 12.0]
    system.undo(mark)
    assert system.solved().tolist() == alone == [0.0, 0.0, 5.0]


def test_products_of_few_factors_are_exact():
    system = System(logs=True)
    system.grow(np.arange(4))
    pairs = np.array([[1, 0], [2, 1], [3, 2]])
    rhs = np.array([3.0, 0.625, 7.0])  # whose products float64 holds, in any order
    assert not len(system.add(Batch.joined([(pairs, np.tile([1.0, -1.0], (3, 1)), rhs, 0)])))
    assert system.solved()[0].tolist() == [1.0, 3.0, 3.0 * 0.625, 3.0 * 0.625 * 7.0]


def test_an_equation_names_what_adds_it():
    gauges = gauges_of(grow(random.Random(3).choice))
    for why in Choices(gauges).choose().why.values():
        assert all(isinstance(e, Equation) and e.node in set(gauges.graph.graph.nodes) for e in why.equations)
