"""How far values are from the truth, element by element: the arithmetic of the gate, and the table of what it saw.

An element has its own noise. Drawn a few times it may come out next to nothing by chance, so it counts for no less than
is typical of its neighbours: the elements of its channel that are about as large. Nothing is ever pooled over elements
of unlike magnitude, and no element's error is averaged away.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import KW_ONLY, dataclass

import numpy as np
import torch
from torch import Tensor

#: Neighbours that say what noise is typical, and the fewest that do.
NEIGHBOURS, FEWEST = 32, 16
#: A single element may be off by so many limits. Rounding errors add up to a normal distribution, of which one in 10^8
#: lies beyond 5.7 standard deviations, and rounding a constant once is at most as much as the draws take it to be.
ELEMENT = 1.5
#: What the error of a runtime is measured in is itself but a few draws; a wrong kernel or fusion is off by thousands.
SLACK = 2.0
#: Sums in float64 are right to this, relative to the magnitude of a channel.
EXACT = 2.0**-46
#: The smallest number of each dtype, by its unit roundoff: what is less is nothing there.
SUBNORMAL = {2.0**-24: 2.0**-149, 2.0**-11: 2.0**-24, 2.0**-8: 2.0**-133}
#: Errors are counted by how often noise doubles in them, up to so often.
MOST = 63
#: The middle of each of many blocks, NaN where there is nothing.
Middle = Callable[[Tensor], Tensor]
TINY = float(torch.finfo(torch.float64).tiny)


@dataclass(frozen=True)
class Row:
    """What one witness made of one value on one input.

    Attributes:
        case: which input, in words.
        value: name of the output, or of the value ``inside``.
        ratio: RMS of error over noise, over all of the value or over the worst of its samples.
        worst, element: the largest error over noise of any one element, and which that is.
        error, noise: medians over elements, relative to them.
        doublings: how many elements are off by at most their noise, by less than 2 times it, 4 times, and so on.
        elements, samples: how many elements it has, and how many samples the input.
        finite: whether it has a finite element to compare, or none at all.
        shown: whether it is an output that has an element to compare.
        chaotic: whether rounding moves it out of proportion, so that a few draws do not say how far off it may be.
        said: what is wrong with it that no number says; it is infinitely far off then.
    """

    case: str
    witness: str
    value: str
    ratio: float
    worst: float
    element: tuple[int, ...] = ()
    error: float = 0.0
    noise: float = 0.0
    doublings: tuple[int, ...] = ()
    _: KW_ONLY
    elements: int = 0
    samples: int = 0
    inside: bool = False
    finite: bool = True
    shown: bool = False
    chaotic: bool = False
    said: str = ""

    def misfit(self, limit: float) -> float:
        """At most 1 where it is right."""
        return max(self.ratio / limit, self.worst / (ELEMENT * limit))


def compare(
    given: Tensor, truth: Tensor, noise: Tensor, *, unit: float, batched: bool = False, coarser: float = 1.0,
    draws: float = math.inf, enough: float = 1.0,
) -> tuple[float, float, tuple[int, ...], float, float, tuple[int, ...]]:  # fmt: skip
    """``ratio``, ``worst``, ``element``, ``error``, ``noise`` and ``doublings`` of a ``Row``.

    Args:
        given, truth: what a witness computed, of any floating-point dtype, and what is right, float64.
        noise: how far rounding moves every element, float64.
        unit: the unit roundoff of what the value is stored in.
        batched: axis 0 holds samples.
        coarser: how many times more coarsely the witness rounds.
        draws: of how many draws ``noise`` is the RMS: of a few the median is less.
        enough: up to this many noises nobody asks an element's neighbours.
    """
    good = truth.isfinite() & given.isfinite()
    if not given.numel() or not bool(good.any()):
        return 0.0, 0.0, (), 0.0, 0.0, ()
    off = torch.where(good, given.double() - truth, 0.0).abs()
    right = torch.where(good, truth, 0.0)
    size = torch.maximum(right.abs(), torch.where(good, given.double(), 0.0).abs())
    known, least = torch.nan_to_num(noise, 0.0, 0.0, 0.0), floor(right, unit)
    bar = (coarser * torch.maximum(known, least)).clamp(min=TINY)
    ratios = off / bar
    if float(ratios.max()) > enough:  # else nobody's neighbours change the verdict
        bar = (coarser * torch.maximum(typical(known, size, draws, batched), least)).clamp(min=TINY)
        ratios = off / bar
    rows = ratios.reshape(ratios.shape[0] if batched and ratios.ndim else 1, -1)
    worst = int(ratios.argmax())
    element = tuple(int(i) for i in np.unravel_index(worst, tuple(ratios.shape))) if ratios.ndim else ()
    shown = size > 0
    error, own = (float((x / size)[shown].median()) if bool(shown.any()) else 0.0 for x in (off, bar))
    ratio = float(rows.square().mean(1).sqrt().max())
    above = ratios[ratios > 1].log2().clamp(max=MOST).long().bincount().tolist()
    return ratio, float(ratios.reshape(-1)[worst]), element, error, own, (int(good.sum()) - sum(above), *above)


def floor(truth: Tensor, unit: float) -> Tensor:
    """What no comparison can resolve: a quarter of a rounding of the element itself, and float64 in its channel."""
    parts = [truth.abs().square().mean(_others(truth, axis), keepdim=True).sqrt() for axis in _channels(truth)]
    channel = torch.stack([part.expand_as(truth) for part in parts]).amin(0) if parts else truth.abs()
    return torch.maximum(0.25 * unit * truth.abs(), EXACT * channel).clamp(min=SUBNORMAL.get(unit, 0.0))


def typical(noise: Tensor, size: Tensor, draws: float = math.inf, batched: bool = False) -> Tensor:
    """Every element's noise, and no less than its neighbours in the order of their size say it is.

    These are the elements of its channel, and where axis 0 holds samples with enough of them of its sample; since one
    constant may move all of them at once, of a few draws also those of the other channels, which weigh as much as two
    draws do.

    The median of RMS of a few normal draws is less than what they are draws of: by the cube of 1 - 2/(9 draws), under
    a root (Wilson and Hilferty 1931, "The distribution of chi-square").
    """
    apart = (0,) if batched and noise.ndim > 1 and noise[:1].numel() >= FEWEST else ()
    floor = _least(noise, size, NEIGHBOURS, _median, apart)
    if draws < math.inf and noise.numel():
        beside = _neighbours(noise, size, apart, NEIGHBOURS, _median)
        floor = torch.maximum(floor, beside * (2 / (2 + draws)) ** 0.5)
    return torch.maximum(noise, floor / (1 - 2 / (9 * draws)) ** 1.5)


def pooled(error: Tensor, size: Tensor) -> Tensor:
    """What errors that were seen once say of each element: RMS over many neighbours, for kernels err in steps."""
    return torch.maximum(error.abs(), _least(error.abs(), size, 8 * NEIGHBOURS, _rms, ()))


def _least(noise: Tensor, size: Tensor, width: int, middle: Middle, apart: tuple[int, ...]) -> Tensor:
    if not noise.numel():
        return noise
    axes = [(*apart, axis) for axis in _channels(noise)] or [apart]
    return torch.stack([_neighbours(noise, size, each, width, middle) for each in axes]).amin(0)


def _median(blocks: Tensor) -> Tensor:
    return blocks.nanmedian(2).values.nan_to_num(0.0)


def _rms(blocks: Tensor) -> Tensor:
    return blocks.square().nanmean(2).sqrt().nan_to_num(0.0)


def _channels(value: Tensor) -> list[int]:
    """Where channels may lie: convolutions have theirs on axis 1, linear layers on the last."""
    return sorted({1, value.ndim - 1}) if value.ndim > 1 else []


def _others(value: Tensor, axis: int) -> list[int]:
    return [i for i in range(value.ndim) if i != axis]


def _neighbours(noise: Tensor, size: Tensor, axes: tuple[int, ...], width: int, middle: Middle) -> Tensor:
    """The middle of the noise of elements about as large, of one place on ``axes``; zeros are nobody's neighbours.

    A channel with few elements of its own is judged with the others, a sample with the other samples.
    """
    front = tuple(range(len(axes)))
    moved = noise.movedim(axes, front)
    rows, sizes = (x.movedim(axes, front).reshape(math.prod(moved.shape[: len(axes)]), -1) for x in (noise, size))
    few = (sizes > 0).sum(1) < FEWEST

    def back(found: Tensor) -> Tensor:
        return found.reshape(moved.shape).movedim(front, axes)

    if not axes or not bool(few.any()):
        return back(_grouped(rows, sizes, width, middle))
    whole = _neighbours(noise, size, axes[:-1], width, middle)
    if rows.shape[1] < FEWEST:
        return whole
    return torch.where(back(few[:, None].expand_as(rows)), whole, back(_grouped(rows, sizes, width, middle)))


def _by_size(sizes: Tensor) -> Tensor:
    """The order of every row, largest first; of equal ones as float32 has them, as they lie.

    The keys are all different, so that numpy's vectorised sort finds the same order on every processor; torch's stable
    one was most of the check of large outputs.
    """
    keys = np.iinfo(np.int32).max - sizes.float().contiguous().numpy().view(np.int32).astype(np.int64)
    keys = keys << 32 | np.arange(sizes.shape[1])
    keys.sort(axis=1)
    return torch.from_numpy(keys & np.iinfo(np.uint32).max)


def _grouped(rows: Tensor, sizes: Tensor, width: int, middle: Middle) -> Tensor:
    """Blocks of ``width`` elements of each row in the order of their size, largest first, and the middle of each."""
    count = rows.shape[1]
    width = min(width, count)
    order = _by_size(sizes)
    ordered = torch.where(sizes > 0, rows, torch.nan).gather(1, order)
    blocks = torch.nn.functional.pad(ordered, (0, -count % width), value=torch.nan).reshape(len(rows), -1, width)
    found = middle(blocks)
    if found.shape[1] > 1:  # the last may hold a handful
        few = (~blocks.isnan()).sum(2) < min(FEWEST, width)
        found = torch.where(few, torch.maximum(found, torch.cat([found[:, :1], found[:, :-1]], 1)), found)
    return torch.empty_like(ordered).scatter_(1, order, found.repeat_interleave(width, 1)[:, :count])


@dataclass(frozen=True)
class Source:
    """What rounding makes of a few values: ``draw`` by a seed, ``louder`` times as much, of what is ``still`` else.

    ``quiet`` draws just as much as rounding does, where values move out of proportion to how loud it is.
    """

    still: Sequence[Tensor]
    draw: Callable[[int], Sequence[Tensor]]
    louder: float = 1.0
    quiet: Source | None = None


#: How often the constants of each source are drawn, step by step: of the reference once, which says enough of most
#: right files; of the claim as well; and more where what was seen may be chance.
STEPS = ((1, 0), (1, 1), (4, 4), (8, 8), (16, 16))
MANY = 2  # the first step that draws all sources more than once
#: Rounding the constants of a claim excuses this many times what rounding the reference's does, and no more: arithmetic
#: that takes away what it added loses the digits between, and its own rounding would hide that.
EXCUSE = 16.0
#: The same where the reference is cheap to draw, as it is louder.
CHEAP = ((1, 0), (4, 0), (4, 4), (8, 8), (16, 16))
#: Moved by more than this part of itself a value answers no more in proportion to how much its constants are moved:
#: about as large a part of that is of second order.
PROPORTION = 1 / 16


class Draws:
    """The noise of a few values on one input, drawn as often as it takes to be sure.

    Args:
        sources: what rounds constants, the reference first. Their noises add up as independent ones do.
        begun: draws of which the first source is the same.
        unit, excuse: the reference's unit roundoff; how many times what the first source does the others count for.

    Attributes:
        chaotic: the values that a louder draw moved out of proportion, by position.
    """

    def __init__(
        self, sources: Sequence[Source], begun: Draws | None = None, unit: float = 2.0**-24, excuse: float = EXCUSE
    ) -> None:
        self._sources, self._counts = list(sources), [0] * len(sources)
        self._unit, self._excuse = unit, excuse
        self._squares = [_nothing(source) for source in sources]
        self.chaotic: frozenset[int] = frozenset()
        if begun is not None:
            self._sources[0], self.chaotic = begun._sources[0], begun.chaotic
            self._counts[0], self._squares[0] = begun._counts[0], [square.clone() for square in begun._squares[0]]

    def more(self, step: int) -> None:
        """Draws as often as a step of ``STEPS`` says."""
        counts = (CHEAP if self._sources and self._sources[0].louder > 1 else STEPS)[step]
        for at, (source, count) in enumerate(zip(self._sources, counts)):
            for seed in range(self._counts[at], count):
                drawn = source.draw(seed)
                if source.quiet is not None and (far := _far(source.still, drawn)):
                    self.chaotic |= far
                    self._sources[at], self._counts[at], self._squares[at] = source.quiet, 0, _nothing(source.quiet)
                    return self.more(step)
                for square, moved, still in zip(self._squares[at], drawn, source.still):
                    if moved.shape == still.shape and moved.is_floating_point():
                        off = torch.nan_to_num(moved.double() - still.double(), 0.0, 0.0, 0.0)
                        square += (off / source.louder).square()
            self._counts[at] = max(self._counts[at], count)
        return None

    @property
    def whole(self) -> bool:
        """Whether every source has been drawn."""
        return all(self._counts)

    @property
    def count(self) -> float:
        """How many draws the noise is worth, of sources that are alike (Welch and Satterthwaite)."""
        counts = [count for count in self._counts if count]
        return len(counts) ** 2 / sum(1 / count for count in counts) if counts else math.inf

    def noise(self, index: int) -> Tensor:
        """RMS of what all sources together do to a value."""
        counted = zip(self._squares, self._counts)
        first, *each = [squares[index] / max(count, 1) for squares, count in counted if index < len(squares)]
        fitting = (square for square in each if square.shape == first.shape)
        rest = sum(fitting, torch.zeros_like(first))
        if bool((rest > self._excuse**2 * first).any()):
            size = self._sources[0].still[index].double().abs()
            usual = typical(first.sqrt(), size, self._counts[0] or math.inf)
            most = (self._excuse * torch.maximum(usual, self._unit * size)).square()
            # In the tail of an activation rounding the model's own moves a value by much of itself, and all by chance.
            rest = torch.where(self._excuse * usual > size, rest, torch.minimum(rest, most))
        return (first + rest).sqrt()


def _nothing(source: Source) -> list[Tensor]:
    return [torch.zeros_like(value, dtype=torch.float64) for value in source.still]


def _far(still: Sequence[Tensor], moved: Sequence[Tensor]) -> frozenset[int]:
    """Which values have moved too far to have done so in proportion."""
    pairs = ((i, a.double(), b.double()) for i, (a, b) in enumerate(zip(still, moved)) if a.is_floating_point())
    same = ((i, a, b, a.isfinite() & b.isfinite()) for i, a, b in pairs if a.shape == b.shape)
    return frozenset(i for i, a, b, on in same if bool((b - a)[on].norm() > PROPORTION * a[on].norm()))


#: A value this many limits off is no chance, whatever else is drawn.
CERTAIN = 100.0


def settled(rows: Iterable[Row], limit: float, step: int, draws: Draws) -> bool:
    """Whether no further draw changes what is said of any value.

    One draw says little of how far off it is, and none nothing: a claim may store its constants more coarsely.
    """
    certain = CERTAIN if step >= MANY else CERTAIN**2 if draws.whole else math.inf
    unsure = (row for row in rows if not row.said and not (row.chaotic and step >= MANY))
    return not any(1 < row.misfit(limit) <= certain for row in unsure)


def seen_error(given: Tensor, truth: Tensor) -> Tensor:
    """What a run that was seen once, and is right, is off by where a channel's elements are about as large."""
    off = (given.double() - truth).nan_to_num(0.0, 0.0, 0.0)
    return pooled(off, truth.nan_to_num(0.0, 0.0, 0.0).abs())


def specials(given: Tensor, truth: Tensor) -> str | None:
    """How the places and kinds of NaN and the infinities differ, in words; None where they are the same."""
    apart = (
        (~given.isfinite() & truth.isfinite(), "NaN or infinite where the truth is finite"),
        (given.isfinite() & ~truth.isfinite(), "finite where the truth is NaN or infinite"),
        ((given.isnan() != truth.isnan()) | (given.isposinf() != truth.isposinf()),
         "another kind of NaN or infinity than the truth"),
    )  # fmt: skip
    found = ((int(where.sum()), words) for where, words in apart)
    return next((f"{count} of {given.numel()} elements are {words}" for count, words in found if count), None)


def unit_roundoff(dtype: torch.dtype) -> float:
    """Of a floating-point dtype."""
    return float(torch.finfo(dtype).eps) / 2 if dtype.is_floating_point else math.ulp(1.0) / 2
