"""``bisect`` names the module where a file goes wrong, our own or not, and nothing where none does."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import zoo
import zoo_deciding
from click.testing import CliRunner
from faults import FAULTS, victim
from onnx import numpy_helper
from test_decisions import FAULTS as DECISIVE
from torch import Tensor, nn

import bnfold
from bnfold import pipeline
from bnfold.cli import cli
from bnfold.errors import InputError
from bnfold.gate import bisection
from bnfold.gate.gate import Gate
from bnfold.gate.optimizers import NAMES, guilty
from bnfold.report import Bisection

torch.set_num_threads(1)


@cache
def written(name: str, folder: Path) -> Path:
    path = folder / f"{name}.onnx"
    bnfold.export(*_with_path(NETS[name](), path), device="cpu", check=False)
    return path


def _with_path(net: tuple[nn.Module, tuple[Tensor, ...]], path: Path) -> tuple[Any, ...]:
    return net[0], path, net[1]


NETS: dict[str, Callable[[], Any]] = {"victim": victim} | zoo.NETS | zoo_deciding.NETS


def search(name: str, folder: Path, fault: Callable[[onnx.ModelProto], None] | None = None) -> Bisection:
    path = written(name, folder)
    if fault is not None:
        model = onnx.load(path)
        fault(model)
        path = folder / "faulty.onnx"
        onnx.save(model, path)
    return bnfold.bisect(path, *NETS[name](), device="cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bisect")


# -- nothing to find ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["victim", "densenet", "squeeze_excite", "two_inputs", "detector", "quantised"],
)  # fmt: skip
def test_a_right_file_has_no_culprit(name: str, folder: Path) -> None:
    found = search(name, folder)
    assert found.passed and found.culprit is None and not found.optimizers, found
    assert found.compared >= 0.4 * found.values and found.worst < 4


def test_values_between_a_fold_and_its_layer_are_not_compared(folder: Path) -> None:
    """A convolution that holds its BatchNorm equals the BatchNorm's output, not its own."""
    found = search("victim", folder)
    assert found.compared == found.values and found.agree == "head"


# -- faults ------------------------------------------------------------------------------------------------------------

#: The module to blame, where the fault is in one.
BLAMED = {
    "one channel off by 1 %": "body", "one channel off by 0.1 %": "body", "zeroed channel": "body",
    "negated channel": "body", "swapped channels": "body", "reversed input channels": "body",
    "transposed kernel": "body", "flipped kernel": "stem", "one layer in bfloat16": "body", "dropped bias": "stem",
    "one bias off by 0.1 %": "stem", "dead channel behind a LayerScale": "branch",
    "one weight off behind a LayerScale": "branch", "shift of padding": "stem",
}  # fmt: skip


@pytest.mark.parametrize("name", BLAMED)
def test_the_module_is_named_with_what_was_folded_into_it(name: str, folder: Path) -> None:
    found = search("victim", folder, FAULTS[name])
    assert found.culprit is not None and not found.passed
    assert found.culprit.module == BLAMED[name] and found.culprit.sure
    assert any(f"'{BLAMED[name]}_norm' into {BLAMED[name]}" in fold for fold in found.culprit.folds)
    assert found.culprit.ratio > 100 and found.culprit.before < 4


@pytest.mark.parametrize("name", ["missing activation", "wrong activation"])
def test_an_operator_without_weights_is_named(name: str, folder: Path) -> None:
    found = search("victim", folder, FAULTS[name])
    assert found.culprit is not None and found.culprit.value == "relu" and found.agree == "stem"


@pytest.mark.parametrize("name", sorted(set(FAULTS) - set(BLAMED) - {"missing activation", "wrong activation"}))
def test_faults_behind_the_last_module_are_at_the_outputs(name: str, folder: Path) -> None:
    found = search("victim", folder, FAULTS[name])
    assert not found.passed
    if found.culprit is None:
        assert name in ("an output too few", "float64 output") and "see check" in found.notes[-1]
    else:
        assert found.culprit.value.startswith("output")


@pytest.mark.parametrize(
    "name", ["the next index", "the worst expert", "floor for round", "another overlap", "no maxima"]
)
def test_a_wrong_decision_is_named(name: str, folder: Path) -> None:
    net, fault = DECISIVE[name]
    kinds = {"the next index": "Mod", "the worst expert": "ArgMin", "floor for round": "Floor",
             "another overlap": "Greater", "no maxima": "Less"}  # fmt: skip
    found = search(net, folder, fault)
    assert found.culprit is not None and found.culprit.operator == kinds[name], found


def test_values_are_read_some_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = search("victim", folder, FAULTS["dead channel behind a LayerScale"])
    asked: list[int] = []
    compared = bisection.compared

    def count(judge: Any, claim: Any, case: Any, partners: Any) -> Any:
        asked.append(len(partners))
        return compared(judge, claim, case, partners)

    monkeypatch.setattr(bisection, "compared", count)
    monkeypatch.setattr(bisection, "CHUNK", 6000)
    parts = search("victim", folder, FAULTS["dead channel behind a LayerScale"])
    assert parts.culprit is not None and whole.culprit is not None and parts.culprit.value == whole.culprit.value
    assert len(asked) > 2 and max(asked) < 4


class Deep(nn.Module):
    """``depth`` blocks, ``4 * depth`` operators in the file."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh()) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x).sin()
        return x


def test_a_deep_net_is_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, args = zoo.randomize(Deep(24)), (torch.randn(2, 4, generator=torch.Generator().manual_seed(0)),)
    path = tmp_path / "deep.onnx"
    bnfold.export(net, path, args, device="cpu", check=False)
    model = onnx.load(path)
    node = next(n for n in model.graph.node if n.name.startswith("blocks.17"))
    tensor = next(t for t in model.graph.initializer if t.name in node.input)
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1.001), tensor.name))
    onnx.save(model, path)
    monkeypatch.setattr(bisection, "CHUNK", 30_000)
    found = bnfold.bisect(path, net, args, device="cpu")
    assert found.values >= 96 and found.culprit is not None and found.culprit.module == "blocks.17.0"


# -- files from elsewhere ----------------------------------------------------------------------------------------------


def by_torch(net: nn.Module, args: tuple[Tensor, ...], path: Path, **options: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shapes = tuple({0: torch.export.Dim("n")} for _ in args)
        torch.onnx.export(net.eval(), args, path, dynamo=True, verbose=False, dynamic_shapes=shapes, **options)


def rename(model: onnx.ModelProto) -> None:
    graph = model.graph
    kept = {v.name for v in [*graph.input, *graph.output, *graph.initializer]}
    names = {v: f"v{i}" for i, n in enumerate(graph.node) for v in n.output if v not in kept}
    for node in graph.node:
        node.input[:] = [names.get(v, v) for v in node.input]
        node.output[:] = [names.get(v, v) for v in node.output]
    del graph.value_info[:]


@pytest.mark.parametrize("renamed", [False, True], ids=["its names", "no names"])
@pytest.mark.parametrize("optimize", [False, True], ids=["as it is", "folded by torch.onnx"])
def test_files_of_torch_onnx(optimize: bool, renamed: bool, tmp_path: Path) -> None:
    net, args = victim()
    path = tmp_path / "net.onnx"
    by_torch(net, args, path, optimize=optimize)
    model = onnx.load(path)
    if renamed:
        rename(model)
    onnx.save(model, path)
    found = bnfold.bisect(path, net, args, device="cpu")
    assert found.passed and found.compared >= 6, found

    second = [n for n in model.graph.node if n.op_type == "Conv"][1]
    tensor = next(t for t in model.graph.initializer if t.name == second.input[1])
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1.01), tensor.name))
    onnx.save(model, path)
    found = bnfold.bisect(path, net, args, device="cpu")
    assert found.culprit is not None and found.culprit.operator == "Conv" and not found.culprit.sure
    assert found.culprit.value == second.output[0]


def test_an_unfolded_file_of_ours(tmp_path: Path) -> None:
    net, args = victim()
    path = tmp_path / "net.onnx"
    bnfold.export(net, path, args, device="cpu", check=False, fold=False)
    assert bnfold.bisect(path, net, args, device="cpu").passed
    model = onnx.load(path)
    norm = [n for n in model.graph.node if n.op_type == "BatchNormalization"][1]
    next(a for a in norm.attribute if a.name == "epsilon").f = 1e-2
    onnx.save(model, path)
    found = bnfold.bisect(path, net, args, device="cpu")
    assert found.culprit is not None and found.culprit.module == "body_norm" and not found.culprit.folds


# -- ONNX Runtime's optimiser ------------------------------------------------------------------------------------------


class Turned(nn.Module):
    """MatMul, Transpose, BatchNorm: as many rows as columns, so that ONNX Runtime takes one for the other."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.norm, self.head = nn.Parameter(torch.randn(6, 5)), nn.BatchNorm1d(5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm((x @ self.weight).T).relu())


def turned() -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    return zoo.randomize(Turned()), (torch.randn(5, 6),)


def test_a_faulty_optimisation_is_named(tmp_path: Path) -> None:
    net, args = turned()
    options: dict[str, Any] = {"device": "cpu", "fold": False, "static": True}
    report = bnfold.export(net, tmp_path / "net.onnx", args, keep_failed=True, **options)
    assert report.check is not None and report.check.verdict == "fail"
    assert "MatMul_BatchNormalization_Fusion makes the file wrong" in report.check.problems[0]
    assert not any("optimisations off" in problem for problem in report.check.problems)
    found = bnfold.bisect(tmp_path / "net.failed.onnx", net, args, device="cpu", static=True)
    assert found.optimizers == ("MatMul_BatchNormalization_Fusion",) and found.culprit is None and not found.passed
    assert found.worst < 4 and found.optimized > 1e3


def test_a_file_that_is_wrong_by_itself_blames_no_optimisation(folder: Path) -> None:
    found = search("victim", folder, FAULTS["zeroed channel"])
    assert found.optimizers == ()
    report = bnfold.check(folder / "faulty.onnx", *victim(), device="cpu")
    assert report.verdict == "fail" and not any("optimisation " in problem for problem in report.problems)


@pytest.mark.parametrize(
    "bad", [{"a"}, {"h"}, {"d"}, {"b", "c"}, {"a", "h"}, set()], ids=lambda bad: "".join(sorted(bad))
)
def test_the_guilty_are_found_by_halves(bad: set[str]) -> None:
    asked: list[int] = []

    def wrong(disabled: Any) -> bool:
        asked.append(1)
        return not bad <= set(disabled) if bad else True

    found = guilty(wrong, tuple("abcdefgh"))
    assert set(found) >= bad and len(asked) <= 8
    assert len(bad) != 1 or set(found) == bad
    assert bad or found == ()


def test_every_optimisation_is_known_to_this_runtime_or_ignored() -> None:
    assert len(set(NAMES)) == len(NAMES) > 60


# -- what the gate says ------------------------------------------------------------------------------------------------


def test_a_failure_names_the_first_fold_that_is_off(tmp_path: Path) -> None:
    net, args = victim()
    folded = bnfold.fold(net, args)
    state = folded.program.state_dict
    for name in ("body.weight", "branch.weight"):
        state[name] = torch.nn.Parameter(state[name] * 1.01, requires_grad=False)
    report = Gate(folded.captured, folded.ledger, folded.program).judge()
    outputs = [problem for problem in report.problems if ", output '" in problem]
    assert outputs and all("the first fold that is off is that of 'body_norm'" in problem for problem in outputs)


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path: Path) -> str:
    (tmp_path / "net.py").write_text(
        f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\nimport faults\n\n"
        "def make():\n    module, args = faults.victim()\n    module.example_inputs = args\n    return module\n"
    )
    return f"{tmp_path / 'net.py'}:make"


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli, ["bisect", *arguments, "--device", "cpu"])
    return result.exit_code, result.stdout, result.stderr


def test_the_command_names_the_module(source: str, folder: Path) -> None:
    search("victim", folder, FAULTS["zeroed channel"])
    code, out, _ = run(str(folder / "faulty.onnx"), source)
    assert code == 1 and "Wrong" in out and "body" in out and "BatchNorm2d 'body_norm' into body" in out
    code, out, err = run(str(folder / "faulty.onnx"), source, "--quiet")
    assert code == 1 and not out and "module 'body' is the first to leave the noise" in err


def test_the_command_finds_nothing_in_a_right_file(source: str, folder: Path, tmp_path: Path) -> None:
    report = tmp_path / "found.json"
    code, out, _ = run(str(written("victim", folder)), source, "--report", str(report))
    assert code == 0 and "nothing leaves the noise" in out
    found = json.loads(report.read_text())
    assert found["passed"] is True and found["culprit"] is None and found["compared"] == found["values"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [(["nope.onnx"], 3, "there is no such file"), (["net.py"], 3, "no ONNX file"),
     (["nope.onnx", "--report", "x.html"], 2, ".json alone")],
)  # fmt: skip
def test_the_command_says_what_is_wrong_with_its_arguments(
    arguments: list[str], code: int, words: str, source: str, tmp_path: Path
) -> None:
    file, *rest = arguments
    found, _, err = run(str(tmp_path / file), source, *rest)
    assert found == code and words in err and "Traceback" not in err


def test_a_file_with_other_inputs_is_refused(folder: Path) -> None:
    with pytest.raises(InputError):
        pipeline.bisect(written("two_inputs", folder), *victim(), device="cpu")
