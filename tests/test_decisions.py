"""Models that decide: truth follows near-ties and nothing else, so correct files pass and wrong ones never do."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import zoo
import zoo_deciding
from faults import on_node, replace_by
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from torch import Tensor, nn

from bnfold.aten.deciding import bound
from bnfold.gate.decisions import places
from bnfold.gate.gate import Gate
from bnfold.graph.capture import Captured, capture
from bnfold.graph.interpret import Runner
from bnfold.lowering.lower import lower, save
from bnfold.options import Folded
from bnfold.report import CheckReport, Ledger
from bnfold.stages import fold_captured, traced

torch.set_num_threads(1)
Fault = Callable[[onnx.ModelProto], None]


class Exported:
    """A net captured, folded and lowered once, to be judged with several faults."""

    def __init__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.captured: Captured = capture(module, args)
        self.folded: Folded = fold_captured(self.captured, merge=True)
        self.lowered = lower(self.folded.program, dims=self.captured.dims, sites=traced(self.folded))

    def judge(self, path: Path, fault: Fault | None = None, *, named: bool = True, **options: Any) -> CheckReport:
        save(self.lowered, path)
        if fault is not None:
            model = onnx.load(path)
            fault(model)
            onnx.save(model, path)
        if not named:
            return Gate(self.captured, Ledger(), None, path, **options).judge()
        return Gate(
            self.captured, self.folded.ledger, self.folded.program, path, self.lowered.sites, **options
        ).judge()  # fmt: skip


@cache
def exported(name: str) -> Exported:
    return Exported(*zoo_deciding.NETS[name]())


class Call(nn.Module):
    def __init__(self, run: Callable[..., Any], width: int = 4) -> None:
        super().__init__()
        self.linear, self.norm, self.run = nn.Linear(width, width), nn.BatchNorm1d(width), run

    def forward(self, x: Tensor) -> Any:
        return self.run(self.norm(self.linear(x)), x)


def call(run: Callable[..., Any], width: int = 4) -> Exported:
    torch.manual_seed(0)
    return Exported(zoo.randomize(Call(run, width)), (rows(5, width),))


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -- what passes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", zoo_deciding.NETS)
def test_a_correct_file_passes(name: str, tmp_path: Path) -> None:
    report = exported(name).judge(tmp_path / "net.onnx")
    assert report.verdict == "pass", report.problems
    assert report.ratio < 4 and {o.candidate for o in report.outputs} >= {"the file in float64", "ONNX Runtime"}


@pytest.mark.parametrize(
    ("name", "scale"), [("quantised", 1.0), ("quantised", 100.0), ("quantised", 0.01), ("wrapped", 100.0)]
)
def test_near_ties_are_told_and_pass_at_every_scale(name: str, scale: float, tmp_path: Path) -> None:
    net, (images,) = zoo_deciding.NETS[name]()
    report = Exported(net, (images * scale,)).judge(tmp_path / "net.onnx", seed=int(scale))
    assert report.verdict == "pass", report.problems
    assert scale < 1 or any("all of them near-ties" in note for note in report.notes)


@pytest.mark.parametrize("name", zoo_deciding.NETS)
def test_a_file_without_known_names_passes_too(name: str, tmp_path: Path) -> None:
    """``check`` has no ledger: it guesses that the file calls its decisions what the capture calls them."""
    assert exported(name).judge(tmp_path / "net.onnx", named=False).verdict == "pass"


def test_rounding_of_large_numbers_has_a_verdict(tmp_path: Path) -> None:
    net = call(lambda y, x: (y * 1e6).round() % 7)
    assert net.judge(tmp_path / "net.onnx").verdict == "pass"
    assert net.judge(tmp_path / "net.onnx", on_weight("linear", swapped)).verdict == "fail"


@pytest.mark.parametrize("scale", [1.0, 1e6])
def test_a_decision_may_change_how_much_there_is(scale: float, tmp_path: Path) -> None:
    net = call(lambda y, x: ((y + scale)[y + scale > scale + 0.25], (y + scale > scale + 0.25).sum(1)))
    report = net.judge(tmp_path / "net.onnx")
    assert report.verdict == "pass", report.problems
    assert net.judge(tmp_path / "net.onnx", on_node("Greater", replace_by("LessOrEqual"))).verdict == "fail"


# -- faults ------------------------------------------------------------------------------------------------------------


def scale_constant(old: float, new: float) -> Fault:
    def inject(model: onnx.ModelProto) -> None:
        for tensor in model.graph.initializer:
            if numpy_helper.to_array(tensor).size == 1 and numpy_helper.to_array(tensor).item() == np.float32(old):
                tensor.CopyFrom(numpy_helper.from_array(np.array(new, np.float32), tensor.name))
                return
        raise AssertionError("no such constant")

    return inject


def on_gemm(position: int, change: Callable[[np.ndarray], np.ndarray]) -> Fault:
    def inject(model: onnx.ModelProto) -> None:
        node = [n for n in model.graph.node if n.op_type == "Gemm"][position]
        on_weight(node.input[1], lambda weight: change(weight.T).T)(model)

    return inject


def on_weight(part: str, change: Callable[[np.ndarray], np.ndarray]) -> Fault:
    def inject(model: onnx.ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if part in t.name and len(t.dims) > 1)
        changed = change(numpy_helper.to_array(tensor).copy())
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(changed), tensor.name))

    return inject


def one_up(weight: np.ndarray) -> np.ndarray:
    return weight * 1.01


def swapped(weight: np.ndarray) -> np.ndarray:
    return weight[[1, 0, *range(2, len(weight))]]


def after(operator: str, output: int, *nodes: tuple[str, list[str], str], constants: dict[str, Any]) -> Fault:
    """Nodes between an operator's output, ``y``, and all that reads it, which reads ``z``."""

    def inject(model: onnx.ModelProto) -> None:
        graph = model.graph
        at, node = next((i, n) for i, n in enumerate(graph.node) if n.op_type == operator)
        name = node.output[output]
        node.output[output] = "y"
        made = [helper.make_node(op, inputs, [name if out == "z" else out]) for op, inputs, out in nodes]
        kept = list(graph.node)
        del graph.node[:]
        graph.node.extend([*kept[: at + 1], *made, *kept[at + 1 :]])
        graph.initializer.extend(numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items())

    return inject


def attribute(operator: str, name: str, value: int) -> Fault:
    def change(node: onnx.NodeProto) -> None:
        next(a for a in node.attribute if a.name == name).i = value

    return on_node(operator, change)


INDEX = {"one": np.int64(1), "n": np.int64(64)}
FAULTS: dict[str, tuple[str, Fault]] = {
    "the next index": (
        "detector", after("TopK", 1, ("Add", ["y", "one"], "up"), ("Mod", ["up", "n"], "z"), constants=INDEX)
    ),
    "one index for all": ("detector", after("TopK", 1, ("Mul", ["y", "no"], "z"), constants={"no": np.int64(0)})),
    "the smallest": ("detector", attribute("TopK", "largest", 0)),
    "index out of range": ("detector", after("TopK", 1, ("Sub", ["y", "n"], "z"), constants=INDEX)),
    "1 % before the top-k": ("detector", on_weight("stem.3", one_up)),
    "1 % in the score": ("detector", on_gemm(0, one_up)),
    "swapped channels": ("detector", on_weight("stem.0", swapped)),
    "1 % after the top-k": ("detector", on_gemm(2, one_up)),
    "the worst expert": ("experts", on_node("ArgMax", replace_by("ArgMin"))),
    "swapped experts": ("experts", on_gemm(0, swapped)),
    "floor for round": ("quantised", on_node("Round", replace_by("Floor"))),
    "no rounding": ("quantised", on_node("Round", replace_by("Identity"))),
    "1 % before the rounding": ("quantised", on_weight("stem.3", one_up)),
    "another step": ("quantised", scale_constant(2**-13, 1.001 * 2**-13)),
    "a step left out": ("quantised", on_node("Floor", replace_by("Ceil"))),
    "another overlap": ("suppression", scale_constant(0.6, 0.59)),
    "less for greater": ("suppression", on_node("Greater", replace_by("Less"))),
    "another threshold": ("keypoints", scale_constant(0.01, 2)),
    "no maxima": ("keypoints", on_node("Equal", replace_by("Less"))),
    "all are maxima": ("keypoints", on_node("Equal", replace_by("LessOrEqual"))),
    "heat off by 1 %": ("keypoints", on_weight("stem.0", one_up)),
    "the least likely class": ("classifier", on_node("ArgMax", replace_by("ArgMin"))),
    "another divisor": ("wrapped", scale_constant(0.73, 0.74)),
    "another boundary": ("wrapped", scale_constant(300, 301)),
}  # fmt: skip


class Faint(nn.Module):
    """Scores of next to nothing, of which the largest are taken: a sigmoid's kernel is off by more than they differ."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5))
        nn.init.constant_(self.score[1].bias, -14.0)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores, places = torch.sigmoid(self.score(x)).flatten(1).topk(40)
        return scores, places


def test_what_a_kernel_may_be_off_by_decides_no_more_than_a_near_tie(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Exported(Faint().eval(), (torch.randn(2, 3, 17, 19),))
    report = net.judge(tmp_path / "net.onnx")
    assert report.passed, report.problems
    for fault in (attribute("TopK", "largest", 0), on_weight("score", swapped)):
        assert net.judge(tmp_path / "net.onnx", fault).verdict == "fail"


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_fails(name: str, tmp_path: Path) -> None:
    net, fault = FAULTS[name]
    report = exported(net).judge(tmp_path / "net.onnx", fault)
    assert report.verdict == "fail" and any("the file in float64" in problem for problem in report.problems), report


@pytest.mark.parametrize("name", list(FAULTS)[::4])
def test_a_fault_in_a_file_without_known_names_is_not_green(name: str, tmp_path: Path) -> None:
    net, fault = FAULTS[name]
    assert exported(net).judge(tmp_path / "net.onnx", fault, named=False).verdict != "pass"


def anonymous(model: onnx.ModelProto) -> None:
    """Gives every value between the inputs and the outputs another name, as other tools do."""
    graph = model.graph
    kept = {v.name for v in [*graph.input, *graph.output, *graph.initializer]}
    names = {v: f"v{i}_{j}" for i, n in enumerate(graph.node) for j, v in enumerate(n.output) if v and v not in kept}
    for node in graph.node:
        node.input[:] = [names.get(v, v) for v in node.input]
        node.output[:] = [names.get(v, v) for v in node.output]
    del graph.value_info[:]


@pytest.mark.parametrize("name", ["quantised", "experts", "classifier"])
def test_decisions_that_cannot_be_read_are_no_failure(name: str, tmp_path: Path) -> None:
    report = exported(name).judge(tmp_path / "net.onnx", anonymous, named=False)
    assert report.verdict != "fail", report.problems
    assert name != "classifier" or report.verdict == "pass"  # its decisions are outputs

    def faulty(model: onnx.ModelProto) -> None:
        on_weight("stem.3", one_up)(model)
        anonymous(model)

    assert exported(name).judge(tmp_path / "net.onnx", faulty, named=False).verdict != "pass"


# -- randomness is no near-tie -----------------------------------------------------------------------------------------

RANDOM: dict[str, Callable[..., Any]] = {
    "values": lambda y, x: y + torch.rand_like(x),
    "mask": lambda y, x: y * (torch.rand_like(x) > 0.5),
    "truth values": lambda y, x: torch.rand_like(x) > 0.5,
    "classes": lambda y, x: torch.rand_like(x).argmax(1),
    "rounded": lambda y, x: (torch.rand_like(x) * 100).round(),
    "wild before the rounding": lambda y, x: (y * 1e9).round() - y * 1e9 + torch.rand_like(x).round(),
}


@pytest.mark.parametrize("name", RANDOM)
def test_randomness_never_passes(name: str, tmp_path: Path) -> None:
    assert call(RANDOM[name]).judge(tmp_path / "net.onnx").verdict != "pass"


# -- the rules ---------------------------------------------------------------------------------------------------------

#: Every operator of the table: how it is called on (3, 8), and a second operand where it takes one.
RULES: dict[str, Callable[..., Any]] = {
    "topk of a vector": lambda x, y: x[0].topk(3), "topk, unsorted": lambda x, y: x.topk(3, 1, sorted=False),
    "floor": lambda x, y: x.floor(),
    "argmax": lambda x, y: x.argmax(1), "argmax, kept": lambda x, y: x.argmax(0, keepdim=True),
    "argmax of all": lambda x, y: x.argmax(), "argmin": lambda x, y: x.argmin(-1),
    "argsort": lambda x, y: x.argsort(0), "topk": lambda x, y: x.topk(3, 1),
    "topk, smallest": lambda x, y: x.topk(2, 0, largest=False),
    "sort": lambda x, y: x.sort(1), "stable sort": lambda x, y: torch.sort(x, dim=0, descending=True, stable=True),
    "max": lambda x, y: x.max(1), "min": lambda x, y: x.min(0, keepdim=True), "median": lambda x, y: x.median(1),
    "kthvalue": lambda x, y: x.kthvalue(3, 1),
    "max_pool": lambda x, y: torch.nn.functional.max_pool2d(x[None, None], 2, 1, return_indices=True),
    "gt": lambda x, y: x > y, "ge": lambda x, y: x >= 0.2, "lt": lambda x, y: x < y[0], "le": lambda x, y: x <= y,
    "eq": lambda x, y: x == y, "ne": lambda x, y: x != y, "not": lambda x, y: torch.logical_not(x),
    "bool": lambda x, y: x.bool(), "signbit": lambda x, y: x.signbit(),
    "round": lambda x, y: (9 * x).round(), "decimals": lambda x, y: x.round(decimals=2),
    "ceil": lambda x, y: x.ceil(), "trunc": lambda x, y: (3 * x).trunc(), "sign": lambda x, y: x.sign(),
    "int": lambda x, y: (9 * x).int(), "type_as": lambda x, y: (9 * x).type_as(torch.zeros(1, dtype=torch.int64)),
    "floor_divide": lambda x, y: x // 0.3, "div, floor": lambda x, y: torch.div(x, y.abs() + 1, rounding_mode="floor"),
    "div, trunc": lambda x, y: torch.div(x, 0.3, rounding_mode="trunc"),
    "remainder": lambda x, y: x % 0.7, "remainder, negative": lambda x, y: x % -0.7, "fmod": lambda x, y: x.fmod(0.4),
    "frac": lambda x, y: x.frac(), "bucketize": lambda x, y: torch.bucketize(x, torch.tensor([-1.0, 0.0, 0.7])),
}  # fmt: skip
#: What is continuous, or decides on integers, is no place.
NO_PLACES: dict[str, Callable[..., Any]] = {
    "values of topk": lambda x, y: x.topk(3, 1).values, "max of all": lambda x, y: x.max(), "maximum": torch.maximum,
    "amax": lambda x, y: x.amax(1), "div": lambda x, y: x / y, "to double": lambda x, y: x.double(),
    "integers": lambda x, y: torch.arange(x.shape[1]) > 3, "relu": lambda x, y: x.relu(),
}  # fmt: skip


class Run(nn.Module):
    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__()
        self.run = run

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.run(x, y)


@cache
def place(name: str) -> tuple[Any, Any]:
    captured = capture(Run(RULES[name]), (rows(3, 8), rows(3, 8, seed=1)), static=True)
    (found,) = places(captured.program)
    return captured, found


@pytest.mark.parametrize("name", NO_PLACES)
def test_what_does_not_decide_is_no_place(name: str) -> None:
    captured = capture(Run(NO_PLACES[name]), (rows(3, 8), rows(3, 8, seed=1)), static=True)
    assert places(captured.program) == ()


@pytest.mark.parametrize("name", RULES)
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**16), error=st.sampled_from([1e-6, 1e-3, 0.1]), ties=st.booleans())
def test_the_gap_is_within_the_error_that_turned_a_decision(name: str, seed: int, error: float, ties: bool) -> None:
    """What an operator decides on values that are off by at most e has a gap of at most 2 e; and it is followed."""
    captured, at = place(name)
    x, y = rows(3, 8, seed=seed).double(), rows(3, 8, seed=seed + 1).double()
    if ties:  # next to where the operators turn
        x = (x * 4).round() / 4 + 1e-4 * error * rows(3, 8, seed=seed + 2)
        y = (y * 4).round() / 4
    near = x + error * (2 * torch.rand(3, 8, generator=torch.Generator().manual_seed(seed)).double() - 1)
    runner, seen = Runner(captured.program, precise=True), {}
    runner((near, y), keep=[at.value])
    chosen = runner.kept[at.value]

    def look(args: Any, kwargs: Any, own: Any) -> Any:
        arguments = bound(at.target, args, kwargs)
        mine = own if at.rule.item is None else own[at.rule.item]
        differs = at.rule.differs(mine, chosen)
        seen["gap"] = at.rule.gap(arguments, mine, chosen)
        seen["same"] = at.rule.gap(arguments, mine, mine)
        seen["unit"] = float(at.rule.compared(arguments).abs().max() / x.abs().max())
        result = at.rule.result(arguments, own, chosen) if bool(differs.any()) else own
        seen["followed"] = not bool(
            at.rule.differs(result if at.rule.item is None else result[at.rule.item], chosen).any()
        )
        return result

    outputs = runner((x, y), steering={at.node: look})
    exact = not bool(((x - near) == 0).all())
    assert float(seen["same"].max()) == 0 and seen["followed"] and exact
    assert float(seen["gap"].max()) <= 2.001 * error * max(seen["unit"], 100.0 if name == "decimals" else 9.0)
    if at.rule.item is not None and "pool" not in name:
        values = runner((near, y))[0]
        # Elements that were close to one another there are close here.
        assert float((outputs[0] - values).abs().max()) <= 3 * error


#: An index that occurs twice, one that is out of range, a rounded number that is none, a sign of two.
IMPOSSIBLE: dict[str, Callable[[Tensor], Tensor]] = {
    "topk": lambda i: i[:, :1].expand(-1, 3), "sort": lambda i: i + 1, "argmax": lambda i: i + 100,
    "argsort": lambda i: i * 0, "round": lambda r: r + 0.25, "floor": lambda r: r + 0.5, "sign": lambda s: 2 * s,
    "bucketize": lambda b: b + 7,
}  # fmt: skip


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_what_nobody_could_decide_is_infinitely_far(name: str) -> None:
    captured, at = place(name)
    found = {}

    def look(args: Any, kwargs: Any, own: Any) -> Any:
        mine = own if at.rule.item is None else own[at.rule.item]
        found["gap"] = at.rule.gap(bound(at.target, args, kwargs), mine, IMPOSSIBLE[name](mine))
        return own

    Runner(captured.program, precise=True)((rows(3, 8), rows(3, 8, seed=1)), steering={at.node: look})
    assert float(found["gap"].max()) == torch.inf


def test_ties_by_construction_are_not_broken() -> None:
    """Values that are equal because they are the same value do not lie close by chance."""
    captured, at = place("eq")
    found = {}

    def look(args: Any, kwargs: Any, own: Any) -> Any:
        found["gap"] = at.rule.gap(bound(at.target, args, kwargs), own, ~own)
        return own

    x = rows(3, 8)
    Runner(captured.program, precise=True)((x, x.clone()), steering={at.node: look})
    assert bool((found["gap"] == torch.inf).all())


def test_infinities_are_compared_as_values() -> None:
    captured, at = place("topk")
    x = rows(3, 8).masked_fill(rows(3, 8, seed=4) > 0, -torch.inf)
    runner = Runner(captured.program, precise=True)
    runner((x, x), keep=[at.value])
    other, found = runner.kept[at.value].clone(), {}
    other[0] = torch.tensor([7, 6, 5])

    def look(args: Any, kwargs: Any, own: Any) -> Any:
        found["same"], found["other"] = (
            at.rule.gap(bound(at.target, args, kwargs), own[1], chosen) for chosen in (own[1], other)
        )
        return own

    runner((x, x), steering={at.node: look})
    assert float(found["same"].max()) == 0 and not bool(found["other"].isnan().any())
    assert float(found["other"][0].max()) > 0.1
