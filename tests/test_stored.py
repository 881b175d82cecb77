"""Arrays in files: every row, whatever the file's form, from a few rows of memory; damage is one line."""

from __future__ import annotations

import io
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bnfold.errors import InputError
from bnfold.gate.stored import Stored, in_order, open_arrays

X = np.arange(60, dtype=np.float32).reshape(20, 3)


def saved(path: Path, array: Any) -> Path:
    """``array`` in the form that the file's name asks for."""
    if path.suffix == ".npy":
        np.save(path, array)
    else:
        {"stored": np.savez, "packed": np.savez_compressed}[path.stem](path, x=array)
    return path


FORMS = ("x.npy", "stored.npz", "packed.npz")


def opened(path: Path) -> Any:
    (rows,) = open_arrays(path).values()
    return rows


@pytest.mark.parametrize("form", FORMS)
def test_rows_come_back_in_order_and_by_index(form: str, tmp_path: Path) -> None:
    rows = opened(saved(tmp_path / form, X))
    assert isinstance(rows, Stored) and rows.shape == (20, 3) and rows.ndim == 2 and len(rows) == 20
    assert rows.dtype == np.float32
    chunks = list(in_order(rows, 7))
    assert [len(chunk) for chunk in chunks] == [7, 7, 6]
    np.testing.assert_array_equal(np.concatenate(chunks), X)
    np.testing.assert_array_equal(rows[np.array([19, 0, 0, 7])], X[[19, 0, 0, 7]])
    np.testing.assert_array_equal(rows[3:6], X[3:6])
    np.testing.assert_array_equal(np.concatenate(list(in_order(X, 7))), X)


@settings(max_examples=40, deadline=None)
@given(
    array=hnp.arrays(
        st.sampled_from(["<f4", ">f4", "<i2", ">i8", "u1", "?", "<f2"]),
        hnp.array_shapes(min_dims=1, max_dims=4, min_side=1, max_side=5),
        elements=st.integers(0, 1),
    ),
    form=st.sampled_from(FORMS),
    size=st.integers(1, 6),
    fortran=st.booleans(),
)
def test_any_array_survives(array: np.ndarray, form: str, size: int, fortran: bool, tmp_path_factory: Any) -> None:
    array = np.asfortranarray(array) if fortran else array
    rows = opened(saved(tmp_path_factory.mktemp("any") / form, array))
    found = np.concatenate(list(in_order(rows, size)))
    np.testing.assert_array_equal(found, array)
    assert found.dtype.isnative and rows.dtype.isnative


def damaged(kind: str, folder: Path) -> Path:
    path = saved(folder / ("x.npy" if kind.startswith("npy") else "stored.npz"), X)
    content = bytearray(path.read_bytes())
    if kind == "missing":
        return folder / "none.npz"
    if kind == "folder":
        return folder
    if kind == "flipped":
        content[content.index(X.tobytes()) + 5] ^= 1
    if kind == "packed and flipped":
        content = bytearray(saved(folder / "packed.npz", X).read_bytes())
        content[100] ^= 8
    if kind == "npy of another version":
        content[6] = 9
    if kind == "npy that lies about its size":
        content = bytearray(bytes(content).replace(b"(20, 3)", b"(99, 3)"))
    if kind == "pickle":
        content = bytearray(b"\x80\x04cos\nsystem\n.")
    if kind == "member that lies about its size":
        member = io.BytesIO()
        np.save(member, X)
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x.npy", member.getvalue().replace(b"(20, 3)", b"(10, 3)"))
        return path
    if kind == "encrypted":
        content[6] |= 1
        content[content.index(b"PK\x01\x02") + 8] |= 1
    other = {"empty": b"", "text": b"a,b\n1,2\n", "short": bytes(content[:-40]), "npy short": bytes(content[:-1])}
    path.write_bytes(other.get(kind, bytes(content)))
    return path


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("missing", "no such file"),
        ("folder", "this is a folder"),
        ("empty", "no readable NumPy file"),
        ("text", "neither .npz nor .npy"),
        ("short", "no readable NumPy file"),
        ("npy short", "no readable NumPy file"),
        ("npy of another version", "no readable NumPy file"),
        ("npy that lies about its size", "bytes instead of"),
        ("member that lies about its size", "bytes instead of"),
        ("flipped", "Bad CRC-32"),
        ("packed and flipped", "no readable NumPy file"),
        ("encrypted", "encrypted"),
        ("pickle", "neither .npz nor .npy"),
    ],
)
def test_damage_is_one_line(kind: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=says) as caught:
        np.concatenate(list(in_order(opened(damaged(kind, tmp_path)), 4)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("form", FORMS)
def test_python_objects_are_refused(form: str, tmp_path: Path) -> None:
    path = saved(tmp_path / form, np.array([{}, []], dtype=object))
    with pytest.raises(InputError, match="Python objects"):
        open_arrays(path)


MEASURE = """
import sys
from pathlib import Path
from bnfold.gate.stored import in_order, open_arrays
(rows,) = open_arrays(Path(sys.argv[1])).values()
total = sum(float(chunk[0, 0]) for chunk in in_order(rows, 64)) + float(rows[[5, len(rows) - 1]].sum())
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells the largest resident set")
@pytest.mark.parametrize("form", FORMS)
def test_memory_does_not_grow_with_the_rows(form: str, tmp_path: Path) -> None:
    peaks = []
    for rows in (200, 40_000):  # 0.2 and 40 MB
        path = saved(tmp_path / form, np.random.default_rng(0).integers(0, 9, (rows, 128)).astype(np.float64))
        peaks.append(int(subprocess.check_output([sys.executable, "-c", MEASURE, str(path)])))
    assert peaks[1] - peaks[0] < 4_000  # KB: a tenth of the file
