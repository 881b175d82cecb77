"""Files of one operator each, as onnx's own tests have them, judged against themselves and against what is other."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.backend.test.case.node
import pytest
from onnx import TensorProto, helper, numpy_helper

import bnfold
from bnfold.errors import InputError
from bnfold.evaluate.evaluator import File64
from bnfold.evaluate.limits import asked
from bnfold.evaluate.single import node_evaluator
from bnfold.gate.by_operator import ask
from bnfold.loading.onnx_file import read_onnx

node = helper.make_node


@functools.cache
def cases() -> dict[str, onnx.ModelProto]:
    with np.errstate(all="ignore"):
        found = onnx.backend.test.case.node.collect_testcases(None)
    return {case.name: case.model for case in found if case.model}


def case(name: str) -> onnx.ModelProto:
    model = onnx.ModelProto()
    model.CopyFrom(cases()[name])
    model.ir_version = min(model.ir_version, 10)  # what every ONNX Runtime reads
    return model


def scaled(model: onnx.ModelProto) -> None:
    """Its last output is a hundredth too large."""
    last = model.graph.output[-1]
    maker = next(n for n in model.graph.node if last.name in n.output)
    maker.output[list(maker.output).index(last.name)] = "before"
    kind = helper.tensor_dtype_to_np_dtype(last.type.tensor_type.elem_type)
    model.graph.initializer.append(numpy_helper.from_array(np.array(1.01, kind), "more"))
    model.graph.node.append(node("Mul", ["before", "more"], [last.name]))


def multiplied(model: onnx.ModelProto) -> None:
    """It multiplies where the other adds."""
    model.graph.node[0].op_type = "Mul"


def swapped(model: onnx.ModelProto) -> None:
    """The scales of an operand and of the result change places."""
    inputs = model.graph.node[0].input
    inputs[1], inputs[6] = inputs[6], inputs[1]


#: A kind each of what was refused or failed, and what makes another function of it.
KINDS: dict[str, Callable[[onnx.ModelProto], None]] = {
    "test_attention_4d_expanded": scaled,  # a CastLike of a constant, to the type of a value
    "test_castlike_FLOAT_to_FLOAT16": scaled,  # an input without elements
    "test_add_uint64": multiplied,  # numbers of 64 bits without a sign
    "test_qlinearmatmul_2D_int8_float32": swapped,  # scales are inputs
    "test_batchnorm_example_training_mode": scaled,  # statistics of the batch, beside a variance that is not read
    "test_lstm_with_peepholes": scaled,  # sequences without a step
    "test_attention_3d_gqa_softcap_expanded": scaled,  # no constant that rounding could move
    "test_gemm_default_scalar_bias": scaled,  # an operand without axes
    "test_dft_opset19": scaled,
    "test_stft_with_window": scaled,
}


@pytest.mark.parametrize("name", KINDS)
def test_an_untouched_file_is_right_and_another_function_is_not(name: str, tmp_path: Path) -> None:
    right, wrong = tmp_path / "right.onnx", tmp_path / "wrong.onnx"
    onnx.save(case(name), right)
    report: Any = bnfold.export(right, tmp_path / "out.onnx", device="cpu")
    assert report.check.verdict == "pass", report.check.problems
    model = case(name)
    KINDS[name](model)
    onnx.save(model, wrong)
    assert bnfold.check(wrong, right, device="cpu").verdict == "fail"


def test_a_size_that_makes_no_sense_reaches_no_runtime(tmp_path: Path) -> None:
    """A step of 0 is a division by zero in ONNX Runtime's STFT, which ends the process; one of 1 is tried as well."""
    onnx.save(case("test_stft"), tmp_path / "net.onnx")
    command = [sys.executable, "-m", "bnfold", "export", "net.onnx", "-o", "out.onnx", "--device", "cpu"]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 0 and (tmp_path / "out.onnx").exists(), found.stderr


def test_a_reason_is_given_where_no_input_serves(tmp_path: Path) -> None:
    onnx.save(case("test_bitcast_float32_to_int32"), tmp_path / "net.onnx")
    with pytest.raises(InputError, match=r"none of the inputs made for it: .*(float64|BitCast)"):
        bnfold.export(tmp_path / "net.onnx", tmp_path / "out.onnx", device="cpu")


# -- results that nobody reads -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("read", [False, True])
def test_a_dropout_that_drops_nothing_has_a_mask_of_its_opset(read: bool, tmp_path: Path) -> None:
    """Up to opset 9 one of zeros, of the operand's dtype."""
    nodes = [node("Relu", ["x"], ["r"]), node("Dropout", ["r"], ["d", "mask"], ratio=0.5), node("Neg", ["d"], ["y"])]
    outputs = ["y", *(["mask"] if read else [])]
    graph = helper.make_graph(
        nodes, "net", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 9)], ir_version=8)
    onnx.save(model, tmp_path / "net.onnx")
    found = bnfold.check(tmp_path / "net.onnx", tmp_path / "net.onnx", device="cpu")
    assert found.verdict == "pass", found.problems
    model.graph.node[-1].op_type = "Abs"
    onnx.save(model, tmp_path / "wrong.onnx")
    assert bnfold.check(tmp_path / "wrong.onnx", tmp_path / "net.onnx", device="cpu").verdict == "fail"


# -- what a runtime may be off by ----------------------------------------------------------------------------------


def f(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


N = np.array(16)
BOUNDED = {
    "DFT": (node("DFT", ["x"], ["y"], axis=1), 19, {"x": f(2, 10, 1)}),
    "STFT": (node("STFT", ["x", "n", "w"], ["y"]), 17, {"x": f(1, 64, 1), "n": np.array(8), "w": np.hanning(16)}),
    "BlackmanWindow": (node("BlackmanWindow", ["n"], ["y"]), 17, {"n": N}),
    "HannWindow": (node("HannWindow", ["n"], ["y"]), 17, {"n": N}),
    "HammingWindow": (node("HammingWindow", ["n"], ["y"]), 17, {"n": N}),
    "BatchNormalization": (
        node("BatchNormalization", ["x", "s", "s", "s", "v"], ["y", "m", "w"], training_mode=1), 15,
        {"x": f(4, 3, 5), "s": f(3), "v": -np.ones(3, np.float32)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("op", BOUNDED)
def test_a_result_that_was_rounded_is_right_and_one_a_hundredth_off_is_not(op: str) -> None:
    made, opset, given = BOUNDED[op]
    exact = node_evaluator(made, {"": opset})(given)
    rounded = {n: np.asarray(x, np.float32) for n, x in zip(made.output, exact) if n}
    assert ask([made], {"": opset}, {**given, **rounded}).faults == ()
    off = rounded["y"] + np.abs(rounded["y"]).max() * np.float32(1e-2)
    (fault,) = ask([made], {"": opset}, {**given, **rounded, "y": off}).faults
    assert fault.operator == op


@pytest.mark.parametrize("op, places", [("ScatterND", [[2], [0]]), ("ScatterElements", [2, 0])])
def test_a_scatter_moves_and_is_exact_unless_it_adds_up(op: str, places: list[Any]) -> None:
    given = {"x": f(4), "at": np.array(places), "z": f(2)}
    moved = given["x"].copy()
    moved[[2, 0]] = given["z"]
    asked = ask([node(op, ["x", "at", "z"], ["y"])], {"": 18}, {**given, "y": moved})
    assert asked.faults == asked.unbounded == ()
    wrong = np.nextafter(moved, np.float32(9))
    assert ask([node(op, ["x", "at", "z"], ["y"])], {"": 18}, {**given, "y": wrong}).faults
    moved[[2, 0]] = given["x"][[2, 0]] + given["z"]
    asked = ask([node(op, ["x", "at", "z"], ["y"], reduction="add")], {"": 18}, {**given, "y": moved})
    assert asked.faults == () and asked.unbounded == (op,)


# -- limits and domains ------------------------------------------------------------------------------------------------


def test_operands_that_do_not_broadcast_ask_for_no_more_than_they_hold() -> None:
    x, w, b = np.zeros((1, 64, 1, 1)), np.zeros((1000, 64, 1, 1)), np.zeros(1000)
    assert asked("Conv", [x, w, b]) == 0 and asked("Add", [w, b]) == 1000 * 64 * 1000


def test_an_expansion_asks_for_what_it_makes() -> None:
    """Not for the elements of its operand times those of the shape: of 54 samples that would be 54 times as many."""
    x = np.zeros((54, 16, 1))
    assert asked("Expand", [x, np.array([54, 16, 49])]) == asked("Expand", [x, np.array([49])]) == 54 * 16 * 49
    assert asked("Expand", [np.zeros(3), np.array([10**12, 3])]) == 3 * 10**12
    assert asked("Expand", [np.zeros(2), np.array([10**12, 3])]) == 0  # which do not broadcast
    assert asked("Expand", [np.zeros((0, 3)), np.array([1, 3])]) == 0


def test_inputs_are_what_rounding_moves_where_there_are_no_weights() -> None:
    def model(*weights: onnx.TensorProto) -> onnx.ModelProto:
        given = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [3, 3]) for n in ("a", "b")][: 2 - len(weights)]
        graph = helper.make_graph([node("MatMul", ["a", "b"], ["y"])], "g", given, [onnx.ValueInfoProto(name="y")],
                                  weights)  # fmt: skip
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])

    feeds = {"a": f(3, 3), "b": f(3, 3).T}
    bare, held = File64(model()), File64(model(numpy_helper.from_array(np.zeros((3, 3), np.float32), "b")))
    moved = np.abs(bare.run(feeds, jitter=(None, 0)).outputs[0] - bare.run(feeds).outputs[0])
    assert 0 < moved.max() < 2.0**-22 * np.abs(feeds["a"]).max() * 3 * np.abs(feeds["b"]).max()
    assert not held.run({"a": feeds["a"]}, jitter=(None, 0)).outputs[0].any()


@pytest.mark.parametrize("version", [None, 6])
def test_a_file_of_another_domain_alone_needs_no_default_operator_set(version: int | None, tmp_path: Path) -> None:
    opsets = [helper.make_opsetid("ai.onnx.ml", 3), *([helper.make_opsetid("", version)] if version else [])]
    graph = helper.make_graph(
        [node("Scaler", ["x"], ["y"], domain="ai.onnx.ml", offset=[1.0, 2.0, 3.0], scale=[0.5, 1.5, 2.5])], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 3])],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), tmp_path / "net.onnx")
    if version:
        with pytest.raises(InputError, match="its operator set is 6"):
            read_onnx(tmp_path / "net.onnx")
    else:
        report: Any = bnfold.export(tmp_path / "net.onnx", tmp_path / "out.onnx", device="cpu")
        assert report.check.verdict == "pass", report.check.problems


# -- sparse constants --------------------------------------------------------------------------------------------------


def sparse(name: str, value: np.ndarray[Any, Any], flat: bool = True) -> onnx.SparseTensorProto:
    at = np.flatnonzero(value) if flat else np.argwhere(value)
    elements = numpy_helper.from_array(value[value != 0], name)
    return helper.make_sparse_tensor(elements, numpy_helper.from_array(at.astype(np.int64), ""), list(value.shape))


def sparse_net(change: Callable[[onnx.SparseTensorProto], None] = lambda tensor: None) -> onnx.ModelProto:
    """A convolution and BatchNormalization, a product with a sparse initializer, one in a body, a sparse constant."""
    rng = np.random.default_rng(0)
    weight, few, table = f(5, 3, 1, 1), f(5, 4) * (rng.random((5, 4)) > 0.6), f(4) * np.array([1, 0, 0, 1], np.float32)
    held = {"w": weight, "c": f(5) ** 2 + np.float32(0.1), "yes": np.array(True)}
    value = onnx.helper.make_tensor_value_info("d", TensorProto.FLOAT, [4])
    body = helper.make_graph([helper.make_node("Identity", ["t"], ["d"])], "body", [], [value])
    body.sparse_initializer.append(sparse("t", table))
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["conv"]),
        helper.make_node("BatchNormalization", ["conv", "c", "c", "c", "c"], ["norm"]),
        helper.make_node("GlobalAveragePool", ["norm"], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["flat"]),
        helper.make_node("MatMul", ["flat", "few"], ["product"]),
        helper.make_node("If", ["yes"], ["e"], then_branch=body, else_branch=body),
        helper.make_node("Constant", [], ["k"], sparse_value=sparse("", table)),
        helper.make_node("Sum", ["product", "e", "k"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes, "sparse", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4])],
        [numpy_helper.from_array(v, n) for n, v in held.items()], sparse_initializer=[sparse("few", few, flat=False)],
    )  # fmt: skip
    change(graph.sparse_initializer[0])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=7)


def test_sparse_constants_stay_and_are_what_they_spread_out_to(tmp_path: Path) -> None:
    def other(tensor: onnx.SparseTensorProto) -> None:
        tensor.values.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor.values) * 1.01, "few"))

    right, out = tmp_path / "right.onnx", tmp_path / "out.onnx"
    onnx.save(sparse_net(), right)
    report: Any = bnfold.export(right, out, device="cpu")
    assert report.passed and report.file.batch_norms == 0, report.check.problems
    before, after = onnx.load(right).graph, onnx.load(out).graph
    assert after.sparse_initializer == before.sparse_initializer and after.node[-2:] == before.node[-2:]
    onnx.save(sparse_net(other), right)
    assert bnfold.check(right, out, device="cpu").verdict == "fail"


def longer(tensor: onnx.SparseTensorProto) -> None:
    tensor.indices.dims[0] += 1


def negative(tensor: onnx.SparseTensorProto) -> None:
    tensor.dims[0] = -5


def huge(tensor: onnx.SparseTensorProto) -> None:
    tensor.dims[:] = [5, 1 << 40]


def outside(tensor: onnx.SparseTensorProto) -> None:
    tensor.indices.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor.indices) + 3, ""))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (longer, "and indices of shape"),
        (negative, r"is of shape \[-5"),
        (huge, "few.* bytes"),
        (outside, "out of bounds"),
    ],
)
def test_sparse_constants_that_claim_what_they_do_not_hold_are_one_line(
    change: Any, words: str, tmp_path: Path
) -> None:
    onnx.save(sparse_net(change), tmp_path / "net.onnx")
    with pytest.raises(bnfold.BnfoldError, match=words):
        bnfold.export(tmp_path / "net.onnx", tmp_path / "out.onnx", device="cpu")
    if change in (huge, outside):  # which ONNX Runtime was asked first
        with pytest.raises(bnfold.BnfoldError, match="the sparse 'few'"):
            File64(tmp_path / "net.onnx").run({"x": f(1, 3, 8, 8)})


# -- functions ---------------------------------------------------------------------------------------------------------


def function_net() -> onnx.ModelProto:
    """Two calls of a function that calls another, which decides."""
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
    steps = [node("Round", ["a"], ["r"]), node("Add", ["a", "r"], ["b"])]
    rounds = helper.make_function("own", "Rounds", ["a"], ["b"], steps, opsets)
    steps = [
        node("MatMul", ["p", "w"], ["t"]),
        node("Rounds", ["t"], ["u"], domain="own"),
        node("LeakyRelu", ["u"], ["q"]),
    ]
    steps[-1].attribute.append(onnx.AttributeProto(name="alpha", ref_attr_name="alpha", type=onnx.AttributeProto.FLOAT))
    layer = helper.make_function("own", "Layer", ["p", "w"], ["q"], steps, opsets, attributes=["alpha"])
    nodes = [
        node("Gemm", ["x", "w"], ["gemm"]),
        node("BatchNormalization", ["gemm", "c", "c", "c", "c"], ["norm"]),
        node("Layer", ["norm", "w"], ["z"], domain="own", alpha=0.25),
        node("Layer", ["z", "w"], ["y"], domain="own", alpha=0.5),
    ]
    graph = helper.make_graph(
        nodes, "functions", *([helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", 4])] for n in "xy"),
        [numpy_helper.from_array(f(4, 4), "w"), numpy_helper.from_array(f(4) ** 2 + np.float32(0.1), "c")],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=[layer, rounds])


def test_a_file_with_functions_is_asked_for_what_is_in_them(tmp_path: Path) -> None:
    right, out, wrong = (tmp_path / f"{name}.onnx" for name in ("right", "out", "wrong"))
    onnx.save(function_net(), right)
    report: Any = bnfold.export(right, out, device="cpu")
    assert report.passed and report.file.batch_norms == 0, report.check.problems
    model = onnx.load(out)
    assert model.functions == onnx.load(right).functions and model.graph.node[-1] == function_net().graph.node[-1]
    model.functions[1].node[0].op_type = "Floor"
    onnx.save(model, wrong)
    assert bnfold.check(wrong, right, device="cpu").verdict == "fail"
