"""Properties that hold for every program: folding random ones keeps what they compute, in every sense that counts.

``BNFOLD_EXAMPLES=5000 pytest tests/test_properties.py`` runs that many examples of each property.
"""

from __future__ import annotations

import copy
import os
import random
from collections import Counter
from collections.abc import Callable
from operator import getitem
from typing import Any

import pytest
import torch
from checker import count_operators
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from programs import Program, aten
from random_graphs import RandomGraph, grow
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn import functional

import bnfold
from bnfold.affine import Meaning
from bnfold.gate.evidence import compare, pooled
from bnfold.graph.graph import Graph
from bnfold.graph.interpret import Runner
from bnfold.graph.program import copy_graph, meanings, rebuild
from bnfold.passes.folding import fold
from bnfold.report import REASONS, Ledger

RELATIVE = 1e-10
LIMIT = 4.0


def folded(program: ExportedProgram) -> tuple[ExportedProgram, Ledger]:
    graph = Graph(program)
    ledger = fold(graph)
    return graph.finish(), ledger


def inputs(program: ExportedProgram, batch: int, seed: int = 0) -> list[Tensor]:
    (example,), _ = program.example_inputs
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, *example.shape[1:], dtype=torch.float64, generator=generator).to(example.dtype)]


def batch_norms(program: ExportedProgram) -> list[str]:
    return [n.name for n in program.graph.nodes if n.target is aten.batch_norm.default]


def close(found: Tensor, true: Tensor) -> bool:
    if found.shape != true.shape or found.dtype != true.dtype:
        return False
    return float((found - true).abs().max()) <= RELATIVE * float(true.abs().max())


def check_exact(before: ExportedProgram, after: ExportedProgram, ledger: Ledger) -> None:
    """Outputs, and the value at every fold site as it is stored, at two batch sizes."""
    stands_for = meanings(after)
    for batch in (2, 5):
        given_, sites = inputs(before, batch), ledger.sites
        unfolded, refolded = Runner(before), Runner(after)
        true, found = unfolded(given_, keep=set(sites.values())), refolded(given_, keep=set(sites))
        for i, (a, b) in enumerate(zip(found, true, strict=True)):
            assert close(a, b), f"output {i} at batch {batch}: {float((a - b).abs().max()):.2e}"
        for mine, captured in sites.items():
            true = stands_for.get(mine, Meaning(captured)).of(unfolded.kept[captured])
            assert close(refolded.kept[mine], true), f"site {mine} is not {captured}"


def check_noise(program: ExportedProgram) -> None:
    """In float32 the folded program is no further from the truth than the unfolded one, but for a small factor."""
    after, _ = folded(program)
    x = inputs(program, 16, seed=1)
    truths, unfolded, found = Runner(program, precise=True)(x), Runner(program)(x), Runner(after)(x)
    for i, (truth, plain, mine) in enumerate(zip(truths, unfolded, found, strict=True)):
        moved = (truth - truth.median(0, keepdim=True).values).flatten(1).abs().amax(1)
        if float(moved.median()) <= 1e-6 * float(truth.abs().max()):
            continue  # most samples hear nothing of the input (``x - x``, dead ReLUs): a few roundings are no noise
        ratio, *_ = compare(mine, truth, pooled(plain.double() - truth, truth.abs()), unit=2.0**-24)
        assert ratio <= LIMIT, f"output {i}: noise ratio {ratio:.1f}"


def check_ledger(before: ExportedProgram, after: ExportedProgram, ledger: Ledger) -> None:
    """Every BatchNorm stands in the ledger once, and those that are left are those that are there."""
    entries = [e.value for e in ledger.entries]
    assert len(entries) == len(set(entries))
    assert sorted(e.value for e in ledger.entries if e.kind == "batch_norm") == sorted(batch_norms(before))
    assert sorted(e.value for e in ledger.left if e.kind == "batch_norm") == sorted(batch_norms(after))
    assert all(r.reason in REASONS and r.blocker for e in ledger.left for r in e.refusals)
    assert all(len(e.refusals) == 2 for e in ledger.left) and not any(e.refusals for e in ledger.folded)
    assert all(e.into for e in ledger.folded)


def targets(program: ExportedProgram) -> Counter[str]:
    return Counter(str(n.target) for n in program.graph.nodes if n.op == "call_function" and n.target is not getitem)


def check(graph: RandomGraph) -> Ledger:
    before = graph.program
    after, ledger = folded(before)
    check_exact(before, after, ledger)
    check_ledger(before, after, ledger)
    assert count_operators(after) <= count_operators(before)
    again, second = folded(after)
    assert not second.folded and targets(again) == targets(after), "folding a folded program changed it"
    check_noise(graph.rounded(torch.float32))
    return ledger


EXAMPLES = int(os.environ.get("BNFOLD_EXAMPLES", "40"))


@st.composite
def graphs(draw: st.DrawFn) -> RandomGraph:
    return grow(lambda options: draw(st.sampled_from(options)))


@settings(
    max_examples=EXAMPLES,
    derandomize="BNFOLD_EXAMPLES" not in os.environ,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(graphs())
def test_folding_a_random_graph_keeps_what_it_computes(graph):
    check(graph)


def test_behind_a_scale_of_zero_a_site_stands_for_what_is_next_to_it():
    """It is a number there, which whatever comes next multiplies by what it likes: the division was the wrong one."""
    graph = grow(random.Random(20228).choice)
    assert {"aten.div.Tensor", "aten.conv_transpose2d.input"} <= set(targets(graph.program))
    check(graph)


def test_random_graphs_hold_what_matters():
    """The generator is only worth its time if it meets folds and refusals of many kinds."""
    reasons, operators, outcomes = Counter[str](), Counter[str](), Counter[str]()
    for seed in range(60):
        graph = grow(random.Random(seed).choice)
        _, ledger = folded(graph.program)
        operators.update(targets(graph.program).keys())
        outcomes.update(e.outcome for e in ledger.entries)
        reasons.update(r.reason for e in ledger.left for r in e.refusals)
    assert min(outcomes["backward"], outcomes["forward"], outcomes["left"]) >= 10, outcomes
    assert len(operators) >= 25, operators
    assert len(reasons) >= 8, reasons


def edited(program: ExportedProgram, factor: float) -> ExportedProgram:
    """The program with one constant off by ``factor``."""
    name = next(iter(program.state_dict))
    state = {**program.state_dict, name: nn.Parameter(program.state_dict[name] * factor, requires_grad=False)}
    return rebuild(program, copy_graph(program.graph), program.graph_signature, state, dict(program.constants))


#: What can be wrong with a fold: the check that must see it, given the program before and after and the ledger.
WRONG: dict[str, Callable[[ExportedProgram, ExportedProgram, Ledger], None]] = {
    "a constant": lambda before, after, ledger: check_exact(before, edited(after, 1 + 1e-8), ledger),
    "nothing folded": lambda before, after, ledger: check_ledger(before, before, ledger),
    "no entry": lambda before, after, ledger: check_ledger(before, after, Ledger()),
    "an entry twice": lambda before, after, ledger: check_ledger(before, after, Ledger(ledger.entries * 2)),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_check_bites(name):
    """A fold that is wrong in one place does not pass."""
    p = Program((2, 4, 4, 4), torch.float64)
    x = p.call(aten.conv2d.default, p.x, p.parameter("w", torch.randn(4, 4, 1, 1, dtype=torch.float64)))
    statistics = [p.parameter(n, torch.rand(4, dtype=torch.float64) + 0.5) for n in ("g", "b", "m", "v")]
    x = p.call(aten.batch_norm.default, x, *statistics, False, 0.1, 1e-5, False)
    before = p.done(x)
    after, ledger = folded(before)
    check_exact(before, after, ledger)
    with pytest.raises(AssertionError):
        WRONG[name](before, after, ledger)


# -- legality by brute force -------------------------------------------------------------------------------------------
#
# Whether *any* constants make up for a missing affine is decided without algebra: all weights and biases of the
# contractions are free, the affine is taken out, and Levenberg-Marquardt looks for constants that reproduce the
# outputs. Where it finds them the affine folds; where it does not, bnfold must refuse.


def conv(kernel: int = 1, padding: int = 0, channels: int = 2, out: int = 2, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, out, kernel, padding=padding, groups=groups)


class Scale(nn.Module):
    """A bare multiply, per channel."""

    def __init__(self, *values: float) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.tensor(values, dtype=torch.float64)[:, None, None], requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.values


def norm(*gamma: float, one: bool = False) -> nn.Module:
    module = (nn.BatchNorm1d if one else nn.BatchNorm2d)(len(gamma))
    module.weight.data = torch.tensor(gamma)
    module.bias.data = torch.linspace(-0.4, 0.7, len(gamma))
    module.running_mean = torch.linspace(0.5, -0.3, len(gamma))
    module.running_var = torch.linspace(0.6, 1.4, len(gamma))
    return module


#: name -> affine, contractions, forward(affine, contractions, x), does it fold
CASES: dict[str, tuple[nn.Module, list[nn.Module], Callable[..., Tensor | tuple[Tensor, ...]], bool]] = {
    "after a convolution": (norm(0.7, -1.2), [conv()], lambda f, c, x: f(c[0](x)), True),
    "after a padded convolution": (norm(0.7, -1.2), [conv(3, 1)], lambda f, c, x: f(c[0](x)), True),
    "before a convolution": (norm(0.7, -1.2), [conv(3)], lambda f, c, x: c[0](f(x)), True),
    "before a padded convolution": (norm(0.7, -1.2), [conv(3, 1)], lambda f, c, x: c[0](f(x)), False),
    "a scale before a padded convolution": (Scale(0.7, -1.2), [conv(3, 1)], lambda f, c, x: c[0](f(x)), True),
    "before a grouped convolution": (norm(0.7, -1.2), [conv(3, groups=2)], lambda f, c, x: c[0](f(x)), True),
    "after a transposed convolution": (
        norm(0.7, -1.2), [nn.ConvTranspose2d(2, 2, 2, 2)], lambda f, c, x: f(c[0](x)), True),
    "before a transposed convolution that overlaps": (
        norm(0.7, -1.2), [nn.ConvTranspose2d(2, 2, 3, 2)], lambda f, c, x: c[0](f(x)), False),
    "after relu": (norm(0.7, -1.2), [conv()], lambda f, c, x: f(c[0](x).relu()), False),
    "a positive scale after relu": (Scale(0.7, 1.2), [conv()], lambda f, c, x: f(c[0](x).relu()), True),
    "a negative scale after relu": (Scale(0.7, -1.2), [conv()], lambda f, c, x: f(c[0](x).relu()), False),
    "between relu and a convolution": (
        norm(0.7, -1.2), [conv(), conv()], lambda f, c, x: c[1](f(c[0](x).relu())), True),
    "between a sigmoid and relu": (norm(0.7, -1.2), [conv()], lambda f, c, x: f(c[0](x).sigmoid()).relu(), False),
    "after a sum": (norm(0.7, -1.2), [conv(), conv(3, 1)], lambda f, c, x: f(c[0](x) + c[1](x).sigmoid()), False),
    "after a sum of convolutions": (norm(0.7, -1.2), [conv(), conv(3, 1)], lambda f, c, x: f(c[0](x) + c[1](x)), True),
    "after a sum with the input": (norm(0.7, -1.2), [conv(3, 1)], lambda f, c, x: f(x + c[0](x).relu()), False),
    "after a product": (norm(0.7, -1.2), [conv(), conv()], lambda f, c, x: f(c[0](x) * c[1](x)), False),
    "a scale after a product": (Scale(0.7, -1.2), [conv(), conv()], lambda f, c, x: f(c[0](x) * c[1](x)), True),
    "a scale after a gate": (Scale(0.7, -1.2), [conv(), conv()], lambda f, c, x: f(c[0](x) * c[1](x).sigmoid()), True),
    "after a concatenation": (
        norm(0.7, -1.2, 1.1, 0.4), [conv(), conv(3, 1)], lambda f, c, x: f(torch.cat([c[0](x), c[1](x)], 1)), True),
    "after a concatenation with the input": (
        norm(0.7, -1.2, 1.1, 0.4), [conv()], lambda f, c, x: f(torch.cat([c[0](x), x], 1)), False),
    "after a max pool": (norm(0.7, 1.2), [conv()], lambda f, c, x: f(functional.max_pool2d(c[0](x), 2)), True),
    "after a max pool, negative": (
        norm(0.7, -1.2), [conv()], lambda f, c, x: f(functional.max_pool2d(c[0](x), 2)), False),
    "after an average pool": (norm(0.7, -1.2), [conv()], lambda f, c, x: f(functional.avg_pool2d(c[0](x), 2)), True),
    "after a pool that counts zeros": (
        norm(0.7, -1.2), [conv()], lambda f, c, x: f(functional.avg_pool2d(c[0](x), 2, 1, 1)), False),
    "after a pool that does not count zeros": (
        norm(0.7, -1.2), [conv()], lambda f, c, x: f(functional.avg_pool2d(c[0](x), 2, 1, 1, False, False)), True),
    "on one half": (
        norm(0.7, -1.2), [conv(out=4)], lambda f, c, x: (f(c[0](x)[:, :2]), c[0](x)[:, 2:].relu()), True),
    "on a part that another reads": (
        norm(0.7, -1.2), [conv(out=3)],
        lambda f, c, x: twice(c[0](x), lambda y: (f(y[:, :2]), y[:, 1:].relu())), False),
    "on a value that another reads": (
        norm(0.7, -1.2), [conv()], lambda f, c, x: twice(c[0](x), lambda y: (f(y), y.relu())), False),
    "on the axis that a linear layer does not know": (
        norm(0.7, -1.2, one=True), [nn.Linear(4, 4)], lambda f, c, x: f(c[0](x[..., 0])), False),
    "on a linear layer's axis": (
        norm(0.7, -1.2, 1.1, 0.4, one=True), [nn.Linear(2, 4)],
        lambda f, c, x: f(c[0](x[..., 0].transpose(1, 2)).transpose(1, 2)), True),
    "before a mean and a linear layer": (
        norm(0.7, -1.2), [nn.Linear(2, 3)], lambda f, c, x: c[0](f(x.sigmoid()).mean((2, 3))), True),
    "before a flatten and a linear layer": (
        norm(0.7, -1.2), [nn.Linear(32, 3)], lambda f, c, x: c[0](f(x.sigmoid()).flatten(1)), True),
    "a zero gamma after a convolution": (norm(0.0, -1.2), [conv()], lambda f, c, x: f(c[0](x)), True),
}  # fmt: skip


def twice(value: Tensor, use: Callable[[Tensor], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return use(value)


class Case(nn.Module):
    def __init__(self, affine: nn.Module, contractions: list[nn.Module], run: Callable[..., Any]) -> None:
        super().__init__()
        self.affine, self.contractions, self.run = affine, nn.ModuleList(contractions), run

    def forward(self, x: Tensor) -> Any:
        return self.run(self.affine, self.contractions, x)


def constants_exist(case: Case, x: Tensor) -> bool:
    """Whether constants of the contractions reproduce the outputs with the affine taken out."""
    without = Case(nn.Identity(), list(copy.deepcopy(case.contractions)), case.run)
    names = [name for name, _ in without.named_parameters()]
    shapes = [p.shape for p in without.parameters()]

    def outputs(module: Case, values: Tensor | None = None) -> Tensor:
        if values is None:
            found = module(x)
        else:
            parts = values.split([s.numel() for s in shapes])
            state = {name: part.reshape(shape) for name, part, shape in zip(names, parts, shapes)}
            found = torch.func.functional_call(module, state, (x,))
        return torch.cat([t.flatten() for t in (found if isinstance(found, tuple) else (found,))])

    with torch.no_grad():
        wanted = outputs(case)
    start = torch.cat([p.detach().flatten() for p in without.parameters()])
    generator = torch.Generator().manual_seed(0)
    for attempt in range(2):
        noise = torch.randn(start.shape, dtype=torch.float64, generator=generator)
        values, damping = start + (attempt > 0) * noise, 1e-2
        error = outputs(without, values) - wanted
        for _ in range(60):
            jacobian = torch.func.jacfwd(lambda v: outputs(without, v))(values)
            normal, slope = jacobian.T @ jacobian, jacobian.T @ error
            step = torch.linalg.lstsq(normal + damping * torch.eye(len(values), dtype=torch.float64), slope).solution
            trial = outputs(without, values - step) - wanted
            stuck = error.norm() * (1 - 1e-4) < trial.norm() < error.norm()
            if trial.norm() < error.norm():
                values, error, damping = values - step, trial, max(damping / 4, 1e-12)
            else:
                damping *= 8
            if error.norm() < 1e-9 * wanted.norm() or damping > 1e6 or stuck:
                break
        if error.norm() < 1e-9 * wanted.norm():
            return True
    return False


# torch.func.jacfwd loads decompositions that torch itself still scripts.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", CASES)
def test_an_affine_folds_where_constants_exist_and_nowhere_else(name):
    affine, contractions, run, folds = CASES[name]
    torch.manual_seed(1)
    case = copy.deepcopy(Case(affine, contractions, run)).double().eval()
    for parameter in case.contractions.parameters():
        parameter.data = torch.randn_like(parameter)
    x = torch.randn(6, 2, 4, 4, dtype=torch.float64)
    assert constants_exist(case, x) == folds
    result = bnfold.fold(case, (x,), merge=False)
    assert (not result.ledger.left) == folds
    with torch.no_grad():
        true, found = case(x), result.module(x)
    for a, b in zip(*((t if isinstance(t, tuple) else (t,)) for t in (found, true)), strict=True):
        assert close(a, b)
