"""Runs commands of bnfold, one at a time, each in a process of its own with a time limit and a memory limit.

A process that has imported torch and exported a tiny net waits for commands and forks for each, so that a command
begins at once and whatever becomes of it stays in its process. Where forking is not safe (all but Linux) it starts a
new one.

``python -m bnfold.fleet.nursery`` reads a ``Command`` per line from stdin and answers each with an ``Ended`` on stdout,
as JSON. When stdin ends, as it does when whoever started it dies, the command that runs is killed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import runpy
import select
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil

from bnfold import files
from bnfold.errors import ProviderError

FORKS = sys.platform == "linux"
#: Seconds between two looks at the memory of a command.
_LOOK = 0.05
#: What a command reads there comes with the system or with a version that is known.
_SYSTEM = ("/dev/", "/etc/", "/proc/", "/sys/", "/usr/lib", "/usr/share/")


@dataclass(frozen=True)
class Command:
    """What is to be run: ``words`` of the command line, after ``bnfold``, in ``folder``.

    ``hidden`` are folders of which no file counts as read; ``timeout`` is in seconds, ``memory`` in bytes.
    """

    words: tuple[str, ...]
    folder: str
    hidden: tuple[str, ...] = ()
    timeout: float = 3600.0
    memory: int | None = None


@dataclass(frozen=True)
class Ended:
    """What became of a command."""

    how: Literal["exit", "time", "memory"]  #: it ended by itself, or at a limit.
    code: int  #: its exit code, negative for the signal that killed it.
    said: str  #: what it wrote to stderr, the last of it.
    seconds: float  #: how long it ran.
    peak: int  #: the most memory that it was seen to have, in bytes.
    #: SHA-256 of every file that it read and is not the system's, by path; "" of one that changed meanwhile.
    reads: dict[str, str] = field(default_factory=dict)


class Nursery:
    """One such process, for the one who starts it."""

    def __init__(self) -> None:
        # -P: the folder it is started in is not where its modules come from.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "bnfold.fleet.nursery"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        self.pid = self._process.pid

    def run(self, command: Command) -> Ended:
        """Runs a command to its end; ProviderError where the process has died."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(asdict(command)) + "\n")
            self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            self.close()
            raise ProviderError(f"the process that runs models ended with code {self._process.returncode}")
        return Ended(**json.loads(answer))

    def close(self) -> None:
        """Ends it, and the command that it runs."""
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate()


def sha256_of(path: str | Path) -> str:
    """The SHA-256 of a file, in hex; "" where it cannot be read."""
    with contextlib.suppress(OSError):
        return files.sha256_of(path)
    return ""


# -- the process itself ------------------------------------------------------------------------------------------------


def main() -> None:
    """Serves until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupted run closes stdin
    if FORKS:
        warm()
    while line := _next_line():
        command = Command(**json.loads(line))
        answers.write(json.dumps(asdict(_run(command))) + "\n")
        answers.flush()


def warm() -> None:
    """Imports what an export imports, and lowers a tiny net: torch and onnxscript fill their tables on first use."""
    import matplotlib.backends.backend_svg
    import matplotlib.font_manager  # noqa: F401
    import torch
    from torch import nn

    from bnfold import pipeline
    from bnfold.graph.threads import torch_threads
    from bnfold.lowering.lower import lower
    from bnfold.render import html, junit  # noqa: F401

    runpy.run_module("bnfold")  # what obeys a command, which it does under the name of __main__ alone

    net = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), nn.ReLU(), nn.Flatten(), nn.Linear(16, 1)).eval()
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    # Threads do not survive a fork: no operator may have started any.
    with warnings.catch_warnings(), torch_threads(1):
        warnings.simplefilter("ignore")
        folded = pipeline.fold(net, (torch.zeros(2, 1, 4, 4),))
        lower(folded.program, opset=None, simplify=True, dims=folded.captured.dims, sites=[], metadata={})
    logging.disable(before)


def _next_line() -> bytes:
    """A line of stdin, of which nothing is buffered: whether more is there tells whether the other end still lives."""
    line = b""
    while not line.endswith(b"\n"):
        if not (byte := os.read(0, 1)):
            return b""
        line += byte
    return line


def _run(command: Command) -> Ended:
    began, wall = time.monotonic(), time.time()
    with tempfile.TemporaryDirectory(prefix="bnfold-") as folder:
        paths = [Path(folder, name) for name in ("stderr", "reads")]
        for path in paths:
            path.touch()
        how, code, peak = _watched(_started(command, paths), command)
        said, read = (path.read_text(encoding="utf-8", errors="replace") for path in paths)
        reads = _digests(read.splitlines(), (*command.hidden, folder), wall)
    return Ended(how, code, said[-4000:], time.monotonic() - began, peak, reads)


def _started(command: Command, paths: Sequence[Path]) -> psutil.Process:
    """The process of one command."""
    given = asdict(command), [str(path) for path in paths]
    if not FORKS:
        script = f"from bnfold.fleet import nursery; nursery.obey(*{given!r})"
        return psutil.Popen([sys.executable, "-P", "-c", script], stdin=subprocess.DEVNULL)
    pid = os.fork()
    if not pid:
        obey(*given)
    return psutil.Process(pid)


def _watched(process: psutil.Process, command: Command) -> tuple[Literal["exit", "time", "memory"], int, int]:
    """Waits for the end, which comes at the limits if not before: how, the exit code, and the most memory."""
    how: Literal["exit", "time", "memory"] = "exit"
    end, peak = time.monotonic() + command.timeout, 0
    while True:
        family, used = [process], 0
        with contextlib.suppress(psutil.Error):
            family += process.children(recursive=True)
        for each in family:
            with contextlib.suppress(psutil.Error):
                used += each.memory_info().rss
        peak = max(peak, used)
        over = command.memory is not None and used > command.memory
        gone = select.select([0], [], [], 0)[0]  # nobody speaks before the answer: the other end is gone
        if gone or (how == "exit" and (over or time.monotonic() > end)):
            how = "memory" if over else "time"
            for each in family:
                with contextlib.suppress(psutil.Error):
                    each.kill()
        if gone:
            os._exit(1)
        with contextlib.suppress(psutil.TimeoutExpired):
            return how, int(process.wait(_LOOK)), peak


def obey(command: dict[str, Any], paths: Sequence[str]) -> None:
    """Runs a command as the command line would and ends the process with its exit code."""
    said, read = (os.open(path, os.O_WRONLY | os.O_APPEND) for path in paths)
    null = os.open(os.devnull, os.O_RDWR)
    for target, source in ((0, null), (1, null), (2, said)):
        os.dup2(source, target)
    if command["memory"] and FORKS:
        import resource

        # One allocation far beyond the limit fails at once, before anyone could look; torch reserves more than it uses.
        resource.setrlimit(resource.RLIMIT_DATA, (2 * command["memory"], 2 * command["memory"]))
    os.chdir(command["folder"])
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(fd, mode) for fd, mode in ((0, "r"), (1, "w"), (2, "w")))
    sys.argv = ["bnfold", *command["words"]]
    sys.addaudithook(lambda event, args: _note(read, *args) if event == "open" else None)
    code: Any = 4
    try:
        runpy.run_module("bnfold", run_name="__main__")
    except SystemExit as end:
        code = end.code
    finally:
        with contextlib.suppress(Exception):
            sys.stderr.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))


def _note(fd: int, path: Any, mode: str | None, flags: int) -> None:
    writes = set(mode) & set("wax+") if mode else flags & (os.O_WRONLY | os.O_RDWR)
    if isinstance(path, (str, bytes, os.PathLike)) and not writes:
        with contextlib.suppress(Exception):
            os.write(fd, bytes(Path(os.fsdecode(path)).absolute()) + b"\n")


def _digests(paths: Sequence[str], hidden: Sequence[str], began: float) -> dict[str, str]:
    packages = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    foreign = (*_SYSTEM, *(f"{path}{os.sep}" for path in (*packages, *hidden, str(Path(__file__).parents[1]))))
    found: dict[str, str] = {}
    for path in dict.fromkeys(map(_source, paths)):
        if path not in found and not path.startswith(foreign) and Path(path).is_file():
            found[path] = sha256_of(path) if Path(path).stat().st_mtime < began else ""
    return found


def _source(path: str) -> str:
    """Of compiled code, the file that it was compiled from."""
    try:
        return importlib.util.source_from_cache(path) if path.endswith(".pyc") else path
    except ValueError:
        return path


if __name__ == "__main__":
    main()
