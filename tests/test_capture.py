"""Capture: the caller's model stays as it is, the batch is dynamic where it can be, and failures show the way out."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn.utils import prune

import bnfold
from bnfold.errors import CaptureError, InputError
from bnfold.graph.capture import Captured, capture, tensor_inputs
from bnfold.graph.copies import copied, eval_copy
from bnfold.graph.functional import module_of
from bnfold.graph.interpret import Runner

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__()
        self.linear, self.norm, self.run = nn.Linear(4, 4), nn.BatchNorm1d(4), run

    def forward(self, *args: Any) -> Any:
        return self.run(self, *args)


def simple(net: Net, x: Tensor) -> Tensor:
    return net.norm(net.linear(x))


def leaves(value: Any) -> list[Any]:
    return list(torch.utils._pytree.tree_leaves(value))


def holds(captured: Captured, flat: tuple[Any, ...]) -> None:
    """The captured graph gives, bit for bit, what the model gives."""
    for got, expected in zip(Runner(captured.program)(flat), captured.run_eager(flat), strict=True):
        assert got is expected or got == expected if not isinstance(got, Tensor) else torch.equal(got, expected)


def sizes(captured: Captured) -> list[tuple[Any, ...]]:
    names = tensor_inputs(captured.program)
    return [tuple(n.meta["val"].shape) for n in captured.program.graph.nodes if n.name in names]


def dynamic(captured: Captured) -> list[bool]:
    # A size that the code fixed may still be a SymInt, whose expression is a number.
    return [bool(s) and isinstance(s[0], torch.SymInt) and s[0].node.expr.is_symbol for s in sizes(captured)]


# -- the caller's model ------------------------------------------------------------------------------------------------


def state(model: nn.Module) -> tuple[Any, ...]:
    return (
        [(name, m.training, len(m._forward_hooks)) for name, m in model.named_modules()],
        [(name, id(p), p.data_ptr(), p._version, p.requires_grad, p.grad) for name, p in model.named_parameters()],
        [(name, id(b), b.data_ptr(), b._version, b.tolist()) for name, b in model.named_buffers()],
        [(name, v.clone().numpy().tobytes()) for name, v in model.state_dict().items()],
    )


def mixed_modes() -> nn.Module:
    model, _ = zoo.NETS["resnet_basic"]()
    model.train()
    for i, (module, parameter) in enumerate(zip(model.modules(), model.parameters())):
        module.training = bool(i % 2)
        parameter.requires_grad_(bool(i % 3))
    next(model.children()).register_forward_hook(lambda module, args, output: None)
    return model


ATTEMPTS: dict[str, Callable[[nn.Module, tuple[Tensor, ...], Path], object]] = {
    "capture": lambda m, a, p: capture(m, a),
    "capture in half": lambda m, a, p: capture(m, a, dtype=torch.float16),
    "capture of nonsense": lambda m, a, p: capture(m, (torch.zeros(2, 2),)),
    "fold": lambda m, a, p: bnfold.fold(m, a).module(*a),
    "export": lambda m, a, p: bnfold.export(m, p, a, device="cpu"),
    "export of nonsense": lambda m, a, p: bnfold.export(m, p, (a[0], a[0]), device="cpu"),
    "check of nothing": lambda m, a, p: bnfold.check(p.with_name("none.onnx"), m, a, device="cpu"),
}


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_the_model_is_not_touched(attempt: str, tmp_path: Path) -> None:
    model, args = mixed_modes(), zoo.NETS["resnet_basic"]()[1]
    before, inputs = state(model), [a.clone() for a in args]
    try:
        ATTEMPTS[attempt](model, args, tmp_path / "net.onnx")
        assert "no" not in attempt
    except bnfold.BnfoldError:
        assert "no" in attempt
    assert state(model) == before
    assert all(torch.equal(a, b) for a, b in zip(args, inputs))


def test_batch_statistics_do_not_move_the_callers_buffers() -> None:
    model, args = zoo.NETS["batch_statistics"]()
    before = state(model)
    captured = capture(model, args)
    captured.run_eager(captured.flat)
    assert state(model) == before


def test_eval_mode_is_captured() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.9), nn.BatchNorm1d(4)).train()
    captured = capture(model, (X,))
    expected = torch.nn.functional.batch_norm(
        model[0](X), model[2].running_mean, model[2].running_var, model[2].weight, model[2].bias
    )
    assert torch.allclose(Runner(captured.program)((X,))[0], expected) and model.training


# -- the batch ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [2, 3, 8])
def test_the_batch_is_dynamic(batch: int) -> None:
    captured = capture(Net(simple).eval(), (torch.randn(batch, 4),))
    assert dynamic(captured) == [True] and list(captured.dims.values()) == ["batch"] and captured.notes == ()
    for other in (1, 5):
        holds(captured, (torch.randn(other, 4),))


def test_static_fixes_it() -> None:
    assert dynamic(capture(Net(simple), (X,), static=True)) == [False]


SHARED: dict[str, tuple[Callable[..., Any], tuple[Any, ...], list[bool]]] = {
    "two with a batch": (lambda m, a, b: m.linear(a) + b, (X, X), [True, True]),
    "one without": (lambda m, a, table: m.linear(a) @ table, (X, torch.randn(4, 2)), [True, False]),
    "a scalar": (lambda m, a, s: m.linear(a) * s, (X, torch.tensor(2.0)), [True, False]),
    "nested": (lambda m, d: m.linear(d["x"]) + d["more"][0], ({"x": X, "more": [X + 1]},), [True, True]),
    "beside an int": (lambda m, a, k: m.linear(a) * k, (X, 3), [True]),
    "beside None and a bool": (lambda m, a, none, flag: m.linear(a) if flag else a, (X, None, True), [True]),
}


@pytest.mark.parametrize("name", SHARED)
def test_inputs_share_the_batch(name: str) -> None:
    run, args, expected = SHARED[name]
    captured = capture(Net(run), args)
    assert dynamic(captured) == expected and len(captured.dims) == 1
    holds(captured, captured.flat)
    longer = tuple(torch.cat([v, v]) if isinstance(v, Tensor) and v.ndim and len(v) == 3 else v for v in captured.flat)
    holds(captured, longer)


SPECIALISED: dict[str, Callable[..., Any]] = {
    "len of a tensor": lambda m, x: m.linear(x) * len(x),
    "a comparison": lambda m, x: m.linear(x) if x.shape[0] == 3 else x,
    "a loop": lambda m, x: torch.stack(list(m.linear(x))),
    "an upper bound": lambda m, x: m.linear(x) * 3 if x.shape[0] > 4 else m.linear(x),
}


@pytest.mark.parametrize("name", SPECIALISED)
def test_a_batch_that_the_code_fixes_is_said_and_not_claimed(name: str, tmp_path: Path) -> None:
    captured = capture(Net(SPECIALISED[name]), (X,))
    assert dynamic(captured) == [False] and captured.dims == {}
    assert len(captured.notes) == 1 and "fixed" in captured.notes[0]
    report = bnfold.export(Net(SPECIALISED[name]), tmp_path / "net.onnx", (X,), device="cpu")
    import onnx

    (info,) = onnx.load(tmp_path / "net.onnx").graph.input
    assert [d.dim_value for d in info.type.tensor_type.shape.dim] == [3, 4] and report.passed


def test_one_tensor_given_twice_is_two_inputs() -> None:
    captured = capture(Net(lambda m, a, b: m.linear(a) - 2 * b), (X, X))
    holds(captured, (X, X + 1))


def test_dimensions_keep_the_users_names() -> None:
    image = torch.randn(2, 3, 16, 8)
    shapes = ({0: Dim("n"), 2: Dim("height", min=4, max=64), 3: Dim("width", min=4, max=64)},)
    captured = capture(nn.Conv2d(3, 4, 3), (image,), dynamic_shapes=shapes)
    assert sorted(captured.dims.values()) == ["height", "n", "width"]
    assert (
        sorted(captured.ranges.values(), key=str) == [(0, None), (4, 64), (4, 64)]
        or (4, 64) in captured.ranges.values()
    )
    holds(captured, (torch.randn(5, 3, 7, 9),))


# -- inputs and outputs ------------------------------------------------------------------------------------------------


class Keywords(nn.Module):
    def forward(self, x: Tensor, *, b: Tensor, a: Tensor | None = None) -> Tensor:
        return x - 2 * b if a is None else x - 2 * b + 3 * a


@pytest.mark.parametrize("order", ["ab", "ba", "b"])
def test_keywords_in_any_order(order: str) -> None:
    given = {name: torch.full((3, 4), float(ord(name))) for name in order}
    captured = capture(Keywords(), (X,), given)
    result = Runner(captured.program)(captured.flat)[0]
    assert torch.equal(result, Keywords()(X, **given)) and dynamic(captured) == [True] * (1 + len(order))
    holds(captured, captured.flat)


def test_variable_arguments() -> None:
    captured = capture(Net(lambda m, *xs: sum(xs)), (X, 2 * X, 3 * X))
    assert dynamic(captured) == [True] * 3


class KeywordDict(nn.Module):
    def forward(self, x: Tensor, **more: Tensor) -> Tensor:
        return x - more["a"]


def test_a_dictionary_of_keywords_needs_a_fixed_batch() -> None:
    with pytest.raises(CaptureError, match=r"\*\*kwargs.*--static"):
        capture(KeywordDict(), (X,), {"a": X})
    captured = capture(KeywordDict(), (X,), {"a": X + 1}, static=True)
    assert torch.equal(Runner(captured.program)(captured.flat)[0], X - (X + 1))


@dataclass
class Result:
    logits: Tensor
    mask: Tensor


OUTPUTS: dict[str, Callable[..., Any]] = {
    "tuple": lambda m, x: (m.linear(x), x * 2),
    "dict": lambda m, x: {"b": m.linear(x), "a": [x, {"c": x + 1}]},
    "None": lambda m, x: (None, m.linear(x)),
    "int": lambda m, x: (m.linear(x), x.shape[1]),
    "its input": lambda m, x: (x, m.linear(x)),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_of_every_shape(name: str) -> None:
    captured = capture(Net(OUTPUTS[name]), (X,))
    holds(captured, captured.flat)


def test_dataclass_outputs() -> None:
    torch.export.register_dataclass(Result)
    captured = capture(Net(lambda m, x: Result(m.linear(x), x > 0)), (X,))
    holds(captured, captured.flat)


# -- models of every kind ----------------------------------------------------------------------------------------------


def inference_model() -> nn.Module:
    with torch.inference_mode():
        return Net(simple)


MODELS: dict[str, tuple[Callable[[], nn.Module], torch.dtype]] = {
    "made under inference_mode": (inference_model, torch.float32),
    "half": (lambda: Net(simple).half(), torch.float16),
    "double": (lambda: Net(simple).double(), torch.float64),
    "no weights": (lambda: nn.Tanh(), torch.float32),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_of_every_kind(name: str) -> None:
    build, dtype = MODELS[name]
    captured = capture(build(), (X.to(dtype),))
    holds(captured, captured.flat)
    assert Runner(captured.program)(captured.flat)[0].dtype == dtype


def test_dtype_keeps_the_masters() -> None:
    model = Net(simple)
    captured = capture(model, (X,), dtype=torch.bfloat16)
    assert captured.masters is not None
    assert torch.equal(captured.masters["linear.weight"], model.linear.weight)
    assert captured.program.state_dict["linear.weight"].dtype == torch.bfloat16
    assert captured.flat[0].dtype == torch.bfloat16 and model.linear.weight.dtype == torch.float32


# -- programs ----------------------------------------------------------------------------------------------------------


def program(tmp_path: Path | None = None, run: Callable[..., Any] = simple) -> ExportedProgram:
    made = torch.export.export(Net(run).eval(), (X,), dynamic_shapes=(({0: Dim("n")},),))
    if tmp_path is None:
        return made
    torch.export.save(made, tmp_path / "net.pt2")
    return torch.export.load(tmp_path / "net.pt2")


@pytest.mark.parametrize("loaded", [False, True])
def test_a_program_is_captured_as_it_is(loaded: bool, tmp_path: Path) -> None:
    given = program(tmp_path if loaded else None)
    before = str(given.graph)
    captured = capture(given)
    assert dynamic(captured) == [True] and str(given.graph) == before
    holds(captured, captured.flat)
    holds(captured, (torch.randn(7, 4),))
    with pytest.raises(InputError, match="keeps the dtype"):
        capture(given, dtype=torch.float16)


def test_a_program_in_training_mode_is_refused() -> None:
    made = torch.export.export(Net(simple).train(), (X,))
    with pytest.raises(CaptureError, match=r"writes to its buffer 'norm\.\w+'"):
        capture(made)


# -- copies ------------------------------------------------------------------------------------------------------------


def traced(run: Callable[..., Any] = simple) -> torch.fx.GraphModule:
    """A GraphModule, whose own copy has no hooks."""

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Any:
            return run(self, x)

    return torch.fx.symbolic_trace(Plain())


def hooked(model: nn.Module) -> nn.Module:
    model.register_buffer("shift", torch.full((4,), 2.0), persistent=False)
    model.register_forward_pre_hook(lambda module, args: (args[0] - module.shift,))
    model.register_forward_hook(lambda module, args, output: output * 3)
    return model


HOOKED: dict[str, Callable[[], nn.Module]] = {
    "module": lambda: hooked(Net(simple)),
    "GraphModule": lambda: hooked(traced()),
    "GraphModule inside": lambda: nn.Sequential(hooked(traced()), nn.Linear(4, 2)),
    "GraphModule in a GraphModule": lambda: torch.fx.GraphModule(
        inside := nn.Sequential(hooked(traced()), nn.Linear(4, 2)), CallsAll().trace(inside)
    ),
}


class CallsAll(torch.fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


@pytest.mark.parametrize("name", HOOKED)
def test_hooks_are_part_of_the_model(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = zoo.randomize(HOOKED[name]()).eval()
    hooks = [(path, len(m._forward_hooks)) for path, m in model.named_modules()]
    for twin in (eval_copy(model), copied(model)):
        assert torch.equal(twin(X), model(X)) and list(twin.state_dict()) == list(model.state_dict())
        assert [(path, len(m._forward_hooks)) for path, m in twin.named_modules()] == hooks
        assert all(type(m).__name__ == type(twin.get_submodule(path)).__name__ for path, m in model.named_modules())
    captured = capture(model, (X,))
    holds(captured, (torch.randn(5, 4),))
    assert torch.equal(captured.run_eager((X,))[0], model(X))
    # Without its hooks it is another function, and the gate says so.
    assert bnfold.export(model, tmp_path / "net.onnx", (X,)).passed
    for module in model.modules():
        module._forward_hooks.clear()
    assert bnfold.check(tmp_path / "net.onnx", model, (X,)).verdict == "fail"


def test_a_copy_owns_what_it_holds() -> None:
    model = hooked(traced())
    twin = copied(model)
    twin._forward_hooks.clear()
    with torch.no_grad():
        twin.shift.zero_()
        twin.linear.weight.zero_()
    assert len(model._forward_hooks) == 1 and model.shift.all() and model.linear.weight.all()
    assert eval_copy(model).linear.weight is model.linear.weight and eval_copy(model).shift is not model.shift


def pruned() -> nn.Module:
    net = Net(simple)
    prune.l1_unstructured(net.linear, "weight", 0.5)
    return net


def weight_normed() -> nn.Module:
    net = Net(simple)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(net.linear)
    return net


@pytest.mark.parametrize("build", [pruned, weight_normed])
def test_what_deepcopy_refuses_is_copied(build: Callable[[], nn.Module]) -> None:
    model = zoo.randomize(build()).eval()
    with pytest.raises(RuntimeError, match="deepcopy protocol"):
        copy.deepcopy(model)
    assert torch.equal(copied(model)(X), model(X)) and torch.equal(eval_copy(model)(X), model(X))


class Itself(nn.Linear):
    def __deepcopy__(self, memo: dict[int, Any]) -> Itself:
        return self


class Hookless(nn.Linear):
    def __deepcopy__(self, memo: dict[int, Any]) -> Hookless:
        made = Hookless(self.in_features, self.out_features)
        made.load_state_dict(self.state_dict())
        return made


class Lesser(nn.Sequential):
    def __deepcopy__(self, memo: dict[int, Any]) -> Lesser:
        return Lesser()


@pytest.mark.parametrize(
    ("layer", "says"),
    [
        (Itself(4, 4), "Itself that its __deepcopy__ makes is the module itself"),
        (hooked(Hookless(4, 4)), "of another class or hooks"),
        (Lesser(nn.Tanh()), r"(?s)'1\.0': the copy of a Tanh .* is none"),
    ],
)
def test_a_copy_that_is_none_is_an_error(layer: nn.Module, says: str) -> None:
    with pytest.raises(CaptureError, match=says):
        copied(nn.Sequential(nn.Linear(4, 4), layer))
    assert layer.training


def test_a_class_may_say_how_it_is_copied() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Hookless(4, 4))
    assert torch.equal(copied(model)(X), model(X))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of torch's own copying
def test_the_module_of_a_program_is_refused_and_the_program_is_not() -> None:
    with pytest.raises(CaptureError, match=r"cannot be put into eval mode.*give the program itself"):
        capture(program().module(), (X,))
    holds(capture(program()), (X,))


def test_a_layer_may_be_tried_with_an_argument_that_it_does_not_take() -> None:
    def tries(m: Net, x: Tensor) -> Tensor:
        for layer in (m.linear, m.norm):
            try:
                x = layer(x, lengths=None)
            except TypeError:
                x = layer(x)
        return x

    captured = capture(Net(tries), (X,))
    holds(captured, (X,))
    assert {module_of(node) for node in captured.program.graph.nodes} >= {"linear", "norm"}


# -- failures ----------------------------------------------------------------------------------------------------------


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Choosy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] % 7 == 0
        return x


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), Branch())

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def generator_inside() -> nn.Module:
    net = Net(simple)
    net.source = (i for i in range(3))  # type: ignore[assignment]
    return net


def writes(m: Net, x: Tensor) -> Tensor:
    x += 1
    return m.linear(x)


def counts(m: Net, x: Tensor) -> Tensor:
    m.norm.running_mean.add_(1)
    return m.linear(x)


def assigns_data(m: Net, x: Tensor) -> Tensor:
    m.linear.weight.data = m.norm.weight.data.clone() * torch.eye(4)
    return m.linear(x)


FAILURES: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...], type[Exception], str]] = {
    "branch": (Nested, (X,), CaptureError, r"^test_capture\.py:\d+ in forward \(module 'inner\.1'\): .*torch\.where"),
    "wrong shape": (
        lambda: Net(simple),
        (X[:, :3],),
        CaptureError,
        r"test_capture\.py:\d+ .*Check the number.*--input",
    ),
    "a size that the model refuses": (
        Choosy,
        (X,),
        CaptureError,
        r"test_capture\.py:\d+ in forward.*: AssertionError.* The model itself fails on this input: .*--input",
    ),
    "nothing given": (lambda: Net(simple), None, InputError, "no example inputs"),  # type: ignore[dict-item]
    "too many": (Keywords, (X, X), InputError, "do not fit forward: too many.*Its signature is"),
    "too few": (Keywords, (X,), InputError, "do not fit forward: missing a required.*'b'"),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(3)), (X,), CaptureError, "lazy layers.*Run it once"),
    "no copy": (generator_inside, (X,), CaptureError, "cannot be copied.*copy.deepcopy"),
    "writes to its input": (lambda: Net(writes), (X,), CaptureError, "writes to its input.*clone the input"),
    "assigns to .data": (lambda: Net(assigns_data), (X,), CaptureError, r"cannot follow a tensor.*\.data .* detach"),
    "writes to a buffer": (lambda: Net(counts), (X,), CaptureError, "writes to its buffer 'norm.running_mean'"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_failures_say_where_and_the_way_out(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    build, args, error, message = FAILURES[name]
    with pytest.raises(error, match=message) as caught:
        capture(build(), args)
    assert "\n" not in str(caught.value) and ".. " not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_violated_constraint_names_the_dimension() -> None:
    fixed = r"test_capture\.py:\d+ in <lambda>: 'n' \(axis 0 .*cannot be dynamic: the model's code fixes it at 3\. Give"
    with pytest.raises(CaptureError, match=fixed):
        capture(Net(SPECIALISED["a comparison"]), (X,), dynamic_shapes=(({0: Dim("n")},),))


class Collecting(nn.Module):
    """Reads what a hook collects, as extractors of features do."""

    def __init__(self, hook: str) -> None:
        super().__init__()
        self.body, self.head, self.seen = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1), {}
        if hook == "of the model":
            seen = self.seen
            self.body.register_forward_hook(lambda module, given, found: seen.update(body=found))
        else:
            self.body.register_forward_hook(self.collect)

    def collect(self, module: nn.Module, given: Any, found: torch.Tensor) -> None:
        self.seen["body"] = found

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.body(x)
        return self.head(self.seen["body"])


@pytest.mark.parametrize("hook", ["of the model", "a method"])
@pytest.mark.parametrize("training", [True, False])
def test_a_hook_that_holds_the_model_itself(hook: str, training: bool) -> None:
    model = Collecting(hook).train(training)
    model.head.eval()
    x = torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        model(x + 1)
    if hook == "of the model":
        with pytest.raises(CaptureError, match="a copy of the model computes something else"):
            capture(model, (x,))
    else:
        captured = capture(model, (x,))
        assert torch.equal(captured.run_eager((x,))[0], model(x))
    assert [m.training for m in (model, model.body, model.head)] == [training, training, False]
