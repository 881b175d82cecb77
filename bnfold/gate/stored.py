"""Arrays in .npy and .npz files, read a few rows at a time: memory does not grow with the number of rows.

An array in Fortran order is the exception: its rows lie scattered all over the file, so it is read as a whole.
"""

from __future__ import annotations

import contextlib
import math
import zipfile
import zlib
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy

from bnfold.errors import InputError
from bnfold.files import require_file

#: Bytes that are unpacked at a time on the way to a row.
_PIECE = 1 << 18
_WRITE = "Write it with numpy.savez(path, x=..., labels=...)"
_DAMAGED = (OSError, ValueError, EOFError, MemoryError, RuntimeError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class Stored:
    """An array in an .npy, or a ``member`` of an .npz, of which only the rows asked for are in memory.

    ``stored`` is its dtype in the byte order of the file, ``offset`` where the first row begins.
    """

    path: Path
    member: str | None
    shape: tuple[int, ...]
    stored: np.dtype[Any]
    offset: int

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the rows, in the byte order of this machine."""
        return self.stored.newbyteorder("=")

    @property
    def ndim(self) -> int:
        """How many axes there are."""
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: slice | np.ndarray) -> np.ndarray:
        """The rows of a slice, or of an array of indices, in its order."""
        wanted, places = np.unique(np.arange(len(self))[key], return_inverse=True)
        rows = np.empty((len(wanted), *self.shape[1:]), self.dtype)
        with _open(self.path, self.member) as file:
            for i, index in enumerate(wanted):  # forward only: an archive unpacks again to go back
                _skip(file, self.offset + int(index) * self._row_bytes)
                rows[i] = self._take(file, 1)[0]
        return rows[places]

    def in_order(self, size: int) -> Iterator[np.ndarray]:
        """All rows, ``size`` at a time."""
        with _open(self.path, self.member) as file:
            _skip(file, self.offset)
            for start in range(0, len(self), size):
                yield self._take(file, min(size, len(self) - start))
            file.read(1)  # an archive compares its checksum at the end

    @property
    def _row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.stored.itemsize

    def _take(self, file: IO[bytes], count: int) -> np.ndarray:
        wanted = count * self._row_bytes
        content = file.read(wanted)
        if len(content) < wanted:
            raise EOFError("the file ends too early")
        rows = np.frombuffer(bytearray(content), self.stored).reshape(count, *self.shape[1:])
        return rows.astype(self.dtype, copy=False)


#: What can be read row by row, samples first: an array, or one in a file.
Rows = np.ndarray | Stored


def open_arrays(path: Path) -> dict[str, Rows]:
    """Every array of an .npz; that of an .npy has the name "".

    Raises:
        InputError: missing, damaged or no NumPy file, or one that holds Python objects.
    """
    require_file(path)
    try:
        with path.open("rb") as file:
            begins = file.read(6)
        if not begins.startswith((b"PK", b"\x93NUMPY")):
            raise ValueError("it is neither .npz nor .npy")
        if not begins.startswith(b"PK"):
            return {"": _header(path, None, path.stat().st_size)}
        with zipfile.ZipFile(path) as archive:
            members = [info for info in archive.infolist() if info.filename.endswith(".npy")]
        return {info.filename.removesuffix(".npy"): _header(path, info.filename, info.file_size) for info in members}
    except _DAMAGED as error:
        raise _damaged(path, error) from error


def in_order(rows: Rows, size: int) -> Generator[np.ndarray]:
    """All of ``rows``, ``size`` at a time."""
    if isinstance(rows, Stored):
        yield from rows.in_order(size)
    else:
        yield from (rows[start : start + size] for start in range(0, len(rows), size))


def _header(path: Path, member: str | None, size: int) -> Rows:
    with _open(path, member) as file:
        version = npy.read_magic(file)
        read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
        if read is None:
            raise ValueError(f"version {version} of the format")
        try:
            shape, fortran, dtype = read(file)
        except Exception as error:  # the header is parsed as Python, which raises anything
            raise ValueError("its header is damaged") from error
        offset = file.tell()
        if any(size < 0 for size in shape):
            raise ValueError(f"a shape of {shape}")
        if dtype.hasobject:
            hint = "Save arrays of numbers with numpy.savez; bnfold unpickles nothing from a data file"
            raise InputError("the file holds Python objects, no plain arrays", where=str(path), hint=hint)
        if (whole := offset + math.prod(shape) * dtype.itemsize) != size:
            raise ValueError(f"{size} bytes instead of {whole}")
        if fortran and len(shape) > 1:  # its rows are scattered all over the file, so it is read as a whole
            flat = np.frombuffer(bytearray(file.read()), dtype)
            return np.ascontiguousarray(flat.reshape(shape, order="F"), dtype.newbyteorder("="))
    return Stored(path, member, shape, dtype, offset)


@contextlib.contextmanager
def _open(path: Path, member: str | None) -> Iterator[IO[bytes]]:
    with contextlib.ExitStack() as stack:
        try:
            if member is None:
                yield stack.enter_context(path.open("rb"))
            else:
                archive = stack.enter_context(zipfile.ZipFile(path))
                yield stack.enter_context(archive.open(member))
        except _DAMAGED as error:
            raise _damaged(path, error) from error


def _skip(file: IO[bytes], offset: int) -> None:
    """Goes forward to ``offset``."""
    if not isinstance(file, zipfile.ZipExtFile):
        file.seek(offset)
        return
    while (ahead := offset - file.tell()) > 0:  # its own seek unpacks 16 MB at a time
        if not file.read(min(ahead, _PIECE)):
            raise EOFError("the file ends too early")


def _damaged(path: Path, error: Exception) -> InputError:
    return InputError(f"this is no readable NumPy file ({error})", where=str(path), hint=_WRITE)
