"""Inputs that take a model where random ones do not: found by following gradients, for the gate to judge.

Two searches, each of a fixed number of steps along the sign of the gradient (projected gradient descent: Madry et al.,
"Towards Deep Learning Models Resistant to Adversarial Attacks", 2018), in float64 so that rounding has no say:

- ``peak``: the largest value inside of the model, as a fraction of its dtype's range. Random data adds up with random
  signs and reaches a fraction of what a layer can give, so that an overflow in float16 stays unseen.
- ``difference``: how far the folded program's outputs are from the unfolded one's.

Every value stays within the range that the gate's other inputs span for that input as a whole, so what is found is no
larger than what was tried anyhow; each of them alone is possible, all together they need not look like real data. A
file is a black box: it gets what was found in the program that it claims to equal.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from bnfold.gate.draw import is_mask
from bnfold.gate.findings import first_line
from bnfold.gate.samples import Batch
from bnfold.gate.values import numbers
from bnfold.graph.capture import Captured
from bnfold.graph.functional import module_of
from bnfold.graph.interpret import Runner
from bnfold.report import Adversarial

#: Steps of each search, and the first one's length as a fraction of an input's range; it shrinks to a twentieth.
STEPS, STRIDE = 24, 0.25
#: A search moves this many samples at a time, where the batch is dynamic.
SAMPLES = 2
#: A value that takes this much of its dtype's range on random inputs is a mask's minus infinity, or seen already.
SEEN = 0.25


@dataclass(frozen=True)
class Found:
    """What the searches found.

    Attributes:
        batches: inputs for the gate; none where no gradient reaches an input.
        peak, before: the largest value inside of the model as a fraction of its dtype's range; where the search began.
        module: where that value arises.
        steps: of all searches together.
        notes: why a search found nothing, in words.
    """

    batches: tuple[Batch, ...]
    peak: float = 0.0
    before: float = 0.0
    module: str = ""
    steps: int = 0
    notes: tuple[str, ...] = ()

    def result(self, ratio: float) -> Adversarial | None:
        """For the report, with the worst ratio that the gate saw on these inputs; None where there are none."""
        samples = sum(batch.samples for batch in self.batches)
        return Adversarial(samples, self.steps, ratio, self.peak, self.before, self.module) if samples else None


def search(captured: Captured, folded: ExportedProgram | None, batches: Sequence[Batch]) -> Found:
    """Looks for inputs that overflow the model, or take ``folded`` away from it, if it is known; always the same ones.

    ``batches`` are the gate's other inputs: where the searches start, and the range that they keep to.
    """
    start = _start(batches)
    box = {
        i: _range(batches, i) for i, value in enumerate(start.flat)
        if isinstance(value, Tensor) and value.is_floating_point() and value.numel() and not is_mask(value)
    }  # fmt: skip
    if not box:
        return Found((), notes=("no input is a floating-point tensor, so gradients have none to move",))
    program = captured.program if folded is None else folded
    peaks = _Peaks(program, captured.masters if folded is None else None)
    scores: dict[str, Score] = {"large values": peaks.score}
    if folded is not None:
        scores["difference"] = _Difference(captured, folded).score
    found, notes = dict[str, Batch](), list[str]()
    for name, score in scores.items():
        try:
            inputs = _climb(score, start, box)
        except Exception as error:  # an operator without a gradient, or without float64
            notes.append(f"the search for {name} stopped: {first_line(error)}")
            continue
        if inputs is None:
            notes.append(f"the search for {name} stopped: no gradient reaches the inputs")
        else:
            found[name] = Batch(tuple(inputs), start.size, start.sizes, f"adversarial ({name})")
    peak, node, before = 0.0, "", 0.0
    if "large values" in found:
        (before, _), (peak, node) = peaks.largest(start.flat), peaks.largest(found["large values"].flat)
    module = next((module_of(n) for n in program.graph.nodes if n.name == node), "") or node
    return Found(tuple(found.values()), peak, before, module, STEPS * len(found), tuple(notes))


#: Of inputs, for every sample of a number of them: what is to be as large as possible.
Score = Callable[[Sequence[Any], int], Tensor]


def _climb(score: Score, start: Batch, box: Mapping[int, tuple[float, float]]) -> list[Any] | None:
    """The inputs of the highest score for every sample, from ``start`` on; those in ``box`` move, and stay in it.

    None where no gradient reaches them.
    """
    rows = start.size or 1
    # A sample's own best can only be kept where every input that moves belongs to one sample.
    if any(start.flat[i].shape[:1] != (rows,) for i in box):
        rows = 1
    flat, best = list(start.flat), list(start.flat)
    highest = torch.full((rows,), -torch.inf, dtype=torch.float64)
    for step in range(STEPS + 1):
        leaves = {i: flat[i].detach().double().requires_grad_() for i in box}
        with torch.enable_grad():
            scores = score([leaves.get(i, value) for i, value in enumerate(flat)], rows)
        if not scores.requires_grad:
            return None
        better = torch.nan_to_num(scores.detach(), nan=-torch.inf) > highest
        highest = torch.where(better, scores.detach(), highest)
        for i in box:
            old, new = best[i], flat[i]
            best[i] = torch.where(better.reshape(-1, *(1,) * (new.ndim - 1)) if new.ndim else better[0], new, old)
        gradients = torch.autograd.grad(scores.sum(), list(leaves.values()), allow_unused=True)
        if not step and not any(g is not None and bool(g.count_nonzero()) for g in gradients):
            return None
        stride = STRIDE * max(1 - step / STEPS, 0.05)
        for (i, (low, high)), gradient in zip(box.items(), gradients):
            if gradient is not None:
                moved = leaves[i].detach() + stride * (high - low) * torch.nan_to_num(gradient).sign()
                flat[i] = moved.clamp(low, high).to(start.flat[i].dtype)
    return best


class _Grad(Runner):
    """A runner in float64 that gradients pass."""

    def __init__(self, program: ExportedProgram, masters: Any) -> None:
        super().__init__(program, precise=True, masters=masters)
        self._constants = {k: v.detach() if isinstance(v, Tensor) else v for k, v in self._constants.items()}
        self.enabled = True

    def run(self, *args: Any, **kwargs: Any) -> Any:
        with torch.enable_grad() if self.enabled else contextlib.nullcontext():
            return super().run(*args, **kwargs)


class _Peaks(_Grad):
    """Watches how much of its dtype's range every value takes."""

    def __init__(self, program: ExportedProgram, masters: Any) -> None:
        super().__init__(program, masters)
        self._ranges = {
            node.name: float(torch.finfo(value.dtype).max)
            for node in program.graph.nodes
            if node.op == "call_function"
            and isinstance(value := node.meta.get("val"), Tensor)
            and value.is_floating_point()
        }
        self._seen: set[str] | None = None
        self._shares: dict[str, Tensor] = {}
        self._rows = 1

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        skipped = n.name not in self._ranges or n.name in (self._seen or ())
        if isinstance(value, Tensor) and value.is_floating_point() and value.numel() and not skipped:
            rows = self._rows if value.shape[:1] == (self._rows,) else 1
            size = torch.where(value.isfinite(), value, 0.0).abs().reshape(rows, -1).amax(1) / self._ranges[n.name]
            self._shares[n.name] = size.expand(self._rows)
        return value

    def score(self, inputs: Sequence[Any], rows: int) -> Tensor:
        """For every sample the largest share of its range that a value takes, as a logarithm."""
        self._rows, self._shares = rows, {}
        self(inputs)
        if self._seen is None:
            self._seen = {name for name, share in self._shares.items() if float(share.detach().max()) > SEEN}
        moving = [share for name, share in self._shares.items() if share.requires_grad and name not in self._seen]
        return torch.stack(moving).amax(0).clamp(min=1e-300).log() if moving else torch.zeros(rows)

    def largest(self, inputs: Sequence[Any]) -> tuple[float, str]:
        """The largest share of all, and the name of the value that takes it."""
        self._rows, self._shares, self.enabled = 1, {}, False
        self(inputs)
        self.enabled = True
        known = {name: float(share.max()) for name, share in self._shares.items()}
        name = max(known, key=lambda name: known[name], default="")
        return known.get(name, 0.0), name


class _Difference:
    """How far the folded program is from the unfolded one, both in float64: its rounded constants, and its faults."""

    def __init__(self, captured: Captured, folded: ExportedProgram) -> None:
        self._truth, self._folded = _Grad(captured.program, captured.masters), _Grad(folded, None)
        self._scale: list[Tensor] | None = None

    def score(self, inputs: Sequence[Any], rows: int) -> Tensor:
        """For every sample the RMS difference of the outputs over their RMS on the first inputs, as a logarithm."""
        truth, folded = numbers(self._truth(inputs)), numbers(self._folded(inputs))
        pairs = [(t, f) for t, f in zip(truth, folded) if t.is_floating_point() and t.shape == f.shape and t.numel()]
        if self._scale is None:
            self._scale = [_mean_square(t.detach(), 1).clamp(min=1e-300) for t, _ in pairs]
        parts = [_mean_square(f - t, rows) / scale for (t, f), scale in zip(pairs, self._scale)]
        total = torch.stack([part.expand(rows) for part in parts]).sum(0) if parts else torch.zeros(rows)
        return total.clamp(min=1e-300).log()


def _mean_square(value: Tensor, rows: int) -> Tensor:
    rows = rows if value.shape[:1] == (rows,) else 1
    return torch.where(value.isfinite(), value, 0.0).square().reshape(rows, -1).mean(1)


def _start(batches: Sequence[Batch]) -> Batch:
    """The first batch of the first sizes with ``SAMPLES`` samples or as few more as there are."""
    first = [batch for batch in batches if batch.sizes == batches[0].sizes]
    enough = [batch for batch in first if batch.samples >= SAMPLES] or first
    return min(enough, key=lambda batch: batch.samples)


def _range(batches: Sequence[Batch], index: int) -> tuple[float, float]:
    """The smallest and the largest finite value of one input over all batches."""
    values = [batch.flat[index].double() for batch in batches]
    finite = [value[value.isfinite()] for value in values]
    known = [value for value in finite if value.numel()]
    return (min(float(v.min()) for v in known), max(float(v.max()) for v in known)) if known else (0.0, 0.0)
