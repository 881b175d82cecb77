"""The engine: who must agree with whom, where an affine ends, what the ledger says, and what is left alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from checker import assert_close, build, count_operators, fold_exactly, noise, operators, reasons, state_bytes
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F

import bnfold
from bnfold.report import REASONS, Entry

IMAGE = noise(2, 4, 6, 6)


def conv(out: int = 4, kernel: int = 3, padding: int = 1, channels: int = 4, **more: Any) -> nn.Conv2d:
    return nn.Conv2d(channels, out, kernel, padding=padding, **more)


def bn(channels: int = 4, **more: Any) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, **more)


def const(*values: float) -> Tensor:
    """Values along the channels of an image."""
    return torch.tensor(values, dtype=torch.float64).reshape(-1, 1, 1)


def plain(module: nn.Module, *args: Any, **more: Any) -> bnfold.Folded:
    """Folded and not merged."""
    return bnfold.fold(module, args, merge=False, **more)


def entry(folded: bnfold.Folded, name: str) -> Entry:
    """The entry of a module, or of the value by that name."""
    (found,) = [e for e in folded.ledger.entries if name in (e.module, e.value)]
    return found


POSITIVE, SIGNED = const(0.5, 1.5, 2.0, 0.7), const(0.5, -1.5, 2.0, 0.7)
Run = Callable[..., Any]

# -- what folds --------------------------------------------------------------------------------------------------------

#: name -> forward(m, x), modules and buffers, where every affine goes: module (or value) -> (outcome, into)
FOLDS: dict[str, tuple[Run, dict[str, Any], dict[str, tuple[str, tuple[str, ...]]]]] = {
    "slices are read independently": (
        lambda m, x: [m.n1((y := m.a(x))[:, :4]), y[:, 4:].sigmoid()],
        {"a": conv(8), "n1": bn()},
        {"n1": ("backward", ("a",))},
    ),
    "splits are read independently": (
        lambda m, x: [m.n1((y := m.a(x).chunk(3, 1))[0]).sigmoid(), m.n2(y[1]), y[2]],
        {"a": conv(12), "n1": bn(), "n2": bn()},
        {"n1": ("backward", ("a",)), "n2": ("backward", ("a",))},
    ),
    "a shape is no reader": (
        lambda m, x: m.n(y := m.a(x)) + torch.zeros_like(y) + x.reshape(y.shape),
        {"a": conv(), "n": bn()},
        {"n": ("backward", ("a",))},
    ),
    "a shift's home in a sum is the operand that takes it": (
        lambda m, x: (x.sigmoid() + m.a(x)) + m.shift,
        {"a": conv(), "shift": SIGNED},
        {"add_1": ("backward", ("a",))},
    ),
    "whichever order": (
        lambda m, x: (m.a(x) + x.sigmoid()) + m.shift,
        {"a": conv(), "shift": SIGNED},
        {"add_1": ("backward", ("a",))},
    ),
    "a scale's home in a product is the factor that takes it": (
        lambda m, x: (x.sigmoid() * m.a(x)) * m.scale,
        {"a": conv(), "scale": SIGNED},
        {"mul_1": ("backward", ("a",))},
    ),
    "in any order": (
        lambda m, x: (m.a(x) * x.sigmoid()) * m.scale,
        {"a": conv(), "scale": SIGNED},
        {"mul_1": ("backward", ("a",))},
    ),
    "a residual": (
        lambda m, x: F.relu(x + m.n2(m.b(F.relu(m.n1(m.a(x)))))),
        {"a": conv(), "n1": bn(), "b": conv(), "n2": bn()},
        {"n1": ("backward", ("a",)), "n2": ("backward", ("b",))},
    ),
    "a norm after a sum goes into both": (
        lambda m, x: F.relu(m.n(m.a(x) + m.b(F.pad(x, (1, 1, 1, 1))))),
        {"a": conv(), "b": conv(padding=0), "n": bn()},
        {"n": ("backward", ("a", "b"))},
    ),
    "layer scale": (
        lambda m, x: x + m.gamma * m.b(F.gelu(m.a(m.n(x)))),
        {"n": bn(), "a": conv(8, 1, 0), "b": conv(4, 1, 0, 8), "gamma": SIGNED},
        {"n": ("forward", ("a",)), "mul": ("backward", ("b",))},
    ),
    "a chain is composed": (
        lambda m, x: m.n2(m.n1(m.a(x)) * m.scale + m.shift).relu(),
        {"a": conv(), "n1": bn(), "n2": bn(), "scale": SIGNED, "shift": POSITIVE},
        dict.fromkeys(("n1", "n2", "mul", "add"), ("backward", ("a",))),
    ),
    "a chain is composed and goes on": (
        lambda m, x: m.a(m.n2(m.n1(x.relu()).flip(2))),
        {"a": conv(padding=0), "n1": bn(), "n2": bn()},
        {"n1": ("forward", ("a",)), "n2": ("forward", ("a",))},
    ),
    "into two linears": (
        lambda m, x: [m.p(y := m.n(x.relu().mean((2, 3)))), m.q(y)],
        {"n": nn.BatchNorm1d(4), "p": nn.Linear(4, 3), "q": nn.Linear(4, 5, bias=False)},
        {"n": ("forward", ("p", "q"))},
    ),
    "through a flatten into a linear": (
        lambda m, x: m.p(m.n(x.relu()).flatten(1)),
        {"n": bn(), "p": nn.Linear(144, 3)},
        {"n": ("forward", ("p",))},
    ),
    "after a concatenation, into every branch": (
        lambda m, x: m.n(torch.cat([m.a(x), m.b(x), m.n2(m.c(x))], 1)).relu(),
        {"a": conv(2), "b": conv(3, 1, 0), "c": conv(1), "n2": bn(1), "n": bn(6)},
        {"n": ("backward", ("a", "b", "c")), "n2": ("backward", ("c",))},
    ),
    "several outputs": (
        lambda m, x: {"one": m.n(m.a(x)), "two": [m.n2(m.b(x)), x]},
        {"a": conv(), "n": bn(), "b": conv(3), "n2": bn(3)},
        {"n": ("backward", ("a",)), "n2": ("backward", ("b",))},
    ),
    "heads folded into the batch": (
        lambda m, x: m.n(m.a(x.flatten(2).transpose(1, 2)).flatten(0, 1)).unflatten(0, (-1, 36)).sigmoid(),
        {"a": nn.Linear(4, 6), "n": nn.BatchNorm1d(6)},
        {"n": ("backward", ("a",))},
    ),
    "channels folded into the batch": (
        lambda m, x: (m.a(x).reshape(-1, 1, 6, 6) * m.one).reshape(-1, 4, 6, 6),
        {"a": conv(), "one": const(1.7)},
        {"mul": ("backward", ("a",))},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDS)
def test_folds(name):
    run, parts, wanted = FOLDS[name]
    module = build(run, **copy.deepcopy(parts))
    fold_exactly(module, IMAGE)
    folded = plain(module, IMAGE)
    found = {e.module if e.is_batch_norm else e.value: (e.outcome, e.into) for e in folded.ledger.entries}
    assert found == wanted
    assert count_operators(folded.program) == count_operators(folded.captured.program) - len(wanted)


# -- what is refused ---------------------------------------------------------------------------------------------------


class Functional(nn.Module):
    """BatchNorm with parameters that the input computes."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, x.new_zeros(4), x.new_ones(4), x.mean((0, 2, 3)), x.new_ones(4), False)


def broken(name: str, value: float) -> nn.BatchNorm2d:
    norm = bn()
    getattr(norm, name).data[2] = value
    return norm


def frozen(m: nn.Module, x: Tensor) -> Tensor:
    y = m.a(x)
    part = y[:, :2]
    y.mul_(2.0)
    return m.n(y).relu() + part.sum()


#: reason -> forward, parts, the module or operator in the way
REFUSALS: dict[str, tuple[Run, dict[str, Any], str | None]] = {
    "batch-statistics": (lambda m, x: m.n(m.a(x)), {"a": conv(), "n": bn(track_running_stats=False)}, "n"),
    "not-constant": (lambda m, x: m.n(m.a(x)), {"a": conv(), "n": Functional()}, "n"),
    "nonfinite": (lambda m, x: m.n(m.a(x)), {"a": conv(), "n": bn()}, "n"),
    "in-place": (frozen, {"a": conv(), "n": bn()}, None),
    "nonlinear": (lambda m, x: m.n(m.a(x).sigmoid()), {"a": conv(), "n": bn()}, "aten.sigmoid"),
    "unknown-operator": (lambda m, x: m.n(torch.fft.fft(m.a(x)).real), {"a": conv(), "n": bn()}, "aten.real"),
    "shift-through-activation": (lambda m, x: m.n(m.act(m.a(x))), {"a": conv(), "act": nn.ReLU(), "n": bn()}, "act"),
    "shift-through-product": (lambda m, x: m.n(m.a(x) * x), {"a": conv(), "n": bn()}, "aten.mul"),
    "sign": (lambda m, x: m.a(x).relu() * m.s, {"a": conv(), "s": SIGNED}, "aten.relu"),
    "other-axis": (lambda m, x: m.n(m.a(x)), {"a": nn.Linear(6, 6), "n": bn()}, "a"),
    "copies-differ": (lambda m, x: m.n(m.a(x).expand(-1, 4, -1, -1)), {"a": conv(1), "n": bn()}, "aten.expand"),
    "broadcast": (lambda m, x: m.n(m.a(x).mean(1, True) + m.b(x)), {"a": conv(), "b": conv(), "n": bn()}, "aten.add"),
    "unequal-scales": (lambda m, x: m.a(m.n(x) + x.relu()), {"a": conv(padding=0), "n": bn()}, "aten.add"),
    "zero-padding": (lambda m, x: m.a(m.n(x)), {"a": conv(), "n": bn()}, "a"),
    "several-readers": (lambda m, x: m.n(y := m.a(x)) + y.relu(), {"a": conv(), "n": bn()}, "aten.relu"),
    "no-saving": (lambda m, x: (x @ m.w) + m.c, {"w": noise(6, 6), "c": noise(1, 1, 1, 6)}, "aten.matmul"),
    "model-input": (lambda m, x: m.n(x), {"n": bn()}, "input 'inputs_0'"),
    "model-output": (lambda m, x: m.n(x), {"n": bn()}, "the model's output"),
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSALS)
def test_refuses(reason):
    run, parts, blocker = REFUSALS[reason]
    module = build(run, **copy.deepcopy(parts))
    if reason == "nonfinite":
        module.n.running_var[2] = -1.0
    folded = fold_exactly(module, IMAGE, left=1)
    (left,) = folded.ledger.left
    found = {r.blocker for r in left.refusals if r.reason == reason}
    assert found, left.refusals
    assert blocker is None or blocker in found


def test_refuses_overflow():
    """A fold that float16 cannot hold, with the channel; float32 can."""
    module = build(lambda m, x: m.n(m.a(x)), a=conv(), n=bn(eps=1e-8)).float()
    module.n.running_var[1] = 1e-9
    module.a.weight.data[1] = 50.0
    half = plain(module, IMAGE.float(), dtype=torch.float16)
    (left,) = half.ledger.left
    assert (
        left.refusals[0].reason == "overflow" and left.refusals[0].blocker == "a" and "[1," in left.refusals[0].detail
    )
    assert not plain(module, IMAGE.float()).ledger.left


@pytest.mark.parametrize(("factor", "stays"), [(1e-3, False), (1e-5, True), (1e-9, True)])
def test_refuses_what_would_be_below_the_normal_numbers(factor, stays):
    """Weights that float16 keeps a few bits of; the BatchNorm before the factor goes into them all the same."""
    module = build(lambda m, x: m.n(m.a(x)) * factor, a=conv(), n=bn()).float()
    half = plain(module, IMAGE.float(), dtype=torch.float16)
    assert [left.value for left in half.ledger.left] == (["mul"] if stays else [])
    if stays:
        refusal = half.ledger.left[0].refusals[0]
        assert refusal.reason == "overflow" and refusal.blocker == "a" and refusal.detail.endswith("the largest of all")
    assert not plain(module, IMAGE.float()).ledger.left


def test_refuses_a_change_of_dtype():
    """A float32 constant makes a float16 value float32: leaving it out would change what eager gives."""
    module = build(lambda m, x: m.a(x) * m.s, a=conv(), s=POSITIVE).half()
    module.s = POSITIVE.float()
    folded = plain(module, IMAGE.half())
    assert reasons(folded) == {"dtype"}
    assert folded.module(IMAGE.half()).dtype == torch.float32


def test_refuses_what_would_hold_for_one_size_only():
    """At width 2 the pairs of features are channels; at any other width they are not."""
    pairs = torch.tensor([0.5, 0.5, 2.0, 2.0], dtype=torch.float64)
    run = lambda m, x: m.a(x).flatten(1).unflatten(1, (-1, 4)) * m.pairs  # noqa: E731
    module, x = build(run, a=nn.Conv1d(4, 4, 1), pairs=pairs), noise(2, 4, 2)
    dynamic = plain(module, x, dynamic_shapes={"inputs": ({0: Dim.DYNAMIC, 2: Dim.DYNAMIC},)})
    assert reasons(dynamic) == {"dynamic-size", "model-output"}
    assert not fold_exactly(module, x).ledger.left
    wide = noise(3, 4, 6)
    torch.testing.assert_close(dynamic.module(wide), module(wide), rtol=1e-10, atol=1e-10)


def test_every_reason_has_its_test():
    elsewhere = {"channels", "overflow", "dtype", "dynamic-size", "inexpressible", "packed-sequence", "region"}
    elsewhere |= {"cancellation"}  # test_cancellation.py
    assert REFUSALS.keys() | elsewhere == REASONS.keys()


# -- agreement ---------------------------------------------------------------------------------------------------------


def test_overlapping_slices_are_not_independent():
    run = lambda m, x: [m.n((y := m.a(x))[:, :4]), y[:, 3:].sigmoid()]  # noqa: E731
    folded = fold_exactly(build(run, a=conv(8), n=bn()), IMAGE, left=1)
    refusal = entry(folded, "n").refusals[0]
    assert (refusal.reason, refusal.operator) == ("several-readers", "aten.slice")


def test_a_value_that_is_also_returned_keeps_its_meaning():
    folded = fold_exactly(build(lambda m, x: [m.n(y := m.a(x)), y], a=conv(), n=bn()), IMAGE, left=1)
    refusal = entry(folded, "n").refusals[0]
    assert (refusal.reason, refusal.operator) == ("several-readers", "output")


def test_readers_that_want_the_same_agree():
    """Both operands of the sum are one value, and both must become the same."""
    folded = fold_exactly(build(lambda m, x: ((y := m.a(x)) + y.flip(3)) * m.s, a=conv(), s=SIGNED), IMAGE)
    assert entry(folded, "mul").into == ("a",)
    twin = fold_exactly(build(lambda m, x: ((y := m.a(x)) + y.flip(1)) * m.s, a=conv(), s=SIGNED), IMAGE, left=1)
    assert entry(twin, "mul").refusals[0].reason == "unequal-scales"


# -- sharing -----------------------------------------------------------------------------------------------------------


def test_a_module_called_twice_gets_a_copy_per_use():
    run = lambda m, x: m.n2(m.a(F.relu(m.n1(m.a(x)))))  # noqa: E731
    folded = fold_exactly(build(run, a=conv(), n1=bn(), n2=bn()), IMAGE)
    weights = [p for name, p in folded.program.state_dict.items() if name.startswith("a") and p.ndim == 4]
    assert len(weights) == 2 and not torch.equal(*weights)


@pytest.mark.parametrize(("second", "count"), [(POSITIVE, 1), (SIGNED, 2)])
def test_uses_that_are_to_read_the_same_share_it(second: Tensor, count: int):
    run = lambda m, x: [(m.a(x) * m.s).sigmoid(), (m.a(x.flip(2)) * m.t).sigmoid()]  # noqa: E731
    folded = fold_exactly(build(run, a=conv(), s=POSITIVE, t=second.clone()), IMAGE)
    for rank in (1, 4):
        assert len([p for p in folded.program.state_dict.values() if p.ndim == rank]) == count


def test_one_use_of_a_shared_weight_stays_as_it_is():
    run = lambda m, x: [m.n(m.a(x)), m.a(x.flip(2))]  # noqa: E731
    module = build(run, a=conv(), n=bn())
    folded = fold_exactly(module, IMAGE)
    assert any(
        p.shape == module.a.weight.shape and torch.equal(p, module.a.weight) for p in folded.program.state_dict.values()
    )


def test_a_norm_called_twice_folds_twice():
    run = lambda m, x: m.n(m.b(F.relu(m.n(m.a(x)))))  # noqa: E731
    folded = fold_exactly(build(run, a=conv(), b=conv(), n=bn()), IMAGE)
    assert [(e.module.split("@")[0], e.into) for e in folded.ledger.entries] == [("n", ("a",)), ("n", ("b",))]


def test_tied_weights():
    module = build(lambda m, x: m.n(m.b(m.a(x).relu())), a=conv(), b=conv(), n=bn())
    module.b.weight = module.a.weight
    assert entry(fold_exactly(module, IMAGE), "n").into == ("b",)


# -- dtypes and sizes --------------------------------------------------------------------------------------------------


def test_mixed_dtypes():
    """Every constant is rounded to the dtype of the one it replaces."""
    run = lambda m, x: m.n2(m.b(m.n1(m.a(x)).relu().double()))  # noqa: E731
    module = build(run, a=conv(), n1=bn(), b=conv(), n2=bn())
    module.a.float(), module.n1.float()
    folded = plain(module, IMAGE.float())
    assert not folded.ledger.left
    dtypes = {name: p.dtype for name, p in folded.program.state_dict.items()}
    assert dtypes == {
        "a.weight": torch.float32,
        "a.bias": torch.float32,
        "b.weight": torch.float64,
        "b.bias": torch.float64,
    }


def test_dynamic_height_and_width_stay_dynamic():
    shapes = {"inputs": ({0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC},)}
    run = lambda m, x: m.n2(F.avg_pool2d(m.n1(m.a(x)), 2).flip(3))  # noqa: E731
    module = build(run, a=conv(), n1=bn(), n2=bn())
    folded = plain(module, IMAGE, dynamic_shapes=shapes)
    assert not folded.ledger.left
    for size in ((1, 4, 8, 10), (5, 4, 12, 6)):
        x = noise(*size)
        torch.testing.assert_close(folded.module(x), module(x), rtol=1e-10, atol=1e-10)


# -- the ledger --------------------------------------------------------------------------------------------------------


def net() -> nn.Module:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        y = F.relu(m.n1(m.a(x)))
        y = F.max_pool2d(y, 2) * m.s
        return m.fc(m.n3(m.n2(m.b(y).sigmoid()).mean((2, 3))))

    parts = {"a": conv(), "n1": bn(), "s": POSITIVE, "b": conv(), "n2": bn(), "n3": nn.BatchNorm1d(4)}
    return build(run, **parts, fc=nn.Linear(4, 3))


def test_ledger_says_what_happened():
    folded = plain(net(), IMAGE)
    seen = {e.value: (e.module, e.layer, e.kind, e.outcome, e.into, e.through) for e in folded.ledger.entries}
    assert seen == {
        "batch_norm": ("n1", "BatchNorm2d", "batch_norm", "backward", ("a",), ()),
        "mul": ("", "Net", "mul", "backward", ("a",), ("max_pool2d", "relu")),
        "batch_norm_1": ("n2", "BatchNorm2d", "batch_norm", "forward", ("fc",), ("mean",)),
        "batch_norm_2": ("n3", "BatchNorm1d", "batch_norm", "forward", ("fc",), ()),
    }


def test_sites_name_values_that_are_equal():
    from bnfold.affine import Meaning
    from bnfold.graph.interpret import Runner
    from bnfold.graph.program import meanings

    folded = plain(net(), IMAGE)
    sites, stored = folded.ledger.sites, meanings(folded.program)
    assert sites
    before, after = Runner(folded.captured.program), Runner(folded.program)
    before([IMAGE], keep=set(sites.values())), after([IMAGE], keep=set(sites))
    for mine, captured in sites.items():
        meaning = stored.get(mine) or Meaning(captured)
        assert meaning.value == captured
        torch.testing.assert_close(after.kept[mine], meaning.of(before.kept[captured]), rtol=1e-10, atol=1e-10)


def test_folding_is_deterministic():
    module = net()
    first, second = plain(module, IMAGE), plain(copy.deepcopy(module), IMAGE)
    assert first.ledger == second.ledger
    one, two = first.program.state_dict, second.program.state_dict
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_folding_is_idempotent():
    first = plain(net(), IMAGE)
    again = bnfold.fold(first.program, merge=False)
    assert not again.ledger.folded and operators(again.program) == operators(first.program)
    assert all(torch.equal(again.program.state_dict[n], p) for n, p in first.program.state_dict.items())


def test_the_callers_model_is_untouched():
    module = net().train()
    before, modes = state_bytes(module), [m.training for m in module.modules()]
    plain(module, IMAGE)
    after = state_bytes(module)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert modes == [m.training for m in module.modules()]


# -- sizes that depend on data -----------------------------------------------------------------------------------------


def points(m, x):
    return torch.flip(torch.nonzero(m.norm(m.conv(x))[0, 0] > 0.5), [1]) * 2.0


def boxes_kept(m, x):
    y = m.norm(m.conv(x)).flatten(2)[0].t()
    return y[y[:, 0] > 0.1] / 8 - y.new_ones(4)


def self_loops(m, x):
    return torch.cat([torch.nonzero(m.norm(m.conv(x))[0, 0] > 0.5)[:, 0], torch.arange(9)]) * 2.0


def voxels(m, x):
    y = m.norm(m.conv(x)).flatten(2)[0].t()
    kept = y[y[:, 0] > -0.1]
    torch._check(kept.shape[0] != 0)
    kept = m.inner(m.first(kept))
    return m.second(kept) + m.third(kept).relu() * 3


@pytest.mark.parametrize("run", [points, boxes_kept, self_loops, voxels])
def test_sizes_that_depend_on_data_are_in_no_ones_way(run):
    linears = {name: nn.Linear(4, 4) for name in ("first", "second", "third")}
    net = build(run, conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4), inner=nn.BatchNorm1d(4), **linears)
    image = noise(1, 3, 9, 9)
    folded = bnfold.fold(net, (image,), static=True, equalize=True)
    assert not folded.ledger.left
    for x in (image, noise(1, 3, 9, 9, seed=1)):
        with torch.no_grad():
            assert_close(folded.module(x), net(x))
    assert bnfold.inspect(net, (image,)).plan is not None
