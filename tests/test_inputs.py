import doctest
from typing import Any

import pytest
import torch

from bnfold.errors import InputError, UsageError
from bnfold.loading import specs
from bnfold.loading.inputs import example
from bnfold.loading.specs import DTYPES, InputSpec, parse_dynamic, parse_input

torch.set_num_threads(1)


def test_docstring_examples_run() -> None:
    assert doctest.testmod(specs).failed == 0


@pytest.mark.parametrize(
    ("text", "name", "dtype", "dims"),
    [
        ("x:float32[N,3,224,224]", "x", "float32", ("N", 3, 224, 224)),
        ("float32[N,10]", None, "float32", ("N", 10)),
        ("ids:int64[N,T]", "ids", "int64", ("N", "T")),
        ("x[N,3,8,8]", "x", "float32", ("N", 3, 8, 8)),
        ("[4,5]", None, "float32", (4, 5)),
        ("x:float32[]", "x", "float32", ()),
        ("bool[2]", None, "bool", (2,)),
        ("bool:bool[2]", "bool", "bool", (2,)),
        (" x : bfloat16 [ batch , 1 ] ", "x", "bfloat16", ("batch", 1)),
    ],
)
def test_parse_input(text: str, name: str | None, dtype: str, dims: tuple[int | str, ...]) -> None:
    assert parse_input(text) == InputSpec(name, dtype, dims)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no input specification"),
        ("x:float32", "no input specification"),
        ("x:[N]", "no input specification"),
        (":float32[N]", "no input specification"),
        ("x float32[N]", "no input specification"),
        ("x:float32[N][3]", "no input specification"),
        ("x:float32(N,3)", "no input specification"),
        ("1x:float32[N]", "no input specification"),
        ("x:float33[N]", "Did you mean float32"),
        ("x:quaternion[N]", "There are float32"),
        ("x:float32[N,]", "'' is neither"),
        ("x:float32[N,-1]", "'-1' is neither"),
        ("x:float32[N,3.5]", "'3.5' is neither"),
        ("x:float32[2N]", "'2N' is neither"),
        ("x:float32[for]", "'for' is neither"),
        ("x:float32[N,0]", "size 0"),
        ("x:float32[N,000]", "size 0"),
        ("x:float32[N,99999999999999999999999999]", "26 digits"),
        (f"x:float32[{2**63}]", "19 digits"),
        (f"x:float32[{'9' * 5000}]", "5000 digits"),
        (f"x:float32[{','.join(['1'] * 65)}]", "65 dimensions"),
    ],
)
def test_parse_input_rejects(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        parse_input(text)
    assert "did you mean" in str(caught.value).lower() or "float32" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("N=1..64", ("N", 1, 64)),
        ("N=1..", ("N", 1, None)),
        ("N", ("N", 1, None)),
        (" H = 32 .. 512 ", ("H", 32, 512)),
    ],
)
def test_parse_dynamic(text: str, expected: tuple[str, int, int | None]) -> None:
    assert parse_dynamic(text) == expected


@pytest.mark.parametrize(
    "text", ["", "N=", "N=4", "N=..4", "N=a..b", "=1..4", "N=4..2", "N=4..4", "N=0..4", "if", "N:1..2"]
)
def test_parse_dynamic_rejects(text: str) -> None:
    with pytest.raises(UsageError, match=r"--dynamic N=1\.\.64"):
        parse_dynamic(text)


@pytest.mark.parametrize("text", ["N=1..99999999999999999999999999", f"N={'9' * 5000}..", f"N=1..{2**63}"])
def test_a_range_of_sizes_that_no_tensor_has(text: str) -> None:
    with pytest.raises(UsageError, match="digits is larger than any tensor"):
        parse_dynamic(text)
    assert parse_dynamic(f"N=1..{2**63 - 1}") == ("N", 1, 2**63 - 1)


def shapes(tensors: Any) -> Any:
    return [tuple(tensor.shape) for tensor in (tensors.values() if isinstance(tensors, dict) else tensors)]


def test_example_is_positional_up_to_the_first_gap() -> None:
    specs = [parse_input("d[5]"), parse_input("b[3]"), parse_input("a[2]")]
    args, kwargs, dynamic = example(specs, ["a", "b", "c", "d"], ranges={})
    assert shapes(args) == [(2,), (3,)]
    assert {name: tuple(tensor.shape) for name, tensor in kwargs.items()} == {"d": (5,)}
    assert dynamic == {"a": {}, "b": {}, "d": {}}


def test_example_gives_unnamed_specs_the_free_parameters_in_order() -> None:
    specs = [parse_input("[2]"), parse_input("a[3]"), parse_input("[4]")]
    args, kwargs, _ = example(specs, ["a", "b", "c"], ranges={})
    assert (shapes(args), kwargs) == ([(3,), (2,), (4,)], {})


def test_example_of_nothing() -> None:
    assert example([], ["x"], ranges={}) == ((), {}, {})


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        (["y[2]"], "no input 'y'"),
        (["inpt[2]"], "Did you mean input"),
        (["input[2]", "input[2]"], "given twice"),
        (["[2]", "[2]", "[2]"], "3 inputs are given and the model has 2"),
        (["input[2]", "mask[2]", "[2]"], "3 inputs are given"),
    ],
)
def test_example_rejects_inputs_that_the_model_lacks(texts: list[str], says: str) -> None:
    with pytest.raises(InputError, match=says):
        example([parse_input(text) for text in texts], ["input", "mask"], ranges={})


@pytest.mark.parametrize(
    ("ranges", "says"),
    [({"M": (1, 4)}, "They have N"), ({"N": (1, 1)}, "no size of 2 or more")],
)
def test_example_rejects_ranges_that_cannot_be(ranges: dict[str, specs.Range], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        example([parse_input("x[N]")], ["x"], ranges=ranges)


@pytest.mark.parametrize(
    ("text", "ranges", "expected"),
    [
        ("x[N,3,H,W]", {}, (2, 3, 64, 96)),
        ("x[N,3,H,W]", {"H": (224, 512), "W": (224, None)}, (2, 3, 224, 256)),
        ("x[N,T]", {"T": (1, 16)}, (3, 2)),
        ("x[N,M]", {"N": (5, 9), "M": (5, 6)}, (6, 5)),
        ("x[N,M]", {"N": (1, 2), "M": (1, 2)}, (2, 2)),
        ("x[N,N]", {}, (2, 2)),
        ("x[N,7]", {"N": (8, None)}, (8, 7)),
    ],
)
def test_example_sizes(text: str, ranges: dict[str, specs.Range], expected: tuple[int, ...]) -> None:
    (x,), _, dynamic = example([parse_input(text)], ["x"], ranges=ranges)
    assert x.shape == expected
    for axis, dim in dynamic["x"].items():
        low, high = ranges.get(dim.__name__, (1, None))
        assert (dim.min, dim.__name__) == (low, parse_input(text).dims[axis])
        assert high is None or (dim.max == high and x.shape[axis] <= high)


def test_one_letter_is_one_dimension() -> None:
    _, _, dynamic = example([parse_input("a[N,3]"), parse_input("b[N]")], ["a", "b"], ranges={"N": (1, 9)})
    assert dynamic["a"][0] is dynamic["b"][0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_example_values(dtype: str) -> None:
    spec = parse_input(f"{dtype}[4000]")
    (first,), _, _ = example([spec], ["x"], ranges={}, seed=3)
    (again,), _, _ = example([spec], ["x"], ranges={}, seed=3)
    (other,), _, _ = example([spec], ["x"], ranges={}, seed=4)
    assert first.dtype == getattr(torch, dtype)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    values = first.double()
    if first.dtype.is_floating_point:
        assert abs(values.mean()) < 0.1
        assert abs(values.std() - 1) < 0.1
    else:
        assert values.unique().tolist() == [0, 1]


def test_example_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    example([parse_input("x[N,3]")], ["x"], ranges={})
    assert torch.equal(before, torch.get_rng_state())


def test_example_too_large_for_memory() -> None:
    with pytest.raises(InputError, match="memory"):
        example([parse_input("x[999999999,999999999]")], ["x"], ranges={})


class TwoInputs(torch.nn.Module):
    def forward(self, x: torch.Tensor, *, mask: torch.Tensor | None = None, scale: torch.Tensor) -> torch.Tensor:
        return x.flatten(1).sum(1) * scale


def test_what_torch_export_captures_runs_at_a_batch_of_one() -> None:
    specs = [parse_input("x[N,3,T]"), parse_input("scale[N]")]
    args, kwargs, dynamic = example(specs, ["x", "mask", "scale"], ranges={"N": (1, 64)})
    program = torch.export.export(TwoInputs(), args, kwargs, dynamic_shapes=dynamic)
    for batch, length in [(1, 1), (1, 5), (7, 64), (64, 2)]:
        x, scale = torch.randn(batch, 3, length), torch.randn(batch)
        torch.testing.assert_close(program.module()(x, scale=scale), TwoInputs()(x, scale=scale))
    with pytest.raises(AssertionError):
        program.module()(torch.randn(65, 3, 2), scale=torch.randn(65))
