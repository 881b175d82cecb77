"""Translation: nothing is traced again that need not be, and what is written otherwise computes the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from onnxscript.values import TracedOnnxFunction
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional as F
from torch.onnx._internal.exporter._registration import ONNXRegistry

import bnfold
from bnfold.errors import LowerError
from bnfold.graph.capture import capture
from bnfold.lowering import lower as lower_module
from bnfold.lowering import translate as translate_module
from bnfold.lowering.lower import lower, save
from bnfold.lowering.translations import gathered_once
from bnfold.runtime.runtime import open_session

torch.set_num_threads(1)


class Call(nn.Module):
    def __init__(self, run: Callable[..., Any], *layers: nn.Module) -> None:
        super().__init__()
        self.run, self.layers = run, nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Any:
        return self.run(x, *self.layers)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For every program that torch.onnx asked to decompose itself: whether it traced itself again."""
    seen: list[bool] = []
    own = translate_module._Decomposed.run_decompositions

    def watched(self: Any, decomp_table: Any = None, **options: Any) -> ExportedProgram:
        found = own(self, decomp_table, **options)
        seen.append(found is not self)
        return found

    monkeypatch.setattr(translate_module._Decomposed, "run_decompositions", watched)
    return seen


def in_full(program: ExportedProgram, monkeypatch: pytest.MonkeyPatch) -> ir.Model:
    with monkeypatch.context() as patch:
        patch.setattr(translate_module, "_rewrite", lambda module: False)
        return lower(program).model


def test_translations_are_gathered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """For all models, without what the exporter adds for one; and they are what torch.onnx gathers itself."""
    module, x = Call(lambda x, conv: conv(x).relu(), nn.Conv2d(3, 5, 3)), torch.randn(2, 3, 7, 11)

    def written() -> bytes:
        return bytes(ir.to_proto(lower(capture(module, (x,)).program).model).SerializeToString(deterministic=True))

    first, parsed = written(), []
    own = TracedOnnxFunction.function_ir.fget
    monkeypatch.setattr(TracedOnnxFunction, "function_ir", property(lambda each: parsed.append(each.name) or own(each)))
    assert written() == first and not parsed
    with gathered_once():
        one, other = (ONNXRegistry.from_torchlib() for _ in range(2))
    one.register_op(torch.ops.aten.relu.default, lambda x: x)
    plain = ONNXRegistry.from_torchlib()
    assert {name: len(kept) for name, kept in other.functions.items()} == {
        name: len(kept) for name, kept in plain.functions.items()
    }
    monkeypatch.setattr("bnfold.lowering.translations.gathered_once", nullcontext)
    assert written() == first and parsed


def test_of_a_torch_with_other_insides_they_are_gathered_as_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(TracedOnnxFunction, "function_ir")
    gather = ONNXRegistry.from_torchlib
    with gathered_once():
        assert ONNXRegistry.from_torchlib == gather


def rms(value: Tensor) -> float:
    return float(value.double().square().mean().sqrt())


def image(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


SAME = {
    "pool to one": (lambda x: F.adaptive_avg_pool2d(x, 1), (), (2, 4, 6, 6)),
    "pool of a line": (lambda x: F.adaptive_avg_pool1d(x, 1), (), (2, 4, 6)),
    "pool of a volume": (lambda x: F.adaptive_avg_pool3d(x, 1), (), (2, 4, 3, 4, 5)),
    "pool to two": (lambda x: F.adaptive_avg_pool2d(x, 2), (), (2, 4, 6, 6)),
    "transposed": (lambda x, c: c(x), (nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2, dilation=2),), (2, 4, 6, 6)),
    "transposed line": (lambda x, c: c(x), (nn.ConvTranspose1d(4, 6, 3, bias=False),), (2, 4, 6)),
    "transposed volume": (lambda x, c: c(x), (nn.ConvTranspose3d(4, 6, (1, 2, 3), (1, 2, 1)),), (2, 4, 3, 4, 5)),
    "same": (lambda x, c: c(x), (nn.Conv2d(4, 6, (3, 5), padding="same", dilation=(2, 1), groups=2),), (2, 4, 6, 6)),
    "same of an even kernel": (lambda x, c: c(x), (nn.Conv2d(4, 6, 4, padding="same"),), (2, 4, 6, 6)),
    "valid": (lambda x, c: c(x), (nn.Conv1d(4, 6, 4, padding="valid", stride=2),), (2, 4, 9)),
    "batch_norm": (lambda x, n: n(x).relu(), (nn.BatchNorm2d(4, eps=0.1),), (2, 4, 6, 6)),
    "batch_norm without affine": (lambda x, n: n(x).relu(), (nn.BatchNorm2d(4, affine=False),), (2, 4, 6, 6)),
    "cast": (lambda x: (x > 0).to(torch.int64).to(x.dtype) + x.to(torch.float64).to(x.dtype), (), (2, 4)),
    "flatten": (lambda x: x.flatten(1), (), (2, 4, 6)),
    "flatten the batch": (lambda x: x.flatten(0, 1), (), (2, 4, 6)),
    "shape from sizes": (lambda x: x.reshape(x.shape[0] * x.shape[1], -1).relu().view(x.shape), (), (2, 4, 6)),
    "sizes read twice": (lambda x: x + torch.ones(x.shape[0], 1, 1) * x.relu().shape[0], (), (2, 4, 6)),
    "dropout": (lambda x: F.dropout(x.relu(), training=False, inplace=True) + 1, (), (2, 4)),
    "turned": (lambda x: x.mT @ x, (), (2, 4, 6)),
    "turned by other names": (lambda x: x.mH + x.relu().adjoint(), (), (2, 4, 6)),
    "log_sigmoid": (lambda x: F.logsigmoid(200 * x), (), (2, 4, 6)),  # of -200 a sigmoid is zero
}


@pytest.mark.parametrize("case", SAME)
def test_what_is_written_otherwise_computes_the_same(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, layers, shape = SAME[case]
    for layer in layers:
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.running_mean)
            nn.init.uniform_(layer.running_var, 0.5, 2)
    module = Call(run, *layers).eval()
    program = capture(module, (image(*shape),)).program
    ours = lower(program)
    assert len(ours.model.graph) <= len(in_full(program, monkeypatch).graph)
    save(ours, tmp_path / "net.onnx")
    session = open_session(tmp_path / "net.onnx", optimized=False)
    for batch in (1, 5):
        x = image(batch, *shape[1:])
        (found,) = session.run({"x": x.numpy()})
        want = module(x.clone()).detach()
        assert found.dtype == want.numpy().dtype and found.shape == want.shape
        truth = copy.deepcopy(module).double()(x.double()).detach()
        noise = max(rms(want - truth), torch.finfo(torch.float32).eps * rms(truth))
        assert rms(torch.from_numpy(found) - truth) <= 4 * noise


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_outputs_have_the_dtypes_of_the_models(dtype: torch.dtype, tmp_path: Path) -> None:
    """torch.onnx leaves sums, absolute values and more of half floats in float32 where they are outputs."""
    module = Call(lambda x: (x.abs(), x.sum(1), x.abs() + x, x.mean(1), x > 0))
    x = image(2, 4, 3, 5).to(dtype)
    lowered = lower(capture(module.eval(), (x,)).program)
    save(lowered, tmp_path / "net.onnx")
    found = [value.dtype for value in lowered.model.graph.outputs]
    half = {torch.float16: ir.DataType.FLOAT16, torch.bfloat16: ir.DataType.BFLOAT16}.get(dtype, ir.DataType.FLOAT)
    assert found == [half] * 4 + [ir.DataType.BOOL]
    makers = [value.producer().op_type for value in lowered.model.graph.outputs]
    if dtype == torch.float32:  # nothing to narrow
        assert makers == ["Abs", "ReduceSum", "Add", "ReduceMean", "Greater"]
    else:
        assert makers[:3] == ["Cast", "Cast", "Add"]
    report = bnfold.check(tmp_path / "net.onnx", module, (x,))
    assert report.passed, report.problems


PLAIN = [
    "pool to one",
    "transposed",
    "same",
    "valid",
    "batch_norm",
    "cast",
    "flatten",
    "shape from sizes",
    "dropout",
    "turned",
]


@pytest.mark.parametrize("case", PLAIN)
def test_nothing_is_traced_again_for_these(case: str, traced: list[bool]) -> None:
    run, layers, shape = SAME[case]
    lower(capture(Call(run, *layers), (image(*shape),)).program)
    assert traced == [False]


@pytest.mark.parametrize("case", ["pool to two", "same of an even kernel"])
def test_what_has_a_decomposition_is_traced_again(case: str, traced: list[bool]) -> None:
    run, layers, shape = SAME[case]
    lower(capture(Call(run, *layers), (image(*shape),)).program)
    assert traced == [True]


MASK = image(3, 3)
ATTENDED: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "single-headed": ((4, 3, 8), {}),
    "single-headed, causal": ((4, 3, 8), {"is_causal": True, "scale": 0.3}),
    "single-headed, a mask for all": ((4, 3, 8), {"attn_mask": MASK}),
    "windows and heads": ((4, 2, 5, 3, 8), {}),
    "windows and heads, a mask for all": ((4, 2, 5, 3, 8), {"attn_mask": MASK > 0.2}),
    "three axes before": ((4, 2, 5, 1, 3, 8), {"is_causal": True}),
}


@pytest.mark.parametrize("case", ATTENDED)
def test_attention_with_any_axes_before_length_and_features(case: str, tmp_path: Path) -> None:
    """torch.onnx takes four axes, no more and no fewer."""
    shape, options = ATTENDED[case]
    module = Call(
        lambda x, linear: F.scaled_dot_product_attention(*linear(x).chunk(3, -1), **options), nn.Linear(8, 24)
    )
    save(lower(capture(module, (image(*shape),)).program), tmp_path / "net.onnx")
    session = open_session(tmp_path / "net.onnx", optimized=False)
    for batch in (1, 3):
        x = image(batch, *shape[1:])
        (found,) = session.run({"x": x.numpy()})
        want = module(x).detach()
        assert found.shape == want.shape and rms(torch.from_numpy(found) - want) <= 1e-5 * rms(want)


def test_a_mask_of_its_own_for_each_head(tmp_path: Path) -> None:
    masks = image(4, 3, 3)
    module = Call(lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=masks))
    save(lower(capture(module, (image(4, 3, 8),), static=True).program), tmp_path / "net.onnx")
    x = image(4, 3, 8)
    (found,) = open_session(tmp_path / "net.onnx", optimized=False).run({"x": x.numpy()})
    assert rms(torch.from_numpy(found) - module(x)) <= 1e-5 * rms(module(x))


def test_attention_over_one_sequence(tmp_path: Path) -> None:
    module = Call(lambda x: F.scaled_dot_product_attention(x, x, x) + 0)
    save(lower(capture(module, (image(6, 8),), static=True).program), tmp_path / "net.onnx")
    (found,) = open_session(tmp_path / "net.onnx", optimized=False).run({"x": image(6, 8).numpy()})
    assert rms(torch.from_numpy(found) - module(image(6, 8))) <= 1e-5 * rms(module(image(6, 8)))


def test_an_operator_that_still_writes_in_place_is_traced_again(traced: list[bool]) -> None:
    def run(x: Tensor) -> Tensor:
        y = x * 2
        y.t()[:1] = 3
        return y

    lower(capture(Call(run), (image(2, 4),)).program)
    assert traced == []


def test_a_shape_with_two_dynamic_sizes_keeps_them(tmp_path: Path) -> None:
    shapes = ({0: Dim("n"), 2: Dim("w")},)
    module = Call(lambda x: x.reshape(x.shape[0], 2, -1, x.shape[2]).relu())
    captured = capture(module, (image(2, 4, 6),), dynamic_shapes=shapes)
    save(lower(captured.program), tmp_path / "net.onnx")
    x = image(3, 4, 5)
    (found,) = open_session(tmp_path / "net.onnx").run({"x": x.numpy()})
    assert torch.equal(torch.from_numpy(found), module(x))


def test_what_torch_onnx_has_no_translation_for_is_told_once_in_full() -> None:
    module = Call(lambda x: torch.linalg.eigvals(x @ x.mT).abs())
    with pytest.raises(LowerError, match="eig"):
        lower(capture(module, (image(2, 4, 4),)).program)


def test_the_program_is_asked_as_this_version_of_torch_onnx_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """If torch.onnx stops asking the program itself, nothing is saved any more, and this says so."""
    asked: list[Any] = []

    def note(self: Any, decomp_table: Any = None, **options: Any) -> ExportedProgram:
        asked.append(decomp_table)
        return self

    monkeypatch.setattr(translate_module._Decomposed, "run_decompositions", note)
    lower(capture(Call(lambda x: x.relu()), (image(2, 4),)).program)
    (table,) = asked
    assert torch.ops.aten.adaptive_avg_pool2d.default in table and torch.ops.aten.relu.default not in table


def test_the_callers_program_stays_as_it_was() -> None:
    program = capture(Call(lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1)), (image(2, 4, 6, 6),)).program
    before = program.graph_module.code
    assert lower_module.lower(program).nodes
    assert program.graph_module.code == before
