"""An ONNX file's external data lies in its own folder, in a file of its own, or the model is refused in one line."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import bnfold
from bnfold.errors import InputError
from bnfold.evaluate.weights import weights_of
from bnfold.runtime import model_file
from bnfold.runtime.model_file import read_model

KINDS = [TensorProto.FLOAT, TensorProto.BFLOAT16, TensorProto.INT8, TensorProto.STRING, TensorProto.FLOAT8E4M3FN]
#: location, offset, length -> what is said; None where it may be read.
PLACES: dict[tuple[str, str | None, str | None], str | None] = {
    ("own.data", "0", "64"): None,
    ("own.data", None, None): None,
    ("own.data", "63", "1"): None,
    ("below/own.data", "0", "64"): None,
    ("./below/../own.data", "0", "64"): None,
    ("link-within.data", "0", "64"): None,
    ("../other.data", "0", "64"): "outside",
    ("below/../../other.data", "0", "64"): "outside",
    ("link.data", "0", "64"): "outside",
    ("linked/other.data", "0", "64"): "outside",
    (".", "0", "64"): "outside",
    ("..", "0", "64"): "outside",
    ("/etc/hostname", "0", "1"): "outside",
    ("hard.data", "0", "64"): "hard links",
    ("below", "0", "64"): "folder",
    ("pipe", "0", "64"): "pipe",
    ("none.data", "0", "64"): "no such file",
    ("x" * 3000, "0", "64"): "cannot be read",
    ("own.data", "0", "65"): "which has 64",
    ("own.data", "64", "1"): "which has 64",
    ("own.data", str(2**70), "1"): "which has 64",
    ("own.data", "-1", "1"): "which has 64",
    ("own.data", "0", "-1"): "which has 64",
    ("own.data", "x", "1"): "no number",
    ("own.data", "0", "9" * 5000): "no number",
    ("", "0", "64"): "no location",
    ("own.data\0", "0", "64"): "no location",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "other.data").write_bytes(bytes(64))
    folder = tmp_path / "model"
    (folder / "below").mkdir(parents=True)
    for name in ("own.data", "below/own.data"):
        (folder / name).write_bytes(bytes(64))
    (folder / "link.data").symlink_to(tmp_path / "other.data")
    (folder / "link-within.data").symlink_to("own.data")
    (folder / "linked").symlink_to(tmp_path)
    os.link(tmp_path / "other.data", folder / "hard.data")
    os.mkfifo(folder / "pipe")
    return folder


def external(place: tuple[str, str | None, str | None], kind: int = TensorProto.FLOAT) -> TensorProto:
    tensor = TensorProto(name="w", data_type=kind, dims=[16], data_location=TensorProto.EXTERNAL)
    for key, value in zip(("location", "offset", "length"), place):
        if value is not None:
            tensor.external_data.add(key=key, value=value)
    return tensor


def initializer(tensor: TensorProto) -> onnx.ModelProto:
    return helper.make_model(helper.make_graph([], "g", [], [], [tensor]))


def judged(folder: Path, model: onnx.ModelProto, says: str | None) -> None:
    path = folder / "net.onnx"
    path.write_bytes(model.SerializeToString())
    if says is None:
        assert read_model(path) == model
        return
    with pytest.raises(InputError, match=says) as caught:
        read_model(path)
    assert str(caught.value).startswith(f"{path}: the external data of 'w' ") and str(caught.value).isprintable()


@pytest.mark.parametrize(
    "place", PLACES, ids=lambda place: f"{place[0][:24]!r}-{str(place[1])[:9]}-{str(place[2])[:9]}"
)
def test_data_lies_in_the_models_own_folder(place: tuple[str, str | None, str | None], folder: Path) -> None:
    for kind in KINDS:
        judged(folder, initializer(external(place, kind)), PLACES[place])


def holders() -> dict[str, onnx.ModelProto]:
    """A model for each place where a tensor can be."""
    tensor = external(("../other.data", "0", "64"))
    node = helper.make_node("Constant", [], ["c"], value=tensor)
    inner = helper.make_graph([node], "inner", [], [])
    branch = helper.make_node("If", ["x"], ["y"], then_branch=helper.make_graph([], "t", [], []), else_branch=inner)
    sparse = onnx.SparseTensorProto(
        values=tensor, indices=TensorProto(name="i", data_type=TensorProto.INT64), dims=[16]
    )
    many = helper.make_node("Many", [], ["m"], domain="own")
    many.attribute.add(name="all", type=onnx.AttributeProto.TENSORS).tensors.append(tensor)
    function = helper.make_function("own", "F", [], ["c"], [node], [helper.make_opsetid("", 20)])
    trained = helper.make_model(helper.make_graph([], "g", [], []))
    trained.training_info.add().algorithm.initializer.append(tensor)
    return {
        "attribute": helper.make_model(helper.make_graph([node], "g", [], [])),
        "attribute of tensors": helper.make_model(helper.make_graph([many], "g", [], [])),
        "branch": helper.make_model(helper.make_graph([branch], "g", [], [])),
        "sparse": helper.make_model(helper.make_graph([], "g", [], [], sparse_initializer=[sparse])),
        "function": helper.make_model(helper.make_graph([], "g", [], []), functions=[function]),
        "training": trained,
    }


@pytest.mark.parametrize("holder", holders())
def test_wherever_the_tensor_is(holder: str, folder: Path) -> None:
    judged(folder, holders()[holder], "outside")


def test_a_model_through_a_link_has_its_data_beside_the_link(folder: Path, tmp_path: Path) -> None:
    (folder / "net.onnx").write_bytes(initializer(external(("own.data", "0", "64"))).SerializeToString())
    (folder / "latest.onnx").symlink_to("net.onnx")
    (tmp_path / "latest.onnx").symlink_to(folder / "net.onnx")
    assert read_model(folder / "latest.onnx") == read_model(folder / "net.onnx")
    with pytest.raises(InputError, match="no such file"):
        read_model(tmp_path / "latest.onnx")


@pytest.mark.parametrize("content", [b"\xff" * 99, b"text\n" * 99, np.ones(99).tobytes()])
def test_what_is_no_model(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "net.onnx").write_bytes(content)
    with pytest.raises(InputError, match=r"net\.onnx: this is no ONNX file, or a damaged one"):
        read_model(tmp_path / "net.onnx")


@pytest.fixture
def held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that holds its weights, in whatever way a tensor can."""
    monkeypatch.setattr(model_file, "LARGE", 0)
    rng, tensors = np.random.default_rng(0), []
    for i, kind in enumerate(("float32", "float16", "int64", "float64", "uint8")):
        array = rng.integers(-99, 99, (40, 30)).astype(kind)
        tensors += [onnx.numpy_helper.from_array(array, f"raw{i}"), onnx.numpy_helper.from_array(array[0, :2], f"s{i}")]
    tensors.append(helper.make_tensor("typed", TensorProto.FLOAT, [600], rng.standard_normal(600)))
    nodes = [helper.make_node("Identity", [tensors[0].name], ["y"])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [40, 30])]
    model = helper.make_model(helper.make_graph(nodes, "net", [], outputs, tensors), producer_name="\u00e4" * 300)
    onnx.save(model, tmp_path / "net.onnx")
    return tmp_path / "net.onnx"


def test_the_weights_of_a_large_file_stay_in_it(held: Path) -> None:
    light, whole = read_model(held, light=True), onnx.load(held)
    assert light.ByteSize() < 8000 < 20_000 < whole.ByteSize()
    apart = {t.name for t in light.graph.initializer if t.data_location == TensorProto.EXTERNAL}
    assert apart == {f"raw{i}" for i in range(5)}
    onnx.external_data_helper.load_external_data_for_model(light, str(held.parent))
    for tensor in light.graph.initializer:
        tensor.ClearField("data_location")
        del tensor.external_data[:]
    assert light == whole == read_model(held)


def test_a_weight_that_stays_in_a_file_is_a_view_of_it(held: Path) -> None:
    far, near = (weights_of(read_model(held, light=light), held.parent) for light in (True, False))
    for i in range(5):
        view = far[f"raw{i}"].array()
        assert isinstance(view.base, np.memmap) and np.array_equal(view, near[f"raw{i}"].array())
    assert not isinstance(far["typed"].array().base, np.memmap)  # which has numbers in place of bytes


def test_a_file_that_has_another_name_is_read_whole(held: Path) -> None:
    held.with_name("link.onnx").symlink_to(held)
    assert read_model(held.with_name("link.onnx"), light=True) == onnx.load(held)
    os.link(held, held.with_name("other.onnx"))
    assert read_model(held, light=True) == onnx.load(held)


@pytest.mark.parametrize("cut", [1, 7, 100, 5000, 12_000])
def test_a_large_file_that_is_cut_off_is_no_onnx_file(held: Path, cut: int) -> None:
    held.write_bytes(held.read_bytes()[:-cut])
    with pytest.raises(InputError, match="damaged"):
        read_model(held, light=True)


def test_a_large_file_folds_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    weights = {"w": rng.standard_normal((16, 16, 3, 3)), "b": rng.standard_normal(16)}
    weights |= {name: rng.random(16) + 0.5 for name in ("scale", "shift", "mean", "var")}
    nodes = [helper.make_node("Conv", ["x", "w", "b"], ["c"])]
    nodes.append(helper.make_node("BatchNormalization", ["c", "scale", "shift", "mean", "var"], ["y"]))
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", 16, None, None]) for n in ("x", "y")]
    tensors = [onnx.numpy_helper.from_array(w.astype(np.float32), name) for name, w in weights.items()]
    opsets = [helper.make_opsetid("", 17)]
    model = helper.make_model(
        helper.make_graph(nodes, "net", ends[:1], ends[1:], tensors), opset_imports=opsets, ir_version=8
    )
    onnx.save(model, tmp_path / "net.onnx")
    load = onnx.load_model_from_string
    for name, large in (("plain", 1 << 30), ("light", 0)):
        monkeypatch.setattr(model_file, "LARGE", large)
        if not large:  # nothing reads the weights with the file
            monkeypatch.setattr(onnx, "load_model", None)
            monkeypatch.setattr(onnx, "load_model_from_string", lambda x: load(x) if len(x) < 4096 else None)
        report = bnfold.export(tmp_path / "net.onnx", tmp_path / f"{name}.onnx", device="cpu")
        assert report.passed and report.ledger.count() == (1, 1)
    assert (tmp_path / "plain.onnx").read_bytes() == (tmp_path / "light.onnx").read_bytes()


NORM = ["x", *["c"] * 4]
#: Operator, its operands and results, opset -> operands and results of what is written; None where it is refused.
LEFT_OUT: dict[str, tuple[tuple[str, list[str], list[str], int], tuple[list[str], list[str]] | None]] = {
    "normalised by what is stored": (("BatchNormalization", NORM, ["y", "", "", "", ""], 9), (NORM, ["y"])),
    "of the next version": (("BatchNormalization", NORM, ["y", "", ""], 14), (NORM, ["y"])),
    "an empty bias": (("LayerNormalization", ["x", "c", ""], ["y"], 17), (["x", "c"], ["y"])),
    "in the middle": (("Clip", ["x", "", "one"], ["y"], 13), (["x", "", "one"], ["y"])),
    "normalised by the batch": (("BatchNormalization", NORM, ["y", "", "b", "", "d"], 9), None),
    "one of any number": (("Max", ["x", ""], ["y"], 13), None),
    "an operand that is needed": (("Add", ["", "x"], ["y"], 13), None),
    "a part": (("Split", ["x", "parts"], ["y", ""], 13), None),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_empty_names_behind_all_others_go_and_what_is_needed_is_refused(name: str, tmp_path: Path) -> None:
    """ONNX Runtime ends the process on most of them."""
    (operator, reads, makes, opset), wanted = LEFT_OUT[name]
    held = {"c": np.ones(4, np.float32), "one": np.float32(1), "parts": np.array([2, 2])}
    axis = {"axis": 1} if operator == "Split" else {}
    graph = helper.make_graph(
        [helper.make_node(operator, reads, makes, **axis), helper.make_node("Softmax", ["y"], ["z"])], "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4, None, 4])],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(held[n], n) for n in dict.fromkeys(reads) if n in held],
    )  # fmt: skip
    source, folded = tmp_path / "net.onnx", tmp_path / "folded.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=6), source)
    if wanted is None:
        with pytest.raises(InputError, match=f"{operator} .* has no name for its"):
            bnfold.export(source, folded, device="cpu")
        return
    assert bnfold.export(source, folded, device="cpu").passed
    node = onnx.load(folded).graph.node[0]
    assert (list(node.input), list(node.output)) == wanted
