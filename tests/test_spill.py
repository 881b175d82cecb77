"""Constants in float64 that are more than memory should hold, and files whose weights are outside of them."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_nets import apart, f, net, norm, statistics

import bnfold
from bnfold.errors import InputError
from bnfold.graph import spill
from bnfold.graph.spill import Spill

node = helper.make_node


@pytest.mark.parametrize("budget", [0, 8 * 12, 1 << 20])
def test_what_is_put_is_read(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spill, "BUDGET", budget)
    kept = Spill[str]()
    tensors = {
        "a": torch.randn(3, 4, dtype=torch.float64), "t": torch.randn(4, 3, dtype=torch.float64).T,
        "scalar": torch.tensor(2.5, dtype=torch.float64), "none": torch.zeros(0, 3, dtype=torch.float64),
        "other": torch.arange(7),
    }  # fmt: skip
    for name, tensor in tensors.items():
        kept[name] = tensor
    kept["a"] = tensors["a"] + 1
    tensors["a"] = tensors["a"] + 1
    assert list(kept) == ["t", "scalar", "none", "other", "a"] and len(kept) == 5
    assert all(torch.equal(kept[name], tensor) for name, tensor in tensors.items())
    assert kept.is_apart("t") == (budget < 8 * 24) and not kept.is_apart("other")
    del kept["t"]
    assert "t" not in kept and torch.equal(kept["a"], tensors["a"])


def test_what_is_replaced_or_gone_takes_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spill, "BUDGET", 8 * 8)
    kept, ones = Spill[str](), torch.ones(5, dtype=torch.float64)
    for _ in range(3):
        kept["a"] = ones
    assert not kept.is_apart("a")
    kept["b"] = ones
    assert kept.is_apart("b")
    del kept["a"]
    kept["c"] = ones
    assert not kept.is_apart("c") and torch.equal(kept["b"], ones)


def test_where_there_is_no_room_memory_holds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(spill, "BUDGET", 0)
    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    kept = Spill[str]()
    kept["a"] = torch.ones(5, dtype=torch.float64)
    assert not kept.is_apart("a") and torch.equal(kept["a"], torch.ones(5, dtype=torch.float64))


# -- files -------------------------------------------------------------------------------------------------------------


def outside(folder: Path) -> Path:
    """A file whose weights are in another one: those of two convolutions."""
    arrays = {"w": f(8, 3, 3, 3), "v": f(8, 8, 3, 3), **statistics(8), **statistics(8, "m")}
    nodes = [node("Conv", ["x", "w"], ["c"]), norm("c", "n"), node("Relu", ["n"], ["r"]),
             node("Conv", ["r", "v"], ["d"]), norm("d", "y", "m")]  # fmt: skip
    model = net(
        nodes, ["N", 3, 9, 9], {name: x.astype(np.float32) for name, x in arrays.items()}, dtype=TensorProto.FLOAT
    )
    onnx.save(model, folder / "net.onnx", save_as_external_data=True, location="net.data", size_threshold=512)
    return folder / "net.onnx"


@pytest.mark.parametrize("external", [None, True])
def test_the_same_file_whatever_memory_there_is(external: bool | None, tmp_path: Path, monkeypatch: Any) -> None:
    path, found = outside(tmp_path), []
    for budget in (0, 1 << 30):
        monkeypatch.setattr(spill, "BUDGET", budget)
        out = tmp_path / f"out{budget}.onnx"
        report = bnfold.export(path, out, device="cpu", external_data=external)
        assert report.passed and report.ledger.count() == (2, 2)
        assert report.file is not None and bool(report.file.data) == bool(external)
        found.append(onnx.load(out))
    assert found[0].graph == found[1].graph
    assert len(found[0].graph.initializer) == 4
    assert apart(onnx.load(path), found[0]) < 2.0**-20


def test_weights_that_are_gone_are_told(tmp_path: Path) -> None:
    path = outside(tmp_path)
    (tmp_path / "net.data").unlink()
    with pytest.raises(InputError, match=r"external data of '\w' cannot be read"):
        bnfold.export(path, tmp_path / "out.onnx", device="cpu", check=False)


def test_every_tensor_of_a_file_beside_it_begins_on_a_page(tmp_path: Path) -> None:
    bnfold.export(outside(tmp_path), tmp_path / "out.onnx", device="cpu", external_data=True)
    model = onnx.load(tmp_path / "out.onnx", load_external_data=False)
    held = [t for t in model.graph.initializer if onnx.external_data_helper.uses_external_data(t)]
    places = [{entry.key: entry.value for entry in t.external_data} for t in held]
    assert len(held) == 1 and all(int(place["offset"]) % 4096 == 0 for place in places)
    assert {len(numpy_helper.to_array(t).tobytes()) for t in onnx.load(tmp_path / "out.onnx").graph.initializer} >= {
        int(place["length"]) for place in places
    }
