"""An ONNX file's external data lies in its own folder, in a file of its own, or the model is refused in one line."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from bnfold.errors import InputError
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
