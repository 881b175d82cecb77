"""Values that are written to after somebody read them: nobody may read them in another place, folding or merging."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from checker import assert_close, build, noise, operators
from torch import nn

import bnfold

IMAGE = (2, 4, 6, 5)


def written(read: Callable[[Any, Any], Any], late: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Reads a value, writes to a part of it, and reads it again."""

    def run(m: Any, x: Any) -> Any:
        y = x.relu()
        before = read(m, y)
        y[:, 0] = 7.0
        return late(m, before), y

    return run


CASES: dict[str, Callable[[Any, Any], Any]] = {
    "a pair": written(lambda m, y: m.a(y), lambda m, h: m.b(h)),
    "a pair through a copy": written(lambda m, y: m.a(y.clone()), lambda m, h: m.b(h.clone())),
    "a convolution and a norm": written(lambda m, y: m.a(y), lambda m, h: m.norm(h)),
    "an average and a convolution": written(lambda m, y: m.pool(y), lambda m, h: m.a(h)),
    "affines that cancel": written(lambda m, y: 1 - y, lambda m, h: 1 - h),
    "affines that are composed": written(lambda m, y: y * 2, lambda m, h: h * 0.5),
    "a norm in front of a convolution": written(lambda m, y: m.norm(y), lambda m, h: m.a(h)),
    "a view and a norm": written(lambda m, y: m.norm(y.view(y.shape)), lambda m, h: m.a(h)),
}


def parallel(m: Any, x: Any) -> Any:
    y = x.relu()
    keep = y.clone()
    y[:, 0] = 0.0
    return m.a(keep) + m.b(y)


def residual(m: Any, x: Any) -> Any:
    y = x.relu()
    h = m.a(y)
    y[:, 0] = 0.0
    return h + y


def joined(m: Any, x: Any) -> Any:
    y = x.relu()
    h = m.a(y)
    y[:, 0] = 0.0
    return torch.cat([h, m.b(y)], 1)


def split(m: Any, x: Any) -> Any:
    y = x.relu()
    one, two = y.unsafe_split(2, 1)
    h = m.c(one)
    y[:, 0] = 0.0
    return h + m.c(one), two


CASES |= {"a sum": parallel, "a residual": residual, "a concatenation": joined, "parts of a value": split}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("merge", [True, False])
def test_what_is_written_later_is_read_where_it_was(name, merge):
    net = build(
        CASES[name], a=nn.Conv2d(4, 4, 1), b=nn.Conv2d(4, 4, 1), c=nn.Conv2d(2, 2, 1), norm=nn.BatchNorm2d(4),
        pool=nn.AvgPool2d(2, 2),
    )  # fmt: skip
    folded = bnfold.fold(net, (noise(*IMAGE),), merge=merge)
    for batch in (1, 2, 3):
        x = noise(batch, *IMAGE[1:], seed=batch)
        with torch.no_grad():
            assert_close(folded.module(x.clone()), copy.deepcopy(net)(x.clone()))


def test_a_convolution_of_what_is_written_later_takes_a_norm_itself():
    """Nothing is read elsewhere: the convolution stays, and the norm behind it goes."""
    net = build(CASES["a convolution and a norm"], a=nn.Conv2d(4, 4, 1), norm=nn.BatchNorm2d(4))
    folded = bnfold.fold(net, (noise(*IMAGE),))
    assert not operators(folded.program)["batch_norm"]


@pytest.mark.parametrize("write", [True, False])
def test_rows_of_a_softmax_that_were_written_are_no_weights(write):
    def run(m, x):
        weights = (x @ x.transpose(1, 2)).softmax(-1)
        if write:
            weights[:, 0] = 0.0
        return m.fc(weights @ m.norm(x.relu().transpose(1, 2)).transpose(1, 2))

    net = build(run, fc=nn.Linear(4, 4), norm=nn.BatchNorm1d(4))
    folded = bnfold.fold(net, (noise(2, 5, 4),))
    assert operators(folded.program)["batch_norm"] == write
    with torch.no_grad():
        assert_close(folded.module(x := noise(3, 5, 4, seed=1)), net(x))


# -- in the model's own class: an Identity returns its argument, where a BatchNorm returned a new tensor ---------------


class Rectified(nn.Module):
    """A scale, then a ReLU that writes to its argument; ``source`` says whose that would be without the scale."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source = source
        self.first, self.second, self.third = (nn.Conv2d(4, 4, 1) for _ in range(3))
        self.norm, self.act = nn.BatchNorm2d(4), nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.source == "its own":
            return self.second(self.act(self.norm(self.first(x))))
        y = x if self.source == "the caller's" else x.tanh()
        found = self.act(self.norm(y).flatten(1)).view(x.shape) if self.source == "a view" else self.act(self.norm(y))
        return self.second(found) + (0 if self.source == "the caller's" else self.third(y))


@pytest.mark.parametrize("source", ["its own", "the caller's", "another's", "a view"])
def test_no_identity_lets_somebody_elses_value_be_written_to(source):
    net = Rectified(source).eval()
    net.norm.weight.data = torch.tensor([0.5, 2.0, 1.0, 3.0])
    x = noise(*IMAGE, dtype=torch.float32)
    back = bnfold.fold(net, (x.clone(),), merge=False).write_back(net)
    assert isinstance(back.module.norm, nn.Identity) == (source == "its own")
    kept = x.clone()
    with torch.no_grad():
        found, wanted = back.module(x), net(kept.clone())
    assert torch.equal(x, kept)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("stored", [torch.tensor([1, 2, 3, 4]), torch.tensor([1.0, 2.0, 3.0, 4.0]).half()])
def test_no_scale_is_written_into_a_tensor_of_another_dtype(stored):
    net = build(lambda m, x: x.sigmoid() * m.steps * m.more, steps=stored, more=stored).float()
    net.steps, net.more = stored, stored.clone()
    folded = bnfold.fold(net, (x := noise(2, 4, dtype=torch.float32),), merge=False)
    back = folded.write_back(net)
    assert back.refused
    assert f"is of {stored.dtype}" in "".join(r.detail for entry in back.refused for r in entry.refusals)
    with torch.no_grad():
        for module in (folded.module, back.module):
            torch.testing.assert_close(module(x), net(x))
    assert back.module.steps.dtype == back.module.more.dtype == stored.dtype
