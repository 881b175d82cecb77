"""All-or-nothing file output: a destination holds the whole old file or the whole new one, whatever happens.

Files are written into a hidden staging folder beside the destination, flushed to the disk, and renamed into place.
The rename of the ``.onnx`` file is the only commit. A model with external data keeps it in a file named after its
content (``net.<first 16 hex digits of its SHA-256>.data``), which is in place before the commit, so that the old model
keeps its old weights until then.

Two locks make this hold between processes, both on folders, so that no lock file is ever left behind: a run holds its
staging folder (a staging folder that nobody holds was left by a killed run and is removed by the next one), and a
commit holds the destination's folder (weights may only be removed while nobody is between placing theirs and renaming
the model that needs them). Where a file system cannot lock folders, old weights stay and leftovers wait a day.
"""

from __future__ import annotations

import errno
import mmap
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from bnfold.errors import BnfoldError, ResourceError, UsageError
from bnfold.files import sha256_of, there

if sys.platform != "win32":
    import fcntl

#: Weights of more bytes are written beside their model.
EXTERNAL_BYTES = 1 << 30
_SUFFIX = ".bnfold-tmp"
#: How the name of external data ends.
_DATA = re.compile(r"\.[0-9a-f]{16}\.data$")
_DAY = 86_400.0
_LOCK_WAIT = 60.0

#: What can stop any write, whoever does the writing, and what the user can do about it.
_EXHAUSTED: dict[int, str] = {
    errno.ENOSPC: "Free disk space there or choose another folder",
    errno.EDQUOT: "Free some of your quota there or choose another folder",
    errno.EFBIG: "Raise the file size limit (ulimit -f) or choose another file system",
    errno.EROFS: "Choose a folder that can be written",
    errno.EIO: "Check the disk or choose another one",
    errno.ENOMEM: "Free memory and run again",
    errno.ENAMETOOLONG: "Choose a shorter name",
}
_HINTS: dict[int, str] = _EXHAUSTED | {
    errno.EACCES: "Choose a folder you may write to, or change its permissions",
    errno.EPERM: "Choose a folder you may write to, or change its permissions",
    errno.ELOOP: "Remove the loop of symbolic links",
}


def check_destination(path: Path, *, sources: Iterable[Path] = ()) -> None:
    """Refuse a destination that could not be written, or must not be, before minutes of work go into it.

    UsageError where it is a folder, a device, or one of the ``sources`` that the run reads, also through a link;
    ResourceError where its folder is missing or cannot be written, or the file is write-protected.
    """
    target = _resolve(path)
    parent, where = target.parent, str(path)
    with _storage(target):
        if target.is_dir():
            raise UsageError("the output is a folder", where=where, hint="Name a file in it")
        if target.exists() and not target.is_file():
            raise UsageError("the output is not a regular file", where=where, hint="Name a regular file")
        for source in sources:
            if target.exists() and there(source) and target.samefile(source):
                raise UsageError(f"the output is the source {source}", where=where, hint="Choose another name")
        if not parent.is_dir():
            raise ResourceError(f"there is no folder {parent}", where=where, hint="Create it or choose another one")
        if target.exists() and not os.access(target, os.W_OK):
            raise ResourceError("the file is write-protected", where=where, hint="Choose another name, or chmod u+w it")
        # Permission bits do not tell about read-only mounts, quotas and access lists: only an attempt does.
        probe = Path(tempfile.mkdtemp(prefix=".check.", suffix=_SUFFIX, dir=parent))
        with suppress(FileNotFoundError):  # another run may have swept it as a leftover
            probe.rmdir()


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Write one file, or nothing; ResourceError as for ``stage``.

    Yields a path of the same file name, not existing yet, in a staging folder beside ``path``. When the block ends
    without an exception, the file written there replaces ``path``; otherwise ``path`` stays byte-identical.
    """
    with stage(path) as staging:
        yield staging.folder / staging.path.name
        staging.commit(staging.path.name)


@contextmanager
def stage(path: Path) -> Iterator[Staging]:
    """Open a staging folder beside ``path``; nothing but :meth:`Staging.commit` touches the destination.

    The folder and what is left in it go when the block ends, committed or not. ResourceError where the folder cannot be
    written, and where writing inside the block fails (disk full, quota, memory), whatever the library that wrote calls
    it.
    """
    target = _resolve(path)
    with _storage(target):
        _sweep(target.parent)
    # The name is known before the folder is there, so that no interruption can come between the two.
    folder = target.parent / f".{target.name[:40]}.{os.getpid()}-{secrets.token_hex(4)}{_SUFFIX}"
    lock = None
    try:
        with _storage(target):
            lock = _claim(folder)
        yield Staging(target, folder, asked=path)
    except BnfoldError:
        raise
    except Exception as error:
        if (code := _exhaustion(error)) is not None:
            raise _resource_error(code, target) from error
        raise
    finally:
        try:
            shutil.rmtree(folder, ignore_errors=True)
        except BaseException:  # an interruption in the middle of it
            shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            _release(lock)


@dataclass(frozen=True)
class Staging:
    """Files on their way to a destination."""

    path: Path  #: the destination, symbolic links resolved.
    #: the staging folder, beside ``path`` and on the same file system. Write here, and check here too: an ONNX file
    #: finds its external data in the same folder before and after the commit.
    folder: Path
    asked: Path  #: the destination as the caller named it.

    def seal_data(self, file: str) -> tuple[str, str]:
        """Give a finished external data file its content-derived name, within the staging folder.

        That name, to be written as ``location`` into the ONNX file, and the full SHA-256 in hex.
        """
        digest = sha256_of(self.folder / file)
        name = f"{self.path.stem}.{digest[:16]}.data"
        (self.folder / file).replace(self.folder / name)
        return name, digest

    def commit(self, file: str, data: str | None = None, *, name: str | None = None) -> None:
        """Move the staged ``file``, and its ``data`` if any, to the destination.

        Args:
            file: name of the staged file that becomes the destination.
            data: name of its external data file, as :meth:`seal_data` gave it.
            name: another file name, in the destination's folder, to be written instead of the destination.

        Raises:
            UsageError: the destination is a link into another folder, where readers would not find ``data``.
            ResourceError: the files could not be stored; the destination is as before.
        """
        target = self.path if name is None else self.path.with_name(name)
        if data is not None and name is None and _resolve(self.asked.parent) != target.parent:
            what = f"the output is a link into {target.parent}, and ONNX Runtime reads no external data through a link"
            raise UsageError(what, where=str(self.asked), hint=f"Write to {target} itself")
        staged = [self.folder / part for part in (file, data) if part is not None]
        for missing in (part for part in staged if not part.is_file()):
            raise FileNotFoundError(f"nothing was written to {missing}")
        with _storage(target):
            self._settle(staged, target)
            with _exclusive(target.parent) as alone:
                if data is not None:
                    _place_data(self.folder / data, target.parent / data, keep=not alone, commit=staged[0], to=target)
                else:
                    staged[0].replace(target)
                _sync_folder(target.parent)
                if alone and target.suffix == ".onnx":
                    _drop_stale_data(target)

    def _settle(self, staged: list[Path], target: Path) -> None:
        """Bring staged files to the disk, with the owner and mode of the file replaced, or of a newly opened one."""
        probe = target
        if not target.exists():
            # The umask can be read only by setting it, which other threads would see: ask the file system instead.
            probe = self.folder / ".mode"
            probe.touch()
        like = probe.stat()
        for path in staged:
            with path.open("rb+") as opened:
                os.fsync(opened.fileno())
            if sys.platform != "win32" and like.st_uid != path.stat().st_uid:
                with suppress(OSError):
                    os.chown(path, like.st_uid, like.st_gid)
            path.chmod(stat.S_IMODE(like.st_mode))


def _place_data(source: Path, placed: Path, *, keep: bool, commit: Path, to: Path) -> None:
    """Put external data in place, then commit; take data back that was new, unless another writer may count on it."""
    existed = placed.exists()
    # Identical data may be there already: the name is its digest, and replacing also repairs a damaged copy.
    source.replace(placed)
    try:
        _sync_folder(placed.parent)
        commit.replace(to)
    except BaseException:
        if not existed and not keep and commit.exists():
            placed.unlink(missing_ok=True)
        raise


def _drop_stale_data(target: Path) -> None:
    """Remove data files of this stem that no file in the folder mentions, the new model included.

    A model may be called anything by now, so every file is asked that is no such data itself; one that cannot be read
    may mention them all.
    """
    pattern = re.compile(re.escape(target.stem) + _DATA.pattern)
    # The commit is done: a failure to tidy up is not a failure to store.
    with suppress(OSError):
        entries = list(target.parent.iterdir())
        stale = [entry for entry in entries if pattern.fullmatch(entry.name) and not entry.is_symlink()]
        others = [entry for entry in entries if entry.is_file() and not _DATA.search(entry.name)]
        for entry in stale:
            if not any(_mentions(other, entry.name) for other in others):
                entry.unlink()


def _mentions(file: Path, name: str) -> bool:
    if file.stat().st_size == 0:
        return False
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(os.fsencode(name)) >= 0


def _resolve(path: Path) -> Path:
    # Path.resolve raises on a loop of links and Path.absolute keeps links; the folder, too, may be one.
    return Path(os.path.realpath(path))


def _claim(folder: Path) -> int | None:
    """Makes a staging folder; the lock that shows it is in use."""
    while True:
        folder.mkdir(mode=0o700, exist_ok=True)
        # Another run may take the folder for a leftover in the instant before it is locked.
        with suppress(BlockingIOError, FileNotFoundError):
            lock = _lock(folder)
            if folder.exists():
                return lock
            _release(lock)


def _sweep(parent: Path) -> None:
    """Remove the staging folders that killed runs left in ``parent``."""
    for folder in parent.glob(f".*{_SUFFIX}"):
        # Held by a live run, gone meanwhile, or another user's.
        with suppress(OSError):
            lock = _lock(folder)
            try:
                if lock is not None or time.time() - folder.stat().st_mtime > _DAY:
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                _release(lock)


def _lock(folder: Path) -> int | None:
    """Lock a folder; None where the file system cannot, BlockingIOError where another run holds it.

    The kernel releases the lock of a process that dies.
    """
    if sys.platform == "win32":
        return None
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except PermissionError:  # a folder may be writable without being readable
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise
    except OSError:
        os.close(handle)
        return None
    return handle


def _release(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)


@contextmanager
def _exclusive(folder: Path) -> Iterator[bool]:
    """Keep other commits out of ``folder``; yields False where the file system cannot promise that."""
    deadline = time.monotonic() + _LOCK_WAIT
    while True:
        try:
            lock = _lock(folder)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                hint = "End it or choose another folder"
                raise ResourceError("another process keeps this folder locked", where=str(folder), hint=hint) from None
            time.sleep(0.01)
    try:
        yield lock is not None
    finally:
        _release(lock)


def _sync_folder(folder: Path) -> None:
    # Not every file system can sync a folder; the renames in it are atomic all the same.
    if sys.platform == "win32":
        return
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def _storage(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _resource_error(error.errno, target) from error


def _resource_error(code: int | None, target: Path) -> ResourceError:
    fact = os.strerror(code) if code else "the disk did not take the whole file"
    hint = _HINTS.get(code or errno.ENOSPC, "Choose another folder")
    return ResourceError(f"could not be written: {fact}", where=str(target), hint=hint)


def _exhaustion(error: Exception) -> int | None:
    """The errno (0: unknown) behind a failed write, None for every other exception."""
    if isinstance(error, MemoryError):
        return errno.ENOMEM
    if isinstance(error, OSError):
        return error.errno if error.errno in _EXHAUSTED else None
    # safetensors (Rust) and torch's zip writer (C++) wrap the system's error in exceptions of their own.
    if found := re.search(r"\(os error (\d+)\)", str(error)):
        return int(found[1]) if int(found[1]) in _EXHAUSTED else None
    return 0 if re.search(r"PytorchStreamWriter|inline_container\S* \. unexpected pos", str(error)) else None
