"""Folders and files that are local or anything that ``fsspec`` opens: ``s3://``, ``gs://``, ``http://`` and so on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bnfold.errors import InputError, ProviderError, ResourceError
from bnfold.store import atomic


def is_url(text: str) -> bool:
    """Whether ``text`` names something that is not a path of this machine."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+(::|://)", text) is not None


def file_system(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it.

    InputError where there is no such kind of URL, ProviderError where the package that opens it is not installed.
    """
    import fsspec

    try:
        found: tuple[Any, str] = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise ProviderError(f"a package is missing for it: {error}", where=url) from error
    except ValueError as error:
        raise InputError(str(error), where=url) from error
    return found


@contextmanager
def fetched(place: str) -> Iterator[Path]:
    """A file as one of this machine, under its own name; InputError where it cannot be read."""
    if not is_url(place):
        yield Path(place)
        return
    system, path = file_system(place)
    with TemporaryDirectory(prefix="bnfold-") as folder:
        target = Path(folder, Path(path).name)
        try:
            system.get_file(path, str(target))
        except Exception as error:  # every file system has errors of its own
            raise InputError(f"it cannot be read: {type(error).__name__}: {error}", where=place) from error
        yield target


def matching(pattern: str) -> list[str]:
    """The files that a pattern names, in the order of their names."""
    if is_url(pattern):
        system, path = file_system(pattern)
        return [str(system.unstrip_protocol(found)) for found in sorted(system.glob(path))]
    folder, parts = (Path("/"), pattern.lstrip("/")) if Path(pattern).is_absolute() else (Path(), pattern)
    return sorted(str(path) for path in folder.glob(parts) if path.is_file())


class Folder:
    """Where results go; a file in it is whole or absent."""

    def __init__(self, place: str) -> None:
        self.place, self.remote = place.rstrip("/"), is_url(place)
        self._system: Any = None
        self._root = self.place
        if self.remote:
            self._system, self._root = file_system(self.place)

    def __truediv__(self, name: str) -> str:
        return f"{self._root}/{name}"

    def make(self) -> None:
        """Makes the folder, and that of the records; ResourceError where it cannot be made."""
        try:
            if not self.remote:
                Path(self / ".fleet").mkdir(parents=True, exist_ok=True)
            else:
                with suppress(NotImplementedError):  # a store that has no folders needs none
                    self._system.makedirs(self / ".fleet", exist_ok=True)
        except OSError as error:
            what = f"the folder cannot be made: {error.strerror or error}"
            raise ResourceError(what, where=self.place, hint="Choose another folder") from error

    def read(self, name: str) -> bytes | None:
        """A file's content; None where there is none."""
        try:
            content: bytes = self._system.cat_file(self / name) if self.remote else Path(self / name).read_bytes()
        except OSError:
            return None
        return content

    def write(self, name: str, content: bytes) -> None:
        """Writes a file; ResourceError where it cannot be written."""
        if not self.remote:
            with atomic(Path(self / name)) as staged:
                staged.write_bytes(content)
            return
        with TemporaryDirectory(prefix="bnfold-") as folder:
            staged = Path(folder, "content")
            staged.write_bytes(content)
            self.put(staged, name)

    def put(self, file: Path, name: str) -> None:
        """Copies a file to a remote folder; ResourceError where it cannot be written."""
        try:
            self._system.put_file(str(file), self / name)
        except Exception as error:
            what = f"could not be written: {type(error).__name__}: {error}"
            raise ResourceError(what, where=f"{self.place}/{name}") from error

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is none."""
        try:
            found: int = self._system.size(self / name) if self.remote else Path(self / name).stat().st_size
        except OSError:
            return None
        return found
