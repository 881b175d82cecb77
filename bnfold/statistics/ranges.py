"""Quantisation readiness: ranges of weights before and after folding, and of activations.

Per-tensor int8 has one step for a whole weight, ``max|W| / 127``. A channel whose largest weight is ``r`` is left
``127 * r / max|W|`` of its 127 steps on either side; Nagel et al. 2019 ("Data-Free Quantization Through Weight
Equalization and Bias Correction", section 4.1) call ``r / max|W|`` the channel's precision. Folding a BatchNorm
multiplies every channel's ``r`` by ``|gamma| / sqrt(var + eps)`` and can so spread ranges that were alike; that is why
MobileNets fall to chance in per-tensor int8 (Krishnamoorthi 2018, "Quantizing deep convolutional networks for efficient
inference", section 3). An affine folded forward spreads the input channels instead, where a step per output channel
does not help either.

The criterion: with ``spread = max(r) / median(r)`` over the channels that are not all zero, a typical channel keeps
``127 / spread`` steps a side. Above 16 (``SPREAD_LIMIT``) those are fewer than 8: four of eight bits are gone, and
rounding to nearest at four bits costs ResNet-18 two thirds of its accuracy (Nagel et al. 2020, "Up or Down? Adaptive
Rounding for Post-Training Quantization"). The median, because a few tiny channels add little to the next layer and
nothing is lost with them.

Activations: a BatchNorm's output has mean ``beta`` and deviation ``|gamma|``, so ``beta +- 6*|gamma|`` over all
channels is its range (Nagel et al. 2019, section 5, with their six).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.export import ExportedProgram

from bnfold import aten
from bnfold.affine import Affine
from bnfold.aten.rows import STATISTICS
from bnfold.graph.capture import Captured
from bnfold.graph.graph import Graph, Node
from bnfold.graph.interpret import constant_of
from bnfold.report import LayerRange, Ledger, NormRange, WeightRange
from bnfold.semantics import Average, Contraction, Homogeneous, Movement, Opaque, Same, Scaling, Semantics
from bnfold.semantics.sizes import UnknownSizeError

#: Deviations to either side that an activation is taken to reach.
REACH = 6.0
#: Points at which an activation function is looked at to find its range: fine enough for the dip of SiLU and GELU.
POINTS = 1025
_DIGITS = 5

Interval = tuple[float, float]


def layer_ranges(captured: Captured, folded: ExportedProgram, ledger: Ledger) -> tuple[LayerRange, ...]:
    """The weights of every contraction of the folded program, in its order, with those it had before.

    Reads every weight once and copies none, but for those that constants compute (weight_norm).
    """
    unfolded = Reader(Graph(captured.program, captured.masters), captured.program)
    same = folded is captured.program
    after = unfolded if same else Reader(Graph(folded), folded)
    before = dict(unfolded.weights())
    reads = unfolded.reads()
    layers = before if same else dict(after.weights())
    merged = {merge.value for merge in ledger.merges}  # other layers than those of the same name were
    return tuple(
        LayerRange(name, after.modules[name], weights_before, weights, read)
        for name, weights in layers.items()
        for weights_before, read in [(None, None) if name in merged else (before.get(name), reads.get(name))]
    )


def norm_ranges(captured: Captured, ledger: Ledger) -> tuple[NormRange, ...]:
    """Scale and shift of every BatchNorm that has any, in the ledger's order."""
    graph = Graph(captured.program, captured.masters)
    graph.materialise()  # the arithmetic of a frozen BatchNorm
    nodes = {graph.name(value): value for value in graph.values()}
    found = []
    for group in ledger.grouped():
        total: Affine | None = None
        for entry in group:
            semantics = aten.semantics(graph.call(nodes[entry.value])) if entry.value in nodes else None
            if isinstance(semantics, Scaling):
                total = semantics.affine if total is None else semantics.affine.after(total)
        if total is not None:
            channels = max(total.scale.numel(), total.shift.numel())
            parts = (_listed(part.flatten().expand(channels)) for part in (total.scale, total.shift))
            found.append(NormRange(group[-1].value, group[0].module, *parts))
    return tuple(found)


class Reader:
    """The contractions of one program."""

    def __init__(self, graph: Graph, program: ExportedProgram) -> None:
        self.graph = graph
        self.modules: dict[str, str] = {}
        self._program = program
        self._targets = {spec.arg.name: spec.target for spec in program.graph_signature.input_specs}
        self._semantics = dict(self._known())

    def _known(self) -> Iterator[tuple[Node, Semantics]]:
        for value in self.graph.values():
            try:
                yield value, aten.semantics(self.graph.call(value))
            except UnknownSizeError:  # a size that depends on data: nothing is said of that operator
                continue

    def weights(self) -> Iterator[tuple[str, WeightRange]]:
        """Every contraction by the name of its output."""
        for value, semantics in self._semantics.items():
            if isinstance(semantics, Contraction):
                name = self.graph.name(value)
                self.modules[name] = self.graph.module(value)
                sizes = self._stored(self.graph.call(value).at(semantics.weight)).abs().reshape(semantics.view)
                ours, theirs = (_maxima(sizes, semantics.letters, axes) for axes in (semantics.out, semantics.inp))
                yield name, WeightRange(_listed(ours), WeightRange(_listed(theirs), 1.0).spread)

    def _stored(self, node: Node) -> Tensor:
        """A weight as it is stored, where it is; computed where constants compute it."""
        if node.op == "placeholder":
            stored: Tensor = constant_of(self._program, self._targets[node.name] or "")
            return stored.detach()
        computed = self.graph.constant(node)
        assert computed is not None
        return computed

    def reads(self) -> dict[str, Interval]:
        """The range of what contractions read, by the name of their output, where a BatchNorm tells it."""
        known: dict[Node, Interval] = {}
        found: dict[str, Interval] = {}
        for value, semantics in self._semantics.items():
            if isinstance(semantics, Contraction):
                data = self.graph.call(value).at(semantics.data)
                if data in known:
                    found[self.graph.name(value)] = known[data]
                continue
            interval = self._interval(value, semantics, known)
            if interval is not None and all(map(math.isfinite, interval)):
                known[value] = interval
        return found

    def _interval(self, value: Node, semantics: Semantics, known: dict[Node, Interval]) -> Interval | None:
        call = self.graph.call(value)
        if isinstance(semantics, (Scaling, Opaque)) and semantics.kind == "batch_norm":
            gamma, beta = (
                torch.tensor(without) if call[name] is None else call.constant(name)
                for name, without in zip(STATISTICS, (1.0, 0.0))
            )
            if gamma is None or beta is None:  # computed from the model's inputs
                return None
            return _hull((beta - REACH * gamma.abs(), beta + REACH * gamma.abs()))
        if isinstance(semantics, Scaling):
            data = known.get(call.at(semantics.slot))
            return None if data is None else _hull(semantics.affine(torch.tensor(end)) for end in data)
        operands = [node for _, node in call.slots()]
        given = [known[node] for node in operands if node in known]
        pointwise = isinstance(call.node.target, OpOverload) and torch.Tag.pointwise in call.node.target.tags
        if pointwise and len(operands) == len(given) == 1:
            return _hull([call.run({next(call.slots())[0]: torch.linspace(*given[0], POINTS, dtype=torch.float64)})])
        if isinstance(semantics, (Movement, Same, Homogeneous)) or (
            isinstance(semantics, Average) and semantics.no_shift is None and semantics.total == 1
        ):
            slots = semantics.slots if isinstance(semantics, (Movement, Homogeneous)) else (semantics.slot,)
            parts = [known[node] for node in map(call.at, slots) if node in known]
            return _hull(map(torch.tensor, parts)) if len(parts) == len(slots) else None
        return None


def _maxima(sizes: Tensor, letters: str, axes: Sequence[str]) -> Tensor:
    """The largest of ``sizes`` for every index of the axes that ``axes`` are made of, flat."""
    kept = "".join(axes)
    rest = [i for i, letter in enumerate(letters) if letter not in kept]
    # Neighbouring axes at once and the first ones first: torch is forty times slower the other way round.
    for _, run in groupby(enumerate(rest), key=lambda pair: pair[1] - pair[0]):
        sizes = sizes.amax([axis for _, axis in run], keepdim=True)
    order = [letters.index(letter) for letter in kept]
    return sizes.permute(order + rest).flatten()


def _hull(values: Iterable[Tensor]) -> Interval:
    ends = [(float(value.min()), float(value.max())) for value in values]
    return min(low for low, _ in ends), max(high for _, high in ends)


def _listed(values: Tensor) -> tuple[float, ...]:
    """A flat tensor as numbers of a few digits: thousands of them go into a report."""
    values = values.to(torch.float64)
    place = 10.0 ** (_DIGITS - 1 - values.abs().clamp(min=1e-300).log10().floor())
    return tuple(torch.where(values.isfinite() & (values != 0), (values * place).round() / place, values).tolist())
