"""The fold in the model's own class: the same class, the same function, and nothing that the class cannot say."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import NETS, randomize
from zoo_hf import HF_NETS

import bnfold
from bnfold import CaptureError, FoldError, InputError, Ledger, prepare
from bnfold.cli import cli
from bnfold.eager.eager import WrittenBack
from bnfold.gate.gate import Gate
from bnfold.loading.load import load
from bnfold.loading.structure import read_notes, restructure, save_written, stored_ledgers
from bnfold.report import Change

torch.set_num_threads(1)
MODELS = Path(__file__).parent.parent / "models"
sys.path.insert(0, str(MODELS))
import digits

IMAGES = (torch.randn(2, 3, 8, 8),)


def written(model: nn.Module, args: tuple[Any, ...] = IMAGES, **options: Any) -> WrittenBack:
    return bnfold.fold(model, args, merge=False, **options).write_back(model)


def judged(model: nn.Module, args: tuple[Any, ...], **options: Any) -> tuple[WrittenBack, bnfold.CheckReport]:
    folded = bnfold.fold(model, args, merge=False, **options)
    back = folded.write_back(model)
    return back, Gate(folded.captured, back.ledger, back.program, eager=back.module).judge()


def refused(back: WrittenBack) -> dict[str, str]:
    """What the class cannot express, by module, in words."""
    reasons = ((e.module, r) for e in back.refused for r in e.refusals)
    return {module: refusal.detail for module, refusal in reasons if refusal.reason == "inexpressible"}


def trained(name: str) -> nn.Module:
    model: nn.Module = getattr(digits, name)()
    model.load_state_dict(load_file(MODELS / f"{name}.safetensors"))
    return model


def outputs(model: nn.Module, args: tuple[Any, ...]) -> list[Tensor]:
    with torch.no_grad():
        found = model.eval()(*args)
    return [leaf for leaf in torch.utils._pytree.tree_leaves(found) if isinstance(leaf, Tensor)]


def norms(model: nn.Module) -> int:
    return sum(isinstance(m, nn.modules.batchnorm._NormBase) for m in model.modules())


# -- whole models ------------------------------------------------------------------------------------------------------

TRAINED = {"digits_mlp": 1, "digits_cnn": 11, "digits_tcn": 7, "digits_batchstats": 2}


#: With what classes do: branches, tied tensors, parametrizations, functional calls, several inputs and outputs.
ZOO = (
    *("shufflenet_v2", "unet", "conv3d", "mlp", "squeeze_excite", "repmixer", "inceptionnext", "xcit", "parametrised"),
    *("standardised", "shared_conv", "shared_bias", "tied_weights", "tied_embedding", "two_inputs", "dict_outputs"),
    *("padding_modes", "interpolate", "input_normalisation", "inplace_aliases", "batch_statistics", "matrix_products"),
    *("dbb_border", "mixed_precision", "frozen_resnet"),
)


@pytest.mark.parametrize("name", TRAINED)
def test_the_trained_models_keep_their_class_and_pass_the_gate(name: str) -> None:
    model = trained(name)
    back, report = judged(model, model.example_inputs, static=name == "digits_batchstats")
    assert type(back.module) is type(model) and back.ledger.count()[0] == TRAINED[name] and not back.refused
    assert norms(back.module) == norms(model) - TRAINED[name]
    assert report.passed, report.problems
    assert {o.candidate for o in report.outputs} == {"folded torch", "folded class"}


@pytest.mark.parametrize(("name", "count"), [("resnet_basic", 12), ("regnet_x", 17), ("efficientnet", 25)])
def test_transformers_models_keep_their_class_and_pass_the_gate(name: str, count: int) -> None:
    wrapper, args = HF_NETS[name]()
    back, report = judged(wrapper, args)
    assert type(back.module.model) is type(wrapper.model)
    assert back.ledger.count() == (count, count) and norms(back.module) == 0
    assert report.passed, report.problems
    fresh, _ = HF_NETS[name]()
    loaded = prepare(fresh, back.ledger)
    loaded.load_state_dict(back.module.state_dict(), strict=True)
    assert all(map(torch.equal, outputs(loaded, args), outputs(back.module, args)))


@pytest.mark.parametrize("name", ZOO)
def test_nets_of_the_zoo_survives_a_round_trip(name: str) -> None:
    """``write_back`` itself compares the module with the folded program; here a fresh instance with the module."""
    model, args = NETS[name]()
    folded = bnfold.fold(model, args, merge=False)
    back = folded.write_back(model)
    assert type(back.module) is type(model)
    # What is not folded into the class either was not folded at all, or is refused by name.
    # Another affine may go in its place: a frozen BatchNorm is one operator to the graph, and two that go to its class.
    gone, gone_back = ({e.value for e in ledger.folded} for ledger in (folded.ledger, back.ledger))
    assert len(gone - gone_back - {e.value for e in back.refused}) <= len(gone_back - gone)
    ledger = Ledger.from_json(back.ledger.to_json())
    assert ledger == back.ledger
    fresh, _ = NETS[name]()
    loaded = prepare(fresh, ledger)
    loaded.load_state_dict(back.module.state_dict(), strict=True)
    assert all(map(torch.equal, outputs(loaded, args), outputs(back.module, args)))


@pytest.mark.parametrize("name", ["resnet_basic", "frozen_resnet", "convnext", "poolformer"])
def test_what_a_class_can_say_is_all_of_it(name: str) -> None:
    model, args = NETS[name]()
    assert written(model, args).ledger.count() == bnfold.fold(model, args, merge=False).ledger.count()


# -- one rule at a time ------------------------------------------------------------------------------------------------


class NormAct(nn.BatchNorm2d):
    """timm's BatchNormAct2d: a BatchNorm, a dropout and an activation in one module."""

    def __init__(self, channels: int, act: nn.Module) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), act

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        return self.act(self.drop(x))


class ActNorm(NormAct):
    """The same the other way round."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.BatchNorm2d.forward(self, self.act(x))


class FrozenBatchNorm(nn.Module):
    """A BatchNorm written as arithmetic on buffers, as in detection."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return x * scale.view(-1, 1, 1) + (self.bias - self.running_mean * scale).view(-1, 1, 1)


class Block(nn.Module):
    """A convolution and what is behind it, as ``call`` computes it."""

    def __init__(self, call: Callable[..., Tensor], *, bias: bool = False, padding: int = 1, **modules: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=padding, bias=bias)
        for name, module in modules.items():
            setattr(self, name, module)
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self, x)


def block(call: Callable[..., Tensor], **options: Any) -> Block:
    torch.manual_seed(0)
    made = Block(call, **options)
    return randomize(made)  # type: ignore[return-value]


def test_a_batchnorm_becomes_an_identity_and_the_convolution_gains_a_bias() -> None:
    back = written(block(lambda m, x: m.bn(m.conv(x)).relu(), bn=nn.BatchNorm2d(4)))
    assert type(back.module.bn) is nn.Identity and back.module.conv.bias.shape == (4,)
    assert back.ledger.changes == (Change("bn", "identity"), Change("conv", "parameter", "bias", (4,)))


def test_a_bias_that_is_there_changes_and_is_no_change_of_structure() -> None:
    back = written(block(lambda m, x: m.bn(m.conv(x)).relu(), bn=nn.BatchNorm2d(4), bias=True))
    assert back.ledger.changes == (Change("bn", "identity"),)


@pytest.mark.parametrize("kind", [NormAct, ActNorm])
@pytest.mark.parametrize("act", [nn.ReLU(inplace=True), nn.PReLU(4), nn.Hardswish()])
def test_a_batchnorm_with_its_activation_becomes_the_activation(kind: type[NormAct], act: nn.Module) -> None:
    torch.manual_seed(0)
    model = randomize(nn.Sequential(nn.Conv2d(3, 4, 3), kind(4, copy.deepcopy(act)), nn.Conv2d(4, 2, 3)))
    back = written(model)
    assert back.ledger.count() == (1, 1) and type(back.module[1]) is type(act)


def test_a_child_that_takes_its_parents_place_may_have_changed_itself() -> None:
    """FastViT's RepMixer: a block that is a scale of its only branch, a BatchNorm that takes in what comes after."""

    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.identity, self.scale = nn.BatchNorm2d(3), nn.Parameter(torch.randn(3, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.identity(x) * self.scale

    parts = {"branch": Branch(), "mixed": nn.Identity()}
    back = written(block(lambda m, x: m.mixed((m.conv(x)[:, :3].sigmoid() - m.branch(x)).relu()), **parts))
    assert isinstance(back.module.branch, nn.BatchNorm2d) and not back.refused
    assert "branch.weight" in back.module.state_dict()
    # Where something beside it takes the shift, the BatchNorm goes and the scale stays.
    back = written(block(lambda m, x: m.mixed((m.conv(x)[:, :3] - m.branch(x)).relu()), **parts))
    assert isinstance(back.module.branch, Branch) and isinstance(back.module.branch.identity, nn.Identity)
    assert not back.refused and back.ledger.count() == (1, 1)


def test_a_module_whose_activation_is_called_twice_is_none() -> None:
    class Twice(NormAct):
        def forward(self, x: Tensor) -> Tensor:
            return self.act(super().forward(x) - 1)

    back = written(block(lambda m, x: m.bn(m.conv(x)), bn=Twice(4, nn.ReLU())))
    assert refused(back) == {"bn": "Twice calls it as a function"} and isinstance(back.module.bn, Twice)


def test_a_module_that_returns_its_normalised_input_too_is_none() -> None:
    class Both(NormAct):
        def forward(self, x: Tensor) -> Tensor:
            x = nn.BatchNorm2d.forward(self, x)
            return torch.cat([x, self.act(x)], 1)

    back = written(block(lambda m, x: m.bn(m.conv(x)), bn=Both(4, nn.ReLU())))
    assert "bn" in refused(back) and isinstance(back.module.bn, Both)


def test_an_activation_that_is_called_twice_does_not_stand_for_the_module() -> None:
    class Again(NormAct):
        def forward(self, x: Tensor) -> Tensor:
            return self.act(super().forward(x))

    back = written(block(lambda m, x: m.bn(m.conv(x)), bn=Again(4, nn.PReLU(4))))
    assert set(refused(back)) == {"bn"} and isinstance(back.module.bn, Again)


def test_nor_does_one_whose_result_leaves_by_another_way() -> None:
    class Leaks(NormAct):
        def forward(self, x: Tensor) -> Tensor:
            x = nn.BatchNorm2d.forward(self, x)
            self.leak = self.act(x)
            return x

    back = written(block(lambda m, x: m.bn(m.conv(x)) + m.bn.leak, bn=Leaks(4, nn.Sigmoid())))
    assert set(refused(back)) == {"bn"} and isinstance(back.module.bn, Leaks)


def test_a_frozen_batchnorm_becomes_an_identity() -> None:
    back = written(block(lambda m, x: m.bn(m.conv(x)).relu(), bn=FrozenBatchNorm(4)))
    assert back.ledger.count() == (1, 1) and type(back.module.bn) is nn.Identity


def test_a_half_folded_frozen_batchnorm_is_none() -> None:
    """With no operator in front, its scale would go forward; its shift would have to reach into padded zeros."""

    class Centred(FrozenBatchNorm):
        def forward(self, x: Tensor) -> Tensor:
            centred = x - self.running_mean.view(-1, 1, 1)
            return centred * (self.weight * (self.running_var + 1e-5).rsqrt()).view(-1, 1, 1)

    model = randomize(nn.Sequential(Centred(3), nn.Conv2d(3, 4, 3, padding=1)))
    assert len(bnfold.fold(model, IMAGES, merge=False).ledger.folded) == 1
    back = written(model)
    assert isinstance(back.module[0], Centred) and set(refused(back)) == {"0"} and not back.ledger.folded
    model = randomize(nn.Sequential(Centred(3), nn.Conv2d(3, 4, 3)))
    assert type(written(model).module[0]) is nn.Identity


@pytest.mark.parametrize("shape", [(4, 1, 1), (1, 4, 1, 1), (4,)])
def test_a_layer_scale_in_a_larger_forward_becomes_one(shape: tuple[int, ...]) -> None:
    def call(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        return (y * m.gamma.reshape(4, 1, 1) + m.beta[:, None, None]).relu() + y.mean()

    def alone(m: Any, x: Tensor) -> Tensor:
        return (m.conv(x) * m.gamma.reshape(1, 4, 1, 1) + m.beta[:, None, None]).relu()

    gamma, beta = (nn.Parameter(torch.randn(s)) for s in (shape, (4,)))
    back = written(block(alone, gamma=gamma, beta=beta))
    assert len(back.ledger.folded) == 2 and not back.refused
    assert torch.equal(back.module.gamma, torch.ones(shape)) and torch.equal(back.module.beta, torch.zeros(4))
    # Its twin, where the convolution is read by something else as well.
    assert torch.equal(written(block(call, gamma=gamma, beta=beta)).module.gamma, gamma)


def test_a_batchnorm_goes_into_a_layer_scale_that_stays() -> None:
    def call(m: Any, x: Tensor) -> Tensor:
        return m.bn(m.conv(x)) * m.gamma.view(-1, 1, 1)

    model = block(lambda m, x: m.bn(F.pad(x, (1, 1))) * m.gamma.view(-1, 1, 1), bn=nn.BatchNorm2d(3),
                  gamma=nn.Parameter(torch.randn(3)))  # fmt: skip
    assert not written(model).ledger.folded or not refused(written(model))
    assert written(block(call, bn=nn.BatchNorm2d(4), gamma=nn.Parameter(torch.randn(4)))).ledger.count() == (1, 1)


@pytest.mark.parametrize(
    "scale", [lambda m: m.gamma.abs(), lambda m: m.gamma * 2, lambda m: torch.cat([m.gamma[:2], m.gamma[:2]])]
)
def test_a_layer_scale_that_is_computed_is_refused(scale: Callable[[Any], Tensor]) -> None:
    model = block(
        lambda m, x: (m.conv(x) * scale(m).view(-1, 1, 1)).relu(), gamma=nn.Parameter(torch.tensor([-1.0, 2.0, 0.5, 3]))
    )
    back = written(model)
    assert refused(back) == {"": "its other is computed and no parameter"} and not back.ledger.folded


def test_a_number_in_the_code_is_refused_and_a_module_of_its_own_is_not() -> None:
    class Half(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 0.5

    assert refused(written(block(lambda m, x: (m.conv(x) * 0.5).relu()))) == {"": "it is a number in the code of Block"}
    back = written(block(lambda m, x: m.scaled(m.conv(x)).relu(), scaled=Half()))
    assert not back.refused and type(back.module.scaled) is nn.Identity


def test_what_is_taken_from_a_parameter_is_refused() -> None:
    """No value of the parameter makes ``c - x`` give x."""
    back = written(block(lambda m, x: (m.c - m.conv(x)).relu(), c=nn.Parameter(torch.randn(4, 1, 1))))
    assert refused(back) == {"": "Block computes it in a larger forward"}


def test_a_minus_sign_in_the_code_is_refused_and_a_module_of_its_own_is_not() -> None:
    class Minus(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return -x

    back = written(block(lambda m, x: (-m.bn(m.conv(x))).sigmoid(), bn=nn.BatchNorm2d(4)))
    assert refused(back) == {"": "Block computes it in a larger forward"} and back.ledger.count() == (1, 1)
    back = written(block(lambda m, x: m.minus(m.bn(m.conv(x))).sigmoid(), bn=nn.BatchNorm2d(4), minus=Minus()))
    assert not back.refused and type(back.module.minus) is nn.Identity


def test_a_functional_batchnorm_is_refused_by_name() -> None:
    def call(m: Any, x: Tensor) -> Tensor:
        bn = m.bn
        return F.batch_norm(m.conv(x), bn.running_mean, bn.running_var, bn.weight, bn.bias).relu()

    wrapper = nn.Sequential(block(call, bn=nn.BatchNorm2d(4)))
    back = written(wrapper)
    assert refused(back) == {"0": "Block calls it as a function"} and back.ledger.count() == (0, 1)
    assert isinstance(back.module[0].bn, nn.BatchNorm2d) and back.module[0].conv.bias is None


def test_tensors_that_another_forward_reads_keep_their_module() -> None:
    back = written(block(lambda m, x: m.bn(m.conv(x)).relu() * m.bn.weight.norm(), bn=nn.BatchNorm2d(4)))
    assert refused(back)["bn"] == "its parameters are also read elsewhere"


def test_a_module_of_two_inputs_or_outputs_is_no_identity() -> None:
    class Masked(nn.BatchNorm2d):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            return super().forward(x)

    class Pair(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> tuple[Tensor, int]:  # type: ignore[override]
            return super().forward(x), 1

    for call, kind in (
        (lambda m, x: m.bn(m.conv(x), None).relu(), Masked),
        (lambda m, x: m.bn(m.conv(x), mask=None).relu(), Masked),
        (lambda m, x: m.bn(m.conv(x))[0].relu(), Pair),
    ):
        back = written(block(call, bn=kind(4)))
        assert refused(back) == {"bn": f"{kind.__name__} takes or returns more than one tensor"}


def test_a_convolution_called_twice_is_refused_by_name_and_written_where_both_calls_agree() -> None:
    def two(m: Any, x: Tensor) -> Tensor:
        return m.one(m.conv(x)).relu() + m.two(m.conv(x.flip(-1))).relu()

    back = written(block(two, one=nn.BatchNorm2d(4), two=nn.BatchNorm2d(4)))
    why = "'conv.weight' is used 2 times, and each use would need its own"
    assert refused(back) == {"one": why, "two": why} and norms(back.module) == 2

    def siamese(m: Any, x: Tensor) -> Tensor:
        return m.one(m.conv(x)).relu() + m.one(m.conv(x.flip(-1))).relu()

    back = written(block(siamese, one=nn.BatchNorm2d(4)))
    assert back.ledger.count() == (2, 2) and norms(back.module) == 0


def test_a_batchnorm_called_twice_stays_if_one_call_cannot_go() -> None:
    back = written(block(lambda m, x: m.bn(m.conv(x)).relu() + m.bn(m.conv(x).relu()).abs(), bn=nn.BatchNorm2d(4)))
    assert norms(back.module) == 1
    assert refused(back) == {"bn": "the module is called 2 times, and not every call can do without it"}


def test_one_that_is_refused_does_not_take_the_others_with_it() -> None:
    """The first convolution would absorb both norms; the class can say one of them."""

    def call(m: Any, x: Tensor) -> Tensor:
        y = m.bn(m.conv(x))
        y = F.batch_norm(y, m.mean, m.var)
        return y.relu()

    model = block(call, bn=nn.BatchNorm2d(4))
    model.register_buffer("mean", torch.randn(4))
    model.register_buffer("var", torch.rand(4) + 0.5)
    back = written(model)
    assert back.ledger.count() == (1, 2) and type(back.module.bn) is nn.Identity
    assert set(refused(back)) == {""}


def test_what_no_state_dict_holds_is_not_written() -> None:
    model = block(lambda m, x: (m.conv(x) * m.gamma).relu())
    model.register_buffer("gamma", torch.rand(4, 1, 1), persistent=False)
    assert refused(written(model)) == {"": "'gamma' is no part of the state dict"}


# -- code that needs the module itself ---------------------------------------------------------------------------------


def listed(m: Any, x: Tensor) -> Tensor:
    for step in m.steps:
        x = step(x)
    return m.two(m.second(x.relu())).relu()


def asked(kind: type[nn.Module]) -> Callable[[Any, Tensor], Tensor]:
    """A forward that knows layers by their class."""

    def call(m: Any, x: Tensor) -> Tensor:
        for layer in (m.conv, m.one):
            if not isinstance(layer, (nn.Conv2d, kind)):
                raise TypeError(f"unknown layer {type(layer).__name__}")
            x = layer(x)
        return m.two(m.second(x.relu())).relu()

    return call


def skipping(m: Any, x: Tensor) -> Tensor:
    x = m.conv(x)
    x = m.one(x) if isinstance(m.one, nn.BatchNorm2d) else x
    return m.two(m.second(x.relu())).relu()


def plainly(m: Any, x: Tensor) -> Tensor:
    return m.two(m.second(m.one(m.conv(x)).relu())).relu()


NEEDED: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "a weight's dtype": (
        lambda m, x: plainly(m, x.to(m.one.weight.dtype)),
        "with Identity in its place the model fails: AttributeError: 'Identity' object has no attribute 'weight'",
    ),
    "its number of channels": (
        lambda m, x: plainly(m, x)[:, : m.one.num_features],
        "with Identity in its place the model fails: AttributeError: 'Identity' object has no attribute 'num_features'",
    ),
    "its class": (
        asked(nn.BatchNorm2d),
        "with Identity in its place the model fails: TypeError: unknown layer Identity",
    ),
    "its class, or it is not called": (skipping, "with Identity in its place the model computes something else"),
    "a list": (listed, "the model's code also holds it elsewhere than under its name"),
}


def needing(call: Callable[[Any, Tensor], Tensor]) -> Block:
    return block(call, one=nn.BatchNorm2d(4), second=nn.Conv2d(4, 4, 1), two=nn.BatchNorm2d(4))


@pytest.mark.parametrize("what", NEEDED)
def test_a_module_that_the_code_needs_stays_and_the_others_go(what: str) -> None:
    call, why = NEEDED[what]
    model = needing(call)
    if call is listed:
        model.steps = [model.conv, model.one]
    back = written(model)
    assert refused(back) == {"one": why} and back.ledger.count() == (1, 2)
    assert type(back.module.one) is nn.BatchNorm2d and type(back.module.two) is nn.Identity
    assert model.one.training is False and not model.one._forward_pre_hooks


@pytest.mark.parametrize(
    "call",
    [
        plainly,
        lambda m, x: plainly(m, x) if isinstance(m.one, nn.Module) else x,
        lambda m, x: plainly(m, x) if not m.one.training else x,
    ],
)
def test_code_that_an_identity_satisfies_lets_it_go(call: Callable[[Any, Tensor], Tensor]) -> None:
    assert written(needing(call)).ledger.count() == (2, 2)


def test_a_module_with_its_activation_may_be_asked_for_what_the_activation_has() -> None:
    def call(m: Any, x: Tensor) -> Tensor:
        return m.bn(m.conv(x)) if m.bn.inplace else x

    act = NormAct(4, nn.ReLU(inplace=True))
    act.inplace = True
    back = written(block(call, bn=act))
    assert type(back.module.bn) is nn.ReLU and not back.refused
    del act.inplace
    act.channels = 4
    back = written(block(lambda m, x: m.bn(m.conv(x))[:, : m.bn.channels], bn=act))
    assert refused(back) == {
        "bn": "with ReLU in its place the model fails: AttributeError: 'ReLU' object has no attribute 'channels'"
    }


@pytest.mark.parametrize("used", [False, True])
def test_a_hook_goes_with_its_module_where_nothing_needs_it(used: bool) -> None:
    seen: dict[str, Tensor] = {}

    def call(m: Any, x: Tensor) -> Tensor:
        seen.clear()
        y = m.one(m.conv(x))
        return m.two(m.second((seen["one"] if used else y).relu())).relu()

    model = needing(call)
    model.one.register_forward_hook(lambda module, args, output: seen.update(one=output))
    back = written(model)
    assert back.ledger.count() == ((1, 2) if used else (2, 2)) and len(model.one._forward_hooks) == 1
    assert refused(back) == ({"one": "with Identity in its place the model fails: KeyError: 'one'"} if used else {})


def test_a_hook_that_computes_stays_with_its_module() -> None:
    model = needing(plainly)
    model.one.register_forward_hook(lambda module, args, output: output * 2)
    back = written(model)
    details = {e.value: r.detail for e in back.refused for r in e.refusals if r.reason == "inexpressible"}
    assert details["batch_norm"] == "with Identity in its place the model computes something else"
    assert norms(back.module) == 1 and set(details) == {"batch_norm", "mul"}


def test_calls_under_two_names_are_calls_of_one_module() -> None:
    def call(m: Any, x: Tensor) -> Tensor:
        grey = x.mean(1, keepdim=True).sigmoid().expand(-1, 4, -1, -1)
        return m.bn(m.conv(x)).sigmoid() + m.alias(grey).sigmoid()

    model = block(call, bn=nn.BatchNorm2d(4))
    model.alias = model.bn
    back = written(model)
    assert refused(back) == {"bn": "the module is called 2 times, and not every call can do without it"}
    assert back.module.bn is back.module.alias and norms(back.module) == 1

    def both(m: Any, x: Tensor) -> Tensor:
        return m.bn(m.conv(x)).sigmoid() + m.alias(m.conv(x.flip(-1))).sigmoid()

    model = block(both, bn=nn.BatchNorm2d(4))
    model.alias = model.bn
    back = written(model)
    assert back.ledger.count() == (2, 2) and norms(back.module) == 0


def test_a_merge_is_left_out() -> None:
    model, args = NETS["repvgg"]()
    folded = bnfold.fold(model, args)
    assert folded.ledger.merges and not folded.write_back(model).ledger.merges


# -- modules at random -------------------------------------------------------------------------------------------------

LAYERS = ("conv", "norm", "act", "normact", "frozen", "scale", "again", "residual", "functional")


class Random(nn.Module):
    """A chain of layers over 4 channels; ``again`` calls an earlier one again, ``residual`` adds an earlier value."""

    def __init__(self, layers: list[tuple[str, int]]) -> None:
        super().__init__()
        self.plan = layers
        self.layers = nn.ModuleList(self._layer(kind, i) for i, (kind, _) in enumerate(layers))
        self.gammas = nn.ParameterList(nn.Parameter(torch.randn(4)) for _ in layers)

    def _layer(self, kind: str, seed: int) -> nn.Module:
        made: dict[str, Callable[[], nn.Module]] = {
            "conv": lambda: nn.Conv2d(4, 4, 3, padding=seed % 2, bias=seed % 3 == 0, groups=1 + seed % 2),
            "norm": lambda: nn.BatchNorm2d(4, affine=seed % 4 != 3),
            "normact": lambda: NormAct(4, nn.ReLU()),
            "frozen": lambda: FrozenBatchNorm(4),
            "act": nn.ReLU,
            "functional": lambda: nn.BatchNorm2d(4),
        }
        return made.get(kind, nn.Identity)()

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (9, 9, 9, 9))
        values = [x]
        for i, (kind, pick) in enumerate(self.plan):
            layer, x = self.layers[i], values[-1]
            if kind == "scale":
                x = x * self.gammas[i].view(-1, 1, 1)
            elif kind == "again":
                x = self.layers[pick % (i + 1)](x)
            elif kind == "residual":
                other = values[pick % len(values)]
                x = x + other[..., : x.shape[-2], : x.shape[-1]]
            elif kind == "functional":
                x = F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias)
            else:
                x = layer(x)
            values.append(x)
        return values[-1]


@given(st.lists(st.tuples(st.sampled_from(LAYERS), st.integers(0, 9)), min_size=2, max_size=7))
@example([("norm", 0), ("frozen", 0), ("frozen", 0)])
@settings(max_examples=25, deadline=None)
def test_random_modules(layers: list[tuple[str, int]]) -> None:
    torch.manual_seed(len(layers))
    model, args = randomize(Random(layers)), (torch.randn(2, 4, 8, 8),)
    folded = bnfold.fold(model, args, merge=False)
    back = folded.write_back(model)  # compares it with the folded program
    # Another affine may go in its place: a frozen BatchNorm is one operator to the graph, and two that go to its class.
    gone, gone_back = ({e.value for e in ledger.folded} for ledger in (folded.ledger, back.ledger))
    assert len(gone - gone_back - {e.value for e in back.refused}) <= len(gone_back - gone)
    loaded = prepare(randomize(Random(layers)), back.ledger)
    loaded.load_state_dict(back.module.state_dict(), strict=True)
    assert all(map(torch.equal, outputs(loaded, args), outputs(back.module, args)))


# -- the model and the copy --------------------------------------------------------------------------------------------


def test_the_callers_model_is_as_it_was() -> None:
    model = trained("digits_cnn")
    model.train()
    model.block1.eval()
    model.stem[0].weight.requires_grad_(False)
    calls: list[int] = []
    model.head.register_forward_hook(lambda *_: calls.append(1))
    state = {name: (id(t), t.clone()) for name, t in (*model.named_parameters(), *model.named_buffers())}
    flags = {name: (m.training, id(m), len(m._forward_hooks)) for name, m in model.named_modules()}
    back = written(model, model.example_inputs)
    assert flags == {name: (m.training, id(m), len(m._forward_hooks)) for name, m in model.named_modules()}
    now = dict((*model.named_parameters(), *model.named_buffers()))
    assert now.keys() == state.keys()
    assert all(id(now[name]) == known and torch.equal(now[name], value) for name, (known, value) in state.items())
    assert not back.module.stem[0].weight.requires_grad and back.module.tail.weight.requires_grad
    with torch.no_grad():
        back.module.tail.weight.zero_()
    assert torch.equal(model.tail.weight, state["tail.weight"][1]), "the copy shares a tensor with the model"


def test_apply_to_gives_the_module_alone() -> None:
    model = trained("digits_mlp")
    folded = bnfold.fold(model, model.example_inputs, merge=False)
    assert all(map(torch.equal, outputs(folded.apply_to(model), model.example_inputs),
                   outputs(folded.write_back(model).module, model.example_inputs)))  # fmt: skip


def test_half_precision_starts_from_the_float32_weights() -> None:
    model = trained("digits_mlp")
    back = written(model, model.example_inputs, dtype=torch.float16)
    exact = written(model, model.example_inputs).module.hidden.weight
    assert back.module.hidden.weight.dtype == torch.float16
    assert torch.equal(back.module.hidden.weight, exact.half())


def test_another_model_is_refused() -> None:
    model = trained("digits_mlp")
    folded = bnfold.fold(model, model.example_inputs, merge=False)
    with pytest.raises(InputError, match="DigitsCNN, and a DigitsMLP was folded"):
        folded.apply_to(digits.digits_cnn())
    with pytest.raises(InputError, match=r"'hidden.weight' is not what it was"):
        folded.apply_to(digits.digits_mlp())
    with torch.no_grad():
        model.norm.running_mean[3] += 1
    with pytest.raises(InputError, match=r"'norm.running_mean' is not what it was.*Fold the model as it is now"):
        folded.apply_to(model)


def traced(bias: bool = True) -> torch.fx.GraphModule:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 4, 3, bias=bias), nn.BatchNorm2d(4), nn.ReLU())
    return torch.fx.symbolic_trace(randomize(layers))


@pytest.mark.parametrize("hook", [False, True])
def test_a_graph_module_keeps_its_class_and_its_hooks(hook: bool) -> None:
    model = traced()
    if hook:
        model.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        model.register_forward_hook(lambda module, args, output: output.sigmoid())
    back, report = judged(model, IMAGES)
    assert report.passed and back.ledger.count() == (1, 1) and norms(back.module) == 0
    assert isinstance(back.module, torch.fx.GraphModule) and back.module.code == model.code
    loaded = prepare(model, back.ledger)
    loaded.load_state_dict(back.module.state_dict(), strict=True)
    assert all(map(torch.equal, outputs(loaded, IMAGES), outputs(back.module, IMAGES)))


def test_another_graph_module_is_refused() -> None:
    folded = bnfold.fold(traced(), IMAGES, merge=False)
    other = torch.fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    for model in (other, nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())):
        with pytest.raises(InputError, match=r"and a \w+ was folded"):
            folded.apply_to(model)


def test_a_program_has_no_class() -> None:
    model = trained("digits_mlp")
    program = torch.export.export(model.eval(), model.example_inputs, strict=False)
    with pytest.raises(InputError, match="no class to write a fold into"):
        bnfold.fold(program, merge=False).apply_to(program)


def test_a_copy_that_computes_something_else_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from bnfold.eager import eager

    right = eager._fill

    def wrong(modules: dict[str, nn.Module], tensors: dict[str, Tensor]) -> None:
        right(modules, {name: value * 1.01 if name == "hidden.weight" else value for name, value in tensors.items()})

    monkeypatch.setattr(eager, "_fill", wrong)
    model = trained("digits_mlp")
    with pytest.raises(FoldError, match="does not hold in the model's class"):
        written(model, model.example_inputs)


def test_the_gate_judges_the_class_itself() -> None:
    model = trained("digits_mlp")
    folded = bnfold.fold(model, model.example_inputs, merge=False)
    back = folded.write_back(model)
    with torch.no_grad():
        back.module.hidden.weight[3] *= 1.01
    report = Gate(folded.captured, back.ledger, back.program, eager=back.module).judge()
    assert not report.passed and any("folded class" in problem for problem in report.problems)


# -- prepare -----------------------------------------------------------------------------------------------------------


def test_prepare_reads_the_ledger_out_of_the_file(tmp_path: Path) -> None:
    model = trained("digits_cnn")
    back = written(model, model.example_inputs)
    save_written(back.module, back.ledger, tmp_path / "net.safetensors")
    fresh = digits.digits_cnn()
    loaded = prepare(fresh, tmp_path / "net.safetensors")
    loaded.load_state_dict(load_file(tmp_path / "net.safetensors"), strict=True)
    assert all(map(torch.equal, outputs(loaded, model.example_inputs), outputs(back.module, model.example_inputs)))
    assert norms(fresh) == 11 and fresh.training and loaded.training is False


def test_prepare_refuses_what_it_cannot_read(tmp_path: Path) -> None:
    model = trained("digits_mlp")
    back = written(model, model.example_inputs)
    with pytest.raises(InputError, match="has no module 'norm'"):
        prepare(digits.digits_cnn(), back.ledger)
    with pytest.raises(InputError, match="folded away already"):
        prepare(back.module, back.ledger)
    with pytest.raises(InputError, match=r"does not say how a class.*write_back"):
        prepare(model, bnfold.fold(model, model.example_inputs, merge=False).ledger)
    with pytest.raises(InputError, match="holds no ledger"):
        prepare(model, MODELS / "digits_mlp.safetensors")
    with pytest.raises(InputError, match="holds no ledger"):
        prepare(model, tmp_path / "none.safetensors")
    path = tmp_path / "odd.safetensors"
    for text in ("{}", "[1]", "no json", '{"entries": [{}], "merges": [], "changes": []}'):
        save_file({"x": torch.zeros(1)}, path, {"bnfold.ledger": text})
        with pytest.raises(InputError, match="ledger in the file cannot be read"):
            prepare(model, path)
    with pytest.raises(InputError, match="cannot gain a parameter 'bias'"):
        restructure(copy.deepcopy(model), [Change("hidden", "parameter", "bias", (3,))])


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_prepare_copies_what_deepcopy_does_not() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.utils.weight_norm(nn.Conv2d(3, 4, 1)), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

    model = randomize(build())
    back = written(model)
    assert back.ledger.count() == (1, 1)
    loaded = prepare(build(), back.ledger)
    loaded.load_state_dict(back.module.state_dict(), strict=True)
    assert all(map(torch.equal, outputs(loaded, IMAGES), outputs(back.module, IMAGES)))


def test_prepare_says_what_cannot_be_copied() -> None:
    model = needing(plainly)
    back = written(model)
    model.source = (i for i in range(3))
    with pytest.raises(CaptureError, match=r"cannot be copied: TypeError.*copy\.deepcopy accepts"):
        prepare(model, back.ledger)


def test_an_entry_that_is_no_tensor_is_refused(tmp_path: Path) -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> Any:
            return {"a": 1}

        def set_extra_state(self, state: Any) -> None: ...

    with pytest.raises(InputError, match=r"_extra_state' of the state dict is a dict.*\.pt2"):
        save_written(Extra(2, 2), Ledger(), tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


def test_tied_weights_are_written_under_every_name(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.norm, self.head = nn.Embedding(9, 4), nn.BatchNorm1d(4), nn.Linear(4, 9)
            self.mix = nn.Linear(4, 4)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.norm(self.mix(self.embed(ids))))

    torch.manual_seed(0)
    model, args = randomize(Tied()), (torch.randint(9, (4,)),)
    back = written(model, args)
    assert back.ledger.count() == (1, 1) and back.module.head.weight is back.module.embed.weight
    save_written(back.module, back.ledger, tmp_path / "net.safetensors")
    loaded = prepare(Tied(), tmp_path / "net.safetensors")
    loaded.load_state_dict(load_file(tmp_path / "net.safetensors"), strict=True)
    assert all(map(torch.equal, outputs(loaded, args), outputs(back.module, args)))


def test_a_module_under_two_names_is_replaced_under_both() -> None:
    model = block(lambda m, x: m.bn(m.conv(x)).relu(), bn=nn.BatchNorm2d(4))
    model.alias = model.bn
    back = written(model)
    assert type(back.module.bn) is nn.Identity and back.module.alias is back.module.bn


def test_the_ledger_survives_json() -> None:
    equalised = 0
    for name in ("repvgg", "densenet", "shared_conv"):
        model, args = NETS[name]()
        folded = bnfold.fold(model, args)
        assert Ledger.from_json(folded.ledger.to_json()) == folded.ledger
        equal = bnfold.fold(model, args, equalize=True).ledger
        equalised += len(equal.scaled)
        assert Ledger.from_json(equal.to_json()) == equal
        changed = replace(folded.ledger, changes=(Change("a", "parameter", "bias", (3,)),))
        assert Ledger.from_json(changed.to_json(indent=2)) == changed
    assert equalised, "no ledger held what was equalised"


# -- the command line --------------------------------------------------------------------------------------------------


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


MLP = (f"{MODELS / 'digits.py'}:digits_mlp", "--weights", MODELS / "digits_mlp.safetensors")


def test_the_file_of_the_command_line_loads_in_a_fresh_process(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    result = run("fold", *MLP, "--eager", "-o", path)
    assert result.exit_code == 0 and "1 of 1 BatchNorm" in result.stdout and "PASS" in result.stdout
    assert not [name for name in load_file(path) if "norm" in name]
    code = (
        "import sys, torch, bnfold; from safetensors.torch import load_file\n"
        f"sys.path.insert(0, {str(MODELS)!r}); import digits\n"
        f"net = bnfold.prepare(digits.digits_mlp(), {str(path)!r})\n"
        f"net.load_state_dict(load_file({str(path)!r}), strict=True)\n"
        "print(net.eval()(torch.linspace(0, 1, 128).reshape(2, 1, 8, 8)).flatten().tolist(), type(net.norm).__name__)"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert process.returncode == 0 and process.stdout.endswith("Identity\n"), process.stderr
    (there,) = outputs(
        written(trained("digits_mlp"), (torch.zeros(2, 1, 8, 8),)).module,
        (torch.linspace(0, 1, 128).reshape(2, 1, 8, 8),),
    )
    torch.testing.assert_close(torch.tensor(json.loads(process.stdout.rpartition(" ")[0])), there.flatten())
    again = run("inspect", MLP[0], "--weights", path, "--json")
    assert again.exit_code == 0, again.stderr
    other = run("inspect", f"{MODELS / 'digits.py'}:digits_cnn", "--weights", path)
    assert other.exit_code == 3 and "has no module 'norm'" in other.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("-o", "net.safetensors"), "with --eager .safetensors"),
        (("--eager", "-o", "net.pt2"), "must be a .safetensors file"),
        (("--eager", "-o", "net.onnx"), "must be a .safetensors file"),
        (("--eager", "--no-merge", "-o", "net.safetensors"), "contradict"),
        (("--eager",), "is missing"),
    ],
)
def test_wrong_arguments(arguments: tuple[str, ...], says: str) -> None:
    result = run("fold", *MLP, *arguments)
    assert result.exit_code == 2 and says in result.stderr and "Traceback" not in result.stderr


def test_a_program_on_the_command_line_has_no_class(tmp_path: Path) -> None:
    result = run("fold", MODELS / "digits_mlp.pt2", "--eager", "-o", tmp_path / "net.safetensors")
    assert result.exit_code == 3 and "no class to write a fold into" in result.stderr and not list(tmp_path.iterdir())


def test_what_fails_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bnfold import options

    right = options.write_into_class

    def wrong(*arguments: Any) -> WrittenBack:
        back = right(*arguments)
        with torch.no_grad():
            back.module.hidden.weight[3] *= 1.01
        return back

    monkeypatch.setattr(options, "write_into_class", wrong)
    (tmp_path / "net.safetensors").write_bytes(b"old")
    result = run("fold", *MLP, "--eager", "-o", tmp_path / "net.safetensors")
    assert result.exit_code == 1 and "folded class" in result.stdout
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"old"]
    assert run("fold", *MLP, "--eager", "--keep-failed", "-o", tmp_path / "net.safetensors").exit_code == 1
    assert {p.name for p in tmp_path.iterdir()} == {"net.safetensors", "net.failed.safetensors"}


def test_a_calibrated_model_folds_into_its_class() -> None:
    model = trained("digits_batchstats")
    calibrated = bnfold.calibrate(model, [torch.rand(64, 1, 8, 8)])
    back = written(calibrated, model.example_inputs)
    assert back.ledger.count() == (3, 3) and norms(back.module) == 0
    assert norms(prepare(digits.digits_batchstats(), back.ledger)) == 0


class BatchStatistics(nn.Module):
    """A BatchNorm that folds and one that does not; as ``keeps`` says, with running statistics or without."""

    def __init__(self, keeps: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.last = nn.BatchNorm2d(4, track_running_stats=keeps)
        self.then = nn.BatchNorm2d(4, affine=False, track_running_stats=keeps)

    def forward(self, x: Tensor) -> Tensor:
        return self.then(self.last(self.norm(self.conv(x)).sigmoid()).tanh())


DATA = torch.rand(64, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("keeps", [False, True])
def test_calibration_and_then_the_class(keeps: bool) -> None:
    calibrated = bnfold.calibrate(randomize(BatchStatistics(keeps)), [DATA])
    back = written(calibrated)
    assert back.ledger.count() == (1, 3)
    ledger = Ledger.from_json(back.ledger.to_json())
    assert {c.module for c in ledger.changes or () if c.kind == "statistics"} == {"last", "then"}
    loaded = prepare(BatchStatistics(keeps), ledger)
    loaded.load_state_dict(back.module.state_dict(), strict=True)
    torch.testing.assert_close(outputs(loaded, IMAGES), outputs(calibrated, IMAGES))


SOURCE = """
import sys; sys.path.insert(0, {tests!r})
import torch
from test_eager import BatchStatistics, randomize
def make():
    model = randomize(BatchStatistics())
    model.example_inputs = (torch.ones(2, 3, 8, 8),)
    return model
"""


@pytest.mark.parametrize(
    "steps", ["calibrate fold", "fold calibrate", "fold calibrate fold calibrate", "calibrate:last calibrate:then fold"]
)
def test_files_of_files_load_as_any_other(steps: str, tmp_path: Path) -> None:
    """Each command starts from the file of the one before, and the last file holds all that was done to the class."""
    import numpy as np

    (tmp_path / "net.py").write_text(SOURCE.format(tests=str(Path(__file__).parent)))
    np.savez(tmp_path / "data.npz", x=DATA.numpy())
    source, weights = f"{tmp_path / 'net.py'}:make", None
    for i, step in enumerate(steps.split()):
        path = tmp_path / f"{i}.safetensors"
        command, _, only = step.partition(":")
        which = [("--only", name) for name in ([only] if only else ["last", "then"])]
        own = ("--eager",) if command == "fold" else ("--data", tmp_path / "data.npz", *sum(which, ()))
        result = run(command, source, *(("--weights", weights) if weights else ()), *own, "-o", path)
        assert result.exit_code == 0, result.stderr
        weights = path
    model = load(source, weights=weights).model
    expected = bnfold.calibrate(randomize(BatchStatistics()), [DATA], only=("last", "then"))
    torch.testing.assert_close(outputs(model, (DATA,)), outputs(expected, (DATA,)))
    assert norms(model) == 2
    prepared = prepare(BatchStatistics(), weights)
    prepared.load_state_dict(load_file(weights), strict=True)
    assert all(map(torch.equal, outputs(prepared, (DATA,)), outputs(model, (DATA,))))


def test_every_fold_of_a_file_is_in_it(tmp_path: Path) -> None:
    back = written(randomize(BatchStatistics(True)))
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_written(back.module, back.ledger, first)
    save_written(back.module, back.ledger, second, {**read_notes(first), "other": "kept"})
    assert stored_ledgers(second) == (back.ledger, back.ledger) and read_notes(second)["other"] == "kept"
    assert stored_ledgers(first) == (back.ledger,) and not stored_ledgers(MODELS / "digits_mlp.safetensors")
    with pytest.raises(InputError, match="folded away already"):
        prepare(BatchStatistics(True), second)
