"""``check`` of files that other tools wrote: what is whose, what is judged, and what is refused."""

from __future__ import annotations

import re
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
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

import bnfold
from bnfold.errors import InputError
from bnfold.report import CheckReport

torch.set_num_threads(1)


class Net(nn.Module):
    """An image and a vector in, logits and their sum out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.linear, self.vector_norm = nn.Linear(5, 8), nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 6)

    def forward(self, image: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
        x = self.norm(self.conv(image)).relu().mean((2, 3)) + self.vector_norm(self.linear(vector))
        y = self.head(x)
        return y, y.sum(1).sin()


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


ARGS = (rows(2, 3, 8, 8), rows(2, 5))


@cache
def net() -> Net:
    torch.manual_seed(0)
    return zoo.randomize(Net()).eval()


def legacy(path: Path, batch: int = 1, **options: Any) -> None:
    """As torch.onnx wrote files for years."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        args = tuple(x[:1].repeat(batch, *(1,) * (x.ndim - 1)) for x in ARGS)
        torch.onnx.export(net(), args, path, dynamo=False, **options)


@cache
def dynamic() -> bytes:
    """A file with the model's own names and a dynamic batch."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.onnx"
        names = {"input_names": ["image", "vector"], "output_names": ["output_0", "output_1"]}
        legacy(path, opset_version=17, dynamic_axes={"image": {0: "N"}, "vector": {0: "N"}}, **names)
        return path.read_bytes()


def changed(path: Path, change: Callable[[onnx.ModelProto], None]) -> Path:
    model = onnx.load_from_string(dynamic())
    change(model)
    onnx.save(model, path)
    return path


def check(path: Path, **options: Any) -> CheckReport:
    return bnfold.check(path, net(), ARGS, device="cpu", **options)


def rename(model: onnx.ModelProto, names: dict[str, str]) -> None:
    for value in (*model.graph.input, *model.graph.output):
        value.name = names.get(value.name, value.name)
    for node in model.graph.node:
        for names_of in (node.input, node.output):
            names_of[:] = [names.get(name, name) for name in names_of]


def notes(report: CheckReport) -> str:
    return "\n".join(report.notes)


# -- exporters ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opset", [11, 17])
@pytest.mark.parametrize("as_inputs", [False, True])
def test_legacy_exports_pass(opset: int, as_inputs: bool, tmp_path: Path) -> None:
    axes = {"i": {0: "N"}, "v": {0: "N"}}
    options: dict[str, Any] = {"opset_version": opset, "keep_initializers_as_inputs": as_inputs}
    legacy(tmp_path / "net.onnx", input_names=["i", "v"], dynamic_axes=axes, **options)
    model = onnx.load(tmp_path / "net.onnx")
    assert len(model.graph.input) == (2 if not as_inputs else 2 + len(model.graph.initializer))
    report = check(tmp_path / "net.onnx")
    assert report.passed and report.batches == (1, 2, 7, 54, 3, 33), report
    assert "the file takes image as 'i', vector as 'v'" in notes(report)


def test_simplified_files_pass(tmp_path: Path) -> None:
    import onnxsim

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        simplified, _ = onnxsim.simplify(onnx.load_from_string(dynamic()))
    onnx.save(simplified, tmp_path / "net.onnx")
    assert len(simplified.graph.node) < len(onnx.load_from_string(dynamic()).graph.node)
    assert check(tmp_path / "net.onnx").passed


def test_external_data_is_found(tmp_path: Path) -> None:
    model = onnx.load_from_string(dynamic())
    onnx.save(model, tmp_path / "net.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    assert check(tmp_path / "net.onnx").passed
    (tmp_path / "w.bin").unlink()
    with pytest.raises(bnfold.BnfoldError):
        check(tmp_path / "net.onnx")


def test_another_model_fails(tmp_path: Path) -> None:
    path = changed(tmp_path / "net.onnx", lambda model: None)
    other = zoo.randomize(Net(), seed=7).eval()
    assert bnfold.check(path, other, ARGS, device="cpu").verdict == "fail"


# -- inputs ------------------------------------------------------------------------------------------------------------


def reverse_inputs(model: onnx.ModelProto) -> None:
    inputs = list(model.graph.input)[::-1]
    del model.graph.input[:]
    model.graph.input.extend(inputs)


@pytest.mark.parametrize("names", [{}, {"image": "a", "vector": "b"}, {"image": "vector_1", "vector": "x.1"}])
@pytest.mark.parametrize("reverse", [False, True])
def test_inputs_are_found_by_name_or_shape(names: dict[str, str], reverse: bool, tmp_path: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        rename(model, names)
        if reverse:
            reverse_inputs(model)

    assert check(changed(tmp_path / "net.onnx", change)).passed


class Twins(nn.Module):
    def forward(self, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return a - 2 * b + 3 * c


def twins_file(path: Path, names: list[str], order: list[int] | None = None) -> None:
    a, b, c = names
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 4]) for name in names]
    constants = [numpy_helper.from_array(np.array(n, np.float32), f"k{n}") for n in (2, 3)]
    nodes = [("Mul", [b, "k2"], "t"), ("Sub", [a, "t"], "u"), ("Mul", [c, "k3"], "v"), ("Add", ["u", "v"], "y")]
    graph = helper.make_graph(
        [helper.make_node(kind, inputs, [out]) for kind, inputs, out in nodes], "g",
        [values[i] for i in order or range(3)], [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4])],
        constants,
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


@pytest.mark.parametrize(
    ("names", "order", "passes"),
    [
        (["a", "b", "c"], [2, 0, 1], True),  # by name
        (["x", "y0", "z"], None, True),  # by position
        (["x", "y0", "z"], [1, 0, 2], False),  # by position, which is another one
        (["x", "b", "z"], [1, 2, 0], False),  # one by name, the others in their order
        (["x", "b", "z"], [1, 0, 2], True),
    ],
)
def test_alike_inputs_go_by_name_then_by_position(
    names: list[str], order: list[int] | None, passes: bool, tmp_path: Path
) -> None:
    twins_file(tmp_path / "net.onnx", names, order)
    report = bnfold.check(tmp_path / "net.onnx", Twins(), (rows(2, 4), rows(2, 4), rows(2, 4)), device="cpu")
    assert report.passed == passes


class Unused(nn.Module):
    def forward(self, a: Tensor, unused: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return a - 2 * b + 3 * c


def test_an_input_that_the_file_dropped_is_noted(tmp_path: Path) -> None:
    twins_file(tmp_path / "net.onnx", ["a", "b", "c"])
    args = (rows(2, 4), rows(2, 3), rows(2, 4), rows(2, 4))
    report = bnfold.check(tmp_path / "net.onnx", Unused(), args, device="cpu")
    assert report.passed and "the file does not take the model's unused" in notes(report)


def test_too_many_inputs_list_both_sides(tmp_path: Path) -> None:
    twins_file(tmp_path / "net.onnx", ["a", "b", "c"])
    with pytest.raises(InputError, match=r"it takes 3, the model 2.*the file: a float32\[N, 4\].*the model: image"):
        check(tmp_path / "net.onnx")


def test_inputs_that_cannot_be_told_apart_list_both_sides(tmp_path: Path) -> None:
    twins_file(tmp_path / "net.onnx", ["x", "y0", "z"])
    args = tuple(rows(2, 4) for _ in "1234")
    with pytest.raises(InputError, match=r"'x' fits more than one of the model's inputs.*the file: x float32\[N, 4\]"):
        bnfold.check(tmp_path / "net.onnx", Unused(), args, device="cpu")


def set_shape(model: onnx.ModelProto, name: str, shape: list[int | str]) -> None:
    value = next(v for v in model.graph.input if v.name == name)
    dtype = value.type.tensor_type.elem_type
    value.CopyFrom(helper.make_tensor_value_info(name, dtype, shape))


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ({}, r"the file's input image float32\[N, 4, 8, 8\] does not fit the model's image float32\[\?, 3, 8, 8\]"),
        ({"image": "a"}, r"the file's input a float32\[N, 4, 8, 8\] does not fit"),
        ({"image": "a", "vector": "b"}, r"the file's input a float32"),
    ],
)
def test_another_shape_is_refused(names: dict[str, str], says: str, tmp_path: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        set_shape(model, "image", ["N", 4, 8, 8])
        conv = next(n for n in model.graph.node if n.op_type == "Conv")
        weight = next(t for t in model.graph.initializer if t.name == conv.input[1])
        weight.CopyFrom(numpy_helper.from_array(np.zeros((8, 4, 3, 3), np.float32), weight.name))
        rename(model, names)

    with pytest.raises(InputError, match=says):
        check(changed(tmp_path / "net.onnx", change))


# -- sizes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])
def test_a_fixed_batch_is_judged_at_that_size(batch: int, tmp_path: Path) -> None:
    legacy(tmp_path / "net.onnx", batch, opset_version=17)
    x, v = rows(20, 3, 8, 8, seed=3).numpy(), rows(20, 5, seed=4).numpy()
    report = check(tmp_path / "net.onnx", data={"image": x, "vector": v})
    assert report.passed and report.batches == (batch,) and report.samples >= 10
    assert f"the file is fixed at batch {batch}, and judged at no other size" in notes(report)
    assert report.accuracy is not None and report.accuracy.samples == 20
    assert {a.samples for a in report.accuracy.agreement} == {20}


def test_a_fixed_size_of_an_image_is_judged_at_that_size(tmp_path: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        set_shape(model, "image", ["N", 3, 12, 8])

    dims = {"image": {0: torch.export.Dim("N"), 2: torch.export.Dim("h"), 3: torch.export.Dim("w")},
            "vector": {0: torch.export.Dim("N")}}  # fmt: skip
    report = check(changed(tmp_path / "net.onnx", change), dynamic_shapes=dims)
    assert report.passed and "the file is fixed at h 12, w 8" in notes(report)
    assert report.batches == (1, 2, 7, 54, 3, 33)


def test_a_fixed_batch_of_another_size_is_refused(tmp_path: Path) -> None:
    legacy(tmp_path / "net.onnx", 1, opset_version=17, input_names=["image", "vector"])
    with pytest.raises(InputError, match="leave out --static"):
        check(tmp_path / "net.onnx", static=True)


def test_sizes_that_contradict_one_another_are_refused(tmp_path: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        set_shape(model, "image", [1, 3, 8, 8])
        set_shape(model, "vector", [2, 5])

    with pytest.raises(InputError, match="fixes sizes that the model needs to be equal"):
        check(changed(tmp_path / "net.onnx", change))


def test_an_export_of_ours_with_a_fixed_batch_is_a_fault(tmp_path: Path) -> None:
    from bnfold.gate.gate import Gate
    from bnfold.graph.capture import capture
    from bnfold.graph.graph import Graph
    from bnfold.passes.folding import fold

    legacy(tmp_path / "net.onnx", 1, opset_version=17, input_names=["image", "vector"])
    captured = capture(net(), ARGS)
    graph = Graph(captured.program)
    ledger = fold(graph)
    assert Gate(captured, ledger, graph.finish(), tmp_path / "net.onnx").judge().verdict == "fail"


# -- outputs -----------------------------------------------------------------------------------------------------------


def test_renamed_outputs_go_by_position(tmp_path: Path) -> None:
    path = changed(tmp_path / "net.onnx", lambda model: rename(model, {"output_0": "logits", "output_1": "wave"}))
    assert check(path).passed


def test_swapped_outputs_fail_and_say_so(tmp_path: Path) -> None:
    def swap(model: onnx.ModelProto) -> None:
        first, second = list(model.graph.output)
        del model.graph.output[:]
        model.graph.output.extend([second, first])

    report = check(changed(tmp_path / "net.onnx", swap))
    assert report.verdict == "fail" and "outputs in another order" in notes(report)


def drop(model: onnx.ModelProto) -> None:
    del model.graph.output[1:]


def test_a_missing_output_fails(tmp_path: Path) -> None:
    report = check(changed(tmp_path / "net.onnx", drop))
    assert report.verdict == "fail" and any("1 outputs instead of 2" in problem for problem in report.problems)


@pytest.mark.parametrize("renamed", [False, True])
def test_an_extra_output_is_said(renamed: bool, tmp_path: Path) -> None:
    def extend(model: onnx.ModelProto) -> None:
        conv = next(n for n in model.graph.node if n.op_type == "Conv")
        extra = helper.make_tensor_value_info(conv.output[0], TensorProto.FLOAT, ["N", 8, 8, 8])
        if renamed:
            rename(model, {"output_0": "logits", "output_1": "wave"})
            model.graph.output.append(extra)
        else:
            model.graph.output.insert(0, extra)

    report = check(changed(tmp_path / "net.onnx", extend), data={"image": ARGS[0], "vector": ARGS[1]})
    assert report.passed and "the file returns more than the model" in notes(report)
    assert ("the first 2 are taken" in notes(report)) == renamed


# -- dtypes ------------------------------------------------------------------------------------------------------------


def half_inside(model: onnx.ModelProto) -> None:
    """Weights and arithmetic in float16, inputs and outputs in float32, as converters with keep_io_types write it."""
    graph = model.graph
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    rename(model, {"image": "image_h", "vector": "vector_h", "output_0": "out_h", "output_1": "wave_h"})
    nodes = list(graph.node)
    del graph.node[:]
    half, full = {"to": TensorProto.FLOAT16}, {"to": TensorProto.FLOAT}
    graph.node.extend(helper.make_node("Cast", [n], [f"{n}_h"], **half) for n in ("image", "vector"))
    graph.node.extend(nodes)
    graph.node.extend(
        helper.make_node("Cast", [a], [b], **full) for a, b in (("out_h", "output_0"), ("wave_h", "output_1"))
    )
    for value, name in zip((*graph.input, *graph.output), ("image", "vector", "output_0", "output_1")):
        value.name = name
    del graph.value_info[:]


def test_a_half_precision_inside_is_judged_by_its_own_noise(tmp_path: Path) -> None:
    path = changed(tmp_path / "net.onnx", half_inside)
    assert check(path).verdict == "fail"
    report = check(path, dtype=torch.float16)
    assert report.passed, report.problems
    assert "the file takes image as float32, the model as float16" in notes(report)
    assert report.outputs[0].noise > 1e-4


def test_float16_inputs_are_told_what_to_do(tmp_path: Path) -> None:
    bnfold.export(net(), tmp_path / "half.onnx", ARGS, dtype=torch.float16, check=False)
    with pytest.raises(InputError, match=r"takes 'image' as float16, the model as float32.*--dtype float16"):
        check(tmp_path / "half.onnx")
    assert check(tmp_path / "half.onnx", dtype=torch.float16).passed


class Lookup(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids).sum(1)


class Sum(nn.Module):
    def forward(self, ids: Tensor) -> Tensor:
        return ids.sum(1, keepdim=True).expand(-1, 4)


def test_integers_of_another_size_are_converted(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, ids = Lookup(), torch.tensor([[1, 8, 0], [3, 2, 5]])
    bnfold.export(model, tmp_path / "net.onnx", (ids,), device="cpu")
    file = onnx.load(tmp_path / "net.onnx")
    file.graph.input[0].type.tensor_type.elem_type = TensorProto.INT32
    onnx.save(file, tmp_path / "net.onnx")
    report = bnfold.check(tmp_path / "net.onnx", model, (ids,), device="cpu")
    assert report.passed and "the file takes ids as int32, the model as int64" in notes(report)
    with pytest.raises(InputError, match="Convert one of them"):
        bnfold.check(tmp_path / "net.onnx", Sum(), (rows(2, 3),), device="cpu")


def test_quantised_files_fail_and_show_what_it_costs(tmp_path: Path) -> None:
    def quantise(model: onnx.ModelProto) -> None:
        graph = model.graph
        conv = next(n for n in graph.node if n.op_type == "Conv")
        scale, zero = np.array(0.05, np.float32), np.array(0, np.int8)
        graph.initializer.extend([numpy_helper.from_array(scale, "s"), numpy_helper.from_array(zero, "z")])
        pair = [helper.make_node("QuantizeLinear", ["image", "s", "z"], ["q"]),
                helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"])]  # fmt: skip
        conv.input[0] = "d"
        rest = list(graph.node)
        del graph.node[:]
        graph.node.extend([*pair, *rest])

    data = {"image": rows(50, 3, 8, 8, seed=3), "vector": rows(50, 5, seed=4)}
    report = check(changed(tmp_path / "net.onnx", quantise), data=data)
    assert report.verdict == "fail" and "the file is quantised (2 nodes)" in notes(report)
    assert report.accuracy is not None and 20 < report.accuracy.agreement[0].sqnr < 80


# -- the report --------------------------------------------------------------------------------------------------------


def test_the_captures_notes_are_the_reports(tmp_path: Path) -> None:
    class UpToFour(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            torch._check(x.shape[0] <= 4)
            return x * 2

    path = tmp_path / "net.onnx"
    bnfold.export(UpToFour(), path, (rows(2, 4),), device="cpu")
    report = bnfold.check(path, UpToFour(), (rows(2, 4),), device="cpu")
    assert re.search(r"the batch is fixed: the model's code takes batches of 2 to 4 only", notes(report))


def test_the_command_line_tells_it(tmp_path: Path) -> None:
    from click.testing import CliRunner

    from bnfold.cli import cli

    (tmp_path / "net.py").write_text(
        "import torch\nclass Net(torch.nn.Linear):\n    example_inputs = (torch.ones(2, 4),)\n"
        "def make():\n    torch.manual_seed(0)\n    return Net(4, 3)\n"
    )
    arguments = [f"{tmp_path / 'net.py'}:make", "-o", str(tmp_path / "net.onnx"), "--static"]
    assert CliRunner().invoke(cli, ["export", *arguments]).exit_code == 0
    result = CliRunner().invoke(cli, ["check", str(tmp_path / "net.onnx"), arguments[0]])
    assert result.exit_code == 0, result.output
    assert "note: the file is fixed at batch 2, and judged at no other size" in result.stdout
