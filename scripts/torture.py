"""Kills, full disks, writers at once, and files from strangers: a file is whole or absent, and nothing else happens.

    python scripts/torture.py --write docs/reliability.md
    python scripts/torture.py --share 0.02 --only commits,disks

The seed decides every trial but for the instant at which a signal strikes, which the machine's load decides too. Trials
run in forks of one process that has imported everything, so that thousands take minutes. Exit code 1: a fault.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import multiprocessing
import os
import platform
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # a fork has the threads of its parent on paper alone

import hostile_files
import torch
from trials import child, command, unruly

import bnfold
from bnfold import store

torch.set_num_threads(1)
#: Trials of each part in a full run.
FULL = {
    "commits": 1600, "exports": 200, "terminations": 40, "writers": 200, "disks": 60, "limits": 60,
    "mutations": 1040, "gadgets": 1, "bombs": 1, "onnx": 1,
}  # fmt: skip
NET = """
import torch
def make(seed=0):
    torch.manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(),
                              torch.nn.Flatten(), torch.nn.Linear(128, 40))
    torch.nn.init.uniform_(net[1].running_mean), torch.nn.init.uniform_(net[1].running_var, 0.5, 2)
    net.example_inputs = (torch.randn(2, 3, 6, 6),)
    return net.eval()
"""


# -- what is counted ---------------------------------------------------------------------------------------------------


@dataclass
class Part:
    """What was counted of one part."""

    name: str
    trials: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def fault(self, what: str | None) -> None:
        self.faults += [what] if what else []

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {what}" for what, count in self.counts.most_common())
        return f"{self.name}: {self.trials} trials, {len(self.faults)} faults; {counts}"


class Torture:
    """A folder, the files of two nets, and a method for each part."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        (folder / "net.py").write_text(NET)
        self.net = f"{folder / 'net.py'}:make"
        self.parts: list[Part] = []

    def make(self) -> torch.nn.Module:
        """The net that is exported, and that files are read for."""
        space: dict[str, Any] = {}
        exec(NET, space)
        return space["make"]()

    @contextmanager
    def part(self, name: str, number: str) -> Iterator[tuple[Part, random.Random, Path]]:
        """A part, its own random numbers, and an empty folder."""
        part, place = Part(name), self.folder / number
        place.mkdir()
        begun = time.perf_counter()
        yield part, random.Random(f"{self.seed} {number}"), place
        shutil.rmtree(place)
        self.parts.append(part)
        print(part, f"({time.perf_counter() - begun:.0f} s)", flush=True)
        for fault in part.faults[:20]:
            print("  FAULT", fault.replace("\n", " ")[:600], flush=True)

    # -- storing -------------------------------------------------------------------------------------------------------

    def commits(self, trials: int) -> None:
        """Kills while a model is stored, inline and with external data."""
        with self.part("kills of a commit", "commits") as (part, chance, place):
            path = place / "net.onnx"
            old, new = (bytes([letter]) * 100_000 for letter in b"on")
            took = sorted(child(lambda: commit(path, old, external=True)).seconds for _ in range(20))
            for i in range(trials):
                external = bool(i % 2)
                after = chance.uniform(0, 1.1 * took[10])
                ended = child(lambda external=external: commit(path, new, external=external), after=after)
                part.trials += 1
                found = content(path)
                part.counts["struck" if ended.struck else "done before"] += 1
                part.counts["the new file"] += found == new
                part.counts["left a staging folder"] += any(".bnfold-tmp" in entry.name for entry in place.iterdir())
                if found not in (old, new):
                    part.fault(f"trial {i}: the file is neither the old nor the new one")
                commit(path, old, external=external)
                if content(path) != old or len(list(place.iterdir())) != 1 + external:
                    part.fault(f"trial {i}: the next run leaves {sorted(e.name for e in place.iterdir())}")

    def exports(self, trials: int) -> None:
        """Kills of whole exports."""
        self._struck("kills of whole exports", "exports", trials, signal.SIGKILL)

    def terminations(self, trials: int) -> None:
        """SIGTERM, which is no kill: the run clears up after itself."""
        self._struck("SIGTERM to whole exports", "terminations", trials, signal.SIGTERM)

    def _struck(self, name: str, number: str, trials: int, by: int) -> None:
        with self.part(name, number) as (part, chance, place):
            for external in (False, True):
                path, wholes = place / "net.onnx", []
                runs = [self._export(path, seed, external) for seed in (0, 1)]
                for run in runs:
                    ended = child(run)
                    took = ended.seconds
                    part.fault(None if ended.code == 0 else f"the export fails: {ended.said[-300:]}")
                    wholes.append(files(place))
                for i in range(trials // 2):
                    before = files(place)
                    ended = child(runs[i % 2], after=chance.uniform(0.5 * took * (i % 2), took), by=by)
                    part.trials += 1
                    part.counts[ended.words] += 1
                    now = files(place)
                    part.counts["left a staging folder"] += any(".bnfold-tmp" in entry for entry in now)
                    part.counts["the new file"] += now["net.onnx"] != before["net.onnx"]
                    if not any(whole.items() <= now.items() for whole in wholes):
                        part.fault(f"trial {i}, external data {external}: neither file is whole: {sorted(now)}")
                    if by == signal.SIGTERM:
                        # Before the command line has begun, it ends any process.
                        part.fault(None if ended.struck == by and now == before else unruly(ended))
                        if now not in wholes:
                            part.fault(f"trial {i}, external data {external}: left {sorted(now)}")
                    commit(place / "other", b"any run in this folder clears up", external=False)
                    (place / "other").unlink()
                    if any(".bnfold-tmp" in entry for entry in files(place)):
                        part.fault(f"trial {i}: another run leaves {sorted(files(place))}")
                    if i % 10 == 0:
                        child(runs[0])
                        if files(place) != wholes[0]:
                            part.fault(f"trial {i}: the next run leaves {sorted(files(place))}")
                shutil.rmtree(place)
                place.mkdir()

    def _export(self, path: Path, seed: int, external: bool) -> Callable[[], None]:
        more = ["--external-data"] if external else []
        return command("export", self.net, "--arg", f"seed={seed}", "-o", path, "--device", "cpu", "-q", *more)

    def writers(self, trials: int) -> None:
        """Three writers of one path at once, and a reader."""
        with self.part("three writers on one path", "writers") as (part, chance, place):
            path = place / "net.onnx"
            for i in range(trials):
                external = bool(i % 2)
                contents = [bytes([i % 256, letter]) * 50_000 for letter in b"abc"]
                before, pids = content(path) if i else None, []
                for each in chance.sample(contents, 3):
                    if not (pid := os.fork()):
                        code = 1
                        try:
                            commit(path, each, external=external)
                            code = 0
                        finally:
                            os._exit(code)
                    pids.append(pid)
                while pids:
                    done, status = os.waitpid(pids[0], os.WNOHANG)
                    if done:
                        pids.pop(0)
                        part.fault(None if status == 0 else f"turn {i}: a writer ends with {status}")
                    elif path.exists() and not external:
                        seen = path.read_bytes()
                        if seen not in (before, *contents) and not seen.startswith(b"onnx "):
                            part.fault(f"turn {i}: a reader saw half a file")
                part.trials += 1
                found = content(path)
                if found not in contents or len(list(place.iterdir())) != 1 + external:
                    part.fault(f"turn {i}: {sorted(e.name for e in place.iterdir())}, a mixture or leftovers")
                else:
                    part.counts[f"won by {chr(found[1])}"] += 1

    # -- disks ---------------------------------------------------------------------------------------------------------

    def disks(self, trials: int) -> None:
        """A tmpfs that is full at some point of the export."""
        with self.part("a full disk (tmpfs)", "disks") as (part, chance, place):
            pages = max(sum(map(len, self._bytes(external).values())) for external in (False, True)) // 4096 + 12
            for i in range(trials):
                size = chance.randint(2 * (i % 2) + 2, 2 * pages) * 4
                mounted = subprocess.run(
                    ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(place)], capture_output=True
                )
                if mounted.returncode:
                    part.counts["not tried: no right to mount"] += 1
                    return
                try:
                    self._limited(part, place, i, external=bool(i % 2))
                finally:
                    subprocess.run(["umount", str(place)], check=True)

    def limits(self, trials: int) -> None:
        """A limit on the size of files (RLIMIT_FSIZE)."""
        with self.part("a limit on the size of files", "limits") as (part, chance, place):
            largest = max(len(data) for external in (False, True) for data in self._bytes(external).values())
            for i in range(trials):
                self._limited(part, place, i, external=bool(i % 2), limit=chance.randrange(2 * largest))
                for entry in place.iterdir():
                    entry.unlink()

    def _bytes(self, external: bool) -> dict[str, bytes]:
        with tempfile.TemporaryDirectory(dir=self.folder) as made:
            child(self._export(Path(made) / "net.onnx", 0, external))
            return {entry.name: entry.read_bytes() for entry in Path(made).iterdir()}

    def _limited(self, part: Part, place: Path, i: int, *, external: bool, limit: int | None = None) -> None:
        path, old = place / "net.onnx", b"the file of yesterday"
        path.write_bytes(old)

        def run() -> None:
            if limit is not None:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            self._export(path, 0, external)()

        ended = child(run)
        part.trials += 1
        part.counts[ended.words] += 1
        part.fault(unruly(ended))
        if ended.code not in (0, 6):
            part.fault(f"trial {i}: {ended.words}: {ended.said[-300:]}")
        names = {entry.name for entry in place.iterdir()}
        if ended.code and (path.read_bytes() != old or names != {"net.onnx"}):
            part.fault(f"trial {i}: {ended.words}, and what is there is {sorted(names)}")
        if ended.code == 0 and len(names) != 1 + external:
            part.fault(f"trial {i}: written, and what is there is {sorted(names)}")

    # -- files from strangers ------------------------------------------------------------------------------------------

    def mutations(self, trials: int) -> None:
        """Files of every kind that is read, damaged in every way."""
        self._read("damaged files", "mutations", lambda *where: hostile_files.mutations(trials, *where))

    def gadgets(self, trials: int) -> None:
        """Pickles that call something when they are read."""
        self._read("pickle gadgets", "gadgets", hostile_files.gadgets, codes={0, 3})

    def bombs(self, trials: int) -> None:
        """Small files that would be large, or claim to be."""
        self._read("bombs", "bombs", hostile_files.bombs, codes={3, 6})

    def onnx(self, trials: int) -> None:
        """ONNX files that reach out of their folder, or are no graphs."""
        self._read("hostile ONNX", "onnx", hostile_files.hostile_onnx, codes={1, 3, 4, 6, 7})

    def _read(self, name: str, number: str, make: Callable[..., Any], codes: set[int] | None = None) -> None:
        """Runs commands on files; each leaves the destination as it is, unless it passes, and springs no trap."""
        with self.part(name, number) as (part, chance, place):
            trap, out = place / "trap", place / "out.onnx"
            os.chdir(place)
            for what, arguments in make(place, self.make(), self.net, chance):
                out.write_bytes(b"the file of yesterday")
                ended = child(command(*arguments))
                part.trials += 1
                part.counts[ended.words] += 1
                part.fault(trouble and f"{what}: {trouble}" if (trouble := unruly(ended)) else None)
                if trap.exists():
                    part.fault(f"{what}: the trap was sprung")
                    trap.unlink()
                if ended.code != 0 and out.read_bytes() != b"the file of yesterday":
                    part.fault(f"{what}: {ended.words}, and the destination has changed")
                if codes is not None and ended.code not in codes:
                    part.fault(f"{what}: {ended.words} is none of {sorted(codes)}: {ended.said[-200:]}")
                if ended.peak > hostile_files.PEAK:
                    part.fault(f"{what}: {ended.peak // 1024} MB of memory")
            os.chdir(self.folder)

    def run(self, name: str, trials: int) -> Part:
        getattr(self, name)(trials)
        return self.parts.pop()


def commit(path: Path, weights: bytes, *, external: bool) -> None:
    """Stores a stand-in for a model: its weights, or what names them and their digest."""
    with store.stage(path) as staging:
        (staging.folder / "weights").write_bytes(weights)
        if not external:
            staging.commit("weights")
            return
        name, digest = staging.seal_data("weights")
        (staging.folder / "model").write_bytes(f"onnx {name} {digest}".encode())
        staging.commit("model", name)


def content(path: Path) -> bytes | None:
    """The weights of what ``commit`` stored; None where they are not those that the model names."""
    found = path.read_bytes()
    if not found.startswith(b"onnx "):
        return found
    name, digest = found.decode().split()[1:]
    data = path.parent / name
    weights = data.read_bytes() if data.exists() else b""
    return weights if hashlib.sha256(weights).hexdigest() == digest else None


def files(folder: Path) -> dict[str, str]:
    """Every file below, with its digest."""
    found = (path for path in folder.rglob("*") if path.is_file() or path.name.endswith(".bnfold-tmp"))
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes() if p.is_file() else b"").hexdigest() for p in found
    }


def page(parts: list[Part], seed: int, seconds: float) -> str:
    """The results as Markdown."""
    packages = ("torch", "onnx", "onnxruntime-gpu", "onnxruntime", "safetensors", "numpy")
    known = {name: metadata.version(name) for name in packages if any(metadata.distributions(name=name))}
    lines = [
        "# Reliability",
        "",
        f"One run of `python scripts/torture.py --seed {seed}`, {datetime.datetime.now(datetime.UTC):%Y-%m-%d}, "
        f"{seconds / 60:.0f} minutes. bnfold {bnfold.__version__}, Python {platform.python_version()}, "
        + ", ".join(f"{name} {version}" for name, version in known.items())
        + f"; {platform.system()} {platform.machine()}, {os.cpu_count()} cores.",
        "",
        "A trial is one process that is struck by a signal, one run on a disk that is too small, or one file that is",
        "read. After each the destination has to hold the whole old file or the whole new one, and the next run leaves",
        "nothing of it behind; a refusal is one line with a documented exit code, without a traceback, and the memory",
        "stays bounded. Whatever breaks that is a fault.",
        "",
        "| what | trials | how they ended | faults |",
        "| --- | ---: | --- | ---: |",
        *(
            f"| {part.name} | {part.trials:,} | "
            + ", ".join(f"{count:,} {what}" for what, count in part.counts.most_common() if count)
            + f" | {len(part.faults)} |"
            for part in parts
        ),
        "",
    ]
    faults = [f"- {part.name}: {' '.join(fault.split())[:200]}" for part in parts for fault in part.faults[:10]]
    return "\n".join([*lines, *(["## Faults", "", *faults, ""] if faults else [])])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=1.0, help="of the trials of a full run")
    parser.add_argument("--only", default=",".join(FULL), help="parts, with commas: %(default)s")
    parser.add_argument("--jobs", type=int, default=1, help="parts at a time")
    parser.add_argument("--write", type=Path, help="a Markdown page of the results")
    given = parser.parse_args(arguments)
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="torture-") as folder:
        torture = Torture(Path(folder).resolve(), given.seed)
        net = torture.make()
        warm = bnfold.export(net, Path(folder) / "warm.onnx", net.example_inputs, device="cpu")
        assert warm.passed
        names = given.only.split(",")
        counts = [max(2, round(FULL[name] * given.share)) for name in names]
        with ProcessPoolExecutor(given.jobs, multiprocessing.get_context("fork")) as pool:
            parts = list(pool.map(torture.run, names, counts))
    if given.write:
        given.write.write_text(page(parts, given.seed, time.perf_counter() - begun), encoding="utf-8")
    return 1 if any(part.faults for part in parts) else 0


if __name__ == "__main__":
    sys.exit(main())
