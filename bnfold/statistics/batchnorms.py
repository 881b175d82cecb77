"""The BatchNorms of a module, whatever their class (torch's, lazy, frozen look-alikes, a user's own), a captured
program or an ONNX file, and what there is to know of every one, in one form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from bnfold.aten.rows import normalisation_kind, takes_batch_statistics
from bnfold.graph.graph import Graph, Node
from bnfold.graph.onnx_call import OnnxCall
from bnfold.graph.onnx_graph import OnnxGraph
from bnfold.onnx_ops.rows import trains
from bnfold.report import NormHealth, NormKind, Spread

STATISTICS = ("running_mean", "running_var")
_TENSORS = ("weight", "bias", *STATISTICS)
#: torch's default, which the frozen BatchNorms that have no attribute for it use too.
EPS = 1e-5


def batch_norms(model: nn.Module) -> dict[str, nn.Module]:
    """The BatchNorms of ``model`` by qualified name, in its own order; one under two names has the first.

    They are: every subclass of torch's BatchNorm; InstanceNorm that keeps running statistics, which in eval mode is a
    BatchNorm; and any other module that itself holds tensors ``running_mean`` and ``running_var``.
    """
    return {name: module for name, module in model.named_modules() if norm_kind(module) is not None}


def norm_kind(module: nn.Module) -> NormKind | None:
    """What kind of BatchNorm a module is; None where it is none."""
    if isinstance(module, _BatchNorm):
        return "batch_norm"
    if any(not isinstance(getattr(module, name, None), Tensor) for name in STATISTICS):
        return None
    if isinstance(module, _NormBase):
        return "instance_norm"
    return "custom" if any(True for _ in module.parameters(recurse=False)) else "frozen"


def sharers(norms: Mapping[str, nn.Module]) -> dict[str, str]:
    """For every BatchNorm the first that has its running_mean or its running_var: itself where none shares them."""
    first: dict[str, str] = {}
    # The tensors are kept while their ids count: a computed one is another at every look.
    owner: dict[int, tuple[str, Tensor]] = {}
    for name, norm in norms.items():
        own = [tensor for key, tensor in own_tensors(norm).items() if key in STATISTICS]
        first[name] = next((owner[id(tensor)][0] for tensor in own if id(tensor) in owner), name)
        for tensor in own:
            owner.setdefault(id(tensor), (first[name], tensor))
    return first


def without_numbers(module: nn.Module) -> str | None:
    """Why a BatchNorm's tensors cannot be reckoned with; None where they can."""
    for tensor in own_tensors(module).values():
        if tensor.is_complex():
            return "complex"
        if tensor.is_meta:
            return "on the meta device, without values"
    return None


def is_unshaped(module: nn.Module) -> bool:
    """Whether a lazy layer has seen no input yet, so that it has no channels."""
    return any(is_lazy(tensor) for tensor in own_tensors(module).values())


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """weight, bias, running_mean and running_var, as far as they are there."""
    found = ((name, getattr(module, name, None)) for name in _TENSORS)
    return {name: value for name, value in found if isinstance(value, Tensor)}


def channels_of(module: nn.Module) -> int | None:
    """How many channels a BatchNorm has; None for a lazy one that has seen no input."""
    if is_unshaped(module):
        return None
    for tensor in own_tensors(module).values():
        return tensor.numel()
    return int(getattr(module, "num_features", 0)) or None


def eps_of(module: nn.Module) -> float | None:
    """The eps that a BatchNorm says it has; a frozen one may have it in its code alone."""
    value: Any = getattr(module, "eps", getattr(module, "epsilon", None))
    return float(value) if isinstance(value, (int, float)) else None


def lacks_statistics(module: nn.Module) -> bool:
    """Whether a BatchNorm has no running statistics, so that it uses the batch's in eval mode too."""
    return isinstance(module, _BatchNorm) and module.running_mean is None and module.running_var is None


def keep_statistics(module: nn.Module, like: Tensor) -> None:
    """Gives a BatchNorm of ``track_running_stats=False`` mean 0 and variance 1, as if built with True, in place.

    ``like`` is of the dtype and on the device that they are to have.
    """
    channels = int(module.num_features)  # type: ignore[arg-type]
    module.register_buffer("running_mean", torch.zeros(channels, dtype=like.dtype, device=like.device))
    module.register_buffer("running_var", torch.ones(channels, dtype=like.dtype, device=like.device))
    module.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long, device=like.device))
    module.track_running_stats = True  # type: ignore[assignment]


def statistics_like(module: nn.Module, model: nn.Module) -> Tensor:
    """A tensor of the dtype and device for new statistics of a module of ``model``: its gamma, else any weight."""
    weights = (p for owner in (module, model) for p in owner.parameters() if p.is_floating_point())
    return next(weights, torch.zeros(()))


@contextmanager
def watching_inputs(
    norms: Iterable[tuple[str, nn.Module]], watch: Callable[[str, nn.Module, Tensor], None]
) -> Iterator[None]:
    """While it lasts, ``watch`` is called with the name and the input of every one of ``norms`` before it runs."""

    def entering(name: str, norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        watch(name, norm, next(tensors_in([args, kwargs])))

    handles = [norm.register_forward_pre_hook(partial(entering, name), with_kwargs=True) for name, norm in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested lists, tuples and mappings."""
    return (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


@dataclass(frozen=True, eq=False)
class Layer:
    """One BatchNorm."""

    health: NormHealth  #: what is printed of it.
    #: weight, bias, running_mean and running_var as they are stored, flat; those that are there.
    stored: Mapping[str, Tensor]
    inputs: tuple[str, ...] = ()  #: in a captured program, names of the values that it normalises, one per call.
    shapeless: bool = False  #: a lazy layer that has seen no input.
    shared: tuple[str, ...] = ()  #: other names that its statistics have.
    target: str = ""  #: in a captured program, the name of its running mean; "" where it has none of its own.

    @property
    def eps(self) -> float:
        """Its eps; torch's default where only its code knows."""
        return EPS if self.health.eps is None else self.health.eps

    def wide(self, name: str) -> Tensor | None:
        """A stored tensor in float64."""
        return self.stored[name].double() if name in self.stored else None

    @property
    def per_channel(self) -> bool:
        """Whether its tensors agree in how many channels there are; those of a BatchNorm by groups do not."""
        return len({tensor.numel() for tensor in self.stored.values()}) == 1

    @property
    def gamma(self) -> Tensor:
        """Its weight, ones where it has none; float64, (channels,)."""
        weight, like = self.wide("weight"), next(iter(self.stored.values())).double()
        return torch.ones_like(like) if weight is None else weight

    @property
    def beta(self) -> Tensor:
        """Its bias, zeros where it has none; float64, (channels,)."""
        bias = self.wide("bias")
        return torch.zeros_like(self.gamma) if bias is None else bias

    @property
    def affine(self) -> tuple[Tensor, Tensor] | None:
        """Scale and shift; None where the batch decides, or where its tensors are not of one value per channel."""
        mean, variance = self.wide("running_mean"), self.wide("running_var")
        if mean is None or variance is None or not self.per_channel:
            return None
        scale = self.gamma / (variance + self.eps).sqrt()
        return scale, self.beta - mean * scale


def module_layers(model: nn.Module, calls: Mapping[str, int] | None) -> list[Layer]:
    """The BatchNorms of an eager module, without those that cannot be reckoned with (``without_numbers``).

    ``calls`` says how often an example run calls each; None where nothing ran.
    """
    found = []
    norms = batch_norms(model)
    owner = sharers({name: norm for name, norm in norms.items() if not lacks_statistics(norm)})
    for name, norm in norms.items():
        if not is_unshaped(norm) and without_numbers(norm):
            continue
        kind, shapeless, own = norm_kind(norm), is_unshaped(norm), own_tensors(norm)
        assert kind is not None
        stored = {} if shapeless else {key: value.detach().flatten() for key, value in own.items()}
        counter, momentum = (getattr(norm, each, None) for each in ("num_batches_tracked", "momentum"))
        health = NormHealth(
            module=name, layer=type(norm).__name__, kind=kind, functional=False, channels=channels_of(norm),
            eps=eps_of(norm), momentum=float(momentum) if isinstance(momentum, (int, float)) else None,
            affine="weight" in own or "bias" in own,
            track_running_stats=not lacks_statistics(norm), training=norm.training,
            batches_tracked=int(counter) if isinstance(counter, Tensor) and not shapeless else None,
            calls=None if calls is None else calls.get(name, 0), dtype=_dtype(own),
        )  # fmt: skip
        shared = tuple(other for other in owner if other != name and owner[other] == owner.get(name))
        found.append(summed(Layer(health, stored, (), shapeless, shared)))
    return found


def program_layers(program: ExportedProgram, masters: Mapping[str, Tensor] | None = None) -> list[Layer]:
    """The batch_norm and instance_norm calls of a captured program; those that share their statistics are one.

    A frozen BatchNorm's arithmetic is a multiplication and an addition here and is none of them.
    """
    graph = Graph(program, masters)
    targets = {spec.arg.name: spec.target or "" for spec in program.graph_signature.input_specs}
    found: dict[str, Layer] = {}
    for value in graph.values():
        call = graph.call(value)
        if (kind := normalisation_kind(call)) is None:
            continue
        data, of_batch = call["input"], takes_batch_statistics(call)
        tensors = {name: call[name] for name in _TENSORS if call[name] is not None}
        mean = tensors.get("running_mean")
        target = targets.get(mean.name, "") if isinstance(mean, Node) else ""
        key = target or value.name
        if key in found:
            old = found[key]
            health = replace(old.health, calls=(old.health.calls or 0) + 1)
            found[key] = replace(old, health=health, inputs=(*old.inputs, data.name))
            continue
        stored = {}
        for name, node in tensors.items():
            constant = graph.constant(node) if isinstance(node, Node) else None
            if constant is not None:
                stored[name] = constant.detach().flatten().to(graph.dtype(node))
        owner, dot, attribute = target.rpartition(".")
        module = owner if dot and attribute == "running_mean" else graph.module(value)
        counter = program.state_dict.get(f"{module}.num_batches_tracked")
        health = NormHealth(
            module=module or value.name, layer=graph.module_class(value) or kind, kind=kind,
            functional="Norm" not in graph.module_class(value),
            channels=next((tensor.numel() for tensor in stored.values()), None) or data.meta["val"].shape[1],
            eps=float(call["eps"]), momentum=float(call["momentum"]), affine="weight" in tensors or "bias" in tensors,
            track_running_stats=not of_batch, training=None,
            batches_tracked=int(counter) if isinstance(counter, Tensor) else None, calls=1,
            dtype=_dtype(stored) or str(graph.dtype(data)).removeprefix("torch."),
        )  # fmt: skip
        if of_batch:
            stored = {name: tensor for name, tensor in stored.items() if not name.startswith("running")}
        found[key] = Layer(health, stored, (data.name,), target=target)
    return [summed(layer) for layer in found.values()]


def file_layers(graph: OnnxGraph) -> list[Layer]:
    """The BatchNormalizations, in the file's order; of one that uses batch statistics gamma and beta alone."""
    found = []
    for value in graph.values():
        call = OnnxCall(graph, value)
        if call.operator != "BatchNormalization" or call.item not in (None, 0):
            continue
        slots = dict(zip(_TENSORS, list(call.arguments)[1:5]))
        if trains(call):
            slots = {name: slot for name, slot in slots.items() if not name.startswith("running")}
        constants = {name: call.constant(slot) for name, slot in slots.items() if call.is_constant(slot)}
        stored = {n: c.flatten().to(graph.dtype(call[slots[n]])) for n, c in constants.items() if c is not None}
        health = NormHealth(
            module=graph.module(value), layer="BatchNormalization", kind="batch_norm", functional=False,
            channels=next((tensor.numel() for tensor in stored.values()), None),
            eps=float(call.attribute("epsilon", 1e-5)), momentum=1.0 - float(call.attribute("momentum", 0.9)),
            affine=True, track_running_stats="running_mean" in stored, training=trains(call), batches_tracked=None,
            calls=1, dtype=next((str(tensor.dtype).removeprefix("torch.") for tensor in stored.values()), ""),
        )  # fmt: skip
        if len({constant.numel() for constant in stored.values()}) == 1:
            found.append(summed(Layer(health, stored)))
    return found


def spread(values: Tensor | None) -> Spread | None:
    """Extremes, quartiles and median of the finite values; None where there is none."""
    if values is None or not bool(values.isfinite().any()):
        return None
    finite = values[values.isfinite()].double()
    # torch.quantile refuses more than 16 million values, which no layer has.
    marks = torch.quantile(finite, torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64))
    return Spread(*marks.tolist())


def summed(layer: Layer) -> Layer:
    """With the spread of its scale, shift and variance over the channels."""
    affine = layer.affine if layer.stored else None
    scale, shift = (None, None) if affine is None else map(spread, affine)
    health = replace(layer.health, scale=scale, shift=shift, variance=spread(layer.wide("running_var")))
    return replace(layer, health=health)


def _dtype(tensors: Mapping[str, Tensor]) -> str:
    found = next((tensors[name].dtype for name in ("running_var", "weight", "bias") if name in tensors), None)
    return "" if found is None else str(found).removeprefix("torch.")
