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


# -- limits and domains ------------------------------------------------------------------------------------------------


def test_operands_that_do_not_broadcast_ask_for_no_more_than_they_hold() -> None:
    x, w, b = np.zeros((1, 64, 1, 1)), np.zeros((1000, 64, 1, 1)), np.zeros(1000)
    assert asked("Conv", [x, w, b]) == 0 and asked("Add", [w, b]) == 1000 * 64 * 1000


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
