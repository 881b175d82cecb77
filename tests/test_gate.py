"""The gate: correct folds pass, every fault turns the verdict, and what cannot be judged is never green."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import zoo
from faults import AT_SITES, FAULTS, victim
from torch import Tensor, nn

import bnfold
from bnfold.errors import InputError, ProviderError
from bnfold.gate import candidates
from bnfold.gate.evidence import ELEMENT
from bnfold.gate.gate import LIMIT, Gate
from bnfold.graph import interpret
from bnfold.graph.capture import Captured, capture
from bnfold.graph.graph import Graph
from bnfold.lowering.lower import lower, save
from bnfold.passes.folding import fold as fold_graph
from bnfold.report import CheckReport, Ledger
from bnfold.runtime.runtime import device_of

torch.set_num_threads(1)
SCALES = (1.0, 100.0, 0.01)


class Exported:
    """A net captured, folded and lowered once; ``judge`` with another file is cheap."""

    def __init__(self, module: nn.Module, args: tuple[Any, ...], **options: Any) -> None:
        self.captured: Captured = capture(module, args, **options)
        graph = Graph(self.captured.program, self.captured.masters)
        self.ledger: Ledger = fold_graph(graph)
        self.folded = graph.finish()
        self.lowered = lower(self.folded, dims=self.captured.dims, sites=self.ledger.sites)

    def judge(self, path: Path, fault: Callable[[onnx.ModelProto], None] | None = None, **options: Any) -> CheckReport:
        save(self.lowered, path)
        if fault is not None:
            model = onnx.load(path)
            fault(model)
            onnx.save(model, path)
        return Gate(self.captured, self.ledger, self.folded, path, self.lowered.sites, **options).judge()


@cache
def exported(scale: float) -> Exported:
    return Exported(*victim(scale))


def check(module: nn.Module, args: tuple[Any, ...], path: Path, **options: Any) -> CheckReport:
    return Exported(module, args, **options).judge(path)


class Call(nn.Module):
    def __init__(self, run: Callable[..., Any], width: int = 4) -> None:
        super().__init__()
        self.linear, self.run = nn.Linear(width, width), run

    def forward(self, *x: Tensor) -> Any:
        return self.run(self.linear, *x)


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -- what passes -------------------------------------------------------------------------------------------------------

RIGHT = ["resnet_basic", "mobilenet_v2", "densenet", "mlp", "squeeze_excite", "two_inputs", "dict_outputs", "conv1d"]


@pytest.mark.parametrize("scale", SCALES)
def test_a_correct_file_passes_at_every_scale(scale: float, tmp_path: Path) -> None:
    report = exported(scale).judge(tmp_path / "net.onnx")
    assert report.verdict == "pass", report.problems
    assert report.batches == (1, 2, 7, 54, 3, 33) and report.samples == 103
    assert 0 < report.ratio <= LIMIT and 0 < report.site_ratio <= ELEMENT * LIMIT
    assert {s.candidate for s in report.sites} == {"the file in float64"}
    assert {o.candidate for o in report.outputs} == {
        "the file in float64", "ONNX Runtime, optimisations off", "ONNX Runtime"
    }  # fmt: skip
    assert {o.output for o in report.outputs} == {"output_0", "output_1"}
    assert len({sum(o.doublings) for o in report.outputs if o.output == "output_0"}) == 1, "all elements are counted"
    assert all(o.doublings[0] and 2 ** (len(o.doublings) - 2) <= o.worst for o in report.outputs if o.worst > 1)


@pytest.mark.parametrize("name", RIGHT)
def test_zoo_nets_pass(name: str, tmp_path: Path) -> None:
    report = check(*zoo.NETS[name](), tmp_path / "net.onnx")
    assert report.verdict == "pass", report.problems


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_judged_by_its_own_noise(dtype: torch.dtype, tmp_path: Path) -> None:
    module, args = victim()
    options: dict[str, Any] = {"opset": 22, "device": "cpu"}
    report = bnfold.export(module, tmp_path / "half.onnx", args, dtype=dtype, **options)
    assert report.passed and report.check is not None, report.check
    assert report.check.outputs[0].noise > 1e-4
    if dtype is torch.bfloat16:  # its file is a failure as a float32 export
        assert bnfold.check(tmp_path / "half.onnx", module, args, device="cpu").verdict == "fail"
    else:
        with pytest.raises(InputError, match="--dtype float16"):
            bnfold.check(tmp_path / "half.onnx", module, args, device="cpu")


def test_float64_is_its_own_truth(tmp_path: Path) -> None:
    module = Call(lambda linear, x: linear(linear(x).tanh())).double()
    assert check(module, (rows(3, 4).double(),), tmp_path / "net.onnx").verdict == "pass"


# -- faults ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_never_green(name: str, scale: float, tmp_path: Path) -> None:
    report = exported(scale).judge(tmp_path / "net.onnx", FAULTS[name])
    assert report.verdict == "fail", report
    # Whose it is: nothing is said of a runtime that computes what the file says.
    assert not any("computes operator" in p or "optimisation " in p for p in report.problems), report.problems
    # Each is seen by what it does, too: it may have been folded wrongly as well as written wrongly.
    seen = [problem for problem in report.problems if not problem.startswith("constant")]
    assert seen
    if name in AT_SITES:
        assert report.ratio <= LIMIT and all("fold of 'branch_norm'" in problem for problem in seen)
        blind = Gate(exported(scale).captured, Ledger(), None, tmp_path / "net.onnx").judge()
        assert blind.verdict == "pass"  # the outputs alone do not show it: the sites are what bites


def test_a_single_wrong_sample_is_a_fault(tmp_path: Path) -> None:
    net, path = exported(1.0), tmp_path / "net.onnx"
    net.judge(path, FAULTS["wrong in one row of a batch"])
    report = Gate(net.captured, Ledger(), None, path).judge()
    assert report.verdict == "fail" and "at batch 7" in report.problems[0]


def test_a_fault_in_the_folded_program_is_seen(tmp_path: Path) -> None:
    net = Exported(*victim())
    wrong = 1 + 1e-3 * torch.eye(8)[3][:, None, None, None]
    net.folded.state_dict["body.weight"] = net.folded.state_dict["body.weight"] * wrong
    report = Gate(net.captured, net.ledger, net.folded).judge()
    assert report.verdict == "fail" and all(p.startswith("folded torch") for p in report.problems)
    assert any("fold of 'body_norm'" in p for p in report.problems)


def test_a_wrong_eps_is_seen(tmp_path: Path) -> None:
    bnfold.export(*(lambda m, a: (m, tmp_path / "net.onnx", a))(*victim(eps=1e-4)), device="cpu")
    assert bnfold.check(tmp_path / "net.onnx", *victim(), device="cpu").verdict == "fail"


def test_a_site_missing_from_the_program_is_a_problem() -> None:
    net = Exported(*victim())
    net.ledger = Ledger(
        tuple(
            bnfold.report.Entry("gone", "m", "BatchNorm2d", "batch_norm", "backward", site=(("gone", "relu"),))
            for _ in "1"
        )
    )
    judged = Gate(net.captured, net.ledger, net.folded).judge()
    assert any("1 of 1 fold sites are not in the program" in p for p in judged.problems)


def test_sites_lost_in_the_file_are_told(tmp_path: Path) -> None:
    net = Exported(*victim())
    path = tmp_path / "net.onnx"
    save(net.lowered, path)
    report = Gate(net.captured, net.ledger, net.folded, path, {}).judge()
    assert any("have no value of their own in the file" in note for note in report.notes)


# -- what can never be green -------------------------------------------------------------------------------------------


def test_a_discontinuity_inside_an_operator_is_inconclusive(tmp_path: Path) -> None:
    """Nearest sampling rounds where nobody sees it, unlike ``round`` (tests/test_decisions.py)."""

    def sample(linear: nn.Module, x: Tensor) -> Tensor:
        grid = torch.stack([linear(x) * 0, (linear(x) * 1e7).sin() * 0.99], -1)[:, None]
        table = torch.linspace(-1, 1, 4096)[None, None, :, None].expand(x.shape[0], 1, 4096, 1)
        return nn.functional.grid_sample(table, grid, mode="nearest", align_corners=False)

    report = check(Call(sample), (rows(3, 4),), tmp_path / "net.onnx")
    assert report.verdict == "inconclusive" and any("moves it by" in p for p in report.problems), report.problems


def test_a_random_model_never_passes(tmp_path: Path) -> None:
    assert (
        check(Call(lambda linear, x: linear(x) + torch.rand_like(x)), (rows(3, 4),), tmp_path / "n.onnx").verdict
        != "pass"
    )


def test_an_output_that_is_never_finite_is_inconclusive(tmp_path: Path) -> None:
    report = check(Call(lambda linear, x: linear(x) * float("nan")), (rows(3, 4),), tmp_path / "net.onnx")
    assert report.verdict == "inconclusive" and "no finite element" in " ".join(report.problems)


def test_masked_outputs_are_judged_by_the_rest(tmp_path: Path) -> None:
    module = Call(lambda linear, x: linear(x).masked_fill(torch.tensor([True, False, False, False]), float("-inf")))
    assert check(module, (rows(3, 4),), tmp_path / "net.onnx").verdict == "pass"


def test_a_graph_without_float64_is_inconclusive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = exported(1.0)

    def refuse(*args: Any) -> None:
        raise RuntimeError("not implemented for 'Double'")

    monkeypatch.setattr(interpret, "call_precise", refuse)
    report = net.judge(tmp_path / "net.onnx")
    assert report.verdict == "inconclusive" and "does not run in float64" in report.problems[0]


def test_integers_that_differ_fail(tmp_path: Path) -> None:
    module = Call(lambda linear, x: (linear(x), linear(x).argmax(1)))
    net = Exported(module, (rows(3, 4),))

    def fault(model: onnx.ModelProto) -> None:
        node = next(n for n in model.graph.node if n.op_type == "ArgMax")
        node.op_type = "ArgMin"

    assert net.judge(tmp_path / "right.onnx").verdict == "pass"
    report = net.judge(tmp_path / "net.onnx", fault)
    assert report.verdict == "fail" and any(
        "argmax 'argmax' decides otherwise than the model" in problem for problem in report.problems
    )


def test_a_foreign_provider_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ProviderError, match="asked for JsExecutionProvider"):
        exported(1.0).judge(tmp_path / "net.onnx", device=device_of("js"))


def test_a_session_that_crashes_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(self: Any, flat: Any) -> None:
        raise RuntimeError("segfault")

    monkeypatch.setattr(candidates.OnnxCandidate, "run", crash)
    report = exported(1.0).judge(tmp_path / "net.onnx")
    assert report.verdict == "fail" and "fails at batch 1" in report.problems[0]


def test_nothing_to_judge_is_a_failure() -> None:
    net = exported(1.0)
    assert Gate(net.captured, net.ledger).judge().problems == ("no output was compared",)


def test_a_model_that_runs_on_no_input_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr(interpret.Runner, "__call__", refuse)
    monkeypatch.setattr(Captured, "run_eager", refuse)
    with pytest.raises(InputError, match="runs on none of the inputs made for it: RuntimeError: boom"):
        exported(1.0).judge(tmp_path / "net.onnx")


class OnlyEven(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_exporting() and x.shape[0] != 2:
            raise ValueError("two at a time")
        return self.linear(x)


def test_too_few_runnable_samples_are_inconclusive(tmp_path: Path) -> None:
    report = check(OnlyEven(), (rows(2, 4),), tmp_path / "net.onnx")
    assert report.verdict == "inconclusive" and report.batches == (2,)
    assert "only 2 samples could be run" in report.problems[0]
    assert "does not run at batch 1: ValueError: two at a time" in report.notes[0]


# -- the capture is compared with the model, at every size -------------------------------------------------------------

SIZES: dict[str, Callable[..., Any]] = {
    "batch 1": lambda linear, x: linear(x) * (3 if x.shape[0] == 1 else 1),
    "batch 7": lambda linear, x: linear(x) * (3 if not torch.compiler.is_exporting() and x.shape[0] == 7 else 1),
}


@pytest.mark.parametrize("where", SIZES)
def test_code_that_depends_on_the_batch_fails(where: str, tmp_path: Path) -> None:
    report = check(Call(SIZES[where]), (rows(2, 4),), tmp_path / "net.onnx")
    assert report.verdict == "fail" and any(f"capture: at {where} the model" in p for p in report.problems)


def test_an_eager_nan_is_no_match(tmp_path: Path) -> None:
    def run(linear: nn.Module, x: Tensor) -> Tensor:
        return linear(x) if torch.compiler.is_exporting() else linear(x) * float("nan")

    assert "NaN" in check(Call(run), (rows(2, 4),), tmp_path / "net.onnx").problems[0]


def test_a_graph_that_holds_for_fewer_sizes_than_the_model_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, run = exported(1.0), interpret.Runner.__call__

    def only_two(self: Any, inputs: Any, **kwargs: Any) -> Any:
        if inputs[0].shape[0] != 2:
            raise RuntimeError("baked")
        return run(self, inputs, **kwargs)

    monkeypatch.setattr(interpret.Runner, "__call__", only_two)
    report = net.judge(tmp_path / "net.onnx")
    assert report.verdict == "fail" and "the model runs at batch 1, its captured graph does not" in report.problems[0]


# -- files from elsewhere ----------------------------------------------------------------------------------------------


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 3), nn.Linear(6, 3)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.left(a).tanh() - self.right(b)


def torch_export(module: nn.Module, args: tuple[Tensor, ...], path: Path, **more: Any) -> None:
    import warnings

    shapes = tuple({0: torch.export.Dim("n")} for _ in args)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module.eval(), args, path, dynamo=True, verbose=False, dynamic_shapes=shapes, **more)


def test_files_of_torch_onnx_are_judged(tmp_path: Path) -> None:
    module, args = victim()
    torch_export(module, args, tmp_path / "net.onnx")
    assert bnfold.check(tmp_path / "net.onnx", module, args, device="cpu").passed
    assert bnfold.check(tmp_path / "net.onnx", victim(2.0)[0], args, device="cpu").verdict == "fail"


@pytest.mark.parametrize("names", [["a", "b"], ["first", "second"]])
def test_inputs_are_matched_by_name_or_position(names: list[str], tmp_path: Path) -> None:
    module, args, path = Pair(), (rows(2, 4), rows(2, 6)), tmp_path / "net.onnx"
    torch_export(module, args, path, input_names=names)
    assert bnfold.check(path, module, args, device="cpu").passed
    model = onnx.load(path)
    inputs = list(model.graph.input)[::-1]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    onnx.save(model, path)
    assert bnfold.check(path, module, args, device="cpu").passed  # by name, or as each has a shape of its own


def test_a_file_with_other_inputs_is_refused(tmp_path: Path) -> None:
    torch_export(Pair(), (rows(2, 4), rows(2, 6)), tmp_path / "net.onnx")
    with pytest.raises(InputError, match="do not match"):
        bnfold.check(tmp_path / "net.onnx", Call(lambda linear, x: linear(x)), (rows(2, 4),), device="cpu")


@pytest.mark.parametrize("content", [b"", b"garbage", None], ids=["empty", "garbage", "truncated"])
def test_a_damaged_file_is_refused(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    save(exported(1.0).lowered, path)
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    with pytest.raises(bnfold.BnfoldError) as caught:
        bnfold.check(path, *victim(), device="cpu")
    assert "\n" not in str(caught.value)
