"""What parts of the user's data show of a file, wherever they are looked at, and how that adds up."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from bnfold.gate.metrics import Classification, Errors, Regression


@dataclass(frozen=True)
class Facts:
    """What must be known of a model to see how a file does on data.

    Attributes:
        noise: the unfolded model's relative error, of every output that has samples along its first axis, by index.
        classes: the axis of the classes, of the output that has some.
        targets: the outputs that have targets.
        labelled: whether the samples have labels.
        size: how many samples are run at once.
        fixed: whether the batch has always as many samples.
        batched: whether its size is a dynamic one.
        limit: as the gate's.
        logits: the noise of every class, of the output that has some.
        coarser: how many times more coarsely than the model the candidate rounds.
    """

    noise: Mapping[int, float]
    classes: Mapping[int, int]
    targets: frozenset[int]
    labelled: bool
    size: int
    fixed: bool
    batched: bool
    limit: float
    logits: Mapping[int, tuple[float, ...]] = field(default_factory=dict)
    coarser: float = 1.0


@dataclass
class Part:
    """What some of the data has shown; ``ended`` where the candidate failed on it.

    Attributes:
        samples: how many.
        errors, targets, classes: by index of the output.
        worst: by output, how far the sample is off that is furthest off, its index, and its error in noises.
        digest: SHA-256 of the data.
        problems, doubts: what was found.
        unused: arrays of the data that are nothing to the model.
    """

    samples: int
    errors: dict[int, Errors]
    targets: dict[int, Regression]
    classes: dict[int, Classification]
    worst: dict[int, tuple[float, int, float]] = field(default_factory=dict)
    digest: str = ""
    problems: list[str] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)
    unused: tuple[str, ...] = ()
    ended: bool = False

    def __add__(self, other: Part) -> Part:
        """Of both, this one first; ``self`` is not used any more."""
        for i, errors in self.errors.items():
            errors.absorb(other.errors[i])
        for i, fit in self.targets.items():
            fit.absorb(other.targets[i])
        for i, found in self.classes.items():
            found.absorb(other.classes[i], self.samples)
        for i, (off, sample, ratio) in other.worst.items():
            if off > self.worst[i][0]:
                self.worst[i] = off, sample + self.samples, ratio
        digest = hashlib.sha256(f"{self.digest} {other.digest}".encode()).hexdigest()
        return Part(
            self.samples + other.samples, self.errors, self.targets, self.classes, self.worst, digest,
            self.problems + other.problems, self.doubts + other.doubts, self.unused, self.ended or other.ended,
        )  # fmt: skip


#: Sees how a file does on every part of data: what each shows, in their order.
Spread = Callable[[Facts], Iterable[Part]]
