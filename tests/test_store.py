"""All-or-nothing output: every failure leaves the old file whole, and leaves nothing else."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import resource
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import BOUND

from bnfold import store
from bnfold.errors import BnfoldError, LowerError, ResourceError, UsageError
from bnfold.store import Staging, atomic, check_destination, stage

ROOT = Path(__file__).parent.parent
OLD = b"the old file, whole"
NEW = b"the new file, whole" * 1000


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def write_model(staging: Staging, weights: bytes) -> str:
    """Stage a stand-in for an ONNX file with external data: it holds its data file's name and digest."""
    (staging.folder / "weights").write_bytes(weights)
    name, digest = staging.seal_data("weights")
    (staging.folder / "model").write_bytes(f"onnx {name} {digest}".encode())
    return name


def export(path: Path, weights: bytes) -> str:
    with stage(path) as staging:
        name = write_model(staging, weights)
        staging.commit("model", name)
    return name


def read_model(path: Path) -> bytes:
    """The weights that a model file names, after comparing them with the digest it holds."""
    kind, name, digest = path.read_text().split()
    weights = (path.parent / name).read_bytes()
    assert kind == "onnx" and hashlib.sha256(weights).hexdigest() == digest
    return weights


# --- one file ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("old", [None, OLD])
def test_atomic_writes_the_whole_file_and_leaves_nothing_else(tmp_path: Path, old: bytes | None) -> None:
    path = tmp_path / "net.onnx"
    if old is not None:
        path.write_bytes(old)
    with atomic(path) as temporary:
        assert temporary.name == path.name and not temporary.exists()
        temporary.write_bytes(NEW)
        assert (path.read_bytes() if old else None) == old, "nothing may change before the commit"
    assert path.read_bytes() == NEW
    assert names(tmp_path) == {"net.onnx"}


@pytest.mark.parametrize("error", [ValueError("gate"), KeyboardInterrupt(), SystemExit(1), LowerError("lower")])
def test_atomic_keeps_the_old_file_on_any_exception(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(OLD)
    with pytest.raises(type(error)) as caught, atomic(path) as temporary:
        temporary.write_bytes(NEW)
        raise error
    assert caught.value is error, "an error that is not about storage keeps its class"
    assert path.read_bytes() == OLD
    assert names(tmp_path) == {"net.onnx"}


def test_atomic_refuses_a_body_that_wrote_nothing(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(OLD)
    with pytest.raises(FileNotFoundError, match="nothing was written"), atomic(path):
        pass
    assert path.read_bytes() == OLD and names(tmp_path) == {"net.onnx"}


def test_stage_without_commit_writes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    with stage(path) as staging:
        write_model(staging, NEW)
    assert names(tmp_path) == set()


def test_commit_under_another_name_leaves_the_destination(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(OLD)
    with stage(path) as staging:
        staging.commit("model", write_model(staging, NEW), name="net.failed.onnx")
    assert path.read_bytes() == OLD
    assert read_model(tmp_path / "net.failed.onnx") == NEW


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_a_new_file_has_the_mode_of_a_normal_open(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        (tmp_path / "plain").write_bytes(b"")
        with atomic(tmp_path / "net.onnx") as temporary:
            temporary.write_bytes(NEW)
            temporary.chmod(0o600)  # some writers create private files
    finally:
        os.umask(before)
    assert (tmp_path / "net.onnx").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert names(tmp_path) == {"plain", "net.onnx"}


def test_a_replaced_file_keeps_its_mode_and_owner(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(OLD)
    path.chmod(0o640)
    with suppress(PermissionError):  # only root may give files away
        os.chown(path, 1234, 1234)
    before = path.stat()
    data = export(path, NEW)
    for after in (path.stat(), (tmp_path / data).stat()):
        assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)


def test_a_link_is_written_through(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "net.onnx").write_bytes(OLD)
    link = tmp_path / "latest.onnx"
    link.symlink_to("store/net.onnx")
    with atomic(link) as temporary:
        temporary.write_bytes(NEW)
    assert link.is_symlink() and link.readlink() == Path("store/net.onnx")
    assert (tmp_path / "store" / "net.onnx").read_bytes() == NEW
    assert names(tmp_path) == {"store", "latest.onnx"} and names(tmp_path / "store") == {"net.onnx"}


def test_a_dangling_link_creates_its_target(tmp_path: Path) -> None:
    link = tmp_path / "latest.onnx"
    link.symlink_to("net.onnx")
    with atomic(link) as temporary:
        temporary.write_bytes(NEW)
    assert link.is_symlink() and (tmp_path / "net.onnx").read_bytes() == NEW


def test_a_long_name_and_a_relative_path_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path("n" * 250 + ".onnx")
    with atomic(path) as temporary:
        temporary.write_bytes(NEW)
    assert path.read_bytes() == NEW and names(tmp_path) == {path.name}


# --- external data ----------------------------------------------------------------------------------------------------


def test_external_data_is_named_after_its_content(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    name = export(path, NEW)
    assert name == f"net.{hashlib.sha256(NEW).hexdigest()[:16]}.data"
    assert read_model(path) == NEW and names(tmp_path) == {"net.onnx", name}


def test_external_data_that_is_there_already_stays_and_a_damaged_copy_is_repaired(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    name = export(path, NEW)
    assert export(path, NEW) == name and read_model(path) == NEW
    (tmp_path / name).write_bytes(b"flipped")
    export(path, NEW)
    assert read_model(path) == NEW and names(tmp_path) == {"net.onnx", name}


def test_old_external_data_goes_after_the_commit(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    export(path, b"first")
    name = export(path, b"second")
    assert names(tmp_path) == {"net.onnx", name}
    with atomic(path) as temporary:
        temporary.write_bytes(b"inline")
    assert names(tmp_path) == {"net.onnx"}


@pytest.mark.parametrize(
    "other",
    [
        "net.data",
        "net.0123456789abcde.data",
        "net.0123456789abcdef0.data",
        "net.0123456789ABCDEF.data",
        "net.0123456789abcdef.data.bak",
        "net2.0123456789abcdef.data",
        "net.v2.0123456789abcdef.data",
        "xnet.0123456789abcdef.data",
    ],
)
def test_nobody_elses_data_is_removed(tmp_path: Path, other: str) -> None:
    (tmp_path / other).write_bytes(b"precious")
    name = export(tmp_path / "net.onnx", NEW)
    assert names(tmp_path) == {"net.onnx", name, other}


def test_a_link_of_that_name_is_nobody_elses_either(tmp_path: Path) -> None:
    link = tmp_path / "net.0123456789abcdef.data"
    link.symlink_to("elsewhere")
    export(tmp_path / "net.onnx", NEW)
    assert link.is_symlink()


@pytest.mark.parametrize("backup", ["backup.onnx", "net.onnx.bak", "net_v1.model", "net", ".hidden", "net.data", "a b"])
def test_data_that_a_copy_of_the_model_needs_is_kept(tmp_path: Path, backup: str) -> None:
    path = tmp_path / "net.onnx"
    export(path, b"first")
    (tmp_path / backup).write_bytes(path.read_bytes())
    (tmp_path / "empty.onnx").touch()
    export(path, b"second")
    assert read_model(path) == b"second" and read_model(tmp_path / backup) == b"first"
    (tmp_path / backup).unlink()
    export(path, b"third")
    assert len(names(tmp_path)) == 3


def test_a_model_that_was_renamed_keeps_its_data(tmp_path: Path) -> None:
    export(tmp_path / "net.onnx", b"first")
    (tmp_path / "net.onnx").rename(tmp_path / "net_v1.model")
    export(tmp_path / "net.onnx", b"second")
    assert read_model(tmp_path / "net_v1.model") == b"first" and read_model(tmp_path / "net.onnx") == b"second"


def test_what_cannot_be_read_may_need_any_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = export(tmp_path / "net.onnx", b"first")
    (tmp_path / "secret").write_bytes(b"model")
    opened = Path.open

    def refused(self: Path, *args: Any, **options: Any) -> Any:
        if self.name == "secret":
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(self, *args, **options)

    monkeypatch.setattr(Path, "open", refused)
    second = export(tmp_path / "net.onnx", b"second")
    assert names(tmp_path) == {"net.onnx", "secret", first, second} and read_model(tmp_path / "net.onnx") == b"second"


def test_another_kind_of_output_leaves_the_model_of_the_same_stem_alone(tmp_path: Path) -> None:
    name = export(tmp_path / "net.onnx", NEW)
    (tmp_path / "net.onnx").rename(tmp_path / "renamed")
    with atomic(tmp_path / "net.pt2") as temporary:
        temporary.write_bytes(NEW)
    assert names(tmp_path) == {"renamed", "net.pt2", name}


def test_external_data_through_a_link_works_in_one_folder_and_is_refused_across(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    near, far = tmp_path / "near.onnx", tmp_path / "elsewhere" / "far.onnx"
    near.symlink_to("net.onnx")
    far.symlink_to(tmp_path / "net.onnx")
    export(near, b"first")
    assert read_model(near) == b"first"
    before = names(tmp_path)
    with pytest.raises(UsageError, match=f"Write to {tmp_path / 'net.onnx'}"):
        export(far, b"second")
    assert read_model(near) == b"first" and names(tmp_path) == before


def test_data_is_taken_back_when_the_commit_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "net.onnx"
    export(path, b"first")
    before = names(tmp_path)
    replace = Path.replace

    def failing(self: Path, target: Path) -> Path:
        if Path(target) == path:
            raise OSError(errno.EIO, "Input/output error")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", failing)
    for weights in (b"first", b"second"):  # the first is also the old model's, and must stay
        with pytest.raises(ResourceError, match="Check the disk"):
            export(path, weights)
        assert names(tmp_path) == before and read_model(path) == b"first"


# --- interruption at every step ---------------------------------------------------------------------------------------

#: Every call by which store.py changes or settles anything on the disk.
HOOKS = ("Path.mkdir", "os.fsync", "os.chown", "Path.replace", "Path.unlink", "Path.chmod", "shutil.rmtree")


@contextmanager
def hooked(step: int, act: Callable[[], None], where: str) -> Iterator[list[str]]:
    """Call ``act`` before or after the ``step``-th of the calls in HOOKS; yields the calls made."""
    calls: list[str] = []
    saved = []

    def wrap(name: str, function: Callable[..., object]) -> Callable[..., object]:
        def wrapper(*args: object, **kwargs: object) -> object:
            calls.append(name)
            now = len(calls) == step
            if now and where == "before":
                act()
            result = function(*args, **kwargs)
            if now and where == "after":
                act()
            return result

        return wrapper

    for hook in HOOKS:
        owner, attribute = hook.split(".")
        module = getattr(store, owner)
        saved.append((module, attribute, module.__dict__[attribute]))
        setattr(module, attribute, wrap(hook, module.__dict__[attribute]))
    try:
        yield calls
    finally:
        for module, attribute, function in saved:
            setattr(module, attribute, function)


def count_steps(folder: Path) -> list[str]:
    folder.mkdir()
    export(folder / "net.onnx", b"first")
    with hooked(0, lambda: None, "before") as calls:
        export(folder / "net.onnx", b"second")
    assert {"Path.mkdir", "os.fsync", "Path.replace", "Path.unlink", "shutil.rmtree"} <= set(calls)
    return calls


def assert_whole(path: Path) -> None:
    assert read_model(path) in (b"first", b"second")


@pytest.mark.parametrize("where", ["before", "after"])
def test_an_interrupt_at_any_step_leaves_a_whole_model(tmp_path: Path, where: str) -> None:
    for step in range(1, len(count_steps(tmp_path / "count")) + 1):
        folder = tmp_path / str(step)
        folder.mkdir()
        path = folder / "net.onnx"
        export(path, b"first")

        def interrupt() -> None:
            raise KeyboardInterrupt

        with hooked(step, interrupt, where), pytest.raises(KeyboardInterrupt):
            export(path, b"second")
        assert_whole(path)
        assert not [name for name in names(folder) if name.endswith(".bnfold-tmp")], "an interruption is no kill"
        export(path, b"third")
        assert read_model(path) == b"third" and len(names(folder)) == 2, step


#: Forks where nothing has started a thread, so that a process per step costs no start of Python.
VICTIMS = """
import json, os, signal, sys
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
from test_store import export, hooked
for path, step, where in json.loads(sys.argv[1]):
    if not (child := os.fork()):
        with hooked(step, lambda: os.kill(os.getpid(), signal.SIGKILL), where):
            export(Path(path), b"second")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, (step, where)
"""


def test_a_kill_at_any_step_leaves_a_whole_model_and_the_next_run_tidies_up(tmp_path: Path) -> None:
    script = VICTIMS.format(root=str(ROOT), tests=str(ROOT / "tests"))
    steps = len(count_steps(tmp_path / "count"))
    points = [(step, "before") for step in range(1, steps + 1)] + [(steps, "after")]
    runs = [(tmp_path / f"{step}-{where}" / "net.onnx", step, where) for step, where in points]
    for path, _, _ in runs:
        path.parent.mkdir()
        export(path, b"first")
    killed = json.dumps([(str(path), step, where) for path, step, where in runs])
    subprocess.run([sys.executable, "-c", script, killed], check=True, timeout=120)
    left = 0
    for path, _, _ in runs:
        assert_whole(path)
        left += any(name.endswith(".bnfold-tmp") for name in names(path.parent))
        export(path, b"third")
        assert read_model(path) == b"third" and len(names(path.parent)) == 2, path
    assert left > 5, "most kills must leave a staging folder, else this test proves nothing"


def test_a_live_runs_staging_folder_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    with stage(path) as staging:
        os.utime(staging.folder, (0, 0))
        name = write_model(staging, b"slow")
        export(path, b"fast")
        assert read_model(path) == b"fast" and staging.folder.is_dir()
        staging.commit("model", name)
    assert read_model(path) == b"slow" and names(tmp_path) == {"net.onnx", name}


@pytest.mark.parametrize(("age", "left"), [(86_000, True), (87_000, False)])
def test_leftovers_wait_a_day_where_folders_cannot_be_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, age: int, left: bool
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr("fcntl.flock", unsupported)
    leftover = tmp_path / ".net.onnx.1-abc.bnfold-tmp"
    leftover.mkdir()
    os.utime(leftover, (time.time() - age,) * 2)
    export(tmp_path / "net.onnx", b"first")
    assert leftover.exists() is left
    export(tmp_path / "net.onnx", b"second")
    data = [name for name in names(tmp_path) if name.endswith(".data")]
    assert len(data) == 2, "without a lock another writer may still count on the old data"


def test_sweeping_never_follows_a_link(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_bytes(OLD)
    (tmp_path / ".trap.bnfold-tmp").symlink_to("precious")
    export(tmp_path / "net.onnx", NEW)
    assert (tmp_path / "precious" / "file").read_bytes() == OLD


# --- two writers ------------------------------------------------------------------------------------------------------

WRITER = """
import sys
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
from test_store import export
path, content = Path(sys.argv[1]), sys.argv[2].encode()
for line in sys.stdin:
    export(path, content * 1000 + line.encode())
    print("done", flush=True)
"""


def test_two_writers_end_as_one_of_the_two(tmp_path: Path) -> None:
    script = tmp_path / "writer.py"
    script.write_text(WRITER.format(root=str(ROOT), tests=str(ROOT / "tests")))
    folder = tmp_path / "out"
    folder.mkdir()
    path = folder / "net.onnx"
    command = [sys.executable, str(script), str(path)]
    writers = [
        subprocess.Popen([*command, letter], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for letter in "AB"
    ]
    winners = set()
    for turn in range(50):
        for writer in writers:
            assert writer.stdin is not None
            writer.stdin.write(f"{turn}\n")
            writer.stdin.flush()
        for writer in writers:
            assert writer.stdout is not None and writer.stdout.readline() == "done\n"
        weights = read_model(path)
        assert weights in (b"A" * 1000 + b"%d\n" % turn, b"B" * 1000 + b"%d\n" % turn)
        assert len(names(folder)) == 2
        winners.add(weights[:1])
    for writer in writers:
        writer.communicate()
        assert writer.returncode == 0
    assert winners == {b"A", b"B"}, "the two writers never overtook each other: nothing was tested"


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(b"0" * 100_000)
    script = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from pathlib import Path\nfrom bnfold.store import atomic\n"
        f"for turn in range(200):\n    with atomic(Path({str(path)!r})) as temporary:\n"
        "        temporary.write_bytes(str(turn % 10).encode() * 100_000)\n"
    )
    seen = set()
    with subprocess.Popen([sys.executable, "-c", script]) as writer:
        while writer.poll() is None:
            content = path.read_bytes()
            assert len(content) == 100_000 and content == content[:1] * 100_000
            seen.add(content[:1])
    assert writer.returncode == 0 and len(seen) > 2


def test_a_folder_locked_for_too_long_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_LOCK_WAIT", 0.05)
    path = tmp_path / "net.onnx"
    path.write_bytes(OLD)
    with store._exclusive(tmp_path) as alone:
        assert alone
        with pytest.raises(ResourceError, match="locked"):
            export(path, NEW)
    assert path.read_bytes() == OLD and names(tmp_path) == {"net.onnx"}
    export(path, NEW)


# --- the disk gives out -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ENOMEM, errno.EACCES])
@pytest.mark.parametrize("call", ["fsync", "chmod", "replace", "mkdir"])
def test_a_failing_disk_is_a_resource_error_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, call: str
) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(OLD)

    def failing(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    owner = {"fsync": os}.get(call, Path)
    with monkeypatch.context() as patch, pytest.raises(ResourceError) as caught:
        patch.setattr(owner, call, failing)
        with atomic(path) as temporary:
            temporary.write_bytes(NEW)
    assert str(path) in str(caught.value) and os.strerror(code) in str(caught.value) and caught.value.hint
    assert path.read_bytes() == OLD and names(tmp_path) == {"net.onnx"}


@pytest.mark.parametrize(
    ("error", "translated"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (MemoryError(), True),
        (Exception("Error while serializing: I/O error: No space left on device (os error 28)"), True),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"), True),
        (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), True),
        (FileNotFoundError(errno.ENOENT, "No such file", "weights.pt"), False),
        (PermissionError(errno.EACCES, "Permission denied", "weights.pt"), False),
        (Exception("I/O error: No such file (os error 2)"), False),
        (RuntimeError("PytorchStreamReader failed reading zip archive"), False),
        (LowerError("no space for this operator (os error 28)"), False),
    ],
)
def test_only_a_failure_to_store_is_translated(tmp_path: Path, error: Exception, translated: bool) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(OLD)
    with pytest.raises(ResourceError if translated else type(error)) as caught, atomic(path) as temporary:
        temporary.write_bytes(NEW)
        raise error
    assert caught.value.__cause__ is error if translated else caught.value is error
    assert path.read_bytes() == OLD and names(tmp_path) == {"net.onnx"}


def test_a_really_full_disk(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(OLD)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(ResourceError, match=r"net\.onnx.*File too large.*ulimit"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
            with atomic(path) as temporary:
                temporary.write_bytes(NEW)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == OLD and names(tmp_path) == {"net.onnx"}


# --- the destination, early -------------------------------------------------------------------------------------------


def test_a_good_destination_passes_and_nothing_is_left(tmp_path: Path) -> None:
    source = tmp_path / "net.pt2"
    source.write_bytes(OLD)
    check_destination(tmp_path / "net.onnx", sources=[source, tmp_path / "missing.pt"])
    (tmp_path / "net.onnx").write_bytes(OLD)
    check_destination(tmp_path / "net.onnx", sources=[source])
    assert names(tmp_path) == {"net.pt2", "net.onnx"}


def test_bad_destinations_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(OLD)
    os.mkfifo(tmp_path / "pipe")
    cases: list[tuple[Path, type[BnfoldError], str]] = [
        (tmp_path, UsageError, "is a folder"),
        (tmp_path / "pipe", UsageError, "not a regular file"),
        (Path("/dev/null"), UsageError, "not a regular file"),
        (tmp_path / "missing" / "net.onnx", ResourceError, "there is no folder"),
        (tmp_path / "file" / "net.onnx", ResourceError, "there is no folder"),
    ]
    before = names(tmp_path)
    for path, kind, message in cases:
        with pytest.raises(kind, match=re.escape(str(path)) + ".*" + message) as caught:
            check_destination(path)
        assert caught.value.hint
    assert names(tmp_path) == before


@pytest.mark.parametrize("how", ["itself", "symlink", "hardlink", "dotted"])
def test_the_source_is_never_the_destination(tmp_path: Path, how: str) -> None:
    source = tmp_path / "net.onnx"
    source.write_bytes(OLD)
    path = tmp_path / "out.onnx"
    if how == "symlink":
        path.symlink_to(source)
    elif how == "hardlink":
        path.hardlink_to(source)
    else:
        path = source if how == "itself" else tmp_path / ".." / tmp_path.name / "net.onnx"
    with pytest.raises(UsageError, match="the output is the source"):
        check_destination(path, sources=[tmp_path / "other", source])


def test_an_unwritable_folder_or_file_is_refused_by_its_mode(tmp_path: Path) -> None:
    folder = tmp_path / "locked"
    folder.mkdir()
    (tmp_path / "kept.onnx").write_bytes(OLD)
    (tmp_path / "kept.onnx").chmod(0o444)
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    script = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from bnfold.store import atomic, check_destination
def enter(path):
    with atomic(path): pass
for act, path in ((check_destination, "locked/net.onnx"), (enter, "locked/net.onnx"), (check_destination, "kept.onnx")):
    try: act(Path({str(tmp_path)!r}, path))
    except Exception as error: print(type(error).__name__, error)
"""
    told = subprocess.check_output([*BOUND, sys.executable, "-c", script], text=True).splitlines()
    says = ("Permission denied", "Permission denied", "write-protected")
    assert [line.split()[0] for line in told] == ["ResourceError"] * 3, told
    assert all(words in line for words, line in zip(says, told, strict=True))


def test_an_unwritable_folder_or_file_is_refused_for_root_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(OLD)
    with monkeypatch.context() as patch, pytest.raises(ResourceError, match="write-protected"):
        patch.setattr(os, "access", lambda *_: False)
        check_destination(path)
    if not Path("/proc/self").is_dir():
        pytest.skip("needs /proc, a folder where not even root can create files")
    with pytest.raises(ResourceError, match=r"/proc/[0-9]+/net\.onnx"):
        check_destination(Path("/proc/self/net.onnx"))


def test_importing_the_module_loads_no_framework() -> None:
    script = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import bnfold.store\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'onnx', 'onnxruntime', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
