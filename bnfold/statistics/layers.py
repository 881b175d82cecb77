"""What there is to know of every BatchNorm, from the eager module or from a captured program, in one form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from bnfold.aten.normalisation import normalisation
from bnfold.graph.graph import Graph, Node
from bnfold.report import NormHealth, Spread
from bnfold.statistics.batchnorms import (
    EPS,
    batch_norms,
    channels_of,
    eps_of,
    is_unshaped,
    lacks_statistics,
    norm_kind,
    own_tensors,
    sharers,
    without_numbers,
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Layer:
    """One BatchNorm.

    Attributes:
        health: what is printed of it.
        stored: weight, bias, running_mean and running_var as they are stored, flat; those that are there.
        inputs: in a captured program, names of the values that it normalises, one per call.
        target: in a captured program, the name of its running mean; "" where it has none of its own.
        shapeless: a lazy layer that has seen no input.
        shared: other names that its statistics have.
    """

    health: NormHealth
    stored: Mapping[str, Tensor]
    inputs: tuple[str, ...] = ()
    shapeless: bool = False
    shared: tuple[str, ...] = field(default=())
    target: str = ""

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

    Args:
        calls: how often an example run calls each; None where nothing ran.
    """
    found = []
    norms = batch_norms(model)
    owner = sharers({name: norm for name, norm in norms.items() if not lacks_statistics(norm)})
    for name, norm in norms.items():
        if not is_unshaped(norm) and without_numbers(norm):
            continue
        kind = norm_kind(norm)
        assert kind is not None
        shapeless = is_unshaped(norm)
        stored = {} if shapeless else {key: value.detach().flatten() for key, value in own_tensors(norm).items()}
        counter = getattr(norm, "num_batches_tracked", None)
        momentum = getattr(norm, "momentum", None)
        health = NormHealth(
            module=name, layer=type(norm).__name__, kind=kind, functional=False, channels=channels_of(norm),
            eps=eps_of(norm), momentum=float(momentum) if isinstance(momentum, (int, float)) else None,
            affine="weight" in own_tensors(norm) or "bias" in own_tensors(norm),
            track_running_stats=not lacks_statistics(norm), training=norm.training,
            batches_tracked=int(counter) if isinstance(counter, Tensor) and not shapeless else None,
            calls=None if calls is None else calls.get(name, 0), dtype=_dtype(own_tensors(norm)),
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
        if (norm := normalisation(graph.call(value))) is None:
            continue
        mean = norm.tensors.get("running_mean")
        target = targets.get(mean.name, "") if isinstance(mean, Node) else ""
        key = target or value.name
        if key in found:
            old = found[key]
            health = replace(old.health, calls=(old.health.calls or 0) + 1)
            found[key] = replace(old, health=health, inputs=(*old.inputs, norm.data.name))
            continue
        stored = {}
        for name, node in norm.tensors.items():
            constant = graph.constant(node) if isinstance(node, Node) else None
            if constant is not None:
                stored[name] = constant.detach().flatten().to(graph.dtype(node))
        owner, dot, attribute = target.rpartition(".")
        module = owner if dot and attribute == "running_mean" else graph.module(value)
        counter = program.state_dict.get(f"{module}.num_batches_tracked")
        health = NormHealth(
            module=module or value.name, layer=graph.module_class(value) or norm.kind, kind=norm.kind,
            functional="Norm" not in graph.module_class(value),
            channels=next((tensor.numel() for tensor in stored.values()), None) or norm.data.meta["val"].shape[1],
            eps=norm.eps, momentum=norm.momentum, affine="weight" in norm.tensors or "bias" in norm.tensors,
            track_running_stats=not norm.batch_statistics, training=None,
            batches_tracked=int(counter) if isinstance(counter, Tensor) else None, calls=1,
            dtype=_dtype(stored) or str(graph.dtype(norm.data)).removeprefix("torch."),
        )  # fmt: skip
        if norm.batch_statistics:
            stored = {name: tensor for name, tensor in stored.items() if not name.startswith("running")}
        found[key] = Layer(health, stored, (norm.data.name,), target=target)
    return [summed(layer) for layer in found.values()]


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
