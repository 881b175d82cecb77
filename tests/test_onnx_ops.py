"""Every row of the table of ONNX operators, on structure and on numbers, each beside a twin that is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper
from onnx_nets import apart, f, folded, net, norm, statistics, types

import bnfold

node = helper.make_node
EXACT = 2.0**-40  # a few hundred roundings of float64


def conv(data: str, result: str, **more: Any) -> Any:
    return node("Conv", [data, "w", "b"], [result], name="conv", **more)


W = {"w": f(4, 3, 3, 3), "b": f(4)}
IMAGE = ["N", 3, 9, 7]


def branch(kind: str) -> Any:
    return helper.make_graph([node(kind, ["c"], [kind])], kind, [], [helper.make_tensor_value_info(kind, 11, None)])


#: nodes, shape of x, weights, options of the net: every BatchNormalization goes.
GOES: dict[str, tuple[list[Any], list[Any], dict[str, Any], dict[str, Any]]] = {
    "conv": ([conv("x", "c"), norm("c", "y")], IMAGE, {**W, **statistics(4)}, {}),
    "conv padded, strided": (
        [conv("x", "c", pads=[1, 1, 1, 1], strides=[2, 1], dilations=[1, 2]), norm("c", "y")],
        IMAGE, {**W, **statistics(4)}, {},
    ),
    "conv without bias": (
        [node("Conv", ["x", "w"], ["c"]), norm("c", "y")], IMAGE, {"w": f(4, 3, 3, 3), **statistics(4)}, {},
    ),
    "conv in groups": (
        [node("Conv", ["x", "w"], ["c"], group=2), norm("c", "y")], ["N", 6, 5, 5],
        {"w": f(4, 3, 2, 2), **statistics(4)}, {},
    ),
    "conv same": ([conv("x", "c", auto_pad="SAME_UPPER"), norm("c", "y")], IMAGE, {**W, **statistics(4)}, {}),
    "conv1d": ([node("Conv", ["x", "w"], ["c"]), norm("c", "y")], ["N", 3, 9], {"w": f(5, 3, 2), **statistics(5)}, {}),
    "transposed": (
        [node("ConvTranspose", ["x", "w"], ["c"], strides=[2, 2], group=3), norm("c", "y")], ["N", 6, 4, 5],
        {"w": f(6, 2, 3, 3), **statistics(6)}, {},
    ),
    "before an unpadded conv": ([norm("x", "n"), conv("n", "y")], IMAGE, {**W, **statistics(3)}, {}),
    "gemm": (
        [node("Gemm", ["x", "w", "c"], ["g"], alpha=0.3, beta=2.0, transB=1), norm("g", "y")], ["N", 5],
        {"w": f(4, 5), "c": f(4), **statistics(4)}, {},
    ),
    "gemm without C": ([node("Gemm", ["x", "w"], ["g"], alpha=0.5), norm("g", "y")], ["N", 5],
                       {"w": f(5, 4), **statistics(4)}, {}),
    "before gemm": (
        [norm("x", "n"), node("Gemm", ["n", "w"], ["y"], alpha=0.3)], ["N", 5], {"w": f(5, 4), **statistics(5)}, {},
    ),
    "matmul": (
        [node("MatMul", ["x", "w"], ["g"]), node("Add", ["g", "b"], ["h"]), norm("h", "y")], ["N", 5],
        {"w": f(5, 4), "b": f(4), **statistics(4)}, {},
    ),
    "einsum": (
        [node("Einsum", ["x", "w"], ["g"], equation="ni,oi->no"), node("Add", ["g", "b"], ["h"]), norm("h", "y")],
        ["N", 5], {"w": f(4, 5), "b": f(4), **statistics(4)}, {},
    ),
    "channels last": (
        [conv("x", "c"), node("Transpose", ["c"], ["t"], perm=[0, 2, 3, 1]), node("Mul", ["t", "s"], ["m"]),
         node("Add", ["m", "o"], ["a"]), node("Transpose", ["a"], ["u"], perm=[0, 3, 1, 2]), norm("u", "y")],
        IMAGE, {**W, "s": f(4), "o": f(1, 1, 1, 4), **statistics(4)}, {},
    ),
    "constants behind Identity and Constant nodes": (
        [node("Identity", ["w0"], ["w"]), node("Constant", [], ["n.var"], value_floats=[1.5, 0.5, 2.0, 0.25]),
         conv("x", "c"), norm("c", "y")],
        IMAGE, {**{k: v.astype(np.float32) for k, v in {"w0": W["w"], "b": W["b"], **statistics(4)}.items()
                   if k != "n.var"}}, {"dtype": 1},
    ),
    "concat": (
        [conv("x", "c"), node("Conv", ["x", "v"], ["d"]), node("Concat", ["c", "d"], ["e"], axis=1), norm("e", "y")],
        IMAGE, {**W, "v": f(2, 3, 3, 3), **statistics(6)}, {},
    ),
    "split": (
        [norm("x", "n"), node("Split", ["n"], ["p", "q"], axis=1), node("Conv", ["p", "v"], ["r"]),
         node("Conv", ["q", "v"], ["s"]), node("Add", ["r", "s"], ["y"])],
        ["N", 4, 5, 5], {"v": f(3, 2, 2, 2), **statistics(4)}, {},
    ),
    "through relu and max pool": (
        [conv("x", "c"), node("Relu", ["c"], ["r"]), node("MaxPool", ["r"], ["m"], kernel_shape=[2, 2]),
         norm("m", "n"), node("Conv", ["n", "v"], ["y"])],
        IMAGE, {**W, "v": f(2, 4, 1, 1), **statistics(4)}, {},
    ),
    "through an average and a reshape": (
        [norm("x", "n"), node("GlobalAveragePool", ["n"], ["g"]), node("Flatten", ["g"], ["h"]),
         node("Gemm", ["h", "v"], ["y"])],
        IMAGE, {"v": f(3, 4), **statistics(3)}, {},
    ),
    "reshaped by what Shape says": (
        [conv("x", "c"), node("Shape", ["c"], ["s"], start=0, end=2), node("Concat", ["s", "rest"], ["t"], axis=0),
         node("Reshape", ["c", "t"], ["r"]), norm("r", "y")],
        ["N", 3, 9, "W"], {**W, "rest": np.array([-1]), **statistics(4)}, {},
    ),
    "resized": (
        [norm("x", "n"), node("Resize", ["n", "", "k"], ["r"], mode="linear"), node("Conv", ["r", "w"], ["y"])],
        IMAGE, {"w": f(2, 3, 2, 2), "k": np.float32([1, 1, 2, 2]), **statistics(3)}, {},
    ),
    "per element, spatial=0": (
        [norm("x", "n", spatial=0), node("Flatten", ["n"], ["h"]), node("Gemm", ["h", "v"], ["g"]),
         norm("g", "y", "m")],
        ["N", 3, 2], {"v": f(6, 4), **statistics((3, 2)), **statistics(4, "m")}, {"opset": 7},
    ),
    "recurrent": (
        [norm("x", "n"), node("Transpose", ["n"], ["t"], perm=[2, 0, 1]),
         node("LSTM", ["t", "w", "r", "b"], ["y"], hidden_size=2, direction="bidirectional")],
        ["N", 3, "T"], {"w": f(2, 8, 3), "r": f(2, 8, 2), "b": f(2, 16), **statistics(3)}, {},
    ),
    "composed": (
        [conv("x", "c"), norm("c", "n"), node("Mul", ["n", "s"], ["m"]), node("Add", ["m", "o"], ["a"]),
         node("Sub", ["a", "o"], ["d"]), node("Div", ["d", "s"], ["y"])],
        IMAGE, {**W, "s": f(4, 1, 1), "o": f(1, 4, 1, 1), **statistics(4)}, {},
    ),
    "old inputs": (
        [conv("x", "c"), norm("c", "y")], IMAGE, {**W, **statistics(4)},
        {"opset": 7, "ir_version": 3, "inputs": [*W, *statistics(4)]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GOES)
def test_goes(name: str) -> None:
    nodes, shape, weights, options = GOES[name]
    model = net(nodes, shape, weights, **options)
    found, ledger = folded(model)
    exact = EXACT if options.get("dtype") != 1 else 2.0**-18  # constants of float32, rounded once
    assert apart(model, found, (3, 5, 9)) < exact
    assert not [e for e in ledger.left if e.kind == "batch_norm"]
    assert types(found)["BatchNormalization"] == (
        "spatial" in name
    )  # a table is no per-channel affine, and takes one up
    assert sum(types(found).values()) <= sum(types(model).values())


#: The same, kept, each with the reason that the ledger has.
STAYS: dict[str, tuple[list[Any], list[Any], dict[str, Any], dict[str, Any], str]] = {
    "read twice": (
        [conv("x", "c"), norm("c", "n"), node("Add", ["c", "n"], ["y"])], IMAGE, {**W, **statistics(4)}, {},
        "several-readers",
    ),
    "read by a body": (
        [conv("x", "c"), norm("c", "n"), node("Relu", ["n"], ["y"]), node("If", ["yes"], ["z"],
         then_branch=branch("Exp"), else_branch=branch("Neg"))],
        IMAGE, {**W, "yes": np.array(True), **statistics(4)}, {"outputs": ["y", "z"]}, "several-readers",
    ),
    "zero padding": (
        [node("Exp", ["x"], ["e"]), norm("e", "n"), conv("n", "y", pads=[1, 1, 1, 1])], IMAGE,
        {**W, **statistics(3)}, {}, "zero-padding",
    ),
    "batch statistics": (
        [conv("x", "c"), norm("c", "y", training_mode=1)], IMAGE, {**W, **statistics(4)}, {}, "batch-statistics",
    ),
    "five outputs": (
        [conv("x", "c"), node("BatchNormalization", ["c", *(f"n.{p}" for p in ("scale", "bias", "mean", "var"))],
                              ["y", "m", "v", "sm", "sv"])],
        IMAGE, {**W, **statistics(4)}, {"opset": 9}, "batch-statistics",
    ),
    "a sigmoid": (
        [conv("x", "c"), node("Sigmoid", ["c"], ["s"]), norm("s", "n"), node("Sigmoid", ["n"], ["y"])],
        IMAGE, {**W, **statistics(4)}, {}, "nonlinear",
    ),
    "an initializer that somebody may feed": (
        [node("Conv", ["x", "w"], ["c"]), norm("c", "y")], IMAGE, {"w": f(4, 3, 3, 3), **statistics(4)},
        {"inputs": ["n.scale"]}, "not-constant",
    ),
    "variance below zero": (
        [conv("x", "c"), norm("c", "y")], IMAGE, {**W, **statistics(4), "n.var": np.array([1.0, -1.0, 1.0, 1.0])}, {},
        "nonfinite",
    ),
    "an operator of somebody's own": (
        [conv("x", "c"), node("Gate", ["c"], ["g"], domain="com.acme"), norm("g", "n"), node("Exp", ["n"], ["y"])],
        IMAGE, {**W, **statistics(4)}, {}, "unknown-operator",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STAYS)
def test_stays_and_says_why(name: str) -> None:
    nodes, shape, weights, options, reason = STAYS[name]
    model = net(nodes, shape, weights, **options)
    model.opset_import.append(helper.make_opsetid("com.acme", 1))
    found, ledger = folded(model)
    assert types(found)["BatchNormalization"] == 1
    assert {refusal.reason for entry in ledger.left for refusal in entry.refusals} >= {reason}
    assert found == model  # to the bit


def test_a_scale_goes_through_a_padded_convolution_and_a_shift_does_not() -> None:
    nodes = [node("Exp", ["x"], ["e"]), node("Mul", ["e", "s"], ["m"]), conv("m", "y", pads=[1, 1, 1, 1])]
    model = net(nodes, IMAGE, {**W, "s": f(3, 1, 1)})
    found, _ = folded(model)
    assert types(found)["Mul"] == 0 and apart(model, found) < EXACT


def test_a_constant_across_the_width_is_no_channel() -> None:
    nodes = [conv("x", "c"), node("Mul", ["c", "s"], ["y"])]
    model = net(nodes, IMAGE, {**W, "s": f(5)})
    found, _ = folded(model)
    assert types(found)["Mul"] == 1 and found == model


def test_branches_merge_and_those_that_somebody_reads_do_not() -> None:
    nodes = [
        node("Conv", ["x", "w"], ["a"], pads=[1] * 4), node("Conv", ["x", "v"], ["b"]), norm("x", "d"),
        norm("a", "e", "m"), node("Add", ["e", "b"], ["g"]), node("Add", ["g", "d"], ["y"]),
    ]  # fmt: skip
    weights = {"w": f(3, 3, 3, 3), "v": f(3, 3, 1, 1), **statistics(3), **statistics(3, "m")}
    model = net(nodes, IMAGE, weights)
    found, ledger = folded(model, merges=True)
    assert types(found) == {"Conv": 1} and len(ledger.merges) == 2 and apart(model, found) < EXACT
    model = net(nodes, IMAGE, weights, outputs=["y", "b"])
    found, _ = folded(model, merges=True)
    assert types(found) == {"Conv": 2, "Add": 1} and apart(model, found) < EXACT


def test_a_bias_makes_a_gemm_of_a_matmul_of_matrices_and_of_no_other() -> None:
    nodes = [node("MatMul", ["x", "w"], ["g"]), node("Add", ["g", "b"], ["y"])]
    weights = {"w": f(5, 4), "b": f(4)}
    for shape, want in ((["N", 5], {"Gemm": 1}), (["N", 3, 5], {"MatMul": 1, "Add": 1})):
        model = net(nodes, shape, weights)
        found, _ = folded(model)
        assert types(found) == want and apart(model, found) < EXACT


def test_a_number_is_moved_as_a_tensor_is() -> None:
    nodes = [conv("x", "c"), norm("c", "n"), node("ReduceMean", ["n"], ["m"], keepdims=0),
             node("Expand", ["m", "k"], ["y"])]  # fmt: skip
    model = net(nodes, IMAGE, {**W, **statistics(4), "k": np.array([2, 3])})
    found, ledger = folded(model)
    assert ledger.count() == (1, 1) and apart(model, found) < EXACT


@pytest.mark.parametrize("shape", [["N", 4, 5, 5], ["N", "C", 5, 5], None])
@pytest.mark.parametrize(("channels", "short"), [(3, False), (1, False), (4, True)])
def test_constants_for_other_channels_are_told(
    channels: int, short: bool, shape: list[Any] | None, tmp_path: Path
) -> None:
    """Whatever is known of the operand: with as many as it has, and that known, the BatchNormalization goes."""
    constants = statistics(channels)
    constants["n.mean"] = constants["n.mean"][: channels - short]
    first = [conv("x", "c")] if shape == ["N", 4, 5, 5] else [node("Relu", ["x"], ["c"])]
    model = net([*first, norm("c", "y")], ["N", 3, 7, 7] if shape == ["N", 4, 5, 5] else shape or [1],
                {**(W if shape == ["N", 4, 5, 5] else {}), **constants})  # fmt: skip
    if shape is None:
        model.graph.input[0].type.tensor_type.ClearField("shape")
    _, ledger = folded(model)
    (entry,) = ledger.entries
    assert entry.value == "y" and {refusal.reason for refusal in entry.refusals} == {"channels"}
    onnx.save(model, tmp_path / "net.onnx")
    assert bnfold.inspect(tmp_path / "net.onnx").plan.ledger.count() == (0, 1)
