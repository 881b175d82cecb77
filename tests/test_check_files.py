"""One ONNX file against another, and files that are not what they claim to be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper
from onnx_nets import claimed, cyclic, future, missing, negative, outside

import bnfold
from bnfold.cli import cli
from bnfold.errors import InputError
from bnfold.loading.onnx_file import read_onnx

node = helper.make_node
RNG = np.random.default_rng(0)


def f(*shape: int) -> np.ndarray[Any, Any]:
    return RNG.standard_normal(shape).astype(np.float32)


WEIGHTS = {"w": f(4, 3, 3, 3), "b": f(4), "s": np.abs(f(4)) + 0.5, "t": f(4), "m": f(4), "v": np.abs(f(4)) + 0.5}


def small() -> onnx.ModelProto:
    nodes = [
        node("Conv", ["x", "w", "b"], ["c"], name="conv"),
        node("BatchNormalization", ["c", "s", "t", "m", "v"], ["n"]),
        node("Relu", ["n"], ["y"]),
        node("ReduceMean", ["y"], ["p"], axes=[2, 3], keepdims=0),
        node("ArgMax", ["p"], ["i"], axis=1),
    ]
    graph = helper.make_graph(
        nodes, "net", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, "H", 7])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4, "h", "w"]),
         helper.make_tensor_value_info("i", TensorProto.INT64, ["N", 1])],
        [numpy_helper.from_array(value, name) for name, value in WEIGHTS.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def by_hand() -> onnx.ModelProto:
    """The same with its BatchNormalization in the convolution."""
    model = small()
    scale = WEIGHTS["s"].astype(np.float64) / np.sqrt(WEIGHTS["v"].astype(np.float64) + np.float32(1e-5))
    shift = (WEIGHTS["b"] - WEIGHTS["m"].astype(np.float64)) * scale + WEIGHTS["t"]
    model.graph.initializer[0].CopyFrom(
        numpy_helper.from_array((WEIGHTS["w"] * scale.reshape(-1, 1, 1, 1)).astype(np.float32), "w")
    )
    model.graph.initializer[1].CopyFrom(numpy_helper.from_array(shift.astype(np.float32), "b"))
    del model.graph.node[1]
    model.graph.node[1].input[0] = "c"
    return model


@pytest.fixture
def path(tmp_path: Path) -> Path:
    onnx.save(small(), tmp_path / "net.onnx")
    return tmp_path / "net.onnx"


def run(*args: Any) -> Any:
    return CliRunner().invoke(cli, [str(arg) for arg in args])


def test_a_file_that_was_folded_right_passes(path: Path) -> None:
    onnx.save(by_hand(), path.parent / "folded.onnx")
    result = run("check", path.parent / "folded.onnx", path, "--device", "cpu")
    assert result.exit_code == 0 and "the file in float64" not in result.stderr, result.stdout + result.stderr
    report = bnfold.check(path.parent / "folded.onnx", path, device="cpu")
    assert report.passed and len({o.candidate for o in report.outputs}) == 3


def wrong_weight(model: onnx.ModelProto) -> None:
    array = np.array(numpy_helper.to_array(model.graph.initializer[0]))
    array[1, 2, 0, 1] *= 1.001
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(array, "w"))


def wrong_padding(model: onnx.ModelProto) -> None:
    next(n for n in model.graph.node if n.op_type == "Conv").attribute.append(
        helper.make_attribute("pads", [0] * 3 + [1])
    )


def other_name(model: onnx.ModelProto) -> None:
    model.graph.node[1].output[0] = model.graph.output[0].name = model.graph.node[2].input[0] = "z"


def other_dtype(model: onnx.ModelProto) -> None:
    model.graph.node[1].output[0] = model.graph.node[2].input[0] = "z"
    model.graph.node.append(node("Cast", ["z"], ["y"], to=TensorProto.FLOAT16))
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT16


def other_choice(model: onnx.ModelProto) -> None:
    model.graph.node[-1].op_type = "ArgMin"


def not_a_number(model: onnx.ModelProto) -> None:
    model.graph.node[1].output[0] = "z"
    model.graph.node.insert(2, node("Log", ["z"], ["y"]))


@pytest.mark.parametrize(
    "harm", [wrong_weight, wrong_padding, other_name, other_dtype, other_choice, not_a_number], ids=lambda f: f.__name__
)
def test_a_file_that_is_wrong_fails(harm: Any, path: Path) -> None:
    model = by_hand()
    harm(model)
    onnx.save(model, path.parent / "wrong.onnx")
    result = run("check", path.parent / "wrong.onnx", path, "--device", "cpu")
    assert result.exit_code == 1, result.stdout + result.stderr


def test_a_wrong_weight_is_the_files_fault(path: Path) -> None:
    model = by_hand()
    wrong_weight(model)
    onnx.save(model, path.parent / "wrong.onnx")
    report = bnfold.check(path.parent / "wrong.onnx", path, device="cpu")
    assert report.problems[0].startswith("the file in float64, output 'y'")


@pytest.mark.parametrize("options", [["--input", "x:float32[N,3,9,7]"], ["--dtype", "float16"], ["--static"]])
def test_options_of_torch_models_do_not_apply(path: Path, options: list[str]) -> None:
    result = run("check", path, path, *options)
    assert (result.exit_code == 2 and "does not apply" in result.stderr) or "do not apply" in result.stderr, (
        result.stderr
    )


# ---- files that are not what they claim to be ------------------------------------------------------------------------


def ourselves(model: onnx.ModelProto) -> None:
    sets = [helper.make_opsetid("f", 1)]
    for name, other in (("One", "Two"), ("Two", "One")):
        inner = [node(other, ["a"], ["b"], domain="f")]
        model.functions.append(helper.make_function("f", name, ["a"], ["b"], inner, sets))


HOSTILE = {missing, cyclic, claimed, negative, outside, future, ourselves}


@pytest.mark.parametrize("harm", sorted(HOSTILE, key=lambda f: f.__name__), ids=lambda f: f.__name__)
def test_what_a_file_claims_falsely_is_one_line(harm: Any, path: Path) -> None:
    model = onnx.load(path)
    harm(model)
    other = path.parent / "harm.onnx"
    other.write_bytes(model.SerializeToString())
    result = run("check", path, other, "--device", "cpu", "-q")
    assert result.exit_code == 3 and result.stderr.count("\n") == 1, result.stderr


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x08\x08" + bytes(100)])
def test_what_is_no_onnx_file_is_one_line(content: bytes, path: Path) -> None:
    path.write_bytes(content)
    with pytest.raises(InputError):
        read_onnx(path)
