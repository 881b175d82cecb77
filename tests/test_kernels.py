"""Kernels: embedding and multiplying them, against torch's own convolutions."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from bnfold.passes.kernels import Kernel, added, average, composed, depthwise, embedded, may_fit
from bnfold.semantics import Geometry

torch.set_num_threads(1)
CONVOLUTIONS = {
    (1, False): F.conv1d, (2, False): F.conv2d, (1, True): F.conv_transpose1d, (2, True): F.conv_transpose2d,
}  # fmt: skip


def apply(kernel: Kernel, x: Tensor) -> Tensor:
    """What torch computes with the kernel: a weight (G, out, in, *k) flattened to (G*out, in, *k), or its transpose."""
    g, groups = kernel.geometry, kernel.groups
    weight = kernel.weight.transpose(1, 2) if g.transposed else kernel.weight
    flat = weight.flatten(0, 1)
    if not kernel.size:
        return F.linear(x, kernel.weight.flatten(0, 1), kernel.bias)
    run = CONVOLUTIONS[len(kernel.size), g.transposed]
    if g.transposed:
        return run(x, flat, kernel.bias, g.stride, g.padding, g.output_padding, groups, g.dilation)
    return run(x, flat, kernel.bias, g.stride, g.padding, g.dilation, groups)


@dataclass(frozen=True)
class Limits:
    """What a random kernel may be."""

    spatial: int
    stride: int = 2
    single: bool = False
    bias: bool = True
    transposed: bool = False


@st.composite
def kernels(draw: st.DrawFn, ins: int, outs: int, limits: Limits) -> Kernel:
    """A random convolution kernel from ``ins`` to ``outs`` channels."""
    n = limits.spatial
    axis = st.tuples(
        st.just(1) if limits.single else st.integers(1, 3), st.integers(1, limits.stride), st.integers(0, 2),
        st.integers(1, 2),
    )  # fmt: skip
    size, stride, padding, dilation = zip(*[draw(axis) for _ in range(n)])
    groups = draw(st.sampled_from([g for g in (1, 2, 4) if ins % g == outs % g == 0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    more: tuple[int, ...] = ()
    if limits.transposed:
        more = tuple(draw(st.integers(0, s - 1)) for s in stride)
        assume(all(d * (k - 1) + 1 + m > 2 * p for k, p, d, m in zip(size, padding, dilation, more)))
    weight = torch.randn(groups, outs // groups, ins // groups, *size, generator=generator, dtype=torch.float64)
    bias = torch.randn(outs, generator=generator, dtype=torch.float64) * (limits.bias and draw(st.booleans()))
    return Kernel(weight, bias, Geometry(stride, padding, dilation, limits.transposed, more))


def close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-11, atol=1e-11)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_an_embedded_kernel_computes_the_same(data: st.DataObject) -> None:
    spatial, transposed = data.draw(st.integers(1, 2)), data.draw(st.booleans())
    limits = Limits(spatial, transposed=transposed)
    host = data.draw(kernels(4, 4, limits))
    kernel = data.draw(kernels(4, 4, limits))
    if data.draw(st.booleans()):  # else few have a place
        generous = Geometry(host.geometry.stride, host.geometry.padding, (1,) * spatial, transposed, (0,) * spatial)
        host = replace(host, weight=torch.zeros(host.groups, *host.weight.shape[1:3], *(5,) * spatial).double(),
                       geometry=replace(generous, padding=(2,) * spatial))  # fmt: skip
        kernel = replace(kernel, geometry=replace(kernel.geometry, stride=host.geometry.stride))
    found = embedded(kernel, host)
    if found is None:
        return
    x = torch.randn(2, 4, *(9, 8)[:spatial], dtype=torch.float64)
    assert found.weight.shape == host.weight.shape and found.geometry == host.geometry
    assert close(apply(found, x), apply(kernel, x))
    assert close(apply(added(host, found, -0.5), x), apply(host, x) - 0.5 * apply(kernel, x))
    assert may_fit(kernel, host) or kernel.size == (1,) * spatial


def test_what_has_a_place_is_found_and_what_has_none_is_not() -> None:
    """The random kernels above must not all be refused."""
    one = torch.ones(4, dtype=torch.float64)
    host = Kernel(torch.zeros(1, 4, 4, 5, 5).double(), one, Geometry((1, 1), (2, 2), (1, 1)))
    small = Kernel(torch.zeros(1, 4, 4, 3, 3).double(), one, Geometry((1, 1), (1, 1), (1, 1)))
    for kernel in (depthwise(one, one, 2), average(4, (3, 3), small.geometry), small):
        assert embedded(kernel, host) is not None
    twins = [
        replace(small, geometry=Geometry((2, 2), (1, 1), (1, 1))),  # another stride
        replace(small, geometry=Geometry((1, 1), (0, 0), (1, 1))),  # another output size
        replace(small, geometry=Geometry((1, 1), (3, 3), (3, 3))),  # taps outside
        replace(small, weight=torch.zeros(1, 5, 4, 3, 3).double()),  # other channels
        replace(small, geometry=Geometry((1, 1), (1, 1), (1, 1), transposed=True)),
    ]
    assert all(embedded(twin, host) is None for twin in twins)
    assert embedded(small, replace(host, weight=torch.zeros(2, 2, 2, 5, 5).double())) is None  # dense into grouped


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_a_product_computes_both(data: st.DataObject) -> None:
    spatial = data.draw(st.integers(1, 2))
    pads_first = data.draw(st.booleans())
    one_tap = Limits(spatial, stride=1, single=True)
    wide = Limits(spatial, transposed=data.draw(st.booleans()))
    middle, outs = data.draw(st.sampled_from([(2, 4), (4, 4), (4, 8)]))
    single_second = data.draw(st.booleans())
    first = data.draw(kernels(4, middle, wide if single_second else one_tap))
    second = data.draw(kernels(middle, outs, one_tap if single_second else wide))
    if not pads_first:
        single = second if single_second else first
        single = replace(single, geometry=Geometry.pointwise(spatial))
        first, second = (first, single) if single_second else (single, second)
    total = composed(second, first)
    x = torch.randn(2, 4, *(11, 9)[:spatial], dtype=torch.float64)
    if total is not None:
        assert close(apply(total, x), apply(second, apply(first, x)))
    else:
        pads = any(second.geometry.padding) or any(first.geometry.padding)
        transposed = wide.transposed and not single_second
        groups = max(first.groups, second.groups) % min(first.groups, second.groups)
        assert pads or transposed or groups, "nothing is in the way"


def test_a_bias_does_not_reach_into_padding() -> None:
    point = Kernel(torch.ones(1, 2, 2, 1).double(), torch.tensor([1.0, 0]).double(), Geometry.pointwise(1))
    wide = Kernel(torch.ones(1, 2, 2, 3).double(), torch.zeros(2).double(), Geometry((1,), (1,), (1,)))
    bare, unpadded = replace(point, bias=point.bias * 0), replace(wide, geometry=Geometry((1,), (0,), (1,)))
    padded = replace(point, geometry=Geometry((1,), (1,), (1,)))
    assert composed(wide, point) is None
    assert composed(wide, bare) is not None and composed(unpadded, point) is not None
    total = composed(unpadded, padded)
    assert total is not None and total.geometry.padding == (1,)


def test_linear_layers_have_no_axes() -> None:
    a = Kernel(torch.randn(1, 3, 4).double(), torch.randn(3).double(), Geometry())
    b = Kernel(torch.randn(1, 5, 3).double(), torch.randn(5).double(), Geometry())
    x, total = torch.randn(2, 4).double(), composed(b, a)
    assert total is not None and close(apply(total, x), apply(b, apply(a, x)))
    scale, shift = torch.randn(3).double(), torch.randn(3).double()
    scaled = composed(depthwise(scale, shift, 0), a)
    assert scaled is not None and close(apply(scaled, x), apply(a, x) * scale + shift)
