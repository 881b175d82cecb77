"""A user's own way to run a model: any callable from a dict of arrays to a dict or a list of arrays.

One that is named as ``file.py:infer`` runs in a process of its own, which can be ended when it hangs, whatever it hangs
in, and whose crash is told like any other failure. This module and what the user's file imports are all that it loads.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import os
import pickle
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bnfold.errors import InputError, UsageError
from bnfold.user_code import place

#: What a runner returns, made of arrays: by name, or in order.
Answer = dict[str, np.ndarray[Any, Any]] | list[np.ndarray[Any, Any]]
#: Seconds that a call may take, the first one included, in which engines are built.
TIME_LIMIT = 300.0


class Raised(Exception):  # noqa: N818  a verdict prints its name
    """The runner raised; the message is its exception and the place in its code."""


class NoAnswer(Exception):  # noqa: N818
    """The runner did not answer in time."""


class Crashed(Exception):  # noqa: N818
    """The process that the runner ran in has ended."""


class UserRunner:
    """Calls a runner, within a time limit. After a call that hung or crashed every other fails at once.

    Its process ends with the last reference to it.

    Args:
        runner: a callable, or "file.py:name" or "pkg.module:name" of one. Called with a dict of arrays by input name,
            and with the path of the file that is judged (None where there is none) if it takes a second argument.
        limit: seconds for one call.

    Raises:
        UsageError: the text names no callable.
        InputError: the file cannot be loaded, or has no such callable.
    """

    def __init__(self, runner: str | Callable[..., Any], limit: float = TIME_LIMIT) -> None:
        self._limit, self._gone, self._process = limit, None, None
        if isinstance(runner, str):
            self.name = f"runner {runner}"
            self._process = _Process(runner)
            weakref.finalize(self, self._process.kill)
            self._call: Callable[..., Answer] = self._process.call
            self.takes_path: bool = self._within(self._process.start)
        else:
            self.name = f"runner {getattr(runner, '__name__', type(runner).__name__)}"
            self._call, self.takes_path = _called(runner), takes_path(runner)

    _gone: Exception | None

    def __call__(self, feeds: Mapping[str, np.ndarray[Any, Any]], path: Path | None = None) -> Answer:
        """One call; new arrays that share memory with nothing.

        Raised where the runner raised, or returned what is no dict or list of arrays; NoAnswer where it did not answer
        in time, and Crashed where its process ended, now or before.
        """
        if self._gone is not None:
            raise self._gone
        found: Answer = self._within(lambda: self._call(dict(feeds), *([path] if self.takes_path else [])))
        return found

    def _within(self, work: Callable[[], Any]) -> Any:
        """What ``work`` returns; in a thread, because nothing else ends a wait for somebody else's code."""
        found: list[Any] = []
        failed: list[BaseException] = []

        def run() -> None:
            try:
                found.append(work())
            except BaseException as error:  # SystemExit too: a runner must not end the run without a verdict
                failed.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(self._limit)
        if thread.is_alive():
            if self._process is not None:
                self._process.kill()
            self._gone = NoAnswer(f"no answer within {self._limit:g} s (--runner-timeout)")
            raise self._gone
        if failed:
            self._gone = failed[0] if isinstance(failed[0], Crashed) else None
            raise failed[0]
        return found[0]


def takes_path(function: Callable[..., Any]) -> bool:
    """Whether a callable takes a second positional argument."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    return sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters) > 1


def _called(function: Callable[..., Any]) -> Callable[..., Answer]:
    def call(*given: Any) -> Answer:
        try:
            return arrays(function(*given))
        except BaseException as error:
            raise Raised(_words(error)) from error

    return call


def arrays(answer: Any) -> Answer:
    """What a runner returned, as arrays of its own, a single one as a list; TypeError where it is something else."""
    if isinstance(answer, Mapping):
        return {str(name): _array(value, f"output '{name}'") for name, value in answer.items()}
    if isinstance(answer, Sequence) and not isinstance(answer, str | bytes):
        return [_array(value, f"output {i}") for i, value in enumerate(answer)]
    return [_array(answer, "what it returns")]


def _array(value: Any, what: str) -> np.ndarray[Any, Any]:
    try:
        found = np.array(value, order="C")
    except Exception as error:
        raise TypeError(f"{what} is no array: {_first(error)}") from error
    if found.dtype.kind not in "biufcV":
        raise TypeError(f"{what} is a {type(value).__name__}, not an array of numbers")
    return found


def _words(error: BaseException) -> str:
    """Type, message and place of what somebody's code raised."""
    return f"{_first(error)} ({place(error)})"


def _first(error: BaseException) -> str:
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


# -- a process of its own ----------------------------------------------------------------------------------------------


class _Process:
    """The parent's end: pickles over the child's standard input and output. Both ends run the user's code anyway."""

    def __init__(self, spec: str) -> None:
        file, _, name = spec.rpartition(":")
        if not file or not name.isidentifier():
            raise UsageError("a runner is file.py:name or pkg.module:name of a callable", where=f"--runner {spec}")
        self._spec, self._file, self._name = spec, file, name
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  closed with the process
        search = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._child = subprocess.Popen(
            [sys.executable, "-c", "from bnfold.runtime.runner import serve; serve()"], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=self._said, env=os.environ | {"PYTHONPATH": search},
        )  # fmt: skip

    def start(self) -> bool:
        """Loads the user's code; whether it takes a path."""
        try:
            found: bool = self._exchange((self._file, self._name))
        except (Raised, Crashed) as error:
            self.kill()
            raise InputError(f"the runner cannot be loaded: {error}", where=self._spec) from error
        return found

    def call(self, *given: Any) -> Answer:
        found: Answer = self._exchange(given)
        return found

    def kill(self) -> None:
        self._child.kill()
        self._child.wait()
        for stream in (self._child.stdin, self._child.stdout, self._said):
            with contextlib.suppress(OSError, ValueError):
                stream.close()  # type: ignore[union-attr]

    def _exchange(self, given: Any) -> Any:
        assert self._child.stdin is not None and self._child.stdout is not None
        try:
            pickle.dump(given, self._child.stdin)
            self._child.stdin.flush()
            good, answer = pickle.load(self._child.stdout)
        except (OSError, EOFError, pickle.UnpicklingError, ValueError) as error:
            raise Crashed(self._ending()) from error
        if not good:
            raise Raised(answer)
        return answer

    def _ending(self) -> str:
        """How the process ended, and the last line that it wrote."""
        try:
            code = self._child.wait(timeout=10)
        except subprocess.TimeoutExpired:
            return "its answer cannot be read"
        with contextlib.suppress(OSError, ValueError):
            self._said.seek(0)
            lines = [line for line in self._said.read().decode(errors="replace").splitlines() if line.strip()]
            last = f": {lines[-1].strip()[:200]}" if lines else ""
            return f"its process ended with {f'signal {-code}' if code < 0 else f'exit code {code}'}{last}"
        return "its process ended"


def serve() -> None:
    """The child's end: what the user's code prints goes to standard error, what is answered to the parent."""
    source, out = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    function: Callable[..., Any] | None = None
    while True:
        try:
            given = pickle.load(source)
        except EOFError:
            return
        answer: tuple[bool, Any]
        try:
            if function is None:
                function = _load(*given)
                answer = True, takes_path(function)
            else:
                answer = True, arrays(function(*given))
        except BaseException as error:
            answer = False, _words(error)
        pickle.dump(answer, out, protocol=pickle.HIGHEST_PROTOCOL)
        out.flush()


def _load(file: str, name: str) -> Callable[..., Any]:
    path = Path(file)
    sys.path.insert(0, str(path.resolve().parent if path.suffix == ".py" else Path.cwd()))
    if path.suffix == ".py":
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {file}")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(file)
    found: Any = getattr(module, name, None)
    if not callable(found):
        raise TypeError(f"{file} has no callable {name}")
    if inspect.isclass(found):
        found = found()
    function: Callable[..., Any] = found
    return function
