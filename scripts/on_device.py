"""The steps of ``scripts/cuda.sh``: each prints one line of what it found and adds a section to a Markdown page.

    python scripts/on_device.py gate --device cuda --page page.md --seconds 150
    python scripts/on_device.py gate --device cpu --page page.md --quick     # a rehearsal

A step starts no other net when its seconds are over, and says how many it got to.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import random
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import zoo
from suites.common import Table, geometric_mean, quiet, spread

import bnfold
from bnfold.errors import BnfoldError
from bnfold.report import CheckReport, Latency
from bnfold.runtime.runtime import Device, arithmetic, device_of, installed_runtimes, open_session, resolve_device
from bnfold.timing.bench import machine, matched_feeds, measure, onnx_contestants, random_feeds, sized_inputs
from bnfold.timing.contestants import Contestant

#: How many nets of the zoo: random which, so that no list has to be kept, and always the same.
GATE, BINDING, TENSORRT = 20, 5, 5
#: Nets of published size for the latency.
LATENCY = ("ResNet-50", "MobileNetV2", "LeViT-256")


class TimeUp(Exception):  # noqa: N818
    """A step's seconds are over; whatever it was at counts as failed, and what it has found is written."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeUp in the midst of what runs for longer."""

    def ring(*_: object) -> None:
        raise TimeUp("not done in time")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@dataclass
class Step:
    """What every step is given.

    Attributes:
        device: where the files run.
        deadline: when to begin nothing new, on the clock of ``time.monotonic``.
        quick: as little as shows that it works.
        folder: for files.
    """

    device: Device
    deadline: float
    quick: bool
    folder: Path
    page: Path

    @property
    def late(self) -> bool:
        """Whether to begin nothing new."""
        return time.monotonic() > self.deadline

    def write(self, text: str) -> None:
        """Adds to the page at once: what is there stays there, whatever becomes of the rest."""
        with self.page.open("a", encoding="utf-8") as page:
            page.write(f"\n{text}\n")

    @property
    def options(self) -> dict[str, Any]:
        """The device as ``bnfold.export`` takes it."""
        return {"device": self.device.provider.ort_name, "provider_options": dict(self.device.options)}

    def nets(self, count: int) -> Iterator[str]:
        """Names of nets of the tests' zoo, as long as there is time."""
        names = sorted(zoo.NETS)
        random.Random(0).shuffle(names)
        for name in names[: 2 if self.quick else count]:
            if self.late:
                return
            yield name


# -- the steps ---------------------------------------------------------------------------------------------------------


def gate(step: Step) -> str:
    """Export to verdict of twenty nets, and what the device computes in as it is deployed."""
    return _judged(step, GATE, "The gate", step.options)


def tensorrt(step: Step) -> str:
    """The same with TensorRT, in its own choice of arithmetic and in float16."""
    try:
        resolve_device("tensorrt")
    except BnfoldError as error:
        return f"skipped: {error}"
    single = _judged(step, TENSORRT, "TensorRT", {"device": "tensorrt"})
    options = {"device": "tensorrt", "provider_options": {"trt_fp16_enable": "1"}}
    half = _judged(step, TENSORRT, "TensorRT with trt_fp16_enable=1", options)
    return f"{single}; in float16 {half}"


def binding(step: Step) -> str:
    """Bound inputs and outputs against plain runs, and what the copies to the device and back cost."""
    rows, wrong, factors = [], 0, []
    for name in step.nets(BINDING):
        try:
            problem, first, other = _bound(step, name)
        except Exception as error:
            problem = _words(error)
            rows.append((name, problem, "", ""))
        else:
            factors.append(other.ratio)
            rows.append((name, problem or "agree", f"{first.median * 1e3:.3f} ms", spread(other)))
        wrong += problem is not None
    columns = ("net", "bound and plain outputs", "bound", "with copies to the device and back")
    step.write(Table("IO binding", columns, rows).markdown())
    if not factors:
        raise RuntimeError(rows[0][1] if rows else "no time for a single net")
    many = f"{len(rows) - wrong} of {len(rows)} nets agree"
    return f"{many}; with copies a run takes {geometric_mean(factors):.2f} times as long"


def _bound(step: Step, name: str) -> tuple[str | None, Latency, Latency]:
    """How bound runs of a net differ from plain ones, and the latency of bound ones and of ones with copies."""
    path = _exported(step, name)
    session = open_session(path, device=step.device)
    inputs = sized_inputs(path)
    problem = None
    for seed in (0, 1, 0):  # memory of an earlier run shows when the inputs change
        problem = problem or session.binding_problem(random_feeds(inputs, seed))
    feeds = random_feeds(inputs)
    contestants = [Contestant("bound", session.bind(feeds)), Contestant("copied", lambda: session.run(feeds))]
    first, other = measure(contestants, rounds=6 if step.quick else 30)
    return problem, first, other


def latency(step: Step) -> str:
    """Unfolded, peers' and folded files in turn, in float32 and float16."""
    import benchmark_nets

    build, nets = (zoo_net, ("mobilenet_v2",)) if step.quick else (benchmark_nets.build, LATENCY)
    found: dict[str, list[float]] = {}
    failed = []
    for name, dtype in ((name, dtype) for dtype in ("float32", "float16") for name in nets):
        if step.late:
            break
        try:
            module, args = build(name)
            rows = _raced(step, module, args, getattr(torch, dtype))
        except Exception as error:
            failed.append(name)
            step.write(f"{name} in {dtype}: {_words(error)}")
            continue
        for tool, _, ratio in rows:
            if ratio:
                found.setdefault(f"{tool} {dtype}", []).append(float(ratio.partition("x")[0]))
        columns = ("file", "latency", "over bnfold's")
        step.write(Table(f"Latency of {name} in {dtype}, one image", columns, rows).markdown())
    if not found:
        raise RuntimeError(f"could not be measured: {', '.join(failed)}" if failed else "no time for a single net")
    means = ", ".join(f"{tool} {geometric_mean(r):.2f}" for tool, r in found.items() if not tool.startswith("bnfold"))
    return f"over bnfold's file: {means}" + (f"; {len(failed)} could not be measured" if failed else "")


# -- what they share ---------------------------------------------------------------------------------------------------


def zoo_net(name: str) -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    """A net of the tests' zoo in eval mode, and its example."""
    module, args = zoo.NETS[name]()
    return module.eval(), args


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def _exported(step: Step, name: str, **options: Any) -> Path:
    module, args = zoo.NETS[name]()
    path = step.folder / f"{name}.onnx"
    bnfold.export(module, path, args, check=False, **options)
    return path


def _judged(step: Step, count: int, title: str, options: Mapping[str, Any]) -> str:
    """A row per net, and in one line how many pass and by how much."""
    rows, passed, reports = [], 0, list[CheckReport]()
    for name in step.nets(count):
        try:
            module, args = zoo.NETS[name]()
            report = bnfold.export(module, step.folder / "net.onnx", args, **options).check
            assert report is not None
        except Exception as error:
            rows.append((name, _words(error), "", "", ""))
            continue
        reports.append(report)
        passed += report.passed
        file, *engines = report.engines
        coarse = "; ".join(f"{e.arithmetic}: {e.verdict}, ratio {e.ratio:.2g}" for e in engines)
        elsewhere = "" if report.placement is None else str(len(report.placement.elsewhere))
        said = report.verdict if report.passed else f"{report.verdict}: {report.problems[0][:160]}"
        rows.append((name, said, f"{file.ratio:.2f}", coarse, elsewhere))
    columns = ("net", "verdict", "error over noise", "as deployed", "nodes elsewhere")
    before = "The file in float32, and the engine in what it computes in."
    step.write(Table(title, columns, rows, before=before).markdown())
    if not reports:
        raise RuntimeError(rows[0][1] if rows else "no time for a single net")
    ratio = max(report.engines[0].ratio for report in reports)
    coarse = {e.arithmetic for report in reports for e in report.engines[1:]}
    worst = max((e.ratio for report in reports for e in report.engines[1:]), default=0.0)
    apart = f"; as deployed in {', '.join(sorted(coarse))}, worst ratio {worst:.2g} of its own noise" if coarse else ""
    elsewhere = sum(len(report.placement.elsewhere) for report in reports if report.placement is not None)
    return f"{passed} of {len(rows)} nets pass, worst ratio {ratio:.2g}{apart}; {elsewhere} nodes elsewhere"


def _raced(
    step: Step, module: torch.nn.Module, args: tuple[Any, ...], dtype: torch.dtype
) -> list[tuple[str, str, str]]:
    """Every file that could be written, with its latency; bnfold's first."""
    module, args = module.to(dtype), tuple(x.to(dtype) for x in args)
    one = tuple(x[:1] for x in args)
    paths: dict[str, Path] = {}
    rows: list[tuple[str, str, str]] = []

    def write(tool: str, make: Callable[[Path], object]) -> None:
        path = step.folder / f"{tool.replace(' ', '_')}.onnx"
        if step.late:
            return
        try:
            with quiet():
                make(path)
            paths[tool] = path
        except Exception as error:
            rows.append((tool, _words(error), ""))

    options: dict[str, Any] = {"check": False, "static": True}
    write("bnfold", lambda path: bnfold.export(module, path, one, **options))
    write("unfolded", lambda path: bnfold.export(module, path, one, fold=False, merge=False, **options))
    write("torch.onnx", lambda path: torch.onnx.export(module, one, dynamo=True, verbose=False).save(path))
    for tool in ("onnxsim", "onnxslim"):
        if "torch.onnx" in paths:
            write(f"torch.onnx + {tool}", lambda path, tool=tool: _simplified(tool, paths["torch.onnx"], path))
    files = list(paths.values())
    feeds = [random_feeds(sized_inputs(files[0]))]
    feeds += [matched_feeds(path, feeds[0], files[0]) for path in files[1:]]
    found = measure(onnx_contestants(files, feeds, device=step.device), rounds=6 if step.quick else 40)
    return [(tool, f"{f.median * 1e3:.3f} ms", spread(f)) for tool, f in zip(paths, found)] + rows


def _simplified(tool: str, source: Path, path: Path) -> None:
    import onnx

    found = importlib.import_module(tool)
    model = onnx.load(source)
    onnx.save(found.simplify(model)[0] if tool == "onnxsim" else found.slim(model), path)


STEPS: dict[str, Callable[[Step], str]] = {
    "gate": gate, "binding": binding, "tensorrt": tensorrt, "latency": latency,
}  # fmt: skip


def about(device: Device) -> str:
    """One line on the machine and on what the device computes float32 in, with the row's options and as deployed."""
    facts = machine()
    gpu = torch.cuda.get_device_name(0) if device.provider.memory == "cuda" and torch.cuda.is_available() else ""
    strict, deployed = (arithmetic(device, deployed=value).name for value in (False, True))
    versions = ", ".join(f"{name} {facts[name]}" for name in (*installed_runtimes(), "torch") if name in facts)
    where = f"{gpu or facts['processor']}, {facts['system']}; {versions}"
    return f"{where}; {device} computes in {strict}, as deployed in {deployed}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["machine", *STEPS])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--provider-option", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--page", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    deadline = time.monotonic() + given.seconds
    options = dict(text.partition("=")[::2] for text in given.provider_option)
    torch.manual_seed(0)
    try:
        # Nothing new is begun after the deadline; what was begun before has some more seconds.
        limit = time_limit(given.seconds + 15)
        with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder, limit:
            warnings.simplefilter("ignore")
            device = resolve_device(device_of(given.device).provider.ort_name, options)
            step = Step(device, deadline, given.quick, Path(folder), given.page)
            said = about(device) if given.step == "machine" else STEPS[given.step](step)
            step.write(f"**{given.step}**: {said}")
    except (BnfoldError, RuntimeError, TimeUp) as error:
        print(f"failed: {error}")
        return 1
    print(said)
    return 0


if __name__ == "__main__":
    sys.exit(main())
