"""Cross-layer equalisation: scales that the gauges leave free, chosen so that the ranges of layers match.

A per-tensor int8 weight has one step for all channels, so a channel that is a hundred times smaller than the largest
is rounded away. Where a scale is free between contractions, the output channels of those that make it can be divided by
what the input channels of those that read it are multiplied with, and ``s = sqrt(r1 / r2)`` makes both ranges equal
(Nagel et al. 2019, *Data-Free Quantization Through Weight Equalization and Bias Correction*, eq. 11). Here ``s`` is
rounded to a power of two: ranges then differ by up to a factor of two, and the model computes the same numbers to the
last bit, in any floating-point dtype.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from bnfold.graph.graph import Graph, Node
from bnfold.passes.choices import Choice, Choices
from bnfold.passes.gauges import Gauges
from bnfold.passes.rewriter import Rewriter
from bnfold.passes.solution import Path, Plan, Solution, scaled
from bnfold.report import Ledger, Scaled
from bnfold.semantics import Contraction
from bnfold.semantics.system import Floats, Ints, given

#: As in the ledger: names of a folded value and of the captured one that it must equal.
Site = tuple[tuple[str, str], ...]
#: A chain of layers settles in a few sweeps; each divides what is left by about two.
SWEEPS = 20


@dataclass(frozen=True, eq=False)
class Side:
    """One side of a contraction: for every weight (n,) its magnitude, and its free scales on this and the other side.

    ``makes``: it is the side of the output, where a weight is divided by the scale.
    """

    own: Ints
    other: Ints
    sizes: Floats
    makes: bool

    def ranges(self, log: Floats) -> Floats:
        """The magnitudes where scales are powers of two with exponents ``log``."""
        change = log[self.other] - log[self.own]
        return np.ldexp(self.sizes, (change if self.makes else -change).astype(np.int64))


def equalize(graph: Graph, ledger: Ledger) -> Ledger:
    """Equalises every layer with what reads it, where a scale passes, editing ``graph`` after folding and merging.

    The ledger gains an entry per layer whose output channels were scaled, and loses the sites of values that are now
    multiples of what they were; what reads them is a site instead.
    """
    graph.refresh()
    rewriter = Rewriter(graph)
    free = Gauges(rewriter)
    gauges = Gauges(rewriter, {value: "dynamic-size" for value in free.of if free.mixes(value)})
    held = Choices(gauges).holds(Choice(dict.fromkeys(gauges.affines, "stays")))
    assert held, "affines that stay contradict"
    frozen: set[int] = set()
    while True:
        balance = _Balance(gauges, frozen)
        solution = scaled(gauges, balance.choose)
        plan = Plan.of(solution)
        over = next((v for (v, slot), t in plan.constants.items() if graph.overflow(v, slot, t)), None)
        if over is None:
            break
        frozen |= balance.around(over)
    made, moved = solution.downstream, [value for value in gauges.of if not solution.is_kept(value)]
    plan.apply(rewriter)
    for value in moved:
        meaning = graph.meaning(value)
        rewriter.stands_for(value, meaning and meaning.then(solution.after(value)))
    layers = [value for value in moved if isinstance(gauges.at(value), Contraction)]
    changed = {graph.name(value) for value in moved}
    return replace(
        ledger,
        entries=tuple(replace(entry, site=_without(entry.site, changed)) for entry in ledger.entries),
        merges=tuple(replace(merge, site=_without(merge.site, changed)) for merge in ledger.merges),
        scaled=tuple(_entry(rewriter, solution, value, made[value]) for value in layers),
    )


class _Balance:
    """The ranges of all contractions by free scale, and the scales that balance them."""

    def __init__(self, gauges: Gauges, frozen: set[int]) -> None:
        self._gauges, self._frozen = gauges, frozen
        self._root: Ints = np.zeros(0, dtype=np.int64)

    def choose(self, var: Ints, root: Ints, val: Floats, right: Floats) -> Floats:
        """Powers of two for free scales that stand for themselves alone wherever they occur."""
        count = len(right)
        plain = (np.bincount(var, minlength=count)[var] == 1) & (val == 1)
        bad = np.unique(root[~plain])
        self._root = np.zeros(count, dtype=np.int64)  # scale 0 is 1
        good = plain & ~np.isin(root, bad) & ~np.isin(root, list(self._frozen))
        self._root[var[good]] = root[good]
        return given(np.exp2(self._balanced(count)), True)

    def around(self, value: Node) -> set[int]:
        """The free scales of a contraction."""
        call = self._gauges.call(value)
        near = [value, *(node for _, node in call.slots() if node in self._gauges.of)]
        return {int(i) for node in near for i in np.unique(self._root[self._gauges.of[node].scale])} - {0}

    def _balanced(self, count: int) -> Floats:
        log = np.zeros(count)
        groups = self._groups()
        for _ in range(SWEEPS):
            moved = False
            for roots, sides in groups:
                found = np.zeros((2, count))
                for side in sides:
                    np.maximum.at(found[int(side.makes)], side.own, side.ranges(log))
                into, made = found[:, roots]
                both = (into > 0) & (made > 0)
                step = np.zeros(len(roots))
                step[both] = np.round(np.log2(np.sqrt(made[both] / into[both])))
                log[roots] += step
                moved = moved or bool(step.any())
            if not moved:
                break
        return log

    def _groups(self) -> list[tuple[Ints, list[Side]]]:
        """For the free scales that one contraction makes, all sides that have any of them."""
        sides: dict[int, dict[int, Side]] = {}
        order: list[Ints] = []
        for value in self._gauges.graph.values():
            for side in self._sides(value):
                roots = np.unique(side.own)
                for root in roots[roots > 0].tolist():
                    sides.setdefault(root, {})[id(side)] = side
                if side.makes:
                    order.append(roots[roots > 0])
        done: set[int] = set()
        found = []
        for roots in order:
            new = np.array([root for root in roots.tolist() if root not in done], dtype=np.int64)
            done.update(new.tolist())
            if len(new):
                # What several layers make, as a residual stream, is left: the steps of what is stored count there too.
                new = new[[sum(side.makes for side in sides[root].values()) == 1 for root in new.tolist()]]
                near = {key: side for root in new.tolist() for key, side in sides[root].items()}
                found.append((new, list(near.values())))
        return found

    def _sides(self, value: Node) -> list[Side]:
        gauges, semantics = self._gauges, self._gauges.at(value)
        if not isinstance(semantics, Contraction) or semantics.geometry is None or value not in gauges.of:
            return []
        operand = gauges.call(value).at(semantics.data)
        made = self._on_weight(semantics, gauges.of[value].scale, semantics.out)
        indices = gauges.of[operand].scale if operand in gauges.of else np.zeros((1,) * len(semantics.inp), np.int64)
        read = self._on_weight(semantics, indices, semantics.inp)
        sizes = semantics.get_weight().abs().numpy()
        spatial = tuple(i for i, letter in enumerate(semantics.letters) if letter in "xyz")
        sizes = sizes.max(spatial, keepdims=True)
        made, read, sizes = (each.ravel() for each in np.broadcast_arrays(made, read, sizes))
        return [Side(made, read, sizes, True), Side(read, made, sizes, False)]

    def _on_weight(self, semantics: Contraction, indices: Ints, axes: tuple[str, ...]) -> Ints:
        found: Ints = semantics.on_weight(torch.from_numpy(self._root[indices]), axes).numpy()
        return found


def _entry(rewriter: Rewriter, solution: Solution, value: Node, made: Path) -> Scaled:
    graph = rewriter.graph
    readers = sorted(made.into, key=graph.order.__getitem__)
    sites = tuple((graph.name(reader), m.value) for reader in readers if (m := graph.meaning(reader)) is not None)
    into = tuple(dict.fromkeys(map(rewriter.where, readers)))
    scale = np.abs(solution.scale(value))
    return Scaled(graph.name(value), rewriter.where(value), into, float(np.maximum(scale, 1 / scale).max()), sites)


def _without(site: Site, changed: set[str]) -> Site:
    return tuple(pair for pair in site if pair[0] not in changed)
