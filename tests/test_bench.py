"""Latency: the arithmetic on a clock that the test winds, and the command on small files. No test asserts a time."""

from __future__ import annotations

import gc
import json
import math
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from torch import Tensor, nn

import bnfold
from bnfold.cli import cli
from bnfold.errors import BnfoldError, InputError, ProviderError
from bnfold.runtime.runtime import cuda_problem
from bnfold.timing import bench as module
from bnfold.timing.bench import bench, interval, measure
from bnfold.timing.contestants import Contestant, random_feeds, sized_inputs, torch_arguments, torch_contestant

torch.set_num_threads(1)
FLOAT, HALF, INT = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT64


# -- arithmetic --------------------------------------------------------------------------------------------------------


class Clock:
    """Stands still but for what contestants spend; ``pace`` says how slow the machine is at each reading."""

    def __init__(self, pace: Callable[[int], float] = lambda reading: 1.0) -> None:
        self.now, self.readings, self.pace, self.log = 0.0, 0, pace, list[str]()

    def __call__(self) -> float:
        self.readings += 1
        return self.now

    def contestant(self, name: str, seconds: float) -> Contestant:
        def run() -> None:
            self.log.append(name)
            self.now += seconds * self.pace(self.readings)

        return Contestant(name, run)


def wound(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> Clock:
    monkeypatch.setattr(module.time, "perf_counter", clock)
    return clock


def test_times_and_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = wound(monkeypatch, Clock())
    one, other = measure([clock.contestant("one", 0.010), clock.contestant("other", 0.030)], rounds=10)
    assert (one.ratio, one.interval, one.calls) == (1.0, (1.0, 1.0), 1)
    assert (one.median, other.median, other.p95) == pytest.approx((0.010, 0.030, 0.030))
    assert other.ratio == pytest.approx(3) and other.interval == pytest.approx((3, 3))
    assert other.speedup == pytest.approx(1 / 3)


def test_a_machine_that_slows_down_changes_no_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    def pace(reading: int) -> float:
        return 1.0 + reading / 10

    clock = wound(monkeypatch, Clock(pace))
    _, other = measure([clock.contestant("one", 0.010), clock.contestant("other", 0.020)], rounds=101)
    assert other.ratio == pytest.approx(2, rel=0.02) and other.interval[0] < 2 < other.interval[1]
    assert other.median > 0.1  # the times themselves are all over the place


def test_one_interrupted_turn_is_one_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = wound(monkeypatch, Clock(lambda reading: 1000.0 if reading == 41 else 1.0))
    _, other = measure([clock.contestant("one", 0.010), clock.contestant("other", 0.020)], rounds=30)
    assert other.ratio == pytest.approx(2) and other.interval == pytest.approx((2, 2))


def test_every_round_has_all_in_random_order(monkeypatch: pytest.MonkeyPatch) -> None:
    def orders(seed: int) -> list[str]:
        clock = wound(monkeypatch, Clock())
        measure([clock.contestant(name, 0.01) for name in "abc"], rounds=12, warmup=2, seed=seed)
        assert clock.log[:6] == list("aabbcc")  # warm-up; then three calls each that say how long a turn is
        rounds = clock.log[6 + 9 :]
        found = ["".join(rounds[i : i + 3]) for i in range(0, len(rounds), 3)]
        assert len(found) == 12 and all(sorted(each) == list("abc") for each in found)
        return found

    assert len(set(orders(0))) > 2 and orders(0) == orders(0) != orders(1)


def test_what_is_fast_has_several_calls_in_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = wound(monkeypatch, Clock())
    fast, slow = measure([clock.contestant("fast", 0.001), clock.contestant("slow", 0.1)], rounds=6, warmup=0)
    assert (fast.calls, slow.calls) == (5, 1)
    assert (fast.median, slow.ratio) == pytest.approx((0.001, 100))
    assert clock.log.count("fast") == 1 + 3 + 6 * 5


@pytest.mark.parametrize("collecting", [True, False])
def test_the_garbage_collector_is_as_before(collecting: bool) -> None:
    seen: list[bool] = []

    def run() -> None:
        seen.append(gc.isenabled())
        if len(seen) == 20:
            raise KeyError

    try:
        gc.enable() if collecting else gc.disable()
        with pytest.raises(KeyError):
            measure([Contestant("", run)], rounds=20, warmup=1)
        assert gc.isenabled() is collecting
    finally:
        gc.enable()
    assert not seen[-1]


@settings(deadline=None)
@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=200))
def test_the_interval_holds_the_median_and_its_confidence(ratios: list[float]) -> None:
    low, high = interval(ratios)
    assert min(ratios) <= low <= statistics.median(ratios) <= high <= max(ratios)
    n, values = len(ratios), sorted(ratios)
    if n >= module.MIN_ROUNDS and len(set(values)) == n:
        k = values.index(low) + 1
        assert high == values[n - k]

        def outside(k: int) -> float:
            return 2 * sum(math.comb(n, i) for i in range(k)) / 2**n

        assert outside(k) <= 0.05 < outside(k + 1)


# -- files -------------------------------------------------------------------------------------------------------------

Shape = Sequence[int | str]


def save(path: Path, *inputs: tuple[str, int, Shape], width: int = 1) -> Path:
    """A file that adds up what it takes, each input flattened to a mean, ``width`` times."""
    nodes, means = [], []
    for name, kind, _ in inputs:
        nodes.append(helper.make_node("Cast", [name], [f"{name}_f"], to=FLOAT))
        nodes.append(helper.make_node("ReduceMean", [f"{name}_f"], [f"{name}_m"], keepdims=1))
        nodes.append(helper.make_node("Reshape", [f"{name}_m", "one"], [f"{name}_s"]))
        means.append(f"{name}_s")
        assert kind in (FLOAT, HALF, INT)
    nodes.append(helper.make_node("Sum", means, ["sum"]))
    nodes.append(helper.make_node("Expand", ["sum", "width"], ["y"]))
    graph = helper.make_graph(
        nodes, "net", [helper.make_tensor_value_info(*each) for each in inputs],
        [helper.make_tensor_value_info("y", FLOAT, [width])],
        [helper.make_tensor("one", INT, [1], [1]), helper.make_tensor("width", INT, [1], [width])],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), path)
    return path


def shapes(path: Path, **given: Any) -> list[tuple[int, ...]]:
    return [shape for _, shape in sized_inputs(path, **given)]


def test_sizes_of_inputs(tmp_path: Path) -> None:
    net = save(tmp_path / "a.onnx", ("x", FLOAT, ["N", 3, 4]), ("mask", INT, ["N", "N", 2]), ("k", FLOAT, []))
    assert shapes(net) == [(1, 3, 4), (1, 1, 2), ()]
    assert shapes(net, batch=5) == [(5, 3, 4), (5, 5, 2), ()]
    assert shapes(net, shapes={"x": (7, 3, 4)})[0] == (7, 3, 4)
    feeds = random_feeds(sized_inputs(net, batch=40))
    assert feeds["x"].dtype == np.float32 and feeds["x"].std() > 0.5
    assert set(np.unique(feeds["mask"])) == {0, 1} and feeds["k"].shape == ()


@pytest.mark.parametrize(
    ("inputs", "given", "said"),
    [
        ([("x", FLOAT, ["N", 3, "H"])], {}, r"nothing says how large H is.*--input \"x\[1,3,224\]\""),
        ([("x", FLOAT, ["N", 3])], {"shapes": {"x": (2, 4)}}, r"input x is float32\[N,3\], given \[2, 4\]"),
        ([("x", FLOAT, ["N", 3])], {"shapes": {"x": (2,)}}, r"given \[2\]"),
        ([("x", FLOAT, ["N", 3])], {"shapes": {"image": (2, 3)}}, r"no input named image.*Its inputs are x"),
        ([("x", FLOAT, [2, 3])], {"batch": 4}, r"its batch is fixed at 2.*Use --batch 2"),
    ],
)
def test_sizes_that_do_not_fit(tmp_path: Path, inputs: Any, given: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        shapes(save(tmp_path / "a.onnx", *inputs), **given)


def test_a_report_on_two_files(tmp_path: Path) -> None:
    first = save(tmp_path / "a.onnx", ("x", FLOAT, ["N", 3]), ("k", INT, [2]))
    other = save(tmp_path / "b.onnx", ("k", INT, [2]), ("x", HALF, ["N", 3]), width=2)
    stages: list[str] = []
    report = bench([first, other], batch=4, threads=1, rounds=6, progress=lambda stage, *_: stages.append(stage))
    assert [each.name for each in report.contestants] == [str(first), str(other)]
    assert report.inputs == {"x": "float32[4,3]", "k": "int64[2]"} and report.threads == 1
    assert (report.rounds, report.warmup) == (6, 5)
    for each in report.contestants:
        low, high = each.interval
        assert each.provider == "CPUExecutionProvider" and each.load is not None and each.load > 0
        assert 0 < each.median <= each.p95 and low <= each.ratio <= high
        assert each.memory is None or each.memory > 0
    assert any("other shapes than those of" in note for note in report.notes)
    assert {"processor", "cores", "system"} <= set(report.machine) and stages[0] == "open" and stages[-1] == "measure"
    found = json.loads(report.to_json())
    assert found["contestants"][0]["ratio"] == 1 and len(found["contestants"]) == 2


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from Linux's /proc")
def test_memory_is_that_of_the_file(tmp_path: Path) -> None:
    """A file with 40 MB of weights takes that much more than one without."""
    small, large = save(tmp_path / "a.onnx", ("x", FLOAT, [1, 4])), tmp_path / "b.onnx"
    weight = helper.make_tensor("w", FLOAT, [10_000_000], np.zeros(10_000_000, np.float32).tobytes(), raw=True)
    graph = helper.make_graph(
        [helper.make_node("ReduceMean", ["w"], ["m"], keepdims=0), helper.make_node("Add", ["x", "m"], ["y"])], "net",
        [helper.make_tensor_value_info("x", FLOAT, [1, 4])], [helper.make_tensor_value_info("y", FLOAT, [1, 4])],
        [weight],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), large)
    one, other = bench([small, large], rounds=6).contestants
    assert one.memory is not None and other.memory is not None and other.memory > one.memory + 30_000_000
    assert bench([small], rounds=6, memory=False).contestants[0].memory is None


@pytest.mark.parametrize(
    "other",
    [
        [("x", FLOAT, ["N", 3]), ("z", FLOAT, ["N"])],
        [("x", INT, ["N", 3])],
        [("x", FLOAT, ["N", 4])],
        [("x", FLOAT, [2, 3])],
        [("x", FLOAT, [3])],
    ],
    ids=["one more", "another dtype", "another size", "another batch", "another rank"],
)
def test_files_with_other_inputs_are_refused(tmp_path: Path, other: Any) -> None:
    first, second = save(tmp_path / "a.onnx", ("x", FLOAT, ["N", 3])), save(tmp_path / "b.onnx", *other)
    with pytest.raises(InputError, match=r"b\.onnx: it takes .*a\.onnx is run on x:float32\[1,3\]"):
        bench([first, second], rounds=6, memory=False)
    if other == [("x", FLOAT, [2, 3])]:
        assert len(bench([first, second], batch=2, rounds=6, memory=False).contestants) == 2


def test_inputs_of_other_names_are_matched_by_position(tmp_path: Path) -> None:
    first = save(tmp_path / "a.onnx", ("x", FLOAT, ["N", 3]), ("k", INT, [2]))
    second = save(tmp_path / "b.onnx", ("image", FLOAT, ["batch", 3]), ("index", INT, [2]))
    assert len(bench([first, second], rounds=6, memory=False).contestants) == 2


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    damaged = tmp_path / "b.onnx"
    damaged.write_bytes(b"not a model")
    with pytest.raises(InputError, match="there is no such file"):
        bench([tmp_path / "missing.onnx"])
    with pytest.raises(BnfoldError, match=r"b\.onnx"):
        bench([damaged])


# -- torch -------------------------------------------------------------------------------------------------------------


class Pair(nn.Module):
    """Takes a list of two tensors, and a number."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.seen = nn.BatchNorm1d(3), list[bool]()

    def forward(self, pair: list[Tensor], *, scale: float = 1.0) -> Tensor:
        self.seen.append(self.training)
        return self.norm(pair[0]).mean() * scale + pair[1].float().mean()[None]


def test_a_torch_module_beside_a_file(tmp_path: Path) -> None:
    net = save(tmp_path / "a.onnx", ("x", FLOAT, ["N", 3]), ("k", INT, ["N"]))
    model, example = Pair(), ([torch.ones(2, 3), torch.ones(2, dtype=torch.long)],)
    threads = torch.get_num_threads()
    report = bench([net], model=model, name="pair", args=example, kwargs={"scale": 2.0}, threads=1, rounds=6)
    assert [(c.name, c.provider) for c in report.contestants][1] == ("pair", "torch, cpu")
    assert report.contestants[1].load is None and report.contestants[1].memory is None and "torch" in report.machine
    assert model.training and model.norm.training and not model.seen  # what ran was a copy, in eval mode
    assert torch.equal(model.norm.running_mean, torch.zeros(3)) and torch.get_num_threads() == threads
    assert torch.equal(example[0][0], torch.ones(2, 3))


def test_arrays_become_arguments() -> None:
    feeds = {"k": np.ones(4, np.int64), "x": np.ones((4, 3), np.float32)}
    by_name = torch_arguments(_Named(), None, {}, feeds, "net")
    assert by_name[0] == () and list(by_name[1]) == ["k", "x"]
    by_order = torch_arguments(_Named(), None, {}, {"a": feeds["x"], "b": feeds["k"]}, "net")
    assert len(by_order[0]) == 2 and by_order[1] == {}
    half = torch_arguments(_Named().half(), None, {}, feeds, "net")[1]
    assert half["x"].dtype == torch.float16 and half["k"].dtype == torch.int64


class _Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 1)

    def forward(self, x: Tensor, k: Tensor) -> Tensor:
        return self.linear(x) + k[:, None]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of torch's own copying
def test_a_folded_program_runs_beside_the_module_it_came_from() -> None:
    """The module of an exported program is in training mode by its flag, and takes no other."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    image = torch.randn(2, 3, 8, 8)
    for model in (net, bnfold.fold(net, (image,)).module):
        torch_contestant("net", model, (image[:1],)).run()
    assert net.training


def test_a_module_that_takes_something_else() -> None:
    example = (torch.ones(2, 3), torch.ones(2))
    with pytest.raises(InputError, match=r"net: the model takes float32\[2,3\], float32\[2\], the file float32\[1,3\]"):
        torch_arguments(nn.Identity(), example, {}, {"x": np.ones((1, 3), np.float32)}, "net")
    with pytest.raises(InputError, match="net: the model does not run on the file's inputs"):
        torch_contestant("net", nn.Linear(3, 4), (torch.ones(1, 5),))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
def test_cuda_never_falls_back() -> None:
    with pytest.raises(ProviderError, match="CUDA"):
        torch_contestant("net", nn.Linear(3, 4), (torch.ones(1, 3),), device="cuda")


@pytest.mark.cuda
@pytest.mark.skipif(cuda_problem() is not None, reason="ONNX Runtime cannot use CUDA here")
def test_on_cuda(tmp_path: Path) -> None:
    report = bench([save(tmp_path / "a.onnx", ("x", FLOAT, ["N", 3]))], device="cuda", rounds=6)
    assert report.contestants[0].provider == "CUDAExecutionProvider"


# -- the command -------------------------------------------------------------------------------------------------------


def command(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, ["bench", *map(str, arguments), "--device", "cpu", "--runs", "6"])


def test_what_it_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    save(tmp_path / "a.onnx", ("x", FLOAT, ["N", 3])), save(tmp_path / "b.onnx", ("x", FLOAT, ["N", 3]))
    (tmp_path / "net.py").write_text("from torch import nn\ndef make(): return nn.Linear(3, 1)\n")
    result = command("a.onnx", "b.onnx", "--source", "net.py:make", "--threads", "1", "--batch", "2")
    assert result.exit_code == 0, result.stderr
    assert "x:float32[2,3]   threads: 1   6 rounds after 5 calls each" in result.stdout
    lines = {line.split()[0]: line for line in result.stdout.splitlines() if "onnx " in line or "net.py" in line}
    assert set(lines) >= {"a.onnx", "b.onnx", "net.py:make"}
    times = r"b\.onnx +[\d.]+ \S+ +[\d.]+ \S+ +"
    ratio = r"([\d.]+ \([\d.]+ to [\d.]+\) +[\d.]+x|not told apart \([\d.]+ to [\d.]+\))"  # as the machine lets it
    assert re.search(times + ratio, lines["b.onnx"])
    assert lines["a.onnx"].endswith("CPUExecutionProvider") and lines["net.py:make"].endswith("torch, cpu")


def test_json_a_report_and_quiet(tmp_path: Path) -> None:
    net, kept = save(tmp_path / "a.onnx", ("x", FLOAT, ["N", 3])), tmp_path / "r.json"
    result = command(net, "--json", "--report", kept)
    assert result.exit_code == 0 and json.loads(result.stdout) == json.loads(kept.read_text())
    assert command(net, "--quiet").output == ""


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["missing.onnx"], 3, "missing.onnx: there is no such file"),
        (["a.onnx", "c.onnx"], 3, "c.onnx: it takes x:float32[N,4], a.onnx is run on x:float32[1,3]"),
        (["a.onnx", "--weights", "w.pt"], 2, "--weights: it is about a torch model, and none is named. Add --source"),
        (["a.onnx", "--arg", "width=3"], 2, "--arg: it is about a torch model"),
        (["a.onnx", "--source", "nowhere.py:make"], 3, "nowhere.py: there is no such file"),
        (["a.onnx", "--source", "net.py:wrong"], 3, "net.py:wrong: the model does not run on the file's inputs"),
        (["a.onnx", "--input", "x[N,3]"], 2, "N is no size. Write NAME[1,3,224,224]"),
        (["a.onnx", "--input", "[1,3]"], 2, "it names no input"),
        (["a.onnx", "--input", "x[1,3]", "--input", "x[2,3]"], 2, "it is given twice"),
        (["a.onnx", "--input", "y[1,3]"], 3, "no input named y. Its inputs are x"),
        (["d.onnx"], 3, 'nothing says how large H is. Give its whole shape, such as --input "x[1,224]"'),
        (["a.onnx", "--runs", "3"], 2, "'--runs'"),
        ([], 2, "NET.ONNX"),
    ],
)
def test_what_goes_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, shape in (("a", ["N", 3]), ("c", ["N", 4]), ("d", ["N", "H"])):
        save(tmp_path / f"{name}.onnx", ("x", FLOAT, shape))
    (tmp_path / "net.py").write_text("from torch import nn\ndef wrong(): return nn.Linear(4, 1)\n")
    result = CliRunner().invoke(cli, ["bench", "--runs", "6", "--device", "cpu", *arguments])
    assert result.exit_code == code, result.output
    assert said in result.stderr and "Traceback" not in result.stderr and result.stdout == ""
