"""Operators by themselves: what float64 is computed for, and that a kind is asked once a process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from onnx import NodeProto
from onnx.helper import make_node

from bnfold.evaluate.single import node_evaluator
from bnfold.gate import alone as module
from bnfold.gate.alone import LINES, alone
from bnfold.gate.thinning import EDGE, thinned

OPSETS = {"": 20}


def conv(channels: int, out: int, group: int, **attributes: Any) -> tuple[NodeProto, dict[str, Any], dict[str, Any]]:
    rng = np.random.default_rng(0)
    node = make_node("Conv", ["x", "w", "b"], ["y"], group=group, **attributes)
    held = {
        "w": rng.standard_normal((out, channels // group, 3, 3)).astype(np.float32),
        "b": rng.standard_normal(out).astype(np.float32),
    }
    return node, held, {"x": rng.standard_normal((3, channels, 7, 5)).astype(np.float32)}


def made(node: NodeProto, given: Mapping[str, Any]) -> Any:
    return node_evaluator(node, OPSETS)({n: given[n] for n in node.input})[0]


@pytest.mark.parametrize(
    ("channels", "out", "group"), [(5, 70, 1), (70, 70, 70), (44, 264, 44), (39, 780, 39), (40, 40, 2), (36, 108, 36)]
)
def test_a_part_of_a_convolution_is_that_part_of_its_result(channels: int, out: int, group: int) -> None:
    node, held, feeds = conv(channels, out, group, dilations=[2, 1], strides=[1, 2], pads=[1, 0, 2, 1])
    whole = made(node, {**held, **feeds})
    thin, few = thinned(node, {**held, **feeds, "y": whole}, held.keys())
    assert 4 * EDGE <= few["y"].shape[1] < out or (group == 2 and few["y"] is whole)
    np.testing.assert_allclose(made(thin, few), few["y"], rtol=1e-13, atol=1e-13 * np.abs(whole).max())
    assert np.array_equal(few["y"][:, 0], whole[:, 0]) and np.array_equal(few["y"][:, -1], whole[:, -1])


@pytest.mark.parametrize("form", ["MatMul", "rows", "Gemm", "transposed", "one bias"])
def test_a_part_of_a_product_is_that_part_of_its_result(form: str) -> None:
    rng = np.random.default_rng(1)
    x, w = (rng.standard_normal(shape).astype(np.float32) for shape in ((5, 7), (7, 47)))
    x = x[None] if form == "rows" else x
    bias = {} if form in ("MatMul", "rows") else {"b": rng.standard_normal(1 if form == "one bias" else 47)}
    turned = {"transB": 1} if form == "transposed" else {}
    node = make_node("Gemm" if bias else "MatMul", ["x", "w", *bias], ["y"], **turned)
    held = {"w": w.T.copy() if turned else w, **{n: b.astype(np.float32) for n, b in bias.items()}}
    whole = made(node, {"x": x, **held})
    thin, few = thinned(node, {"x": x, **held, "y": whole}, held.keys())
    assert few["y"].shape[-1] == (47 if form == "one bias" else 4 * EDGE)
    np.testing.assert_allclose(made(thin, few), few["y"], rtol=1e-13, atol=1e-13 * np.abs(whole).max())
    assert np.array_equal(few["y"][..., 0], whole[..., 0]) and np.array_equal(few["y"][..., -1], whole[..., -1])


def test_what_has_few_channels_or_is_no_product_with_constants_is_whole() -> None:
    node, held, feeds = conv(4, 4 * EDGE, 1)
    values = {**held, **feeds, "y": made(node, {**held, **feeds})}
    assert thinned(node, values, held.keys()) == (node, values)
    product = make_node("MatMul", ["x", "w"], ["y"])
    values = {"w": np.ones((3, 99), np.float32), "x": np.ones((2, 3), np.float32), "y": np.ones((2, 99), np.float32)}
    assert thinned(product, values, ["w"])[1]["y"].shape == (2, 4 * EDGE)
    for constants in ([], ["x", "w"]):
        assert thinned(product, values, constants) == (product, values)


def test_a_kind_is_asked_once_and_a_wrong_one_again(monkeypatch: pytest.MonkeyPatch) -> None:
    node, held, feeds = conv(3, 37, 1, auto_pad="SAME_LOWER")
    monkeypatch.setattr(module, "_right", set())

    def asked() -> Any:
        return alone([node], OPSETS, {**held, **feeds, "y": None}, frozenset(held), "cpu")

    real = module.open_session

    class Wrong:
        def __init__(self, session: Any) -> None:
            self.session = session

        def run(self, feeds: Mapping[str, Any]) -> list[Any]:
            (y,) = self.session.run(feeds)
            y[-1, -1] *= 1.001
            return [y]

    with monkeypatch.context() as patch:
        patch.setattr(module, "open_session", lambda *args, **options: Wrong(real(*args, **options)))
        assert [fault.operator for fault in asked().faults] == ["Conv"]
        assert [fault.operator for fault in asked().faults] == ["Conv"]  # it is not taken for right
    first = asked()
    assert first.count and not first.faults and not asked().count


def test_a_kind_that_could_not_be_asked_is_not_right(monkeypatch: pytest.MonkeyPatch) -> None:
    node, held, feeds = conv(3, 37, 1, auto_pad="SAME_UPPER")
    monkeypatch.setattr(module, "_right", set())

    def asked() -> Any:
        return alone([node], OPSETS, {**held, **feeds, "y": None}, frozenset(held), "cpu")

    with monkeypatch.context() as patch:
        patch.setattr(module, "MOST", 1)
        assert not asked().count and not module._right
    assert asked().count and module._right


def test_rows_are_cut_where_each_is_computed_by_itself() -> None:
    x = np.zeros((1, 200, 6), np.float32)
    for node, held, rows in (
        (make_node("MatMul", ["x", "w"], ["y"]), {"w": np.zeros((6, 3), np.float32)}, LINES),
        (make_node("Add", ["x", "w"], ["y"]), {"w": np.zeros(6, np.float32)}, LINES),
        (make_node("Add", ["x", "w"], ["y"]), {"w": np.zeros((200, 6), np.float32)}, 200),
        (make_node("Softmax", ["x"], ["y"], axis=-1), {}, LINES),
        (make_node("Softmax", ["x"], ["y"], axis=1), {}, 200),
        (make_node("ReduceMean", ["x"], ["y"]), {}, 200),
    ):
        operands = [x for batch, _ in module._provoking(node, x, held) for x in batch]
        assert operands and {operand.shape[1] for operand in operands} == {rows}


def test_what_moves_elements_is_not_asked_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_right", set())
    given = {"x": np.ones((2, 3), np.float32), "y": None}
    for operator, asked in (("Transpose", False), ("Relu", True)):
        node = make_node(operator, ["x"], ["y"])
        assert bool(alone([node], OPSETS, given, frozenset(), "cpu").count) is asked


@pytest.mark.parametrize("order", [0, 1])
def test_where_the_largest_stand_is_counted_through_a_batch(order: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_right", set())
    node = make_node("MaxPool", ["x"], ["y", "i"], kernel_shape=[2, 3], strides=[2, 1], storage_order=order)
    x = np.random.default_rng(0).normal(size=(1, 3, 7, 5)).astype(np.float32)
    found = alone([node], OPSETS, {"x": x, "y": None, "i": None}, frozenset(), "cpu")
    assert not found.faults and found.count


def test_batches_are_judged_on_each_row_once(monkeypatch: pytest.MonkeyPatch) -> None:
    node, held, feeds = conv(3, 37, 1)
    monkeypatch.setattr(module, "_right", set())
    seen: list[int] = []
    real = module.ask

    def counted(nodes: Any, opsets: Any, given: Mapping[str, Any], constants: Any) -> Any:
        seen.append(len(given["x"]))
        return real(nodes, opsets, given, constants)

    monkeypatch.setattr(module, "ask", counted)
    found = alone([node], OPSETS, {**held, "x": feeds["x"][:1], "y": None}, frozenset(held), "cpu")
    assert not found.faults and found.count == 2
    assert 5 <= seen[0] <= 6 and 5 <= seen[1] < 33
