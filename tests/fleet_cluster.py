"""A scheduler and workers in processes of their own, as an administrator would start them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType

from distributed import Client

ROOT = Path(__file__).resolve().parent.parent


class Cluster:
    """A scheduler, and as many workers as are asked for, one model at a time each."""

    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address = f"tcp://127.0.0.1:{self.port}"
        self.folder = tempfile.TemporaryDirectory(prefix="cluster-")
        self.processes: list[subprocess.Popen[bytes]] = []
        self.scheduler = self.start_scheduler()

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for process in (*self.processes, self.scheduler):
            process.kill()
            process.wait()
        self.folder.cleanup()

    def start_scheduler(self) -> subprocess.Popen[bytes]:
        """Starts it, at the same address every time."""
        return self._start("scheduler", "--host", "127.0.0.1", "--port", str(self.port))

    def workers_gone(self) -> None:
        """Waits until the workers have seen that the scheduler is gone."""
        for process in self.processes:
            process.wait()
        self.processes = []

    def workers(self, count: int) -> None:
        """Starts or kills workers until there are so many, and waits until the scheduler knows."""
        self.processes = [process for process in self.processes if process.poll() is None]
        for process in self.processes[count:]:
            process.send_signal(signal.SIGKILL)
            process.wait()
        del self.processes[count:]
        while len(self.processes) < count:
            self.processes.append(self._start("worker", self.address, "--nthreads", "1", "--no-nanny"))
        with Client(self.address, timeout=60, set_as_default=False) as client:
            while len(client.scheduler_info(n_workers=-1)["workers"]) != count:
                time.sleep(0.1)

    def _start(self, what: str, *words: str) -> subprocess.Popen[bytes]:
        paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        return subprocess.Popen(
            [sys.executable, "-m", "dask", what, *words, "--no-dashboard"], cwd=self.folder.name,
            env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
