"""A torch program that is off by little: rounding of torch's kernels passes, a wrong fold of the same size does not."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from faults import victim
from torch import Tensor
from torch.utils import _pytree as pytree

from bnfold.gate.gate import Gate
from bnfold.graph.capture import capture
from bnfold.graph.graph import Graph
from bnfold.graph.interpret import Runner
from bnfold.passes.folding import fold
from bnfold.report import CheckReport

torch.set_num_threads(1)
NOISE = 1.5e-7


def judged(change: Callable[[dict[str, Tensor]], None] | None = None, eager: bool = False) -> CheckReport:
    captured = capture(*victim())
    graph = Graph(captured.program)
    ledger = fold(graph)
    folded = graph.finish()
    if change is not None:
        change(folded.state_dict)
    return Gate(captured, ledger, folded, eager=deepcopy(captured.eager) if eager else None).judge()


def worst(report: CheckReport) -> float:
    return max(max(site.ratio, site.channel_ratio) for site in report.sites)


@pytest.fixture
def rough(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Kernels that round by so many times the noise, but for those of float64 and of the unfolded program."""

    def make(times: float) -> None:
        call = Runner.call_function

        def rounded(self, target, args, kwargs):
            value = call(self, target, args, kwargs)
            folded = any("folded" in name for name in self._constants)
            if self.precise or not folded or getattr(target, "_opname", "") != "conv2d":
                return value
            generator = torch.Generator().manual_seed(0)
            noise = times * NOISE * value.square().mean().sqrt()
            return pytree.tree_map(lambda v: v + noise * torch.randn(v.shape, generator=generator), value)

        monkeypatch.setattr(Runner, "call_function", rounded)

    return make


def test_the_kernels_rounding_is_no_fault(rough):
    rough(12.0)
    report = judged()
    assert report.verdict == "pass" and report.ratio < 4 and worst(report) < 4
    assert {site.candidate for site in report.sites} == {"folded torch in float64"}
    (said,) = (note for note in report.notes if "rounding in torch's kernels" in note and "fold sites" in note)
    assert said.startswith("folded torch: ") and "in float64 by" in said


def test_it_is_one_beyond_what_kernels_do(rough):
    rough(1000.0)
    report = judged()
    assert report.verdict == "fail" and all(problem.startswith("folded torch") for problem in report.problems)
    assert not any("kernels" in note for note in report.notes)


def test_a_wrong_fold_of_that_size_is_a_fault(rough):
    def change(constants: dict[str, Tensor]) -> None:
        constants["body.weight"] = constants["body.weight"] * (1 + 6e-6)

    right, wrong = judged(), judged(change)
    assert right.verdict == "pass" and not right.notes
    assert wrong.verdict == "fail" and 16 < worst(wrong) < 64
    assert not any("kernels" in note for note in wrong.notes)
    rough(12.0)  # and rough kernels do not hide it
    assert judged(change).verdict == "fail"


def test_a_class_is_run_in_float64_as_well(monkeypatch):
    """The module that a fold was written into; float64 answers for it too, and the module is left as it was."""
    from bnfold.gate import candidates

    run, dtypes = candidates.Captured.run_eager, []

    def rough(self, flat):
        values = run(self, flat)
        dtypes.append({p.dtype for p in self.eager.parameters()})
        if values[0].dtype == torch.float64 or self.eager is first[0]:
            return values
        generator = torch.Generator().manual_seed(1)
        return [v + 8 * NOISE * v.square().mean().sqrt() * torch.randn(v.shape, generator=generator) for v in values]

    captured = capture(*victim())
    first = [captured.eager]
    graph = Graph(captured.program)
    ledger = fold(graph)
    monkeypatch.setattr(candidates.Captured, "run_eager", rough)
    report = Gate(captured, ledger, graph.finish(), eager=deepcopy(captured.eager)).judge()
    assert report.verdict == "pass", report.problems
    assert {o.candidate for o in report.outputs} == {"folded torch", "folded class in float64"}
    assert {torch.float64} in dtypes
