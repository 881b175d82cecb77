"""Sessions do what they say, on the provider they say, and fail in one line."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from onnx_parts import BFLOAT16, FLOAT, INT64, Value, X, adder, build, encode, identity, serialized

from bnfold.errors import BnfoldError, InputError, LowerError, ProviderError, ResourceError
from bnfold.runtime import session as sessions
from bnfold.runtime.runtime import CPU, Array, open_session

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def silent(capfd: pytest.CaptureFixture[str]) -> Any:
    """Nothing in this module may print, on either stream."""
    yield
    printed = capfd.readouterr()
    assert printed.out == "" and printed.err == ""


# --- what a session is and does ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimized", [True, False])
@pytest.mark.parametrize("source", ["bytes", "path", "str"])
def test_a_session_runs_and_describes_itself(tmp_path: Path, optimized: bool, source: str) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(encode(adder()))
    models: dict[str, bytes | Path | str] = {"bytes": path.read_bytes(), "path": path, "str": str(path)}
    model = models[source]
    session = open_session(model, optimized=optimized, threads=1)
    assert session.provider == CPU and session.optimized is optimized
    assert [(v.name, v.dtype, v.shape) for v in session.inputs] == [("x", np.dtype(np.float32), ("N", 3))]
    assert [v.name for v in session.outputs] == ["sum", "relu"]
    total, relu = session.run({"x": X})
    np.testing.assert_array_equal(total, X + np.array([-1, 0, 1], np.float32))
    np.testing.assert_array_equal(relu, np.maximum(total, 0))
    np.testing.assert_array_equal(session.run({"x": X}, ["relu", "sum"]), [relu, total])


def test_the_optimisation_level_is_the_one_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    double = [helper.make_node("Identity", ["x"], ["a"]), helper.make_node("Relu", ["a"], ["y"])]
    model = serialized(double, [("x", FLOAT, [1])], [("y", FLOAT, [1])])
    made = sessions._options

    for optimized, operators in ((True, ["Relu"]), (False, ["Identity", "Relu"])):
        dump = tmp_path / f"{optimized}.onnx"

        def dumping(dump: Path = dump, **asked: Any) -> Any:
            options = made(**asked)
            options.optimized_model_filepath = str(dump)
            return options

        monkeypatch.setattr(sessions, "_options", dumping)
        open_session(model, optimized=optimized)
        assert [node.op_type for node in onnx.load(dump).graph.node] == operators
    dump.unlink()
    open_session(model, optimized=True, disabled_optimizers=["EliminateIdentity"])
    assert [node.op_type for node in onnx.load(dump).graph.node] == ["Identity", "Relu"]


@pytest.mark.parametrize("shape", [(3, 4), (0, 4), (1, 4)])
@pytest.mark.parametrize(
    "dtype", ["float32", "float64", "float16", "bfloat16", "int8", "int32", "int64", "uint8", "bool"]
)
def test_every_dtype_goes_in_and_comes_out_bit_for_bit(dtype: str, shape: tuple[int, int]) -> None:
    numpy = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
    session = open_session(identity(helper.np_dtype_to_tensor_dtype(numpy), ["N", 4]))
    given = (np.arange(12).reshape(3, 4) - 5).astype(numpy)[: shape[0]]
    (result,) = session.run({"x": given})
    assert session.inputs[0].dtype == session.outputs[0].dtype == result.dtype == numpy
    assert result.shape == shape and result.tobytes() == given.tobytes()


def test_bfloat16_is_computed_as_bfloat16() -> None:
    model = serialized([helper.make_node("Cast", ["x"], ["y"], to=FLOAT)], [("x", BFLOAT16, [3])], [("y", FLOAT, [3])])
    given = np.array([1.0, -0.0, np.nan], ml_dtypes.bfloat16)
    (result,) = open_session(model).run({"x": given})
    np.testing.assert_array_equal(result, [1.0, -0.0, np.nan])
    with pytest.raises(InputError, match=r"expects bfloat16\[3\], given float32\[3\]"):
        open_session(model).run({"x": given.astype(np.float32)})


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_scalars_strides_and_read_only_arrays(dtype: Any) -> None:
    onnx_type = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    (result,) = open_session(identity(onnx_type, [])).run({"x": np.array(1.5, dtype)})
    assert result.shape == () and result == 1.5
    session = open_session(identity(onnx_type, ["N", "M"]))
    given = np.arange(24).reshape(4, 6).astype(dtype)
    for view in (given.T, given[::2, ::-1], np.broadcast_to(given[0], (3, 6)), np.asfortranarray(given)):
        np.testing.assert_array_equal(session.run({"x": view})[0], view)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("optimized", [True, False])
def test_results_share_memory_with_nothing(dtype: Any, optimized: bool) -> None:
    onnx_type = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    value: Value = ("x", onnx_type, ["N"])
    session = open_session(serialized([], [value], [value]), optimized=optimized)  # the input is the output
    given = np.ones(4, dtype)
    (result,) = session.run({"x": given})
    result += 1
    np.testing.assert_array_equal(given, np.ones(4, dtype))
    np.testing.assert_array_equal(session.run({"x": given})[0], given)


def test_a_session_is_silent_even_where_the_caller_wants_warnings() -> None:
    model = adder()
    model.graph.initializer.append(numpy_helper.from_array(np.ones(1, np.float32), "unused"))  # worth a warning
    ort = sessions.onnxruntime()
    ort.set_default_logger_severity(2)
    try:
        open_session(encode(model)).run({"x": X})
    finally:
        ort.set_default_logger_severity(4)


def test_a_dropped_session_frees_its_memory() -> None:
    session = open_session(encode(adder()))
    session.run({"x": X})
    inner = weakref.ref(session._session)
    del session
    assert inner() is None


# --- feeds that do not fit --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({}, "nothing is given for input x. Its inputs are x"),
        ({"x": X, "q": X}, "no input named q. Its inputs are x"),
        ({"x": X.astype(np.float64)}, r"input x expects float32\[N, 3\], given float64\[2, 3\]"),
        ({"x": X.astype(">f4")}, "input x expects float32"),
        ({"x": X[:, :2]}, r"input x expects float32\[N, 3\], given float32\[2, 2\]"),
        ({"x": X[0]}, r"input x expects float32\[N, 3\], given float32\[3\]"),
        ({"x": X.tolist()}, "input x is a list. Give a numpy array"),
    ],
)
def test_feeds_that_do_not_fit_are_refused_by_name(feeds: dict[str, Array], message: str) -> None:
    session = open_session(encode(adder()))
    with pytest.raises(InputError, match=message):
        session.run(feeds)
    assert len(session.run({"x": X})) == 2, "a refusal leaves the session usable"


def test_an_unknown_output_is_refused() -> None:
    with pytest.raises(InputError, match=r"no output named logits\. Its outputs are sum, relu"):
        open_session(encode(adder())).run({"x": X}, ["sum", "logits"])


# --- models that cannot be opened or run ------------------------------------------------------------------------------


def unknown_operator() -> bytes:
    return serialized([helper.make_node("Foo", ["x"], ["y"])], [("x", FLOAT, [1])], [("y", FLOAT, [1])])


def not_implemented() -> bytes:
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"])]
    inputs: list[Value] = [("x", BFLOAT16, [1, 1, 2, 2]), ("w", BFLOAT16, [1, 1, 1, 1])]
    model = build(nodes, inputs, [("y", BFLOAT16, [1, 1, 2, 2])])
    model.opset_import[0].version = 22
    return encode(model)


def future_opset() -> bytes:
    model = adder()
    model.opset_import[0].version = 99
    return encode(model)


def sequence_output() -> bytes:
    model = adder()
    model.graph.node.append(helper.make_node("SequenceConstruct", ["sum"], ["list"]))
    model.graph.output.append(helper.make_tensor_sequence_value_info("list", FLOAT, None))
    return encode(model)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "No graph was found"),
        (b"hello world, this is no model", "(?i)protobuf parsing failed"),
        (encode(adder())[:-40], "refuses it"),
        (unknown_operator(), "No Op registered for Foo"),
        (not_implemented(), "Could not find an implementation for Conv"),
        (future_opset(), "Opset 99"),
        (sequence_output(), r"list is a seq\(tensor\(float\)\)"),
    ],
    ids=["empty", "garbage", "truncated", "unknown operator", "not implemented", "future opset", "sequence"],
)
def test_an_invalid_model_is_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(content)
    for model, where in ((content, "the model"), (path, str(path))):
        with pytest.raises(LowerError, match=message) as caught:
            open_session(model)
        text = str(caught.value)
        assert text.startswith(where) and "\n" not in text and "ONNXRuntimeError" not in text
        assert "/onnxruntime_src" not in text and caught.value.hint and len(text) < 600
        assert ("--dtype float32" in caught.value.hint) is message.startswith("Could not find an implementation")


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path, what in {tmp_path / "missing.onnx": "there is no such file", tmp_path: "this is a folder"}.items():
        with pytest.raises(InputError, match=f"{path}: {what}"):
            open_session(path)


def save_external(path: Path) -> Path:
    onnx.save(adder(), path, save_as_external_data=True, location="net.data", size_threshold=0)
    return path.parent / "net.data"


def test_external_data_is_found_beside_the_model(tmp_path: Path) -> None:
    save_external(tmp_path / "net.onnx")
    np.testing.assert_array_equal(open_session(tmp_path / "net.onnx").run({"x": X}, ["sum"])[0][0], [-1, 0, 1])


@pytest.mark.parametrize("damage", ["missing", "short", "outside", "absolute", "symlink", "bytes"])
def test_bad_external_data_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    model: Path | bytes = folder / "net.onnx"
    data = save_external(folder / "net.onnx")
    content = (folder / "net.onnx").read_bytes()
    if damage == "short":
        data.write_bytes(b"123")
    elif damage == "bytes":
        monkeypatch.chdir(folder)
        model = content
    else:
        data.rename(tmp_path / "net.data")
    if damage == "symlink":
        data.symlink_to(tmp_path / "net.data")
    if damage in ("outside", "absolute"):
        loaded = onnx.load(folder / "net.onnx", load_external_data=False)
        location = "../net.data" if damage == "outside" else str(tmp_path / "net.data")
        loaded.graph.initializer[0].external_data[0].value = location
        (folder / "net.onnx").write_bytes(loaded.SerializeToString())
    with pytest.raises(InputError, match=r"(?i)external"):
        open_session(model)


def expand() -> bytes:
    inputs: list[Value] = [("x", FLOAT, [1]), ("shape", INT64, [1])]
    return serialized([helper.make_node("Expand", ["x", "shape"], ["y"])], inputs, [("y", FLOAT, ["N"])])


def test_no_memory_is_a_resource_error() -> None:
    session = open_session(expand())
    with pytest.raises(ResourceError, match="the memory gave out"):
        session.run({"x": np.ones(1, np.float32), "shape": np.array([1 << 46])})
    assert session.run({"x": np.ones(1, np.float32), "shape": np.array([5])})[0].shape == (5,)


def test_a_model_that_fails_on_its_inputs_is_a_lower_error() -> None:
    nodes = [helper.make_node("Reshape", ["x", "shape"], ["y"])]
    session = open_session(serialized(nodes, [("x", FLOAT, ["N"]), ("shape", INT64, [2])], [("y", FLOAT, None)]))
    with pytest.raises(LowerError, match="Reshape") as caught:
        session.run({"x": np.ones(3, np.float32), "shape": np.array([2, 2])})
    assert "\n" not in str(caught.value) and "/onnxruntime_src" not in str(caught.value)


@pytest.mark.parametrize(
    ("error", "running", "kind"),
    [
        (RuntimeError("CUDA failure 2: out of memory ; GPU=0"), True, ResourceError),
        (RuntimeError("CUDA failure 719: unspecified launch failure"), True, ProviderError),
        (RuntimeError("CUDNN_STATUS_NOT_INITIALIZED"), False, ProviderError),
        (MemoryError(), False, ResourceError),
        (RuntimeError("std::bad_alloc"), False, ResourceError),
        (RuntimeError("anything else"), False, LowerError),
        (InputError("as it is"), True, InputError),
    ],
)
def test_failures_are_sorted_by_what_the_user_can_do(error: Exception, running: bool, kind: type[BnfoldError]) -> None:
    assert type(sessions._explain(error, "net.onnx", running=running)) is kind
