"""Lowering: names, no traces of the machine, one file per program, and nothing folded behind our back."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import zoo
from onnx import numpy_helper
from torch import Tensor, nn
from torch.export import Dim

import bnfold
from bnfold.errors import LowerError
from bnfold.graph.capture import Captured, capture
from bnfold.graph.graph import Graph
from bnfold.lowering import lower as lower_module
from bnfold.lowering.lower import Lowered, lower, save
from bnfold.passes.folding import fold as fold_graph
from bnfold.runtime.runtime import open_session

torch.set_num_threads(1)


def lowered(
    module: nn.Module, args: tuple[Any, ...], *, fold: bool = True, shapes: Any = None, **options: Any
) -> tuple[Captured, Lowered]:
    captured = capture(module, args, dynamic_shapes=shapes)
    graph = Graph(captured.program)
    ledger = fold_graph(graph) if fold else bnfold.Ledger()
    return captured, lower(graph.finish(), dims=captured.dims, sites=ledger.sites, **options)


def written(made: Lowered, path: Path, **options: Any) -> onnx.ModelProto:
    save(made, path, **options)
    return onnx.load(path)


def run(path: Path, *inputs: Tensor) -> list[np.ndarray]:
    session = open_session(path, optimized=False)
    return session.run({v.name: t.numpy() for v, t in zip(session.inputs, inputs, strict=True)})


class Net(nn.Module):
    def __init__(self, forward: Callable[..., Any] = lambda m, x: m.norm(m.conv(x)).relu()) -> None:
        super().__init__()
        self.conv, self.norm, self.run = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), forward
        self.register_buffer("table", torch.randn(16))

    def forward(self, *args: Any) -> Any:
        return self.run(self, *args)


IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))

# -- names and traces --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("simplify", [True, False])
@pytest.mark.parametrize("name", ["resnet_basic", "mobilenet_v2", "two_inputs", "xcit"])
def test_the_file_knows_modules_and_nothing_of_the_machine(name: str, simplify: bool, tmp_path: Path) -> None:
    module, args = zoo.NETS[name]()
    _, made = lowered(module, args, simplify=simplify, metadata={"bnfold.version": "1"})
    model = written(made, tmp_path / "net.onnx")
    content = (tmp_path / "net.onnx").read_bytes()
    here = [str(Path(__file__).parents[1]), str(Path.home()), str(Path(torch.__file__).parents[1])]
    for trace in (*here, "/home", ".py", "stack_trace", "pkg.torch", "ExportedProgram"):
        assert trace.encode() not in content, trace
    text = onnx.printer.to_text(model)
    assert not re.search(r"\bs\d+\b", text) and "batch" in text
    modules = {path for path, _ in module.named_modules()}
    layers = [n for n in model.graph.node if n.op_type in ("Conv", "Gemm")]
    assert layers and all(n.name.rsplit("/", 1)[0] in modules for n in layers)
    assert len({n.name for n in model.graph.node}) == len(model.graph.node)
    big = [t.name for t in model.graph.initializer if np.prod(t.dims) > 64]
    stored = {n for n, _ in (*module.named_parameters(), *module.named_buffers())}
    assert big and len([b for b in big if b in stored]) >= len(big) * 0.5
    assert {p.key: p.value for p in model.metadata_props} == {"bnfold.version": "1"}
    assert made.batch_norms == sum(n.op_type == "BatchNormalization" for n in model.graph.node)


def test_dimensions_have_the_users_names(tmp_path: Path) -> None:
    shapes = (({0: Dim("n"), 2: Dim("high", min=4, max=64), 3: Dim("wide", min=4, max=64)},),)
    _, made = lowered(Net(), (IMAGE,), shapes=shapes)
    model = written(made, tmp_path / "net.onnx")
    names = [d.dim_param for d in model.graph.input[0].type.tensor_type.shape.dim]
    assert names == ["n", "", "high", "wide"] and not re.search(r"\bs\d+\b", onnx.printer.to_text(model))


OUTPUTS: dict[str, tuple[Callable[..., Any], list[str]]] = {
    "keys": (lambda m, x: {"b": m.conv(x), "a": x * 2}, ["b", "a"]),
    "the input": (lambda m, x: (m.conv(x), x), ["output_0", "output_1"]),
    "only the input": (lambda m, x: x, ["output"]),
    "a key like the input's": (lambda m, x: {"args_0": m.conv(x), "same": x}, ["args_0_out", "same"]),
    "a constant": (lambda m, x: (m.conv(x), m.table), ["output_0", "output_1"]),
    "a constant twice": (lambda m, x: (m.table, m.conv(x), m.table), ["output_0", "output_1", "output_2"]),
    "one value twice": (lambda m, x: (lambda y: (y, y))(m.norm(m.conv(x))), ["output_0", "output_1"]),
    "a key like a node's": (lambda m, x: {"conv2d": m.conv(x).relu(), "relu": x * 2}, ["conv2d", "relu"]),
    "a key like a constant's": (lambda m, x: {"conv.weight": m.conv(x)}, ["conv.weight_out"]),
    "integers": (lambda m, x: (m.conv(x), m.conv(x).argmax(1)), ["output_0", "output_1"]),
    "booleans": (lambda m, x: m.conv(x) > 0, ["output"]),
    "None": (lambda m, x: (None, m.conv(x)), ["output_1"]),
    "a key of None": (lambda m, x: {"aux": None, "logits": m.norm(m.conv(x))}, ["logits"]),
    "the batch's size": (lambda m, x: (m.conv(x), x.shape[0]), ["output_0", "output_1"]),
    "a scalar": (lambda m, x: m.conv(x).mean(), ["output"]),
    "no weights": (lambda m, x: x.tanh(), ["output"]),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs(name: str, tmp_path: Path) -> None:
    forward, names = OUTPUTS[name]
    captured, made = lowered(Net(forward), (IMAGE,))
    path = tmp_path / "net.onnx"
    model = written(made, path)
    assert [o.name for o in model.graph.output] == names and [i.name for i in model.graph.input] == ["args_0"]
    for batch in (1, 5):
        x = torch.randn(batch, 3, 8, 8)
        expected = [v for v in captured.run_eager((x,)) if v is not None]
        for got, want in zip(run(path, x), expected, strict=True):
            assert np.allclose(got, np.asarray(want), rtol=1e-4, atol=1e-5) and got.shape == np.shape(want)


def test_a_bare_number_as_output_is_refused() -> None:
    with pytest.raises(LowerError, match=r"output 'output_1' is 3, no tensor\. Leave it out"):
        lowered(Net(lambda m, x: (m.conv(x), x.shape[1])), (IMAGE,))


def test_an_unused_input_stays(tmp_path: Path) -> None:
    _, made = lowered(Net(lambda m, x, y: m.conv(x)), (IMAGE, torch.randn(2, 5)))
    assert [i.name for i in written(made, tmp_path / "net.onnx").graph.input] == ["args_0", "args_1"]


# -- versions, dtypes, determinism -------------------------------------------------------------------------------------


@pytest.mark.parametrize("opset", [18, 20, 23])
def test_opsets(opset: int, tmp_path: Path) -> None:
    captured, made = lowered(Net(), (IMAGE,), opset=opset)
    model = written(made, tmp_path / "net.onnx")
    assert made.opset == opset == next(o.version for o in model.opset_import if not o.domain)
    assert np.allclose(run(tmp_path / "net.onnx", IMAGE)[0], captured.run_eager((IMAGE,))[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    _, made = lowered(Net().to(dtype), (IMAGE.to(dtype),), opset=22)
    model = written(made, tmp_path / "net.onnx")
    expected = onnx.TensorProto.FLOAT16 if dtype == torch.float16 else onnx.TensorProto.BFLOAT16
    assert {t.data_type for t in model.graph.initializer if len(t.dims) == 4} == {expected}


@pytest.mark.parametrize("name", ["squeeze_excite", "dict_outputs"])
def test_two_exports_are_one_file(name: str, tmp_path: Path) -> None:
    files = []
    for i in range(2):
        save(lowered(*zoo.NETS[name]())[1], tmp_path / f"{i}.onnx")
        files.append((tmp_path / f"{i}.onnx").read_bytes())
    assert files[0] == files[1]


@pytest.mark.parametrize("name", ["resnet_basic", "shufflenet_v2", "xcit"])
def test_simplifying_changes_no_number(name: str, tmp_path: Path) -> None:
    module, args = zoo.NETS[name]()
    results = []
    for simplify in (True, False):
        _, made = lowered(module, args, simplify=simplify)
        save(made, tmp_path / "net.onnx")
        results.append((made.nodes, run(tmp_path / "net.onnx", *args)))
    assert results[0][0] <= results[1][0]
    assert all(np.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(results[0][1], results[1][1], strict=True))


# -- weights -----------------------------------------------------------------------------------------------------------


class Scaled(nn.Module):
    """A convolution and a table of constants that onnxsim would love to multiply into it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, channels, 3)
        self.register_buffer("scale", torch.rand(channels, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * self.scale


@pytest.mark.parametrize("channels", [2, 512])  # it sees the weights of the small one
def test_onnxsim_folds_no_weights(channels: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, args = Scaled(channels), (torch.randn(2, 8, 5, 5),)
    model = written(lowered(module, args, fold=False)[1], tmp_path / "net.onnx")
    assert [n.op_type for n in model.graph.node] == ["Conv", "Mul"]
    weights = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    assert weights["conv.weight"].tobytes() == module.conv.weight.detach().numpy().tobytes()
    monkeypatch.setattr(lower_module, "SKELETON_BYTES", 1 << 40)  # with every weight in sight, and all it can do
    monkeypatch.setattr(lower_module, "_FOLDS", ())
    model = written(lowered(module, args, fold=False)[1], tmp_path / "net.onnx")
    weights = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    assert weights.get("conv.weight", np.zeros(1)).tobytes() != module.conv.weight.detach().numpy().tobytes()


def test_folded_weights_arrive_byte_for_byte(tmp_path: Path) -> None:
    module, args = zoo.NETS["resnet_basic"]()
    captured = capture(module, args)
    graph = Graph(captured.program)
    fold_graph(graph)
    program = graph.finish()
    model = written(lower(program), tmp_path / "net.onnx")
    assert not any(n.op_type == "BatchNormalization" for n in model.graph.node)
    stored = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    large = {k: v for k, v in program.state_dict.items() if v.numel() > 256 and k in stored}
    convolutions = [v for v in large.values() if v.ndim == 4]
    assert len(convolutions) >= 5
    assert all(stored[k].tobytes() == v.detach().numpy().tobytes() for k, v in large.items() if v.ndim == 4)


def test_external_weights(tmp_path: Path) -> None:
    captured, made = lowered(Net(), (IMAGE,))
    save(made, tmp_path / "net.onnx", external="net.data")
    (tensor,) = (
        t for t in onnx.load(tmp_path / "net.onnx", load_external_data=False).graph.initializer if t.external_data
    )
    assert {e.key: e.value for e in tensor.external_data}["location"] == "net.data"
    assert np.allclose(run(tmp_path / "net.onnx", IMAGE)[0], captured.run_eager((IMAGE,))[0], rtol=1e-4, atol=1e-5)


# -- sites -------------------------------------------------------------------------------------------------------------


def test_sites_survive_by_name(tmp_path: Path) -> None:
    captured = capture(*zoo.NETS["resnet_basic"]())
    graph = Graph(captured.program)
    ledger = fold_graph(graph)
    made = lower(graph.finish(), sites=ledger.sites)
    model = written(made, tmp_path / "net.onnx")
    values = {v for n in model.graph.node for v in n.output}
    assert set(ledger.sites) <= set(made.sites) and set(made.sites.values()) <= values


def test_an_operator_that_onnx_lacks_is_named() -> None:
    with pytest.raises(LowerError, match=r"cannot translate.*--opset") as caught:
        lowered(Net(lambda m, x: torch.linalg.eigvalsh(x)), (IMAGE,))
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)


def test_a_body_that_returns_a_value_from_around_it_copies_it(tmp_path: Path) -> None:
    """torch.onnx writes an EmbeddingBag as a Loop with such branches."""
    torch.manual_seed(0)
    rows, path = torch.randint(0, 31, (3, 13)), tmp_path / "net.onnx"
    net = nn.Sequential(nn.EmbeddingBag(31, 8, mode="mean"), nn.BatchNorm1d(8), nn.Linear(8, 3)).eval()
    report = bnfold.export(net, path, (rows,), device="cpu")
    assert report.passed and report.file is not None and report.file.batch_norms == 0
    torch.testing.assert_close(torch.from_numpy(run(path, rows)[0]), net(rows))
    loops = [node for node in onnx.load(path).graph.node if node.op_type == "Loop"]
    assert loops  # else this says nothing


def test_checks_of_numbers_stay_behind(tmp_path: Path) -> None:
    """torch.onnx has no translation for what some of them are made from, and ONNX no operator for them."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        torch._check_tensor_all(x.abs().sum() >= 0)
        return m.norm(m.conv(x)).relu()

    images = torch.randn(2, 3, 6, 6)
    captured, made = lowered(Net(forward), (images,))
    assert any("_assert" in str(n.target) or "_is_all_true" in str(n.target) for n in captured.program.graph.nodes)
    assert {n.op_type for n in written(made, tmp_path / "net.onnx").graph.node} == {"Conv", "Relu"}


@pytest.mark.parametrize(("bias", "adds"), [(0.0, 0), (0.5, 1)])
def test_a_bias_of_zeros_is_no_operator(bias: float, adds: int) -> None:
    """Nets that were never trained are full of them, and onnxsim is not shown large constants."""
    linear = nn.Linear(4, 300)
    nn.init.constant_(linear.bias, bias)
    program = capture(linear, (torch.randn(2, 3, 4),)).program
    assert [node.op_type for node in lower(program).model.graph].count("Add") == adds


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "alone": lambda x: x,
    "channels last": lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    "transposed": lambda x: x.transpose(2, 3),
    "an axis more": lambda x: x.unsqueeze(1).squeeze(1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_maximum_behind_padded_zeros_survives_onnx_runtime(dtype: torch.dtype, layout: str, tmp_path: Path) -> None:
    """ONNX Runtime's Pad_Fusion gives a MaxPool the pads of a Pad before it, and that one pads with -inf."""

    class Padded(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.max_pool2d(LAYOUTS[layout](nn.functional.pad(x, (1, 2, 1, 1))), 3, 2)

    below = -torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(0)).to(dtype) - 1
    save(lower(capture(Padded(), (below,)).program), tmp_path / "net.onnx")
    for optimized in (False, True):
        (found,) = open_session(tmp_path / "net.onnx", optimized=optimized).run({"x": below.numpy()})
        assert (found == Padded()(below).numpy()).all()
