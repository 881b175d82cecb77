"""The user's data: which array is what, and what does not fit the model is refused with the way out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bnfold.errors import InputError
from bnfold.gate.data import IGNORED, VOID, Labels, assign, examine, load_data, select, stored_batches

X = np.arange(12, dtype=np.float32).reshape(4, 3)


def test_arrays_are_found_by_name(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "d.npz", x=X, y=X[:, 0], labels=np.arange(4), logits=X, other=np.zeros(9))
    data, labels = load_data(tmp_path / "d.npz", ["y", "x"], ["logits", "aux"])
    assert list(data) == ["y", "x"] and list(labels.targets) == ["logits"] and labels.unused == ("other",)
    np.testing.assert_array_equal(data["x"][:], X)
    assert labels.classes is not None and labels.classes[:].tolist() == [0, 1, 2, 3]
    assert labels.where == str(tmp_path / "d.npz")


def test_an_input_may_be_called_labels() -> None:
    data, labels = select({"x": X, "labels": np.arange(4)}, ["x", "labels"])
    assert (list(data), labels.classes) == (["x", "labels"], None)


def test_one_array_for_one_input_needs_no_name(tmp_path: Path) -> None:
    np.save(tmp_path / "d.npy", X)
    np.savez(tmp_path / "d.npz", X)
    np.savez(tmp_path / "l.npz", X, labels=np.arange(4))
    for name in ("d.npy", "d.npz", "l.npz"):
        data, labels = load_data(tmp_path / name, ["image"])
        np.testing.assert_array_equal(data["image"][:], X)
        assert (labels.classes is not None) == (name == "l.npz")


def test_an_optional_input_may_be_missing() -> None:
    assert list(select({"x": X}, ["x", "scale"], optional=["scale"])[0]) == ["x"]


@pytest.mark.parametrize(
    ("arrays", "names", "says"),
    [
        ({"x": X}, ["x", "mask"], "no array for mask. The file's arrays: x; the model's inputs: x, mask"),
        ({"images": X}, ["x"], "no array for x. The file's arrays: images"),
        ({"labels": X}, ["x"], "no array for x. The file's arrays: labels"),
        ({"arr_0": X, "arr_1": X}, ["x"], "arr_0, arr_1"),
        ({"": X}, ["x", "y"], r"no array for x, y\. The file's arrays: one without a name"),
        ({"x": X, "y": X[:2]}, ["x", "y"], "x 4, y 2"),
        ({"x": X, "labels": np.arange(3)}, ["x"], "x 4, labels 3"),
        ({"x": X, "label": np.arange(4)}, ["x"], "'label' is none that bnfold knows. Did you mean labels?"),
        ({"x": X, "target": np.arange(4)}, ["x"], "Did you mean targets?"),
        ({"x": X[:0]}, ["x"], "'x' is empty"),
        ({"x": np.zeros((4, 0))}, ["x"], "'x' is empty"),
        ({"x": np.float32(3)}, ["x"], r"'x' is empty or not numeric \(shape \(\)"),
        ({"x": np.array(["a", "b"])}, ["x"], "not numeric"),
        ({"x": X.astype(np.longdouble)}, ["x"], "not numeric"),
        ({"x": X.astype(complex)}, ["x"], "not numeric"),
        ({"x": X, "labels": np.array(["a"] * 4)}, ["x"], "'labels' is empty or not numeric"),
    ],
)
def test_what_cannot_be_told_apart_is_refused(arrays: dict[str, Any], names: list[str], says: str) -> None:
    with pytest.raises(InputError, match=says):
        select({name: np.asarray(array) for name, array in arrays.items()}, names, where="d.npz")


# -- labels and targets ------------------------------------------------------------------------------------------------

OUTPUTS: dict[str, tuple[int | None, ...]] = {"boxes": (None, 4, 6), "logits": (None, 10), "mask": (None, 5, 8, None)}


def labels(shape: tuple[int, ...], value: int = 0, **more: Any) -> Labels:
    return Labels(np.full(shape, value), **more)


@pytest.mark.parametrize(
    ("shape", "output", "axis", "count"),
    [((3,), "logits", 1, 10), ((3, 1), "logits", 1, 10), ((3, 6), "boxes", 1, 4), ((3, 4), "boxes", -1, 6),
     ((3, 8, 20), "mask", 1, 5)],
)  # fmt: skip
def test_labels_find_their_output(shape: tuple[int, ...], output: str, axis: int, count: int) -> None:
    found = assign(labels(shape), OUTPUTS)
    assert (found.output, found.axis, found.count) == (output, axis, count)


@pytest.mark.parametrize("shape", [(3, 9), (3, 8, 8, 2), (3, 9, 20)])
def test_labels_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"fit no output\. The outputs are boxes"):
        assign(labels(shape), OUTPUTS)


def test_one_hot_labels_are_told_what_to_be() -> None:
    with pytest.raises(InputError, match=r"labels\.argmax"):
        assign(labels((3, 10)), OUTPUTS)


def test_labels_are_integers() -> None:
    with pytest.raises(InputError, match=r"no integers.*targets"):
        assign(Labels(np.zeros(3)), OUTPUTS)
    with pytest.raises(InputError, match="none of floating-point numbers"):
        assign(labels((3,)), {})


def test_targets_find_their_output() -> None:
    found = assign(Labels(targets={"logits": np.zeros((3, 10))}), OUTPUTS)
    assert list(found.targets) == ["logits"]
    found = assign(Labels(targets={"targets": np.zeros((3, 10, 1))}), OUTPUTS)  # but for axes of size 1
    assert list(found.targets) == ["logits"]
    for name, shape in (("logits", (3, 9)), ("targets", (3, 7)), ("boxes", (3, 10))):
        with pytest.raises(InputError, match="fits no output"):
            assign(Labels(targets={name: np.zeros(shape)}), OUTPUTS)


@pytest.mark.parametrize("value", [10, -1, 255])
def test_labels_out_of_range_are_refused(value: int) -> None:
    data, right = {"x": X}, np.array([0, 9, value, 3])
    with pytest.raises(InputError, match=f"label {value} of sample 2 is none of the 10 classes.*0 to 9"):
        examine(data, assign(Labels(right), OUTPUTS), {"x": torch.float32})


@pytest.mark.parametrize("value", [IGNORED, VOID])
def test_pixels_without_a_label_are_no_mistake(value: int) -> None:
    data, right = {"x": X}, np.full((4, 8, 2), value)
    examine(data, assign(Labels(right), {"mask": (None, 5, 8, None)}), {"x": torch.float32})
    with pytest.raises(InputError, match="none of the 5 classes"):
        examine(data, assign(Labels(right - 1), {"mask": (None, 5, 8, None)}), {"x": torch.float32})


# -- values ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("array", "dtype", "says"),
    [
        (np.zeros((2, 3), np.uint8), torch.float32, r"holds uint8, the model takes float32.*/ 255"),
        (np.zeros((2, 3)), torch.int64, "holds float64, the model takes int64"),
        (np.zeros((2, 3), np.int64), torch.bool, "holds int64, the model takes bool"),
        (np.array([[0.0], [np.nan]]), torch.float32, "has NaN, first in sample 1"),
        (np.array([[1], [300]]), torch.uint8, "integers that torch.uint8 does not hold, first in sample 1"),
    ],
)
def test_values_that_the_model_does_not_take(array: np.ndarray, dtype: torch.dtype, says: str) -> None:
    with pytest.raises(InputError, match=says):
        examine({"x": array}, Labels(), {"x": dtype})


@pytest.mark.parametrize(
    ("array", "dtype"),
    [
        (np.zeros((2, 3)), torch.float16),
        (np.array([[0.0], [np.inf]]), torch.float32),  # masks hold infinities
        (np.array([[1], [200]]), torch.uint8),
        (np.zeros((2, 3), bool), torch.bool),
        (np.zeros((2, 3), bool), torch.int64),
        (np.zeros((2, 3), np.uint16), torch.int64),
    ],
)
def test_values_that_it_takes(array: np.ndarray, dtype: torch.dtype) -> None:
    examine({"x": array}, Labels(), {"x": dtype})
    ((flat,), count) = next(stored_batches(["x"], [torch.zeros(1, dtype=dtype)], {"x": array}, size=8))
    assert flat.dtype == dtype and count == 2


def test_a_nan_in_the_targets_is_refused() -> None:
    with pytest.raises(InputError, match="'out' has NaN"):
        examine({"x": X}, Labels(targets={"out": np.full((4, 1), np.nan)}), {"x": torch.float32})


def test_the_digest_is_the_contents(tmp_path: Path) -> None:
    def digest(**arrays: Any) -> str:
        path = tmp_path / "d.npz"
        np.savez(path, **arrays)
        stored, known = load_data(path, ["x"])
        packed = tmp_path / "p.npz"
        np.savez_compressed(packed, **arrays)
        again, also = load_data(packed, ["x"])
        first = examine(stored, known, {"x": torch.float32})
        assert first == examine(again, also, {"x": torch.float32})
        return first

    one = digest(x=X, labels=np.arange(4))
    assert one == digest(labels=np.arange(4), x=X)
    others = [digest(x=X), digest(x=X + 1, labels=np.arange(4)), digest(x=X, labels=np.arange(4)[::-1])]
    assert len({one, *others}) == 4


def test_progress_is_told_in_bytes() -> None:
    told: list[tuple[str, int, int]] = []
    examine({"x": X}, Labels(), {"x": torch.float32}, lambda *x: told.append(x))
    assert told[-1] == ("data", X.nbytes, X.nbytes)


# -- batches -----------------------------------------------------------------------------------------------------------

ROWS = np.arange(9, dtype=np.float32)[:, None].repeat(3, 1)


def test_batches_give_every_row_once() -> None:
    found = list(stored_batches(("x", "s"), (torch.zeros(2, 3), 7), {"x": ROWS}, size=4))
    assert [(len(flat[0]), flat[1], count) for flat, count in found] == [(4, 7, 4), (4, 7, 4), (1, 7, 1)]
    assert torch.cat([flat[0] for flat, _ in found])[:, 0].tolist() == list(range(9))


def test_a_fixed_batch_is_filled_up() -> None:
    *_, (flat, count) = stored_batches(("x",), (torch.zeros(4, 3),), {"x": ROWS}, size=4, fixed=True)
    assert count == 1 and flat[0][:, 0].tolist() == [8, 8, 8, 8]
