"""ONNX files as sources: what stays as it is, the commands, and files that are not what they claim to be."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import zoo
from click.testing import CliRunner
from onnx import TensorProto, helper
from onnx_nets import (
    apart,
    claimed,
    cyclic,
    f,
    folded,
    future,
    missing,
    negative,
    net,
    norm,
    outside,
    statistics,
    types,
)  # fmt: skip

import bnfold
from bnfold.cli import cli
from bnfold.errors import InputError
from bnfold.graph import onnx_shapes
from bnfold.graph.onnx_shapes import infer
from bnfold.loading.onnx_file import read_onnx

node = helper.make_node
W = {"w": f(4, 3, 3, 3).astype(np.float32), "b": f(4).astype(np.float32)}
S = {name: value.astype(np.float32) for name, value in statistics(4).items()}
IMAGE = ["N", 3, 9, 7]


def small(**options: Any) -> onnx.ModelProto:
    nodes = [node("Conv", ["x", "w", "b"], ["c"], name="conv"), norm("c", "y")]
    model = net(nodes, IMAGE, {**W, **S}, dtype=TensorProto.FLOAT, **options)
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4, "h", "w"]))
    return model


@pytest.fixture
def path(tmp_path: Path) -> Path:
    onnx.save(small(), tmp_path / "net.onnx")
    return tmp_path / "net.onnx"


def run(*args: Any) -> Any:
    return CliRunner().invoke(cli, [str(arg) for arg in args])


def test_a_run_without_the_check_imports_nothing_that_it_does_not_use(path: Path) -> None:
    """Each of them takes as long to import as a file of some megabytes takes to fold."""
    script = "import sys\nfrom bnfold.cli import cli\ntry:\n    cli()\nfinally:\n    print(*sys.modules)"
    command = [sys.executable, "-c", script, "export", str(path), "-o", str(path.with_name("o.onnx")), "-q"]
    done = subprocess.run([*command, "--no-check"], capture_output=True, text=True, timeout=600)
    assert path.with_name("o.onnx").exists(), done.stderr
    heavy = {"sympy", "onnx_ir", "onnxscript", "onnxruntime", "onnxsim", "transformers", "torch._dynamo"}
    assert {"torch", "onnx"} < set(done.stdout.split()) and not heavy & set(done.stdout.split())


# ---- what stays ------------------------------------------------------------------------------------------------------


def test_names_metadata_functions_and_domains_stay() -> None:
    model = small()
    model.graph.doc_string, model.producer_name, model.domain = "of a net", "somebody", "org.somebody"
    model.metadata_props.add(key="license", value="theirs")
    model.graph.node[0].doc_string = "the first"
    model.opset_import.append(helper.make_opsetid("com.acme", 3))
    body = [node("Exp", ["a"], ["b"])]
    model.functions.append(helper.make_function("com.acme", "F", ["a"], ["b"], body, [helper.make_opsetid("", 17)]))
    model.graph.node.append(node("F", ["y"], ["z"], domain="com.acme"))
    model.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, None))
    model.graph.initializer.append(onnx.numpy_helper.from_array(f(2), "nobody reads it"))
    found, ledger = folded(model)
    assert ledger.count() == (1, 1) and types(found) == {"Conv": 1, "F": 1}
    assert [v.name for v in found.graph.output] == ["y", "z"] and found.graph.node[0].output[0] == "y"
    assert found.functions == model.functions and found.opset_import == model.opset_import
    assert found.metadata_props == model.metadata_props and found.graph.doc_string == "of a net"
    assert found.graph.node[0].name == "conv" and found.graph.node[0].doc_string == "the first"
    assert {t.name for t in found.graph.initializer} == {"w", "b", "nobody reads it"}
    assert apart(model, found) < 2.0**-20


def test_a_body_reads_what_a_fold_has_renamed() -> None:
    branch = helper.make_graph([node("Exp", ["y"], ["t"])], "a", [], [helper.make_tensor_value_info("t", 1, None)])
    other = helper.make_graph([node("Neg", ["y"], ["u"])], "b", [], [helper.make_tensor_value_info("u", 1, None)])
    model = small()
    model.graph.node.append(node("If", ["yes"], ["z"], then_branch=branch, else_branch=other))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(True), "yes"))
    model.graph.output[0].name = "z"
    found, ledger = folded(model)
    assert ledger.count() == (1, 1) and apart(model, found) < 2.0**-20


def test_a_weight_of_two_convolutions_is_copied_for_the_one_that_folds() -> None:
    nodes = [
        node("Conv", ["x", "w", "b"], ["c"]), norm("c", "y"), node("Conv", ["x", "w", "b"], ["z"]),
    ]  # fmt: skip
    model = net(nodes, IMAGE, {**W, **S}, dtype=TensorProto.FLOAT, outputs=["y", "z"])
    found, _ = folded(model)
    weights = {t.name: onnx.numpy_helper.to_array(t) for t in found.graph.initializer}
    assert types(found) == {"Conv": 2} and (weights["w"] == W["w"]).all() and apart(model, found) < 2.0**-20


@pytest.mark.parametrize("name", ["resnet_bottleneck", "levit", "unet", "densenet", "convnext"])
def test_from_torch_and_from_its_unfolded_file_the_same_folds_and_constants(name: str, tmp_path: Path) -> None:
    module, args = zoo.NETS[name]()
    bnfold.export(module, tmp_path / "net.onnx", args, check=False, fold=False, simplify=False)
    mine, ledger = folded(onnx.load(tmp_path / "net.onnx"))
    theirs = bnfold.fold(module, args, merge=False)
    bnfold.export(module, tmp_path / "torch.onnx", args, check=False, merge=False, simplify=False)
    assert ledger.count() == theirs.ledger.count()
    want = [onnx.numpy_helper.to_array(t) for t in onnx.load(tmp_path / "torch.onnx").graph.initializer]
    have = {t.name: onnx.numpy_helper.to_array(t) for t in mine.graph.initializer}
    folds = [n for n in mine.graph.node if n.op_type in ("Conv", "Gemm")]
    assert folds
    for weight in (have[n.input[1]] for n in folds if n.input[1] in have):
        assert any(w.shape == weight.shape and np.abs(w - weight).max() <= 2.0**-22 * np.abs(w).max() for w in want)


# ---- commands --------------------------------------------------------------------------------------------------------


def test_export_fold_inspect_and_check(path: Path) -> None:
    out = path.parent / "folded.onnx"
    before = path.read_bytes()
    result = run("export", path, "-o", out, "--device", "cpu", "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["check"]["verdict"] == "pass" and report["file"]["batch_norms"] == 0
    assert path.read_bytes() == before and types(onnx.load(out)) == {"Conv": 1}
    assert run("check", out, path, "--device", "cpu").exit_code == 0
    result = run("inspect", path)
    assert result.exit_code == 0 and "1 of 1 BatchNorm" in result.stdout
    assert run("fold", path, "-o", path.parent / "again.onnx").exit_code == 0
    assert bnfold.export(path, path.parent / "python.onnx", device="cpu").passed
    assert bnfold.check(out, path, device="cpu").passed


def test_a_file_that_is_wrong_by_one_weight_fails(path: Path) -> None:
    wrong = onnx.load(path)
    array = np.array(onnx.numpy_helper.to_array(wrong.graph.initializer[0]))
    array[1, 2, 0, 1] *= 1.001
    wrong.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(array, "w"))
    onnx.save(wrong, path.parent / "wrong.onnx")
    result = run("check", path.parent / "wrong.onnx", path, "--device", "cpu")
    assert result.exit_code == 1 and "the file in float64" in result.stdout


@pytest.mark.parametrize("key", ["epsilon", "output", "dtype"])
def test_a_file_that_is_another_fails(path: Path, key: str) -> None:
    wrong = onnx.load(path)
    if key == "epsilon":
        wrong.graph.node[1].attribute.append(helper.make_attribute("epsilon", 0.1))
    elif key == "output":
        wrong.graph.node[1].output[0] = wrong.graph.output[0].name = "other"
    else:
        wrong.graph.node[1].output[0] = "half"
        wrong.graph.node.append(node("Cast", ["half"], ["y"], to=TensorProto.FLOAT16))
        wrong.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    onnx.save(wrong, path.parent / "wrong.onnx")
    assert run("check", path.parent / "wrong.onnx", path, "--device", "cpu").exit_code == 1


def test_external_data_are_carried_along(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    onnx.save_model(small(), source / "net.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    assert run("export", source / "net.onnx", "-o", out / "a.onnx", "--device", "cpu").exit_code == 0
    result = run("export", source / "net.onnx", "-o", out / "b.onnx", "--device", "cpu", "--external-data")
    assert result.exit_code == 0, result.stderr
    assert apart(onnx.load(out / "a.onnx"), onnx.load(source / "net.onnx")) < 2.0**-20
    assert bnfold.check(out / "b.onnx", source / "net.onnx", device="cpu").passed


def test_another_operator_set_and_simplifying_are_asked_for(path: Path) -> None:
    out = path.parent / "folded.onnx"
    assert run("export", path, "-o", out, "--opset", "20", "--device", "cpu").exit_code == 0
    assert onnx.load(out).opset_import[0].version == 20
    assert run("export", path, "-o", out, "--simplify", "--device", "cpu").exit_code == 0


@pytest.mark.parametrize("option", [["--input", "x:float32[N,3,9,7]"], ["--dtype", "float16"], ["--weights", "w.pt"]])
def test_options_of_torch_models_do_not_apply(path: Path, option: list[str]) -> None:
    result = run("export", path, "-o", path.parent / "o.onnx", *option)
    assert result.exit_code in (2, 3) and result.stderr.strip().count("\n") <= 1, result.stderr


# ---- files that are not what they claim to be ------------------------------------------------------------------------


def ourselves(model: onnx.ModelProto) -> None:
    one, two = ([node(name, ["a"], ["b"], domain="f")] for name in ("Two", "One"))
    sets = [helper.make_opsetid("f", 1)]
    model.functions.extend(
        [
            helper.make_function("f", "One", ["a"], ["b"], one, sets),
            helper.make_function("f", "Two", ["a"], ["b"], two, sets),
        ]
    )


def nothing(model: onnx.ModelProto) -> None:
    model.graph.output[0].name = "nobody"


def of_another_kind(model: onnx.ModelProto) -> None:
    model.graph.node[0].attribute.append(helper.make_attribute("group", [2, 2]))


def twice(model: onnx.ModelProto) -> None:
    model.graph.node.append(node("Exp", ["x"], ["y"]))


HOSTILE = {
    cyclic: "which nothing before it computes", missing: "which nothing before it computes",
    claimed: "claims", negative: "is of shape", outside: "lies outside of the model's folder",
    future: "operator set is 1000", ourselves: "calls itself", nothing: "nothing computes its output",
    of_another_kind: "does not fit its operands", twice: "which is there already",
}  # fmt: skip


@pytest.mark.parametrize("harm", HOSTILE, ids=lambda harm: harm.__name__)
def test_what_a_file_claims_falsely_is_one_line(harm: Any, path: Path) -> None:
    model = onnx.load(path)
    harm(model)
    path.write_bytes(model.SerializeToString())
    result = run("inspect", path, "-q")
    assert result.exit_code == 3 and HOSTILE[harm] in result.stderr and result.stderr.count("\n") == 1, result.stderr


def test_ifs_in_ifs_without_end_are_one_line(path: Path) -> None:
    graph = helper.make_graph([node("Exp", ["x"], ["y"])], "g", [], [helper.make_tensor_value_info("y", 1, None)])
    content = graph.SerializeToString()

    def field(number: int, value: bytes) -> bytes:
        size, varint = len(value), b""
        while size >= 0x80:
            varint, size = varint + bytes([size & 0x7F | 0x80]), size >> 7
        return bytes([number << 3 | 2]) + varint + bytes([size]) + value

    for _ in range(10_000):  # GraphProto.node = 1, NodeProto.attribute = 5, AttributeProto.g = 6
        branch = field(1, b"then_branch") + field(6, content) + b"\xa0\x01\x05"
        content = field(1, field(2, b"y") + field(4, b"If") + field(5, branch))
        if len(content) > 1 << 20:
            break
    path.write_bytes(onnx.ModelProto(ir_version=8, opset_import=[helper.make_opsetid("", 17)]).SerializeToString() +
                     field(7, content))  # fmt: skip
    result = run("inspect", path, "-q")
    assert result.exit_code == 3 and result.stderr.count("\n") == 1, result.stderr


def test_what_onnx_asserts_of_a_file_ends_its_inference_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx.shape_inference, "infer_shapes", lambda *args, **more: os._exit(1))
    assert "fails on the file" in str(*infer([small()], strict=True))


def test_inference_collects_nothing_of_this_process_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits for a thread when it is collected waits without end in a process that has no such thread."""
    kept = onnx.shape_inference
    monkeypatch.setattr(kept, "infer_shapes", lambda model, **more: os._exit(1) if gc.isenabled() else model)
    assert gc.isenabled() and infer([small(), small()], strict=True) == [small(), small()]
    monkeypatch.setattr(onnx_shapes, "SECONDS", 1)
    first, wrong = small(), small()
    wrong.producer_name = "wrong"
    first.producer_name = "first"

    def inferred(model: onnx.ModelProto, **more: Any) -> onnx.ModelProto:
        if model.producer_name == "wrong":
            raise RuntimeError("inconsistent")
        return model if model.producer_name else time.sleep(1000)

    monkeypatch.setattr(kept, "infer_shapes", inferred)
    whole, error, *late = infer([first, wrong, small(), first], strict=True)
    assert whole == first and str(error) == "inconsistent"  # what was found before it ended counts
    assert len(late) == 2 and all("fails on the file" in str(each) for each in late)


@pytest.mark.parametrize("opset", [13, 21])
def test_activations_that_are_quantised_pass_and_those_a_level_off_do_not(opset: int, tmp_path: Path) -> None:
    """What lies between two levels may become either: that is a decision, and followed."""
    levels = {"step": np.float32(0.1), "zero": np.uint8(128)}
    nodes = [node("Conv", ["x", "w", "b"], ["c"]), norm("c", "n")]
    nodes += [node("QuantizeLinear", ["n", "step", "zero"], ["q"])]
    nodes += [node("DequantizeLinear", ["q", "step", "zero"], ["y"])]
    model = net(nodes, IMAGE, {**W, **S, **levels}, dtype=TensorProto.FLOAT, opset=opset, ir_version=10)
    onnx.save(model, tmp_path / "net.onnx")
    report = bnfold.export(tmp_path / "net.onnx", tmp_path / "o.onnx", device="cpu")
    assert report.passed and report.ledger.count() == (1, 1), report.check
    assert types(onnx.load(tmp_path / "o.onnx")) == {"Conv": 1, "QuantizeLinear": 1, "DequantizeLinear": 1}
    nodes[2].input[2] = "other"
    other = net(nodes, IMAGE, {**W, **S, **levels, "other": np.uint8(129)}, dtype=TensorProto.FLOAT, opset=opset,
                ir_version=10)  # fmt: skip
    onnx.save(other, tmp_path / "other.onnx")
    assert not bnfold.check(tmp_path / "other.onnx", tmp_path / "net.onnx", device="cpu").passed


def test_an_output_that_gets_an_addition_behind_it_keeps_its_name(tmp_path: Path) -> None:
    """A MatMul takes the shift in front of it in as an addition, which is the output then."""
    weights = {"w": f(3, 4), "v": f(4, 2), **statistics(4)}
    nodes = [
        node("MatMul", ["x", "w"], ["c"]),
        node("Tanh", ["c"], ["t"]),
        node("Transpose", ["t"], ["u"], perm=[0, 2, 1]),
    ]
    nodes += [norm("u", "n"), node("Transpose", ["n"], ["m"], perm=[0, 2, 1]), node("MatMul", ["m", "v"], ["y"])]
    onnx.save(net(nodes, ["N", "L", 3], {k: v.astype(np.float32) for k, v in weights.items()}, dtype=TensorProto.FLOAT),
              tmp_path / "net.onnx")  # fmt: skip
    report = bnfold.export(tmp_path / "net.onnx", tmp_path / "o.onnx", device="cpu")
    assert report.passed and report.ledger.count() == (1, 1), report.check
    model = onnx.load(tmp_path / "o.onnx")
    assert types(model)["Add"] == 1 and [value.name for value in model.graph.output] == ["y"]


def test_outputs_that_become_one_value_keep_all_their_names(tmp_path: Path) -> None:
    nodes = [node("Conv", ["x", "w", "b"], ["c"]), norm("c", "y"), norm("c", "z"), norm("c", "last")]
    for each in nodes[1:]:
        each.name = each.output[0]
    model = net(nodes, IMAGE, {**W, **S}, dtype=TensorProto.FLOAT, outputs=["y", "z", "last"])
    onnx.save(model, tmp_path / "net.onnx")
    report = bnfold.export(tmp_path / "net.onnx", tmp_path / "o.onnx", device="cpu")
    assert report.passed and report.ledger.count() == (3, 3), report.check
    assert types(onnx.load(tmp_path / "o.onnx")) == {"Conv": 1, "Identity": 2}


def test_weights_that_are_quantised_stay_so(tmp_path: Path) -> None:
    """Those next to them, in floats, take the BatchNormalization in."""
    small = np.random.default_rng(0).integers(-99, 99, (4, 3, 3, 3)).astype(np.int8)
    nodes = [node("DequantizeLinear", ["small", "step"], ["w"]), node("Conv", ["x", "w", "b"], ["c"]), norm("c", "y")]
    quantised = {"small": small, "step": np.float32(0.01), "b": W["b"]}
    for own, weights, gone in ((nodes[1:], W, 1), (nodes, quantised, 0)):
        onnx.save(net(own, IMAGE, {**weights, **S}, dtype=TensorProto.FLOAT), tmp_path / "net.onnx")
        report = bnfold.export(tmp_path / "net.onnx", tmp_path / "o.onnx", device="cpu")
        assert report.passed and report.ledger.count() == (gone, 1)
    held = {t.name: t for t in onnx.load(tmp_path / "o.onnx").graph.initializer}
    assert (onnx.numpy_helper.to_array(held["small"]) == small).all()


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x08\x08" + bytes(100)])
def test_what_is_no_onnx_file_is_one_line(content: bytes, path: Path) -> None:
    path.write_bytes(content)
    with pytest.raises(InputError):
        read_onnx(path)


def test_huge_results_are_not_computed(tmp_path: Path) -> None:
    nodes = [node("ConstantOfShape", ["huge"], ["h"]), node("Add", ["x", "h"], ["y"])]
    onnx.save(net(nodes, [1], {"huge": np.array([10**12])}, dtype=TensorProto.FLOAT), tmp_path / "net.onnx")
    result = run("export", tmp_path / "net.onnx", "-o", tmp_path / "o.onnx", "--device", "cpu", "-q")
    assert result.exit_code in (3, 6) and result.stderr.count("\n") == 1, result.stderr
    assert not (tmp_path / "o.onnx").exists()


def test_a_file_that_leaves_the_range_of_its_dtype_passes_and_one_that_is_random_is_refused(tmp_path: Path) -> None:
    weights = {k: v.astype(np.float32) for k, v in {"w": f(4, 3, 3, 3), "b": f(4), "n": np.float32(9.0)}.items()}
    nodes = [node("Conv", ["x", "w", "b"], ["c"]), node("Mul", ["c", "n"], ["m"]), node("Exp", ["m"], ["y"])]
    onnx.save(net(nodes, IMAGE, weights, dtype=TensorProto.FLOAT), tmp_path / "wide.onnx")
    report = bnfold.export(tmp_path / "wide.onnx", tmp_path / "o.onnx", device="cpu")
    assert report.passed and types(onnx.load(tmp_path / "o.onnx")) == {"Conv": 1, "Exp": 1}
    nodes = [node("RandomNormalLike", ["x"], ["r"]), node("Add", ["x", "r"], ["y"])]
    onnx.save(net(nodes, IMAGE, {}, dtype=TensorProto.FLOAT), tmp_path / "random.onnx")
    with pytest.raises(InputError, match="from run to run"):
        bnfold.export(tmp_path / "random.onnx", tmp_path / "r.onnx", device="cpu")
    assert not (tmp_path / "r.onnx").exists()


def test_what_onnx_runtime_does_not_run_is_refused_and_not_called_wrong(path: Path, tmp_path: Path) -> None:
    model = onnx.load(path)
    model.ir_version = 99
    onnx.save(model, path)
    with pytest.raises(InputError, match="ONNX Runtime does not run the original"):
        bnfold.export(path, tmp_path / "o.onnx", device="cpu")


def test_the_health_of_a_file_is_that_of_its_batch_normalizations(path: Path) -> None:
    found = bnfold.inspect(path)
    (norm,) = found.norms
    assert (norm.module, norm.channels, norm.eps, norm.dtype) == ("n_node", 4, 1e-5, "float32")
    assert norm.track_running_stats and not found.findings and found.plan is not None
    model = onnx.load(path)
    broken = np.array([1.0, -2.0, 1e-9, 1.0], np.float32)
    next(t for t in model.graph.initializer if t.name == "n.var").CopyFrom(
        onnx.numpy_helper.from_array(broken, "n.var")
    )
    onnx.save(model, path)
    assert {finding.severity for finding in bnfold.inspect(path).findings} >= {"error", "warning"}
    model.graph.node[1].attribute.append(helper.make_attribute("training_mode", 1))
    model.graph.node[1].output.extend(["mean", "variance"])
    onnx.save(model, path)
    (norm,) = bnfold.inspect(path).norms
    assert not norm.track_running_stats and norm.variance is None
