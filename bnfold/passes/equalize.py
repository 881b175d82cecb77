"""Cross-layer equalisation: scales move through ReLU-like activations from one contraction into the next.

A per-tensor int8 weight has one step for all channels, so a channel that is a hundred times smaller than the largest
is rounded away. Where a positive scale per channel passes from a contraction into everything that reads its result,
the one's output channels can be divided by what the others' input channels are multiplied with, and ``s = sqrt(r1 /
r2)`` makes both ranges equal (Nagel et al. 2019, *Data-Free Quantization Through Weight Equalization and Bias
Correction*, eq. 11). Here ``s`` is rounded to a power of two: ranges then differ by up to a factor of two, and the
model computes the same numbers to the last bit, in any floating-point dtype.

Which channel of which weight a scale reaches is not worked out anew: the engine that carries affines says it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from bnfold.affine import Affine
from bnfold.graph.graph import Graph, Node
from bnfold.passes.folding import Folder
from bnfold.passes.plan import Plan
from bnfold.report import Ledger, Refusal, Scaled
from bnfold.semantics import Contraction, No

#: As in the ledger: names of a folded value and of the captured one that it must equal.
Site = tuple[tuple[str, str], ...]
#: A chain of layers settles in a few sweeps; each divides what is left by about two.
SWEEPS = 20


def equalize(graph: Graph, ledger: Ledger) -> Ledger:
    """Equalises every pair of layers that a scale passes between, editing ``graph`` after folding and merging.

    The ledger gains an entry per layer whose output channels were scaled, and loses the sites of values that are now
    multiples of what they were; what reads them is a site instead.
    """
    folder = Folder(graph)
    graph.refresh()
    total: dict[Node, Tensor] = {}
    readers: dict[Node, list[Node]] = {}
    for _ in range(SWEEPS):
        moved = False
        for value in list(graph.values()):
            found = _step(folder, value)
            if found is not None:
                scale, plan = found
                total[value] = total.get(value, torch.ones_like(scale)) * scale
                readers[value] = plan.absorbers
                moved = True
        if not moved:
            break
    changed = {
        graph.name(node) for node, meaning in graph.stands_for.items() if meaning is None and node in graph.order
    }
    scaled = tuple(_entry(graph, folder, value, scale, readers[value]) for value, scale in total.items())
    return replace(
        ledger,
        entries=tuple(replace(entry, site=_without(entry.site, changed)) for entry in ledger.entries),
        merges=tuple(replace(merge, site=_without(merge.site, changed)) for merge in ledger.merges),
        scaled=tuple(entry for entry in scaled if entry.largest > 1),
    )


def _step(folder: Folder, value: Node) -> tuple[Tensor, Plan] | None:
    """Equalises one contraction with what reads it: the scale taken from its channels; None where there is none."""
    graph, semantics = folder.graph, folder.semantics(value)
    fixed = graph.is_frozen(value) or not graph.is_sized(value)
    if not isinstance(semantics, Contraction) or semantics.geometry is None or fixed:
        return None
    axis = next(i for i, letters in enumerate(semantics.out) if letters)
    shape = graph.shape(value)
    probe = Affine.per_channel(torch.arange(1.0, shape[axis] + 1, dtype=torch.float64), 0.0, len(shape), axis)
    plan = folder.carried(value, probe)
    if isinstance(plan, Refusal) or plan.adds or plan.bypasses or plan.mixed or not plan.absorbers:
        return None
    if not all(isinstance(folder.semantics(reader), Contraction) for reader in plan.absorbers):
        return None
    if not _is_linear(folder, value, plan):
        return None
    answer = semantics.pull(probe)
    assert not isinstance(answer, No)
    own = _ranges(graph, value, {semantics.weight: answer.constants[semantics.weight]}, shape[axis])
    others = torch.zeros_like(own)
    for reader, slot, tensor in plan.constants:
        if reader in plan.absorbers:
            others = torch.maximum(others, _ranges(graph, reader, {slot: tensor}, shape[axis]))
    scale = torch.where((own > 0) & (others > 0), (own / others).sqrt().log2().round().exp2(), 1.0)
    if bool((scale == 1).all()):
        return None
    plan = folder.carried(value, Affine.per_channel(scale, 0.0, len(shape), axis))
    answer = semantics.pull(Affine.per_channel(1 / scale, 0.0, len(shape), axis))
    assert isinstance(plan, Plan) and not isinstance(answer, No)
    constants = [*((value, slot, tensor) for slot, tensor in answer.constants.items()), *plan.constants]
    if any(graph.overflow(*each) for each in constants):
        return None
    folder.write(constants, [value, *plan.carriers])
    return scale, plan


def _is_linear(folder: Folder, value: Node, plan: Plan) -> bool:
    """Whether readers get the scale itself, and no product of it with itself (``y*y``): then channels can be told."""
    twice = folder.carried(value, Affine.per_channel(2.0, 0.0, folder.graph.rank(value)))
    assert isinstance(twice, Plan)
    weights = [folder.graph.call(reader).constant(slot) for reader, slot, _ in twice.constants]
    return len(twice.constants) == len(plan.constants) and all(
        weight is not None and torch.equal(doubled.double(), 2 * weight.double())
        for weight, (_, _, doubled) in zip(weights, twice.constants)
    )


def _ranges(graph: Graph, value: Node, probed: Mapping[str, Tensor], channels: int) -> Tensor:
    """The largest magnitude of a weight per channel, where ``probed`` is it with channel c multiplied by ``c + 1``."""
    found = torch.zeros(channels, dtype=torch.float64)
    for slot, tensor in probed.items():
        old = graph.call(value).constant(slot)
        assert old is not None
        old = old.double()
        known = old != 0
        channel = (tensor[known] / old[known]).round().long() - 1
        found = found.scatter_reduce(0, channel, old[known].abs(), "amax")
    return found


def _entry(graph: Graph, folder: Folder, value: Node, scale: Tensor, readers: list[Node]) -> Scaled:
    sites = tuple((graph.name(reader), m) for reader in readers if (m := graph.meaning(reader)) is not None)
    into = tuple(dict.fromkeys(folder.where(reader) for reader in readers))
    return Scaled(graph.name(value), folder.where(value), into, float(scale.log2().abs().max().exp2()), sites)


def _without(site: Site, changed: set[str]) -> Site:
    return tuple(pair for pair in site if pair[0] not in changed)
