"""ONNX files in float64: over onnx's own tests of its operators, and over what bnfold writes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.backend.test.case.node
import pytest
import torch
import zoo
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import bnfold
from bnfold.errors import InputError
from bnfold.evaluate.evaluator import File64, MissingOperatorError
from bnfold.evaluate.single import node_evaluator
from bnfold.graph.interpret import Runner

#: What the tests of onnx expect and float64, or every runtime, has otherwise.
UNLIKE = {
    "test_bernoulli": "random",
    "test_training_dropout": "random",
    "test_bitcast_float32": "the bits of a float32",
    "test_bitcast_2d_float32": "the bits of a float32",
    "test_bitcast_scalar_float32": "the bits of a float32",
    "test_dynamicquantizelinear": "a tie of float32",
    "test_if_opt": "the only element in place of its sequence",
    "test_resize_downsample_scales_linear_align_corners": "a length of 2.4; torch and runtimes take 2",
    "test_resize_downsample_scales_cubic_align_corners": "the same",
}
WIDTH = {"float16": 2.0**-10, "bfloat16": 2.0**-7}
DATA = Path(onnx.__file__).parent / "backend" / "test" / "data"


@functools.cache
def node_cases() -> dict[str, Any]:
    with np.errstate(all="ignore"):
        return {case.name: case for case in onnx.backend.test.case.node.collect_testcases(None) if case.model}


def plain(value: Any) -> Any:
    if isinstance(value, TensorProto):
        return numpy_helper.to_array(value)
    return numpy_helper.to_optional(value) if isinstance(value, onnx.OptionalProto) else value


def differs(mine: Any, expected: Any, case: Any) -> str:
    if isinstance(expected, list):
        return next((d for a, b in zip(mine, expected) if (d := differs(a, b, case))), "")
    if expected is None:
        return "" if mine is None else "not None"
    mine, expected = np.asarray(mine), np.asarray(expected)
    if mine.shape != expected.shape:
        return f"shape {mine.shape} for {expected.shape}"
    if expected.dtype.kind in "OUS":
        return "" if (mine.astype(str) == expected.astype(str)).all() else "other strings"
    if expected.dtype.kind in "iub":
        return "" if mine.dtype == expected.dtype and (mine == expected).all() else "other integers"
    # Half of it is the expectation's own rounding.
    rtol = max(2 * case.rtol, 2 * WIDTH.get(expected.dtype.name, 0.0))
    size = np.abs(expected.astype(np.float64)).max(initial=0.0, where=np.isfinite(expected.astype(np.float64)))
    close = np.allclose(mine, expected.astype(np.float64), rtol, max(case.atol, 2.0**-23 * size), equal_nan=True)
    return "" if close else f"off by {np.nanmax(np.abs(mine - expected.astype(np.float64)))}"


def test_every_operator_of_onnx_as_its_own_tests_have_it() -> None:
    wrong, ran = {}, 0
    for name, case in node_cases().items():
        if name.startswith(tuple(UNLIKE)):
            continue
        for inputs, outputs in case.data_sets or []:
            feeds = {v.name: plain(x) for v, x in zip(case.model.graph.input, inputs)}
            try:
                found = File64(case.model).run(feeds).outputs
            except InputError as error:
                wrong[name] = str(error)
                continue
            ran += 1
            if bad := [d for a, b in zip(found, outputs) if (d := differs(a, plain(b), case))]:
                wrong[name] = bad[0]
    assert set(wrong) <= {"test_scan_sum"}, wrong  # Scan of opset 8, which is refused by name
    assert ran > 1500


@pytest.mark.parametrize("folder", ["simple", "pytorch-converted", "pytorch-operator"])
def test_files_of_the_first_opsets(folder: str) -> None:
    class Case:
        rtol, atol = 1e-3, 1e-7  # onnx's own

    def read(path: Path) -> Any:
        return numpy_helper.to_array(onnx.load_tensor(path))

    ran = 0
    for path in sorted((DATA / folder).glob("*/model.onnx")):
        data = path.parent / "test_data_set_0"
        if "sequence" in path.parent.name or "gradient" in path.parent.name or "strnorm" in path.parent.name:
            continue
        file = File64(path)
        feeds = {v.name: read(data / f"input_{i}.pb") for i, v in enumerate(file.inputs)}
        expected = [read(data / f"output_{i}.pb") for i in range(len(file.outputs))]
        bad = [d for a, b in zip(file.run(feeds).outputs, expected) if (d := differs(a, b, Case))]
        assert not bad, (path, bad)
        ran += 1
    assert ran > 5


@pytest.mark.parametrize("name", ["resnet_bottleneck", "levit", "squeeze_excite", "unet", "conv3d", "convnext"])
def test_what_bnfold_writes_as_torch_has_it(name: str, tmp_path: Path) -> None:
    module, args = zoo.NETS[name]()
    bnfold.export(module, tmp_path / "net.onnx", args, check=False)
    program = bnfold.fold(module, args).program
    file = File64(tmp_path / "net.onnx")
    found = file.run({v.name: x.numpy() for v, x in zip(file.inputs, args)}).outputs
    for mine, theirs in zip(found, Runner(program, precise=True)(list(args))):
        # Attributes are stored in float32, constants are the same ones.
        assert np.abs(mine - theirs.numpy()).max() <= 2.0**-23 * float(theirs.abs().max())


RECURRENT: dict[str, Callable[..., nn.Module]] = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN": nn.RNN}


@pytest.mark.parametrize("kind", RECURRENT)
def test_recurrent_layers_as_torch_has_them(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = RECURRENT[kind](3, 5, num_layers=2, bidirectional=True, batch_first=True)
    x = torch.randn(2, 7, 3)
    bnfold.export(module, tmp_path / "net.onnx", (x,), check=False)
    file = File64(tmp_path / "net.onnx")
    expected = module.double()(x.double())[0].detach().numpy()
    assert np.abs(file.run({file.inputs[0].name: x.numpy()}).outputs[0] - expected).max() < 1e-14


def model_of(nodes: list[Any], inputs: dict[str, Any], outputs: list[str], opset: int = 20, **weights: Any) -> Any:
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in inputs.items()],
        [onnx.ValueInfoProto(name=n) for n in outputs],
        [numpy_helper.from_array(np.asarray(w), n) for n, w in weights.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])


X = np.array([[1.0, -2.0, 3.0], [0.25, 0.5, -4.0]], np.float32)


def test_the_softmax_of_old_files_runs_over_all_axes_behind() -> None:
    node = helper.make_node("Softmax", ["x"], ["y"])
    x = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
    (old,) = File64(model_of([node], {"x": [2, 3, 2]}, ["y"], opset=11)).run({"x": x}).outputs
    (new,) = File64(model_of([node], {"x": [2, 3, 2]}, ["y"], opset=13)).run({"x": x}).outputs
    assert np.allclose(old.sum((1, 2)), 1.0, rtol=1e-15) and np.allclose(new.sum(2), 1.0, rtol=1e-15)


def test_casts_to_narrow_floats_round_nothing() -> None:
    nodes = [helper.make_node("Cast", ["x"], ["h"], to=TensorProto.FLOAT16), helper.make_node("Exp", ["h"], ["y"])]
    x = np.array([[1 / 3]], np.float32)
    (y,) = File64(model_of(nodes, {"x": [1, 1]}, ["y"])).run({"x": x}).outputs
    assert y == np.exp(np.float64(x))


def test_values_by_name_and_an_initializer_that_is_an_input() -> None:
    nodes = [helper.make_node("Mul", ["x", "w"], ["m"]), helper.make_node("Relu", ["m"], ["y"])]
    file = File64(model_of(nodes, {"x": [2, 3], "w": [3]}, ["y"], w=np.float32([2, 3, 4])))
    assert [value.name for value in file.inputs] == ["x"]
    run = file.run({"x": X}, keep=["m"])
    assert (run.kept["m"] == X * np.float64([2, 3, 4])).all() and run.kept["m"].dtype == np.float64
    assert (file.run({"x": X, "w": np.float32([1, 1, 1])}).outputs[0] == X.clip(0)).all()


def test_decisions_are_followed_and_told() -> None:
    nodes = [
        helper.make_node("ArgMax", ["x"], ["i"], axis=1, keepdims=1),
        helper.make_node("GatherElements", ["x", "i"], ["y"], axis=1),
        helper.make_node("Greater", ["x", "zero"], ["b"]),
        helper.make_node("Cast", ["b"], ["z"], to=TensorProto.FLOAT),
    ]
    file = File64(model_of(nodes, {"x": [2, 3]}, ["y", "z"], zero=np.float32(0)))
    own = file.run({"x": X}, decide=True)
    assert own.decided["i"].tolist() == [[2], [1]] and own.decided["b"].sum() == 4 and not own.turns
    other = own.decided["b"].copy()
    other[1, 0] = False
    run = file.run({"x": X}, follow={"i": np.array([[0], [1]]), "b": other})
    assert run.outputs[0].tolist() == [[1.0], [0.5]] and run.outputs[1].sum() == 3
    assert {turn.value: (turn.different, turn.gap.max()) for turn in run.turns} == {"i": (1, 2.0), "b": (1, 0.25)}


def body(nodes: list[Any], inputs: list[str], outputs: list[str]) -> Any:
    values = [[onnx.ValueInfoProto(name=n) for n in names] for names in (inputs, outputs)]
    return helper.make_graph(nodes, "body", *values)


def test_bodies_read_what_lies_outside() -> None:
    # y = relu(x) survives until the loop has read it, ten times over; scans may run backwards along any axis.
    loop = body(
        [helper.make_node("Add", ["s", "outer"], ["t"]), helper.make_node("Identity", ["c"], ["d"])],
        ["i", "c", "s"], ["d", "t", "t"],
    )  # fmt: skip
    scan = body([helper.make_node("Add", ["s", "e"], ["t"]), helper.make_node("Mul", ["t", "w"], ["u"])],
                ["s", "e"], ["t", "u"])  # fmt: skip
    nodes = [
        helper.make_node("Relu", ["x"], ["outer"]),
        helper.make_node("Loop", ["ten", "", "x"], ["last", "all"], body=loop),
        helper.make_node("Scan", ["start", "x"], ["sum", "sums"], body=scan, num_scan_inputs=1,
                         scan_input_axes=[1], scan_input_directions=[1], scan_output_axes=[1]),
    ]  # fmt: skip
    weights = {"ten": np.int64(10), "start": np.float32([0, 0]), "w": np.float32(2)}
    run = File64(model_of(nodes, {"x": [2, 3]}, ["last", "all", "sum", "sums"], **weights)).run({"x": X})
    x = X.astype(np.float64)
    assert (run.outputs[0] == x + 10 * x.clip(0)).all() and run.outputs[1].shape == (10, 2, 3)
    assert (run.outputs[2] == x.sum(1)).all()
    assert (run.outputs[3] == 2 * x[:, ::-1].cumsum(1)).all()


@pytest.mark.parametrize("fill", [None, np.array([7]), np.array([0.1], np.float32), np.array([True])])
def test_a_constant_by_itself_is_the_one_in_a_file(fill: Any) -> None:
    value = {} if fill is None else {"value": numpy_helper.from_array(fill)}
    node = helper.make_node("ConstantOfShape", ["n"], ["y"], **value)
    run = node_evaluator(node, {"": 20})
    sizes = helper.make_tensor_value_info("n", TensorProto.INT64, [2])
    graph = helper.make_graph([node], "g", [sizes], [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
    file = File64(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]))
    for shape in ([2, 3], [0, 3]):
        (mine,), (its,) = run({"n": np.array(shape)}), file.run({"n": np.array(shape)}).outputs
        assert mine.dtype == its.dtype and np.array_equal(mine, its)
    with pytest.raises(bnfold.ResourceError, match="memory"):
        run({"n": np.array([1 << 30, 1 << 30])})


@pytest.mark.parametrize("full", [True, False])
def test_an_optional_value_is_the_value_or_none(full: bool, tmp_path: Path) -> None:
    """Of a tensor and of a sequence, in the branches of an If; ONNX Runtime agrees."""

    def branch(nodes: list[Any]) -> onnx.GraphProto:
        return helper.make_graph(nodes, "b", [], [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)])

    kind = helper.make_tensor_type_proto(TensorProto.FLOAT, None)
    nodes = [
        helper.make_node("Relu", ["x"], ["r"]),
        helper.make_node("SequenceConstruct", ["r", "x"], ["seq"]),
        helper.make_node("Optional", ["r"] if full else [], ["one"], **({} if full else {"type": kind})),
        helper.make_node("Optional", ["seq"], ["many"]),
        helper.make_node("OptionalGetElement", ["many"], ["back"]),
        helper.make_node("SequenceAt", ["back", "at"], ["second"]),
        helper.make_node("OptionalHasElement", ["one"], ["has"]),
        helper.make_node("If", ["has"], ["first"],
                         then_branch=branch([helper.make_node("OptionalGetElement", ["one"], ["out"])]),
                         else_branch=branch([helper.make_node("Neg", ["x"], ["out"])])),
        helper.make_node("Add", ["first", "second"], ["y"]),
    ]  # fmt: skip
    graph = helper.make_graph(
        nodes, "optional", *([helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", 3])] for n in "xy"),
        [numpy_helper.from_array(np.array(1), "at")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    x = np.array([[-1.0, 0.0, 2.0]])
    (y,) = File64(model).run({"x": x}).outputs
    assert np.array_equal(y, np.maximum(x, 0) + x if full else 0 * x)
    onnx.save(model, tmp_path / "net.onnx")
    verdict = bnfold.check(tmp_path / "net.onnx", tmp_path / "net.onnx", device="cpu")
    assert verdict.verdict == "pass", verdict.problems


def test_batch_statistics_where_a_file_asks_for_them() -> None:
    weights = {n: np.float32([1, 2, 3]) for n in "sbmv"}
    for outputs, opset, more in ((["y"], 15, {"training_mode": 1}), (["y", "a", "c", "d", "e"], 9, {})):
        node = helper.make_node("BatchNormalization", ["x", *"sbmv"], outputs, **more)
        x = np.random.default_rng(0).normal(size=(4, 3, 5)).astype(np.float32)
        (y, *_) = File64(model_of([node], {"x": [4, 3, 5]}, outputs, opset=opset, **weights)).run({"x": x}).outputs
        assert np.allclose(y.mean((0, 2)), [1, 2, 3], rtol=1e-12)


@pytest.mark.parametrize(
    ("domain", "words"), [("", "Unheard"), ("com.acme", "com.acme.Unheard")]
)  # fmt: skip
def test_an_operator_that_is_lacking_is_named(domain: str, words: str) -> None:
    model = model_of([helper.make_node("Unheard", ["x"], ["y"], domain=domain, name="n")], {"x": [2, 3]}, ["y"])
    model.opset_import.append(helper.make_opsetid("com.acme", 1))
    with pytest.raises(MissingOperatorError, match=words) as caught:
        File64(model)
    assert caught.value.operator == words


def test_functions_in_any_order_and_none_that_calls_itself() -> None:
    one = helper.make_function("f", "Outer", ["a"], ["b"], [helper.make_node("Inner", ["a"], ["b"], domain="f")],
                               [helper.make_opsetid("", 20), helper.make_opsetid("f", 1)])  # fmt: skip
    two = helper.make_function("f", "Inner", ["a"], ["b"], [helper.make_node("Exp", ["a"], ["b"])],
                               [helper.make_opsetid("", 20)])  # fmt: skip
    model = model_of([helper.make_node("Outer", ["x"], ["y"], domain="f")], {"x": [2, 3]}, ["y"])
    model.opset_import.append(helper.make_opsetid("f", 1))
    model.functions.extend([one, two])
    assert (File64(model).run({"x": X}).outputs[0] == np.exp(X.astype(np.float64))).all()


@pytest.mark.parametrize(
    ("nodes", "words"),
    [
        ([("ConstantOfShape", ["huge"], ["y"])], "memory does not suffice for ConstantOfShape"),
        ([("MatMul", ["x", "x"], ["y"])], "MatMul 'y' fails in float64"),
        ([("Relu", ["nowhere"], ["y"])], "'nowhere', which nothing computes"),
    ],
)  # fmt: skip
def test_what_cannot_be_run_is_one_line(nodes: list[Any], words: str) -> None:
    made = [helper.make_node(*node) for node in nodes]
    file = File64(model_of(made, {"x": [2, 3]}, ["y"], huge=np.array([10**12])))
    with pytest.raises(bnfold.BnfoldError, match=words):
        file.run({"x": X})


def test_external_data_are_read_in_their_folder_and_nowhere_else(tmp_path: Path) -> None:
    model = model_of([helper.make_node("Mul", ["x", "w"], ["y"])], {"x": [2, 3]}, ["y"], w=np.float32([1, 2, 3]))
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "net.onnx"
    onnx.save_model(model, path, save_as_external_data=True, location="w.data", size_threshold=0)
    assert (File64(path).run({"x": X}).outputs[0] == X * np.float64([1, 2, 3])).all()
    (tmp_path / "in" / "w.data").rename(tmp_path / "w.data")
    moved = onnx.load_model(path, load_external_data=False)
    moved.graph.initializer[0].external_data[0].value = "../w.data"
    onnx.save_model(moved, path)
    with pytest.raises(InputError, match="external data of 'w'"):
        File64(path).run({"x": X})
