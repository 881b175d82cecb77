"""A fleet: rows -> workers -> a report; and what a worker does with one model, where its result is not there already.

A record holds the row, the key (what the result depends on that has a name: options and versions), and the SHA-256 of
every file that the export read and of every file that it wrote. All must be as they were for the result to stand. What
may be otherwise another time (a process killed, a full disk, a missing package) has no record; what ended at a limit
stands while the limit does.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bnfold._version import __version__
from bnfold.errors import BnfoldError, ProviderError
from bnfold.fleet.cluster import SchedulerGoneError, Where, connected, spread
from bnfold.fleet.nursery import Command, Ended, Nursery, sha256_of
from bnfold.fleet.places import Folder, fetched, is_url
from bnfold.fleet.rows import Row, input_files
from bnfold.report import FleetReport, Ledger, ModelRow
from bnfold.report.plain import plain, revived, versions
from bnfold.report.results import Outcome

#: Processes that may die under a model before it is given up.
TRIES = 3
_VERDICTS: dict[int, Outcome] = {0: "pass", 1: "fail", 7: "inconclusive"}
#: Exit codes of what may be otherwise another time.
_PASSING = {5, 6, 130}
_LIBRARIES = ("timm", "torchvision", "transformers")
_idle: list[Nursery] = []
_lock = threading.Lock()


@dataclass(frozen=True)
class Order:
    """One model, and where: a worker needs no more."""

    row: Row
    folder: str  #: of the list of models, in which it is exported.
    out: str  #: where results go.
    timeout: float  #: seconds, for a row that says nothing else.
    memory: int | None = None  #: bytes, likewise; None for the worker's own limit.
    anew: bool = False  #: export again what failed in an earlier run.


def export_model(order: Order) -> ModelRow:
    """The row of a model, taken from an earlier run or exported."""
    row, out = order.row, Folder(order.out)
    try:
        if not (Path(order.folder).is_dir() and (out.remote or Path(out / ".fleet").is_dir())):
            here = f"worker {socket.gethostname()} does not see"
            raise ProviderError(f"{here} {order.folder} and {order.out}", hint="Share them, or give -o a URL")
        with ExitStack() as stack:
            files = {
                name: stack.enter_context(fetched(place)) for name, place in input_files(row, order.folder).items()
            }
            return _known(order, out, files) or _export(order, out, files)
    except BnfoldError as error:
        return ModelRow(row.name, row.source, "error", error.exit_code, str(error))


# -- what is known already ---------------------------------------------------------------------------------------------


def key_of(order: Order, *, limits: bool) -> str:
    """SHA-256 of the options and versions that a result depends on, and of the limits where it ended at one."""
    row = order.row
    found = {
        "source": row.source, "options": row.options, "bench": row.bench, "bnfold": __version__, **versions(),
        **{name: _version(name) for name in (*_LIBRARIES, "onnxsim")},
        **({"timeout": _timeout(order), "memory": _memory(order)} if limits else {}),
    }  # fmt: skip
    return hashlib.sha256(json.dumps(found, sort_keys=True, default=str).encode()).hexdigest()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _known(order: Order, out: Folder, files: dict[str, Path]) -> ModelRow | None:
    with suppress(ValueError, KeyError, TypeError, AttributeError):  # a record that is none
        record = json.loads(out.read(f".fleet/{order.row.name}.json") or b"")
        row: ModelRow = revived(ModelRow, record["row"])
        good = row.exit_code == 0 or not order.anew
        if good and row.key == key_of(order, limits=record["limited"]) and _same(order, out, files, record):
            return replace(row, earlier=True, changed=())
    return None


def _same(order: Order, out: Folder, files: dict[str, Path], record: dict[str, Any]) -> bool:
    def now(path: str) -> str:
        name = path.removeprefix("option:")
        return sha256_of(files[name] if name != path else Path(order.folder, path))

    read = all(digest and now(path) == digest for path, digest in record["read"].items())
    if not read or out.remote:  # what lies far away is not fetched again to look at it
        return read and all(out.size(name) == size for name, (_, size) in record["wrote"].items())
    return all(sha256_of(out / name) == digest for name, (digest, _) in record["wrote"].items())


# -- one export --------------------------------------------------------------------------------------------------------


def _export(order: Order, out: Folder, files: dict[str, Path]) -> ModelRow:
    row = order.row
    with TemporaryDirectory(prefix="bnfold-") as temporary:
        folder = Path(temporary) if out.remote else Path(os.path.relpath(out / "", order.folder))
        near = Path(temporary) if out.remote else Path(out / "")
        model, reports = f"{row.name}.onnx", [f"{row.name}.json", f"{row.name}.html"]
        old = {name: _stamp(near / name) for name in (model, *reports)}
        urls = {name: str(path) for name, path in files.items() if is_url(str(row.options[name]))}
        words = ["export", *row.words(urls), "-q", "-o", str(folder / model)]
        words += [word for name in reports for word in ("--report", str(folder / name))]
        words += ["--", row.source]  # whatever that is, it is no option
        hidden = (str(near.resolve()), *(str(path.parent) for name, path in files.items() if name in urls))
        command = Command(tuple(words), order.folder, hidden, _timeout(order), _memory(order))
        ended, tries = _obeyed(command)
        written = [name for name in (model, *reports) if _stamp(near / name) not in (None, old[name])]
        found, weights = _read(order, ended, near, written)
        found = replace(found, tries=tries, key=key_of(order, limits=ended.how != "exit"))
        if found.file and row.bench:
            found = _timed(found, command, folder, near)
        written += [weights] if weights else []
        if out.remote:
            _publish(out, near, sorted(written, key=lambda name: name == model))
        wrote = {name: (sha256_of(near / name), (near / name).stat().st_size) for name in written}
    if found.exit_code >= 0 and (found.exit_code not in _PASSING or ended.how != "exit"):
        read = {f"option:{name}": sha256_of(path) for name, path in files.items()} | {
            os.path.relpath(path, order.folder) if path.startswith(order.folder) else path: digest
            for path, digest in ended.reads.items()
        }
        record = {"row": plain(found), "limited": ended.how != "exit", "read": read, "wrote": wrote}
        out.write(f".fleet/{row.name}.json", json.dumps(record, indent=1).encode())
    return found


def _obeyed(command: Command) -> tuple[Ended, int]:
    """How a command ended, and in how many tries: a process that was killed from outside may do well again."""
    tries = 0
    while True:
        tries += 1
        with _nursery() as nursery:
            ended = nursery.run(command)
        if ended.how != "exit" or ended.code >= 0 or tries == TRIES:
            return ended, tries


@contextmanager
def _nursery() -> Iterator[Nursery]:
    """One that is idle, or a new one: a worker has as many as threads. One that has died is not used again."""
    with _lock:
        nursery = _idle.pop() if _idle else None
    nursery = nursery or Nursery()
    yield nursery
    with _lock:
        _idle.append(nursery)


def _read(order: Order, ended: Ended, folder: Path, written: list[str]) -> tuple[ModelRow, str | None]:
    """The row of an export that has ended, from its exit code and its report; the file of weights beside the model."""
    row, report = order.row, f"{order.row.name}.json"
    code, said = ended.code, _last_error(ended.said)
    if ended.how == "time":
        code, said = 4, f"it did not end within its time limit of {_timeout(order):g} s. Give it more: timeout"
    elif ended.how == "memory":
        code, said = 6, f"it grew to {ended.peak / 1e9:.3g} GB, beyond its memory limit. Give it more: memory"
    elif code < 0:
        name = signal.Signals(-code).name
        code, said = 5, f"its process was killed {TRIES} times, at last by {name}: out of memory, or a crash"
    elif code == 0 and report not in written:
        code, said = 4, "its process ended without a verdict: the model's code ends it"
    found = ModelRow(
        row.name, row.source, _VERDICTS.get(code, "error"), code, "" if code == 0 else said,
        seconds=round(ended.seconds, 3), memory=ended.peak,
    )  # fmt: skip
    if ended.how != "exit" or report not in written:
        return found, None
    document = json.loads((folder / report).read_text(encoding="utf-8"))
    folded, total = revived(Ledger, document["ledger"]).count()
    check, file = document["check"], document["file"] or {}
    found = replace(
        found, folded=folded, batch_norms=total, ratio=check and check["ratio"], report=row.name,
        outcome=found.outcome if check or code else "not judged", bytes=file.get("bytes"), sha256=file.get("sha256"),
        file=f"{row.name}.onnx" if code == 0 and file else None,
    )  # fmt: skip
    return found, file.get("data")


def _timed(found: ModelRow, command: Command, folder: Path, near: Path) -> ModelRow:
    report = f".{found.name}.latency.json"
    words = ("bench", str(folder / f"{found.name}.onnx"), "-q", "--report", str(folder / report))
    ended, _ = _obeyed(replace(command, words=words))
    if ended.code or ended.how != "exit":
        return replace(found, said=f"its latency is not known: {_last_error(ended.said)}")
    try:
        document = json.loads((near / report).read_text(encoding="utf-8"))
    finally:
        (near / report).unlink(missing_ok=True)
    return replace(found, latency=document["contestants"][0]["median"])


def _last_error(said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    text = (errors or lines or ["it said nothing"])[-1][:1000]
    return "".join(char if char.isprintable() else "\ufffd" for char in text)


def _publish(out: Folder, near: Path, names: list[str]) -> None:
    """Sends files away, the model last; reports say where they are then."""
    for name in names:
        if name.endswith((".json", ".html")):
            text = (near / name).read_text(encoding="utf-8")
            (near / name).write_text(text.replace(str(near), out.place), encoding="utf-8")
        out.put(near / name, name)


def _stamp(path: Path) -> tuple[int, int] | None:
    with suppress(OSError):
        found = path.stat()
        return found.st_ino, found.st_mtime_ns
    return None


def _timeout(order: Order) -> float:
    return order.timeout if order.row.timeout is None else order.row.timeout


def _memory(order: Order) -> int | None:
    """The limit of the row, of the fleet, or of the worker that this runs on, shared among its threads."""
    if (asked := order.row.memory or order.memory) is not None:
        return asked
    from distributed import get_worker

    try:
        worker = get_worker()
    except ValueError:  # no worker: this process alone
        return None
    limit: int | None = worker.memory_manager.memory_limit
    return limit and limit // int(worker.state.nthreads)


# -- the whole fleet ---------------------------------------------------------------------------------------------------

#: Called with a row as it ends, and how many have ended of how many.
Tell = Callable[[ModelRow, int, int], None]


def run(
    rows: list[Row], source: str, folder: Path, out: str, where: Where, *, timeout: float = 3600.0, anew: bool = False,
    tell: Tell = lambda row, done, total: None, work: Callable[[Order], ModelRow] = export_model,
) -> FleetReport:  # fmt: skip
    """Exports every model, on the workers, unless its result is there already.

    Args:
        source: what the list of them is called.
        folder, timeout, anew: as for ``Order``.
        out: a folder, or a URL of one.

    Raises:
        ProviderError: there are no workers.
        ResourceError: the folder cannot be made.
    """
    results = Folder(out if is_url(out) else str(Path(out).absolute()))
    results.make()
    before = _earlier(results)
    orders = [Order(row, str(folder.resolve()), results.place, timeout, where.memory, anew) for row in rows]
    found: dict[int, ModelRow] = {}
    with connected(where, tasks=len(rows), gpus=any(dict(row.resources).get("GPU") for row in rows)) as client:
        began = time.monotonic()
        try:
            for i, result in spread(client, work, orders, lambda order: dict(order.row.resources)):
                row = _failed(rows[i], result) if isinstance(result, BnfoldError) else result
                found[i] = replace(row, changed=changes(before.get(row.name), row))
                tell(found[i], len(found), len(rows))
        except SchedulerGoneError as error:
            gone = error
            for i in sorted(set(range(len(rows))) - set(found)):
                found[i] = _failed(rows[i], gone)
                tell(found[i], len(found), len(rows))
        seconds = time.monotonic() - began
    return FleetReport(source, tuple(found[i] for i in range(len(rows))), round(seconds, 3))


def _failed(row: Row, error: BnfoldError) -> ModelRow:
    return ModelRow(row.name, row.source, "error", error.exit_code, str(error))


def _earlier(results: Folder) -> dict[str, ModelRow]:
    """The rows of the run before, by name."""
    with suppress(ValueError, KeyError, TypeError):
        return {row["name"]: revived(ModelRow, row) for row in json.loads(results.read("index.json") or b"")["rows"]}
    return {}


def changes(old: ModelRow | None, new: ModelRow) -> tuple[str, ...]:
    """What differs from the run before, in words."""
    if old is None:
        return ("new",)
    found = []
    if old.outcome != new.outcome:
        found.append(f"was {old.outcome}")
    if (old.folded, old.batch_norms) != (new.folded, new.batch_norms) and new.report and old.report:
        found.append(f"folded {old.folded} of {old.batch_norms} before")
    if new.sha256 and old.sha256 and old.sha256 != new.sha256:
        found.append("another file")
    if new.bytes and old.bytes and old.bytes != new.bytes:
        found.append(f"{new.bytes - old.bytes:+,} bytes")
    return tuple(found)
